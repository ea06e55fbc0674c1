"""Redis in trouble under the running service: every call is answered, rightly and in time, it is told once, and it mends by itself."""
from __future__ import annotations

import asyncio
import json
import re
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from aurea_orchestrator import Cache, cache_llm_response
from tests.servers import Cluster, Proxy, Sentinels, Server, free_ports, words
from tests.service import Load, Service, samples

pytestmark = [pytest.mark.redis, pytest.mark.slow, pytest.mark.timed]

BUDGET = 0.25   # seconds: CACHE_TIMEOUT, which a trouble may cost once
BUSY = 4        # how much longer anything may take on a machine that does other things too
WORKERS, SECRET, NEW_SECRET = 2, "s3cret-w0rd", "an0ther-s3cret"

ANSWERS = '''
import asyncio, time
async def answer(prompt): return prompt[::-1]
'''


def right(prompt: str) -> str: return prompt[::-1]


class House:
    "Redis, a network, and two workers."

    def __init__(self, folder: Path) -> None:
        (folder / "answers.py").write_text(ANSWERS)
        self.redis = Server(folder / "redis", "--enable-debug-command", "yes", password=SECRET)
        self.network = Proxy(self.redis.port)
        self.admin = redis.Redis(port=self.redis.port, password=SECRET, single_connection_client=True, protocol=2)
        url = f"redis://:{SECRET}@127.0.0.1:{self.network.port}/0"
        self.service = Service(folder, workers=WORKERS, CACHE_URL=url, LLM_BACKEND="answers:answer", CACHE_TIMEOUT=BUDGET)

    def close(self) -> None:
        self.service.stop()
        self.admin.close()
        self.network.close()
        self.redis.kill()

    async def ready(self) -> dict[str, Any]:
        "What one of the workers says."
        async with self.service.aclient() as client: return dict((await client.get("/ready")).json())

    async def metrics(self) -> dict[str, float]:
        async with self.service.aclient() as client: return samples((await client.get("/metrics")).text)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    built = House(tmp_path_factory.mktemp("outage"))
    with built.service: yield built
    built.close()


async def eventually(true: Any, seconds: float) -> float:
    "How long it takes until something is true; not for ever."
    began = time.monotonic()
    while not await true():
        assert time.monotonic() - began < seconds, f"not within {seconds} s"
        await asyncio.sleep(0.02)
    return time.monotonic() - began


async def served_from_memory(service: Service, servers: list[Server], seconds: float = 2 * BUSY) -> None:
    "Soon each worker hears again: hits cost the servers no lookup. To be asked when nobody else asks for anything."
    def lookups() -> int:
        with ExitStack() as open_:
            stats = [open_.enter_context(server.client()).info("commandstats") for server in servers if server.process]
        return sum(each.get(f"cmdstat_{name}", {"calls": 0})["calls"] for each in stats for name in ("get", "mget"))

    async def quiet() -> bool:
        async with service.aclient() as client:
            before = await asyncio.to_thread(lookups)
            for _ in range(10 * WORKERS):  # each maybe at another worker
                reply = await client.post("/llm/generate", json={"prompt": "the same"}, headers={"connection": "close"})
                assert reply.status_code == 200 and reply.json()["response"] == right("the same")
            return await asyncio.to_thread(lookups) == before

    await eventually(quiet, seconds)


# ---- the troubles: what is done, and undone -----------------------------------------------------------------------------

class Trouble:
    "Something that is wrong for a while."

    degraded = True   # whether it is a change of state, that is told

    def __init__(self, house: House) -> None: self.house, self.over = house, False
    async def begin(self) -> None: ...
    async def during(self) -> None: ...
    async def end(self) -> None: ...


class Refused(Trouble):
    "Nobody listens; then a new, empty server does."
    async def begin(self) -> None: self.house.redis.kill()
    async def end(self) -> None:
        await asyncio.to_thread(self.house.redis.start)
        self.house.admin = redis.Redis(port=self.house.redis.port, password=SECRET, single_connection_client=True, protocol=2)


class BlackHole(Trouble):
    "Connections are taken, and nothing is answered."
    async def begin(self) -> None: self.house.redis.pause()
    async def end(self) -> None: self.house.redis.resume()


class Slow(Trouble):
    "Replies come, later than anybody waits."
    async def begin(self) -> None: self.house.network.delay = 1.0
    async def end(self) -> None: self.house.network.delay = 0.0


class Sleeping(Trouble):
    "One long command that holds the server."
    async def begin(self) -> None:
        self.sleep = asyncio.create_task(asyncio.to_thread(self.house.admin.execute_command, "DEBUG", "SLEEP", "1.5"))
    async def end(self) -> None: await self.sleep


