"""The Redis store against real servers: what a cache meets when Redis, the network, a loop or a process ends at the wrong moment."""
from __future__ import annotations

import asyncio
import gc
import math
import random
import socket
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from aurea_orchestrator.effects import adrive, drive
from aurea_orchestrator.errors import ConfigError, StoreError, StoreTimeoutError, StoreUnavailableError
from aurea_orchestrator.stores import wire
from aurea_orchestrator.stores.base import Item, Store
from aurea_orchestrator.stores.redis import RedisStore
from tests.servers import Cluster, Proxy, Sentinels, Server, standalone

Open = Callable[..., RedisStore]


@pytest.fixture
def opened() -> Iterator[Open]:
    "Stores that are shut after the test."
    stores: list[RedisStore] = []

    def make(url: str, **how: Any) -> RedisStore:
        stores.append(RedisStore(url, **{"timeout": 2.0, **how}))
        return stores[-1]

    yield make
    for store in stores: drive(store.shut())


def keys(n: int, kind: str = "llm") -> list[str]: return [f"{kind}:{i:064x}" for i in range(n)]
def items(n: int, kind: str = "llm", ttl: float = 60) -> list[Item]: return [Item(key, key.encode(), ttl) for key in keys(n, kind)]
def blobs(n: int, kind: str = "llm") -> list[bytes]: return [key.encode() for key in keys(n, kind)]


def scanned(store: Store, prefix: str, limit: int = 1000) -> list[str]:
    found, cursor = list[str](), None
    while True:
        page = drive(store.scan(prefix, cursor, limit))
        found += page.keys
        if (cursor := page.cursor) is None: return found
        assert isinstance(cursor, str)


def calls(server: Server) -> dict[str, int]:
    "How often each command was called."
    with server.client() as client:
        return {name.removeprefix("cmdstat_"): facts["calls"] for name, facts in client.info("commandstats").items()}


def connections(server: Server) -> int:
    "Connections other than the one that asks."
    with server.client() as client: return len(client.client_list()) - 1


# ---- before anything is opened ----------------------------------------------------------------------------------------

def test_nothing_is_opened_at_construction_and_nothing_secret_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None: raise AssertionError("a socket was opened")
    monkeypatch.setattr(socket, "socket", refuse)
    for url in ("redis://me:s3cret@h:1/0", "rediss://me:s3cret@h/0", "unix://me:s3cret@/a.sock", "redis+sentinel://me:s3cret@a,b/main",
                "redis+cluster://me:s3cret@a,b"):
        store = RedisStore(url)
        assert "s3cret" not in f"{store!r} {store} {store.url}" and store.name == "redis"


@pytest.mark.parametrize("how", [{"timeout": 0}, {"timeout": -1}, {"timeout": math.nan}, {"max_connections": 0}])
def test_options_that_cannot_work(how: dict[str, Any]) -> None:
    with pytest.raises(ConfigError): RedisStore("redis://", **how)


# ---- every way in -----------------------------------------------------------------------------------------------------

async def both_ways(store: RedisStore) -> None:
    "The same work by blocking and by awaiting."
    drive(store.put_many(items(3)))
    await adrive(store.put_many(items(3, "embedding")))
    assert await adrive(store.get_many(keys(4))) == [*blobs(3), None]
    assert drive(store.get_many(keys(4, "embedding"))) == [*blobs(3, "embedding"), None]
    assert drive(store.get_many(keys(1))) == await adrive(store.get_many(keys(1))) == blobs(1)
    await adrive(store.bump({"a": 2, "b": 0.5}))
    drive(store.bump({"a": 1}))
    assert drive(store.counts()) == await adrive(store.counts()) == {"a": 3, "b": 0.5}
    assert sorted(scanned(store, "llm:")) == keys(3)
    page = await adrive(store.scan("embedding:"))
    found = page.keys
    while page.cursor:
        page = await adrive(store.scan("embedding:", page.cursor))
        found += page.keys
    assert sorted(found) == keys(3, "embedding")
    drive(store.ping()); await adrive(store.ping())
    assert drive(store.info())["server_bytes"] > 0 and (await adrive(store.info()))["server_bytes"] > 0
    assert await adrive(store.delete(keys(4))) == 3 and drive(store.delete(keys(4, "embedding"))) == 3
    assert drive(store.get_many(keys(3))) == [None] * 3
    assert drive(store.counts()) == {"a": 3, "b": 0.5}
    await adrive(store.shut())


