"""The embedded store among enemies: killed writers, other processes, damaged, foreign, locked and read-only files, full disks, forks."""
from __future__ import annotations

import asyncio
import hashlib
import os
import random
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aurea_orchestrator.effects import adrive, drive
from aurea_orchestrator.errors import ConfigError, StoreBusyError, StoreError, StoreTimeoutError, StoreUnavailableError
from aurea_orchestrator.stores import sqlite
from aurea_orchestrator.stores.base import Item
from aurea_orchestrator.stores.sqlite import OVERHEAD_BYTES, SqliteStore
from aurea_orchestrator.stores.urls import open_store

ROOT = Path(__file__).parent.parent
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")


def key(n: int) -> str: return f"llm:{n:064x}"
def sha(path: Path) -> str: return hashlib.sha256(path.read_bytes()).hexdigest()


class Clock:
    "Time that is moved by hand."
    now = 1_000_000.0
    def __call__(self) -> float: return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path: return tmp_path / "cache.sqlite"


@pytest.fixture
def clock() -> Clock: return Clock()


@pytest.fixture
def store(path: Path, clock: Clock) -> Iterator[SqliteStore]:
    store = SqliteStore(path, timeout=5, clock=clock)
    yield store
    drive(store.shut())


def elsewhere(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    "Another process with a store on the path that is its first argument."
    head = ("import sys, os, hashlib, random, time\nfrom aurea_orchestrator.effects import drive\nfrom aurea_orchestrator.stores.base import Item\n"
            "from aurea_orchestrator.stores.sqlite import SqliteStore\nstore = SqliteStore(sys.argv[1], timeout=20)\nkey = lambda n: f'llm:{n:064x}'\n")
    return subprocess.Popen([sys.executable, "-c", head + code, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE)


def ended(*processes: subprocess.Popen[bytes]) -> bool:
    "All of them did what they were told."
    return [(p.communicate(), p.returncode)[1] for p in processes] == [0] * len(processes)


def check(path: Path) -> int:
    "The file is whole and its totals are exact; how many entries it has."
    db = sqlite3.connect(path)
    try:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        (totals,) = db.execute("SELECT entries, bytes FROM shelf").fetchall()
        assert totals == db.execute("SELECT count(*), coalesce(sum(size), 0) FROM entries").fetchone()
        assert db.execute("SELECT count(*) FROM entries WHERE size != length(blob) + 2 * length(key) + ?", (OVERHEAD_BYTES,)).fetchone() == (0,)
        return int(totals[0])
    finally: db.close()


class TestFile:
    def test_nothing_before_use_then_private(self, tmp_path: Path) -> None:
        store = SqliteStore(tmp_path / "a" / "b" / "cache.sqlite")
        assert list(tmp_path.iterdir()) == []
        before = os.umask(0)
        try: drive(store.put_many([Item(key(1), b"kept", 60)]))
        finally: os.umask(before)
        assert stat.S_IMODE(store.path.parent.stat().st_mode) == 0o700
        assert {stat.S_IMODE(file.stat().st_mode) for file in store.path.parent.iterdir()} == {0o600}
        drive(store.shut())

    def test_survives_the_process(self, path: Path, store: SqliteStore) -> None:
        assert ended(elsewhere("drive(store.put_many([Item(key(1), b'kept', 3e9)])); drive(store.bump({'n': 2}))", path))
        assert drive(store.get_many([key(1)])) == [b"kept"] and drive(store.counts()) == {"n": 2}

    def test_memory_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="memory://"): SqliteStore(":memory:")

    def test_odd_names(self, tmp_path: Path) -> None:
        for name in ("with space.db", "per%20cent.db", "what?mode=memory", "hash#1", "ümlaut.db"):
            store = SqliteStore(tmp_path / name)
            drive(store.put_many([Item(key(1), name.encode(), 60)]))
            assert drive(SqliteStore(tmp_path / name).get_many([key(1)])) == [name.encode()]
            drive(store.shut())
            assert (tmp_path / name).is_file()

    def test_shut_closes_in_all_threads(self, path: Path, store: SqliteStore) -> None:
        ready, done = threading.Barrier(4), threading.Event()

        def use() -> None:
            drive(store.get_many([key(1)]))
            ready.wait()
            done.wait()

        threads = [threading.Thread(target=use) for _ in range(3)]
        for t in threads: t.start()
        ready.wait()
        links = list(store._shelf.links._mine)
        assert len(links) == 4 and all(link.db for link in links)  # Three readers and the writer
        drive(store.shut())
        assert not any(link.db for link in links)
        done.set()
        for t in threads: t.join()

    @pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
    def test_threads_that_end_leave_no_file_open(self, path: Path, store: SqliteStore) -> None:
        def opened() -> int: return sum(os.readlink(f"/proc/self/fd/{fd}").startswith(str(path)) for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}"))

        drive(store.get_many([key(1)]))
        before = opened()
        for _ in range(20):
            thread = threading.Thread(target=lambda: drive(store.get_many([key(1)])))
            thread.start()
            thread.join()
        assert 0 < opened() <= before + 2  # SQLite may put off a close until the locks of the process are gone
        drive(store.shut())
        assert opened() == 0

    def test_deleted_while_open(self, path: Path, store: SqliteStore, clock: Clock) -> None:
        drive(store.put_many([Item(key(1), b"old", 60)]))
        assert drive(store.get_many([key(1)])) == [b"old"]
        for file in path.parent.iterdir(): file.unlink()
        clock.now += 1
        assert drive(store.get_many([key(1)])) == [None]
        drive(store.put_many([Item(key(1), b"new", 60)]))
        assert drive(SqliteStore(path, clock=clock).get_many([key(1)])) == [b"new"]
        drive(store.shut())
        assert check(path) == 1


class TestProcesses:
    @posix
    def test_kill_9_leaves_whole_entries_and_whole_batches(self, path: Path, store: SqliteStore) -> None:
        code = """
blob = lambda batch, n: hashlib.sha256(f'{batch}:{n}'.encode()).digest() * (1 + (batch * 7 + n * 131) % 3000)
batch = int(sys.argv[2])
while True:
    drive(store.put_many([Item(key(batch * 8 + n), blob(batch, n), 3e9) for n in range(8)]))
    print(batch, flush=True)
    batch += 1
"""
        chance, begin = random.Random(7), 0
        for _ in range(5):
            writer = elsewhere(code, path, begin)
            assert writer.stdout
            writer.stdout.readline()
            time.sleep(chance.uniform(0.05, 0.3))
            writer.kill()
            said = writer.stdout.read().split()
            writer.wait()
            writer.stdout.close()
            done = int(said[-1]) if said else begin
            check(path)
            for batch in range(begin, done + 3):
                found = drive(store.get_many([key(batch * 8 + n) for n in range(8)]))
                whole = [hashlib.sha256(f"{batch}:{n}".encode()).digest() * (1 + (batch * 7 + n * 131) % 3000) for n in range(8)]
                assert found == whole or (batch > done and found == [None] * 8), batch
            begin = done + 3

    def test_four_at_once_are_exact(self, path: Path, store: SqliteStore) -> None:
        code = """
me = int(sys.argv[2])
for n in range(150):
    drive(store.bump({'all': 1, f'me:{me}': 2}))
    drive(store.put_many([Item(key(me * 1000 + n), b'%d' % n, 3e9), Item(key(99_999), b'%d' % me * 5000, 3e9)]))
    assert drive(store.get_many([key(me * 1000 + n)])) == [b'%d' % n]
    found = drive(store.get_many([key(99_999)]))[0]
    assert len(found) == 5000 and len(set(found)) == 1
"""
        assert ended(*[elsewhere(code, path, me) for me in range(4)])  # All meet a file that is not there yet
        assert drive(store.counts()) == {"all": 600, **{f"me:{me}": 300 for me in range(4)}}
        assert check(path) == 601

    @posix
    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_fork_after_use(self, path: Path, store: SqliteStore) -> None:
        drive(store.put_many([Item(key(0), b"parent", 60)]))
        stop, seen = threading.Event(), []

        def read_on() -> None:
            while not stop.is_set(): seen.append(drive(store.get_many([key(0)])) == [b"parent"])

        thread = threading.Thread(target=read_on)  # A reader in the middle of something while we fork
        thread.start()
        for n in range(1, 6):
            if not (child := os.fork()):
                try:
                    assert drive(store.get_many([key(0)])) == [b"parent"]
                    drive(store.put_many([Item(key(n), b"child", 60)]))
                    drive(store.bump({"children": 1}))
                    asyncio.run(adrive(store.put_many([Item(key(n + 100), b"child", 60)])))
                    os._exit(0)
                except BaseException: os._exit(1)
            drive(store.bump({"parents": 1}))
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert drive(store.get_many([key(n), key(n + 100)])) == [b"child", b"child"]
        stop.set()
        thread.join()
        assert seen and all(seen)
        assert drive(store.counts()) == {"children": 5, "parents": 5}
        drive(store.shut())
        assert check(path) == 11


class TestStrangers:
    "Whatever lies under the path: it is told, and left alone."

    def refused(self, path: Path, match: str) -> None:
        before, names = sha(path), sorted(path.parent.iterdir())
        store = SqliteStore(path)
        for flow in (store.get_many([key(1)]), store.put_many([Item(key(1), b"", 60)]), store.ping(), store.delete([key(1)]), store.bump({"n": 1})):
            with pytest.raises(StoreUnavailableError, match=match) as caught: drive(flow)
            assert str(path) in str(caught.value)
        with pytest.raises(StoreUnavailableError): asyncio.run(adrive(store.get_many([key(1)])))
        drive(store.shut())
        assert sha(path) == before and sorted(path.parent.iterdir()) == names

    @pytest.mark.parametrize("mode", ["delete", "wal"])
    @pytest.mark.parametrize("owner", [0, 1234])
    def test_database_of_another_program(self, path: Path, mode: str, owner: int) -> None:
        db = sqlite3.connect(path)
        db.execute(f"PRAGMA journal_mode={mode}")
        db.execute(f"PRAGMA application_id={owner}")
        db.execute("CREATE TABLE entries(key TEXT)")  # Even with a table of the same name
        db.commit()
        db.close()
        self.refused(path, "another program.*untouched.*choose another path")

    def test_no_database(self, path: Path) -> None:
        path.write_bytes(b"name,age\nAda,36\n" * 500)
        self.refused(path, "no SQLite file.*untouched")

    def test_from_the_future(self, path: Path, store: SqliteStore) -> None:
        drive(store.put_many([Item(key(1), b"", 60)]))
        drive(store.shut())
        db = sqlite3.connect(path)
        db.execute("PRAGMA user_version=99")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        db.close()
        self.refused(path, "newer version.*untouched")

    def test_an_empty_file_is_nobodys(self, path: Path, store: SqliteStore) -> None:
        path.touch()
        drive(store.put_many([Item(key(1), b"kept", 60)]))
        assert drive(store.get_many([key(1)])) == [b"kept"]

    def test_a_folder_and_a_file_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for wrong in (tmp_path, tmp_path / "file" / "cache.sqlite"):
            for flow in (SqliteStore(wrong).get_many([key(1)]), SqliteStore(wrong).bump({"n": 1})):
                with pytest.raises(StoreUnavailableError, match=str(wrong)): drive(flow)

    def test_grows_from_version_to_version(self, path: Path, store: SqliteStore, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        drive(store.put_many([Item(key(1), b"kept", 60)]))
        drive(store.shut())
        monkeypatch.setattr(sqlite, "STEPS", (*sqlite.STEPS, ("CREATE TABLE later(key TEXT)",)))
        assert drive(store.get_many([key(1)])) == [b"kept"]
        drive(store.shut())
        monkeypatch.undo()
        with pytest.raises(StoreUnavailableError, match="newer"): drive(store.get_many([key(1)]))


class TestDamage:
    def fill(self, store: SqliteStore) -> None:
        drive(store.put_many([Item(key(n), os.urandom(3000), 3600) for n in range(300)]))
        drive(store.shut())

    def test_damaged_pages(self, path: Path, store: SqliteStore, clock: Clock) -> None:
        self.fill(store)
        good = path.read_bytes()
        path.write_bytes(good[:8192] + os.urandom(len(good) - 8192))
        damaged, failed = sha(path), 0
        for n in range(300):
            try: drive(store.get_many([key(n)]))
            except StoreUnavailableError as error:
                failed += 1
                assert str(path) in str(error) and "move it away" in str(error)
        assert failed
        with pytest.raises(StoreUnavailableError): drive(store.put_many([Item(key(n), b"x", 60) for n in range(300)]))
        assert sha(path) == damaged
        path.unlink()  # What the message says; the same store goes on
        clock.now += 1
        drive(store.put_many([Item(key(1), b"new", 60)]))
        assert drive(store.get_many([key(1)])) == [b"new"]

    def test_cut_short(self, path: Path, store: SqliteStore) -> None:
        self.fill(store)
        os.truncate(path, path.stat().st_size // 3)
        answers = 0
        for n in range(300):
            try: answers += drive(store.get_many([key(n)])) != [None]
            except StoreUnavailableError: pass
        assert answers < 300

    def test_never_another_library_s_error(self, store: SqliteStore) -> None:
        surrogate = "llm:\ud800"
        for flow in (store.get_many([surrogate]), store.put_many([Item(surrogate, b"", 60)])):
            with pytest.raises(StoreError): drive(flow)
        drive(store.put_many([Item(key(1), b"goes on", 60)]))
        assert drive(store.get_many([key(1)])) == [b"goes on"]


class TestHindered:
    @pytest.mark.timed
    def test_locked_by_another(self, path: Path, clock: Clock) -> None:
        store = SqliteStore(path, timeout=0.1, clock=clock)
        drive(store.put_many([Item(key(1), b"old", 60)]))
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        for flow in (lambda: store.put_many([Item(key(1), b"new", 60)]), lambda: store.bump({"n": 1}), lambda: store.delete([key(1)])):
            began = time.monotonic()
            with pytest.raises(StoreTimeoutError, match=f"{path}.*0.1 s"): drive(flow())
            assert 0.1 <= time.monotonic() - began < 5
            assert drive(store.get_many([key(1)])) == [b"old"]  # Readers do not wait

        async def meanwhile() -> int:
            ticks, write = 0, asyncio.create_task(adrive(store.bump({"n": 1})))
            while not write.done():
                ticks += 1
                await asyncio.sleep(0.01)
            with pytest.raises(StoreTimeoutError): await write
            return ticks

        assert asyncio.run(meanwhile()) > 2  # The loop went on
        other.execute("ROLLBACK")
        other.close()
        drive(store.put_many([Item(key(1), b"new", 60)]))
        assert drive(store.get_many([key(1)])) == [b"new"]
        drive(store.shut())

    def test_own_threads_wait_no_longer(self, path: Path) -> None:
        store, inside, leave = SqliteStore(path, timeout=0.1), threading.Event(), threading.Event()

        def hold() -> None:
            with store._shelf.writing():
                inside.set()
                leave.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        inside.wait()
        with pytest.raises(StoreTimeoutError): drive(store.bump({"n": 1}))
        assert drive(store.counts()) == {}
        leave.set()
        thread.join()
        drive(store.bump({"n": 1}))
        drive(store.shut())

    def test_full_disk(self, path: Path, store: SqliteStore) -> None:
        drive(store.put_many([Item(key(n), bytes(2000), 3600) for n in range(50)]))
        writer = store._shelf.links.writer.db
        pages = writer.execute("PRAGMA page_count").fetchone()[0]
        writer.execute(f"PRAGMA max_page_count={pages + 2}")
        with pytest.raises(StoreUnavailableError, match=f"{path}.*disk is full"): drive(store.put_many([Item(key(n), bytes(2000), 3600) for n in range(50, 300)]))
        assert drive(store.get_many([key(n) for n in range(300)])) == [bytes(2000)] * 50 + [None] * 250  # All of the batch or nothing
        drive(store.bump({"n": 1}))
        drive(store.shut())
        assert check(path) == 50

    def test_a_failed_transaction_leaves_nothing_behind(self, path: Path, store: SqliteStore) -> None:
        with pytest.raises(StoreError): drive(store.put_many([Item(key(1), b"first", 60), Item("llm:\ud800", b"second", 60)]))
        assert drive(store.get_many([key(1)])) == [None]
        drive(store.put_many([Item(key(1), b"then", 60)]))
        assert drive(store.get_many([key(1)])) == [b"then"]


class TestLong:
    "Writes that are too long for one transaction."

    def told(self, store: SqliteStore) -> list[str]:
        "What is done to the file from now on."
        drive(store.ping())
        done: list[str] = []
        store._shelf.links.writer.db.set_trace_callback(done.append)
        return done

    @pytest.mark.parametrize("size, n, transactions", [(10, 1000, 1), (10, 2500, 3), (12_288, 250, 1), (12_288, 1000, 4), (20_000_000, 3, 3)])
    def test_comes_in_parts(self, path: Path, store: SqliteStore, size: int, n: int, transactions: int) -> None:
        done = self.told(store)
        drive(store.put_many([Item(key(m), bytes(size), 60) for m in range(n)]))
        assert done.count("COMMIT") == done.count("BEGIN IMMEDIATE") == transactions
        assert drive(store.info())["entries"] == n
        done.clear()
        assert drive(store.delete([key(m) for m in range(n)])) == n
        assert done.count("COMMIT") == -(-n // 1000)
        drive(store.shut())
        assert check(path) == 0

    def test_leases_are_given_back_with_the_last_part(self, store: SqliteStore) -> None:
        keys = [key(n) for n in range(2500)]
        drive(store.acquire(keys, "a", 60))
        done = self.told(store)
        drive(store.settle([Item(k, b"x", 60) for k in keys], keys, "a"))
        ends = [at for at, what in enumerate(done) if what == "COMMIT"]
        assert [at for at, what in enumerate(done) if what.startswith("DELETE FROM leases WHERE token")] > ends[-2:-1] and len(ends) == 3
        assert drive(store.acquire(keys, "b", 60)) == [(b"x", False)] * 2500
        drive(store.settle([], keys[:3], "a"))  # With nothing to store

    def test_of_several_with_one_key_the_last_whatever_the_part(self, store: SqliteStore) -> None:
        drive(store.put_many([Item(key(n % 1500), b"%d" % n, 60) for n in range(3000)]))
        assert drive(store.get_many([key(0), key(1499)])) == [b"1500", b"2999"]

    def test_others_write_between_the_parts(self, path: Path, store: SqliteStore) -> None:
        drive(store.ping())
        begun, done, part = path.with_name("begun"), path.with_name("done"), store._shelf.put_part
        writer = elsewhere("""
begun, done = sys.argv[2:]
while not os.path.exists(begun): time.sleep(0.001)
for n in range(20): drive(store.put_many([Item(key(n), b'brief', 3e9)]))
open(done, 'w').close()
""", path, begun, done)
        seen: list[bool] = []

        def watched(*what: Any) -> None:
            part(*what)
            begun.touch()
            seen.append(done.exists())

        store._shelf.put_part = watched  # type: ignore[method-assign]
        drive(store.put_many([Item(key(1000 + n), bytes(12_288), 60) for n in range(10_000)]))
        assert ended(writer) and seen[-1]  # The other was done before the end


def as_nobody(call: Callable[[], None]) -> None:
    "Run it as a user who may not write here; root may write everywhere."
    if os.getuid(): return call()
    if not (child := os.fork()):
        try:
            os.setuid(65534)
            call()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return None


@posix
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
class TestReadOnly:
    @pytest.fixture
    def shelf(self) -> Iterator[Path]:
        "A cache file with one entry, in a folder that others can reach."
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o755)
            store = SqliteStore(Path(folder) / "cache.sqlite")
            drive(store.put_many([Item(key(1), b"kept", 3600), Item(key(2), b"brief", -1)]))
            drive(store.shut())
            os.chmod(store.path, 0o444)
            yield store.path
            os.chmod(folder, 0o755)

    def reads_but_does_not_write(self, path: Path) -> None:
        store = SqliteStore(path)
        assert drive(store.get_many([key(1), key(2)])) == [b"kept", None]
        assert asyncio.run(adrive(store.get_many([key(1)]))) == [b"kept"]
        assert drive(store.scan("llm:")).keys == [key(1)]
        drive(store.ping())
        for flow in (store.put_many([Item(key(1), b"new", 60)]), store.delete([key(1)]), store.bump({"n": 1})):
            with pytest.raises(StoreUnavailableError, match="cannot be written; give this user the right"): drive(flow)
        assert drive(store.get_many([key(1)])) == [b"kept"]
        drive(store.shut())

    def test_file(self, shelf: Path) -> None:
        os.chmod(shelf.parent, 0o777)
        as_nobody(lambda: self.reads_but_does_not_write(shelf))

    def test_file_and_folder(self, shelf: Path) -> None:
        os.chmod(shelf.parent, 0o555)
        before = sorted(shelf.parent.iterdir())
        as_nobody(lambda: self.reads_but_does_not_write(shelf))
        assert sorted(shelf.parent.iterdir()) == before

    def test_file_that_another_user_is_writing(self, shelf: Path) -> None:
        os.chmod(shelf, 0o644)
        owner = SqliteStore(shelf)
        drive(owner.put_many([Item("other:3", b"just now", 3600)]))  # In the WAL, not yet in the file
        for file in shelf.parent.iterdir(): os.chmod(file, 0o644)

        def attempt() -> None:
            self.reads_but_does_not_write(shelf)
            assert drive(SqliteStore(shelf).get_many(["other:3"])) == [b"just now"]

        if os.getuid() == 0: as_nobody(attempt)
        drive(owner.shut())

    def test_folder_that_cannot_be_made(self, shelf: Path) -> None:
        os.chmod(shelf.parent, 0o555)

        def attempt() -> None:
            for at in (shelf.parent / "new.sqlite", shelf.parent / "sub" / "new.sqlite"):
                for flow in (SqliteStore(at).get_many([key(1)]), SqliteStore(at).bump({"n": 1})):
                    with pytest.raises(StoreUnavailableError, match=str(at)): drive(flow)

        as_nobody(attempt)

    def test_file_that_may_not_be_read(self, shelf: Path) -> None:
        os.chmod(shelf, 0)

        def attempt() -> None:
            with pytest.raises(StoreUnavailableError, match="belong to this user"): drive(SqliteStore(shelf).get_many([key(1)]))

        as_nobody(attempt)


class TestRoom:
    def test_bound_of_entries_and_of_the_file(self, path: Path) -> None:
        store, chance = SqliteStore(path, max_bytes=2_000_000, timeout=5), random.Random(3)
        largest = 0
        for n in range(300):
            drive(store.put_many([Item(key(n * 20 + m), chance.randbytes(chance.randrange(100, 9000)), 3600) for m in range(20)]))
            facts = drive(store.info())
            assert facts["bytes"] <= 2_000_000
            largest = max(largest, path.stat().st_size)
        assert facts["bytes"] > 1_900_000  # Not emptier than it must be
        assert largest < 2 * 2_000_000
        assert Path(f"{path}-wal").stat().st_size <= 17_000_000
        drive(store.shut())
        check(path)

    def test_hot_keys_survive_a_scan(self, path: Path) -> None:
        store = SqliteStore(path, max_bytes=100 * 1300, timeout=5)
        hot = [key(n) for n in range(15)]
        drive(store.put_many([Item(k, bytes(1000), 3600) for k in hot]))
        for n in range(100, 2000):
            if n % 50 == 0: drive(store.get_many(hot))
            drive(store.put_many([Item(key(n), bytes(1000), 3600)]))
        assert None not in drive(store.get_many(hot))
        assert drive(store.get_many([key(n) for n in range(100, 1800)])).count(None) == 1700
        drive(store.shut())

    def test_marks_of_another_view_count(self, path: Path) -> None:
        reader, writer = (SqliteStore(path, max_bytes=100 * 1300, timeout=5) for _ in range(2))
        hot = [key(n) for n in range(15)]
        drive(writer.put_many([Item(k, bytes(1000), 3600) for k in hot]))
        for n in range(100, 1000):
            if n % 50 == 0:
                drive(reader.get_many(hot))
                drive(reader.bump({"llm:hits": 15}))
            drive(writer.put_many([Item(key(n), bytes(1000), 3600)]))
        assert None not in drive(reader.get_many(hot))
        drive(reader.shut())
        drive(writer.shut())

    def test_when_all_are_marked_a_write_still_ends(self, path: Path) -> None:
        store = SqliteStore(path, max_bytes=2000 * 300, timeout=5)
        drive(store.put_many([Item(key(n), bytes(50), 3600) for n in range(2000)]))
        drive(store.get_many([key(n) for n in range(2000)]))
        for n in range(5000, 5010):
            drive(store.put_many([Item(key(n), bytes(200_000), 3600)]))
            assert drive(store.get_many([key(n)])) == [bytes(200_000)]
        assert drive(store.info())["bytes"] <= 600_000
        drive(store.shut())
        check(path)

    def test_too_large_is_not_kept_and_takes_the_former_answer_with_it(self, path: Path) -> None:
        store = SqliteStore(path, max_bytes=5_000)
        drive(store.put_many([Item(key(1), b"old", 60), Item(key(2), b"other", 60)]))
        drive(store.put_many([Item(key(1), bytes(5_000), 60)]))
        assert drive(store.get_many([key(1), key(2)])) == [None, b"other"]
        drive(store.put_many([Item(key(n), bytes(1_000), 60) for n in range(50)]))  # A batch that is larger than the bound
        assert drive(store.info())["bytes"] <= 5_000 and drive(store.get_many([key(49)])) == [bytes(1_000)]
        drive(store.shut())

    @pytest.mark.parametrize("ttl", [0, -1, float("nan")])
    def test_a_ttl_that_is_no_time_stores_nothing(self, store: SqliteStore, ttl: float) -> None:
        drive(store.put_many([Item(key(1), b"old", 60)]))
        drive(store.put_many([Item(key(1), b"new", ttl)]))
        assert drive(store.get_many([key(1)])) == [None]

    def test_expired_are_swept_by_writes(self, store: SqliteStore, clock: Clock) -> None:
        drive(store.put_many([Item(key(n), b"brief", 10) for n in range(150)] + [Item(key(999), b"long", 60)]))
        clock.now += 10
        assert drive(store.info())["entries"] == 151
        for _ in range(3): drive(store.bump({"n": 1}))
        assert drive(store.info())["entries"] == 1

    def test_the_file_shrinks_when_it_is_cleared(self, path: Path, store: SqliteStore) -> None:
        for at in range(0, 6000, 1000): drive(store.put_many([Item(key(n), bytes(8000), 3600) for n in range(at, at + 1000)]))
        drive(store.shut())
        full = path.stat().st_size
        while keys := drive(store.scan("llm:")).keys: drive(store.delete(keys))
        drive(store.shut())
        assert full > 40_000_000 and path.stat().st_size < full / 4
        assert check(path) == 0

    def test_totals_stay_exact_through_anything(self, path: Path, clock: Clock) -> None:
        store, chance = SqliteStore(path, max_bytes=60_000, timeout=5, clock=clock), random.Random(11)
        for _ in range(400):
            what, keys = chance.random(), [key(chance.randrange(80)) for _ in range(chance.randrange(1, 6))]
            if what < 0.5: drive(store.put_many([Item(k, chance.randbytes(chance.randrange(3000)), chance.choice([0.5, 5, 500])) for k in keys]))
            elif what < 0.7: drive(store.delete(keys))
            elif what < 0.9: drive(store.get_many(keys))
            else: clock.now += chance.random() * 3
            assert drive(store.info())["bytes"] <= 60_000
        drive(store.shut())
        check(path)


def test_threads_that_keep_the_file_busy_are_no_trouble_of_the_file(tmp_path, caplog):
    store = open_store(f"sqlite:///{tmp_path}/c.db?memory=0", timeout=0.05)
    drive(store.put_many([Item("llm:a", b"a", 60)]))
    writing, go = threading.Event(), threading.Event()
    def hold():
        with store.inner._shelf.writing(): writing.set(); go.wait(20)
    thread = threading.Thread(target=hold)
    thread.start()
    assert writing.wait(20)
    with pytest.raises(StoreBusyError): drive(store.put_many([Item("llm:b", b"b", 60)]))   # somebody waits for it
    behind = threading.Thread(target=lambda: drive(store.settle([Item("llm:c", b"c", 60)], [], "token")))
    behind.start()                                                                          # nobody does
    time.sleep(0.2)
    assert store.trouble is None and drive(store.get_many(["llm:a"])) == [b"a"] and not caplog.records
    go.set(); thread.join(); behind.join(20)
    assert drive(store.get_many(["llm:b", "llm:c"])) == [None, b"c"]
    drive(store.shut())
