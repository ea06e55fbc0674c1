"""What may go wrong between the beginning of a computation and its end: nobody waits for ever, no lease stays behind, nothing old comes after something new."""
from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import time
import traceback
import weakref

import pytest

from aurea_orchestrator import Cache, cache_embedding, cache_llm_response, cached
from aurea_orchestrator import flight as flights
from aurea_orchestrator.effects import Block, Both, adrive, drive
from aurea_orchestrator.flight import Stopped
from aurea_orchestrator.stores.base import Item
from aurea_orchestrator.stores.memory import MemoryStore
from aurea_orchestrator.stores.sqlite import SqliteStore
from tests.servers import until


@pytest.fixture(params=["memory", "sqlite"])
def cache(request, tmp_path):
    made = Cache.from_url("memory://" if request.param == "memory" else f"sqlite:///{tmp_path}/c.db", timeout=5)
    yield made
    made.close()


@pytest.fixture
def two(tmp_path):
    "As two processes have it: a file that is shared, and nothing else."
    both = [Cache.from_url(f"sqlite:///{tmp_path}/c.db?memory=0", timeout=5) for _ in range(2)]
    yield both
    for one in both: one.close()


def in_thread(call):
    got = []
    thread = threading.Thread(target=lambda: got.append(call()))
    thread.start()
    return thread, got


# ---- something newer --------------------------------------------------------------------------------------------------

RENEWALS = {"refresh": lambda ask: ask.refresh("p"), "bypass": lambda ask: ask("p", bypass_cache=True)}
REMOVALS = {"invalidate": lambda ask: ask.invalidate("p"), "cache_clear": lambda ask: ask.cache_clear(), "clear": lambda ask: ask.cache.clear(),
            "clear kind": lambda ask: ask.cache.clear("llm")}


def old_one(cache):
    "A function that says what the world is, slowly while that is old; and a call that began so."
    world, began, go, calls = ["old"], threading.Event(), threading.Event(), []
    @cache_llm_response(cache=cache)
    def ask(prompt):
        seen = world[0]
        calls.append(seen)
        if seen == "old": began.set(); assert go.wait(20)
        return seen
    first = in_thread(lambda: ask("p"))
    assert began.wait(20)
    joined = in_thread(lambda: ask("p"))
    until(lambda: len(cache.flight) == 1 and next(iter(cache.flight._running.values())).waiting)
    world[0] = "new"
    return ask, go, calls, [first, joined]


@pytest.mark.parametrize("way", RENEWALS)
def test_what_was_renewed_is_not_undone_by_an_older_computation(cache, way):
    ask, go, calls, olds = old_one(cache)
    assert RENEWALS[way](ask) == ask("p") == "new"
    go.set()
    for thread, got in olds: thread.join(20); assert got == ["old"]                # who asked before is served
    assert ask("p") == "new" and calls == ["old", "new"] and len(cache.flight) == 0 and not cache.leases.held


@pytest.mark.parametrize("way", REMOVALS)
def test_what_was_removed_does_not_come_back_with_an_older_computation(cache, way):
    ask, go, calls, olds = old_one(cache)
    REMOVALS[way](ask)
    go.set()
    for thread, got in olds: thread.join(20); assert got == ["old"]
    assert ask("p") == "new" and calls == ["old", "new"] and len(cache.flight) == 0 and not cache.leases.held


async def test_awaited_and_of_a_batch_only_what_was_renewed(cache):
    world, began, go = ["old"], asyncio.Event(), asyncio.Event()
    @cache_embedding(cache=cache)
    async def embed(texts):
        value = float(world[0] == "new")
        if not value: began.set(); await go.wait()
        return [[value] for _ in texts]
    old = asyncio.create_task(embed(["a", "b"]))
    await began.wait()
    world[0] = "new"
    assert await embed.refresh(["a"]) == [[1.0]]
    go.set()
    assert await old == [[0.0], [0.0]] and await embed(["a", "b"]) == [[1.0], [0.0]]


def test_a_removal_waits_for_a_write_that_has_begun():
    class Slow(MemoryStore):
        instant, began, go = False, threading.Event(), threading.Event()
        def settle(self, items, keys, token):
            self.began.set()
            yield Block(lambda: self.go.wait(20))
            yield from super().settle(items, keys, token)
    store = Slow()
    @cache_llm_response(cache=Cache(store))
    def ask(prompt): return prompt
    asking = in_thread(lambda: ask("p"))
    assert store.began.wait(20)                                                    # within its grace: nobody was answered yet
    removing = in_thread(lambda: ask.invalidate("p"))
    time.sleep(0.02)
    store.go.set()
    for thread, _ in (asking, removing): thread.join(20)
    assert asking[1] == ["p"] and removing[1] == [1] and drive(store.get_many([ask.key("p")])) == [None]


def test_a_close_waits_for_a_write_that_has_begun():
    order = []
    class Slow(MemoryStore):
        instant = False
        def settle(self, items, keys, token):
            yield Block(lambda: time.sleep(3 * flights.GRACE))
            yield from super().settle(items, keys, token)
            order.append("stored")
        def shut(self):
            order.append("shut")
            return (yield from super().shut())
    cache = Cache(Slow())
    cache_llm_response(cache=cache)(lambda prompt: prompt)("p")
    cache.close()
    assert order == ["stored", "shut"]


