"""Results as a table, as JSON, as a chart."""
from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = (
    "aurea-orchestrator", "cashews", "joblib", "diskcache", "redis", "aiocache", "redisvl", "litellm",
    "fastapi", "uvicorn", "uvloop", "httptools", "numpy", "msgspec", "hiredis",
)  # fmt: skip
Row = dict[str, Any]


def machine(redis_version: str) -> dict[str, Any]:
    "Where it was measured, and with what."
    versions = {}
    for name in PACKAGES:
        try: versions[name] = version(name)
        except PackageNotFoundError: versions[name] = "not installed"
    model = ""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            model = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), "")
    except OSError: pass
    return {
        "when": f"{datetime.now(UTC):%Y-%m-%d}", "cores": os.cpu_count(), "processor": model or platform.machine(),
        "system": f"{platform.system()} {platform.release()}", "python": platform.python_version(),
        "redis-server": redis_version, "versions": versions,
    }  # fmt: skip


def short(value: float | None) -> str:
    "Three digits that count."
    if value is None: return "–"
    if value == 0 or not math.isfinite(value): return f"{value:g}"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def figure(row: Row) -> str:
    sign = {"×": " ×", "+": f" {row['unit']} more", "=": f" {row['unit']}"}[row["how"]]
    return f"{short(row['figure'])}{sign}"


def spread(row: Row) -> str: return f"{short(row['low'])}–{short(row['high'])}"
def budget(row: Row) -> str: return "" if row["budget"] is None else f"{row['bound']} {short(row['budget'])}"
def verdict(row: Row) -> str: return {None: "", True: "pass", False: "MISS"}[row["kept"]]


def table(head: Sequence[str], lines: Sequence[Sequence[str]], left: int = 2) -> str:
    "Markdown that is also readable as it is; the first columns to the left, the others to the right."
    wide = [max(map(len, column)) for column in zip(head, *lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, wide, strict=True))) + " |"
    rule = "|" + "|".join("-" * (w + 2) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(wide)) + "|"
    return "\n".join([line(head), rule, *map(line, lines)])


def ratios(rows: Sequence[Row]) -> str:
    "The rows of the budgets, and those beside them."
    def line(r: Row) -> list[str]:
        sides = [f"{short(r['ours'])} {r['unit']}", "" if r["theirs"] is None else short(r["theirs"])]
        return [r["name"], r["against"], *sides, figure(r), spread(r), short(r["best"]), budget(r), verdict(r)]
    return table(("what", "beside", "ours", "theirs", "ratio", "least–most", "best", "budget", ""), list(map(line, rows)))


def grown(one: Row) -> str:
    "A figure of growth."
    head = [one["x"], *[f"{n:,}" for n in one["at"]]]
    return f"{one['title']} ({one['unit']})\n\n" + table(head, [[name, *map(short, values)] for name, values in one["series"].items()], 1)


def about(where: Row) -> str:
    "The machine and the versions, in a sentence."
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    return (f"{where['when']}, {where['cores']} cores ({where['processor']}), {where['system']}, Python {where['python']}, "
            f"redis-server {where['redis-server']}; {versions}.")


# ---- the chart

GOOD, BAD, PLAIN = "#2a9d6f", "#d1495b", "#7a869a"
COLORS = ("#2a6fdb", "#e08e0b", "#2a9d6f", "#9bb8ea", "#f0cf8e", "#a5d6c0")


def power_of(n: float) -> str: return f"{n:,g}" if n < 1e4 else f"1e{math.log10(n):.0f}"
def text(x: float, y: float, words: str, how: str = "") -> str: return f'<text x="{x:.0f}" y="{y:.0f}" {how}>{escape(words)}</text>'


