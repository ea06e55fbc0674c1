"""The service as it is run: uvicorn with four workers beside a real Redis, a real upstream, real signals."""
from __future__ import annotations

import asyncio
import glob
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest

from tests.servers import until
from tests.service import ROOT, Service, samples
from tests.upstream import Upstream, expected, vector


@pytest.fixture
def upstream():
    with Upstream() as up: yield up


def zipf(names, n, seed=7):
    chance = random.Random(seed)
    return chance.choices(names, [1 / (rank + 1) for rank in range(len(names))], k=n)


async def ask_all(service, prompts, at_once=48):
    free = asyncio.Semaphore(at_once)
    async with service.aclient() as client:
        async def one(prompt):
            async with free:
                reply = await client.post("/llm/generate", json={"prompt": prompt})
            assert reply.status_code == 200 and reply.json()["response"] == expected(prompt), reply.text
            return reply.headers["x-cache"]
        return await asyncio.gather(*map(one, prompts))


@pytest.mark.redis
@pytest.mark.slow
async def test_four_workers_beside_redis_count_exactly(tmp_path, redis_url, upstream):
    settings = {"CACHE_URL": redis_url, "LLM_BASE_URL": upstream.url, "LLM_MODEL": "m", "API_KEY": "k"}
    with Service(tmp_path, workers=4, **settings) as service:
        prompts = zipf([f"question number {n}" for n in range(300)], 3000)
        outcomes = await ask_all(service, prompts)
        async with service.aclient() as client:
            for n in range(200):
                texts = [f"text {m}" for m in random.Random(n).sample(range(100), 5)]
                reply = await client.post("/embedding/generate", json={"text": texts})
                assert reply.json()["embedding"] == [vector(t) for t in texts]
        sent = upstream.calls()
        await asyncio.sleep(1)
        hits, misses = sum(o in ("hit", "shared") for o in outcomes), outcomes.count("miss")
        pids = set(service.worker_pids())
        assert len(pids) == 4
        for _ in range(8):  # a new connection each time, so that any worker may answer
            with service.client() as client:
                page, stats = samples(client.get("/metrics").text), client.get("/cache/stats", headers={"x-api-key": "k"}).json()
            assert page['cache_hits_total{cache_type="llm"}'] == stats["llm"]["hits"] == hits
            assert page['cache_misses_total{cache_type="llm"}'] == stats["llm"]["misses"] == misses == sent["chat"]
            assert page['http_requests_total{method="POST",path="/llm/generate",status="200"}'] == 3000
            assert stats["embedding"] == {"hits": 1000 - sent["texts"], "misses": sent["texts"]}
            assert stats["total"]["requests"] == 4000 and page["cache_hit_rate"] == stats["total"]["hit_rate"]
        assert hits + misses == 3000 and len(set(prompts)) <= sent["chat"] <= 4 * len(set(prompts))


@pytest.mark.redis
@pytest.mark.slow
async def test_counters_never_go_down_when_workers_are_killed(tmp_path, redis_url, upstream):
    with Service(tmp_path, workers=3, CACHE_URL=redis_url, LLM_BASE_URL=upstream.url, LLM_MODEL="m") as service:
        name, last = 'http_requests_total{method="POST",path="/llm/generate",status="200"}', 0
        for round in range(4):
            await ask_all(service, [f"{round} {n}" for n in range(50)])
            with service.client() as client: now = samples(client.get("/metrics").text)[name]
            assert now == last + 50
            last = now
            os.kill(random.Random(round).choice(service.worker_pids()), signal.SIGKILL)
            deadline = time.monotonic() + 30
            while service.log.count("Application startup complete") < 4 + round and time.monotonic() < deadline: await asyncio.sleep(0.1)
        assert len(glob.glob(f"{tempfile.gettempdir()}/aurea-metrics-*/{service.process.pid}-*/*.ledger")) == 3  # who starts takes over the file of who died


@pytest.mark.slow
async def test_four_workers_on_the_embedded_default(tmp_path, upstream):
    with Service(tmp_path, workers=4, CACHE_URL=f"sqlite:///{tmp_path}/cache.db", LLM_BASE_URL=upstream.url, LLM_MODEL="m") as service:
        prompts = zipf([f"q{n}" for n in range(100)], 1000)
        outcomes = await ask_all(service, prompts)
        await asyncio.sleep(1)
        with service.client() as client: stats = client.get("/cache/stats").json()
        assert stats["llm"] == {"hits": 1000 - outcomes.count("miss"), "misses": outcomes.count("miss")} and upstream.calls()["chat"] == outcomes.count("miss")
    with Service(tmp_path, CACHE_URL=f"sqlite:///{tmp_path}/cache.db", LLM_BASE_URL=upstream.url, LLM_MODEL="m") as service:
        before = upstream.calls()["chat"]
        assert set(await ask_all(service, prompts[:100])) == {"hit"} and upstream.calls()["chat"] == before