class Sluggish(Trouble):
    "Every reply comes in time, if only just."
    degraded = False
    async def begin(self) -> None: self.house.network.delay = 0.15
    async def end(self) -> None: self.house.network.delay = 0.0


class Full(Trouble):
    "No memory is left, and nothing may be evicted."
    async def begin(self) -> None: self.house.admin.config_set("maxmemory", "1")
    async def end(self) -> None: self.house.admin.config_set("maxmemory", "0")


class ReadOnly(Trouble):
    "It has become a replica of somebody else."
    async def begin(self) -> None: self.house.admin.execute_command("REPLICAOF", "127.0.0.1", "1")
    async def end(self) -> None: self.house.admin.execute_command("REPLICAOF", "NO", "ONE")


class Password(Trouble):
    "The password was changed, and everybody has to say it again."
    async def begin(self) -> None: self.change(NEW_SECRET)
    async def end(self) -> None: self.change(SECRET)
    def change(self, word: str) -> None:
        self.house.admin.config_set("requirepass", word)
        self.house.admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


class Cut(Trouble):
    "Every reply ends after its first byte."
    async def begin(self) -> None: self.house.network.cut = True
    async def end(self) -> None: self.house.network.cut = False


class Killed(Trouble):
    "Connections are cut again and again, each works until then."
    degraded = False
    async def during(self) -> None:
        while not self.over:
            self.house.admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await asyncio.sleep(0.05)


class Flushed(Trouble):
    "Everything is forgotten, again and again."
    degraded = False
    async def during(self) -> None:
        while not self.over: self.house.admin.flushall(); await asyncio.sleep(0.05)


def errors(page: dict[str, float]) -> float: return sum(n for name, n in page.items() if name.startswith("cache_errors_total"))


def state_changes(said: str) -> tuple[list[str], list[str]]:
    "The lines that tell of trouble, and those that tell of its end."
    lines = [line for line in said.splitlines() if "store redis" in line and "WARNING" in line]
    ends = [line for line in lines if re.search(r" is back| again", line)]
    return [line for line in lines if line not in ends], ends


@pytest.mark.parametrize("kind", [Refused, BlackHole, Slow, Sleeping, Sluggish, Full, ReadOnly, Password, Cut, Killed, Flushed])
async def test_every_call_is_answered_and_it_is_told_once(house: House, kind: type[Trouble], record_property: Any) -> None:
    trouble, told, counted = kind(house), len(house.service.log), errors(await house.metrics())
    down, tries = not trouble.degraded, 0
    async with Load(house.service, right) as load:
        await asyncio.sleep(0.5)
        began = time.monotonic()
        await trouble.begin()
        meanwhile = asyncio.create_task(trouble.during())
        try:
            while time.monotonic() < began + 1.2:
                if not down:
                    ready, page = await house.ready(), await house.metrics()
                    down = ready["status"] == "degraded" and not ready["store"]["up"] and page["cache_store_up"] == 0
                await asyncio.sleep(0.05)
        finally:
            ended, trouble.over = time.monotonic(), True
            await meanwhile
            await trouble.end()
        mended = time.monotonic()

        async def hit() -> bool:
            "Something new is a hit when it is asked for again: the cache works."
            nonlocal tries
            tries += 1
            return [(await load.ask(f"after {kind.__name__} {tries}")).outcome for _ in range(2)] == ["miss", "hit"]

        async def ready() -> bool:
            "Whichever worker is asked; and each that told of trouble has told of its end."
            beginnings, ends = state_changes(house.service.log[told:])
            return len(beginnings) <= len(ends) and all([(await house.ready())["status"] == "ready" for _ in range(4 * WORKERS)])

        await eventually(hit, 2 * BUSY)
        back = time.monotonic() - mended
        await eventually(ready, 2 * BUSY)
    await served_from_memory(house.service, [house.redis])

    usual = statistics.median(call.seconds for call in load.between(0, began))
    first, then = (sorted(call.seconds - usual for call in load.between(*when)) for when in ((began - 1, began + 0.6), (began + 0.6, ended)))
    after = max((call.seconds - usual for call in load.between(ended)), default=0)
    measured = {"usual": usual, "first_max": first[-1], "then_median": statistics.median(then), "then_max": then[-1], "after_max": after, "back": back}
    for name, seconds in measured.items(): record_property(f"outage_{kind.__name__}_{name}_ms", round(1e3 * seconds, 2))
    print(f"\n{kind.__name__:10}", *(f"{name} {1e3 * seconds:.1f} ms," for name, seconds in measured.items()), f"{len(load.calls)} calls")

    said = house.service.log[told:]
    beginnings, ends = state_changes(said)
    assert down, "neither /ready nor /metrics told"
    assert first[-1] < BUSY * BUDGET and sum(seconds > 0.8 * BUDGET for seconds in first) <= load.customers * WORKERS  # paid once
    if kind is not Sluggish: assert then[int(0.95 * len(then))] < 0.8 * BUDGET                                          # and not again
    assert then[-1] < BUSY * BUDGET and after < BUSY * BUDGET
    assert len(beginnings) == len(ends) <= WORKERS, said
    if trouble.degraded: assert beginnings and errors(await house.metrics()) > counted
    if kind is Flushed: assert not beginnings and errors(await house.metrics()) == counted
    for secret in (SECRET, NEW_SECRET, "common ", "new ", "Traceback", "CROSSSLOT"): assert secret not in said


