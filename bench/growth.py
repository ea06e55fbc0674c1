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
from collections.abc import Callable, Iterator
from typing import Any

from aurea_orchestrator import Cache, cached, codec
from aurea_orchestrator.effects import drive
from aurea_orchestrator.stores.base import Item
from bench.cases import Lab
from bench.hits import SURE
from bench.http import OURS, loaded, served

Figure = dict[str, Any]   # title, x, unit, at, series: {name: [one for each of `at`]}


def urls(lab: Lab) -> dict[str, str]:
    "An empty store of each engine."
    lab.empty()
    file = lab.folder / f"{time.monotonic_ns()}.sqlite"
    return {"memory": "memory://?max_bytes=4GB", "SQLite": f"sqlite:///{file}?max_bytes=4GB", "Redis": lab.url}


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
        cache, asked = Cache.from_url(url, **SURE), []

        @cached("callers", cache=cache)
        async def slow(what: str, asked: list[str] = asked) -> str:
            asked.append(what)
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
            asked.clear()
            lone[name].append((lab.wait(together(slow, [f"one of {n}"] * n)) - seconds) / n * 1e6)
            counted[name].append(len(asked))
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
        cache, asked = Cache.from_url(url, timeout=10), []

        @cached("sizes", cache=cache)
        def text(n: int, asked: list[int] = asked) -> str:
            asked.append(n)
            return "x" * n

        series[name] = [best(lambda n=n: text(n)) for n in at]
        assert asked == at, "not hits"
        cache.close()
    yield {"title": "size of a value", "x": "bytes", "unit": "µs a hit", "at": at, "series": series}


def fill(cache: Cache, since: int, n: int) -> None:
    "Entries of about 1 KB, past the decorator."
    blobs = "x" * 1000
    for start in range(since, n, 1000):
        names = [f"entries:{i:064x}" for i in range(start, min(start + 1000, n))]
        drive(cache.store.put_many([Item(key, codec.encode(blobs, born=time.time(), ttl=3600, seal=key.encode()), 3600) for key in names]))


def reads(url: str | Cache, stop: Callable[[], bool]) -> list[float]:
    "µs of each hit until told to stop: one entry of another kind, which a clear leaves alone."
    @cached("other", cache=url if isinstance(url, Cache) else Cache.from_url(url, **SURE))
    def other(what: str) -> str: return what * 100

    other("x")
    taken = []
    while not stop():
        began = time.perf_counter(); other("x")
        taken.append((time.perf_counter() - began) * 1e6)
        time.sleep(0.0005)                                                  # As a caller does, who does something with it
    return taken


@contextlib.contextmanager
def reader(lab: Lab, name: str, url: str, cache: Cache) -> Iterator[dict[str, Any]]:
    "Somebody who reads meanwhile: a thread for memory, else another process. What it saw is there afterwards."
    saw: dict[str, Any] = {}
    if name == "memory":
        end = threading.Event()
        thread = threading.Thread(target=lambda: saw.update(taken=reads(cache, end.is_set)))
        thread.start()
        yield saw
        end.set(), thread.join()
    else:
        process = lab.python("-m", "bench.growth", url, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout and process.stdout.readline() == "reading\n"
        yield saw
        saw["taken"] = json.loads(process.communicate("stop\n", timeout=30)[0])


def quantiles(taken: list[float]) -> tuple[float, float]:
    "Median and 99th percentile."
    taken = sorted(taken) or [float("nan")]
    return taken[len(taken) // 2], taken[int(len(taken) * 0.99)]


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
            fill(cache, 0, n)
            hits[name].append(best(lambda: found("x")))
            with reader(lab, name, url, cache) as quiet: time.sleep(0.2)
            with reader(lab, name, url, cache) as saw:
                began = time.perf_counter()
                removed = cache.clear("entries")
                clears[name].append((time.perf_counter() - began) * 1e3)
            assert removed == n, f"{removed} of {n} cleared"
            slow[name].append(quantiles(saw["taken"])[1])
            slow[f"{name}, quiet"].append(quantiles(quiet["taken"])[1])
        cache.close()
    yield {"title": "entries in the store", "x": "entries", "unit": "µs a hit", "at": at, "series": hits}
    yield {"title": "clear of all entries", "x": "entries", "unit": "ms", "at": at, "series": clears}
    yield {"title": "a reader during the clear, and while it is quiet", "x": "entries", "unit": "µs a hit, 99th percentile",
           "at": at, "series": slow}


def workers(lab: Lab) -> Iterator[Figure]:
    "Requests per second of more workers on the cores that are left beside the client."
    at, series = [1, 2, 4], {"HTTP hits, Redis": [], "HTTP hits, memory": [], "FastAPI, fixed body": []}
    lab.empty()
    for n in at:
        with (served(lab, OURS, n, lab.url) as far, served(lab, OURS, n, "memory://") as near,
              served(lab, "bench.apps:fastapi", n) as framework):
            sides = [loaded(lab, port, seconds=0.7) for port in (far, near, framework)]
            rounds = [[side() for side in sides] for _ in range(3)]
            for name, seen in zip(series, zip(*rounds, strict=True), strict=True): series[name].append(statistics.median(seen))
    yield {"title": "workers", "x": "workers", "unit": "requests/s", "at": at, "series": series}


FIGURES = (callers, sizes, entries, workers)

if __name__ == "__main__":                                                  # The reader in another process
    told = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), told.set()), daemon=True).start()
    print("reading", flush=True)
    print(json.dumps(reads(sys.argv[1], told.is_set)))