@pytest.mark.redis
@pytest.mark.slow
async def test_redis_may_die_the_service_may_not(tmp_path, own_redis, upstream):
    with Service(tmp_path, CACHE_URL=own_redis.url, LLM_BASE_URL=upstream.url, LLM_MODEL="m") as service, service.client() as client:
        def timed(prompt):
            began = time.perf_counter()
            reply = client.post("/llm/generate", json={"prompt": prompt})
            assert reply.status_code == 200 and reply.json()["response"] == expected(prompt)
            return reply.headers["x-cache"], time.perf_counter() - began
        assert [timed("p")[0] for _ in range(2)] == ["miss", "hit"]
        for harm, mend in ((own_redis.pause, own_redis.resume), (own_redis.kill, own_redis.restart)):
            harm()
            waits = [timed(f"{harm.__name__} {n}")[1] for n in range(10)]
            assert sum(waits) < 5, waits  # one timeout in all, not one for each call
            ready = client.get("/ready")
            assert ready.status_code == 200 and ready.json()["status"] == "degraded" and samples(client.get("/metrics").text)["cache_store_up"] == 0
            assert client.get("/cache/stats").json()["store"]["up"] is False
            mend()
            until(lambda: client.get("/ready").json()["status"] == "ready")
            timed("q"), timed("q")
            assert timed("q")[0] == "hit"
        assert service.log.count("is in trouble") == 2 and service.log.count("is back") == 2 and "Traceback" not in service.log


@pytest.mark.slow
def test_sigterm_finishes_what_is_in_flight(tmp_path, upstream):
    upstream.slow(1.0)
    with Service(tmp_path, CACHE_URL="memory://", LLM_BASE_URL=upstream.url, LLM_MODEL="m") as service:
        import threading
        got = []
        def ask():
            with service.client() as client: got.append(client.post("/llm/generate", json={"prompt": "p"}).status_code)
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for t in threads: t.start()
        time.sleep(0.5)
        service.stop()
        for t in threads: t.join()
        assert got == [200] * 3 and "Traceback" not in service.log


@pytest.mark.slow
def test_neither_a_function_that_hangs_nor_a_client_that_leaves_troubles_the_server(tmp_path):
    (tmp_path / "mine.py").write_text("import time\ndef ask(prompt): time.sleep(1000)\n")
    with Service(tmp_path, CACHE_URL="memory://", LLM_BACKEND="mine:ask", LLM_TIMEOUT=1) as service, service.client() as client:
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", service.port)) as leaving: leaving.sendall(b'POST /llm/generate HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n{"pro')
        assert client.post("/llm/generate", json={"prompt": "p"}).status_code == 504
        until(lambda: samples(client.get("/metrics").text).get('http_requests_total{method="POST",path="/llm/generate",status="499"}') == 3, "three who left")
        client.close()
        began = time.monotonic()
        service.stop()
        assert time.monotonic() - began < 15 and "Traceback" not in service.log and "ERROR" not in service.log


@pytest.mark.slow
def test_the_default_needs_no_server_and_says_what_it_chose(tmp_path):
    with Service(tmp_path, CACHE_LLM_TTL=1) as service, service.client() as client:  # a Redis of the developer keeps nothing of it
        reply = client.post("/llm/generate", params={"prompt": "hello"})
        assert reply.json()["backend"] == "demo" and "demo" in reply.json()["response"]
        ready = client.get("/ready").json()
        assert ready["store"]["name"] in ("sqlite", "redis") and ready["store"]["chosen"] and ready["notes"]
        assert service.log.count("prompts go to") == 1 and "LLM_BASE_URL" in service.log and "API_KEY is not set" in service.log


@pytest.mark.slow
def test_the_command_serve_says_when_the_port_is_taken(tmp_path):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen(1)
        run = subprocess.run([sys.executable, "-m", "aurea_orchestrator", "serve", "--host", "127.0.0.1", "--port", str(busy.getsockname()[1])], capture_output=True, text=True, timeout=60, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert run.returncode == 1 and re.search(r"port \d+ is taken", run.stderr) and "Traceback" not in run.stderr


@pytest.mark.parametrize("settings, says", [({"CACHE_LLM_TTL": "-1"}, "CACHE_LLM_TTL"), ({"CACHE_URL": "mysql://h"}, "mysql"), ({"LLM_BACKEND": "nowhere:f"}, "nowhere"), ({"REDIS_PORT": "x"}, "REDIS_PORT")])
@pytest.mark.slow
def test_settings_that_cannot_work_end_the_start_with_their_name(tmp_path, settings, says):
    run = subprocess.run([sys.executable, "-m", "uvicorn", "aurea_orchestrator.main:app", "--port", "0"], capture_output=True, text=True, timeout=60, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), **settings})  # fmt: skip
    assert run.returncode != 0 and says in run.stderr and "Application startup failed" in run.stderr
