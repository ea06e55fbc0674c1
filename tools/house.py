"""The laws of the house, checked without running anything.

    python tools/house.py          check; exit 1 on any breach
    python tools/house.py --map    the house as a table, for a page
    python tools/house.py --count  lines, words and cells of each notebook

A notebook's number is its import order and its tens digit the floor; the rest of its name is the module it makes. Standard library
only, so it also runs where nothing is installed.
"""
from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PKG = "aurea_orchestrator"
MAX_CELL, MAX_BOOK = 40, 300     # exported lines that are not blank
MIN_WORDS = 1.5                  # of prose per exported line; aim at 3 (fastcore has 3.9, what left nbdev had 0.4)
PLAIN = {"__init__", "__main__", "_modidx"}  # modules that no notebook makes

# One library, one door: where it may be imported.
DOORS = {
    "redis": {"stores.link", "stores.redis"},
    "sqlite3": {"stores.sqlite", "stores.file"},
    "httpx2": {"backends.openai"},
    "httpx": set(), "requests": set(), "openai": set(), "pickle": set(), "fastcore": set(), "nbdev": set(),
    "fastapi": {"routes", "front", "gateway", "main", "dashboard"},
    "starlette": {"routes", "front", "gateway", "main", "dashboard"},
    "prometheus_client": {"metrics"},
    "genai_prices": {"costs"},
    "tqdm": {"plans"},
    "rich": {"cli", "looking", "doctor"},
    "numpy": {"codec", "keys", "values"},
    "IPython": {"notebook"},
    "typer": {"cli"},
    "uvicorn": {"cli"},
    "pydantic": {"config", "codec", "keys", "values", "call", "routes"},
    "pydantic_settings": {"config"},
}
LAZY = {  # only inside a function there
    "numpy": DOORS["numpy"], "genai_prices": DOORS["genai_prices"], "tqdm": DOORS["tqdm"],
    "pydantic": {"codec", "keys", "values", "call"},
}

# Who may not know whom, beyond what the stairs forbid.
STRANGERS = {
    "keys": {"codec", "stores"},
    "codec": {"keys", "stores"},
    "stores": {"codec", "keys", "call"},
    "flight": {"codec", "backends", "stores"},
    "backends": {"cache", "stores", "keys", "codec"},
    "cache": {"backends"},
    "decorators": {"backends"},
    "metrics": {"cache", "decorators"},
    "routes": {"stores.redis", "stores.sqlite"},
    "gateway": {"stores.redis", "stores.sqlite"},
}
FRIENDS = {"stores.urls": {"codec"}}  # but these may: it builds the memory tier, which keeps only whole entries that are fresh
HANDS = {"cache": {"cassettes", "entries"}, "decorators": {"runs"}}  # what users hold reaches up to these, inside a function
CALLERS = {"main": {"cli"}}      # imported by these alone


class Breach(NamedTuple):
    "One law, broken once."

    where: str
    what: str

    def __str__(self) -> str: return f"{self.where}: {self.what}"


class Book(NamedTuple):
    "A notebook that makes a module."

    path: Path
    number: str
    name: str
    prose: list[str]    # its markdown cells
    code: list[str]     # all its code cells
    exports: list[str]  # those that go into the module

    @property
    def words(self) -> int: return sum(len(p.split()) for p in self.prose)

    @property
    def lines(self) -> list[int]: return [len(_lines(e)) for e in self.exports]

    @property
    def about(self) -> str: return next((line[2:] for p in self.prose for line in p.splitlines() if line.startswith("> ")), "")


def _lines(source: str) -> list[str]:
    return [line for line in source.splitlines() if line.strip() and not line.lstrip().startswith("#|")]


def _cells(path: Path) -> list[tuple[str, str]]:
    return [(c["cell_type"], "".join(c["source"])) for c in json.loads(path.read_text("utf-8"))["cells"]]


def _exported(source: str) -> bool: return bool(re.search(r"^#\|\s*export", source, re.M))


def book(path: Path) -> Book:
    "Read one notebook."
    number, _, name = path.stem.partition("_")
    cells = _cells(path)
    code = [s for kind, s in cells if kind == "code"]
    return Book(path, number, name, [s for kind, s in cells if kind == "markdown"], code, [s for s in code if _exported(s)])


def books(root: Path = ROOT) -> list[Book]:
    "The notebooks that make modules, from the ground floor up."
    return [book(p) for p in sorted((root / "nbs").glob("*.ipynb")) if p.name != "index.ipynb"]


def _imports(source: str) -> Iterator[tuple[str, bool]]:
    "Each imported module, and whether that happens at import time."
    tree, lazy = ast.parse(source), set()
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            if id(node) in lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _typing_only(node): lazy.add(id(child))
        if isinstance(node, ast.ImportFrom):
            if node.level: yield ".", False
            elif node.module == PKG: yield from ((f"{PKG}.{a.name}", id(node) in lazy) for a in node.names if a.name != "__version__")
            elif node.module: yield node.module, id(node) in lazy
        if isinstance(node, ast.Import): yield from ((a.name, id(node) in lazy) for a in node.names)


