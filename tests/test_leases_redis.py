"""Leases and ears on real Redis servers: who computes, and who hears of it, when processes die and servers hang."""
from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from fakeredis import FakeAsyncRedis, FakeRedis, FakeServer

from aurea_orchestrator import Cache, cache_llm_response
from aurea_orchestrator.effects import adrive, drive
from aurea_orchestrator.errors import StoreError, StoreTimeoutError, StoreUnavailableError
from aurea_orchestrator.stores import tracking
from aurea_orchestrator.stores.base import Ears, Item
from aurea_orchestrator.stores.guard import Guarded
from aurea_orchestrator.stores.memory import MemoryStore
from aurea_orchestrator.stores.redis import RedisStore
from tests.servers import Cluster, Sentinels, Server, standalone, until
from tests.test_redis import Open, blobs, calls, connections, items, keys, opened

__all__ = ["opened"]  # a fixture
KEY = f"llm:{'5f' * 32}"
LEASE = f"aurea:lease:{{{KEY}}}"


def no_room_for(patch: pytest.MonkeyPatch, name: str) -> None:
    "Threads of that name do not start."
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == name: raise RuntimeError("can't start new thread")
        start(thread)

    patch.setattr(threading.Thread, "start", refuse)


# ---- leases -----------------------------------------------------------------------------------------------------------

@pytest.mark.redis
async def test_a_lease_has_one_owner(redis_server: Server, opened: Open) -> None:
    store, other = opened(redis_server.url), opened(redis_server.url)
    assert drive(store.acquire([KEY], "a", 9)) == [(None, True)]
    assert drive(other.acquire([KEY], "b", 9)) == await adrive(other.acquire([KEY], "c", 9)) == [(None, False)]
    assert await adrive(store.acquire([KEY], "a", 9)) == [(None, True)]             # its owner asked twice, as after a broken connection
    await adrive(store.settle([Item(KEY, b"v", 60)], [KEY], "a"))
    assert drive(other.acquire([KEY], "b", 9)) == [(b"v", False)]                   # there is nothing to compute any more
    assert drive(other.acquire([KEY], "b", 9, force=True)) == [(b"v", True)]        # unless it is to be fresh
    assert drive(store.acquire([KEY], "a", 9, force=True)) == [(b"v", False)]
    drive(other.settle([], [KEY], "b"))
    with redis_server.client() as client: assert client.keys() == [KEY.encode()]
    await adrive(store.shut()); await adrive(other.shut())


@pytest.mark.redis
async def test_a_stranger_neither_keeps_nor_ends_a_lease(redis_server: Server, opened: Open) -> None:
    store = opened(redis_server.url)
    drive(store.acquire([KEY], "a", 5))
    with redis_server.client() as client:
        for way in (lambda flow: asyncio.to_thread(drive, flow), adrive):
            await way(store.renew([KEY], "b", 500)); await way(store.settle([], [KEY], "b"))
            assert client.get(LEASE) == b"a" and client.pttl(LEASE) <= 5000
            await way(store.renew([KEY, keys(1)[0]], "a", 50))
            assert 40_000 < client.pttl(LEASE) <= 50_000 and client.keys() == [LEASE.encode()]
            client.pexpire(LEASE, 5000)
        await adrive(store.settle([], [KEY], "a"))
        assert client.keys() == []
        client.rpush(LEASE, "of another type"); client.rpush(KEY, "of another type")
        assert drive(store.acquire([KEY], "a", 5)) == [(None, False)]
        drive(store.renew([KEY], "a", 5)); drive(store.settle([], [KEY], "a"))
        assert client.exists(LEASE) == 1
    await adrive(store.shut())


RACE = """
import sys, time
from aurea_orchestrator.effects import drive
from aurea_orchestrator.stores.redis import RedisStore
store, me = RedisStore(sys.argv[1], timeout=5), sys.argv[2]
for n in range(100):
    [(_, granted)] = drive(store.acquire([f"llm:{n}"], me, 60))
    if granted: print(n)
drive(store.shut())
"""


@pytest.mark.redis
def test_of_many_processes_and_threads_one_has_the_lease(redis_server: Server, opened: Open) -> None:
    racers = [subprocess.Popen([sys.executable, "-W", "error", "-c", RACE, redis_server.url, f"p{n}"], stdout=subprocess.PIPE, text=True,
                               cwd=Path(__file__).parent.parent) for n in range(2)]
    store, won = opened(redis_server.url, timeout=5), list[int]()

    def race(me: str) -> None:
        for n in range(100):
            if drive(store.acquire([f"llm:{n}"], me, 60))[0][1]: won.append(n)

    with ThreadPoolExecutor(8) as pool: list(pool.map(race, [f"t{n}" for n in range(8)]))
    for racer in racers: won += map(int, racer.communicate(timeout=60)[0].split())
    assert sorted(won) == list(range(100))


