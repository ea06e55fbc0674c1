"""Notebooks to sources of the site:  python tools/docs_src.py docs/_src      (then: sphinx-build, see `make docs`)

Nothing is run or imported. Prose and lesson cells stay as they are, with their stored outputs. An exported cell becomes the reference
entries of the public names that it defines, then its source, folded (`#| exports` or `#| code-fold: false`: open). Names in backticks
become links, and links to notebooks lead to their pages.
"""
from __future__ import annotations

import ast
import io
import json
import posixpath
import re
import shutil
import sys
import tokenize
from collections.abc import Callable
from configparser import ConfigParser
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from readme import bare, directives

ROOT = Path(__file__).resolve().parent.parent
PKG = "aurea_orchestrator"
Def = ast.FunctionDef | ast.AsyncFunctionDef


# ---- one symbol

def comments(code: str) -> dict[int, str]:
    "The trailing comment of each line."
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT and t.line[:t.start[1]].strip()}


def arguments(fn: Def, said: dict[int, str]) -> list[tuple[str, str]]:
    "Each documented argument, as the trailing comment of its line says."
    a = fn.args
    everything = [*a.posonlyargs, *a.args, *([a.vararg] if a.vararg else []), *a.kwonlyargs, *([a.kwarg] if a.kwarg else [])]
    lines = [arg.lineno for arg in everything]
    return [(arg.arg, said[n]) for arg, n in zip(everything, lines) if n in said and lines.count(n) == 1 and n < fn.body[0].lineno]


def returned(fn: Def, said: dict[int, str]) -> str | None:
    "The trailing comment of the line with the return annotation, when that line is its own."
    if not fn.returns or any(arg.lineno == fn.returns.lineno for arg in ast.walk(fn.args) if isinstance(arg, ast.arg)): return None
    return said.get(fn.returns.end_lineno or 0)


def signature(fn: Def, method: bool) -> str:
    "As written, without `self`."
    a = ast.parse(ast.unparse(fn)).body[0].args                             # type: ignore[attr-defined]  # a copy
    if method: (a.posonlyargs or a.args)[:1] = []
    return f"({ast.unparse(a)})" + (f" -> {ast.unparse(fn.returns)}" if fn.returns else "")


def decorators(node: Def | ast.ClassDef) -> set[str]:
    return {ast.unparse(d.func if isinstance(d, ast.Call) else d).split(".")[-1] for d in node.decorator_list}


def fields(cls: ast.ClassDef, said: dict[int, str]) -> list[tuple[str, str, str, str]]:
    "Public attributes that the class body declares: name, type, default, sentence."
    rows = []
    for i, node in enumerate(cls.body):
        if not isinstance(node, ast.AnnAssign | ast.Assign): continue
        target, kind = (node.target, ast.unparse(node.annotation)) if isinstance(node, ast.AnnAssign) else (node.targets[0], "")
        if not isinstance(target, ast.Name) or target.id.startswith("_") or target.id == "model_config": continue
        value, text = node.value, said.get(node.end_lineno or 0) or said.get(node.lineno, "")
        if isinstance(value, ast.Call):                                     # Field(default, description="…")
            text = text or next((str(ast.literal_eval(k.value)) for k in value.keywords if k.arg == "description"), "")
            if ast.unparse(value.func).endswith("ield"):
                given = [*value.args[:1], *(k.value for k in value.keywords if k.arg == "default")]
                made = [ast.Constant(...)] if any(k.arg == "default_factory" for k in value.keywords) else []
                value = next(iter(given + made), None)
        follows = cls.body[i + 1] if i + 1 < len(cls.body) else None
        if not text and isinstance(follows, ast.Expr) and isinstance(follows.value, ast.Constant): text = str(follows.value.value)
        rows.append((target.id, kind, "" if value is None else ast.unparse(value), text))
    return rows


