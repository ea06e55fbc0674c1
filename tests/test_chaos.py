"""Load over four workers while things break at random (seeded); at the end everything must still be true.

    CHAOS_SEED=7 CHAOS_SECONDS=60 pytest tests/test_chaos.py -s
"""
from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import psutil
import pytest

from aurea_orchestrator import codec, keys
from aurea_orchestrator.leases import TTL
from tests.servers import Server
from tests.service import Service, samples
from tests.upstream import Upstream, expected

SEED, SECONDS = int(os.environ.get("CHAOS_SEED", "1")), float(os.environ.get("CHAOS_SECONDS", "10"))
PROMPTS = [f"question {n}" for n in range(400)]
CUSTOMERS = 16
MENDING = 0.75  # seconds after the end of a trouble in which it may still be felt: until the breaker's next probe, and a little
CALM = 0.4      # the part of all calls, at least, that no trouble explains


class Trouble(NamedTuple):
    "What was done, and when."

    name: str
    began: float
    ended: float


class Asked(NamedTuple):
    "What a customer saw."

    prompt: str
    began: float
    ended: float
    outcome: str


class Faults:
    "What is done to the house, one thing after the other."

    forgets = ("flushed", "killed", "deleted")                     # All answers are gone
    passes = ("failing", "disconnected", "worker_killed")          # Nothing that was stored is gone, and nobody is hindered for long

    def __init__(self, seed: int, service: Service, upstream: Upstream) -> None:
        self.chance, self.service, self.upstream = random.Random(seed), service, upstream
        self.done, self.upstream_failures = list[Trouble](), 0

    def harms(self) -> list[Callable[[], Awaitable[None]]]: return [self.failing, self.worker_killed, self.worker_stopped]

    async def failing(self) -> None:
        times = self.chance.randint(1, 3)
        self.upstream_failures += times
        await asyncio.to_thread(self.upstream.fault, "500", times=times)

    async def worker_killed(self) -> None:
        before = self.service.log.count("Application startup complete")
        os.kill(self.chance.choice(self.service.worker_pids()), signal.SIGKILL)
        for _ in range(300):
            if self.service.log.count("Application startup complete") > before: return
            await asyncio.sleep(0.1)

    async def worker_stopped(self) -> None:
        pid = self.chance.choice(self.service.worker_pids())
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(self.chance.uniform(0.2, 1.5))
        os.kill(pid, signal.SIGCONT)

    async def run(self, until: float) -> None:
        order = list[Callable[[], Awaitable[None]]]()
        while time.monotonic() < until:
            order = order or self.chance.sample(self.harms(), len(self.harms()))  # each kind comes before any comes twice
            harm, began = order.pop(), time.monotonic()
            await harm()
            self.done.append(Trouble(harm.__name__, began, ended := time.monotonic()))
            felt = 0.0 if harm.__name__ in self.passes else ended - began + MENDING
            await asyncio.sleep(felt + self.chance.uniform(0.5, 1.5))                 # it is calm for as long as it was not, and some more

    def calm(self, asked: list[Asked]) -> list[Asked]:
        "What was asked and answered while the store was not in trouble, and nobody who had a lease stood still."
        hindered = [(each.began, each.ended + MENDING) for each in self.done if each.name not in self.passes]
        return [one for one in asked if all(one.ended < began or one.began > ended for began, ended in hindered)]

    def explained(self, asked: list[Asked], again: int) -> int:
        """How many upstream calls there may be: one for each prompt, and again after each time that all was forgotten; those that were
        asked for while the store was in trouble, and were no hits; those that failed, and those whose worker was killed."""
        calm = self.calm(asked)
        ends = [each.ended for each in self.done if each.name in self.forgets]
        once = {(one.prompt, sum(end < one.began for end in ends)) for one in calm}
        hindered = sum(one.outcome != "hit" for one in asked) - sum(one.outcome != "hit" for one in calm)
        return len(once) + hindered + self.upstream_failures + again + CUSTOMERS * len([each for each in self.done if each.name == "worker_killed"])

    def entries(self) -> Iterator[tuple[str, bytes]]:
        "All that is stored."
        raise NotImplementedError


class RedisFaults(Faults):
    def __init__(self, seed: int, service: Service, upstream: Upstream, redis: Server) -> None:
        super().__init__(seed, service, upstream)
        self.redis = redis

    def harms(self) -> list[Callable[[], Awaitable[None]]]:
        return [*super().harms(), self.paused, self.killed, self.flushed, self.disconnected, self.full]

    async def paused(self) -> None: self.redis.pause(); await asyncio.sleep(self.chance.uniform(0.2, 2)); self.redis.resume()
    async def killed(self) -> None: self.redis.kill(); await asyncio.sleep(self.chance.uniform(0.1, 1)); await asyncio.to_thread(self.redis.restart)

    async def flushed(self) -> None:
        with self.redis.client() as client: client.flushall()

    async def disconnected(self) -> None:
        with self.redis.client() as client: client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    async def full(self) -> None:
        with self.redis.client() as client:
            client.config_set("maxmemory", "1")
            await asyncio.sleep(0.5)
            client.config_set("maxmemory", "0")

    def entries(self) -> Iterator[tuple[str, bytes]]:
        with self.redis.client() as client:
            for key in client.scan_iter("llm:*"):
                if (blob := client.get(key)) is not None: yield key.decode(), blob


