"""The same facts as text and as HTML, whatever the facts are."""
from __future__ import annotations

import copy
import json
import pickle
import re
import subprocess
import sys
import unicodedata
from html import unescape
from html.parser import HTMLParser
from types import SimpleNamespace
from xml.etree import ElementTree

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurea_orchestrator import display, sheets
from aurea_orchestrator.costs import Cost
from aurea_orchestrator.counts import Stats
from aurea_orchestrator.sheets import Row, Sheet, Table


def cost(usd=0.0, s=0.0, prompt=0, completion=0): return {"seconds": s, "prompt_tokens": prompt, "completion_tokens": completion, "usd": usd}


FULL = Stats({
    "llm": {"hits": 1180, "misses": 190}, "embedding": {"hits": 24, "misses": 6}, "own-kind": {"hits": 1, "misses": 0},
    "total": {"hits": 1205, "misses": 196, "requests": 1401, "hit_rate": 86.01},
    "outcomes": {"llm": {"hit": 1150, "near": 15, "shared": 10, "stale": 5, "miss": 190, "bypass": 3, "error": 2}, "embedding": {"hit": 24, "miss": 6}},
    "saved": cost(3.24, 2500.0, 812_400, 120_000), "spent": cost(0.52, 410.0, 131_000, 19_000),
    "costs": {"llm": {"saved": cost(3.2396), "spent": cost(0.5194)}},
    "functions": {f"questions.f{i}": {"hits": i, "misses": 4, "saved": cost(i / 100, i * 1.0), "spent": cost(0.01)} for i in range(13)},
    "store": {"name": "redis", "url": "redis://h:6379/0", "up": True, "entries": 196, "bytes": 3_400_000, "memory_bytes": 1_200_000, "memory_entries": 150}})
EMPTY = Stats({"llm": {"hits": 0, "misses": 0}, "embedding": {"hits": 0, "misses": 0}, "total": {"hits": 0, "misses": 0, "requests": 0, "hit_rate": 0.0}})
INFO = SimpleNamespace(hits=41, misses=3, outcomes={"hit": 40, "stale": 1, "miss": 3, "near": 0}, saved=Cost(82.0, 51000, 9000, 0.21), spent=Cost(6.1, 3300, 700, 0.0156))


def seen(**more):
    facts = {"key": "llm:demo:" + "ab" * 32, "kind": "llm", "namespace": "demo", "function": "m.classify", "born": 1000.0, "ttl": 3600.0, "left": 3400.0,
             "size_bytes": 1523, "hits": 12, "cost": Cost(2.1, 1200, 340, 0.0042), "model": "gpt-4o", "value_type": "str"}
    return SimpleNamespace(**facts | more)


SHEETS = {
    "stats": FULL.sheet(), "empty": EMPTY.sheet(), "nothing": Stats().sheet(), "info": display.of_info(INFO), "function": display.of_function("m.ask", "llm", 60.0, "ns", "v2", INFO),
    "entry": display.of_entry(seen(), 1200.0, "an answer"), "eternal": display.of_entry(seen(ttl=None, left=None, hits=None, model=None, namespace="", cost=Cost()), 1.0),
    "why": display.of_explanation("miss", "It differs.", [("temperature", 0.7, 0.2), ("messages[2].content", "<a1>", "<b2>")], {"key": "llm:" + "9f" * 32})}


class Reader(HTMLParser):
    "The text of a page, and its tags; fails where they do not close."

    def __init__(self, page):
        super().__init__()
        self.open, self.said, self.tags = [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "wbr" and tag != "rect":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs): self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag): assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "title"} & set(self.open):
            self.said.append(data)


def said(html): return re.sub(r"\s", "", "".join(Reader(html).said))


def squeezed(text): return re.sub(r"\s", "", text)


def wide(line): return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)


# ---- one sheet, two forms

@pytest.mark.parametrize("sheet", SHEETS.values(), ids=SHEETS)
def test_both_forms_have_every_fact(sheet):
    text, html = squeezed(sheet.text()), said(sheet.html())
    facts = [sheet.title, sheet.words, *(s for fact in sheet.facts for s in fact)]
    facts += [s for t in sheet.tables if t.rows for s in (*t.head, t.note, *(c for row in t.rows for c in row.cells))]
    assert facts[0]
    for fact in map(squeezed, facts):
        assert fact in text and fact in html, fact