def entry(kind: str, name: str, sig: str, doc: str, options: list[str], params: list[tuple[str, str]], ret: str | None = None,
          inner: list[str] | None = None, depth: int = 1) -> list[str]:
    "A Sphinx `py:` directive; what is inside it has fewer colons."
    fence = ":" * (6 - depth)
    out = [f"{fence}{{py:{kind}}} {name}{sig}", *options, "", doc, ""]
    out += [f":param {k}: {text}" for k, text in params]
    if ret: out.append(f":returns: {ret}")
    return [*out, "", *(inner or []), fence, ""]


def function(fn: Def, name: str, said: dict[int, str], links: Links, depth: int = 1, method: bool = False) -> list[str]:
    "A function, method or property."
    marks = decorators(fn)
    kind = "property" if marks & {"property", "cached_property"} else "method" if method else "function"
    options = [f":{o}:" for o in ("classmethod", "staticmethod", "abstractmethod") if o in marks and kind == "method"]
    if isinstance(fn, ast.AsyncFunctionDef): options.append(":async:")
    sig = signature(fn, method and "staticmethod" not in marks)
    if kind == "property": options, sig = [f":type: {ast.unparse(fn.returns)}"] if fn.returns else [], ""
    doc = links.text(ast.get_docstring(fn) or "")
    params = [(k, links.text(v)) for k, v in arguments(fn, said)]
    return entry(kind, name, sig, doc, options, params, links.text(returned(fn, said) or ""), depth=depth)


def klass(cls: ast.ClassDef, said: dict[int, str], links: Links) -> list[str]:
    "A class with its attributes and public methods."
    methods = {n.name: n for n in cls.body if isinstance(n, Def) and "overload" not in decorators(n)}
    rows, bases = fields(cls, said), [ast.unparse(b) for b in cls.bases]
    init, params, sig = methods.get("__init__"), [], ""
    if init: sig, params = signature(init, True).split(" -> ")[0], [(k, links.text(v)) for k, v in arguments(init, said)]
    elif "NamedTuple" in bases or "Struct" in bases or "msgspec.Struct" in bases or "dataclass" in decorators(cls):
        sig = "(" + ", ".join(f"{n}: {k}" + (f" = {d}" if d else "") for n, k, d, _ in rows if k and "ClassVar" not in k) + ")"
    inner: list[str] = []
    doc = links.text(ast.get_docstring(cls) or "")
    bases = [links.text(f"`{b}`") for b in bases if b not in ("object", "ABC") and not b.startswith(("_", "Generic["))]
    if bases: doc += "\n\nBases: " + ", ".join(bases)
    for n, k, d, text in rows:
        options = [f":type: {k}"] * bool(k) + [f":value: {d}"] * bool(d and len(d) < 60)
        inner += [f"::::{{py:attribute}} {n}", ":no-contents-entry:", *options, "", links.text(text), "::::", ""]
    for n, fn in methods.items():
        if n.startswith("_") and n not in ("__call__", "__enter__", "__aenter__"): continue
        if not ast.get_docstring(fn): continue                              # inherits its words: see the base
        inner += function(fn, n, said, links, 2, method=True)
    return entry("class", cls.name, sig, doc, [], params, inner=inner)


def reference(code: str, links: Links) -> str:
    "Entries for the public names of an exported cell."
    said, out = comments(code), []
    for node in ast.parse(code).body:
        if not isinstance(node, ast.ClassDef | Def) or node.name.startswith("_"): continue
        if isinstance(node, ast.ClassDef): out += klass(node, said, links)
        elif "patch" in decorators(node):
            owner = ast.unparse(node.args.args[0].annotation).strip("'\"")
            if not owner.startswith("_"): out += function(node, f"{owner}.{node.name}", said, links, method=True)
        elif "overload" not in decorators(node): out += function(node, node.name, said, links)
    return "\n".join(out)


# ---- links

