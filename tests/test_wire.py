"The wire: Redis's protocol cut anywhere, connections that are whole or closed, and the gathering of what meets."
from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.connection import Connection

from aurea_orchestrator.effects import adrive, drive
from aurea_orchestrator.errors import StoreUnavailableError
from aurea_orchestrator.gather import Gather
from aurea_orchestrator.stores.base import Item
from aurea_orchestrator.stores.redis import RedisStore
from aurea_orchestrator.stores.wire import limit, packed, replies
from tests.servers import Server


class Refusal(Exception):
    def __eq__(self, other: object) -> bool: return isinstance(other, Refusal) and self.args == other.args
    __hash__ = Exception.__hash__


WORDS = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=9)
REPLIES = st.recursive(
    st.none() | st.integers(-(1 << 63), (1 << 63) - 1) | st.binary(max_size=40) | WORDS | WORDS.map(Refusal),
    lambda inner: st.lists(inner, max_size=5), max_leaves=20)


def said(reply: Any) -> bytes:
    "As a server says it; text is a word."
    if reply is None: return b"$-1\r\n"
    if isinstance(reply, int): return b":%d\r\n" % reply
    if isinstance(reply, bytes): return b"$%d\r\n%b\r\n" % (len(reply), reply)
    if isinstance(reply, str): return b"+%b\r\n" % reply.encode()
    if isinstance(reply, Refusal): return b"-%b\r\n" % reply.args[0].encode()
    return b"*%d\r\n" % len(reply) + b"".join(map(said, reply))


def meant(reply: Any) -> Any: return reply.encode() if isinstance(reply, str) else list(map(meant, reply)) if isinstance(reply, list) else reply


def read(pieces: Iterator[bytes], count: int) -> Any:
    reading = replies(count, Refusal)
    next(reading)
    try:
        for piece in pieces: reading.send(piece)
    except StopIteration as end: return end.value
    raise AssertionError("it waits for more")


@given(st.lists(REPLIES, min_size=1, max_size=5), st.lists(st.integers(1, 30), min_size=1))
def test_replies_may_be_cut_anywhere(told: list[Any], sizes: list[int]) -> None:
    whole, at, pieces = b"".join(map(said, told)), 0, []
    while at < len(whole):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(whole[at:at + size]); at += size
    assert read(iter(pieces), len(told)) == read(iter([whole]), len(told)) == list(map(meant, told))


def test_a_null_array_and_a_deep_one() -> None:
    assert read(iter([b"*-1\r\n"]), 1) == [None]
    deep = read(iter([b"*1\r\n" * 5000 + b":1\r\n"]), 1)
    for _ in range(5000): [deep] = deep
    assert deep == [1]


@pytest.mark.parametrize("heard", [b"HTTP/1.1 200 OK\r\n", b"+OK\r\n+OK\r\n", b"$x\r\n", b"%1\r\n", b"\r\n"])
def test_what_is_no_reply_is_an_error(heard: bytes) -> None:
    with pytest.raises((ValueError, IndexError)): read(iter([heard]), 1)


@given(st.lists(st.lists(st.binary(max_size=20) | st.text(max_size=9) | st.integers() | st.floats(allow_nan=False), min_size=1, max_size=5).map(tuple),
                min_size=1, max_size=4))
def test_commands_are_packed_as_redis_py_packs_them(commands: list[Any]) -> None:
    commands = [("SET", *rest) for rest in commands]
    try: theirs = b"".join(b"".join(Connection().pack_command(*command)) for command in commands)
    except UnicodeEncodeError: return
    assert packed(commands) == theirs


# ---- gathering --------------------------------------------------------------------------------------------------------

async def test_one_and_many_meet_and_each_has_his_own() -> None:
    sent: list[Any] = []

    async def double(items: list[int]) -> list[int]:
        sent.append(list(items)); await asyncio.sleep(0)
        return [2 * item for item in items]

    gather = Gather(double, at_once=5)
    asked = [gather.one(1), gather.ask([2, 3]), gather.ask([]), gather.one(4), gather.ask([5, 6, 7]), gather.one(8)]
    asked[3].cancel()
    *others, gone = await asyncio.gather(*asked[:3], *asked[4:], asked[3], return_exceptions=True)
    assert others == [2, [4, 6], [], [10, 12, 14], 16] and isinstance(gone, asyncio.CancelledError)
    assert sent == [[1, 2, 3], [5, 6, 7, 8]] and not gather.tasks


async def test_an_error_reaches_all_and_one_who_left_leaves_no_complaint() -> None:
    loop, complaints = asyncio.get_running_loop(), list[Any]()
    loop.set_exception_handler(lambda loop, context: complaints.append(context))

    async def fail(items: list[int]) -> list[int]: raise KeyError("gone") from OSError("why")

    gather = Gather(fail)
    asked = [gather.one(1), gather.ask([2]), gather.one(3)]
    first, second = await asyncio.gather(*asked[:2], return_exceptions=True)  # nobody asks the third
    assert repr(first) == repr(second) == "KeyError('gone')" and first is not second
    assert isinstance(first, KeyError) and isinstance(first.__cause__, OSError)
    del asked, first, second
    gc.collect(); await asyncio.sleep(0)
    assert not complaints


async def test_an_error_that_cannot_be_copied_reaches_all() -> None:
    class Odd(Exception):
        def __init__(self, status: int, body: str) -> None: super().__init__(f"{status}: {body}")

    async def fail(items: list[int]) -> list[int]: raise Odd(502, "x")

    gather = Gather(fail)
    async with asyncio.timeout(5): replies = await asyncio.gather(gather.one(1), gather.ask([2]), return_exceptions=True)
    assert [(type(each), str(each)) for each in replies] == [(Odd, "502: x")] * 2