@pytest.mark.redis
async def test_one_server(redis_url: str, opened: Open) -> None: await both_ways(opened(redis_url))


@pytest.mark.redis
async def test_unix_socket_and_database(redis_server: Server, opened: Open) -> None:
    store = opened(f"unix://{redis_server.socket}?db=3")
    await both_ways(store)
    drive(store.put_many(items(1)))
    with redis_server.client(db=3) as inside, redis_server.client() as beside:
        assert inside.dbsize() == 2 and beside.dbsize() == 0
    assert drive(opened(f"redis://127.0.0.1:{redis_server.port}/3").get_many(keys(1))) == blobs(1)


@pytest.mark.redis
async def test_a_password_of_special_characters(tmp_path: Path, opened: Open) -> None:
    with standalone(tmp_path / "pw", password="p@ss/w:rd?#%") as server:
        await both_ways(opened(f"redis://:p%40ss%2Fw%3Ard%3F%23%25@127.0.0.1:{server.port}/1"))
        with server.client() as client: client.execute_command("ACL", "SETUSER", "ann", "on", ">s3cret", "~*", "+@all")
        await both_ways(opened(f"redis://ann:s3cret@127.0.0.1:{server.port}/2"))
        for wrong in ("redis://:s3cret@", "redis://ann:wr0ng@", "redis://"):
            store = opened(f"{wrong}127.0.0.1:{server.port}/0")
            for way in (lambda s=store: asyncio.to_thread(drive, s.ping()), lambda s=store: adrive(s.get_many(keys(1)))):
                with pytest.raises(StoreUnavailableError, match="REDIS_PASSWORD") as caught: await way()
                assert "s3cret" not in str(caught.value) and "wr0ng" not in str(caught.value)
            await adrive(store.shut())


@pytest.mark.redis
async def test_tls(tmp_path: Path, opened: Open) -> None:
    with standalone(tmp_path / "tls", tls=True) as server:
        await both_ways(opened(f"{server.url}?ssl_ca_certs={server.ca}"))
        await both_ways(opened(f"{server.url[:-1]}1?ssl_cert_reqs=none"))
        store = opened(server.url)
        with pytest.raises(StoreUnavailableError, match="(?i)certificate"): drive(store.ping())
        with pytest.raises(StoreUnavailableError, match="(?i)certificate"): await adrive(store.ping())
        await adrive(store.shut())


@pytest.mark.redis
async def test_sentinels(sentinels: Sentinels, opened: Open) -> None:
    await both_ways(opened(sentinels.url))
    store = opened(sentinels.url + "?db=5")
    await both_ways(store)
    drive(store.put_many(items(1)))
    with sentinels.primary.client(db=5) as client: assert client.dbsize() == 2
    unknown = opened(sentinels.url.replace("/main", "/nobody"))
    with pytest.raises(StoreUnavailableError, match="nobody"): drive(unknown.ping())


@pytest.mark.redis
async def test_a_replica_says_that_it_is_one(sentinels: Sentinels, opened: Open) -> None:
    store = opened(sentinels.replica.url)
    for way in (lambda: asyncio.to_thread(drive, store.put_many(items(1))), lambda: adrive(store.put_many(items(2)))):
        with pytest.raises(StoreError, match="redis\\+sentinel"): await way()
    await adrive(store.shut())


@pytest.mark.redis
async def test_cluster(cluster: Cluster, opened: Open) -> None:
    store = opened(cluster.url)
    await both_ways(store)
    drive(store.put_many(items(400)))
    await adrive(store.put_many(items(400, "embedding")))
    sizes = []
    for server in cluster.servers[:3]:
        with server.client() as client: sizes.append(client.dbsize())
    assert min(sizes) > 200                                                       # so all of it has crossed slots and nodes
    assert drive(store.get_many(keys(401))) == await adrive(store.get_many(keys(401))) == [*blobs(400), None]
    assert await asyncio.gather(*(adrive(store.get_many([key])) for key in keys(100))) == [[blob] for blob in blobs(100)]
    assert sorted(set(scanned(store, "llm:", limit=50))) == keys(400)
    assert drive(store.delete(scanned(store, "llm:"))) == 400
    assert await adrive(store.delete(keys(500, "embedding"))) == 400
    assert scanned(store, "") == ["aurea:counts"]
    await adrive(store.shut())