anything = st.text(max_size=100) | st.sampled_from(["<b>&amp;'\"", "日本語" * 30, "a" * 300, "\x1b[31m", "\u202eevil", "\ud800", "x\ny\tz", "e\u0301" * 99, ""])


@given(anything, anything, st.lists(st.tuples(anything, anything), max_size=3), st.lists(st.tuples(anything, anything, anything), max_size=4))
def test_any_fact_is_escaped_fits_and_stays(title, words, facts, rows):
    bars = [(("hit", 0.5), ("miss", 0.5)), (("saved", 1e-9),), (("error", 1.0),)]
    sheet = Sheet(title, words, tuple(facts), (Table("t", ("a", "b", "c"), tuple(Row(r, bars[i % 3]) for i, r in enumerate(rows))),))
    text, html = sheet.text(), sheet.html()
    assert all(wide(line) <= 80 for line in text.split("\n"))
    assert all(c.isprintable() or c == "\n" for c in text) and all(c.isprintable() or c == "\n" for c in html)
    text.encode(), html.encode()
    assert {tag for tag, _ in Reader(html).tags} <= {"div", "style", "p", "table", "caption", "thead", "tbody", "tr", "th", "td", "svg", "title", "rect", "wbr", "i"}
    for fact in (title, words, *(s for pair in facts for s in pair), *(c for row in rows for c in row)):
        assert squeezed(sheets.clean(fact)) in said(html)
    for fact in (title, words, *(s for pair in facts for s in pair)):
        assert squeezed(sheets.clean(fact)).replace(" ", "") in squeezed(text)


@pytest.mark.parametrize("sheet", SHEETS.values(), ids=SHEETS)
def test_a_page_needs_nothing_and_runs_nothing(sheet):
    html = sheet.html()
    assert not re.search(r"https?:(?!//h:)|//(?!h:)|url\(|@import|<script|<img|<link|\bon\w+=|javascript", html.replace("redis://h:6379/0", "")), html
    for tag, attrs in Reader(html).tags:
        assert not {"src", "href", "onclick"} & set(attrs)
        if tag == "svg":
            assert attrs["role"] == "img" and re.search(r": .+ \d+\.\d %", attrs["aria-label"])
        if tag == "th":
            assert attrs["scope"] in ("row", "col")
    for svg in re.findall(r"<svg.*?</svg>", html):
        root = ElementTree.fromstring(svg)
        assert root[0].tag == "title" and all(0 <= float(r.get("x", 0)) and float(r.get("x", 0)) + float(r.get("width")) <= 100.02 for r in root.iter("rect"))


def test_what_is_there_is_seen_and_stays_within_its_bar():
    sheet = Sheet("t", "", (), (Table("t", ("a",), (Row(("x",), (("saved", 0.99999), ("spent", 0.00001))), Row(("y",), (("hit", 0.0), ("miss", 1.0))))),))
    first, second = re.findall(r"<svg.*?</svg>", sheet.html())
    bars = [(float(r.get("x", 0)), float(r.get("width"))) for r in ElementTree.fromstring(first).iter("rect")][1:]
    assert bars[1] == (99.0, 1.0) and len(re.findall("<rect", second)) == 2
    assert sheet.text().endswith("x  " + "#" * 19 + "-\ny  " + "-" * 20)


def test_one_lookup_is_one():
    assert display.of_info(INFO).words == "41 of 44 lookups were answered by the cache (93.18 %)."
    assert display.of_info(SimpleNamespace(hits=1, misses=0, outcomes={"hit": 1})).words == "1 of 1 lookup was answered by the cache (100.00 %)."


def test_light_and_dark():
    html = FULL.sheet().html()
    assert "var(--jp-content-font-color1,inherit)" in html and "color-mix(in srgb,currentColor" in html
    assert not re.search(r"background:#(fff|000)|[; {]color:#", html)  # Text and paper are the page's own

    def light(colour):
        parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        return sum(w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for w, c in zip((0.2126, 0.7152, 0.0722), parts))

    for name, colour in sheets.COLOURS.items():  # WCAG 2.2, 1.4.11: 3 to 1 for graphics
        assert (light("#ffffff") + 0.05) / (light(colour) + 0.05) >= 3 <= (light(colour) + 0.05) / (light("#111111") + 0.05), name