async def test_a_batch_closes_by_the_room_that_its_items_take() -> None:
    sent: list[Any] = []

    async def echo(items: list[int]) -> list[int]:
        sent.append(list(items))
        return items

    gather = Gather(echo, at_once=10)
    assert await asyncio.gather(gather.ask([1, 2], 6), gather.one(3), gather.ask([4], 4), gather.one(5), gather.ask([6], 99)) == [[1, 2], 3, [4], 5, [6]]
    assert sent == [[1, 2, 3], [4, 5], [6]]


async def test_those_who_wait_are_cancelled_with_the_sending() -> None:
    gather = Gather(lambda items: asyncio.sleep(60))  # type: ignore[arg-type, return-value]
    asked = gather.one(1)
    await asyncio.sleep(0)
    for task in gather.tasks: task.cancel()
    with pytest.raises(asyncio.CancelledError): await asyncio.wait_for(asked, 5)


# ---- time -------------------------------------------------------------------------------------------------------------

async def within(seconds: float, awaited: Any) -> Any:
    timer = limit(clock := asyncio.timeout(None), seconds)
    try:
        async with clock: return await awaited
    finally: timer.cancel()


async def test_time_in_which_the_loop_was_held_is_given_back() -> None:
    async def two_steps() -> str:
        await asyncio.sleep(0)
        time.sleep(0.4)  # noqa: ASYNC251                                              # the loop is held, and the reply comes meanwhile
        for _ in range(9): await asyncio.sleep(0)                                   # it takes a few turns until it is read
        return "read"

    assert await within(0.2, two_steps()) == "read"


@pytest.mark.timed
async def test_what_is_given_back_is_bounded() -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError): await within(0.1, asyncio.sleep(5))
    assert 0.1 <= time.monotonic() - start < 0.2
    asyncio.get_running_loop().call_later(0.05, time.sleep, 1)
    start = time.monotonic()
    with pytest.raises(TimeoutError): await within(0.1, asyncio.sleep(5))
    assert 1.1 < time.monotonic() - start < 1.35                                    # held for 1 s, and as much again as the limit


# ---- connections ------------------------------------------------------------------------------------------------------

@pytest.mark.redis
async def test_what_the_server_closed_while_it_was_idle_is_not_used(redis_server: Server) -> None:
    store = RedisStore(redis_server.url, timeout=5)
    for n in (1, 2):
        await adrive(store.bump({"a": 1})); drive(store.bump({"a": 1}))       # an increment is never said twice, so a dead connection would show
        with redis_server.client() as client:
            for one in client.client_list():
                if one["id"] != str(client.client_id()): client.client_kill_filter(_id=one["id"])
        await asyncio.sleep(0.05)
        assert drive(store.counts()) == {"a": 2 * n}
    await adrive(store.shut())


@pytest.mark.redis
async def test_one_connection_is_enough_for_all_verbs(redis_server: Server) -> None:
    store = RedisStore(redis_server.url, timeout=5, max_connections=1)
    entries = [Item(f"llm:{n}", bytes([n]) * (n << 12), 60) for n in range(9)]

    def all_verbs() -> Iterator[Any]:
        yield store.put_many(entries)
        yield store.get_many([item.key for item in entries])
        yield store.get_many(["llm:8"])
        yield store.acquire(["llm:1", "llm:x"], "me", 5)
        yield store.settle([], ["llm:x"], "me")
        yield store.bump({"a": 1.5})
        yield store.ping()
        yield store.scan("llm:")
        yield store.info()
        yield store.counts()

    blocking = [drive(flow) for flow in all_verbs()]
    awaited = await asyncio.gather(*(adrive(flow) for flow in all_verbs()))
    assert blocking[1] == awaited[1] == [item.blob for item in entries] and blocking[2] == awaited[2] == [entries[8].blob]
    assert blocking[3] == awaited[3] == [(entries[1].blob, False), (None, True)]
    assert blocking[8]["server_bytes"] > 0 and blocking[9] == {"a": 1.5} and sorted(blocking[7].keys) == [item.key for item in entries]
    with redis_server.client() as client: assert len(client.client_list()) == 3   # it, one for the threads, one for the loop
    await adrive(store.shut())
    with redis_server.client() as client: assert len(client.client_list()) == 1


@pytest.mark.redis
async def test_a_large_entry_comes_whole_in_many_pieces(redis_server: Server) -> None:
    store, blob = RedisStore(redis_server.url, timeout=20), bytes(range(256)) * (1 << 15)
    await adrive(store.put_many([Item("llm:big", blob, 60), Item("llm:small", b"s", 60)]))
    for keys in (["llm:big"], ["llm:small", "llm:big", "llm:none", "llm:big"]):
        expected = [{"llm:big": blob, "llm:small": b"s"}.get(key) for key in keys]
        assert await adrive(store.get_many(keys)) == drive(store.get_many(keys)) == expected
    await adrive(store.shut())


async def test_a_reply_that_is_longer_than_asked_is_nobody_s(unused_tcp_port: int) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536): writer.write(b"$1\r\na\r\n$1\r\nb\r\n")
        writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", unused_tcp_port):
        store = RedisStore(f"redis://127.0.0.1:{unused_tcp_port}/0", timeout=5)
        with pytest.raises(StoreUnavailableError): await adrive(store.get_many(["llm:a"]))
        with pytest.raises(StoreUnavailableError): await asyncio.to_thread(drive, store.get_many(["llm:a"]))
        await adrive(store.shut())
