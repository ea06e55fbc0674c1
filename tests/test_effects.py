"""Effects: what an async caller waits for in a worker thread, and for whom it need not wait."""
from __future__ import annotations

import asyncio
import contextvars
import os
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from aurea_orchestrator import Cache, cached
from aurea_orchestrator.effects import Block, adrive
from tests.service import ROOT


def flow(call): return (yield Block(call))


@pytest.fixture
async def busy():
    "A loop whose own worker threads are all taken, as by the downloads of its program."
    gate = threading.Event()
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
    waiting = [asyncio.create_task(asyncio.to_thread(gate.wait, 30)) for _ in range(4)]
    yield
    gate.set()
    await asyncio.gather(*waiting)


async def test_no_cache_waits_for_the_threads_of_its_program(busy, tmp_path):
    cache = Cache.from_url(f"sqlite:///{tmp_path}/c.db")
    @cached("work", cache=cache, namespace="n")
    async def work(x): return [x]
    async def all_of_it():
        assert await work(1) == await work(1) == [1]
        assert (await cache.astats())["work"] == {"hits": 1, "misses": 1}
        assert await work.invalidate(1) == 1 and await cache.aclear() == 0
        await cache.aclose()
    await asyncio.wait_for(all_of_it(), 10)


async def test_a_block_knows_its_task_and_runs_beside_the_loop():
    who = contextvars.ContextVar("who")
    who.set("me")
    assert await adrive(flow(who.get)) == "me"
    assert await adrive(flow(threading.get_ident)) != threading.get_ident()
    with pytest.raises(ZeroDivisionError): await adrive(flow(lambda: 1 / 0))


def test_loops_share_their_threads_and_threads_are_few():
    async def many(): return await asyncio.gather(*(adrive(flow(lambda: time.sleep(0.001) or threading.get_ident())) for _ in range(200)))
    found = {ident for _ in range(3) for ident in asyncio.run(many())}
    assert 1 <= len(found) <= 32


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_threads_of_its_own_and_the_end_of_the_interpreter_finds_none():
    script = """
        import asyncio, atexit, os
        from aurea_orchestrator.effects import Block, adrive
        def flow(call): return (yield Block(call))
        def run(call): return asyncio.run(asyncio.wait_for(adrive(flow(call)), 10))
        run(os.getpid)
        if (child := os.fork()) == 0:
            print("child", run(os.getpid) == os.getpid(), flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        atexit.register(lambda: print("at the end", run(os.getpid) == os.getpid(), flush=True))
    """
    done = subprocess.run([sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(script)],
                          capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "child True\nat the end True\n", "")