def test_text_is_ascii_where_the_facts_are():
    for sheet in SHEETS.values():
        assert sheet.text().isascii()


# ---- what is shown

def test_stats_are_plain_data():
    for make in (copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))):
        again = make(FULL)
        assert type(again) is Stats and again == FULL == dict(FULL) and repr(again) == repr(FULL)
    assert json.loads(json.dumps(FULL)) == FULL == msgspec.json.decode(msgspec.json.encode(FULL))
    assert Stats(json.loads(json.dumps(FULL)))._repr_html_() == FULL._repr_html_() and str(FULL) == repr(FULL)
    assert FULL != EMPTY and isinstance(FULL, dict) and FULL["total"]["hits"] == 1205


def test_ipython_shows_both_forms():
    formatters = pytest.importorskip("IPython.core.formatters")
    for thing in (FULL, FULL.sheet()):
        data, _ = formatters.DisplayFormatter().format(thing)
        assert data["text/plain"] == str(thing) and data["text/html"].startswith('<div class="aurea-sheet"')


def test_an_empty_cache_says_so_and_shows_no_zeros():
    for stats in (EMPTY, Stats()):
        assert "Nothing was asked yet." in str(stats)
        for zero in ("$0", "0 s", "-", "nan", "%"):
            assert zero not in str(stats)
        assert "<svg" not in stats._repr_html_()


def test_saved_and_spent_are_never_mixed():
    table = display.costs_table(cost(3.0, 60.0), cost(1.0, 0.0))
    assert [row.cells for row in table.rows] == [("time", "1 min", "0 s"), ("US dollars", "$3.00", "$1.00")]
    assert table.rows[1].bar == (("saved", 0.75), ("spent", 0.25)) and table.rows[0].bar == (("saved", 1.0), ("spent", 0.0))
    assert display.costs_table(Cost(60.0, 0, 0, 3.0), Cost(0.0, 0, 0, 1.0)) == table  # As a `Cost` and as JSON made of one
    assert display.costs_table(None, None).rows == () == display.costs_table(Cost(), {}).rows


def test_functions_that_saved_most_come_first_and_the_rest_is_counted():
    table = FULL.sheet().tables[-1]
    assert [row.cells[0] for row in table.rows] == [f"questions.f{i}" for i in range(12, 2, -1)] and table.note == "and 3 more"


def test_the_total_of_outcomes_is_of_all_kinds():
    rows = {row.cells[0]: row for row in FULL.sheet().tables[1].rows}
    assert rows["hit"].cells[1] == "1,174" and rows["miss"].cells[1] == "196" and list(rows) == ["hit", "stale", "near", "shared", "miss", "bypass", "error"]
    assert sum(part for row in rows.values() for _, part in row.bar) == pytest.approx(1)
    assert display.outcomes_table({"someday": 1, "hit": 1}).rows[1].cells == ("someday", "1", "50.0 %")


def test_a_store_that_is_away():
    text = str(Stats({"store": {"name": "redis", "up": False, "url": None, "nested": {"a": 1}}}))
    assert "not stored until it is back" in text and "nested" not in text and "url" not in text


def test_the_value_is_shown_only_when_it_is_handed_over():
    for value in ("secret words", None, 0, {"a": "secret words"}):
        assert "value" not in dict(display.of_entry(seen(), 1200.0).facts) and "secret" not in display.of_entry(seen(), 1200.0).html()
        assert dict(display.of_entry(seen(), 1200.0, value).facts)["value"] == repr(value)


def test_previews_are_short():
    numpy = pytest.importorskip("numpy")

    class Bad:
        def __repr__(self): raise RuntimeError

    assert display.preview(numpy.zeros((3, 4), "float32")) == "ndarray of shape (3, 4), float32"
    for value in ("x" * 10**6, b"x" * 10**6, list(range(10**6)), dict.fromkeys(range(99), "y" * 999), 10**9000 if sys.version_info < (3, 11) else 10**4000, Bad(), [[[[[[1]]]]]], Cost()):
        assert 0 < len(display.preview(value)) <= 300
    assert display.preview("x" * 999).startswith("'xxx") and display.preview("x" * 999).endswith("...")


