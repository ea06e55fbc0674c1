# Every target sets up what it needs: `make test` in a clean clone is enough. `make` alone lists them.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV ?= .venv
BENCH ?= .venv-bench
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
META := settings.ini setup.py pyproject.toml
ARGS ?=

.PHONY: help
help: ## List the targets
	@echo 'make TARGET [PYTHON=python3.12] [ARGS="…"]'; echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# ---- set-up: a stamp for each extra, made again when the metadata changes

$(PY):
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Python 3.11 or newer is needed, but this is %d.%d (%s). Name another one: make PYTHON=/path/to/python3.12 …" % (v[0], v[1], sys.executable))'
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { echo 'No virtual environment could be made; on Debian and Ubuntu: apt-get install python3-venv' >&2; rm -rf $(VENV); exit 1; }

$(VENV)/.app: $(META) | $(PY)
	@echo 'installing the package'
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(META) | $(PY)
	@echo 'installing the package and what its development needs'
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.app

$(VENV)/.docs: $(META) | $(PY)
	@echo 'installing what the site needs'
	@$(PIP) -e '.[docs]'
	@touch $@ $(VENV)/.app

$(BENCH)/.peers: bench/requirements.txt $(META) | $(PY)
	@echo 'making $(BENCH) and installing the peers'
	@$(PY) -m venv $(BENCH)
	@$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -e . -r bench/requirements.txt
	@touch $@

# ---- to run

.PHONY: serve
serve: $(VENV)/.app ## Start the app (HOST and PORT from the environment or .env; 0.0.0.0 and 8000)
	@$(PY) -m aurea_orchestrator serve $(ARGS)

# ---- to develop

.PHONY: test
test: $(VENV)/.dev ## Run the tests and the notebooks (ARGS="-k memory -x")
	@$(PY) -m pytest $(ARGS)

.PHONY: check lint types outputs synced house
check: lint types house synced outputs ## Check style, types, house laws, exports, README and stored outputs (-k: all, whatever fails)

lint: $(VENV)/.dev
	$(PY) -m ruff check --quiet .

types: $(VENV)/.dev
	$(PY) -m mypy --strict --no-error-summary

house: $(VENV)/.dev
	$(PY) tools/house.py

synced: $(VENV)/.dev
	$(PY) tools/synced.py
	$(PY) tools/envexample.py --check

outputs: $(VENV)/.dev
	$(PY) tools/nbrun.py --check

.PHONY: bench
bench: $(BENCH)/.peers $(VENV)/.dev ## Measure us beside the peers, some minutes (ARGS="redis http" for some parts, ARGS=--full for more)
	@$(BENCH)/bin/python -m bench.run $(ARGS)
	@$(PY) tools/nbrun.py nbs/tutorials/90_benchmarks.ipynb

.PHONY: docs
docs: $(VENV)/.docs ## Build the site into _docs (needs no network once set up)
	@$(PY) tools/docs_src.py docs/_src
	@$(PY) -m sphinx -q -n -W --keep-going -j 2 -d docs/_src/.doctrees -b html docs/_src docs/_src/_build/html
	@rm -rf _docs && mv docs/_src/_build/html _docs
	@echo 'open _docs/index.html'

# ---- to edit notebooks in a text editor: make edit NB=50_cache, then make sync NB=50_cache

.PHONY: edit sync run readme
edit: $(VENV)/.dev ## Write a notebook as text to .edit/ (NB=50_cache)
	@$(PY) tools/edit.py out $(NB)

sync: $(VENV)/.dev ## Bring the text back, export, run and store the outputs (NB=50_cache)
	@$(PY) tools/edit.py back $(NB)

run: $(VENV)/.dev ## Run all notebooks and store their outputs
	@$(PY) tools/nbrun.py

readme: $(VENV)/.dev ## Write README.md from nbs/index.ipynb
	@$(PY) tools/readme.py

.PHONY: clean
clean: ## Remove what was built, and the virtual environment
	rm -rf $(VENV) $(BENCH) _docs _proc docs/_src build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
