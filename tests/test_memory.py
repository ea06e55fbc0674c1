"""What leaves the memory store when it is full, and what stays."""
from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurea_orchestrator import codec
from aurea_orchestrator.effects import adrive, drive
from aurea_orchestrator.stores.memory import OVERHEAD_BYTES, MemoryStore, _Node, _Queue, _Turns
from aurea_orchestrator.stores.urls import open_store, worth
from bench import eviction


def entry(seconds: float, size: int) -> bytes: return codec.encode("x" * size, born=0.0, cost=seconds)
def queues(queue: _Queue) -> Iterator[tuple[int, list[_Node]]]:
    "The rank of each queue, and what stands in it, from the oldest on."
    for rank, end in queue.ends.items():
        node, nodes = end.newer, []
        while node is not end:
            assert node.newer.older is node and node.older.newer is node
            nodes.append(node)
            node = node.newer
        yield rank, nodes


def whole(store: MemoryStore) -> None:
    "Everything that must hold between two calls."
    queue, seen = store._queue, []
    for rank, nodes in queues(queue):
        assert all(node.rank + 3 * node.spared == rank and node.turn >= queue.level for node in nodes)
        assert [node.turn for node in nodes] == sorted(node.turn for node in nodes)
        seen += nodes
    assert {node.key: node for node in seen} == queue.nodes and len(seen) == len(queue.nodes) and len(queue.ends) <= 47
    assert queue.bytes == sum(node.size_bytes for node in seen) <= store.max_bytes


def test_dear_and_small_outlives_cheap_and_large() -> None:
    store = open_store("memory://?max_bytes=20MB")
    dear = [f"llm:{n:064x}" for n in range(1_000)]
    for key in dear: store.keep(key, entry(20, 1_000), 60)
    for n in range(1_000):
        store.keep(f"cheap:{n}", cheap := entry(0.1, 1_000_000), 60)
        store.peek(f"cheap:{n}")
    assert None not in drive(store.get_many(dear))
    assert store.peek("cheap:999") == cheap                                 # And what comes finds its place all the same


def test_of_two_that_took_as_long_the_smaller_stays() -> None:
    store = MemoryStore(max_bytes=100_000)
    store.keep("small", bytes(100), 60)
    for n in range(20): store.keep(f"large:{n}", bytes(20_000), 60)
    assert store.peek("small") is not None and store.peek("large:0") is None


def test_the_dearest_leaves_if_nobody_asks_for_it() -> None:
    store = MemoryStore(max_bytes=20_000, worth=lambda blob: blob[0])
    store.keep("dear", bytes([64]), 60)
    for n in range(10_000): store.keep(f"cheap:{n}", bytes([1]), 60)
    assert store.peek("dear") is None


def test_a_dear_scan_does_not_wash_out_what_is_asked_for() -> None:
    store = MemoryStore(max_bytes=50 * (OVERHEAD_BYTES + 20), worth=lambda blob: blob[0])
    hot = [f"hot:{n}" for n in range(10)]
    for key in hot: store.keep(key, bytes([10]), 60)
    for n in range(5_000):
        if n % 40 == 0: drive(store.get_many(hot))
        store.keep(f"scan:{n}", bytes([40]), 60)
    assert None not in drive(store.get_many(hot))


def test_what_was_in_use_makes_room_for_what_is() -> None:
    store = MemoryStore(max_bytes=50 * (OVERHEAD_BYTES + 20))
    for _ in range(100):
        for n in range(30): store.peek(f"old:{n}") or store.keep(f"old:{n}", b"", 60)
    for turn in range(300):
        for n in range(30): store.peek(f"new:{n}") or store.keep(f"new:{n}", b"", 60)
        for n in range(5): store.keep(f"once:{turn}:{n}", b"", 60)
    assert all(store.peek(f"new:{n}") is not None for n in range(30))


def test_expired_and_dear_goes_before_live_and_cheap_and_the_level_stays() -> None:
    now = 0.0
    store = MemoryStore(max_bytes=4 * (OVERHEAD_BYTES + 6), clock=lambda: now, worth=lambda blob: 10.0 ** blob[0])
    store.keep("dear", bytes([9]), 1)
    for n in range(3): store.keep(f"{n}", bytes([0]), 60)
    now, level = 2.0, store._queue.level
    store.keep("9", bytes([0]), 60)
    assert sorted(store._nodes) == ["0", "1", "2", "9"] and store._queue.level == level