# ---- who computes, stops ----------------------------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("finish", [False, True])
def test_a_loop_that_was_closed_under_its_computation_holds_nobody_up(monkeypatch, finish):
    monkeypatch.setattr(flights, "STRANDED", 0.1)
    cache = Cache.from_url("memory://", finish=finish)
    calls = []
    @cached("work", cache=cache)
    async def work(x):
        calls.append(x)
        if len(calls) == 1: await asyncio.sleep(60)
        return x
    loop = asyncio.new_event_loop()
    task = loop.create_task(work(1))
    loop.run_until_complete(asyncio.sleep(0.05))
    joined = in_thread(lambda: asyncio.run(asyncio.wait_for(work(1), 20)))          # before it is closed
    until(lambda: next(iter(cache.flight._running.values())).waiting == 2)
    loop.close()                                                                    # and nothing was cancelled
    joined[0].join(20)
    assert joined[1] == [1] and asyncio.run(asyncio.wait_for(work(1), 20)) == 1 and calls == [1, 1]
    del task, loop
    gc.collect()


@pytest.fixture
def no_room(monkeypatch):
    "The next thread of a name cannot be started."
    real, names = threading.Thread.start, []
    def start(thread):
        if names and thread.name.startswith(names[0]): names.clear(); raise RuntimeError("can't start new thread")
        return real(thread)
    monkeypatch.setattr(threading.Thread, "start", start)
    return names


def test_without_room_for_a_thread_an_old_answer_stays_and_nothing_hangs(no_room):
    calls = []
    @cached("work", cache=Cache.from_url("memory://"), ttl=0.05, stale=60)
    def work(x): calls.append(x); return len(calls)
    work(1); time.sleep(0.06)
    no_room.append("aurea-refresh")
    assert work(1) == 1 and not no_room and len(work.cache.flight) == 0
    assert work(1) == 1
    until(lambda: work(1) == 2)                                                     # and the next one had room


def test_without_room_for_a_thread_a_lease_is_had_and_the_next_one_is_renewed(no_room, two):
    @cached("work", cache=two[0])
    def work(x): return x
    no_room.append("aurea-leases")
    assert work(1) == 1 and not no_room and work(2) == 2 and not two[0].leases.held
    assert any(thread.name == "aurea-leases" for thread in threading.enumerate())


def test_a_refresh_beside_sees_the_context_of_its_caller():
    user = contextvars.ContextVar("user")
    @cached("work", cache=Cache.from_url("memory://"), ttl=0.05, stale=60)
    def work(x): return f"{user.get()} {time.monotonic()}"
    token = user.set("me")
    first = work(1); time.sleep(0.06)
    work(1)
    until(lambda: work(1) != first, seconds=5)
    user.reset(token)


def test_an_interrupted_reader_of_a_stream_interrupts_nobody_else():
    pulling, go, n = threading.Event(), threading.Event(), []
    @cache_llm_response(cache=Cache.from_url("memory://"))
    def ask(prompt):
        n.append(1)
        yield "a"
        pulling.set(); assert go.wait(20)
        raise KeyboardInterrupt
    def take(stream):
        try: return list(stream)
        except BaseException as error: return type(error)
    stream = ask("p")
    assert next(stream) == "a"
    first = in_thread(lambda: take(stream))
    assert pulling.wait(20)
    other = in_thread(lambda: take(ask("p")))
    until(lambda: next(iter(ask.cache.streams._running.values())).readers == 2)
    go.set()
    for thread, _ in (first, other): thread.join(20)
    assert first[1] == [KeyboardInterrupt] and other[1] == [Stopped] and len(n) == 1


async def test_an_error_does_not_grow_with_those_who_share_it():
    @cached("work", cache=Cache.from_url("memory://"))
    async def work(x): await asyncio.sleep(0.01); raise ValueError("upstream said no")
    async def frames(n):
        errors = await asyncio.gather(*[work(n) for _ in range(n)], return_exceptions=True)
        return max(len(traceback.extract_tb(error.__traceback__)) for error in errors)
    assert await frames(300) <= await frames(2) + 2


# ---- no lease stays behind --------------------------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_stream_whose_end_fails_gives_its_lease_back(two):
    def make(cache, broken):
        async def stream(prompt):
            try:
                for piece in "abc": yield piece; await asyncio.sleep(0)
            finally:
                if broken(): raise ConnectionError("closing failed")
        return cache_llm_response(cache=cache, namespace="n", version="1")(stream)
    fails = [True]
    reader = make(two[0], lambda: fails[0])("p")
    assert await anext(reader) == "a"
    await reader.aclose()
    fails[0] = False
    until(lambda: not two[0].leases.held)
    async with asyncio.timeout(3): assert [piece async for piece in make(two[1], lambda: False)("p")] == ["a", "b", "c"]


