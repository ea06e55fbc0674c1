"""Measure us beside the peers:  python -m bench.run [WORD …] [--full] [--share 0.5]

A word chooses the parts whose name has it (memory, redis, http, growth …); without words everything is measured and the results are
stored in bench/results.json and docs/_static/. Ratios count, not times: both sides of one are measured in turns, in one process.
"""
from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from bench import embeddings, footprint, growth, hits, http, proxy, report, trips
from bench.cases import ROOT, Lab

PARTS: tuple[Callable[[Lab], Any], ...] = (
    *hits.CASES, *trips.CASES, *embeddings.CASES, *http.CASES, *footprint.CASES, *growth.FIGURES, *proxy.CASES,
    *hits.LAST,
)  # fmt: skip


def say(words: str) -> None: print(words, file=sys.stderr, flush=True)


def measure(lab: Lab, words: list[str], share: float) -> tuple[list[report.Row], list[report.Row], list[str]]:
    "All rows, all figures of growth, and what could not be measured."
    rows, grown, failed = [], [], []
    for part in PARTS:
        name = f"growth {part.__name__}" if part in growth.FIGURES else part.__name__
        if words and not any(word in name for word in words): continue
        began = time.perf_counter()
        say(f"{name} …")
        try:
            for one in part(lab):
                if isinstance(one, dict):
                    grown.append(one)
                    continue
                rows.append(row := one.run(share))
                say(f"  {row['name']} beside {row['against'] or '-'}: {report.figure(row)} ({report.spread(row)}) "
                    f"{report.budget(row)} {report.verdict(row)}")
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
            traceback.print_exc()
        say(f"  {time.perf_counter() - began:.0f} s")
    return rows, grown, failed


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("words", nargs="*")
    asked.add_argument("--full", action="store_true", help="up to a million entries")
    asked.add_argument("--share", type=float, default=1.0, help="of the rounds")
    given = asked.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    with Lab(given.full) as lab:
        with lab.redis.client() as client: where = report.machine(client.info()["redis_version"])
        say(report.about(where))
        rows, grown, failed = measure(lab, given.words, given.share)
    parts = [report.ratios(rows), *map(report.grown, grown), *(f"not measured: {what}" for what in failed)]
    print("", *parts, sep="\n\n")
    if not given.words:
        results = {"machine": where, "rows": rows, "growth": grown, "failed": failed}
        (ROOT / "bench" / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")
        (ROOT / "docs" / "_static" / "bench.svg").write_text(report.chart(rows), "utf-8")
        (ROOT / "docs" / "_static" / "bench-growth.svg").write_text(report.curves(grown), "utf-8")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