@pytest.mark.timed
@pytest.mark.redis
@pytest.mark.slow
async def test_a_dead_node_of_a_cluster_costs_a_few_timeouts_not_one_for_each_key(tmp_path: Path, opened: Open) -> None:
    house = Cluster(tmp_path, replicas=False)
    try:
        store = opened(house.url, timeout=0.3)
        drive(store.put_many(items(200)))
        await adrive(store.get_many(keys(200)))
        house.servers[1].pause()
        for way in (lambda: asyncio.to_thread(drive, store.get_many(keys(200))), lambda: adrive(store.get_many(keys(200)))):
            start = time.monotonic()
            with pytest.raises(StoreError): await way()
            assert time.monotonic() - start < 3                                   # 200 keys, a third of them there, would be 20 s
        await adrive(store.shut())
    finally: house.kill()


@pytest.mark.redis
@pytest.mark.slow
@pytest.mark.parametrize("house", [Sentinels, Cluster])
async def test_failover(tmp_path: Path, opened: Open, house: Any) -> None:
    servers = house(tmp_path)
    try:
        store = opened(servers.url, timeout=0.4)
        drive(store.put_many(items(100))); await adrive(store.get_many(keys(100)))
        for server in servers.servers[:3 if house is Cluster else 1]:
            with server.client() as client: client.wait(1, 1000)                  # it has a copy
        servers.servers[0].pause()                                                # the worst kind of failure: it hangs

        async def again(way: Callable[[], Any]) -> None:
            end = time.monotonic() + 20
            while True:
                try: return await way()
                except StoreError:
                    if time.monotonic() > end: raise
                    await asyncio.sleep(0.1)

        for n in range(2):
            await again(lambda: adrive(store.put_many(items(100, "new"))))
            await again(lambda: asyncio.to_thread(drive, store.put_many(items(100, "new"))))
            assert await adrive(store.get_many(keys(100))) == drive(store.get_many(keys(100))) == blobs(100), n
        assert sorted(set(scanned(store, "new:"))) == keys(100, "new")
        await adrive(store.shut())
    finally: servers.kill()


# ---- entries ----------------------------------------------------------------------------------------------------------

@pytest.mark.redis
async def test_lookups_that_meet_are_one_mget_and_a_lone_one_is_a_get(redis_server: Server, opened: Open) -> None:
    store = opened(redis_server.url)
    await adrive(store.put_many(items(100)))
    with redis_server.client() as client: client.config_resetstat()
    assert await asyncio.gather(*(adrive(store.get_many([key])) for key in keys(100))) == [[blob] for blob in blobs(100)]
    assert (seen := calls(redis_server))["mget"] == 1 and "get" not in seen
    assert await adrive(store.get_many(keys(1))) == drive(store.get_many(keys(1))) == blobs(1)
    assert drive(store.get_many(keys(7))) == blobs(7)
    assert (seen := calls(redis_server))["get"] == 2 and seen["mget"] == 2
    await asyncio.gather(*(adrive(store.put_many([item])) for item in items(50)))
    assert connections(redis_server) <= 2                                         # one for the thread, one for the loop: they went together
    await adrive(store.shut())


@pytest.mark.redis
def test_nothing_is_asked_when_nothing_is_wanted(redis_server: Server, opened: Open) -> None:
    store = opened(redis_server.url)
    assert drive(store.get_many([])) == [] and drive(store.delete([])) == 0
    drive(store.put_many([])); drive(store.bump({}))
    assert connections(redis_server) == 0


# ---- what is much is done in parts ------------------------------------------------------------------------------------

WIDE = 12_288  # bytes: 1,536 numbers of 8


@pytest.fixture
def exchanges(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int]]:
    "What was said at once: the commands, and how many bytes they were."
    said, really = list[tuple[list[str], int]](), wire.packed

    def packed(commands: Any) -> bytes:
        data = really(commands)
        said.append(([command[0] for command in commands], len(data)))
        return data

    monkeypatch.setattr(wire, "packed", packed)
    return said


