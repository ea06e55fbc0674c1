"""The cache file in trouble under the running service: every call is answered, one clear warning, and what can be read is read."""
from __future__ import annotations

import asyncio
import os
import resource
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from aurea_orchestrator.effects import drive
from aurea_orchestrator.errors import StoreTimeoutError
from aurea_orchestrator.stores.sqlite import SqliteStore
from tests.service import Load, Service
from tests.test_outage import ANSWERS, BUDGET, BUSY, WORKERS, eventually, right

pytestmark = [pytest.mark.slow, pytest.mark.timed]


def mount(*how: str) -> None:
    "Skips where one may not: it takes root."
    done = subprocess.run(["mount", *how], capture_output=True, text=True)
    if done.returncode: pytest.skip(f"mount {' '.join(how)}: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    "A file system of its own."
    disk = tmp_path / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=24m", "none", str(disk))
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def service_on(folder: Path, file: Path) -> Service:
    (folder / "answers.py").write_text(ANSWERS)
    return Service(folder, workers=WORKERS, CACHE_URL=f"sqlite:///{file}", LLM_BACKEND="answers:answer", CACHE_TIMEOUT=BUDGET)


def warnings(said: str, ends: bool = False) -> list[str]:
    "What was said of the store when it was in trouble, or when it was over."
    lines = [line for line in said.splitlines() if "WARNING" in line and "store sqlite:" in line]
    return [line for line in lines if line.endswith((" is back", " again")) is ends]


async def status(service: Service) -> str:
    async with service.aclient() as client: return str((await client.get("/ready")).json()["status"])


async def works(load: Load, name: str, seconds: float = 2 * BUSY) -> float:
    "How long it takes until new answers are stored, and all workers say that they are well."
    tries = 0

    async def hit() -> bool:
        nonlocal tries
        tries += 1
        return [(await load.ask(f"{name} {tries}")).outcome for _ in range(2)] == ["miss", "hit"]

    async def ready() -> bool: return {await status(load.service) for _ in range(4 * WORKERS)} == {"ready"}

    took = await eventually(hit, seconds)
    await eventually(ready, seconds)
    return took


def slowest(load: Load, since: float) -> float: return max(call.seconds for call in load.between(since))


async def test_a_file_that_another_process_locks(tmp_path: Path, record_property: Any) -> None:
    file = tmp_path / "cache.db"
    with service_on(tmp_path, file) as service:
        async with Load(service, right) as load:
            await works(load, "before")
            told, began = len(service.log), time.monotonic()
            other = sqlite3.connect(file, isolation_level=None)
            other.execute("BEGIN EXCLUSIVE")
            await asyncio.sleep(1.2)
            assert "hit" in {call.outcome for call in load.between(began + 0.5)}  # what is there is read
            assert await status(service) == "degraded"
            other.execute("ROLLBACK")
            other.close()
            took = await works(load, "after")
            await asyncio.sleep(0.5)
        said = service.log[told:]
        print(f"\nlocked: slowest {slowest(load, began):.2f} s, back after {took:.2f} s\n" + "\n".join(warnings(said) + warnings(said, True)))
        record_property("locked_file_slowest_s", round(slowest(load, began), 2))
        assert slowest(load, began) < 2 * BUSY * BUDGET and "Traceback" not in service.log
        assert 1 <= len(warnings(said)) == len(warnings(said, ends=True)) <= WORKERS and "others wrote for more than 0.25 s" in warnings(said)[0]


def fill(disk: Path) -> None:
    with (disk / "ballast").open("wb", buffering=0) as ballast:
        for size in (65536, 512):
            try:
                while ballast.write(bytes(size)): ...
            except OSError: pass


@pytest.mark.parametrize("way", ["disk", "limit"])
async def test_a_full_disk(tmp_path: Path, way: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue("small_disk") if way == "disk" else tmp_path / "files"
    folder.mkdir(exist_ok=True)
    with service_on(tmp_path, folder / "cache.db") as service:
        async with Load(service, right) as load:
            await works(load, "before")
            told, began, pids = len(service.log), time.monotonic(), service.worker_pids()
            if way == "disk": fill(folder)
            else:
                size = (folder / "cache.db-wal").stat().st_size
                for pid in pids: psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE, (size + 10_000, resource.RLIM_INFINITY))
            async def full() -> bool: return await status(service) == "degraded"
            await eventually(full, 2 * BUSY)
            await asyncio.sleep(1)
            assert {call.outcome for call in load.between(time.monotonic() - 0.9)} >= {"hit", "miss"}
            if way == "disk": (folder / "ballast").unlink()
            else:
                for pid in pids: psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            took = await works(load, "after")
        said = service.log[told:]
        print(f"\nfull ({way}): slowest {slowest(load, began):.2f} s, back after {took:.2f} s\n" + "\n".join(warnings(said) + warnings(said, True)))
        assert slowest(load, began) < 2 * BUSY * BUDGET and "Traceback" not in service.log
        assert 1 <= len(warnings(said)) == len(warnings(said, ends=True)) <= WORKERS
        assert ("the disk is full" if way == "disk" else "cannot be written") in warnings(said)[0]


async def test_a_file_that_is_damaged(tmp_path: Path) -> None:
    file = tmp_path / "cache.db"
    with service_on(tmp_path, file) as service:
        async with Load(service, right) as load:
            await works(load, "before")
            told, began = len(service.log), time.monotonic()
            for part in (file, Path(f"{file}-wal")):
                with part.open("r+b") as raw: raw.write(os.urandom(part.stat().st_size))
            await asyncio.sleep(1.5)
            assert "miss" in {call.outcome for call in load.between(began + 0.5)}
            said = service.log[told:]
            print(f"\ndamaged: slowest {slowest(load, began):.2f} s\n" + "\n".join(warnings(said)))
            for name in ("cache.db", "cache.db-wal", "cache.db-shm"): (tmp_path / name).unlink(missing_ok=True)  # as the warning says
            took = await works(load, "after")
            print(f"back after {took:.2f} s")
        assert slowest(load, began) < 2 * BUSY * BUDGET and "Traceback" not in service.log
        assert 1 <= sum("is in trouble" in line for line in warnings(said)) <= WORKERS and len(warnings(said)) <= 2 * WORKERS  # not written, then not read
        assert all("damaged" in line or "no SQLite file" in line for line in warnings(said))


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    "A folder with a cache file in which there is an answer; root may not write there either."
    shelf, view = tmp_path / "shelf", tmp_path / "view"
    with service_on(tmp_path, shelf / "cache.db") as service, service.client() as client:
        assert client.post("/llm/generate", json={"prompt": "kept"}).headers["x-cache"] == "miss"
    if os.getuid():
        os.chmod(shelf / "cache.db", 0o444)
        os.chmod(shelf, 0o555)
        yield shelf
        os.chmod(shelf, 0o755)
    else:
        view.mkdir()
        mount("--bind", str(shelf), str(view))
        mount("-o", "remount,bind,ro", str(view))
        yield view
        subprocess.run(["umount", "-l", str(view)], check=True)


async def test_a_file_that_may_only_be_read(tmp_path: Path, read_only: Path) -> None:
    with service_on(tmp_path, read_only / "cache.db") as service:
        async with Load(service, right) as load:
            assert {(await load.ask("kept")).outcome for _ in range(20)} == {"hit"}
            await asyncio.sleep(1)
            assert await status(service) == "degraded"
        assert len(warnings(service.log)) <= WORKERS and "give this user the right to write" in warnings(service.log)[0]
        assert slowest(load, 0) < 2 * BUSY * BUDGET and "Traceback" not in service.log


@pytest.mark.parametrize("what", ["text", "folder", "locked"])
async def test_a_file_that_cannot_be_used_from_the_start(tmp_path: Path, what: str) -> None:
    file = tmp_path / "cache.db"
    if what == "text": file.write_text("Dear diary, " * 1000)
    elif what == "folder": file.mkdir()
    else:
        other = sqlite3.connect(file, isolation_level=None)
        other.executescript("PRAGMA locking_mode=EXCLUSIVE; BEGIN EXCLUSIVE; CREATE TABLE t(x); COMMIT")
    with service_on(tmp_path, file) as service:
        async with Load(service, right) as load:
            await asyncio.sleep(1)
            assert await status(service) == "degraded"
            if what == "locked":
                other.execute("DROP TABLE t")
                other.close()
                await works(load, "after")
        print(f"\n{what}: slowest {slowest(load, 0):.2f} s\n" + "\n".join(warnings(service.log)))
        said = {"text": "no SQLite file, and was left untouched", "folder": "cannot be opened", "locked": "others wrote for more than 0.25 s"}[what]
        assert all(said in line for line in warnings(service.log)) and 1 <= len(warnings(service.log)) <= 2 * WORKERS
        assert slowest(load, 0) < 2 * BUSY * BUDGET and "Traceback" not in service.log
    if what == "text": assert file.read_text() == "Dear diary, " * 1000


def test_a_crowd_at_the_door_of_a_locked_file_waits_once(tmp_path: Path) -> None:
    file = tmp_path / "cache.db"
    other = sqlite3.connect(file, isolation_level=None)
    other.executescript("PRAGMA locking_mode=EXCLUSIVE; BEGIN EXCLUSIVE; CREATE TABLE t(x); COMMIT")
    store, began = SqliteStore(file, timeout=BUDGET), time.monotonic()

    def look(_: int) -> str:
        with pytest.raises(StoreTimeoutError) as caught: drive(store.get_many(["llm:a"]))
        return str(caught.value)

    with ThreadPoolExecutor(32) as pool: said = set(pool.map(look, range(32)))
    assert time.monotonic() - began < BUSY * BUDGET and len(said) == 1  # one by one it would be 8 s
    other.execute("DROP TABLE t")
    other.close()
    assert drive(store.get_many(["llm:a"])) == [None]
    drive(store.shut())
