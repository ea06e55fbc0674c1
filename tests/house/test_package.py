"""What a user sees first: the package's name, its map, its words, and that importing it does nothing."""
from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aurea_orchestrator._modidx import d as modidx
from tools.house import books

ROOT = Path(__file__).resolve().parents[2]
PKG = ROOT / "aurea_orchestrator"
finished = pytest.mark.skipif(not (PKG / "main.py").exists(), reason="the house has no roof yet (main)")
PUBLIC = sorted(full for module, syms in modidx["syms"].items() for full in syms
                if not any(part.startswith(("_", "test_", "pytest_")) for part in full.removeprefix(module).split(".")))


@finished
def test_the_docstring_has_the_sentence_and_the_map():
    doc = importlib.import_module("aurea_orchestrator").__doc__ or ""
    assert "request → key → lookup → lease → compute → store → reply" in doc
    said = set(re.findall(r"[\w.]*\w(?:\.\*)?", doc))
    assert [b.name for b in books() if b.name not in said and f"{b.name.partition('.')[0]}.*" not in said] == []


@finished
def test_all_is_what_is_visible():
    aurea = importlib.import_module("aurea_orchestrator")
    every = {n: getattr(aurea, n) for n in dir(aurea) if not n.startswith("_")}
    visible = {n for n, x in every.items() if not inspect.ismodule(x) and type(x).__module__ != "__future__"}
    assert visible == {n for n in aurea.__all__ if not n.startswith("_")}
    assert len(set(aurea.__all__)) == len(aurea.__all__)
    assert all(hasattr(aurea, n) for n in aurea.__all__)
    assert {"cache_llm_response", "cache_embedding", "cached", "Cache", "get_cache", "use_cache", "Settings"} <= set(aurea.__all__)


@pytest.mark.parametrize("module", sorted(modidx["syms"]))
def test_every_public_name_is_documented(module):
    loaded, silent = importlib.import_module(module), []
    for full in (p for p in PUBLIC if p in modidx["syms"][module]):
        thing, owner = loaded, None
        for part in full.removeprefix(module + ".").split("."):
            owner, thing = thing, inspect.getattr_static(thing, part) if inspect.isclass(thing) else getattr(thing, part)
        inherited = inspect.isclass(owner) and inspect.getdoc(getattr(owner, full.rpartition(".")[2]))  # an override keeps its base's words
        if not (getattr(thing, "__doc__", None) or inherited): silent.append(full)
    assert silent == []


def test_every_module_says_what_it_is_for():
    modules = [p for p in PKG.rglob("*.py") if p.stem not in ("__init__", "__main__", "_modidx")]
    assert [p.name for p in modules if not ast.get_docstring(ast.parse(p.read_text("utf-8")))] == []


QUIET = """
import sys, threading
done = []
def hear(event, args):
    wrote = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    acted = event.startswith(("socket.", "subprocess.", "sqlite3.")) or event == "_thread.start_new_thread"
    if wrote or acted: done.append((event, str(args[:1])))
sys.addaudithook(hear)
import aurea_orchestrator
heavy = {"fastapi", "starlette", "redis", "pydantic", "pydantic_settings", "prometheus_client", "numpy", "httpx2", "uvicorn", "typer",
         "IPython"}
print(sorted(heavy & sys.modules.keys()), done, threading.active_count())
"""


def test_importing_does_nothing():
    "No socket, no thread, no file written, and none of the heavy libraries."
    done = subprocess.run([sys.executable, "-B", "-c", QUIET], cwd=ROOT, text=True, capture_output=True, check=True)
    assert done.stdout.strip() == "[] [] 1"


# ---- settings are rows: name, default, sentence

def settings() -> list[str]:
    "The environment name of each setting."
    Settings = pytest.importorskip("aurea_orchestrator.config", reason="no config yet").Settings
    names = []
    for name, field in Settings.model_fields.items():
        alias = field.validation_alias
        names.append(str(getattr(alias, "choices", [alias or name])[0]).upper())
    return names


def test_every_setting_has_a_sentence():
    Settings = pytest.importorskip("aurea_orchestrator.config", reason="no config yet").Settings
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


@finished
def test_env_example_lists_every_setting_and_nothing_else():
    listed = re.findall(r"^#?\s?([A-Z][A-Z0-9_]+)=", (ROOT / ".env.example").read_text("utf-8"), re.M)
    assert sorted(listed) == sorted(settings())


@finished
def test_the_readme_has_a_row_for_every_setting():
    rows = [line for line in (ROOT / "README.md").read_text("utf-8").splitlines() if line.startswith("|")]
    assert [name for name in settings() if not any(f"`{name}`" in row for row in rows)] == []