def test_a_new_answer_brings_its_own_worth_and_keeps_what_the_key_earned() -> None:
    store = MemoryStore(max_bytes=10_000, worth=lambda blob: blob[0])
    store.keep("a", bytes([100]), 60)
    dear = store._nodes["a"].rank
    store.peek("a")
    store.keep("a", bytes([1]), 60)
    assert store._nodes["a"].rank < dear and store._nodes["a"].asked
    whole(store)


@pytest.mark.parametrize("odd", [nan, inf, -inf, -1.0, 0.0, 1e308, 5e-324])
def test_a_worth_that_is_no_worth_breaks_nothing(odd: float) -> None:
    chance = random.Random(7)
    store = MemoryStore(max_bytes=20_000, worth=lambda blob: odd if blob[0] else 1.0)
    for n in range(2_000):
        store.keep(f"{n % 200}", bytes([chance.randrange(2)]) * chance.randrange(1, 500), 60)
        store.peek(f"{chance.randrange(200)}")
    whole(store)
    for n in range(2_000): store.keep(f"other:{n}", bytes(100), 60)
    assert store.peek("other:1999") is not None


@given(st.integers(0, 2**32), st.integers(5_000, 100_000))
def test_the_queues_stay_whole_whatever_is_done(seed: int, max_bytes: int) -> None:
    chance, now = random.Random(seed), 0.0
    store = MemoryStore(max_bytes=max_bytes, clock=lambda: now, worth=lambda blob: chance.lognormvariate(0, 5))
    for step in range(400):
        key, what = f"{chance.randrange(60)}", chance.random()
        if what < 0.5: store.peek(key)
        elif what < 0.9: store.keep(key, bytes(chance.randrange(4_000)), chance.choice([1, 60]))
        elif what < 0.95: store.drop(key)
        else: now += 0.5
        if step % 20 == 0: whole(store)
    whole(store)


def test_an_eviction_spares_once_for_each_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    joined, join = [0], _Queue._join

    def counted(queue: _Turns, node: _Node) -> None:
        joined[0] += 1
        join(queue, node)

    monkeypatch.setattr(_Queue, "_join", counted)
    chance, store, hits, kept = random.Random(1), MemoryStore(max_bytes=50_000), 0, 0
    for _ in range(20_000):
        key = f"{min(int(chance.paretovariate(0.7)), 5_000)}"
        if store.peek(key) is not None: hits += 1
        else:
            store.keep(key, bytes(100), 60)
            kept += 1
    assert kept < joined[0] <= kept + hits


def test_a_clear_leaves_the_loop_to_others_between_pages() -> None:
    store, beats = MemoryStore(), []
    for n in range(5_000): store.keep(f"llm:{n:064x}", b"", 60)

    async def beat() -> None:
        while store._nodes:
            beats.append(len(store._nodes))
            await asyncio.sleep(0)

    async def clear() -> None:
        cursor: str | None = None
        while (page := await adrive(store.scan("llm:", cursor, 500))).cursor or page.keys:
            await adrive(store.delete(page.keys))
            if (cursor := page.cursor) is None: break

    async def both() -> None: await asyncio.gather(beat(), clear())

    asyncio.run(both())
    assert len(set(beats)) >= 10


@given(st.binary(max_size=200), st.floats())
def test_worth_of_any_bytes_and_any_cost_is_no_error(tail: bytes, cost: float) -> None:
    blob = codec.encode("gold", born=0.0, cost=cost, meta={"model": "demo"})
    for odd in (tail, blob[:4] + tail, blob[:20] + tail, blob[: len(tail)]): assert isinstance(worth(odd), float)
    assert isinstance(worth(blob), float)


@pytest.mark.parametrize("costs", eviction.COSTS)
@pytest.mark.parametrize("traffic", ["steady", "scans"])
def test_misses_cost_less_than_with_lru_and_are_no_more(monkeypatch: pytest.MonkeyPatch, costs: str, traffic: str) -> None:
    for name, value in (("KEYS", 2_000), ("REQUESTS", 30_000), ("EVERY", 1_500), ("SCAN", 600)): monkeypatch.setattr(eviction, name, value)
    lru, ours = eviction.run((eviction.Lru, eviction.Ours), costs, 0.05, 0.9, traffic, seed=3)
    assert ours[0] <= lru[0] and ours[2] < 0.9 * lru[2]