@pytest.mark.redis
@pytest.mark.parametrize("awaited", [False, True])
async def test_every_verb_takes_what_is_much_in_parts(redis_server: Server, opened: Open, exchanges: Any, awaited: bool) -> None:
    async def done(flow: Any) -> Any: return await adrive(flow) if awaited else drive(flow)
    async def said(flow: Any) -> list[int]:
        "How many commands there were in each exchange."
        exchanges.clear(); await done(flow)
        return [len(commands) for commands, _ in exchanges]

    store, names = opened(redis_server.url), keys(2500)
    many, wide = items(2500), [Item(key, bytes(WIDE), 60) for key in names]
    await done(store.acquire(["llm:once"], "me", 9))                                # the server knows the scripts from now on
    await done(store.settle([], ["llm:once"], "me")); await done(store.renew(names[:1], "me", 9))
    assert await said(store.put_many(many)) == [1001, 1001, 501] and await said(store.put_many(many[:1000])) == [1001]  # and one ends leases
    exchanges.clear()
    assert await done(store.get_many(names)) == blobs(2500)
    assert [commands for commands, _ in exchanges] == [["MGET"]] * 3
    assert await said(store.get_many(names[:1000])) == [1]
    assert await said(store.acquire(names, "me", 9, True)) == await said(store.renew(names, "me", 9)) == [1000, 1000, 500]
    assert await said(store.mark(dict.fromkeys(names, 1))) == [1000, 1000, 501]
    assert await said(store.settle(many[:400], names[:400], "me")) == [400]         # the usual case stays one exchange
    assert await said(store.settle(wide, names, "me")) == [250] * 10
    assert {command for commands, _ in exchanges for command in commands} == {"EVALSHA"}  # an entry and the end of its lease are one thing
    assert all(size < 9_000_000 for _, size in exchanges)
    with redis_server.client() as client: assert not client.keys("aurea:lease:*")
    assert await said(store.put_many(wide)) == [251] * 10
    assert await done(store.get_many(names)) == [bytes(WIDE)] * 2500
    assert await said(store.put_many([Item(names[0], bytes(1 << 23), 60)] * 2)) == [2, 2]
    assert await said(store.delete(names)) == [2, 2, 2]                             # the entries, and their leases
    await adrive(store.shut())


@pytest.mark.redis
async def test_those_who_store_at_once_do_not_make_one_large_exchange(redis_server: Server, opened: Open, exchanges: Any) -> None:
    store = opened(redis_server.url, timeout=5)
    await adrive(store.ping()); exchanges.clear()
    await asyncio.gather(*(adrive(store.put_many([Item(key, bytes(WIDE), 60)])) for key in keys(1000)))
    assert [len(commands) for commands, _ in exchanges] == [400] * 5                # each an entry, and the end of its lease
    await adrive(store.shut())


@pytest.mark.redis
async def test_each_part_has_a_time_of_its_own(redis_server: Server, opened: Open) -> None:
    proxy = Proxy(redis_server.port)
    proxy.delay = 0.6
    try:
        store = opened(f"redis://127.0.0.1:{proxy.port}/0", timeout=1.5)
        for way in (lambda flow: asyncio.to_thread(drive, flow), adrive):
            await way(store.put_many(items(3500)))
            start = time.monotonic()
            assert await way(store.get_many(keys(3500))) == blobs(3500)
            assert time.monotonic() - start > 1.5                                   # all of them would have come too late
        await adrive(store.shut())
    finally: proxy.close()


# ---- what is found ----------------------------------------------------------------------------------------------------

@pytest.mark.redis
def test_scan_finds_exactly_what_begins_with_the_prefix(redis_server: Server, opened: Open) -> None:
    store = opened(redis_server.url)
    for prefix in ("llm:", "l?m:", "ll[m]:", "llm*", "a\\b:", "^:", "[a-z]:", "", "{x}:"):
        drive(store.put_many([Item(f"{prefix}{n}", b"", 60) for n in range(3)]))
    with redis_server.client() as client: client.set(b"llm:\xff\xfe", b"")         # a foreign key that is no text
    assert sorted(scanned(store, "l?m:")) == [f"l?m:{n}" for n in range(3)]
    assert sorted(scanned(store, "[a-z]:")) == [f"[a-z]:{n}" for n in range(3)]
    assert sorted(scanned(store, "a\\b:")) == [f"a\\b:{n}" for n in range(3)]
    assert sorted(scanned(store, "llm")) == sorted(f"llm{c}{n}" for c in ":*" for n in range(3))
    assert drive(store.delete(scanned(store, "ll[m]:"))) == 3 and len(scanned(store, "")) == 24


@pytest.mark.redis
def test_scan_of_many_pages_finds_all(redis_server: Server, opened: Open) -> None:
    store = opened(redis_server.url)
    drive(store.put_many(items(2500)))
    drive(store.put_many(items(2500, "other")))
    assert sorted(set(scanned(store, "llm:", limit=100))) == keys(2500)
    assert drive(store.delete(keys(3000))) == 2500 and drive(store.get_many(keys(2, "other"))) == blobs(2, "other")


