"""Every store keeps its contract: the suite that users run over theirs."""
from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fakeredis import FakeAsyncRedis, FakeRedis, FakeServer

from aurea_orchestrator.contract import EntryTests, LifeTests, TimeTests
from aurea_orchestrator.effects import drive
from aurea_orchestrator.stores import memory, tiers
from aurea_orchestrator.stores.base import Item, Store
from aurea_orchestrator.stores.memory import OVERHEAD_BYTES, MemoryStore
from aurea_orchestrator.stores.redis import RedisStore
from aurea_orchestrator.stores.sqlite import SqliteStore
from aurea_orchestrator.stores.tiers import Tiered
from aurea_orchestrator.testing import LeaseSuite, StoreSuite


class Moved(StoreSuite):
    "A suite whose time is moved by hand."
    now = 1_000_000.0

    def clock(self) -> float: return self.now
    def advance(self, seconds: float) -> None: self.now += seconds


class TestMemory(Moved):
    @pytest.fixture
    def store(self) -> Store: return MemoryStore(clock=self.clock)


class TestSqlite(Moved, LeaseSuite):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store: return SqliteStore(tmp_path / "cache.sqlite", timeout=10, clock=self.clock)

    def second(self, store: SqliteStore) -> Store: return SqliteStore(store.path, timeout=10, clock=self.clock)


class TestSqliteByItsOwnTime(TimeTests):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store: return SqliteStore(tmp_path / "cache.sqlite", timeout=10)


class TestFakeRedis(StoreSuite):
    test_info = None  # fakeredis knows no INFO

    @pytest.fixture
    def store(self) -> Store:
        server = FakeServer()
        return RedisStore("redis://fake", connect=(lambda: FakeRedis(server=server), lambda: FakeAsyncRedis(server=server)))


@pytest.mark.redis
class TestRedis(StoreSuite, LeaseSuite):
    @pytest.fixture
    def store(self, redis_url: str) -> Iterator[Store]:
        self.url = redis_url
        yield RedisStore(redis_url, timeout=10)

    def second(self, store: Store) -> Store: return RedisStore(self.url, timeout=10)


@pytest.mark.redis
class TestSentinel(EntryTests, LifeTests):
    @pytest.fixture
    def store(self, sentinels) -> Store: return RedisStore(sentinels.url, timeout=10)


@pytest.mark.redis
class TestCluster(StoreSuite, LeaseSuite):
    @pytest.fixture
    def store(self, cluster) -> Store: return RedisStore(cluster.url, timeout=10)


def key(n: int) -> str: return f"llm:{n:064x}"


