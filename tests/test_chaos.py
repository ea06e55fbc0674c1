"""Load over four workers while things break at random (seeded); at the end everything must still be true.

    CHAOS_SEED=7 CHAOS_SECONDS=60 pytest tests/test_chaos.py -s
"""
from __future__ import annotations

import asyncio
import os
import random
import signal
import time

import httpx2
import pytest

from aurea_orchestrator import codec, keys
from tests.service import Service, samples
from tests.upstream import Upstream, expected

SEED, SECONDS = int(os.environ.get("CHAOS_SEED", "1")), float(os.environ.get("CHAOS_SECONDS", "20"))
PROMPTS = [f"question {n}" for n in range(400)]


class Faults:
    "What is done to the house, one thing after the other."

    def __init__(self, chance, redis, service, upstream):
        self.chance, self.redis, self.service, self.upstream, self.done = chance, redis, service, upstream, []

    async def paused(self): self.redis.pause(); await asyncio.sleep(self.chance.uniform(0.2, 2)); self.redis.resume()
    async def killed(self): self.redis.kill(); await asyncio.sleep(self.chance.uniform(0.1, 1)); await asyncio.to_thread(self.redis.restart)
    async def flushed(self):
        with self.redis.client() as client: client.flushall()
    async def disconnected(self):
        with self.redis.client() as client: client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    async def full(self):
        with self.redis.client() as client: client.config_set("maxmemory", "1"); await asyncio.sleep(0.5); client.config_set("maxmemory", "0")
    async def failing(self): self.upstream.fault("500", times=self.chance.randint(1, 3)); await asyncio.sleep(0)
    async def worker_killed(self):
        before = self.service.log.count("Application startup complete")
        os.kill(self.chance.choice(self.service.worker_pids()), signal.SIGKILL)
        for _ in range(300):
            if self.service.log.count("Application startup complete") > before: return
            await asyncio.sleep(0.1)

    async def run(self, until):
        harms = [self.paused, self.killed, self.flushed, self.disconnected, self.full, self.failing, self.worker_killed]
        order = []
        while time.monotonic() < until:
            order = order or self.chance.sample(harms, len(harms))  # each kind comes before any comes twice
            harm = order.pop()
            self.done.append(harm.__name__)
            await harm()
            await asyncio.sleep(self.chance.uniform(0.3, 1.2))


@pytest.mark.redis
@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 120)
async def test_chaos(tmp_path, own_redis):
    chance = random.Random(SEED)
    weights = [1 / (rank + 1) for rank in range(len(PROMPTS))]
    answered, again, slow = 0, 0, 0
    with Upstream(delay=0.02) as upstream, Service(tmp_path, workers=4, CACHE_URL=own_redis.url, LLM_BASE_URL=upstream.url, LLM_MODEL="m") as service:
        faults, until = Faults(random.Random(SEED + 1), own_redis, service, upstream), time.monotonic() + SECONDS

        async def customer(client):
            nonlocal answered, again, slow
            while time.monotonic() < until:
                (prompt,) = chance.choices(PROMPTS, weights)
                began = time.monotonic()
                while True:
                    try: reply = await client.post("/llm/generate", json={"prompt": prompt})
                    except httpx2.TransportError: again += 1; await asyncio.sleep(0.05); continue  # its worker was killed
                    break
                assert reply.status_code == 200 and reply.json()["response"] == expected(prompt), (reply.status_code, reply.text)
                answered += 1
                slow += time.monotonic() - began > 5

        async with service.aclient() as client: await asyncio.gather(faults.run(until), *[customer(client) for _ in range(16)])
        print(f"\nseed {SEED}: {answered} answered, {again} asked again, {len(faults.done)} faults ({', '.join(faults.done)}), upstream {upstream.calls()['chat']}")

        # every call was answered with the right value (asserted above), and nobody was kept waiting
        assert answered > 100 and slow == 0 and again <= 16 * (faults.done.count("worker_killed") + 1)
        # upstream calls are explained: one a prompt, once more for each time that the store forgot or could not be asked
        forgetful = sum(faults.done.count(name) for name in ("paused", "killed", "flushed", "disconnected", "full", "worker_killed"))
        assert upstream.calls()["chat"] <= len(PROMPTS) * (1 + forgetful) and upstream.calls()["chat"] < answered
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
            assert answered + 3 <= replies + again and replies <= lookups <= replies + again + 16
        # no partial entry
        with own_redis.client() as client:
            for key in client.scan_iter("llm:*"):
                blob = client.get(key)
                if blob is not None and keys.is_key(key.decode()): codec.check(blob, seal=key)
        assert "Traceback" not in service.log, service.log[-3000:]
