"""The laws of the house, and that each of them can be broken."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import house

BOOKS = house.books()
FLOORS = {b.name: b.number for b in BOOKS}


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.path.stem)
def test_a_notebook_keeps_the_laws(book):
    assert [str(x) for x in house.breaches(book, FLOORS)] == []


def test_the_house_keeps_the_laws():
    assert [str(x) for x in house.house_breaches(BOOKS)] == []


# ---- an enemy's notebooks

WORDS = "word " * 200


@pytest.fixture
def site(tmp_path: Path):
    "Write notebooks into an empty house; `site()` checks it."
    (tmp_path / "nbs" / "tutorials").mkdir(parents=True)
    (tmp_path / "aurea_orchestrator").mkdir()

    def write(stem: str, *exports: str, prose: str = WORDS, title: str | None = None, made: str | None = None) -> None:
        name = Path(stem).name.partition("_")[2]
        cells = [("markdown", f"# {title or name}\n\n> what it is for\n\n{prose}"), ("code", f"#| default_exp {made or name}")]
        cells += [("code", f"#| export\n{source}") for source in exports]
        if stem.startswith("tutorials/"): del cells[1]
        page = {"cells": [{"cell_type": kind, "source": source.splitlines(True)} for kind, source in cells]}
        (tmp_path / "nbs" / f"{stem}.ipynb").write_text(json.dumps(page))

    write.check = lambda: " | ".join(map(str, house.check(tmp_path)))
    write.root = tmp_path
    return write


def test_a_good_house_has_no_breach(site):
    site("10_call", "import inspect")
    site("20_codec", "def read():\n    import numpy\n    return numpy")
    site("50_cache", "from aurea_orchestrator.call import x\nfrom aurea_orchestrator import codec")
    site("tutorials/01_first")
    assert site.check() == ""


@pytest.mark.parametrize("stem, source, says", [
    ("20_codec", "import numpy", "imports numpy at import time"),
    ("20_codec", "class A:\n    import numpy as np", "imports numpy at import time"),
    ("22_stores.memory", "import redis.asyncio", "imports redis, whose door is stores.link and stores.redis"),
    ("22_stores.memory", "def f():\n    from sqlite3 import connect", "imports sqlite3"),
    ("50_cache", "from fastapi import FastAPI", "imports fastapi"),
    ("50_cache", "import pickle", "imports pickle, whose door is closed"),
    ("30_flight", "from aurea_orchestrator.cache import Cache", "imports cache (50): stairs go up only"),
    ("30_flight", "from aurea_orchestrator import cache", "imports cache (50): stairs go up only"),
    ("30_flight", "from aurea_orchestrator.nowhere import x", "which no notebook makes"),
    ("30_flight", "from .errors import x", "imports relatively"),
    ("60_near", "from aurea_orchestrator.codec import x", ""),
    ("22_stores.memory", "from aurea_orchestrator.codec import x", "may not know codec"),
    ("30_flight", "\n".join("x = 1" for _ in range(41)), "has 41 lines, more than 40"),
])
def test_a_breach_is_seen(site, stem, source, says):
    site("20_codec", "x = 1")
    site("50_cache", "x = 1")
    site(stem, source)
    assert (says in site.check()) if says else site.check() == ""


def test_a_notebook_may_not_be_long_silent_or_misnamed(site):
    site("30_flight", *["\n".join("x = 1" for _ in range(38))] * 8, prose="few words")
    site("31_leases", title="other")
    site("32_streams", made="stream")
    found = site.check()
    assert "exports 304 lines, more than 300" in found and "words per exported line" in found
    assert "31_leases.ipynb: does not begin with '# leases'" in found and "32_streams.ipynb: makes stream, its name says streams" in found


def test_numbers_are_unique_modules_have_notebooks_and_tutorials_export_nothing(site):
    site("30_flight", "x = 1")
    site("30_leases", "x = 1")
    site("tutorials/01_first")
    site("tutorials/01_other", "x = 1")
    (site.root / "aurea_orchestrator" / "left_over.py").write_text("")
    found = site.check()
    assert "the number 30 is 30_flight.ipynb's" in found and "the number 01 is 01_first.ipynb's" in found
    assert "left_over.py: no notebook makes this module" in found and "01_other.ipynb: a tutorial exports nothing" in found


def test_only_the_cli_imports_main(site):
    site("75_main", "x = 1")
    site("81_notebook", "from aurea_orchestrator.main import app")
    assert "81_notebook.ipynb: imports main, which only cli may" in site.check()
    site("80_cli", "from aurea_orchestrator.main import app")
    assert "80_cli" not in site.check()