def chart(rows: Sequence[Row]) -> str:
    "How much of each budget is used, on a logarithmic scale: left of the line is within. The whisker is least to most."
    kept = [r for r in rows if r.get("budget")]
    left, wide, high = 210, 250, 24

    def used(row: Row, value: float) -> float: return value / row["budget"] if row["bound"] == "≤" else row["budget"] / max(value, 1e-9)
    def place(share: float) -> float: return left + wide * (math.log10(min(max(share, 0.01), 10)) + 2) / 3

    out = [text(place(1), 14, "budget", 'text-anchor="middle"')]
    for share, name in ((0.01, "1 %"), (0.1, "10 %"), (1, ""), (10, "10 ×")):
        out.append(f'<line x1="{place(share):.0f}" x2="{place(share):.0f}" y1="20" y2="{24 + high * len(kept)}" stroke="currentColor" '
                   f'stroke-opacity="{1 if share == 1 else 0.2}"/>')
        if name: out.append(text(place(share), 14, name, 'text-anchor="middle" opacity="0.6"'))
    for n, row in enumerate(kept):
        y, color = 24 + high * n, GOOD if row["kept"] else BAD
        low, high_end = sorted((place(used(row, row["low"])), place(used(row, row["high"]))))
        out += [text(left - 8, y + 14, row["name"], 'text-anchor="end"'),
                f'<rect x="{left}" y="{y + 4}" width="{max(1, place(used(row, row["figure"])) - left):.0f}" height="14" fill="{color}"/>',
                f'<line x1="{low:.0f}" x2="{high_end:.0f}" y1="{y + 11}" y2="{y + 11}" stroke="currentColor"/>',
                text(left + wide + 8, y + 14, figure(row) + (f" {row['against']}" if row["how"] == "×" else ""))]
    return svg(left + wide + 220, 30 + high * len(kept), out, "How much of each budget is used")


def curves(grown: Sequence[Row]) -> str:
    "Small multiples; both scales logarithmic."
    out, wide, high, across = [], 340, 215, 2
    for n, one in enumerate(grown):
        x0, y0 = (n % across) * wide + 46, (n // across) * high + 34
        w, h = wide - 76, high - 99
        seen = [v for values in one["series"].values() for v in values if v and v > 0]
        bottom, top = math.floor(math.log10(min(seen))), max(math.ceil(math.log10(max(seen))), math.floor(math.log10(min(seen))) + 1)
        first, last = math.log10(one["at"][0]), math.log10(one["at"][-1])

        def across_at(x: float, first: float = first, last: float = last, x0: float = x0, w: float = w) -> float:
            return x0 + w * (math.log10(x) - first) / (last - first)

        def down_at(y: float, bottom: int = bottom, top: int = top, y0: float = y0, h: float = h) -> float:
            return y0 + h * (1 - (math.log10(max(y, 10.0**bottom)) - bottom) / (top - bottom))

        out += [text(x0 - 36, y0 - 20, one["title"], 'font-weight="bold"'),
                text(x0 - 36, y0 - 7, f"{one['unit']}, by {one['x']}", 'opacity="0.7"')]
        for power in range(bottom, top + 1):
            y = down_at(10.0**power)
            out += [f'<line x1="{x0}" x2="{x0 + w}" y1="{y:.0f}" y2="{y:.0f}" stroke="currentColor" stroke-opacity="0.2"/>',
                    text(x0 - 4, y + 4, power_of(10.0**power), 'text-anchor="end" opacity="0.6"')]
        out += [text(across_at(x), y0 + h + 13, power_of(x), 'text-anchor="middle" opacity="0.6"') for x in one["at"]]
        room = w / min(3, len(one["series"])) + 12
        for k, (name, values) in enumerate(one["series"].items()):
            points = " ".join(f"{across_at(x):.0f},{down_at(y):.0f}" for x, y in zip(one["at"], values, strict=True) if y is not None)
            out += [f'<polyline points="{points}" fill="none" stroke="{COLORS[k]}" stroke-width="2"/>',
                    text(x0 - 30 + room * (k % 3), y0 + h + 27 + 13 * (k // 3), name, f'fill="{COLORS[k]}"')]
    return svg(across * wide, -(-len(grown) // across) * high + 10, out, "How the cost grows")


def svg(wide: float, high: float, parts: Sequence[str], title: str) -> str:
    style = 'role="img" font-family="sans-serif" font-size="11" fill="currentColor"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" {style}>'
    return "\n".join([head, f"<title>{escape(title)}</title>", *parts, "</svg>\n"])
