"""Redis in trouble under the running service: every call is answered, rightly and in time, it is told once, and it mends by itself."""
from __future__ import annotations

import asyncio
import re
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.servers import Proxy, Server
from tests.service import Call, Load, Service, samples

pytestmark = [pytest.mark.redis, pytest.mark.slow]

BUDGET = 0.25   # seconds: CACHE_TIMEOUT, which a trouble may cost once
BUSY = 4        # how much longer anything may take on a machine that does other things too
WORKERS, SECRET = 2, "s3cret-w0rd"

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
    async def begin(self) -> None: self.change("another-s3cret")
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


def figures(calls: list[Call], usual: float) -> tuple[float, float]:
    "Median and maximum of the seconds that calls took longer than usual."
    added = [call.seconds - usual for call in calls]
    return statistics.median(added), max(added)


def state_changes(said: str) -> tuple[list[str], list[str]]:
    "The lines that tell of trouble, and those that tell of its end."
    lines = [line for line in said.splitlines() if "store redis://" in line and "WARNING" in line]
    ends = [line for line in lines if re.search(r" is back| again", line)]
    return [line for line in lines if line not in ends], ends


@pytest.mark.parametrize("kind", [Refused, BlackHole, Slow, Sleeping, Full, ReadOnly, Password, Cut, Killed, Flushed])
async def test_the_service_answers(house: House, kind: type[Trouble], record_property: Any) -> None:
    trouble, told, errors = kind(house), len(house.service.log), (await house.metrics())
    down = False
    async with Load(house.service, right) as load:
        await asyncio.sleep(0.7)
        began = time.monotonic()
        await trouble.begin()
        meanwhile = asyncio.create_task(trouble.during())
        try:
            while time.monotonic() < began + 1.3:
                if trouble.degraded and not down:
                    seen, page = await house.ready(), await house.metrics()
                    down = seen["status"] == "degraded" and not seen["store"]["up"] and page["cache_store_up"] == 0
                await asyncio.sleep(0.05)
        finally:
            ended, trouble.over = time.monotonic(), True
            await meanwhile
            await trouble.end()
        mended, tries = time.monotonic(), 0

        async def hit() -> bool:
            nonlocal tries
            tries += 1
            return [(await load.ask(f"after {kind.__name__} {tries}")).outcome for _ in range(2)] == ["miss", "hit"]

        await eventually(hit, 2 * BUSY)
        back = time.monotonic() - mended
        well = 0
        async def all_ready() -> bool:
            nonlocal well
            well = well + 1 if (await house.ready())["status"] == "ready" else 0
            return well >= 4 * WORKERS
        await eventually(all_ready, 2 * BUSY)
        await asyncio.sleep(0.3)

    usual = statistics.median(call.seconds for call in load.between(0, began))
    first, then = load.between(began - 1, began + 0.6), load.between(began + 0.6, ended)
    (_, most), (added, late) = figures(first, usual), figures(then, usual)
    beginnings, ends = state_changes(house.service.log[told:])
    print(f"\n{kind.__name__:10} usual {usual * 1e3:5.1f} ms; added first max {most * 1e3:6.1f} ms, then median {added * 1e3:6.2f}, max {late * 1e3:6.1f} ms;"
          f" back after {back:.2f} s; {len(load.calls)} calls, {len(beginnings)}+{len(ends)} lines")
    print("\n".join(beginnings + ends))
    for name, value in {"usual_ms": usual * 1e3, "first_max_ms": most * 1e3, "then_median_ms": added * 1e3, "then_max_ms": late * 1e3, "back_s": back}.items():
        record_property(f"outage_{kind.__name__}_{name}", round(value, 2))
    assert len(first) > 20 and len(then) > 20
