"""The tools that the other checks lean on: they see what they are there to see."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import docs_src, nbrun, readme

ROOT = Path(__file__).resolve().parents[2]


def notebook(path: Path, source: str, output: str | None) -> Path:
    outputs = [] if output is None else [{"name": "stdout", "output_type": "stream", "text": [output]}]
    cell = {"cell_type": "code", "execution_count": None, "id": "c0ffee00", "metadata": {}, "outputs": outputs}
    cell["source"] = source.splitlines(True)
    path.write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n")
    return path


@pytest.mark.parametrize("source, output, ok", [
    ("print(1 + 1)", "2\n", True),
    ("print(1 + 1)", "3\n", False),
    ("print(1 + 1)", None, False),
    ("x = 1", "left over\n", False),                      # a cell that says nothing any more
    ("#| notest\nprint(1 + 1)", "3\n", True),
    ("#| eval: false\nprint(1 + 1)", "3\n", True),
    ("raise ValueError", None, False),
])
def test_a_stored_output_that_is_not_true_is_seen(tmp_path, source, output, ok):
    done = nbrun.run(notebook(tmp_path / "n.ipynb", source, output), "check")
    assert (done.returncode == 0) == ok, done.stderr
    assert ok or "run again" in done.stderr or "ValueError" in done.stderr


def test_checking_and_testing_change_no_file_and_storing_does(tmp_path):
    path = notebook(tmp_path / "n.ipynb", "print(1 + 1)", "3\n")
    before = path.read_text()
    assert nbrun.run(path, "test").returncode == 0 and nbrun.run(path, "check").returncode == 1 and path.read_text() == before
    assert nbrun.run(path, "store").returncode == 0 and nbrun.run(path, "check").returncode == 0


def test_a_notebook_runs_without_the_developers_settings(tmp_path, monkeypatch):
    for name in ("REDIS_HOST", "LLM_API_KEY", "OPENAI_API_KEY", "API_KEY", "PORT", "CACHE_TIMEOUT", "embedding_model"):
        monkeypatch.setenv(name, "mine")
    source = "import os\nprint(os.environ['CACHE_URL'], [k for k, v in os.environ.items() if v == 'mine'], " \
             "os.path.isdir(os.environ['XDG_CACHE_HOME']))"
    assert nbrun.run(notebook(tmp_path / "n.ipynb", source, "memory:// [] True\n"), "check").returncode == 0


def test_a_test_runs_without_the_developers_settings_too(tmp_path):
    "Even those that were set when pytest started; and where redis-server was promised, its tests may not be skipped."
    (tmp_path / "test_it.py").write_text(
        "import os, pytest\n"
        "@pytest.fixture(scope='session')\ndef early(): return os.environ.get('REDIS_HOST'), os.environ['XDG_CACHE_HOME']\n"
        "def test_wiped(early):\n    assert early[0] is None and early[1] != '/mine'\n"
        "    assert 'API_KEY' not in os.environ and not os.path.exists('.env')\n"
        "@pytest.mark.redis\ndef test_server(): pytest.skip('no redis-server here')\n"
        "def test_other(): pytest.skip('for another reason')\n")
    (tmp_path / ".env").write_text("API_KEY=mine\n")
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-q", "-o", "markers=redis", "test_it.py"]
    env = os.environ | {"REDIS_HOST": "mine", "API_KEY": "mine", "XDG_CACHE_HOME": "/mine", "PYTHONPATH": str(ROOT)}
    for promised, says in (("", "1 passed, 2 skipped"), ("0", "1 passed, 2 skipped"), ("1", "1 failed, 1 passed, 1 skipped")):
        done = subprocess.run(command, cwd=tmp_path, env=env | {"AUREA_REQUIRE_REDIS": promised}, text=True, capture_output=True)
        assert says in done.stdout, done.stdout + done.stderr
    assert "this test was skipped: Skipped: no redis-server here" in done.stdout


def test_a_package_that_is_not_what_the_notebooks_export_is_seen(tmp_path):
    for name in ("aurea_orchestrator", "nbs", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "README.md"): shutil.copy(ROOT / name, tmp_path)
    package = tmp_path / "aurea_orchestrator"
    shutil.copy(package / "errors.py", package / "renamed.py")
    (package / "effects.py").unlink()
    (package / "errors.py").write_text((package / "errors.py").read_text().replace("Anything that", "Whatever"))
    (tmp_path / "README.md").write_text("# something else\n")
    done = subprocess.run([sys.executable, "tools/synced.py"], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 1, done.stderr
    for says in ("renamed.py: no notebook exports it", "effects.py: missing", '-    "Whatever', "README.md and nbs/index.ipynb differ"):
        assert says in done.stdout


def test_links_of_the_readme_lead_from_the_root():
    said = "[a](tutorials/01_a.ipynb#b), [c](../C.md), [d](https://d.example/e), [f](#g)\n\n```\n[h](i.ipynb)\n```"
    rooted = "[a](nbs/tutorials/01_a.ipynb#b), [c](C.md), [d](https://d.example/e), [f](#g)\n\n```\n[h](i.ipynb)\n```"
    assert readme.rooted(said) == rooted


def test_readme_shows_cells_and_outputs_but_not_what_is_hidden():
    def code(source, *outputs): return {"cell_type": "code", "source": [source], "outputs": list(outputs)}
    out = {"output_type": "stream", "name": "stdout", "text": ["\x1b[1mtwo\x1b[0m\n"]}
    cells = [{"cell_type": "markdown", "source": ["# t"]}, code("#| hide\nsecret"), code("#| echo: false\nprint('two')", out),
             code("x = '```'"), code("#| export\ndef f(): ...")]
    assert list(readme.parts({"cells": cells})) == ["# t", "```text\ntwo\n```", "````python\nx = '```'\n````"]


CELL = '''
class Shelf(NamedTuple):
    "A shelf."
    size: int = 3  # How many fit, '#' included
    _hidden: int = 0

class Box(Shelf):
    "A box on a `Shelf`."
    def __init__(
        self,
        label: str,  # What is written on it
    ) -> None: ...
    @property
    def weight(self) -> float: "In kilograms."
    async def open(self, *, wait: float = 1.0) -> bytes: "Open it."
    def _secret(self): ...
    def silent(self): ...

def _private(): ...
'''


def test_reference_entries_come_from_the_source():
    links = docs_src.Links(docs_src.symbols({"boxes": [CELL]}), {"boxes": "boxes", "keys": "keys"}, "boxes")
    text = docs_src.reference(CELL, links)
    for says in ("{py:class} Shelf(size: int = 3)", "{py:attribute} size", "How many fit, '#' included", "{py:class} Box(label: str)",
                 ":param label: What is written on it", "A box on a {py:obj}`Shelf <aurea_orchestrator.boxes.Shelf>`.",
                 "{py:property} weight\n:type: float", "{py:method} open(*, wait: float=1.0) -> bytes\n:async:"):
        assert says in text
    assert not any(word in text for word in ("_hidden", "_secret", "_private", "silent"))
    stays = "the `keys`, `shelf`, `x = Shelf`, [`Shelf`](there)\n\n```\n`Shelf`\n```"
    assert links.text(f"see `keys`, {stays}") == f"see {{doc}}`keys </keys>`, {stays}"


def test_a_name_that_may_mean_two_things_is_not_linked():
    books = {
        "cache": ["class Cache:\n    def clear(self): 'Forget.'\n    def stats(self): 'Totals.'\ndef clear(): ...\ndef refresh(): ...\ndef get_cache(): ..."],
        "codec": ["def encode(size): ...\ndef size(): ...\ndef wait(): ...\ndef _own(retry_after): ..."],
        "wire": ["class _Cached:\n    after: int\n    def refresh(self): self.wait = 1\ndef encode(): ...\ndef after(): ...\ndef retry_after(): ..."],
    }
    links = docs_src.Links(docs_src.symbols(books), {name: name for name in books}, "codec")
    for name in ("clear", "cache.clear", "refresh", "refresh()", "encode", "size", "wait", "after()", "retry_after", "codec", "nobody"):
        assert links.text(f"the `{name}`") == f"the `{name}`"
    for said, full in {
        "get_cache": "cache.get_cache", "get_cache()": "cache.get_cache", "cache.refresh": "cache.refresh", "Cache.clear": "cache.Cache.clear",
        "cache.stats()": "cache.Cache.stats", "aurea_orchestrator.wire.encode": "wire.encode", "codec.encode": "codec.encode",
    }.items():
        assert links.text(f"the `{said}`") == f"the {{py:obj}}`{said} <aurea_orchestrator.{full}>`"
    assert links.text("see `wire`, the `wire` page") == "see {doc}`wire </wire>`, the {doc}`wire </wire>` page"


def test_a_link_between_notebooks_leads_to_the_page():
    nbs = ROOT / "nbs"
    pages = {nbs / "50_cache.ipynb": "cache", nbs / "tutorials" / "01_a.ipynb": "tutorials/a", nbs / "tutorials" / "02_b.ipynb": "tutorials/b"}

    def to(url, book="tutorials/01_a.ipynb"): return docs_src.leads(url, nbs / book, pages, "https://forge.example/blob/main")
    assert [to("02_b.ipynb"), to("02_b.ipynb#c"), to("../50_cache.ipynb")] == ["b.ipynb", "b.ipynb#c", "../cache.ipynb"]
    assert [to("tutorials/02_b.ipynb", "50_cache.ipynb"), to("#c"), to("https://d.example/e.ipynb")] == ["tutorials/b.ipynb", "#c", "https://d.example/e.ipynb"]
    assert to("../deploy/alerts.yml", "50_cache.ipynb") == "https://forge.example/blob/main/deploy/alerts.yml"
    with pytest.raises(SystemExit, match="03_gone"): to("03_gone.ipynb")
    links = docs_src.Links({}, {}, None, to)
    assert links.text("a [`b`](02_b.ipynb) c\n\n```\n[b](02_b.ipynb)\n```") == "a [`b`](b.ipynb) c\n\n```\n[b](02_b.ipynb)\n```"
