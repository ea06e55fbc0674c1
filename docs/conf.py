"""Sphinx reads docs/_src, which tools/docs_src.py makes: see `make docs`. Nothing is run or fetched, nor do the pages fetch anything."""
from __future__ import annotations

import html
import json
from configparser import ConfigParser
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

HERE = Path(__file__).resolve().parent
ROOT = next(p for p in HERE.parents if (p / "settings.ini").exists())
ini = ConfigParser(delimiters=["="])
ini.read(ROOT / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
SYMBOLS = set(json.loads((HERE / "symbols.json").read_text()).values())

project, author, release = cfg["lib_name"], cfg["author"], cfg["version"]
copyright = cfg["copyright"]
language = "en"

extensions = ["myst_nb", "sphinx_copybutton"]
exclude_patterns = [".doctrees", "_build", "_static"]
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]

nb_execution_mode = "off"                 # outputs are stored in the notebooks
nb_merge_streams = True
nb_render_markdown_format = "myst"
nb_code_prompt_show = nb_code_prompt_hide = "Source"
myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist", "fieldlist", "tasklist"]
myst_fence_as_directive = ["mermaid"]
myst_heading_anchors = 3

add_module_names = False
python_maximum_signature_line_length = 70
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
copybutton_exclude = ".linenos, .gp, .go"
copybutton_selector = "div:not(.output) > div.highlight > pre"

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_js_files = ["diagrams.js"]
html_favicon = "_static/logo.svg"
html_logo = "_static/logo.svg"
html_copy_source = html_show_sourcelink = False
html_domain_indices = False
html_last_updated_fmt = None
pygments_style, pygments_dark_style = "tango", "github-dark"
html_theme_options: dict[str, Any] = {
    "light_css_variables": {"color-brand-primary": "#8a5a00", "color-brand-content": "#7a4f00", "color-brand-visited": "#7a4f00"},
    "dark_css_variables": {"color-brand-primary": "#f2b84b", "color-brand-content": "#f5c76a", "color-brand-visited": "#f5c76a"},
    "top_of_page_buttons": [],
}


class Mermaid(Directive):
    "A diagram: its text, drawn by docs/_static/diagrams.js."

    has_content = True

    def run(self) -> list[nodes.Node]:
        text = "\n".join(self.content)
        return [nodes.raw("", f'<pre class="mermaid nohighlight">{html.escape(text)}</pre>', format="html")]


def of_ours(app: Sphinx, env: Any, node: Any, content: nodes.Node) -> nodes.Node | None:
    "A type in a signature: a link where it is ours, wherever it was imported from; plain text where it is not."
    if node.get("refdomain") != "py": return None
    target = node["reftarget"].rpartition(".")[2]
    found = [full for full in SYMBOLS if full.rpartition(".")[2] == target or full.endswith("." + node["reftarget"])]
    found = [full for full in found if full in env.domains["py"].objects]
    if len(found) == 1:
        place = env.domains["py"].objects[found[0]]
        return make_refnode(app.builder, node["refdoc"], place.docname, place.node_id, content, found[0])
    return content if node.get("reftype") in ("class", "exc") else None        # what prose names must exist


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("mermaid", Mermaid)
    app.connect("missing-reference", of_ours)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