class TestBoundInMemory:
    def test_holds_after_every_write(self) -> None:
        store = MemoryStore(max_bytes=20_000)
        for n in range(500):
            drive(store.put_many([Item(key(n % 60), bytes(n * 37 % 3000), 60)]))
            facts = drive(store.info())
            kept = [blob for blob in drive(store.get_many([key(m) for m in range(60)])) if blob is not None]
            assert facts["bytes"] <= 20_000
            assert facts["entries"] == len(kept) and facts["bytes"] == sum(map(len, kept)) + len(kept) * (len(key(0)) + OVERHEAD_BYTES)

    def test_too_large_is_not_kept_and_takes_the_former_answer_with_it(self) -> None:
        store = MemoryStore(max_bytes=5_000)
        drive(store.put_many([Item(key(1), b"old", 60), Item(key(2), b"other", 60)]))
        drive(store.put_many([Item(key(1), bytes(5_000), 60)]))
        assert drive(store.get_many([key(1), key(2)])) == [None, b"other"]

    def test_a_scan_does_not_wash_out_what_is_asked_for(self) -> None:
        store = MemoryStore(max_bytes=100 * (OVERHEAD_BYTES + 168))
        hot = [key(n) for n in range(20)]
        drive(store.put_many([Item(k, bytes(100), 60) for k in hot]))
        for n in range(100, 5_000):
            if n % 70 == 0: drive(store.get_many(hot))
            drive(store.put_many([Item(key(n), bytes(100), 60)]))
        assert None not in drive(store.get_many(hot))

    def test_expired_go_first_though_they_were_asked_for(self) -> None:
        now = 0.0
        store = MemoryStore(max_bytes=4 * (OVERHEAD_BYTES + 68 + 10), clock=lambda: now)
        for n in range(4): store.keep(key(n), bytes(10), 1 if n == 0 else 60)
        for n in range(4): store.peek(key(n))
        now = 2.0
        store.keep(key(9), bytes(10), 60)
        assert [store.peek(key(n)) is not None for n in (0, 1, 2, 3, 9)] == [False, True, True, True, True]

    @pytest.mark.parametrize("ttl", [0, -1, float("nan")])
    def test_a_ttl_that_is_no_time_stores_nothing(self, ttl: float) -> None:
        store = MemoryStore()
        drive(store.put_many([Item(key(1), b"old", 60)]))
        drive(store.put_many([Item(key(1), b"new", ttl)]))
        assert store.peek(key(1)) is None

    def test_a_mutable_blob_is_copied(self) -> None:
        store, blob = MemoryStore(), bytearray(b"before")
        store.keep(key(1), blob, 60)
        blob[:] = b"behind"
        assert store.peek(key(1)) == b"before"

    def test_overhead_per_entry(self) -> None:
        store = MemoryStore()
        tracemalloc.start()
        try:
            for n in range(11_000): store.keep(key(n), n.to_bytes(100, "big"), 60 + n)
            used = tracemalloc.get_traced_memory()[0]
        finally: tracemalloc.stop()
        assert used <= drive(store.info())["bytes"] and used / 11_000 - 100 <= 500

    def test_threads_leave_the_queue_whole(self) -> None:
        store = MemoryStore(max_bytes=30_000)

        def work(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(3_000):
                k = key(chance.randrange(200))
                what = chance.random()
                if what < 0.5: store.peek(k)
                elif what < 0.9: store.keep(k, bytes(chance.randrange(2_000)), chance.choice([0.001, 60]))
                else: store.drop(k)

        with ThreadPoolExecutor(6) as pool: list(pool.map(work, range(6)))
        queue, seen = store._queue, []
        for end in queue.ends.values():
            node = end.newer
            while node is not end:
                seen.append(node)
                assert node.newer.older is node
                node = node.newer
        assert {n.key: n for n in seen} == queue.nodes and len(seen) == len(queue.nodes)
        assert queue.bytes == sum(n.size_bytes for n in seen) <= 30_000

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")
    def test_what_is_done_at_a_fork_does_not_grow_with_the_stores_that_were(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hooks: list[object] = []
        real = os.register_at_fork
        monkeypatch.setattr(os, "register_at_fork", lambda **these: (hooks.append(these), real(**these)))
        for _ in range(20): Tiered(MemoryStore(), 1000, lambda key, blob: 60.0)
        assert len(hooks) <= 2
        gc.collect()
        assert len(memory._shelves) < 40 and len(tiers._tiers) < 20

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")
    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_a_fork_finds_the_lock_free_and_the_queue_whole(self) -> None:
        store, stop = MemoryStore(max_bytes=30_000), threading.Event()

        def write() -> None:
            n = 0
            while not stop.is_set(): store.keep(key((n := n + 1) % 100), bytes(n % 700), 60)

        thread = threading.Thread(target=write)
        thread.start()
        for _ in range(20):
            if not (child := os.fork()):
                signal.alarm(5)
                for n in range(200): store.keep(key(n), bytes(500), 60)
                os._exit(store.peek(key(199)) != bytes(500))
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        stop.set()
        thread.join()


def test_the_suite_needs_no_pytest_to_be_imported() -> None:
    code = "import sys; sys.modules['pytest'] = None; import aurea_orchestrator.testing"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0