async def test_a_redis_that_is_not_there_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "answers.py").write_text(ANSWERS)
    (port,) = free_ports(1)
    with Service(tmp_path, workers=WORKERS, CACHE_URL=f"redis://:{SECRET}@127.0.0.1:{port}/0", LLM_BACKEND="answers:answer") as service:
        async with Load(service, right) as load, service.aclient() as client:
            await asyncio.sleep(0.7)
            assert {call.outcome for call in load.calls} <= {"miss", "shared"} and max(call.seconds for call in load.calls) < BUSY * BUDGET
            assert (await client.get("/ready")).json()["status"] == "degraded"
            redis_server = await asyncio.to_thread(Server, tmp_path / "redis", port=port, password=SECRET)
            try:
                async def ready() -> bool: return bool((await client.get("/ready")).json()["status"] == "ready")
                async def hit() -> bool: return (await load.ask("the same")).outcome == "hit"
                await eventually(ready, 2 * BUSY)
                await eventually(hit, 2 * BUSY)
                beginnings, ends = state_changes(service.log)
                await load.__aexit__()  # nobody else asks for anything
                await served_from_memory(service, [redis_server])
            finally: redis_server.kill()
        assert 1 <= len(beginnings) <= WORKERS and "cannot be reached" in beginnings[0] and 1 <= len(ends) <= WORKERS
        assert SECRET not in service.log


# ---- the same around a function: what a call costs --------------------------------------------------------------------

@pytest.mark.parametrize("harm", ["kill", "pause"])
@pytest.mark.parametrize("awaited", [False, True])
async def test_what_a_decorated_call_costs_meanwhile(own_redis: Server, harm: str, awaited: bool, record_property: Any) -> None:
    cache, calls = Cache.from_url(own_redis.url + "?memory=0", timeout=BUDGET), 0

    @cache_llm_response(cache=cache)
    async def ask(prompt: str) -> str: return right(prompt)

    @cache_llm_response(cache=cache)
    def plain(prompt: str) -> str: return right(prompt)

    async def one(prompt: str = "") -> float:
        nonlocal calls
        calls += 1
        prompt, began = prompt or f"new {calls}", time.perf_counter()
        answer = await ask(prompt) if awaited else plain(prompt)
        took = time.perf_counter() - began
        assert answer == right(prompt)
        return took

    usual = statistics.median([await one() for _ in range(50)])
    getattr(own_redis, harm)()
    first = [await one() for _ in range(3)]
    open_ = [await one() for _ in range(300)]
    await asyncio.to_thread(own_redis.start if harm == "kill" else own_redis.resume)
    mended = time.monotonic()
    counted = cache.stats()["outcomes"]["llm"].get("hit", 0)

    async def hit() -> bool:
        "Read from the outcomes, since the answer is the same."
        await one("the same")
        return int((await cache.astats())["outcomes"]["llm"].get("hit", 0)) > counted

    await eventually(hit, 2 * BUSY)
    measured = {"usual": usual, "first": max(first), "open_median": statistics.median(open_), "open_max": max(open_), "back": time.monotonic() - mended}
    for name, seconds in measured.items(): record_property(f"outage_{harm}_{'async' if awaited else 'sync'}_{name}_ms", round(1e3 * seconds, 3))
    print(f"\n{harm} {'async' if awaited else 'sync'}:", *(f"{name} {1e3 * seconds:.3f} ms," for name, seconds in measured.items()))
    assert sum(seconds > 0.8 * BUDGET for seconds in first) <= 1 and max(first) < BUSY * BUDGET
    assert statistics.median(open_) < 1e-3 * BUSY
    await cache.aclose()


