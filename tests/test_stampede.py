"""One computation in the whole house: workers, processes, real Redis, real SQLite, and leaders that are killed."""
from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.service import ROOT, Service
from tests.upstream import Upstream, expected, vector


@pytest.fixture
def upstream():
    with Upstream() as up: yield up


@pytest.fixture(params=[pytest.param("redis", marks=pytest.mark.redis), "sqlite"])
def store_url(request, tmp_path):
    if request.param == "sqlite": return f"sqlite:///{tmp_path}/cache.db"
    return request.getfixturevalue("redis_url")


@pytest.mark.slow
async def test_a_stampede_over_four_workers_is_one_upstream_call(tmp_path, store_url, upstream):
    upstream.slow(1.0)
    with Service(tmp_path, workers=4, CACHE_URL=store_url, LLM_BASE_URL=upstream.url, LLM_MODEL="m") as service:
        async def one(client, prompt):
            reply = await client.post("/llm/generate", json={"prompt": prompt})
            assert reply.status_code == 200 and reply.json()["response"] == expected(prompt), reply.text
            return reply.headers["x-cache"]
        async with service.aclient() as client:
            for round in range(3):
                outcomes = await asyncio.gather(*[one(client, f"round {round}") for _ in range(200)])
                assert upstream.calls()["chat"] == round + 1 and outcomes.count("miss") == 1
            texts = [f"text {n}" for n in range(40)]
            batches = [texts[start:start + 10] for start in range(0, 31, 3)]
            async def embed(batch):
                reply = await client.post("/embedding/generate", json={"text": batch})
                assert reply.json()["embedding"] == [vector(t) for t in batch]
            await asyncio.gather(*map(embed, batches * 4))
            assert upstream.calls()["texts"] == 40  # batches that overlap compute each text once, whichever worker has them
            await asyncio.sleep(1)
            stats = (await client.get("/cache/stats")).json()
        assert stats["llm"] == {"hits": 597, "misses": 3} and stats["embedding"]["misses"] == 40


CONTENDER = """
import sys, time, os
from aurea_orchestrator import Cache, cached
cache = Cache.from_url(sys.argv[1])
@cached("work", cache=cache, namespace="stampede")
def work(name, how):
    with open(sys.argv[2], "a") as log: log.write(f"{os.getpid()}\\n")
    if how == "slow": time.sleep(float(sys.argv[3]))   # blocks the only thread there is: the lease is renewed all the same
    return name.upper()
print("ready", flush=True)
sys.stdin.readline()
print(work("answer", "slow"), flush=True)
cache.close()
"""


def contenders(folder, url, n, seconds):
    script = folder / "contender.py"
    script.write_text(CONTENDER)
    started = [subprocess.Popen([sys.executable, str(script), url, str(folder / "log"), str(seconds)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}) for _ in range(n)]  # fmt: skip
    for process in started: assert process.stdout.readline() == "ready\n"
    return started


def go(process): process.stdin.write("go\n"); process.stdin.flush()


@pytest.mark.slow
def test_four_processes_compute_once_although_it_takes_longer_than_a_lease(tmp_path, store_url):
    processes = contenders(tmp_path, store_url, 4, 6.0)
    for process in processes: go(process)
    assert [process.communicate(timeout=60)[0] for process in processes] == ["ANSWER\n"] * 4
    assert len((tmp_path / "log").read_text().split()) == 1


@pytest.mark.timed
@pytest.mark.slow
def test_a_killed_leader_costs_one_more_computation_and_the_ttl_of_a_lease(tmp_path, store_url):
    processes = contenders(tmp_path, store_url, 4, 2.0)
    for process in processes: go(process)
    log = tmp_path / "log"
    while not log.exists() or not log.read_text().strip(): time.sleep(0.01)
    leader = int(log.read_text().split()[0])
    os.kill(leader, signal.SIGKILL)
    killed = time.monotonic()
    answers = []
    threads = [threading.Thread(target=lambda p=p: answers.append(p.communicate(timeout=60)[0])) for p in processes]
    for t in threads: t.start()
    for t in threads: t.join()
    assert sorted(answers) == ["", *["ANSWER\n"] * 3] and len(log.read_text().split()) == 2
    assert time.monotonic() - killed < 4 + 2 + 6  # the ttl, the computation, and a busy machine
