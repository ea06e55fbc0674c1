"""How the cost grows: with callers, with the size of a value, with the number of entries, with workers."""
from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import threading
import time
from bisect import bisect
from collections.abc import Callable, Iterator
from typing import Any

from aurea_orchestrator import Cache, cached, codec
from aurea_orchestrator.effects import drive
from aurea_orchestrator.stores.base import Item
from bench.cases import Lab
from bench.hits import SURE
from bench.http import OURS, loaded, served

Figure = dict[str, Any]   # title, x, unit, at, series: {name: [one for each of `at`]}; None where too little was seen to say


def urls(lab: Lab) -> dict[str, str]:
    "An empty store of each engine."
    lab.empty()
    file = lab.folder / f"{time.monotonic_ns()}.sqlite"
    return {"memory": "memory://?max_bytes=4GB", "SQLite": f"sqlite:///{file}?max_bytes=4GB&memory=0", "Redis": lab.url}


def best(call: Callable[[], Any], seconds: float = 0.1) -> float:
    "µs of a blocking call: the median of at least three."
    call()
    taken, end = list[float](), time.perf_counter() + seconds
    while len(taken) < 3 or time.perf_counter() < end:
        began = time.perf_counter(); call()
        taken.append((time.perf_counter() - began) * 1e6)
    return statistics.median(taken)


def callers(lab: Lab) -> Iterator[Figure]:
    "All at once on one loop: of one key that is computed meanwhile, and each of a key of its own."
    at, lone, own, counted = [1, 10, 100, 1000, 10_000], {}, {}, {}
    seconds = 0.2
    for name, url in urls(lab).items():
        cache = Cache.from_url(url, **SURE)

        @cached("callers", cache=cache)
        async def slow(what: str) -> str:
            await asyncio.sleep(seconds)
            return what * 100

        @cached("callers", cache=cache)
        async def quick(what: str) -> str: return what * 100

        async def together(call: Any, prompts: list[str]) -> float:
            began = time.perf_counter()
            await asyncio.gather(*map(call, prompts))
            return time.perf_counter() - began

        def one(call: Any, n: int) -> float:
            return statistics.median(lab.wait(together(call, [f"key {i}" for i in range(n)])) for _ in range(3))

        lone[name], own[name], counted[name] = [], [], []
        for n in at:
            before = slow.cache_info().misses
            lone[name].append((lab.wait(together(slow, [f"one of {n}"] * n)) - seconds) / n * 1e6)
            counted[name].append(slow.cache_info().misses - before)
            one(quick, n)                                                   # Stored
            own[name].append(one(quick, n) / n * 1e6)
        lab.wait(cache.aclose())
    yield {"title": "callers of one key that is being computed", "x": "callers", "unit": "µs for each, beyond the computation",
           "at": at, "series": lone}
    yield {"title": "computations for them", "x": "callers", "unit": "computations", "at": at, "series": counted}
    yield {"title": "callers of distinct cached keys", "x": "callers", "unit": "µs for each", "at": at, "series": own}


def sizes(lab: Lab) -> Iterator[Figure]:
    "A hit for a value of one text."
    at, series = [10**3, 10**4, 10**5, 10**6, 10**7], {}
    for name, url in urls(lab).items():
        cache = Cache.from_url(url, timeout=10)
        text = cached("sizes", cache=cache)(lambda n: "x" * n)
        series[name] = [best(lambda n=n, text=text: text(n)) for n in at]
        assert text.cache_info().misses == len(at), "not hits"
        cache.close()
    yield {"title": "size of a value", "x": "bytes", "unit": "µs a hit", "at": at, "series": series}


def fill(cache: Cache, n: int) -> None:
    "Entries of about 1 KB, past the decorator."
    blobs = "x" * 1000
    for start in range(0, n, 1000):
        names = [f"entries:{i:064x}" for i in range(start, min(start + 1000, n))]
        drive(cache.store.put_many([Item(key, codec.encode(blobs, born=time.time(), ttl=3600, seal=key.encode()), 3600) for key in names]))


def reads(cache: Cache, warm: Callable[[], None], stop: Callable[[], bool]) -> list[tuple[float, float]]:
    """When each hit was due, and µs from then on, until told to stop: one entry of another kind, which a clear leaves alone.

    Counted from when it was due, since who must wait for the interpreter before it can even ask waits too.
    """
    @cached("other", cache=cache)
    def other(what: str) -> str: return what * 100

    other("x"), other("x"), warm()
    taken, due = list[tuple[float, float]](), time.monotonic()
    while not stop():
        time.sleep(max(0.0, due - time.monotonic()))
        other("x")
        taken.append((due, ((now := time.monotonic()) - due) * 1e6))
        due = now + 0.0005                                                  # As a caller does, who does something with it
    return taken