@pytest.mark.redis
async def test_a_foreign_type_under_our_key_is_a_miss_and_is_replaced(redis_server: Server, opened: Open) -> None:
    store = opened(redis_server.url)
    with redis_server.client() as client: client.rpush(keys(1)[0], "a list")
    drive(store.put_many(items(2)[1:]))
    assert drive(store.get_many(keys(1))) == await adrive(store.get_many(keys(1))) == [None]
    assert drive(store.get_many(keys(2))) == [None, blobs(2)[1]]
    drive(store.put_many(items(1)))
    assert drive(store.get_many(keys(2))) == blobs(2)
    with redis_server.client() as client: client.set("aurea:counts", "not a hash")
    with pytest.raises(StoreError, match="refused: WRONGTYPE"): drive(store.bump({"a": 1}))
    await adrive(store.shut())


@pytest.mark.redis
def test_time_to_live(redis_server: Server, opened: Open) -> None:
    store = opened(redis_server.url)
    lives = [0.0001, 0.05, 1.5, 60, 1e9, 1e300, math.inf]
    drive(store.put_many([Item(f"llm:{n}", b"x", ttl) for n, ttl in enumerate(lives)]))
    with redis_server.client() as client:
        assert 1000 < client.pttl("llm:2") <= 1500 and 59_000 < client.pttl("llm:3") <= 60_000
        assert all(client.pttl(f"llm:{n}") > 10**11 for n in (4, 5, 6))
    time.sleep(0.1)
    assert drive(store.get_many(["llm:0", "llm:1", "llm:2"])) == [None, None, b"x"]


