"""Streams over several processes: joined while they run, left, broken, killed. Two caches over one store are two processes; where one must die, it is one."""
from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
import threading
import time

import pytest

from aurea_orchestrator import Cache, cache_llm_response
from aurea_orchestrator.errors import StreamLostError
from tests.servers import until
from tests.service import ROOT

REDIS = pytest.param("redis", marks=pytest.mark.redis)


@pytest.fixture(params=[REDIS, "sqlite"])
def url(request, tmp_path):
    return f"sqlite:///{tmp_path}/c.db" if request.param == "sqlite" else request.getfixturevalue("redis_url")


@pytest.fixture
def two(url):
    caches = [Cache.from_url(url, timeout=10) for _ in range(2)]
    for cache in caches: # The ears are open, as they are after the first calls of a process
        cached("warm", cache)()
        cache.leases.expect([])
    until(lambda: all(cache.leases.hearing() for cache in caches))
    yield caches
    for cache in caches: cache.close()


def cached(name, cache, **options):
    @cache_llm_response(cache=cache, namespace="streams", **options)
    def ask(): return name
    return ask


class Source:
    "A stream that says what it is given, and stops before some of its items until it may go on."

    def __init__(self, items, pauses=(), error=None):
        self.items, self.gates, self.error = items, {at: threading.Event() for at in pauses}, error
        self.said, self.begun = [], 0

    def blocking(self, cache, **options):
        @cache_llm_response(cache=cache, namespace="streams", **options)
        def stream(prompt):
            self.begun += 1
            for at, item in enumerate(self.items):
                if at in self.gates: assert self.gates[at].wait(30)
                self.said.append(item)
                yield item
            if len(self.items) in self.gates: assert self.gates[len(self.items)].wait(30)
            if self.error: raise self.error
            return {"usage": len(self.items)}
        return stream

    def awaiting(self, cache, **options):
        @cache_llm_response(cache=cache, namespace="streams", **options)
        async def stream(prompt):
            self.begun += 1
            for at, item in enumerate(self.items):
                while at in self.gates and not self.gates[at].is_set(): await asyncio.sleep(0.002)
                self.said.append(item)
                yield item
            while len(self.items) in self.gates and not self.gates[len(self.items)].is_set(): await asyncio.sleep(0.002)
            if self.error: raise self.error
        return stream


def whole(stream, into):
    "All items, and what was returned."
    try:
        while True: into.append(next(stream))
    except StopIteration as end: into.append(("returned", end.value))
    except Exception as error: into.append(error)


class Reader(threading.Thread):
    "Reads a stream beside, and notes when each item came."

    def __init__(self, stream):
        super().__init__(daemon=True)
        self.stream, self.got = stream, []
        self.start()

    def run(self): whole(self.stream, self.got)

    def done(self):
        self.join(30)
        assert not self.is_alive()
        return self.got


PIECES = ["one", "", {"delta": "two"}, None, "drei"]
END = ("returned", {"usage": 5})


def test_a_joiner_hears_what_was_said_and_then_each_item_as_it_comes(two):
    source = Source(PIECES, pauses=(2, 4))
    first = Reader(source.blocking(two[0])("p"))
    until(lambda: len(first.got) == 2)
    second = Reader(source.blocking(two[1])("p"))
    until(lambda: second.got == PIECES[:2])                 # While the leader still waits for its third
    assert source.said == PIECES[:2]
    source.gates[2].set()
    until(lambda: second.got == PIECES[:4] and first.got == PIECES[:4])
    source.gates[4].set()
    assert first.done() == second.done() == [*PIECES, END] and source.begun == 1
    later = Reader(source.blocking(two[1])("p")).done()
    assert later == [*PIECES, END] and source.begun == 1    # Stored
    outcomes = [cache.counts.tally.of("llm") for cache in two]
    assert (outcomes[0]["miss"], outcomes[1]["shared"], outcomes[1]["hit"]) == (2, 1, 2), outcomes  # With the two of the warm-up


async def test_awaited_too_and_many_join(two):
    pieces = [f"piece {n}" for n in range(300)]
    source = Source(pieces, pauses=(10, 200))
    here, there = source.awaiting(two[0]), source.awaiting(two[1])
    async def read(stream, got):
        async for item in stream("p"): got.append(item)
    got = [[] for _ in range(9)]
    tasks = [asyncio.create_task(read(here, got[0]))]
    while len(got[0]) < 10: await asyncio.sleep(0.002)
    tasks += [asyncio.create_task(read((here, there)[n % 2], got[n])) for n in range(1, 9)]
    while any(len(one) < 10 for one in got): await asyncio.sleep(0.002)
    assert len(source.said) == 10
    for gate in source.gates.values(): gate.set()
    await asyncio.wait_for(asyncio.gather(*tasks), 30)
    assert all(one == pieces for one in got) and source.begun == 1