class Links:
    "Names in backticks that this project knows, made into references; and the links of a notebook, made into those of its page."

    def __init__(self, symbols: dict[str, str], pages: dict[str, str], here: str | None, leads: Callable[[str], str] = str) -> None:
        self.symbols, self.pages, self.here = symbols, pages, here          # name -> full name; module -> page; the page's own module
        self.leads = leads                                                  # where a link leads, from the page

    def text(self, markdown: str) -> str:
        "Prose with links; fences and headings stay."
        pieces = re.split(r"(^(?:```|~~~|:::).*?^(?:```|~~~|:::)\s*?$|^#+ [^\n]*$|\[[^\]\n]*\]\([^)\n]*\))", markdown, flags=re.M | re.S)
        word = r"(?<![`\w}])`(?P<name>[^`\n]+)`(?!`)(?=(?P<page> (?:notebook|page|module))?)"
        return "".join(self._link(p) if i % 2 else re.sub(word, self._one, p) for i, p in enumerate(pieces))

    def _link(self, piece: str) -> str:
        if not piece.startswith("["): return piece
        said, _, url = piece.removesuffix(")").rpartition("](")
        return f"{said}]({self.leads(url)})"

    def _one(self, m: re.Match[str]) -> str:
        said, name = m["name"], m["name"].removesuffix("()").removeprefix(f"{PKG}.")
        word = name.islower() and name.isalpha()                            # `keys` may be any keys, `store` any store
        meant = m["page"] or not word or m.string[:m.start()].lower().endswith("see ")
        if name in self.pages and name != self.here and meant: return f"{{doc}}`{said} </{self.pages[name]}>`"
        full = self.symbols.get(name)
        if full and (not word or said.endswith("()") or full == f"{PKG}.{self.here}.{name}"): return f"{{py:obj}}`{said} <{full}>`"
        return m[0]


def symbols(books: dict[str, list[str]]) -> dict[str, str]:
    """Each way to write a public name that can mean one thing only, and its full name.

    `Class.method` and `module.name` can. A bare name can if one module defines it and it is no method, attribute or argument of anything.
    """
    found: dict[str, set[str]] = {}
    taken: set[str] = set()
    for module, node in ((module, node) for module, cells in books.items() for code in cells for node in ast.parse(code).body):
        if not isinstance(node, ast.ClassDef | Def): continue
        taken |= inside(node)
        if node.name.startswith("_") or "patch" in decorators(node): continue
        full = f"{PKG}.{module}.{node.name}"
        for way in (node.name, f"{module}.{node.name}"): found.setdefault(way, set()).add(full)
        for sub in node.body if isinstance(node, ast.ClassDef) else ():
            if not isinstance(sub, Def) or sub.name.startswith("_"): continue
            documented = f"{full}.{sub.name}" if ast.get_docstring(sub) else ""
            for way in (f"{node.name}.{sub.name}", f"{node.name.lower()}.{sub.name}"): found.setdefault(way, set()).add(documented)
    return {way: next(iter(full)) for way, full in found.items() if way not in taken and len(full) == 1 and all(full)}


def inside(node: ast.AST) -> set[str]:
    "What a definition names within itself: methods, attributes, arguments."
    inner = [sub for sub in ast.walk(node) if sub is not node]
    attributes = {sub.attr for sub in inner if isinstance(sub, ast.Attribute) and isinstance(sub.ctx, ast.Store)}
    fields = {sub.target.id for sub in inner if isinstance(sub, ast.AnnAssign) and isinstance(sub.target, ast.Name)}
    methods, given = {sub.name for sub in inner if isinstance(sub, Def)}, {sub.arg for sub in inner if isinstance(sub, ast.arg)}
    return attributes | fields | methods | given


# ---- pages