class FileFaults(Faults):
    def __init__(self, seed: int, service: Service, upstream: Upstream, file: Path) -> None:
        super().__init__(seed, service, upstream)
        self.file = file

    def harms(self) -> list[Callable[[], Awaitable[None]]]: return [*super().harms(), self.locked, self.deleted, self.full]

    async def locked(self) -> None:
        hold = "import sqlite3, sys, time; db = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=5); db.execute('BEGIN EXCLUSIVE'); time.sleep(1)"
        await asyncio.to_thread(subprocess.run, [sys.executable, "-c", hold, str(self.file)], check=True)

    async def deleted(self) -> None:
        for end in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError): os.unlink(f"{self.file}{end}")

    async def full(self) -> None:
        "No file of a worker may grow."
        for limit in (self.size(), psutil.RLIM_INFINITY):
            for pid in self.service.worker_pids(): psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE, (limit, psutil.RLIM_INFINITY))
            if limit != psutil.RLIM_INFINITY: await asyncio.sleep(0.5)

    def size(self) -> int: return max((path.stat().st_size for path in self.file.parent.glob(self.file.name + "*") if path.is_file()), default=0)

    def entries(self) -> Iterator[tuple[str, bytes]]:
        with closing(sqlite3.connect(self.file)) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            yield from db.execute("SELECT key, blob FROM entries WHERE key LIKE 'llm:%'")


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.parametrize("store", [pytest.param("redis", marks=pytest.mark.redis), "sqlite"])
async def test_chaos(tmp_path: Path, store: str, request: pytest.FixtureRequest, record_property: Any) -> None:
    redis = request.getfixturevalue("own_redis") if store == "redis" else None
    url = redis.url if redis else f"sqlite:///{tmp_path}/shelf/cache.db"
    chance, asked, again = random.Random(SEED), list[Asked](), 0
    weights = [1 / (rank + 1) for rank in range(len(PROMPTS))]
    with Upstream(delay=0.02) as upstream, Service(tmp_path, workers=4, CACHE_URL=url, LLM_BASE_URL=upstream.url, LLM_MODEL="m") as service:
        faults: Faults = RedisFaults(SEED + 1, service, upstream, redis) if redis else FileFaults(SEED + 1, service, upstream, tmp_path / "shelf/cache.db")

        async def customer(client: httpx2.AsyncClient) -> None:
            nonlocal again
            while not harming.done():
                (prompt,) = chance.choices(PROMPTS, weights)
                began = time.monotonic()
                while True:
                    try: reply = await client.post("/llm/generate", json={"prompt": prompt})
                    except httpx2.TransportError: again += 1; await asyncio.sleep(0.05); continue  # its worker was killed
                    break
                assert reply.status_code == 200 and reply.json()["response"] == expected(prompt), (reply.status_code, reply.text)
                asked.append(Asked(prompt, began, time.monotonic(), reply.headers["x-cache"]))

        harming = asyncio.create_task(faults.run(time.monotonic() + 0.8 * SECONDS))  # and the last trouble is calmed down at the end
        async with service.aclient() as client: await asyncio.gather(harming, *[customer(client) for _ in range(CUSTOMERS)])
        names, sent, explained = [each.name for each in faults.done], upstream.calls()["chat"], faults.explained(asked, again)
        slowest, calm = max(one.ended - one.began for one in asked), len(faults.calm(asked)) / len(asked)
        print(f"\n{store}, seed {SEED}: {len(asked)} calls answered, slowest {slowest:.2f} s, {again} asked again, {len(names)} faults ({', '.join(names)}), "
              f"{sent} upstream calls of {explained} that are explained, {calm:.0%} of the calls in calm")
        for name, value in {"answered": len(asked), "slowest_s": round(slowest, 2), "upstream": sent, "explained": explained, "calm": round(calm, 2)}.items():
            record_property(f"chaos_{store}_{SEED}_{name}", value)

        # every call was answered with the right value (asserted above), and nobody waited longer than for a leader who was killed
        assert len(asked) > 100 and slowest < 2 * TTL and again <= CUSTOMERS * (names.count("worker_killed") + 1)
        assert sent <= explained and calm >= CALM
        # it mends: soon there are hits again, and /ready says so
        with service.client() as client:
            deadline = time.monotonic() + 20
            while client.get("/ready").json()["status"] != "ready" and time.monotonic() < deadline: await asyncio.sleep(0.1)
            assert client.get("/ready").json()["status"] == "ready"
            assert [client.post("/llm/generate", json={"prompt": "afterwards"}).status_code for _ in range(2)] == [200, 200]
            assert client.post("/llm/generate", json={"prompt": "afterwards"}).headers["x-cache"] == "hit"
            await asyncio.sleep(1)
            page = samples(client.get("/metrics").text)
            # counters are consistent: every lookup is a hit or a miss
            lookups = page['cache_hits_total{cache_type="llm"}'] + page['cache_misses_total{cache_type="llm"}']
            replies = page['http_requests_total{method="POST",path="/llm/generate",status="200"}']
            assert len(asked) + 3 <= replies + again and replies <= lookups <= replies + again + CUSTOMERS
        # no partial entry
        stored = [(key, blob) for key, blob in faults.entries() if keys.is_key(key)]
        for key, blob in stored: codec.check(blob, seal=key.encode())
        assert stored
        assert "Traceback" not in service.log, service.log[-3000:]
