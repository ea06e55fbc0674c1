"""Answers are written behind their callers: nobody waits for a slow store, nobody computes twice because of it, nothing is lost."""
from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time

import pytest

from aurea_orchestrator import Cache, cache_llm_response
from aurea_orchestrator.effects import Block, drive
from aurea_orchestrator.stores.memory import MemoryStore
from tests.service import ROOT


class Slow(MemoryStore):
    "A store whose writes wait for a gate."

    instant = False

    def __init__(self):
        super().__init__()
        self.gate, self.began = threading.Event(), threading.Event()

    def settle(self, items, keys, token):
        self.began.set()
        yield Block(lambda: self.gate.wait(20))
        yield from super().settle(items, keys, token)


@pytest.fixture
def slow(): return Slow()


def asker(cache, **options):
    calls = []
    @cache_llm_response(cache=cache, **options)
    def ask(prompt): calls.append(prompt); return prompt.upper()
    return ask, calls


@pytest.mark.timed
def test_a_slow_write_delays_nobody_and_is_no_second_computation(slow):
    ask, calls = asker(Cache(slow))
    began = time.monotonic()
    answers = [ask("p") for _ in range(3)]                       # While nothing can be written
    assert time.monotonic() - began < 1
    assert answers == ["P"] * 3 and calls == ["p"] and drive(slow.get_many([ask.key("p")])) == [None]
    assert ask.cache_info().outcomes == {"miss": 1, "hit": 2}
    slow.gate.set()
    ask.invalidate("other")
    while drive(slow.get_many([ask.key("p")])) == [None]: time.sleep(0.001)
    assert ask("p") == "P" and calls == ["p"] and len(ask.cache.flight) == 0


@pytest.mark.timed
async def test_awaited_too(slow):
    calls = []
    @cache_llm_response(cache=Cache(slow))
    async def ask(prompt): calls.append(prompt); return [prompt]
    began = time.monotonic()
    first, again = await ask("p"), await ask("p")
    assert time.monotonic() - began < 1
    assert first == again == ["p"] and first is not again and calls == ["p"]   # Each has its own
    threading.Timer(0.1, slow.gate.set).start()
    assert await ask.invalidate("p") == 1                                      # It waited for what was being written
    assert await ask("p") == ["p"] and calls == ["p", "p"]


def test_what_is_not_kept_is_for_those_who_waited_alone(slow):
    ask, calls = asker(Cache(slow), keep=lambda answer: False)
    slow.gate.set()
    assert ask("p") == ask("p") == "P" and calls == ["p", "p"]


def test_a_clear_comes_after_what_was_answered_before(slow):
    ask, calls = asker(cache := Cache(slow))
    assert ask("p") == "P"
    threading.Timer(0.1, slow.gate.set).start()
    assert cache.clear() == 1 and ask("p") == "P" and calls == ["p", "p"]


def test_a_new_answer_is_not_overtaken_by_the_old_one(slow):
    numbers = iter(range(9))
    @cache_llm_response(cache=Cache(slow))
    def ask(prompt): return next(numbers)
    assert ask("p") == 0
    threading.Timer(0.1, slow.gate.set).start()
    assert ask.refresh("p") == 1
    while len(ask.cache.flight): time.sleep(0.001)
    assert ask("p") == 1


def test_a_failed_write_ends_it_too():
    class Broken(Slow):
        def settle(self, items, keys, token):
            from aurea_orchestrator.errors import StoreError
            raise StoreError("broken")
            yield
    ask, calls = asker(Cache(Broken()))
    assert ask("p") == "P"
    while len(ask.cache.flight): time.sleep(0.001)
    assert ask("p") == "P" and calls == ["p", "p"]


@pytest.mark.slow
@pytest.mark.parametrize("awaits", [False, True])
def test_an_interpreter_that_ends_in_mid_write_finishes_it(tmp_path, awaits):
    script = """
        import asyncio, sys, time
        from aurea_orchestrator import Cache, cached
        from aurea_orchestrator.effects import Block
        from aurea_orchestrator.stores.sqlite import SqliteStore
        class Slow(SqliteStore):
            def settle(self, items, keys, token):
                yield Block(lambda: time.sleep(0.5))
                yield from super().settle(items, keys, token)
        cache = Cache(Slow(sys.argv[1], timeout=10))
        @cached("work", cache=cache, namespace="n")
        def plain(x): print("computed", flush=True); return x
        @cached("work", cache=cache, namespace="n")
        async def awaiting(x): print("computed", flush=True); return x
        asyncio.run(awaiting(1)) if sys.argv[2] == "True" else plain(1)
    """
    def run(): return subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(script), str(tmp_path / "c.db"), str(awaits)], capture_output=True, text=True, timeout=60, cwd=ROOT)
    first, second = run(), run()
    assert (first.stdout, second.stdout) == ("computed\n", "") and not first.stderr + second.stderr, first.stderr + second.stderr
