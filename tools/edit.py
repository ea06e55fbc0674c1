"""Notebooks as text, for an editor:  python tools/edit.py out|back [--force] NOTEBOOK ...     (as in 50_cache or tutorials/01_first)

`out` writes nbs/NOTEBOOK.ipynb to .edit/NOTEBOOK.py, unless there is text there that was not brought back. `back` brings it back (ids and
outputs of untouched cells stay), exports all notebooks, runs this one and stores its outputs; a notebook that does not exist yet is made.
"""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def jupytext(*args: str | Path) -> None:
    subprocess.run([BIN / "jupytext", "--quiet", *args], check=True)


def out(name: str, force: bool) -> None:
    "Notebook to text."
    notebook, text = ROOT / "nbs" / f"{name}.ipynb", ROOT / ".edit" / f"{name}.py"
    if not notebook.exists():
        sys.exit(f"edit: there is no {notebook.relative_to(ROOT)}; write {text.relative_to(ROOT)} and bring it: make sync NB={name}")
    if text.exists() and text.stat().st_mtime > notebook.stat().st_mtime and not force:
        sys.exit(f"edit: {text.relative_to(ROOT)} is newer than the notebook; bring it back (make sync NB={name}), or remove it")
    text.parent.mkdir(parents=True, exist_ok=True)
    jupytext("--to", "py:percent", "-o", text, notebook)
    print(f"edit {text.relative_to(ROOT)}, then: make sync NB={name}")


def back(name: str) -> None:
    "Text to notebook, without the export."
    notebook, text = ROOT / "nbs" / f"{name}.ipynb", ROOT / ".edit" / f"{name}.py"
    if not text.exists(): sys.exit(f"sync: there is no {text.relative_to(ROOT)}; begin with: make edit NB={name}")
    notebook.parent.mkdir(parents=True, exist_ok=True)
    jupytext(*(["--update"] if notebook.exists() else []), "--to", "ipynb", "-o", notebook, text)


def main(argv: list[str]) -> int:
    names = [a.removesuffix(".ipynb").removeprefix("nbs/") for a in argv[1:] if a != "--force"]
    if argv[:1] not in (["out"], ["back"]) or not names: sys.exit((__doc__ or "").strip() + "\n\nName a notebook: make edit NB=50_cache")
    if argv[0] == "out":
        for name in names: out(name, "--force" in argv)
        return 0
    for name in names: back(name)
    subprocess.run([BIN / "nbdev_export"], cwd=ROOT, check=True)
    done = subprocess.run([sys.executable, ROOT / "tools" / "nbrun.py", *(ROOT / "nbs" / f"{n}.ipynb" for n in names)])
    if "index" in names: subprocess.run([sys.executable, ROOT / "tools" / "readme.py"], check=True)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