# ---- many callers -----------------------------------------------------------------------------------------------------

@asynccontextmanager
async def counted_connections(server: Server) -> AsyncIterator[list[int]]:
    "How many connections the server has, looked at again and again."
    seen, over = list[int](), asyncio.Event()

    def look() -> None:
        with server.client() as client:
            while not over.is_set():
                seen.append(client.info("clients")["connected_clients"] - 1)
                time.sleep(0.01)

    looking = asyncio.create_task(asyncio.to_thread(look))
    try: yield seen
    finally:
        over.set()
        await looking


LIMIT = 64  # connections of one event loop, and of all threads; the ears have one more


async def test_5000_callers_of_a_function_share_few_connections(own_redis: Server, record_property: Any) -> None:
    cache, calls = Cache.from_url(own_redis.url + "?memory=0"), list[str]()

    @cache_llm_response(cache=cache)
    async def ask(prompt: str) -> str:
        calls.append(prompt)
        await asyncio.sleep(0.01)
        return right(prompt)

    async with counted_connections(own_redis) as seen:
        for _ in range(2):
            assert await asyncio.gather(*(ask(f"question {n % 4000}") for n in range(5000))) == [right(f"question {n % 4000}") for n in range(5000)]
    stats = cache.stats()
    print(f"\n5,000 callers of a function: {max(seen)} connections, {len(calls)} computed, {stats['outcomes']['llm']}")
    record_property("connections_5000_callers", max(seen))
    assert 1 <= max(seen) <= 2 * LIMIT + 1 and len(calls) <= 2 * 4000
    assert stats["llm"]["hits"] + stats["llm"]["misses"] == 10000 and stats["llm"]["misses"] == len(calls)
    await cache.aclose()


async def test_5000_requests_at_once_share_few_connections(tmp_path: Path, own_redis: Server, record_property: Any) -> None:
    (tmp_path / "answers.py").write_text("import asyncio\nasync def answer(prompt):\n    await asyncio.sleep(1)\n    return prompt[::-1]\n")
    with Service(tmp_path, workers=WORKERS, CACHE_URL=own_redis.url, LLM_BACKEND="answers:answer") as service:
        entering, most, now = asyncio.Semaphore(500), 0, 0  # at once; more would only fill the queue of the listening socket

        async def one(n: int) -> bool:
            nonlocal most, now
            body = json.dumps({"prompt": f"question {n % 4000}"}).encode()
            async with entering: reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
            writer.write(b"POST /llm/generate HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\n")
            writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
            now += 1
            most = max(most, now)
            reply = await reader.read()
            now -= 1
            writer.close()
            return reply.startswith(b"HTTP/1.1 200") and json.loads(reply.partition(b"\r\n\r\n")[2])["response"] == right(f"question {n % 4000}")

        async with counted_connections(own_redis) as seen:
            began = time.monotonic()
            assert all(await asyncio.gather(*map(one, range(5000))))
        print(f"\n5,000 requests, {most} at once: {max(seen)} connections, {time.monotonic() - began:.1f} s")
        record_property("connections_5000_requests", max(seen))
        assert most > 1000 and max(seen) <= WORKERS * (2 * LIMIT + 1)
        assert "Traceback" not in service.log


# ---- Sentinels and clusters -------------------------------------------------------------------------------------------

@asynccontextmanager
async def customers(folder: Path, url: str) -> AsyncIterator[tuple[Service, Load]]:
    "Two workers at a store, and who asks them."
    (folder / "answers.py").write_text(ANSWERS)
    with Service(folder, workers=WORKERS, CACHE_URL=url, LLM_BACKEND="answers:answer") as service:
        async with Load(service, right) as load: yield service, load


async def mended(load: Load, name: str, seconds: float = 30) -> float:
    "How long it takes until the cache works again for all keys, on whichever server they are, and every worker says so."
    tries = 0

    async def resumed() -> bool:
        nonlocal tries
        tries += 1
        return all([(await load.ask(f"{name} {tries} {n % 12}")).outcome in ("miss", "hit", "shared") for n in range(12)]) and \
            all([(await load.ask(f"{name} {tries} {n}")).outcome == "hit" for n in range(12)])

    async def ready() -> bool:
        async with load.service.aclient() as client: return bool((await client.get("/ready")).json()["status"] == "ready")

    took = await eventually(resumed, seconds)
    for _ in range(4 * WORKERS): await eventually(ready, seconds)
    return took


