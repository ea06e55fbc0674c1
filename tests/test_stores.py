"""Every store keeps its contract: the suite that users run over theirs."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fakeredis import FakeAsyncRedis, FakeRedis, FakeServer

from aurea_orchestrator.effects import drive
from aurea_orchestrator.errors import StoreError
from aurea_orchestrator.stores.base import Item, Store
from aurea_orchestrator.stores.memory import OVERHEAD_BYTES, MemoryStore
from aurea_orchestrator.stores.redis import RedisStore
from aurea_orchestrator.stores.sqlite import SqliteStore
from aurea_orchestrator.testing import StoreSuite


class Moved(StoreSuite):
    "A suite whose time is moved by hand."
    now = 1_000_000.0

    def clock(self) -> float: return self.now
    def advance(self, seconds: float) -> None: self.now += seconds


class TestMemory(Moved):
    @pytest.fixture
    def store(self) -> Store: return MemoryStore(clock=self.clock)


class TestSqlite(Moved):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store: return SqliteStore(tmp_path / "cache.sqlite", timeout=10, clock=self.clock)

    def second(self, store: SqliteStore) -> Store: return SqliteStore(store.path, timeout=10, clock=self.clock)


class TestSqliteByItsOwnTime(StoreSuite):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store: return SqliteStore(tmp_path / "cache.sqlite", timeout=10)


class TestFakeRedis(StoreSuite):
    test_info = None  # fakeredis knows no INFO

    @pytest.fixture
    def store(self) -> Store:
        server = FakeServer()
        return RedisStore("redis://fake", connect=(lambda: FakeRedis(server=server), lambda: FakeAsyncRedis(server=server)))


@pytest.mark.redis
class TestRedis(StoreSuite):
    @pytest.fixture
    def store(self, redis_url: str) -> Iterator[Store]:
        self.url = redis_url
        yield RedisStore(redis_url, timeout=10)

    def second(self, store: Store) -> Store: return RedisStore(self.url, timeout=10)


@pytest.mark.redis
class TestSentinel(StoreSuite):
    @pytest.fixture
    def store(self, sentinels) -> Store: return RedisStore(sentinels.url, timeout=10)


@pytest.mark.redis
class TestCluster(StoreSuite):
    @pytest.fixture
    def store(self, cluster) -> Store: return RedisStore(cluster.url, timeout=10)
