"""Leases and ears on a SQLite file, between real processes: races, killed and frozen ones, lost messages, files that vanish, forks."""
from __future__ import annotations

import asyncio
import gc
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from weakref import WeakSet

import pytest

from aurea_orchestrator import Cache, files, news
from aurea_orchestrator.effects import adrive, drive
from aurea_orchestrator.errors import StoreError, StoreUnavailableError
from aurea_orchestrator.files import grow
from aurea_orchestrator.stores import sqlite
from aurea_orchestrator.stores.base import Item
from aurea_orchestrator.stores.sqlite import SqliteStore
from tests.test_sqlite import Clock, as_nobody, check, elsewhere, ended, key, posix

pytestmark = posix
LONG = 3e9


class Heard:
    "All that was heard, in order."

    def __init__(self) -> None: self.all: list[list[str] | None] = []
    def __call__(self, keys: Sequence[str] | None) -> None: self.all.append(None if keys is None else list(keys))
    @property
    def names(self) -> set[str]: return {k for keys in self.all for k in keys or ()}


def eventually(true: Callable[[], object], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end: return False
        time.sleep(0.002)
    return True


@pytest.fixture
def path(tmp_path: Path) -> Path: return tmp_path / "cache.sqlite"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(path, timeout=10)
    yield store
    drive(store.shut())


@pytest.fixture
def other(path: Path) -> Iterator[SqliteStore]:
    other = SqliteStore(path, timeout=10)
    yield other
    drive(other.shut())


def hearing(store: SqliteStore) -> Heard:
    "Listens at a store, and has begun to hear."
    heard = Heard()
    drive(store.get_many([key(0)]))
    store.ears().listen(heard)
    assert eventually(lambda: store.ears().until() > time.monotonic()) and heard.all == [None]
    return heard


def pipes(path: Path) -> list[str]:
    folder = Path(f"{path}.ears")
    return sorted(os.listdir(folder)) if folder.exists() else []


def line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout
    return process.stdout.readline().strip()


def held(path: Path) -> dict[str, str]:
    db = sqlite3.connect(path)
    try: return dict(db.execute("SELECT key, token FROM leases"))
    finally: db.close()


def changes(path: Path) -> int:
    db = sqlite3.connect(path)
    try: return int(db.execute("SELECT changes FROM shelf").fetchone()[0])
    finally: db.close()


class TestLeases:
    def test_one_gets_it(self, store: SqliteStore, other: SqliteStore) -> None:
        assert drive(store.acquire([key(1), key(2)], "a", 4)) == [(None, True), (None, True)]
        assert drive(other.acquire([key(2), key(3), key(2)], "b", 4)) == [(None, False), (None, True), (None, False)]
        assert drive(store.acquire([key(1)], "a", 4)) == [(None, True)]  # Whoever has it has it
        drive(store.settle([Item(key(1), b"one", 60), Item(key(2), b"two", 60)], [key(1), key(2)], "a"))
        assert drive(other.acquire([key(1), key(3), key(2)], "c", 4)) == [(b"one", False), (None, False), (b"two", False)]
        assert asyncio.run(adrive(other.acquire([key(4)], "b", 4))) == [(None, True)]
        assert drive(other.acquire([], "b", 4)) == []

    def test_bytes_need_no_transaction(self, path: Path, store: SqliteStore) -> None:
        drive(store.put_many([Item(key(1), b"one", 60)]))
        busy = sqlite3.connect(path, isolation_level=None)
        busy.execute("BEGIN IMMEDIATE")
        assert drive(store.acquire([key(1)], "a", 4)) == [(b"one", False)]
        busy.close()

    def test_by_force_but_not_from_another(self, store: SqliteStore, other: SqliteStore) -> None:
        drive(store.put_many([Item(key(1), b"old", 60)]))
        assert drive(store.acquire([key(1), key(2)], "a", 4, force=True)) == [(b"old", True), (None, True)]
        assert drive(other.acquire([key(1), key(2)], "b", 4, force=True)) == [(b"old", False), (None, False)]
        drive(store.settle([Item(key(1), b"new", 60)], [key(1), key(2)], "a"))
        assert drive(other.acquire([key(1)], "b", 4, force=True)) == [(b"new", True)]

    def test_a_token_is_needed(self, path: Path, store: SqliteStore, other: SqliteStore) -> None:
        drive(store.acquire([key(1)], "a", 4))
        drive(other.settle([], [key(1)], "b"))
        drive(other.renew([key(1)], "b", 400))
        assert held(path) == {key(1): "a"}
        drive(other.settle([Item(key(1), b"late", 60)], [key(1)], "b"))             # its lease is gone, so it may be older than what comes
        assert held(path) == {key(1): "a"} and drive(store.get_many([key(1)])) == [None]
        drive(store.settle([], [key(1)], "a"))
        assert held(path) == {}

    def test_expired_are_taken_over_and_renewed_are_not(self, path: Path) -> None:
        clock = Clock()
        store = SqliteStore(path, timeout=5, clock=clock)
        drive(store.acquire([key(1), key(2)], "a", 4))
        clock.now += 3
        drive(store.renew([key(2)], "a", 4))
        clock.now += 1
        assert drive(store.acquire([key(1), key(2)], "b", 4)) == [(None, True), (None, False)]
        drive(store.renew([key(1)], "a", 400))
        drive(store.settle([], [key(1)], "a"))  # Too late: it is b's now
        assert held(path) == {key(1): "b", key(2): "a"}
        clock.now += 4
        drive(store.renew([key(1)], "b", 400))  # Over is over
        assert drive(store.acquire([key(1)], "c", 4)) == [(None, True)]
        clock.now += 4 + sqlite.LEFT
        drive(store.bump({"n": 1}))
        assert held(path) == {}
        drive(store.shut())

    def test_expired_bytes_are_missing(self, path: Path) -> None:
        clock = Clock()
        store = SqliteStore(path, timeout=5, clock=clock)
        drive(store.put_many([Item(key(1), b"brief", 5)]))
        clock.now += 5
        assert drive(store.acquire([key(1)], "a", 4)) == [(None, True)]
        drive(store.shut())

    def test_settle_is_all_or_nothing(self, path: Path, store: SqliteStore) -> None:
        drive(store.acquire([key(1)], "a", 60))
        with pytest.raises(StoreError): drive(store.settle([Item(key(1), b"one", 60), Item("llm:\ud800", b"", 60)], [key(1)], "a"))
        assert held(path) == {key(1): "a"} and drive(store.get_many([key(1)])) == [None]

    def test_nobody_finds_a_key_without_bytes_and_lease(self, path: Path, store: SqliteStore) -> None:
        drive(store.acquire([key(n) for n in range(300)], "a", 60))
        settling = elsewhere("for n in range(300): drive(store.settle([Item(key(n), b'done', 3e9)], [key(n)], 'a'))", path)
        db, both, begun = sqlite3.connect(path), set(), 0
        while settling.poll() is None:
            rows = db.execute("SELECT (SELECT count(*) FROM entries), (SELECT count(*) FROM leases)").fetchall()
            both.add(sum(rows[0]))
            begun += 0 < rows[0][0] < 300
        db.close()
        assert ended(settling) and both == {300} and begun
        assert held(path) == {} and check(path) == 300

    @pytest.mark.parametrize("processes", [2, 4])
    def test_exactly_one_of_many(self, path: Path, store: SqliteStore, processes: int) -> None:
        code = """
me, chance = sys.argv[2], random.Random(sys.argv[2])
drive(store.ping())
print("ready", flush=True)
while not os.path.exists(sys.argv[3]): time.sleep(0.0005)
for n in range(100):
    keys = [key(n * 4 + m) for m in range(4)]
    chance.shuffle(keys)
    time.sleep(chance.random() / 500)
    for k, (blob, granted) in zip(keys, drive(store.acquire(keys, me, 60))):
        if granted: print(k)
"""
        racing = [elsewhere(code, path, f"process {me}", path.with_name("go")) for me in range(processes)]
        assert [line(p) for p in racing] == [b"ready"] * processes
        path.with_name("go").touch()
        said = [p.communicate()[0].decode().split() for p in racing]
        assert [p.returncode for p in racing] == [0] * processes
        assert sorted(k for keys in said for k in keys) == sorted(key(n) for n in range(400))
        assert sum(map(bool, said)) > 1  # It was a race

    def test_threads_too(self, store: SqliteStore) -> None:
        granted: list[str] = []

        def run(me: str) -> None:
            for n in range(50): granted.extend(key(n) for _, ours in drive(store.acquire([key(n)], me, 60)) if ours)

        threads = [threading.Thread(target=run, args=[str(me)]) for me in range(6)]
        for t in threads: t.start()
        for t in threads: t.join()
        assert sorted(granted) == [key(n) for n in range(50)]

    def test_a_killed_owner_loses_it_after_its_ttl(self, path: Path, store: SqliteStore) -> None:
        heard = hearing(store)
        owner = elsewhere("print(drive(store.acquire([key(1)], 'a', 1.0)), time.time(), flush=True); time.sleep(60)", path)
        said, until = line(owner).decode().rsplit(" ", 1)
        assert said == "[(None, True)]"
        owner.kill()
        owner.communicate()
        if time.time() < float(until) + 0.8: assert drive(store.acquire([key(1)], "b", 4)) == [(None, False)]
        assert eventually(lambda: key(1) in heard.names)  # Who waits is woken although nobody is left to say so
        assert time.time() >= float(until) + 0.99 and heard.all == [None, [key(1)]]
        assert drive(store.acquire([key(1)], "b", 4)) == [(None, True)]


class TestFile:
    def test_a_file_of_the_first_version_grows(self, path: Path, store: SqliteStore) -> None:
        db = sqlite3.connect(path, isolation_level=None)
        grow(db, path, sqlite.APPLICATION_ID, sqlite.STEPS[:1], sqlite.FRESH)
        db.execute("INSERT INTO entries(key, expires, size, blob) VALUES (?, 3e9, ?, 'x')", (key(1), 1 + 2 * len(key(1)) + sqlite.OVERHEAD_BYTES))
        db.execute("UPDATE entries SET blob = CAST(blob AS BLOB)")
        db.close()
        assert drive(store.acquire([key(1), key(2)], "a", 4)) == [(b"x", False), (None, True)]
        drive(store.put_many([Item(key(1), b"replaced", LONG)]))
        assert check(path) == 1 and changes(path) == 1
        drive(store.delete([key(1)]))
        assert check(path) == 0 and changes(path) == 2

    def test_a_file_of_the_third_version_begins_its_tapes_anew(self, path: Path, store: SqliteStore) -> None:
        db = sqlite3.connect(path, isolation_level=None)
        grow(db, path, sqlite.APPLICATION_ID, sqlite.STEPS[:3], sqlite.FRESH)
        db.execute("INSERT INTO leases VALUES (?, 'run', 3e9)", (key(1),))
        db.executemany("INSERT INTO tapes VALUES (?, 'run', ?, x'', 3e9)", [(key(1), place) for place in (-1, 0, 1)])
        db.close()
        assert drive(store.relay(key(1), "run", 2, [b"c"], 60)) == -1  # Nobody wishes for it any more
        assert drive(store.follow(key(1), "run", 2)) == (("run", [], True))
        assert [drive(store.relay(key(1), "run", *what, 60)) for what in ((3, [b"d"]), (0, [b"a", b"b", b"c", b"d"]))] == [0, 4]
        assert drive(store.follow(key(1), "run", 2)) == (("run", [b"c", b"d"], True))

    def test_what_counts_as_a_change(self, path: Path) -> None:
        clock = Clock()
        store = SqliteStore(path, max_bytes=20 * (1000 + 2 * len(key(0)) + sqlite.OVERHEAD_BYTES), timeout=5, clock=clock)
        drive(store.put_many([Item(key(n), bytes(1000), 50) for n in range(10)]))
        drive(store.bump({"n": 1}))
        assert changes(path) == 0  # New entries and counters do not
        clock.now += 50
        drive(store.bump({"n": 1}))
        assert changes(path) == 0 and drive(store.info())["entries"] == 0  # nor do the expired
        for n in range(100, 200): drive(store.put_many([Item(key(n), bytes(1000), 50)]))
        assert changes(path) == 0 and drive(store.info())["entries"] == 20  # nor do the evicted
        drive(store.put_many([Item(key(199), b"", 50), Item(key(300), bytes(1000), 50)]))
        drive(store.put_many([Item(key(199), bytes(100_000), 50)]))  # Too large; the former one goes
        assert changes(path) == 2
        drive(store.delete([key(300), key(12345)]))
        assert changes(path) == 3
        drive(store.acquire([key(1), key(2)], "a", 4))
        drive(store.settle([Item(key(1), b"", 4)], [key(1), key(2)], "a"))
        assert changes(path) == 5
        drive(store.shut())
        check(path)

    def test_read_only(self, path: Path, store: SqliteStore) -> None:
        shelf = Path("/tmp") / f"aurea-{os.getpid()}-{random.randrange(10**9)}"
        shelf.mkdir()
        try:
            owner = SqliteStore(shelf / "cache.sqlite")
            drive(owner.put_many([Item(key(1), b"kept", 3600)]))
            drive(owner.shut())
            for folder_mode in (0o777, 0o555):
                for ending in ("-wal", "-shm"): Path(f"{owner.path}{ending}").unlink(missing_ok=True)
                os.chmod(owner.path, 0o444)
                os.chmod(shelf, folder_mode)

                def attempt(can_hear: bool = folder_mode == 0o777) -> None:
                    reader, heard = SqliteStore(owner.path), Heard()
                    assert drive(reader.acquire([key(1)], "a", 4)) == [(b"kept", False)]
                    for flow in (reader.acquire([key(1), key(2)], "a", 4), reader.renew([key(1)], "a", 4), reader.settle([], [key(1)], "a")):
                        with pytest.raises(StoreUnavailableError, match="cannot be written"): drive(flow)
                    reader.ears().listen(heard)
                    time.sleep(0.2)
                    assert (reader.ears().until() > time.monotonic()) is can_hear  # What is immutable cannot be heard
                    drive(reader.shut())

                as_nobody(attempt)
        finally:
            os.chmod(shelf, 0o755)
            shutil.rmtree(shelf)


class TestTapes:
    def on_a_tape(self, clock: Clock, path: Path) -> SqliteStore:
        store = SqliteStore(path, timeout=5, clock=clock)
        drive(store.acquire([key(1)], "run", LONG))
        drive(store.follow(key(1), "", 0))
        return store

    def test_a_record_costs_the_same_however_long_the_tape(self, path: Path) -> None:
        store, steps, costs = self.on_a_tape(Clock(), path), [0], []
        store._shelf.links.writer.db.set_progress_handler(lambda: steps.__setitem__(0, steps[0] + 1), 1)
        for place in range(1500):
            before = steps[0]
            assert drive(store.relay(key(1), "run", place, [b"x" * 60], 60)) == place + 1
            costs.append(steps[0] - before)
        assert max(costs[1000:]) < 1.2 * max(costs[1:10])
        drive(store.shut())

    def test_a_tape_is_kept_and_goes_as_a_whole(self, path: Path) -> None:
        clock = Clock()
        store = self.on_a_tape(clock, path)
        for place in range(3):
            drive(store.relay(key(1), "run", place, [b"x"], 60))
            clock.now += 50
        assert drive(store.follow(key(1), "run", 0)).records == [b"x"] * 3  # The last one keeps the first
        clock.now += 10
        assert drive(store.follow(key(1), "run", 0)).records == []  # And a new wish
        db = sqlite3.connect(path)
        assert db.execute("SELECT place FROM tapes").fetchall() == [(-1,)]
        db.close()
        drive(store.settle([], [key(1)], "run"))
        clock.now += LONG
        drive(store.bump({"n": 1}))
        db = sqlite3.connect(path)
        assert db.execute("SELECT count(*) FROM tapes").fetchone() == (0,)
        db.close()
        drive(store.shut())

    def test_where_nobody_leads_no_wish_is_left(self, path: Path, store: SqliteStore) -> None:
        assert drive(store.follow(key(1), "", 0)) == ("", [], False) and changes(path) == 0


@pytest.mark.usefixtures("alone")
class TestEars:
    def test_no_thread_and_no_folder_before_somebody_listens(self, path: Path, store: SqliteStore) -> None:
        before = threading.active_count()
        drive(store.acquire([key(1)], "a", 4))
        drive(store.settle([Item(key(1), b"one", 60)], [key(1)], "a"))
        assert store.ears() is store.ears() and store.ears().until() <= time.monotonic()
        assert threading.active_count() == before and not Path(f"{path}.ears").exists()

    def test_what_another_process_does_is_heard_by_name(self, path: Path, store: SqliteStore) -> None:
        heard = hearing(store)
        steps = {
            "put_many([Item(key(1), b'new', 60)])": {key(1)},
            "put_many([Item(key(1), b'replaced', 60), Item(key(2), b'new', 60)])": {key(1), key(2)},
            "delete([key(2), key(3)])": {key(2), key(3)},
            "acquire([key(4), key(5)], 'a', 60)": set(),
            "settle([Item(key(4), b'new', 60)], [key(4)], 'a')": {key(4)},
            "settle([], [key(5)], 'a')": {key(5)},
            "bump({'n': 1})": set(),
            "put_many([Item(key(6), b'last', 60)])": {key(6)},
        }
        assert ended(elsewhere("\n".join(f"drive(store.{step})" for step in steps), path))
        assert eventually(lambda: key(6) in heard.names)
        time.sleep(2 * (news.LOOK + news.GRACE))
        assert [set(keys) for keys in heard.all[1:]] == [names for names in steps.values() if names]  # Nothing was missed, so never None
        assert store.ears().until() > time.monotonic()

    def test_heard_soon(self, path: Path, store: SqliteStore) -> None:
        heard, begins = hearing(store), []
        writer = elsewhere("""
for n in range(40):
    drive(store.put_many([Item(key(n % 4), b'%d' % n, 60)]))
    print(time.monotonic(), flush=True)
    time.sleep(0.01)
""", path)
        for n in range(40):
            begins.append(float(line(writer)))
            assert eventually(lambda n=n: len(heard.all) > n + 1, 1.0)  # Usually well below a millisecond; see the benchmark
        assert ended(writer) and None not in heard.all[1:]

    def test_own_changes_are_heard_too_and_all_stores_hear(self, store: SqliteStore, other: SqliteStore) -> None:
        one, two = hearing(store), hearing(other)
        drive(store.put_many([Item(key(1), b"one", 60)]))
        asyncio.run(adrive(other.put_many([Item(key(2), b"two", 60)])))
        for heard in (one, two): assert eventually(lambda h=heard: h.names == {key(1), key(2)})

    def test_a_large_batch_comes_in_parts(self, path: Path, store: SqliteStore, other: SqliteStore) -> None:
        heard, keys = hearing(store), [key(n) for n in range(3000)]
        drive(other.put_many([Item(k, b"", 60) for k in keys]))
        drive(other.delete(keys))
        assert eventually(lambda: sum(len(part or ()) for part in heard.all) == 6000)
        time.sleep(2 * (news.LOOK + news.GRACE))
        assert heard.names == set(keys) and None not in heard.all[1:]

    def test_many_writers_at_once(self, path: Path, store: SqliteStore) -> None:
        heard = hearing(store)
        code = """
me = int(sys.argv[2])
for n in range(150):
    k = [key(me * 1000 + n), key(n)]
    drive(store.acquire(k, sys.argv[2], 60))
    drive(store.settle([Item(k[0], b'x', 3e9), Item(k[1], b'%d' % me, 3e9)], k, sys.argv[2]))
"""
        assert ended(*[elsewhere(code, path, me) for me in range(1, 5)])
        assert eventually(lambda: len(heard.names) == 750) and store.ears().until() > time.monotonic()

    def test_who_stops_listening_hears_nothing(self, store: SqliteStore, other: SqliteStore) -> None:
        heard, first, second = hearing(store), Heard(), Heard()
        stops = [store.ears().listen(one) for one in (first, second, second)]
        stops[0]()
        stops[1]()
        drive(other.put_many([Item(key(1), b"one", 60)]))
        assert eventually(lambda: key(1) in heard.names and second.all == [[key(1)]]) and first.all == []

    def test_the_thread_ends_with_the_last_listener(self, path: Path, store: SqliteStore, other: SqliteStore) -> None:
        def ears() -> int: return sum(t.name == "aurea-ears" for t in threading.enumerate())
        heard = Heard()
        drive(store.ping())
        stops = [store.ears().listen(one) for one in (heard, Heard())]
        assert eventually(lambda: len(pipes(path)) == 1) and ears() == 1
        stops[1]()
        drive(other.put_many([Item(key(1), b"one", 60)]))
        assert eventually(lambda: key(1) in heard.names) and ears() == 1
        stops[0]()
        stops[0]()
        assert eventually(lambda: ears() == 0 and not pipes(path)) and store.ears().until() == 0.0
        store.ears().listen(heard)
        assert eventually(lambda: store.ears().until() > time.monotonic()) and ears() == 1
        drive(other.put_many([Item(key(2), b"two", 60)]))
        assert eventually(lambda: key(2) in heard.names)

    def test_an_error_that_nobody_expected_ends_nothing(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        heard, wrong = Heard(), [False]

        def look() -> tuple[str, int, list[str]]:
            if wrong[0]: raise RuntimeError("Set changed size during iteration")
            return "file", 1, []

        ears = news.News(tmp_path / "ears", look)
        ears.listen(heard)
        try:
            assert eventually(lambda: ears.until() > time.monotonic())
            wrong[0] = True
            assert eventually(lambda: ears.until() == 0.0) and heard.all == [None, None]
            wrong[0] = False
            assert eventually(lambda: ears.until() > time.monotonic())
            assert "begins anew" in caplog.text and "Set changed size" in caplog.text
            with open(next((tmp_path / "ears").glob("*.ear")), "wb") as pipe: pipe.write(b"[Infinity, 1, []]\n" + b"[" * 100_000 + b"\n")  # Neither is a ValueError
            assert eventually(lambda: len(heard.all) > 3) and eventually(lambda: ears.until() > time.monotonic())
        finally: ears.close()

    def test_connections_are_counted_while_none_is_added(self, store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
        class Guarded(WeakSet[files.Link]):
            def __iter__(self) -> Iterator[files.Link]:
                assert files._opening.locked()  # An `add` of another thread would be an error in the midst of this
                return super().__iter__()

        drive(store.ping())
        links = store._shelf.links
        monkeypatch.setattr(links, "_mine", Guarded(links._mine.copy()))
        links.look_again()
        assert links.writer.checked == float("-inf")

    def test_a_listener_that_fails_harms_nobody(self, store: SqliteStore, other: SqliteStore, caplog: pytest.LogCaptureFixture) -> None:
        store.ears().listen(lambda keys: 1 / 0)  # Before the other, and it does not take the thread with it
        heard = Heard()
        store.ears().listen(heard)
        drive(store.ping())
        assert eventually(lambda: store.ears().until() > time.monotonic())
        drive(other.put_many([Item(key(1), b"one", 60)]))
        assert eventually(lambda: key(1) in heard.names) and "what listens" in caplog.text

    def test_shut(self, path: Path, store: SqliteStore, other: SqliteStore) -> None:
        heard = hearing(store)
        assert len(pipes(path)) == 1 and "aurea-ears" in {t.name for t in threading.enumerate()}
        drive(store.shut())
        assert not Path(f"{path}.ears").exists() and "aurea-ears" not in {t.name for t in threading.enumerate()}
        assert heard.all == [None, None]  # Who waits does not wait for ever
        drive(other.put_many([Item(key(1), b"one", 60)]))
        assert store.ears().until() == 0.0 or eventually(lambda: store.ears().until() > time.monotonic())  # Opens again when it is asked
        assert eventually(lambda: store.ears().until() > time.monotonic()) and eventually(lambda: len(heard.all) == 3)
        drive(other.put_many([Item(key(2), b"two", 60)]))
        assert eventually(lambda: key(2) in heard.names)
        drive(store.shut())
        asyncio.run(adrive(store.shut()))


class TestLost:
    def test_a_frozen_listener_is_told_that_it_missed_something(self, path: Path, store: SqliteStore) -> None:
        drive(store.ping())
        listener = elsewhere("""
seen, until = [], store.ears().until
store.ears().listen(lambda keys: seen.append(keys))
while until() < time.monotonic(): time.sleep(0.01)
last = time.monotonic()
print("hears", flush=True)
while (now := time.monotonic()) - last < 1:
    last = now
    time.sleep(0.001)
while until() < time.monotonic(): time.sleep(0.001)  # Until it is sure again, nothing is served from memory
print("sure", None in seen[1:], len(seen) > 3, flush=True)
time.sleep(60)
""", path)
        try:
            assert line(listener) == b"hears"
            listener.send_signal(signal.SIGSTOP)
            time.sleep(1.2)
            longest, blob = 0.0, bytes(10)
            for _ in range(20):  # 2 MB of keys; no pipe holds as much
                began = time.monotonic()
                drive(store.put_many([Item(key(m), blob, 60) for m in range(1500)]))
                longest = max(longest, time.monotonic() - began)
            assert longest < 5  # Nobody waits for who is frozen
            listener.send_signal(signal.SIGCONT)
            assert line(listener) == b"sure True True"
        finally:
            listener.kill()
            listener.communicate()

    def test_a_writer_that_died_before_it_told(self, path: Path, store: SqliteStore) -> None:
        drive(store.put_many([Item(key(1), b"one", 60)]))
        heard = hearing(store)
        db = sqlite3.connect(path)  # Nor does somebody with a tool of his own tell anybody
        db.execute("DELETE FROM entries")
        db.commit()
        db.close()
        assert eventually(lambda: heard.all == [None, None])
        drive(store.put_many([Item(key(1), b"again", 60)]))
        drive(store.put_many([Item(key(1), b"and again", 60)]))
        assert eventually(lambda: heard.all == [None, None, [key(1)], [key(1)]])
        time.sleep(2 * (news.LOOK + news.GRACE))
        assert heard.all[2:] == [[key(1)], [key(1)]] and store.ears().until() > time.monotonic()  # One loss, one None

    def test_what_is_remembered_stays_true_while_writers_are_killed(self, path: Path, store: SqliteStore) -> None:
        known: dict[str, bytes | None] = {}
        heard, lock, missed, chance = [0], threading.Lock(), [0], random.Random(5)

        def forget(keys: Sequence[str] | None) -> None:
            with lock:
                heard[0] += 1
                missed[0] += keys is None
                if keys is None: known.clear()
                for k in keys or (): known.pop(k, None)

        drive(store.ping())
        store.ears().listen(forget)
        for _ in range(6):
            code = "n = 0\nwhile True: n += 1; drive(store.put_many([Item(key(random.randrange(20)), b'%d %d' % (os.getpid(), n), 3e9)]))"
            writers = [elsewhere(code, path) for _ in range(2)]
            begun, end = heard[0], time.monotonic() + 0.4 + chance.random() * 0.2
            while time.monotonic() < end or heard[0] < begun + 10:
                before, k = heard[0], key(chance.randrange(20))
                blob = drive(store.get_many([k]))[0]
                with lock:
                    if heard[0] == before: known[k] = blob
            for writer in writers:
                writer.kill()
                writer.communicate()
            time.sleep(3 * (news.LOOK + news.GRACE))
            assert store.ears().until() > time.monotonic()
            with lock: kept = dict(known)
            assert kept == dict(zip(kept, drive(store.get_many(list(kept))), strict=True))
        assert heard[0] > missed[0] > 0 and check(path) == 20

    def test_without_pipes_the_count_is_enough(self, path: Path, store: SqliteStore, other: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(os, "mkfifo")
        heard = hearing(store)
        drive(other.acquire([key(1)], "a", 60))
        drive(other.put_many([Item(key(2), b"new", 60)]))
        time.sleep(0.2)
        assert heard.all == [None] and pipes(path) == []
        drive(other.settle([Item(key(1), b"one", 60)], [key(1)], "a"))
        assert eventually(lambda: heard.all == [None, None])

    def test_the_dead_are_removed(self, path: Path, store: SqliteStore) -> None:
        drive(store.ping())
        listeners = [elsewhere("store.ears().listen(print)\nwhile store.ears().until() < time.monotonic(): time.sleep(0.01)\nprint('hears', flush=True); time.sleep(60)", path) for _ in range(2)]
        for p in listeners:
            while line(p) != b"hears": pass
        assert len(pipes(path)) == 2
        listeners[0].kill()
        listeners[0].communicate()
        drive(store.put_many([Item(key(1), b"one", 60)]))
        assert len(pipes(path)) == 1
        listeners[1].kill()
        listeners[1].communicate()
        hearing(store)  # A new one looks around as well
        assert len(pipes(path)) == 1

    def test_only_pipes_are_written(self, path: Path, store: SqliteStore, other: SqliteStore, tmp_path: Path) -> None:
        hearing(store)
        folder, diary = Path(f"{path}.ears"), tmp_path / "diary"
        diary.write_text("Dear diary")
        (folder / "link.ear").symlink_to(diary)
        os.link(diary, folder / "hard.ear")
        (folder / "folder.ear").mkdir()
        (folder / "nothing.ear").symlink_to("nowhere")
        os.mkfifo(tmp_path / "fifo")
        drive(other.put_many([Item(key(1), b"one", 60)]))
        assert diary.read_text() == "Dear diary" and oct(folder.stat().st_mode & 0o777) == "0o700"

    def test_nonsense_in_a_pipe(self, path: Path, store: SqliteStore, other: SqliteStore) -> None:
        heard = hearing(store)
        with open(Path(f"{path}.ears") / pipes(path)[0], "wb") as pipe: pipe.write(b"\n{}\n[1]\n[1,2,\n[null,1,[]]\n\xff\xfe\n7\n" + b"x" * 5000 + b"\n")
        drive(other.put_many([Item(key(1), b"one", 60)]))
        assert eventually(lambda: key(1) in heard.names) and store.ears().until() > time.monotonic()


class TestVanishing:
    def test_a_file_that_is_removed_and_made_again(self, path: Path, store: SqliteStore, other: SqliteStore) -> None:
        drive(store.put_many([Item(key(1), b"one", 60)]))
        heard = hearing(store)
        shutil.rmtree(path.parent)
        assert eventually(lambda: store.ears().until() == 0.0) and len(heard.all) > 1
        time.sleep(0.3)
        assert not path.parent.exists()  # Listening makes nothing
        path.parent.mkdir()
        assert ended(elsewhere("drive(store.put_many([Item(key(2), b'two', 60)]))", path))
        assert eventually(lambda: store.ears().until() > time.monotonic()) and heard.all.count(None) > 2
        assert ended(elsewhere("drive(store.put_many([Item(key(2), b'changed', 60)]))", path))
        assert eventually(lambda: key(2) in heard.names)

    def test_a_file_that_is_replaced(self, path: Path, store: SqliteStore) -> None:
        drive(store.put_many([Item(key(1), b"one", 60)]))
        heard = hearing(store)
        new = SqliteStore(path.with_name("new.sqlite"))
        drive(new.put_many([Item(key(1), b"another", 60)]))
        drive(new.shut())
        for ending in ("-wal", "-shm"): Path(f"{path}{ending}").unlink(missing_ok=True)
        os.replace(new.path, path)
        assert eventually(lambda: len(heard.all) > 1) and set(map(type, heard.all)) == {type(None)}
        assert eventually(lambda: store.ears().until() > time.monotonic())
        assert drive(store.get_many([key(1)])) == [b"another"]

    def test_a_file_that_cannot_be_read(self, path: Path, store: SqliteStore) -> None:
        heard = hearing(store)
        drive(store.put_many([Item(key(1), b"one", 60)]))
        (path.parent / "other").write_bytes(b"Dear diary" * 1000)
        os.replace(path.parent / "other", path)
        assert eventually(lambda: store.ears().until() == 0.0) and heard.all[-1] is None
        time.sleep(0.2)
        assert store.ears().until() == 0.0 and path.read_bytes() == b"Dear diary" * 1000

    def test_pipes_that_are_removed(self, path: Path, store: SqliteStore, other: SqliteStore) -> None:
        heard = hearing(store)
        shutil.rmtree(f"{path}.ears")
        drive(other.put_many([Item(key(1), b"one", 60)]))
        assert eventually(lambda: pipes(path))
        drive(other.put_many([Item(key(2), b"two", 60)]))
        drive(other.delete([key(1)]))
        assert eventually(lambda: key(1) in heard.names or heard.all[-1] is None)

    def test_listening_before_there_is_a_file(self, path: Path, store: SqliteStore, other: SqliteStore) -> None:
        heard = Heard()
        store.ears().listen(heard)
        time.sleep(0.2)
        assert not path.exists() and pipes(path) == [] and store.ears().until() == 0.0
        drive(other.put_many([Item(key(1), b"one", 60)]))
        assert eventually(lambda: store.ears().until() > time.monotonic())
        drive(other.put_many([Item(key(1), b"two", 60)]))
        assert eventually(lambda: key(1) in heard.names)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.usefixtures("alone")
class TestForks:
    def test_parent_and_child_hear(self, path: Path, store: SqliteStore) -> None:
        heard = hearing(store)
        for n in range(3):
            if not (child := os.fork()):
                try:
                    signal.alarm(20)
                    heard.all.clear()
                    store.ears().until()  # From here on it has ears of its own
                    assert eventually(lambda: store.ears().until() > time.monotonic())
                    assert heard.all == [None] and len(pipes(path)) == 2
                    drive(store.put_many([Item(key(n), b"child", 60)]))
                    assert eventually(lambda n=n: key(n) in heard.names)
                    drive(store.shut())
                    os._exit(0)
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                    os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert eventually(lambda n=n: key(n) in heard.names)
        assert len(pipes(path)) == 1 and eventually(lambda: store.ears().until() > time.monotonic())

    def test_a_child_does_not_keep_its_parent_s_pipe_alive(self, path: Path, store: SqliteStore) -> None:
        drive(store.ping())
        parent = elsewhere("""
store.ears().listen(print)
while store.ears().until() < time.monotonic(): time.sleep(0.01)
child = os.fork()
if not child: os.close(1); time.sleep(60)
print('child', child, flush=True)
time.sleep(60)
""", path)
        while not (said := line(parent)).startswith(b"child"): pass
        try:
            parent.kill()
            parent.communicate()
            assert len(pipes(path)) == 1
            drive(store.put_many([Item(key(1), b"one", 60)]))
            assert pipes(path) == []
        finally: os.kill(int(said.split()[1]), signal.SIGKILL)

    def test_forks_while_pipes_are_made(self, path: Path) -> None:
        stop = threading.Event()

        def open_and_shut() -> None:
            while not stop.is_set():
                store = SqliteStore(path, timeout=10)
                drive(store.ping())
                store.ears().listen(lambda keys: None)
                eventually(lambda s=store: s.ears().until() > time.monotonic())
                drive(store.shut())

        thread = threading.Thread(target=open_and_shut)
        thread.start()
        try:
            for _ in range(30):
                if not (child := os.fork()):
                    ours = [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}") and ".ear" in os.readlink(f"/proc/self/fd/{fd}")]
                    os._exit(len(ours))
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        finally:
            stop.set()
            thread.join()


@pytest.mark.usefixtures("alone")
def test_ears_of_a_cache_that_was_dropped_end_though_nothing_happens(tmp_path):
    def ears() -> list[str]: return [thread.name for thread in threading.enumerate() if thread.name == "aurea-ears"]
    cache = Cache.from_url(f"sqlite:///{tmp_path}/c.db")
    before = len(ears())
    drive(cache.store.put_many([Item(key(1), b"one", 60)]))
    drive(cache.store.get_many([key(1)]))
    assert eventually(lambda: len(ears()) == before + 1)
    del cache
    gc.collect()
    assert eventually(lambda: len(ears()) == before)