@pytest.mark.redis
def test_counts_of_many_threads_are_exact(redis_server: Server, opened: Open) -> None:
    store = opened(redis_server.url, timeout=10)
    big = 2**52
    with ThreadPoolExecutor(16) as pool: list(pool.map(lambda _: drive(store.bump({"n": 1, "big": big // 256, "cost": 0.1})), range(256)))
    assert drive(store.counts()) == {"n": 256, "big": big, "cost": pytest.approx(25.6)}


@pytest.mark.redis
def test_a_full_server(own_redis: Server, opened: Open) -> None:
    store = opened(own_redis.url)
    with own_redis.client() as client: client.config_set("maxmemory", "1")
    with pytest.raises(StoreError, match="maxmemory-policy"): drive(store.put_many([Item("llm:a", b"secret answer", 60)]))
    with pytest.raises(StoreError, match="maxmemory-policy"): drive(store.put_many(items(5)))
    assert drive(store.info())["max_bytes"] == 1


@pytest.mark.redis
def test_a_refusal_quotes_nothing_of_the_entry(tmp_path: Path, opened: Open) -> None:
    with standalone(tmp_path / "old", "--rename-command", "SET", "") as server:
        blob = b"".join([b"sec", b"ret"])                                         # so that it is in no line of this file
        with pytest.raises(StoreError) as caught: drive(opened(server.url).put_many([Item("llm:a", blob, 60)]))
        assert "'SET'" in str(caught.value) and blob.decode() not in "".join(traceback.format_exception(caught.value))


# ---- loops, threads, processes ----------------------------------------------------------------------------------------

def run(script: str, *args: str) -> str:
    "A process of its own, in which every warning is an error, and none may pass silently."
    done = process("-W", "error", "-c", textwrap.dedent(script), *args)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.strip()


def process(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parent.parent)


PRELUDE = """
import asyncio, gc, os, sys, threading
from aurea_orchestrator.effects import drive, adrive
from aurea_orchestrator.stores.redis import RedisStore
from aurea_orchestrator.stores.base import Item
store = RedisStore(sys.argv[1], timeout=5)
async def work(n):
    await adrive(store.put_many([Item(f"llm:{n}", b"%d" % n, 60)]))
    assert await asyncio.gather(*(adrive(store.get_many([f"llm:{n}"])) for _ in range(20))) == [[b"%d" % n]] * 20
"""


@pytest.mark.redis
def test_loops_one_after_another_leave_no_warning_and_no_connection(redis_server: Server) -> None:
    assert run(PRELUDE + """
for n in range(3):
    asyncio.run(work(n)); gc.collect()
    assert drive(store.get_many(["llm:0"])) == [b"0"]
print(len(drive(store.scan("llm:")).keys), len(store._sides.threads().opened()[0].client_list()))
drive(store.shut())
""", redis_server.url) == "3 2"                        # the connection of the threads, and that of the client that was asked


@pytest.mark.redis
def test_a_loop_that_is_only_closed_does_not_hinder_the_next(redis_server: Server) -> None:
    script = PRELUDE + """
for n in range(3):
    loop = asyncio.new_event_loop(); loop.run_until_complete(work(n)); loop.close()
asyncio.run(work(9)); gc.collect()
print(len(store._sides._seats))
"""
    done = process("-c", script, redis_server.url)
    assert (done.stdout.strip(), done.stderr) == ("0", "")                         # with the warnings that Python shows by default: none


@pytest.mark.redis
def test_a_store_that_is_dropped_on_a_running_loop_closes_its_connections(redis_server: Server) -> None:
    assert run(PRELUDE + """
async def main():
    global store
    await work(1)
    store = None
    for _ in range(20): gc.collect(); await asyncio.sleep(0.01)
    print("dropped")
asyncio.run(main())
""", redis_server.url) == "dropped"
    assert connections(redis_server) == 0


@pytest.mark.redis
def test_loops_in_threads_at_once(redis_server: Server) -> None:
    assert run(PRELUDE + """
failed = []
def loop(n):
    try:
        for m in range(5): asyncio.run(work(10 * n + m)); drive(store.get_many(["llm:0"]))
    except BaseException as error: failed.append(error)
threads = [threading.Thread(target=loop, args=(n,)) for n in range(6)]
[t.start() for t in threads]; [t.join() for t in threads]
gc.collect()
print(failed, len(drive(store.scan("llm:")).keys)); drive(store.shut())
""", redis_server.url) == "[] 30"


@pytest.mark.redis
def test_a_loop_that_ends_with_lookups_under_way(redis_server: Server) -> None:
    assert run(PRELUDE + """
async def main():
    await work(1)
    tasks = [asyncio.create_task(adrive(store.get_many(["llm:1"]))) for _ in range(5)]
    await asyncio.sleep(0)
asyncio.run(main()); asyncio.run(work(2)); gc.collect(); print("quiet")
""", redis_server.url) == "quiet"


@pytest.mark.redis
@pytest.mark.skipif(sys.platform == "win32", reason="no fork there")
def test_a_fork_after_use(redis_server: Server) -> None:
    assert run(PRELUDE + """
drive(store.put_many([Item("llm:parent", b"parent", 60)]))
asyncio.run(work(1))
async def main():
    await work(2)                                    # a loop is running and has connections
    children = []
    for n in range(4):
        if not (pid := os.fork()):
            try:
                assert drive(store.get_many(["llm:parent"])) == [b"parent"]
                asyncio.run(work(100 + n)); gc.collect()
                drive(store.shut())
                os._exit(0)
            except BaseException as error: print(error, file=sys.stderr); os._exit(1)
        children.append(pid)
        for _ in range(20): await work(3); assert drive(store.get_many(["llm:parent"])) == [b"parent"]
    return [os.waitpid(pid, 0)[1] for pid in children]
print(asyncio.run(main()), drive(store.get_many(["llm:parent", "llm:103"]))); drive(store.shut())
""", redis_server.url) == "[0, 0, 0, 0] [b'parent', b'103']"


@pytest.mark.redis
async def test_shut_and_use_again(redis_server: Server, opened: Open) -> None:
    store = opened(redis_server.url)
    for _ in range(3):
        await adrive(store.put_many(items(2))); drive(store.get_many(keys(2)))
        assert connections(redis_server) == 2
        await adrive(store.shut())
        assert connections(redis_server) == 0
    lookups = [asyncio.create_task(adrive(store.get_many([key]))) for key in keys(2)]
    await asyncio.sleep(0)
    await asyncio.gather(adrive(store.shut()), adrive(store.shut()))
    assert await asyncio.gather(*lookups) == [[blob] for blob in blobs(2)]         # what was under way is finished
    await adrive(store.shut())


# ---- cancellation -----------------------------------------------------------------------------------------------------

@pytest.mark.redis
async def test_a_cancelled_caller_harms_nobody_else(redis_server: Server, opened: Open) -> None:
    store = opened(redis_server.url)
    await adrive(store.put_many(items(10)))
    lookups = [asyncio.create_task(adrive(store.get_many([key]))) for key in keys(10)]
    await asyncio.sleep(0)
    for lookup in lookups[::2]: lookup.cancel()
    replies = await asyncio.gather(*lookups, return_exceptions=True)
    assert all(isinstance(reply, asyncio.CancelledError) for reply in replies[::2])
    assert replies[1::2] == [[blob] for blob in blobs(10)[1::2]]
    await adrive(store.shut())


@pytest.mark.redis
async def test_after_any_cancellation_every_reply_is_the_caller_s_own(redis_server: Server, opened: Open) -> None:
    store, chance = opened(redis_server.url, max_connections=4), random.Random(1)
    await adrive(store.put_many(items(200)))
    seat: Any = store._sides.seat()

    async def one(n: int) -> None:
        "By the shared way, or by a command of its own that is cancelled with its caller, wherever it is."
        if n % 2: assert await adrive(store.get_many([keys(200)[n]])) == [blobs(200)[n]]
        else: assert await seat.tell([("GET", keys(200)[n])]) == [blobs(200)[n]]

    for _ in range(60):
        tasks = [asyncio.create_task(one(chance.randrange(200))) for _ in range(20)]
        for _ in range(chance.randrange(12)): await asyncio.sleep(0)
        for task in chance.sample(tasks, 10): task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert not [error for error in done if error and not isinstance(error, asyncio.CancelledError)]
    await asyncio.gather(*(one(n) for n in range(200)))
    assert connections(redis_server) <= 4                                          # and none was lost on the way
    await adrive(store.shut())


@pytest.mark.redis
async def test_a_late_reply_is_nobody_s(own_redis: Server, opened: Open) -> None:
    store = opened(own_redis.url, timeout=0.2, max_connections=2)
    await adrive(store.put_many(items(9)))
    own_redis.pause()
    late = [adrive(store.get_many(keys(1))), adrive(store.get_many(keys(2))), asyncio.to_thread(drive, store.get_many(keys(1)))]
    assert [type(error) for error in await asyncio.gather(*late, return_exceptions=True)] == [StoreTimeoutError] * 3
    own_redis.resume()                                                             # now it answers what was asked before
    for n in range(9): assert await adrive(store.get_many([keys(9)[n]])) == drive(store.get_many([keys(9)[n]])) == [blobs(9)[n]]
    await adrive(store.shut())


# ---- when Redis is in trouble -----------------------------------------------------------------------------------------

@pytest.mark.timed
@pytest.mark.redis
async def test_a_server_that_hangs_costs_about_one_timeout(own_redis: Server, opened: Open) -> None:
    store = opened(own_redis.url, timeout=0.3, max_connections=4)
    await adrive(store.put_many(items(3))); drive(store.get_many(keys(1)))
    own_redis.pause()

    async def took(way: Any) -> float:
        start = time.monotonic()
        with pytest.raises(StoreTimeoutError, match="CACHE_TIMEOUT"): await way
        return time.monotonic() - start

    ways = [adrive(store.get_many(keys(1))), adrive(store.put_many(items(5))), adrive(store.bump({"a": 1})),
            asyncio.to_thread(drive, store.get_many(keys(1))), asyncio.to_thread(drive, store.put_many(items(5)))]
    alone = [await took(way) for way in ways]
    crowd = await asyncio.gather(*(took(adrive(store.bump({"a": 1}))) for _ in range(50)))  # 50 for 4 connections
    with ThreadPoolExecutor(20) as pool:
        inside = asyncio.get_running_loop().run_in_executor
        crowd += await asyncio.gather(*(took(inside(pool, lambda: drive(store.ping()))) for _ in range(20)))
    own_redis.resume()
    assert 0.1 < min(alone + crowd) and max(alone) < 0.6 and max(crowd) < 1.0
    assert await adrive(store.get_many(keys(3))) == drive(store.get_many(keys(3))) == blobs(3)
    await adrive(store.shut())


@pytest.mark.redis
async def test_a_loop_that_is_held_is_no_trouble_of_the_server(redis_server: Server, opened: Open) -> None:
    store = opened(redis_server.url, timeout=0.25)
    await adrive(store.put_many(items(20)))
    for seconds in (0.3, 0.6):
        asked = asyncio.gather(*(adrive(store.get_many([key])) for key in keys(20)))
        for _ in range(3): await asyncio.sleep(0)                                   # they are on their way
        time.sleep(seconds)  # noqa: ASYNC251                                           # anything that holds the loop: a tokenizer, a large JSON
        assert await asked == [[blob] for blob in blobs(20)]
    await adrive(store.shut())


@pytest.mark.timed
@pytest.mark.redis
async def test_a_server_that_is_gone_is_an_error_at_once_and_no_matter_when_it_is_back(own_redis: Server, opened: Open) -> None:
    store = opened(own_redis.url, timeout=5)
    for _ in range(2):
        await adrive(store.put_many(items(3))); drive(store.get_many(keys(3)))
        await asyncio.gather(*(adrive(store.bump({"a": 1})) for _ in range(8)))   # a few idle connections
        own_redis.kill()
        start = time.monotonic()
        with pytest.raises(StoreUnavailableError, match="cannot be reached"): await adrive(store.get_many(keys(1)))
        with pytest.raises(StoreUnavailableError, match="cannot be reached"): drive(store.put_many(items(2)))
        with pytest.raises(StoreUnavailableError, match="cannot be reached"):
            await asyncio.gather(*(adrive(store.get_many([key])) for key in keys(9)))
        assert time.monotonic() - start < 2
        own_redis.start()
    own_redis.restart()                                                            # unnoticed: every idle connection is dead
    assert await asyncio.gather(*(adrive(store.get_many([key])) for key in keys(3))) == [[None]] * 3
    assert drive(store.get_many(keys(1))) == [None]
    await asyncio.gather(*(adrive(store.bump({"a": 1})) for _ in range(20)))
    assert drive(store.counts()) == {"a": 20}
    await adrive(store.shut())


@pytest.mark.redis
async def test_callers_of_one_failed_lookup_have_an_error_of_their_own(own_redis: Server, opened: Open) -> None:
    store = opened(own_redis.url)
    own_redis.kill()
    errors: list[Any] = await asyncio.gather(*(adrive(store.get_many([key])) for key in keys(5)), return_exceptions=True)
    assert {type(error) for error in errors} == {StoreUnavailableError} and len({id(error) for error in errors}) == 5
    await adrive(store.shut())


@pytest.mark.redis
async def test_connections_are_bounded(redis_server: Server, opened: Open) -> None:
    store = opened(redis_server.url, timeout=20, max_connections=8)
    await asyncio.gather(*(adrive(store.bump({"a": 1})) for _ in range(1000)), *(adrive(store.get_many([key])) for key in keys(2000)))
    assert connections(redis_server) <= 8
    with ThreadPoolExecutor(40) as pool: list(pool.map(lambda _: drive(store.bump({"a": 1})), range(400)))
    assert connections(redis_server) <= 16
    assert drive(store.counts()) == {"a": 1400}
    await adrive(store.shut())


# ---- a server that breaks off -----------------------------------------------------------------------------------------

@asynccontextmanager
async def breaking() -> AsyncIterator[tuple[str, list[bytes]]]:
    "A server that hangs up on every command; what it was told."
    told: list[bytes] = []

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        told.append(await reader.read(65536))
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    async with server: yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0", told


async def test_a_broken_connection_is_tried_once_more_but_an_increment_is_not_repeated(opened: Open) -> None:
    async with breaking() as (url, told):
        store = opened(url)
        for verb, times in ((store.get_many(keys(1)), 2), (store.put_many(items(1)), 2), (store.put_many(items(2)), 2),
                            (store.bump({"a": 1}), 1), (store.bump({"a": 1, "b": 1}), 1)):
            told.clear()
            with pytest.raises(StoreUnavailableError): await adrive(verb)
            assert len(told) == times
        for verb, times in ((store.get_many(keys(1)), 2), (store.put_many(items(2)), 2), (store.bump({"a": 1}), 1)):
            told.clear()
            with pytest.raises(StoreUnavailableError): await asyncio.to_thread(drive, verb)
            assert len(told) == times
        await adrive(store.shut())


async def test_a_server_that_is_none_is_an_error_of_ours(opened: Open) -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain(); writer.close()

    async with await asyncio.start_server(babble, "127.0.0.1", 0) as server:
        store = opened(f"redis://:s3cret@127.0.0.1:{server.sockets[0].getsockname()[1]}/0")
        for way in (lambda: adrive(store.get_many(keys(1))), lambda: asyncio.to_thread(drive, store.get_many(keys(3)))):
            with pytest.raises(StoreError) as caught: await way()
            assert "s3cret" not in str(caught.value)
        await adrive(store.shut())
    gc.collect()


async def test_a_host_without_a_name(opened: Open) -> None:
    store = opened("redis://no-such-host.invalid:6379/0")
    with pytest.raises(StoreError, match="no-such-host"): await adrive(store.ping())
    with pytest.raises(StoreError, match="no-such-host"): await asyncio.to_thread(drive, store.ping())
    await adrive(store.shut())