@pytest.mark.parametrize("kind", [Sentinels, Cluster])
async def test_a_killed_primary_fails_no_call(tmp_path: Path, kind: Any, record_property: Any) -> None:
    servers = kind(tmp_path / "redis")
    try:
        async with customers(tmp_path, servers.url) as (service, load):
            await mended(load, "before")
            victim, at = servers.servers[0], time.monotonic()
            victim.kill()
            took = await mended(load, "after")
            await load.__aexit__()  # nobody else asks for anything
            await served_from_memory(service, servers.servers)
        slowest = max(call.seconds for call in load.between(at - 1))
        beginnings, ends = state_changes(service.log)
        print(f"\n{kind.__name__}: {len(load.calls)} calls, none failed; hits for all keys again after {took:.1f} s, slowest {slowest:.2f} s, {len(beginnings)}+{len(ends)} lines")
        print("\n".join(beginnings+ends))
        for name, value in {"back_s": took, "slowest_s": slowest, "calls": len(load.calls)}.items(): record_property(f"killed_primary_{kind.__name__}_{name}", round(value, 2))
        assert len(load.between(at)) > 100 and load.asked_again == 0 and slowest < 2 * BUSY * BUDGET
        assert WORKERS >= len(ends) == len(beginnings) or kind is Cluster  # whose nodes may change their minds on the way
        assert "CROSSSLOT" not in service.log and "Traceback" not in service.log
    finally: servers.kill()


def slot_of(server: Server, key: str) -> int:
    with server.client() as client: return int(client.execute_command("CLUSTER", "KEYSLOT", key))


def move(slot: int, source: Server, target: Server, others: list[Server], pause: float) -> None:
    "What `redis-cli --cluster reshard` does for one slot, slowly: meanwhile some of its keys are here, and some there."
    ids = {server: words(server, "CLUSTER", "MYID") for server in (source, target)}
    with source.client() as here, target.client() as there:
        there.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
        here.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
        time.sleep(pause)
        while keys := here.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100):
            here.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 1000, "REPLACE", "KEYS", *keys)
            time.sleep(pause)
        there.execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[target])
        here.execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[target])
        for other in others:
            with other.client() as client: client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[target])


async def test_moved_slots_fail_no_call(tmp_path: Path, record_property: Any) -> None:
    house = Cluster(tmp_path / "redis", replicas=False)
    try:
        cache, over = Cache.from_url(house.url + "?memory=0"), False

        @cache_llm_response(cache=cache)
        def plain(prompt: str) -> str: return right(prompt)

        def blocking() -> int:
            "Another program, that blocks."
            calls = 0
            while not over:
                assert plain(f"common {calls % 30}") == right(f"common {calls % 30}")
                calls += 1
                time.sleep(0.002)
            return calls

        async with customers(tmp_path, house.url + "?memory=0") as (service, load):
            await mended(load, "before")
            caller = asyncio.create_task(asyncio.to_thread(blocking))
            slots = {slot_of(house.servers[0], plain.key(f"common {n}")) for n in range(30)}
            owners = {slot: (slot > 5460) + (slot > 10922) for slot in slots}
            ends, moved = time.monotonic() + 3, 0
            for slot in sorted(slots) * 100:
                if time.monotonic() > ends: break
                at = owners[slot]
                to = owners[slot] = (at + 1) % 3
                await asyncio.to_thread(move, slot, house.servers[at], house.servers[to], [house.servers[3 - at - to]], 0.04)
                moved += 1
            over, took = True, await mended(load, "after")
            calls = await caller
            stats = await asyncio.to_thread(cache.stats)
            await asyncio.to_thread(cache.close)
        told = [client.info("errorstats") for client in (server.client() for server in house.servers)]
        redirected = {name: sum(each.get(f"errorstat_{name}", {"count": 0})["count"] for each in told) for name in ("MOVED", "ASK", "TRYAGAIN", "CROSSSLOT")}
        beginnings, _ = state_changes(service.log)
        print(f"\n{moved} slots moved under {len(load.calls)} requests and {calls} calls that block, slowest {max(call.seconds for call in load.calls):.2f} s; redirected {redirected}; {len(beginnings)} lines; hits for all keys after {took:.1f} s")
        print("\n".join(beginnings))
        record_property("slots_moved", moved)
        assert stats["outcomes"]["llm"]["hit"] > 100 and calls > 100 and max(call.seconds for call in load.calls) < 2 * BUSY * BUDGET
        assert moved > 10 and redirected["MOVED"] and redirected["ASK"] and not redirected["CROSSSLOT"]
        assert "CROSSSLOT" not in service.log and "Traceback" not in service.log
    finally: house.kill()