async def test_a_batch_that_all_have_left_while_it_asked_again_gives_its_leases_back(tmp_path):
    class Slow(SqliteStore):
        def acquire(self, keys, token, ttl, force=False):
            if force: yield Both(lambda: None, lambda: asyncio.sleep(30))
            return (yield from super().acquire(keys, token, ttl, force))
    one, other = Cache(Slow(f"{tmp_path}/c.db", timeout=5)), Cache(SqliteStore(f"{tmp_path}/c.db", timeout=5))
    def make(cache):
        async def embed(texts): return [[1.0] for _ in texts]
        return cache_embedding(cache=cache, namespace="n")(embed)
    embed = make(one)
    await adrive(one.store.put_many([Item(embed.key(["a", "b"])[1], b"damaged", 60)]))
    with pytest.raises(TimeoutError): await asyncio.wait_for(embed(["a", "b"]), 0.3)
    while one.leases.held: await asyncio.sleep(0.01)
    async with asyncio.timeout(3): assert await make(other)(["a"]) == [[1.0]]
    for cache in (one, other): await cache.aclose()


def test_a_write_that_fails_unexpectedly_is_logged_and_keeps_no_lease(two, caplog):
    made = []
    def make(cache):
        def work(x): made.append(x); return x
        return cached("work", cache=cache, namespace="n", version="1")(work)
    work, settle = make(two[0]), type(two[0].store).settle
    def broken(self, items, keys, token):
        if items: raise RuntimeError("a defect of ours")
        return (yield from settle(self, items, keys, token))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(two[0].store), "settle", broken)
        assert work(1) == 1 and len(two[0].flight) == 0 and not two[0].leases.held
    assert "could not be stored" in caplog.text
    began = time.monotonic()
    assert make(two[1])(1) == 1 and made == [1, 1] and time.monotonic() - began < two[0].leases.ttl + 4


@pytest.mark.parametrize("way", ["refresh", "invalidate", "clear"])
@pytest.mark.parametrize("awaited", [False, True])
async def test_a_stream_that_was_renewed_or_removed_while_it_ran_is_not_stored(cache, way, awaited):
    world = ["old"]
    if awaited:
        @cache_llm_response(cache=cache)
        async def say(prompt): yield world[0]; yield world[0]
        async def rest(stream): return [piece async for piece in stream]
        first = lambda stream: anext(stream)
        renew = {"refresh": lambda: rest(say("p", bypass_cache=True)), "invalidate": lambda: say.invalidate("p"), "clear": cache.aclear}[way]
    else:
        @cache_llm_response(cache=cache)
        def say(prompt): yield world[0]; yield world[0]
        async def rest(stream): return await asyncio.to_thread(list, stream)
        first = lambda stream: asyncio.to_thread(next, stream)
        renew = {"refresh": lambda: rest(say("p", bypass_cache=True)), "invalidate": lambda: asyncio.to_thread(say.invalidate, "p"), "clear": cache.aclear}[way]
    stream = say("p")
    assert await first(stream) == "old"
    world[0] = "new"
    await renew()
    assert await rest(stream) == ["new"]                                            # a generator that looks at the world each time
    entry = drive(cache.store.get_many([say.key("p")]))
    assert (entry == [None]) is (way != "refresh") and await rest(say("p")) == ["new", "new"]


def test_leases_that_wait_for_nobody_keep_no_cache_alive(tmp_path):
    cache = Cache.from_url(f"sqlite:///{tmp_path}/c.db")
    ears, there = cache.store.ears(), weakref.ref(cache.leases)
    cache.leases.forget(["k"], cache.leases.expect(["k"]))
    cache.close()
    del cache
    gc.collect()
    assert ears is not None and there() is None


@pytest.mark.parametrize("way", ["refresh", "mode", "invalidate"])
@pytest.mark.parametrize("kind", ["sqlite", pytest.param("redis", marks=pytest.mark.redis)])
def test_what_another_process_renewed_or_removed_is_not_undone(request, tmp_path, kind, way):
    url = request.getfixturevalue("redis_url") if kind == "redis" else f"sqlite:///{tmp_path}/c.db"
    one, other = (Cache.from_url(url, timeout=5) for _ in range(2))
    world, began, go = ["old"], threading.Event(), threading.Event()
    def make(cache):
        def ask(prompt):
            seen = world[0]
            if seen == "old": began.set(); assert go.wait(20)
            return seen
        return cache_llm_response(cache=cache, namespace="n", version="1")(ask)
    first = in_thread(lambda: make(one)("p"))
    assert began.wait(20)
    world[0] = "new"
    ask = make(other)
    waits = in_thread(lambda: ask("p"))                                             # for the lease of the first
    time.sleep(0.2)
    if way == "mode":
        with other.mode("refresh"): assert ask("p") == "new"
    else: assert (ask.refresh("p") if way == "refresh" else ask.invalidate("p")) in ("new", 0)
    waits[0].join(5)
    assert waits[1] == ["new"], "who waited was not told"
    go.set(); first[0].join(20)
    assert first[1] == ["old"]
    until(lambda: not one.leases.held and not one.leases.owed)
    assert ask("p") == make(one)("p") == "new"
    for cache in (one, other): cache.close()