@pytest.mark.redis
def test_a_lease_ends_with_its_owner(redis_server: Server, opened: Open) -> None:
    script = """
    import sys, time
    from aurea_orchestrator.effects import drive
    from aurea_orchestrator.stores.redis import RedisStore
    print(drive(RedisStore(sys.argv[1]).acquire([sys.argv[2]], "doomed", 0.5)), flush=True)
    time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), redis_server.url, KEY], stdout=subprocess.PIPE, text=True,
                          cwd=Path(__file__).parent.parent) as owner:
        assert owner.stdout and owner.stdout.readline().strip() == "[(None, True)]"
        owner.kill()
    store = opened(redis_server.url)
    until(lambda: drive(store.acquire([KEY], "heir", 5)) == [(None, True)], "the lease to expire", 3)


@pytest.mark.redis
async def test_what_a_miss_costs(redis_server: Server, opened: Open) -> None:
    store = opened(redis_server.url)
    drive(store.get_many([KEY])); await adrive(store.get_many([KEY]))
    drive(store.acquire([KEY], "x", 9)); drive(store.renew([KEY], "x", 9)); drive(store.settle([], [KEY], "x"))  # the server knows the scripts
    for n, way in ((n, way) for n in (1, 8) for way in (lambda flow: asyncio.to_thread(drive, flow), adrive)):
        with redis_server.client() as client:
            client.flushdb(); client.config_resetstat(); reads(client)
            assert await way(store.acquire(keys(n), "a", 9)) == [(None, True)] * n and reads(client) == 1  # the server read once
            await way(store.settle(items(n), keys(n), "a"))
            assert reads(client) == 1
        told = {name: n for name, n in calls(redis_server).items() if name in ("evalsha", "eval", "get", "set", "del")}
        assert told == {"evalsha": 2 * n, "get": 2 * n, "set": 2 * n, "del": n}    # the scripts' own are counted too
    await adrive(store.shut())


_READ: dict[int, int] = {}


def reads(client: Any) -> int:
    "How often the server read from others than this client, since the last question."
    now, last = int(client.info("stats")["total_reads_processed"]), _READ.get(id(client), 0)
    _READ[id(client)] = now
    return now - last - 1


@pytest.mark.redis
async def test_leases_that_are_asked_for_in_one_tick_go_together(redis_server: Server, opened: Open) -> None:
    store = opened(redis_server.url)
    await adrive(store.acquire([KEY], "x", 9))
    with redis_server.client() as client:
        reads(client)
        asked = (adrive(store.acquire([key], "a", 9)) for key in keys(15))
        assert await asyncio.gather(*asked, adrive(store.put_many(items(1, "new")))) == [[(None, True)]] * 15 + [None]
        assert reads(client) == 1
    assert connections(redis_server) == 1
    replies = await asyncio.gather(*(adrive(store.acquire([KEY], token, 9)) for token in "xyz"))
    assert replies == [[(None, True)], [(None, False)], [(None, False)]]
    await adrive(store.shut())


@pytest.mark.redis
async def test_a_server_that_forgot_the_scripts(redis_server: Server, opened: Open) -> None:
    store = opened(redis_server.url)
    for way in (lambda flow: asyncio.to_thread(drive, flow), adrive):
        for some in (keys(1), keys(3)):
            with redis_server.client() as client: client.script_flush(); client.flushdb(); client.config_resetstat()
            assert await way(store.acquire(some, "a", 9)) == [(None, True)] * len(some)
            assert calls(redis_server)["eval"] == len(some)
            with redis_server.client() as client: client.script_flush()
            await way(store.settle([Item(key, key.encode(), 60) for key in some], some, "a"))
            assert await way(store.acquire(some, "b", 9)) == [(key.encode(), False) for key in some]
            with redis_server.client() as client: assert sorted(client.keys()) == [key.encode() for key in some]
    await adrive(store.shut())


@pytest.mark.redis
async def test_leases_on_a_cluster(cluster: Cluster, opened: Open) -> None:
    store = opened(cluster.url, timeout=5)
    for way in (lambda flow: asyncio.to_thread(drive, flow), adrive):
        assert await way(store.acquire(keys(1), "a", 9)) == [(None, True)]
        assert await way(store.acquire(keys(90), "a", 9)) == [(None, True)] * 90
        assert await way(store.acquire(keys(90), "b", 9)) == [(None, False)] * 90
        await way(store.renew(keys(90), "a", 9))
        await way(store.settle(items(90), keys(90), "a"))
        assert await way(store.acquire(keys(90), "b", 9)) == [(blob, False) for blob in blobs(90)]
        assert await way(store.delete(keys(90))) == 90
    asked = (adrive(store.acquire([key], "c", 9)) for key in keys(60))
    assert await asyncio.gather(*asked) == [[(None, True)]] * 60
    await adrive(store.shut())


@pytest.mark.redis
async def test_leases_by_sentinels(sentinels: Sentinels, opened: Open) -> None:
    store = opened(sentinels.url)
    assert drive(store.acquire([KEY], "a", 9)) == [(None, True)] and await adrive(store.acquire([KEY], "b", 9)) == [(None, False)]
    await adrive(store.settle([Item(KEY, b"v", 9)], [KEY], "a"))
    assert drive(store.acquire([KEY], "b", 9)) == [(b"v", False)]
    await adrive(store.shut())


@pytest.mark.timed
@pytest.mark.redis
async def test_leases_in_trouble_are_errors_of_ours(own_redis: Server, opened: Open) -> None:
    store = opened(own_redis.url, timeout=0.3)
    ways = {"x": lambda flow: asyncio.to_thread(drive, flow), "y": adrive}
    for name, way in ways.items(): await way(store.acquire(keys(2, name), "x", 9))
    with own_redis.client() as client: client.config_set("maxmemory", 1)
    for name, way in ways.items():
        for flow in (store.acquire([KEY], "a", 9), store.settle(items(2, name), keys(2, name), "x")):
            with pytest.raises(StoreError, match="maxmemory"): await way(flow)
    with own_redis.client() as client:
        assert client.keys() == []                                                 # full, but the leases are given back
        client.config_set("maxmemory", 0)
    own_redis.pause()
    for flow in (lambda: store.acquire([KEY], "a", 9), lambda: store.renew([KEY], "a", 9), lambda: store.settle(items(2), [KEY], "a")):
        for way in (lambda flow: asyncio.to_thread(drive, flow), adrive):
            start = time.monotonic()
            with pytest.raises(StoreTimeoutError): await way(flow())
            assert time.monotonic() - start < 0.9
    own_redis.resume(); own_redis.kill()
    with pytest.raises(StoreUnavailableError): drive(store.acquire([KEY], "a", 9))
    with pytest.raises(StoreUnavailableError): await adrive(store.settle([], [KEY], "a"))
    await adrive(store.shut())


# ---- ears -------------------------------------------------------------------------------------------------------------

class Notes:
    "What was heard, and when."

    def __init__(self, ears: Ears) -> None:
        self.ears, self.told, self.news = ears, list[Sequence[str] | None](), threading.Event()
        self.good = list[bool]()                                                   # whether the ears were deaf when something was heard
        self.stop = ears.listen(self.heard)

    def heard(self, keys: Sequence[str] | None) -> None:
        self.good.append(self.ears.until() > time.monotonic())
        self.told.append(keys); self.news.set()

    def hears(self) -> bool: return self.ears.until() > time.monotonic()

    def ready(self, seconds: float = 5) -> Notes:
        until(self.hears, "the ears to hear", seconds)
        return self

    def after(self, do: Callable[[], Any], key: str | None) -> float:
        "The seconds until a key was heard that something was done to."
        self.told.clear(); self.news.clear()
        start = time.monotonic()
        do()
        while not any(keys is key is None or key in (keys or ()) for keys in list(self.told)):
            assert time.monotonic() - start < 3, (key, self.told)
            self.news.wait(0.5); self.news.clear()
        return time.monotonic() - start


@pytest.fixture
def noted(opened: Open) -> Iterator[Callable[[str], tuple[RedisStore, Notes]]]:
    made: list[Notes] = []

    def make(url: str) -> tuple[RedisStore, Notes]:
        ears = (store := opened(url)).ears()
        assert ears
        made.append(Notes(ears))
        return store, made[-1]

    yield make
    for notes in made: notes.stop()


Noted = Callable[[str], tuple[RedisStore, Notes]]


def trackers(server: Server) -> int:
    with server.client() as client: return sum("t" in each["flags"] for each in client.client_list())


@pytest.mark.redis
def test_everything_that_happens_to_an_entry_is_heard(redis_server: Server, noted: Noted) -> None:
    store, notes = noted(redis_server.url)
    assert notes.ready().told == [None] and notes.good == [False]                   # anything may have changed before it heard
    cli = ["redis-cli", "-p", str(redis_server.port)]
    with redis_server.client() as client:
        for _ in range(20):
            assert notes.after(lambda: client.set(KEY, "v"), KEY) < 1
            assert notes.after(lambda: client.delete(KEY), KEY) < 1
        client.set(KEY, "v"); client.set("else", "v")
        notes.after(lambda: subprocess.run([*cli, "UNLINK", KEY], check=True, capture_output=True), KEY)
        notes.after(lambda: subprocess.run([*cli, "SET", KEY, "v", "PX", "40"], check=True, capture_output=True), KEY)
        notes.after(lambda: time.sleep(0.03), KEY)                                  # it expires
        notes.after(lambda: client.rename("else", KEY), KEY)
        notes.after(lambda: drive(store.put_many(items(3))), keys(3)[2])
        notes.after(lambda: drive(store.delete(keys(3))), keys(3)[0])
        assert all(key.startswith("llm:") for told in notes.told for key in told or ())
        notes.after(client.flushdb, None); notes.after(client.flushall, None)
        notes.after(lambda: drive(store.put_many(items(2000))), keys(2000)[-1])


@pytest.mark.redis
def test_the_end_of_a_lease_is_heard_under_the_name_of_its_entry(redis_server: Server, noted: Noted) -> None:
    store, notes = noted(redis_server.url)
    notes.ready()
    drive(store.acquire([KEY], "a", 9))
    notes.after(lambda: drive(store.settle([], [KEY], "a")), KEY)
    drive(store.acquire([KEY], "a", 9))
    notes.after(lambda: drive(store.settle([Item(KEY, b"v", 9)], [KEY], "a")), KEY)
    time.sleep(0.05); assert [KEY] in notes.told                                    # once, though entry and lease were changed
    notes.told.clear()
    drive(store.acquire([KEY], "b", 9)); drive(store.settle([], [KEY], "b")); drive(store.renew([KEY], "b", 9)); time.sleep(0.05)
    drive(store.acquire(["llm:mine"], "b", 9)); drive(store.renew(["llm:mine"], "b", 9)); time.sleep(0.05)
    assert notes.told == []                                                         # nothing was given back


@pytest.mark.timed
@pytest.mark.redis
def test_the_end_of_a_lease_whose_owner_is_gone_is_heard_however_many_keys_the_server_has(redis_server: Server, noted: Noted) -> None:
    store, notes = noted(redis_server.url)
    with redis_server.client() as client:
        pipe = client.pipeline(transaction=False)
        for n in range(20_000): pipe.set(f"theirs:{n}", "v", ex=3600 + n)            # so Redis does not come by in time
        pipe.execute()
    notes.ready()
    for key in keys(20): drive(store.acquire([key], "gone", 0.3))
    drive(store.acquire(keys(19), "heir", 9))                                       # the last one is not waited for
    start = time.monotonic()
    for key in keys(19):
        until(lambda key=key: [key] in [told and [k] for told in notes.told for k in told or ()], "the end of a lease", 3)  # type: ignore[misc]
    assert time.monotonic() - start < 0.3 + 0.5
    assert drive(store.acquire(keys(19), "heir", 0.4)) == [(None, True)] * 19
    drive(store.acquire(keys(1), "third", 9)); drive(store.renew(keys(1), "heir", 9))
    notes.told.clear()
    until(lambda: [keys(1)[0]] in notes.told, "to be told", 3)                       # it was renewed: who asks learns how long
    assert drive(store.acquire(keys(1), "third", 9)) == [(None, False)]
    time.sleep(0.5); assert notes.told == [keys(1)]


@pytest.mark.redis
def test_only_entries_are_heard_and_new_kinds_as_soon_as_they_are_met(redis_server: Server, noted: Noted) -> None:
    store, notes = noted(redis_server.url)
    notes.ready()
    with redis_server.client() as client:
        notes.told.clear()
        for name in ("theirs", "llmm:x", "poem:x", "aurea:counts:x"): client.set(name, "v")
        drive(store.bump({"a": 1})); time.sleep(0.1)
        assert notes.told == []
        drive(store.get_many(["poem:x"]))
        assert not notes.hears()                                                    # a copy of it must not be trusted yet
        assert notes.ready(1).told == [None]
        notes.after(lambda: client.set("poem:x", "w"), "poem:x"); notes.after(lambda: client.set(KEY, "w"), KEY)
        drive(store.put_many([Item("song:x", b"v", 9)])); assert not notes.hears(); notes.ready()
        drive(store.acquire(["ode:x"], "a", 9)); assert not notes.hears(); notes.ready()
        notes.after(lambda: client.delete("song:x"), "song:x")
        drive(store.get_many(["no-kind"])); assert notes.hears()


@pytest.mark.redis
def test_a_listener_that_fails_hinders_nobody(redis_server: Server, noted: Noted, caplog: pytest.LogCaptureFixture) -> None:
    store, notes = noted(redis_server.url)
    def fail(keys: Sequence[str] | None) -> None: raise ZeroDivisionError
    assert (ears := store.ears())
    ears.listen(fail)
    also = Notes(ears)
    notes.ready()
    with redis_server.client() as client: also.after(lambda: notes.after(lambda: client.set(KEY, 1), KEY), KEY)
    assert trackers(redis_server) == 1 and "ZeroDivisionError" in caplog.text


@pytest.mark.redis
@pytest.mark.usefixtures("alone")
def test_there_is_a_thread_while_somebody_listens(redis_server: Server, opened: Open) -> None:
    def threads() -> list[str]: return [thread.name for thread in threading.enumerate() if thread.name == "aurea-ears"]
    store = opened(redis_server.url)
    ears = store.ears()
    assert ears and store.ears() is ears and ears.until() < time.monotonic() and not threads() and connections(redis_server) == 0
    first, second = Notes(ears).ready(), Notes(ears).ready()
    assert len(threads()) == 1 and trackers(redis_server) == 1
    first.stop(); first.stop(); time.sleep(0.3)                                     # twice is once
    assert len(threads()) == 1
    second.stop()
    assert not second.hears()
    drive(store.shut())
    assert not threads() and not connections(redis_server)
    third = Notes(ears).ready()
    drive(store.shut())
    assert not third.hears() and not threads() and connections(redis_server) == 0
    asyncio.run(adrive(store.shut()))
    drive(store.get_many([KEY]))                                                    # used again: heard again
    third.ready(2)
    with redis_server.client() as client: third.after(lambda: client.set(KEY, 1), KEY)
    third.stop(); asyncio.run(adrive(store.shut()))
    assert not threads() and connections(redis_server) == 0


@pytest.mark.timed
@pytest.mark.redis
def test_deaf_while_the_server_hangs_and_told_so_before_hearing_again(own_redis: Server, noted: Noted) -> None:
    _, notes = noted(own_redis.url)
    with own_redis.client() as client: notes.ready().after(lambda: client.set(KEY, 1), KEY)
    own_redis.pause(); start = time.monotonic()
    notes.told.clear()
    until(lambda: not notes.hears(), "the ears to be deaf", 3)
    assert time.monotonic() - start < 1.1
    notes.after(lambda: None, None)                                                 # the connection is given up, and who waits is told
    time.sleep(0.5)
    notes.told.clear(); notes.good.clear()
    own_redis.resume()
    notes.ready(3)
    assert notes.told[0] is None and notes.good[0] is False
    with own_redis.client() as client: notes.after(lambda: client.set(KEY, 2), KEY)
    until(lambda: trackers(own_redis) == 1, "one connection")


@pytest.mark.redis
def test_deaf_at_once_when_the_server_is_gone_and_well_when_it_is_back(own_redis: Server, noted: Noted) -> None:
    store, notes = noted(own_redis.url)
    for _ in range(2):
        notes.ready(); own_redis.kill()
        until(lambda: not notes.hears(), "the ears to be deaf", 1)
        time.sleep(0.5); assert not notes.hears()
        notes.told.clear(); notes.good.clear()
        own_redis.start(); notes.ready(3)
        assert notes.told == [None] and notes.good == [False]
        with own_redis.client() as client: notes.after(lambda: client.set(KEY, 1), KEY)
    with own_redis.client() as client: client.client_kill_filter(_type="normal", skipme=True)
    notes.after(lambda: None, None); notes.ready()                                  # only the connection was lost
    assert drive(store.get_many([KEY])) == [b"1"]


@pytest.mark.redis
def test_the_ears_begin_before_the_server_does(own_redis: Server, noted: Noted) -> None:
    own_redis.kill()
    _, notes = noted(own_redis.url)
    time.sleep(0.3); assert not notes.hears() and notes.told == []
    own_redis.start(); notes.ready(3)
    assert notes.told == [None]


@pytest.mark.redis
def test_a_server_that_does_not_tell(tmp_path: Path, noted: Noted, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "aurea_orchestrator")
    with standalone(tmp_path / "old") as server:
        with server.client() as client:
            client.execute_command("ACL", "SETUSER", "default", "-client|tracking")
        store, notes = noted(server.url)
        until(lambda: "cannot be heard" in caplog.text, "the refusal")
        time.sleep(0.5)
        assert not notes.hears() and caplog.text.count("cannot be heard") == 1 and connections(server) == 0
        drive(store.put_many(items(1)))
        assert drive(store.get_many(keys(1))) == blobs(1) and not notes.hears()


@pytest.mark.redis
def test_a_no_is_not_for_ever(tmp_path: Path, noted: Noted, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level("INFO", "aurea_orchestrator")
    monkeypatch.setattr(tracking, "_REFUSED", 0.3)
    with standalone(tmp_path / "strict") as server, server.client() as client:
        client.execute_command("ACL", "SETUSER", "default", "-client|tracking")
        _, notes = noted(server.url)
        until(lambda: "cannot be heard" in caplog.text, "the refusal")
        time.sleep(1); assert not notes.hears() and caplog.text.count("cannot be heard") == 1  # told once, though asked again
        client.execute_command("ACL", "SETUSER", "default", "+client|tracking")
        notes.ready(3).after(lambda: client.set(KEY, 1), KEY)


@pytest.mark.redis
def test_a_slow_script_is_no_refusal(tmp_path: Path, noted: Noted, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "aurea_orchestrator")
    with standalone(tmp_path / "busy", "--lua-time-limit", "50") as server, server.client() as client:
        store, notes = noted(server.url)
        notes.ready()
        def run() -> None:
            with server.client() as theirs, suppress(redis.ResponseError): theirs.eval("while true do end", 0)
        script = threading.Thread(target=run)
        script.start()
        until(lambda: not notes.hears(), "the ears to be deaf", 5)
        with pytest.raises(StoreUnavailableError, match="BUSY"): drive(store.get_many([KEY]))
        time.sleep(1.5)                                                             # the ears have come again meanwhile, and were told so
        client.script_kill(); script.join()
        notes.ready(5).after(lambda: client.set(KEY, 1), KEY)
        assert "cannot be heard" not in caplog.text and drive(store.get_many([KEY])) == [b"1"]


@pytest.mark.redis
def test_what_stands_beside_entries_is_no_new_kind(redis_server: Server, noted: Noted) -> None:
    store, notes = noted(redis_server.url)
    notes.ready().told.clear()
    drive(store.put_many([Item("aurea:probe", b"v", 9)])); drive(store.get_many(["aurea:probe"])); assert notes.hears()
    time.sleep(0.3)
    with redis_server.client() as client: notes.after(lambda: client.set(KEY, 1), KEY)
    assert notes.hears() and None not in notes.told


@pytest.mark.redis
def test_no_room_for_a_thread_that_listens(redis_server: Server, noted: Noted, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as full:
        no_room_for(full, "aurea-ears")
        store, notes = noted(redis_server.url)
        assert drive(store.get_many([KEY])) == [None] and not notes.hears()
    drive(store.get_many([KEY])); notes.ready()


def test_no_ears_with_a_client_of_ones_own() -> None:
    server = FakeServer()
    assert RedisStore("redis://nowhere", connect=(lambda: FakeRedis(server=server), lambda: FakeAsyncRedis(server=server))).ears() is None


@pytest.mark.redis
@pytest.mark.skipif(sys.platform == "win32", reason="no fork there")
def test_a_child_has_ears_of_its_own(redis_server: Server) -> None:
    script = """
    import os, sys, time
    from aurea_orchestrator.effects import drive
    from aurea_orchestrator.stores.redis import RedisStore
    store = RedisStore(sys.argv[1], timeout=5); ears = store.ears(); told = []
    stop = ears.listen(lambda keys: told.append(keys))
    def ready():
        end = time.monotonic() + 5
        while ears.until() < time.monotonic(): assert time.monotonic() < end; time.sleep(0.01)
    def hears(key):
        ready(); other.get(key); drive(RedisStore.put_many(other_store, [Item(key, b"v", 9)]))
        end = time.monotonic() + 5
        while [key] not in told: assert time.monotonic() < end, told; time.sleep(0.01)
    from aurea_orchestrator.stores.base import Item
    other, other_store = {}, RedisStore(sys.argv[1], timeout=5)
    hears("llm:1")
    if not (pid := os.fork()):
        try:
            assert ears.until() < time.monotonic()
            told.clear(); drive(store.get_many(["llm:1"])); hears("llm:2"); assert told[0] is None
            stop(); drive(store.shut()); drive(other_store.shut()); os._exit(0)
        except BaseException as error: print(repr(error), file=sys.stderr); os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    hears("llm:3"); stop(); drive(store.shut()); drive(other_store.shut()); print("both")
    """
    done = subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(script), redis_server.url], capture_output=True, text=True,
                          timeout=60, cwd=Path(__file__).parent.parent)
    assert (done.stdout.strip(), done.stderr) == ("both", "")


@pytest.mark.redis
def test_a_script_that_ends_while_it_listens(redis_server: Server) -> None:
    script = """
    import asyncio, sys, time
    from aurea_orchestrator.effects import adrive
    from aurea_orchestrator.stores.redis import RedisStore
    store = RedisStore(sys.argv[1]); ears = store.ears(); ears.listen(lambda keys: None)
    async def main():
        while ears.until() < time.monotonic(): await asyncio.sleep(0.01)
        await adrive(store.get_many(["llm:1"]))
    asyncio.run(main()); print("ended")
    """
    done = subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(script), redis_server.url], capture_output=True, text=True,
                          timeout=60, cwd=Path(__file__).parent.parent)
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("ended", "", 0)


@pytest.mark.redis
def test_ears_of_every_address(tmp_path: Path, redis_server: Server, sentinels: Sentinels, noted: Noted) -> None:
    _, notes = noted(f"unix://{redis_server.socket}")
    with redis_server.client() as client: notes.ready().after(lambda: client.set(KEY, 1), KEY)
    _, notes = noted(sentinels.url)
    with sentinels.primary.client() as client: notes.ready().after(lambda: client.set(KEY, 1), KEY)
    with standalone(tmp_path / "tls", tls=True, password="p@ss") as server:
        _, notes = noted(f"rediss://:p%40ss@127.0.0.1:{server.port}/0?ssl_ca_certs={server.ca}")
        with server.client() as client:
            for _ in range(20): notes.ready().after(lambda: client.set(KEY, 1), KEY)


@pytest.mark.redis
def test_ears_of_a_cluster(cluster: Cluster, noted: Noted) -> None:
    store, notes = noted(cluster.url)
    notes.ready()
    for key in keys(30): notes.after(lambda key=key: drive(store.put_many([Item(key, b"v", 9)])), key)  # type: ignore[misc]
    drive(store.acquire(keys(30), "a", 9, force=True))
    for key in keys(30): notes.after(lambda key=key: drive(store.settle([], [key], "a")), key)          # type: ignore[misc]
    time.sleep(2.5); assert notes.hears()                                           # the map is looked at now and then
    assert [trackers(server) for server in cluster.servers[:3]] == [1, 1, 1]


@pytest.mark.timed
@pytest.mark.redis
@pytest.mark.slow
@pytest.mark.parametrize("house", [Sentinels, Cluster])
def test_ears_after_a_failover(tmp_path: Path, noted: Noted, house: Any) -> None:
    servers = house(tmp_path)
    try:
        store, notes = noted(servers.url)
        notes.ready(); notes.told.clear(); notes.good.clear()
        servers.servers[0].pause(); start = time.monotonic()
        until(lambda: not notes.hears(), "the ears to be deaf", 3)
        assert time.monotonic() - start < 1.1
        notes.ready(20)
        assert notes.told[0] is None and (None, False) in zip(notes.told, notes.good)  # at the latest when deaf
        for key in keys(30):
            until(lambda key=key: drive(store.get_many([key])) == [None], "the new primary")  # type: ignore[misc]
            notes.after(lambda key=key: drive(store.put_many([Item(key, b"v", 9)])), key)  # type: ignore[misc]
    finally: servers.kill()


# ---- behind the guard -------------------------------------------------------------------------------------------------

@pytest.mark.timed
@pytest.mark.redis
def test_the_guard_lets_leases_through(own_redis: Server, opened: Open) -> None:
    store = Guarded(inner := opened(own_redis.url, timeout=0.3), probe=0.05)
    assert store.ears() is inner.ears() and (ears := store.ears()) is not None
    notes = Notes(ears).ready()
    assert drive(store.acquire([KEY], "a", 9)) == [(None, True)] and drive(store.acquire([KEY], "b", 9)) == [(None, False)]
    drive(store.renew([KEY], "a", 90)); drive(store.settle([Item(KEY, b"v", 60)], [KEY], "a"))
    assert drive(store.acquire([KEY], "b", 9)) == [(b"v", False)]
    own_redis.pause()
    with pytest.raises(StoreTimeoutError): drive(store.settle([], [KEY], "a"))      # writing
    with pytest.raises(StoreUnavailableError): drive(store.get_many([KEY]))         # and no lookup has to find out for itself
    start = time.monotonic()
    for _ in range(100):
        for flow in (store.acquire([KEY], "a", 9), store.renew([KEY], "a", 9), store.settle([], [KEY], "a")):
            with pytest.raises(StoreUnavailableError): drive(flow)
    assert time.monotonic() - start < 0.2
    own_redis.resume()
    until(lambda: store.trouble is None, "the store to be back")
    assert drive(store.acquire([KEY], "b", 9, force=True)) == [(b"v", True)]
    with own_redis.client() as client: notes.ready().after(lambda: client.set(KEY, 1), KEY)  # and so are the ears, though the probe wrote something
    notes.stop(); drive(store.shut())


@pytest.mark.redis
@pytest.mark.parametrize("harm", ["pause", "kill"])
def test_memory_serves_again_after_an_outage(own_redis: Server, harm: str) -> None:
    cache = Cache.from_url(own_redis.url, timeout=0.25)

    @cache_llm_response(cache=cache)
    def ask(prompt: str) -> str: return prompt[::-1]

    def from_memory() -> bool:
        before = calls(own_redis).get("get", 0)
        assert {ask("the same") for _ in range(20)} == {"emas eht"}
        return calls(own_redis).get("get", 0) == before

    until(from_memory, "memory to serve")
    for n in range(2):
        getattr(own_redis, harm)()
        assert ask(f"meanwhile {n}") == f"{n} elihwnaem"
        own_redis.resume() if harm == "pause" else own_redis.start()
        until(lambda: cache.store.trouble is None, "the store to be back")           # its probe has written something
        until(from_memory, "memory to serve again", 5)
    cache.close()


class Moody(MemoryStore):
    "A store that is there, or not."

    up = True

    def ping(self) -> Any:
        if not self.up: raise StoreUnavailableError("connection refused")
        return (yield from super().ping())

    def get_many(self, keys: Sequence[str]) -> Any:
        yield from self.ping()
        return (yield from super().get_many(keys))


def test_no_room_for_a_thread_that_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Guarded(moody := Moody(), probe=0.02)
    moody.up = False
    with monkeypatch.context() as full:
        no_room_for(full, "aurea-probe")
        for _ in range(2):
            with pytest.raises(StoreUnavailableError, match="refused"): drive(store.get_many([KEY]))
    moody.up = True
    with pytest.raises(StoreUnavailableError): drive(store.get_many([KEY]))         # this one starts it
    until(lambda: store.trouble is None, "the store to be back", 5)
    assert drive(store.get_many([KEY])) == [None]
    drive(store.shut())


@pytest.mark.skipif(sys.platform == "win32", reason="no fork there")
@pytest.mark.parametrize("asked", [True, False])
def test_a_child_that_is_forked_in_trouble_finds_its_end(asked: bool) -> None:
    store = Guarded(moody := Moody(), probe=0.02)
    moody.up = False
    with pytest.raises(StoreUnavailableError): drive(store.get_many([KEY]))
    child = os.fork()
    moody.up = True
    if not child:
        try:
            if asked:
                with pytest.raises(StoreUnavailableError): drive(store.get_many([KEY]))
            until(lambda: store.trouble is None, "the store to be back", 5)
            assert drive(store.get_many([KEY])) == [None]
            os._exit(0)
        finally: os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    until(lambda: store.trouble is None, "the store to be back", 5)
    drive(store.shut())


def test_where_nothing_can_be_written_everybody_computes() -> None:
    class Locked(MemoryStore):
        apart = True

        def delete(self, keys: Sequence[str]) -> Any:
            raise StoreTimeoutError("locked"); yield

        def acquire(self, keys: Sequence[str], token: str, ttl: float, force: bool = False) -> Any:
            raise AssertionError("asked for a lease where none can be had"); yield

    drive((inner := Locked()).put_many([Item("k", b"v", 60)]))
    store = Guarded(inner, probe=30)
    with pytest.raises(StoreTimeoutError): drive(store.delete(["k"]))
    assert drive(store.acquire(["k", "l"], "a", 9)) == [(b"v", False), (None, True)]
    drive(store.shut())
