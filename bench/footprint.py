"""What it costs before the first call, and what an entry takes in memory."""
from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator

from bench.cases import ANSWER, Case, Lab


def started(lab: Lab, code: str) -> Callable[[], tuple[float, float]]:
    "Milliseconds of a Python that runs this: on the clock, and of the processor."
    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def run() -> tuple[float, float]:
        began, before = time.perf_counter(), spent()
        lab.told("-c", code)
        return (time.perf_counter() - began) * 1e3, (spent() - before) * 1e3
    return run


def starting(lab: Lab) -> Iterator[Case]:
    "Importing the package, over Python itself."
    bare, ours = started(lab, "pass"), started(lab, "import aurea_orchestrator")
    yield Case("import aurea_orchestrator, clock", "python -c pass", lambda: ours()[0], lambda: bare()[0], "ms", "+", most=150)
    yield Case("import aurea_orchestrator, processor", "python -c pass", lambda: ours()[1], lambda: bare()[1], "ms", "+", most=150)


GROW = """
import gc, psutil, msgspec
from aurea_orchestrator import Cache, cache_llm_response
from bench.cases import ANSWER
@cache_llm_response(cache=Cache.from_url("memory://?max_bytes=1GB"))
def answer(prompt): return {**ANSWER, "id": prompt}
def taken(): gc.collect(); return psutil.Process().memory_info().rss
for i in range(1000): answer(f"warm {i:08}")
n, before = 20_000, taken()
for i in range(n): answer(f"{i:08}")
print((taken() - before) / n - len(msgspec.msgpack.encode({**ANSWER, "id": f"{n:08}"})))
"""


def entry(lab: Lab) -> Iterator[Case]:
    "Resident memory of 20,000 entries, less their answers in MessagePack."
    assert len(str(ANSWER)) > 1400
    yield Case("memory of an entry over its payload", "", lambda: float(lab.told("-c", GROW)), None, "bytes", "=", most=500, rounds=3)


CASES = (starting, entry)