def _typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _knows(name: str, others: set[str]) -> bool:
    return any(name == o or name.startswith(o + ".") for o in others)


def breaches(b: Book, floors: dict[str, str]) -> Iterator[Breach]:
    "The laws that one notebook breaks; `floors` has the number of each module."
    def breach(what: str) -> Breach: return Breach(b.path.name, what)

    if not re.fullmatch(r"\d\d", b.number): yield breach("is not named <two digits>_<module>.ipynb")
    made = re.findall(r"^#\|\s*default_exp\s+(\S+)", "\n".join(b.code), re.M)
    if made != [b.name]: yield breach(f"makes {', '.join(made) or 'no module'}, its name says {b.name}")
    if not b.prose or b.prose[0].splitlines()[0].strip() != f"# {b.name}": yield breach(f"does not begin with '# {b.name}'")
    if not b.about: yield breach("has no '> line' under its title that says what it is for")
    for i, (source, n) in enumerate(zip(b.exports, b.lines, strict=True), 1):
        if n > MAX_CELL: yield breach(f"exported cell {i} has {n} lines, more than {MAX_CELL}")
        for module, lazy in _imports(source):
            yield from (breach(what) for what in _door(b.name, module, lazy))
            top, _, dep = module.partition(".")
            if module == ".": yield breach("imports relatively; write 'from aurea_orchestrator.x import y'")
            if top != PKG or not dep: continue
            room = next((d for d in (dep, dep.rpartition(".")[0]) if d in floors), None)
            if room is None: yield breach(f"imports {module}, which no notebook makes")
            elif room != b.name and floors[room] >= b.number and not (lazy and room in HANDS.get(b.name, set())):
                yield breach(f"imports {room} ({floors[room]}): stairs go up only")
            wing = b.name.split(".")[0]
            strangers = (STRANGERS.get(b.name, set()) | STRANGERS.get(wing, set())) - FRIENDS.get(b.name, set())
            if dep.split(".")[0] != wing and _knows(dep, strangers): yield breach(f"may not know {dep}")
            if room in CALLERS and b.name not in CALLERS[room]: yield breach(f"imports {room}, which only {', '.join(CALLERS[room])} may")
    total = sum(b.lines)
    if total > MAX_BOOK: yield breach(f"exports {total} lines, more than {MAX_BOOK}")
    if total and b.words / total < MIN_WORDS: yield breach(f"{b.words / total:.1f} words per exported line, fewer than {MIN_WORDS}")


def _door(name: str, module: str, lazy: bool) -> Iterator[str]:
    top = module.split(".")[0]
    if top in DOORS and name not in DOORS[top]: yield f"imports {top}, whose door is {' and '.join(sorted(DOORS[top])) or 'closed'}"
    elif name in LAZY.get(top, set()) and not lazy: yield f"imports {top} at import time; import it in the function that needs it"


def house_breaches(all_books: list[Book], root: Path = ROOT) -> Iterator[Breach]:
    "The laws that no notebook breaks alone."
    seen: dict[str, str] = {}
    for b in all_books:
        if b.number in seen: yield Breach(b.path.name, f"the number {b.number} is {seen[b.number]}'s")
        seen.setdefault(b.number, b.path.name)
    made = {b.name for b in all_books}
    for py in sorted((root / PKG).rglob("*.py")):
        module = ".".join(py.relative_to(root / PKG).with_suffix("").parts)
        if py.stem not in PLAIN and module not in made: yield Breach(str(py.relative_to(root)), "no notebook makes this module (renamed?)")
    tutorials: dict[str, str] = {}
    for path in sorted((root / "nbs" / "tutorials").glob("*.ipynb")):
        t = book(path)
        if not re.fullmatch(r"\d\d", t.number): yield Breach(path.name, "is not named <two digits>_<name>.ipynb")
        if t.number in tutorials: yield Breach(path.name, f"the number {t.number} is {tutorials[t.number]}'s")
        tutorials.setdefault(t.number, path.name)
        if t.exports: yield Breach(path.name, "a tutorial exports nothing")


def check(root: Path = ROOT) -> list[Breach]:
    "All breaches of all laws."
    all_books = books(root)
    floors = {b.name: b.number for b in all_books}
    return [x for b in all_books for x in breaches(b, floors)] + list(house_breaches(all_books, root))


def main(argv: list[str]) -> int:
    if "--map" in argv:
        print("\n".join(f"| {b.number} | `{b.name}` | {b.about} |" for b in books()))
        return 0
    if "--count" in argv:
        for b in books():
            total = sum(b.lines)
            largest = max(b.lines, default=0)
            print(f"{b.path.stem:<24} {total:>3} lines {b.words:>5} w {b.words / max(total, 1):5.1f} words/line, largest cell {largest}")
        return 0
    found = check()
    print("\n".join(map(str, found)) or f"{len(books())} notebooks, the house is in order")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