@contextlib.contextmanager
def reader(lab: Lab, name: str, url: str, cache: Cache) -> Iterator[dict[str, Any]]:
    "Somebody who reads meanwhile: a thread for memory, else another process. What it saw is there afterwards."
    saw: dict[str, Any] = {}
    if name == "memory":
        ready, end = threading.Event(), threading.Event()
        thread = threading.Thread(target=lambda: saw.update(taken=reads(cache, ready.set, end.is_set)))
        thread.start()
        ready.wait(10)
        yield saw
        end.set(), thread.join()
    else:
        process = lab.python("-m", "bench.growth", url, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout and process.stdout.readline() == "reading\n"
        yield saw
        saw["taken"] = json.loads(process.communicate("stop\n", timeout=30)[0])


def slowest(taken: list[tuple[float, float]], spans: list[tuple[float, float]]) -> float | None:
    "The 99th percentile of the hits that met one of these spans of time; None if that were a guess."
    starts = [begin for begin, _ in spans]

    def met(at: float, us: float) -> bool:
        before = bisect(starts, at + us / 1e6)                              # The last that began before the hit ended
        return before > 0 and spans[before - 1][1] > at

    seen = sorted(us for at, us in taken if met(at, us))
    return seen[int(len(seen) * 0.99)] if len(seen) >= 100 else None


def entries(lab: Lab) -> Iterator[Figure]:
    "A hit among so many, a clear of them, and what a reader feels of it."
    at = [10**2, 10**3, 10**4, 10**5] + [10**6] * lab.full
    hits, clears, slow = {}, {}, {}
    for name, url in urls(lab).items():
        cache = Cache.from_url(url, **SURE)

        @cached("found", cache=cache)
        def found(what: str) -> str: return what * 100

        hits[name], clears[name], slow[name], slow[f"{name}, quiet"] = [], [], [], []
        for n in at:
            fill(cache, n)
            hits[name].append(best(lambda: found("x")))
            spans = list[tuple[float, float]]()
            with reader(lab, name, url, cache) as saw:
                quiet = time.monotonic()
                time.sleep(0.3)
                quiet_till = time.monotonic()
                while time.monotonic() < quiet_till + 10 and sum(end - begin for begin, end in spans) < 1:  # Short ones often
                    if spans: fill(cache, n)
                    began, removed = time.monotonic(), cache.clear("entries")
                    spans.append((began, time.monotonic()))
                    assert removed == n, f"{removed} of {n} cleared"
            clears[name].append(statistics.median(end - begin for begin, end in spans) * 1e3)
            slow[name].append(slowest(saw["taken"], spans))
            slow[f"{name}, quiet"].append(slowest(saw["taken"], [(quiet, quiet_till)]))
        cache.close()
    yield {"title": "entries in the store", "x": "entries", "unit": "µs a hit", "at": at, "series": hits}
    yield {"title": "clear of all entries", "x": "entries", "unit": "ms", "at": at, "series": clears}
    yield {"title": "a reader during the clear, and while it is quiet", "x": "entries", "unit": "µs a hit, 99th percentile",
           "at": at, "series": slow}


def workers(lab: Lab) -> Iterator[Figure]:
    "Requests per second of more workers on the cores that are left beside the client."
    at, series = [1, 2, 4], {"hits in Redis": [], "hits behind memory": [], "FastAPI, fixed body": []}
    lab.empty()
    for n in at:
        with (served(lab, OURS, n, lab.url) as far, served(lab, OURS, n, lab.redis.url) as near,
              served(lab, "bench.apps:fastapi", n) as framework):
            sides = [loaded(lab, port, seconds=0.7) for port in (far, near, framework)]
            rounds = [[side() for side in sides] for _ in range(3)]
            for name, seen in zip(series, zip(*rounds, strict=True), strict=True): series[name].append(statistics.median(seen))
    yield {"title": "workers", "x": "workers", "unit": "requests/s", "at": at, "series": series}


FIGURES = (callers, sizes, entries, workers)

if __name__ == "__main__":                                                  # The reader in another process
    told = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), told.set()), daemon=True).start()
    print(json.dumps(reads(Cache.from_url(sys.argv[1], **SURE), lambda: print("reading", flush=True), told.is_set)))