def page(nb: dict[str, Any], module: str | None, links: Links) -> dict[str, Any]:
    "One notebook for myst-nb."
    cells: list[dict[str, Any]] = []

    def add(kind: str, source: str, ident: str, **more: Any) -> None:
        cells.append({"cell_type": kind, "id": ident, "metadata": {}, "source": source.splitlines(True)} | more)
    for i, cell in enumerate(nb["cells"]):
        source, ident = "".join(cell["source"]), cell.get("id", f"cell{i}")
        if cell["cell_type"] == "markdown":
            if not cells:
                source = re.sub(r"^> (.+)$", r"{.lead}\n\1", source, count=1, flags=re.M)
                if module: source += f"\n\n```{{py:module}} {PKG}.{module}\n```"
            add("markdown", links.text(steps(source)), ident)
        if cell["cell_type"] != "code": continue
        found, code = directives(source), bare(source)
        if {"hide", "default_exp"} & found.keys() or found.get("include") == "false" or not code: continue
        outputs = [] if found.get("output") == "false" else cell["outputs"]
        tags = ["remove-input"] if "hide_input" in found or found.get("echo") == "false" else []
        if any(name.startswith("export") for name in found):
            if text := reference(code, links): add("markdown", text, f"{ident}-api")
            opened = "exports" in found or found.get("code-fold") == "false"
            tags = ["exported"] if opened else ["exported", "hide-input"]
        add("code", code, ident, metadata={"tags": tags} if tags else {}, outputs=outputs, execution_count=None)
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    return {"cells": cells, "metadata": {"language_info": {"name": "python"}, "kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def steps(markdown: str) -> str:
    "The sentence, set as a row of steps."
    def row(m: re.Match[str]) -> str:
        line = m[0].strip()
        words = [w.strip() for w in line.split("→")]
        if line.count("**") == 2 and line.startswith("**") and line.endswith("**"): words = [f"**{w.strip('*')}**" for w in words]
        return "{.steps}\n" + " → ".join(words)
    return re.sub(r"^\**request\**[ \t]*→.*reply\**[ \t]*$", row, markdown, flags=re.M)


def leads(url: str, book: Path, pages: dict[Path, str], repository: str) -> str:
    "Where a link of a notebook leads on its page: to a notebook's page, or to a file in the repository."
    file, mark, anchor = url.partition("#")
    if not file or re.match(r"\w+:", file): return url
    path = (book.parent / file).resolve()
    if path in pages: return posixpath.relpath(f"/{pages[path]}.ipynb", posixpath.dirname(f"/{pages[book]}")) + mark + anchor
    if not path.exists(): sys.exit(f"docs: {book.name} has a link to {file}, which is not there")
    return url if path.is_relative_to(ROOT / "nbs") else f"{repository}/{path.relative_to(ROOT).as_posix()}{mark}{anchor}"


def toctree(caption: str, pages: list[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""]) if pages else ""


def main(out: Path) -> None:
    nbs = ROOT / "nbs"
    paths = [p for p in sorted(nbs.rglob("*.ipynb")) if not any(part[0] in "._" for part in p.relative_to(nbs).parts)]
    read = {p: json.loads(p.read_text("utf-8")) for p in paths}
    code = {p: ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code"] for p, nb in read.items()}
    made = {p: next((m[1] for s in code[p] if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", s, re.M))), None) for p in paths}
    names = {p: p.relative_to(nbs).with_name(re.sub(r"^\d+_", "", p.name)).with_suffix("").as_posix() for p in paths}
    books = {m: [bare(s) for s in code[p] if re.search(r"^#\|\s*export", s, re.M)] for p, m in made.items() if m}
    known, where = symbols(books), {m: names[p] for p, m in made.items() if m}
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    repository = f"{ini['DEFAULT']['git_url']}/blob/{ini['DEFAULT']['branch']}"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(ROOT / "docs", out, ignore=shutil.ignore_patterns("_src", "__pycache__"))
    (out / "symbols.json").write_text(json.dumps(known))
    for p in paths:
        target = out / f"{names[p]}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        links = Links(known, where, made[p], lambda url, book=p: leads(url, book, names, repository))  # type: ignore[misc]
        nb = page(read[p], made[p], links)
        if names[p] == "index":
            text = toctree("Tutorials", [names[q] for q in paths if "tutorials" in q.relative_to(nbs).parts])
            text += "\n" + toctree("Reference", [names[q] for q in paths if made[q]])
            nb["cells"].append({"cell_type": "markdown", "id": "toctree", "metadata": {}, "source": text.splitlines(True)})
        target.write_text(json.dumps(nb, indent=1, ensure_ascii=False), "utf-8")
    for extra in sorted(nbs.rglob("*")):                                    # images and such
        if extra.suffix in {".svg", ".png", ".jpg", ".gif"}:
            shutil.copy(extra, out / extra.relative_to(nbs))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
