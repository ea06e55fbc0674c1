"""Servers for the tests that need real ones; started when the first test asks, ended with the session."""
from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.pulse import Pulse
from tests.servers import Cluster, Sentinels, Server, standalone, until

settings.register_profile("busy", deadline=None)  # how long one example takes says nothing on a machine that does other things too
settings.load_profile("busy")

_pulse = pytest.StashKey[Pulse]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    "A test that asserts seconds is run again, three times at most, but only if the machine itself stood still meanwhile."
    for item in items:
        if item.get_closest_marker("timed"): item.add_marker(pytest.mark.flaky(reruns=3, condition=lambda: config.stash[_pulse].missed()))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("timed"):
        if _pulse not in item.config.stash:
            pulse = item.config.stash[_pulse] = Pulse()
            item.config.add_cleanup(pulse.stop)
        item.config.stash[_pulse].begin()


@pytest.fixture(scope="session")
def _redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with standalone(tmp_path_factory.mktemp("redis"), "--databases", "16") as server: yield server


@pytest.fixture
def redis_server(_redis: Server) -> Server:
    "An empty server that is shared; not to be paused or killed."
    with _redis.client() as client: client.flushall()
    return _redis


@pytest.fixture
def redis_url(redis_server: Server) -> str:
    "The URL of an empty server."
    return redis_server.url


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[Server]:
    "A server for one test: pause it, kill it, restart it."
    with standalone(tmp_path / "redis") as server: yield server


@pytest.fixture(scope="session")
def _sentinels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sentinels]:
    house = Sentinels(tmp_path_factory.mktemp("sentinels"))
    yield house
    house.kill()


@pytest.fixture
def sentinels(_sentinels: Sentinels) -> Sentinels:
    "A primary with replica and Sentinels; shared, so leave them alive."
    with _sentinels.primary.client() as client: client.flushall()
    return _sentinels


@pytest.fixture(scope="session")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    house = Cluster(tmp_path_factory.mktemp("cluster"))
    yield house
    house.kill()


@pytest.fixture
def cluster(_cluster: Cluster) -> Cluster:
    "A cluster of six; shared, so leave it alive."
    for server in _cluster.servers[:3]:
        with server.client() as client: client.flushall()
    return _cluster


@pytest.fixture
def alone() -> None:
    "Nobody listens any more in this process: what other tests have dropped has ended."
    gc.collect()
    until(lambda: not any(thread.name == "aurea-ears" for thread in threading.enumerate()), "the ears of other tests to end", 30)
