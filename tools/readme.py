"""README.md is nbs/index.ipynb as text, stored outputs included. Links are relative to where they stand, so they lead from both.

    python tools/readme.py           write README.md
    python tools/readme.py --check   fail with a diff where README.md says something else
"""
from __future__ import annotations

import difflib
import json
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
INDEX, README = ROOT / "nbs" / "index.ipynb", ROOT / "README.md"
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def directives(source: str) -> dict[str, str]:
    "`#| name value` and `#| name: value` lines of a cell."
    return {m[1]: m[2].strip() for m in re.finditer(r"^#\|\s*([\w-]+):?(.*)$", source, re.M)}


def bare(source: str) -> str:
    "A cell without its directives."
    return re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip("\n")


def fence(text: str, language: str = "") -> str:
    "Text in a fence that is longer than any in it."
    ticks = "`" * max(3, 1 + max((len(m[0]) for m in re.finditer("`{3,}", text)), default=0))
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def shown(output: dict[str, Any]) -> str | None:
    "A stored output as markdown."
    if output["output_type"] == "stream": return fence(ANSI.sub("", "".join(output["text"])), "text")
    if output["output_type"] == "error": return fence(f"{output['ename']}: {output['evalue']}", "text")
    data = output["data"]
    if "text/markdown" in data: return "".join(data["text/markdown"])
    return fence(ANSI.sub("", "".join(data["text/plain"])), "text") if "text/plain" in data else None


def rooted(markdown: str) -> str:
    "Prose with its links, which lead from nbs/, leading from the root."
    def one(m: re.Match[str]) -> str:
        if not m["url"] or re.match(r"\w+:|#|/", m["url"]): return m[0]
        return f"]({posixpath.normpath('nbs/' + m['url'])})"
    return re.sub(r"^(?P<fence>`{3,}).*?^(?P=fence)|\]\((?P<url>[^)\s]+)\)", one, markdown, flags=re.M | re.S)


def parts(notebook: dict[str, Any]) -> Iterator[str]:
    "The blocks of the page."
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown": yield rooted(source.strip())
        if cell["cell_type"] != "code": continue
        found = directives(source)
        if {"hide", "default_exp", "export", "exporti"} & found.keys() or found.get("include") == "false": continue
        if bare(source) and "hide_input" not in found and found.get("echo") != "false": yield fence(bare(source), "python")
        if found.get("output") != "false": yield from filter(None, map(shown, cell["outputs"]))


def text() -> str:
    "What README.md should say."
    return "\n\n".join(p for p in parts(json.loads(INDEX.read_text("utf-8"))) if p) + "\n"


def main(argv: list[str]) -> int:
    new = text()
    if "--check" not in argv:
        README.write_text(new, "utf-8")
        return 0
    old = README.read_text("utf-8") if README.exists() else ""
    if old != new:
        print(*difflib.unified_diff(old.splitlines(), new.splitlines(), "README.md", "nbs/index.ipynb", "", "", 2, ""), sep="\n")
        print("README.md and nbs/index.ipynb differ; edit the notebook, then: make readme")
    return old != new


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
