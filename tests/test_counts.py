"""Counts are exact: whoever counts while they are delivered, whatever happens to the store, however soon the cache is gone."""
from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from aurea_orchestrator import Cache, cached, counts
from aurea_orchestrator.counts import Counts, stats
from aurea_orchestrator.effects import drive
from aurea_orchestrator.errors import StoreError
from aurea_orchestrator.events import Cost
from aurea_orchestrator.stores.memory import MemoryStore
from tests.service import ROOT

ONE = Cost(1.0, 10, 5, 0.1)


class Shelf(MemoryStore):
    "A store that can be away, and says how often it was asked."

    def __init__(self):
        super().__init__()
        self.away, self.asked = False, 0

    def bump(self, named):
        self.asked += 1
        if self.away: raise StoreError("away")
        yield from super().bump(named)


def until(what, seconds=20.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


def told(shelf): return drive(shelf.counts())


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(counts, "DELIVERY", 0.02)
    monkeypatch.setattr(counts, "AGAIN", 0.1)


def test_a_cache_that_is_gone_at_once_has_counted():
    shelf = MemoryStore()
    def job():
        @cached("work", cache=Cache(shelf), namespace="n")
        def work(x): return x
        return [work(1), work(2), work(1)]
    job(), gc.collect()
    until(lambda: (told(shelf).get("work:miss"), told(shelf).get("work:hit")) == (2, 1))


def test_what_was_counted_between_two_takes_arrives_with_the_next():
    mine = Counts(shelf := MemoryStore())
    mine.add("llm", "miss", name="f", cost=ONE)
    drive(mine.deliver())
    mine.tally.add("llm", "miss", 1, ONE)             # A thread counts: in the total ...
    drive(mine.deliver())
    mine.functions["f"].add("llm", "miss", 1, ONE)    # ... and now for the function
    drive(mine.deliver())
    assert told(shelf)["llm:miss"] == told(shelf)["@calls:llm:miss:f"] == 2


def test_no_function_shows_more_than_the_total():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(10):
            mine, seen, over = Counts(shelf := MemoryStore()), [], threading.Event()
            def count(mine=mine):
                for _ in range(20): mine.add("llm", "miss", name="f", cost=ONE)
            def deliver(mine=mine, shelf=shelf, seen=seen, over=over):
                while not over.is_set():
                    drive(mine.deliver())
                    now = told(shelf)
                    seen.append((now.get("llm:miss", 0), now.get("@calls:llm:miss:f", 0)))
            deliverer, counters = threading.Thread(target=deliver), [threading.Thread(target=count) for _ in range(4)]
            for one in (deliverer, *counters): one.start()
            for one in counters: one.join()
            over.set(), deliverer.join()
            said = drive(stats(mine))
            assert said["total"]["misses"] == said["functions"]["f"]["misses"] == 80
            assert all(function <= total for total, function in seen)
    finally:
        sys.setswitchinterval(before)


def test_hits_that_somebody_else_folds_are_promised_too(soon):
    cache = Cache(shelf := Shelf())
    @cached("work", cache=cache, namespace="n")
    def work(x): return x
    work(1)
    until(lambda: told(shelf).get("work:miss") == 1)
    mine = cache.counts
    work(1)
    with mine._taking: until(lambda: not mine._called)   # The thread that delivers has folded, and takes in a moment
    until(lambda: told(shelf).get("work:hit") == 1)
    mine._called = True                                  # A hit that was noted before ...
    work(1)
    mine._called = False                                 # ... somebody has come to deliver ...
    mine.fold()                                          # ... and a third one folds it
    until(lambda: told(shelf).get("work:hit") == 2)


def test_a_delivery_that_failed_is_tried_again_without_a_call_and_without_haste(soon):
    mine = Counts(shelf := Shelf())
    shelf.away = True
    mine.add("llm", "hit", 2, name="f")
    until(lambda: shelf.asked >= 3)
    began, before = time.monotonic(), shelf.asked
    time.sleep(0.5)
    assert shelf.asked - before <= (time.monotonic() - began) / counts.AGAIN + 1
    shelf.away = False
    until(lambda: told(shelf) == {"llm:hit": 2, "@calls:llm:hit:f": 2})
    asked = shelf.asked
    time.sleep(0.3)
    assert shelf.asked == asked and not mine._called   # And then it is over


def test_who_asks_in_vain_leaves_a_promise(soon):
    mine = Counts(shelf := Shelf())
    mine.add("llm", "hit")
    until(lambda: not mine._called)
    shelf.away = True
    mine.tally.add("llm", "hit")   # Counted, and its promise kept by a delivery that failed
    assert not drive(stats(mine))["store"]["up"]
    shelf.away = False
    until(lambda: told(shelf).get("llm:hit") == 2)


def test_nobody_tries_for_ever_for_a_cache_that_is_gone(soon):
    mine = Counts(shelf := Shelf())
    shelf.away = True
    mine.add("llm", "hit")
    until(lambda: shelf.asked >= 2)
    del mine
    gc.collect()
    time.sleep(0.3)
    asked = shelf.asked
    time.sleep(0.3)
    assert shelf.asked == asked


def test_a_process_that_can_start_no_thread_promises_when_it_can(soon, monkeypatch):
    mine = Counts(shelf := Shelf())
    def refuse(self): raise RuntimeError("can't start new thread")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Timer, "start", refuse)
        mine.add("llm", "hit")
    mine.add("llm", "hit")
    until(lambda: told(shelf) == {"llm:hit": 2, "@calls:llm:hit:": 2})


@pytest.mark.slow
def test_no_process_is_kept_alive_by_a_store_that_is_away():
    script = """
        import time
        from aurea_orchestrator.counts import Counts
        from aurea_orchestrator.errors import StoreError
        from aurea_orchestrator.stores.memory import MemoryStore
        class Away(MemoryStore):
            def bump(self, counts): raise StoreError("away")
        mine = Counts(Away())
        mine.add("llm", "hit")
        time.sleep(0.8)
        print("over", flush=True)
    """
    done = subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=30, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "over\n", "")
