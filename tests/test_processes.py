"""Processes, loops and their ends: what a cache meets outside of one tidy event loop."""
from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
import time

import httpx2
import pytest

from aurea_orchestrator import Cache, cache_llm_response
from aurea_orchestrator.effects import adrive
from tests.service import ROOT, Service
from tests.upstream import Upstream, expected


@pytest.fixture(params=[pytest.param("redis", marks=pytest.mark.redis), "sqlite"])
def url(request, tmp_path):
    return f"sqlite:///{tmp_path}/c.db" if request.param == "sqlite" else request.getfixturevalue("redis_url")


def run(script, *args):
    done = subprocess.run([sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(script), *args], capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and "Error" not in done.stderr and "Warning" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_script_that_ends_right_after_its_call_has_stored_and_counted(url):
    script = """
        import asyncio, sys
        from aurea_orchestrator import Cache, cached
        cache = Cache.from_url(sys.argv[1])
        @cached("work", cache=cache, namespace="n")
        async def work(x): print("computed"); return x
        @cached("work", cache=cache, namespace="n")
        def plain(x): print("computed"); return x
        asyncio.run(work(1)); plain(2)
    """
    assert run(script, url) == "computed\ncomputed\n" and run(script, url) == ""
    with_cache = Cache.from_url(url)
    assert with_cache.stats()["work"] == {"hits": 2, "misses": 2}
    with_cache.close()


@pytest.mark.slow
def test_fork_after_use(url):
    script = """
        import os, sys
        from aurea_orchestrator import Cache, cached
        cache = Cache.from_url(sys.argv[1])
        @cached("work", cache=cache)
        def work(x): return x * 2
        work(1)
        children = []
        for n in range(4):
            if (pid := os.fork()) == 0:
                assert [work(1), work(n + 10), work(n + 10)] == [2, 2 * n + 20, 2 * n + 20]
                assert work.cache_info().misses >= 1
                cache.close()
                os._exit(0)
            children.append(pid)
        assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
        assert work(1) == 2 and cache.stats()["work"] == {"hits": 9, "misses": 5}, cache.stats()
        cache.close()
    """
    run(script, url)


@pytest.mark.slow
def test_uvloop(url):
    pytest.importorskip("uvloop")
    script = """
        import asyncio, sys, uvloop
        from aurea_orchestrator import Cache, cached
        cache, calls = Cache.from_url(sys.argv[1]), []
        @cached("work", cache=cache)
        async def work(x): calls.append(x); await asyncio.sleep(0.05); return x
        async def main():
            assert type(asyncio.get_running_loop()).__module__.startswith("uvloop")
            assert await asyncio.gather(*[work(n % 5) for n in range(100)]) == [n % 5 for n in range(100)]
            await cache.aclose()
        for _ in range(2): uvloop.run(main())
        assert sorted(calls) == [0, 1, 2, 3, 4]
    """
    run(script, url)


@pytest.mark.slow
async def test_sigterm_under_load_finishes_stores_and_counts_what_is_in_flight(tmp_path, url):
    with Upstream(delay=0.5) as upstream, Service(tmp_path / "service", workers=2, CACHE_URL=url, LLM_BASE_URL=upstream.url, LLM_MODEL="m") as service:
        sent, answered, over = {}, set(), False

        async def customer(client, name):
            while not over:
                prompt = f"{name} {len(sent)}"
                sent[prompt] = time.monotonic()
                try: reply = await client.post("/llm/generate", json={"prompt": prompt})
                except httpx2.TransportError: return  # the door is shut
                assert reply.status_code == 200 and reply.json()["response"] == expected(prompt), reply.text
                answered.add(prompt)

        async with service.aclient() as client:
            customers = [asyncio.create_task(customer(client, n)) for n in range(32)]
            while len(answered) < 40: await asyncio.sleep(0.05)
            await asyncio.sleep(0.25)
            asked, done = time.monotonic(), len(answered)
            code = await asyncio.to_thread(service.stop)
            over = True
            await asyncio.gather(*customers)
        in_flight = [prompt for prompt, at in sent.items() if at < asked - 0.1]  # later ones may have met a closing door
        assert code in (0, -15) and len(in_flight) > done + 8 and set(in_flight) <= answered
        assert "Traceback" not in service.log and service.log.count("Finished server process") == 2
        cache = Cache.from_url(url)
        stats, found, cursor = await cache.astats(), [], None
        while True:
            page = await adrive(cache.store.scan("llm:", cursor))
            found += page.keys
            if (cursor := page.cursor) is None: break
        assert stats["llm"]["misses"] == upstream.calls()["chat"] == len(set(found)) >= len(answered)
        await cache.aclose()


def test_loops_in_threads_at_once(url):
    cache, calls = Cache.from_url(url), []
    @cache_llm_response(cache=cache)
    async def ask(prompt): calls.append(prompt); await asyncio.sleep(0.05); return prompt.upper()
    async def main(): return await asyncio.gather(*[ask(f"p{n % 7}") for n in range(50)])
    got = []
    threads = [threading.Thread(target=lambda: got.append(asyncio.run(main()))) for _ in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert got == [[f"P{n % 7}" for n in range(50)]] * 6 and sorted(calls) == [f"p{n}" for n in range(7)]
    cache.close()