def test_nobody_follows_then_nothing_is_told_and_nothing_is_read_ahead(two, monkeypatch):
    told, relay = [], type(two[0].store).relay
    def counted(self, key, run, place, records, ttl):
        told.extend([list(records)] * any(self is cache.store for cache in two))
        return (yield from relay(self, key, run, place, records, ttl))
    monkeypatch.setattr(type(two[0].store), "relay", counted)
    source = Source(list(range(1000)))
    stream = source.blocking(two[0])("p")
    assert list(itertools.islice(stream, 3)) == [0, 1, 2] and source.said == [0, 1, 2]
    time.sleep(0.2)
    assert source.said == [0, 1, 2] and told == [], "the store was told of, or asked about, a stream that nobody follows"
    stream.close()
    assert [*source.blocking(two[1])("p")] == source.items and source.begun == 2  # Its lease was given back at once
    assert not any(told), "pieces were put into the store for nobody"


def test_a_leader_that_hears_of_its_key_asks_once_whether_anybody_follows(two, monkeypatch):
    asked, relay = [], type(two[0].store).relay
    def counted(self, key, run, place, records, ttl):
        asked.append(key)
        return (yield from relay(self, key, run, place, records, ttl))
    monkeypatch.setattr(type(two[0].store), "relay", counted)
    ask = Source(list(range(1000))).blocking(two[0])
    stream = ask("p")
    assert next(stream) == 0
    ask.invalidate("p")                                                            # may be heard, and asked about
    time.sleep(0.5)
    assert len(asked) < 5
    stream.close()


def test_the_leader_pauses_or_leaves_and_the_joiner_goes_on(two):
    source = Source(PIECES, pauses=(3,))
    stream = source.blocking(two[0])("p")
    assert [next(stream), next(stream)] == PIECES[:2]          # And reads no further
    joined = Reader(source.blocking(two[1])("p"))
    until(lambda: joined.got == PIECES[:3])
    stream.close()
    source.gates[3].set()
    assert joined.done() == [*PIECES, END] and source.begun == 1
    assert Reader(source.blocking(two[0])("p")).done() == [*PIECES, END] and source.begun == 1


def test_a_leader_that_fails_is_an_error_where_it_failed(two):
    source = Source(PIECES, pauses=(5,), error=ValueError("upstream"))
    first = Reader(source.blocking(two[0])("p"))
    until(lambda: len(first.got) == 5)
    second = Reader(source.blocking(two[1])("p"))
    until(lambda: second.got == PIECES)
    source.gates[5].set()
    assert first.done()[:5] == second.done()[:5] == PIECES
    assert isinstance(first.got[5], ValueError) and isinstance(second.got[5], StreamLostError)
    assert "after 5 pieces" in str(second.got[5]) and "ValueError" in str(second.got[5]) and "upstream" not in str(second.got[5])
    source.error = None
    assert Reader(source.blocking(two[1])("p")).done() == [*PIECES, END] and source.begun == 2  # It was not remembered


def test_a_leader_that_fails_before_its_first_item_leaves_the_joiner_to_compute(two):
    failing, right = Source([], pauses=(0,), error=ValueError("upstream")), Source(PIECES)
    def stream(source, cache):
        return source.blocking(cache, version="same")
    first = Reader(stream(failing, two[0])("p"))
    until(lambda: failing.begun)
    second = Reader(stream(right, two[1])("p"))
    time.sleep(0.3)
    assert not second.got and not right.begun
    failing.gates[0].set()
    assert isinstance(first.done()[0], ValueError) and second.done() == [*PIECES, END] and right.begun == 1
    assert two[1].counts.tally.of("llm").get("shared") is None  # It computed: one miss


def test_what_is_not_stored_is_joined_all_the_same(two):
    source = Source(PIECES, pauses=(2,))
    first = Reader(source.blocking(two[0], keep=lambda pieces: False)("p"))
    until(lambda: len(first.got) == 2)
    second = Reader(source.blocking(two[1], keep=lambda pieces: False)("p"))
    until(lambda: len(second.got) == 2)
    source.gates[2].set()
    assert first.done() == second.done() == [*PIECES, END] and source.begun == 1
    assert Reader(source.blocking(two[1])("p")).done() == [*PIECES, END] and source.begun == 2  # An old tape is no answer


def test_what_has_no_byte_form_is_computed_by_each(two):
    lock = threading.Lock()
    source = Source([lock, "two"], pauses=(1,))
    with pytest.warns(UserWarning, match="not cached"):
        first = Reader(source.blocking(two[0])("p"))
        until(lambda: len(first.got) == 1)
        second = Reader(source.blocking(two[1])("p"))
        until(lambda: second.got == [lock])
        source.gates[1].set()
        assert first.done()[:2] == second.done()[:2] == [lock, "two"] and source.begun == 2