def test_ends_of_an_entry():
    def facts(**more): return dict(display.of_entry(seen(**more), 1200.0).facts)
    assert facts()["expires"] == "in 56 min 40 s" and facts()["age"] == "3 min 20 s" and facts()["ttl"] == "1 h"
    assert facts(left=-180.0)["expired"] == "3 min ago" and facts(left=None)["expires"] == "never"
    assert facts(born=9000.0)["age"] == "0 s"  # Another machine's clock
    assert facts(cost={"seconds": 2.0, "usd": 0.0042})["cost"] == "$0.0042" and "cost" not in facts(cost=Cost())


# ---- numbers

@pytest.mark.parametrize("form,table", [
    (sheets.money, {0: "$0", 0.0012: "$0.0012", 0.00999: "$0.0100", 0.042: "$0.042", 0.5: "$0.50", 12.345: "$12.35", 1234.5: "$1,234.50", 1e-9: "<$0.000001", 999_999.99: "$999,999.99", 1.234e9: "$1.23B", -3.5: "-$3.50"}),
    (sheets.seconds, {0: "0 s", 0.35: "350 ms", 0.99999: "1 s", 1e-5: "0.01 ms", 3.21: "3.21 s", 59.9: "59.9 s", 59.96: "1 min", 200: "3 min 20 s", 3600: "1 h", 3659.6: "1 h 1 min", 7500: "2 h 5 min", 97200: "1 d 3 h", 86400 * 4000: "4,000 d", -180: "-3 min"}),
    (sheets.tokens, {0: "0", 999: "999", 1000: "1k", 12345: "12.3k", 999_499: "999k", 999_999: "1M", 4_560_000: "4.56M", 7e9: "7B", 8e12: "8T"}),
    (sheets.size, {0: "0 B", 512: "512 B", 1523: "1.52 kB", 64_000_000: "64 MB", 3.4e9: "3.4 GB"})])
def test_numbers_for_people(form, table):
    assert {n: form(n) for n in table} == table


@given(st.floats())
def test_every_number_has_a_form(n):
    for form in (sheets.money, sheets.seconds, sheets.tokens, sheets.size):
        assert form(n) and "e+" not in form(n) or abs(n) == float("inf")


def test_huge_numbers_fit():
    n = 10**30
    stats = Stats({"llm": {"hits": n, "misses": n}, "total": {"hits": n, "misses": n, "requests": 2 * n, "hit_rate": 50.0}, "outcomes": {"llm": {"hit": n, "miss": n, "error": 1}},
                   "saved": cost(1e30, 1e30, n, n), "spent": cost(float("inf"), float("nan"), 1, 0), "functions": {"m." + "f" * 200: {"hits": n, "misses": n, "saved": cost(1e30), "spent": cost(1e30)}}})
    assert all(wide(line) <= 80 for line in str(stats).split("\n")) and f"{n:,}" in unescape(stats._repr_html_())


def test_looking_costs_an_import_only_those_who_look():
    code = """
import sys, aurea_orchestrator
names = lambda: {m.split(".")[0] for m in sys.modules} | {m for m in sys.modules if m.startswith("aurea_orchestrator.")}
assert not {"rich", "genai_prices", "aurea_orchestrator.display", "aurea_orchestrator.sheets"} & names()
from aurea_orchestrator.counts import Stats
str(Stats()), Stats()._repr_html_()
assert not {"rich", "genai_prices", "numpy", "IPython"} & names()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_entries_and_an_entry_show_themselves():
    from aurea_orchestrator import Cache, cache_llm_response
    cache = Cache.from_url("memory://")
    @cache_llm_response(cache=cache)
    def ask(prompt): return {"usage": {"prompt_tokens": 3, "completion_tokens": 2}, "text": prompt}
    for prompt in "abca": ask(prompt)
    cache.stats()
    listing = cache.entries()
    assert len(listing) == 3 and [one.key for one in cache.entries(limit=1)] == [listing[0].key] and "There are none." in str(cache.entries(kind="embedding"))
    for shown, html in ((str(listing), listing._repr_html_()), (str(listing[0]), listing[0]._repr_html_())):
        assert "ask" in shown and "ask" in re.sub(r"<wbr>", "", html) and "<table" in html
    assert sorted(one.hits for one in listing) == [0, 0, 1]
    assert listing[0].key in str(listing[0]) and "3 in, 2 out" in str(listing[0]) and "past" in listing[0]._repr_html_()