def test_a_joiner_that_leaves_takes_nobody_down(two):
    source = Source(PIECES, pauses=(2,))
    first = Reader(source.blocking(two[0])("p"))
    until(lambda: len(first.got) == 2)
    joined = source.blocking(two[1])("p")
    assert [next(joined), next(joined)] == PIECES[:2]
    joined.close()
    source.gates[2].set()
    assert first.done() == [*PIECES, END]


def test_a_clear_in_between_hides_nothing_and_ends_nothing(two):
    source = Source(PIECES, pauses=(2,))
    first = Reader(source.blocking(two[0])("p"))
    until(lambda: len(first.got) == 2)
    second = Reader(source.blocking(two[1])("p"))
    until(lambda: len(second.got) == 2)
    two[0].clear()
    source.gates[2].set()
    assert first.done() == second.done() == [*PIECES, END]


def test_an_old_stream_is_replayed_while_it_is_computed_anew(two):
    numbers = itertools.count()
    @cache_llm_response(cache=two[0], namespace="streams", ttl=0.3, stale=60)
    def stream(prompt): yield next(numbers)
    assert list(stream("p")) == [0]
    time.sleep(0.4)
    assert list(stream("p")) == [0]
    until(lambda: list(stream("p")) != [0])
    outcomes = stream.cache_info().outcomes
    assert outcomes["miss"] == 1 and outcomes["stale"] >= 1, outcomes


LEADER = """
import sys, time
from aurea_orchestrator import Cache, cache_llm_response
cache = Cache.from_url(sys.argv[1], timeout=10)
@cache_llm_response(cache=cache, namespace="streams", version="killed")
def stream(prompt):
    for n in range(int(sys.argv[2])): yield n
    print("said", flush=True)
    time.sleep(60)
print("ready", flush=True)
for item in stream("p"): print(item, flush=True)
"""


@pytest.mark.timed
@pytest.mark.slow
@pytest.mark.parametrize("said", [0, 3])
@pytest.mark.parametrize("awaits", [False, True])
def test_a_leader_that_is_killed_is_an_error_or_a_fresh_computation_but_no_silent_end(two, url, said, awaits):
    leader = subprocess.Popen([sys.executable, "-c", LEADER, url, str(said)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    for line in leader.stdout:
        if line == "said\n": break
    begun = []
    async def awaiting(prompt):
        begun.append(1)
        for item in "abc": yield item
    def blocking(prompt):
        begun.append(1)
        yield from "abc"
    fn = awaiting if awaits else blocking
    fn.__qualname__ = "stream"
    stream = cache_llm_response(cache=two[1], namespace="streams", version="killed")(fn)
    got = []
    async def gather():
        try:
            async for item in stream("p"): got.append(item)
        except StreamLostError as error: got.append(error)
    reader = threading.Thread(target=lambda: asyncio.run(gather()) if awaits else whole(stream("p"), got))
    reader.start()
    try:
        if said: until(lambda: got == [0, 1, 2])
        else: time.sleep(0.5)
        assert not begun and len(got) == said
    finally: leader.kill()
    killed = time.monotonic()
    reader.join(30)
    leader.communicate()
    assert time.monotonic() - killed < 4 + 4  # the ttl of a lease, and a busy machine
    if said: assert got[:3] == [0, 1, 2] and isinstance(got[3], StreamLostError) and "gone" in str(got[3]) and not begun
    else: assert got[:3] == ["a", "b", "c"] and begun == [1]


def test_what_is_said_while_the_rest_is_told_is_told_next(two, monkeypatch):
    source = Source(PIECES, pauses=(2, 3, 4))
    telling, store = threading.Event(), two[0].store
    relay = type(store).relay
    def slowly(self, key, run, place, records, ttl):
        if records and place == 2 and self is store:  # The third piece is being told: now the fourth is said
            telling.set()
            source.gates[3].set()
            until(lambda: len(source.said) == 4)
            time.sleep(0.05)
        return (yield from relay(self, key, run, place, records, ttl))
    monkeypatch.setattr(type(store), "relay", slowly)
    first = Reader(source.blocking(two[0])("p"))
    until(lambda: len(first.got) == 2)
    second = Reader(source.blocking(two[1])("p"))
    until(lambda: second.got == PIECES[:2])
    source.gates[2].set()
    assert telling.wait(20)
    until(lambda: second.got == PIECES[:4])
    source.gates[4].set()
    assert first.done() == second.done() == [*PIECES, END]
