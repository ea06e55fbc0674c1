"""Numbers that all workers of a server add to: exact, whoever dies."""
from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from aurea_orchestrator import metrics
from aurea_orchestrator.events import Event, Outcome
from aurea_orchestrator.ledger import Ledger
from aurea_orchestrator.metrics import Metrics

ROOT = Path(__file__).parents[1]


def add(ledger, name, n=1.0, size=1):
    with ledger.lock: ledger.row(name, size)[-1] += n


WORKER = """
import sys
from pathlib import Path
from aurea_orchestrator.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
print("ready", flush=True)
for line in sys.stdin:
    for _ in range(int(line)):
        with ledger.lock: ledger.row(("asked", "somewhere"))[0] += 1
    print("done", flush=True)
"""


class Worker:
    def __init__(self, folder):
        self.process = subprocess.Popen([sys.executable, "-c", WORKER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert self.process.stdout.readline() == "ready\n"

    def count(self, n, wait=True):
        self.process.stdin.write(f"{n}\n")
        self.process.stdin.flush()
        if wait: assert self.process.stdout.readline() == "done\n"

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(20)
        self.process.stdin.close(), self.process.stdout.close()


@pytest.mark.slow
def test_killed_workers_lose_nothing_and_their_files_are_taken_over(tmp_path):
    reader, name, expected = Ledger(tmp_path), ("asked", "somewhere"), 0
    workers = [Worker(tmp_path) for _ in range(3)]
    for round in range(3):
        for worker in workers:
            worker.count(1000 + round)
            expected += 1000 + round
        workers[round].kill()
        assert reader.total()[name] == [expected]
        workers[round] = Worker(tmp_path)
        assert reader.total()[name] == [expected]
    for worker in workers: worker.count(1)
    assert reader.total()[name] == [expected + 3] and len(list(tmp_path.glob("*.ledger"))) == 3
    for worker in workers: worker.kill()


@pytest.mark.slow
def test_no_sum_goes_down_while_workers_are_killed_in_the_middle_of_counting(tmp_path):
    reader, name, seen = Ledger(tmp_path), ("asked", "somewhere"), [0.0]
    for _ in range(4):
        worker = Worker(tmp_path)
        worker.count(10**9, wait=False)
        began, deadline = seen[-1], time.monotonic() + 30
        while seen[-1] == began or len(seen) % 200:
            seen.append(reader.total().get(name, [0.0])[0])
            assert time.monotonic() < deadline
        worker.kill()
        seen.append(reader.total()[name][0])
    assert seen == sorted(seen) and len(list(tmp_path.glob("*.ledger"))) == 1


@pytest.mark.parametrize("shared", [True, False])
def test_threads_count_exactly(tmp_path, shared):
    ledger = Ledger(tmp_path if shared else None)
    def work(n):
        for at in range(2000): add(ledger, ("all",)), add(ledger, ("one", str((n + at) % 7)), 0.5, 3)
    threads = [threading.Thread(target=work, args=[n]) for n in range(8)]
    for one in threads: one.start()
    for one in threads: one.join()
    total = ledger.total()
    assert total[("all",)] == [16000] and sum(total[("one", str(n))][2] for n in range(7)) == 8000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_a_file_of_its_own_and_leaves_its_parent_s_alone(tmp_path):
    ledger = Ledger(tmp_path)
    add(ledger, ("n",), 5)
    if (child := os.fork()) == 0:
        try:
            add(ledger, ("n",), 7)
            os._exit(0 if ledger.total()[("n",)] == [12] else 1)
        finally: os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    add(ledger, ("n",), 1)
    assert ledger.total()[("n",)] == [13]
    other = Ledger(tmp_path)
    add(other, ("n",), 1)  # takes over the child's file, not the one that its parent still uses
    add(ledger, ("n",), 1)
    assert ledger.total()[("n",)] == other.total()[("n",)] == [15] and len(list(tmp_path.glob("*.ledger"))) == 2


def test_a_file_grows_while_it_is_used(tmp_path):
    ledger, other = Ledger(tmp_path), Ledger(tmp_path)
    first = ledger.row(("first",))
    for n in range(3000): add(ledger, ("path", f"/über/{n}"), n, 22)
    first[0] += 1
    add(other, ("first",), 2)
    total = other.total()
    assert total[("first",)] == [3] and [total[("path", f"/über/{n}")] for n in (0, 7, 2999)] == [[0.0] * 21 + [float(n)] for n in (0, 7, 2999)]


@pytest.mark.parametrize("harm", ["half a block", "half a row"])
def test_what_a_writer_left_half_done_is_not_counted(tmp_path, harm):
    ledger = Ledger(tmp_path)
    add(ledger, ("n",), 3)
    (path,) = tmp_path.glob("*.ledger")
    end = ledger._end
    ledger.close()
    with path.open("r+b") as file:
        if harm == "half a block": file.seek(0, 2), file.write(b"\xff" * 100)
        else: file.seek(end + 8), file.write(b'["half"]' + b"\xff" * 8)
    after, reader = Ledger(tmp_path), Ledger(tmp_path)
    for n in range(1000): add(after, ("m", str(n)), 2, 22)
    add(after, ("n",), 1)
    assert after._file.name == str(path) and reader.total()[("n",)] == [4]
    assert set(reader.total()) == {("n",), *(("m", str(n)) for n in range(1000))} and sum(cells[-1] for cells in reader.total().values()) == 2004


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("text", ["Z" * 65_400, "\x00" * 20_000, "\U0001f600" * 100_000])
def test_a_name_that_no_block_holds_is_cut(tmp_path, shared, text):
    ledger = Ledger(tmp_path if shared else None)
    for _ in range(3): add(ledger, ("asked", text), 2, 22)
    add(ledger, ("asked", "else"))
    assert ledger.total() == {("asked", text[:200]): [0.0] * 21 + [6.0], ("asked", "else"): [1.0]} and len(ledger._blocks) == 1


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return metrics._home()


def gone(home): return home / "999999999-1.00"  # No process has this number


def count(folder):
    one = Metrics("1", folder=folder)
    one.answered("GET", "other", 200, 1.0)
    one.close()
    return sorted(path.name for path in folder.glob("*")) if folder.is_dir() else None


def test_the_folder_of_all_servers_is_for_us_alone(home):
    assert count(home / "1-1.00") == ["0.ledger", "0.lock"]
    assert [stat.S_IMODE(path.stat().st_mode) for path in (home, home / "1-1.00")] == [0o700] * 2


@pytest.mark.parametrize("whose", ["a link", "a dangling link", "open to all", "open to the group", "a file", "of another"])
def test_what_others_may_have_put_there_is_left_alone(home, tmp_path, caplog, monkeypatch, whose):
    real, folder = tmp_path / "real", home / "1-1.00"
    if whose != "a dangling link": gone(real).mkdir(parents=True)
    if whose == "a file": home.touch()
    elif "link" in whose: home.symlink_to(real)
    else:
        real.rename(home)
        if "open" in whose: home.chmod(0o777 if whose == "open to all" else 0o770)
        else: monkeypatch.setattr("os.getuid", lambda: home.stat().st_uid + 1)
    precious = gone(home) / "0.ledger"
    if precious.parent.is_dir(): precious.touch()
    assert not count(folder) and "cannot be kept" in caplog.text and precious.exists() == precious.parent.is_dir()


def test_sweeping_follows_no_link_and_takes_only_what_is_a_ledger_s(home, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    for name in ("0.ledger", "thesis.txt"): (victim / name).write_text("precious")
    gone(home).mkdir(parents=True, mode=0o700)
    home.chmod(0o700)
    for name in ("0.ledger", "0.lock"): (gone(home) / name).touch()
    (gone(home) / "1.ledger").symlink_to(victim / "thesis.txt")
    (home / "999999998-1.00").symlink_to(victim)
    mixed = home / "999999997-1.00"
    mixed.mkdir()
    for name in ("0.ledger", "mine.txt"): (mixed / name).touch()
    count(home / f"{os.getpid()}-{psutil.Process().create_time():.2f}")
    assert not gone(home).exists() and [path.name for path in mixed.iterdir()] == ["mine.txt"]
    assert sorted(path.read_text() for path in victim.iterdir()) == ["precious"] * 2


def test_a_folder_that_a_person_named_is_used_as_it_is(home, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    gone(home).mkdir(parents=True)
    home.chmod(0o777)
    assert count(tmp_path / "shared") == ["0.ledger", "0.lock"] and gone(home).exists()


def test_the_page_is_the_same_with_and_without_a_folder(tmp_path, caplog):
    pages = []
    (tmp_path / "file").touch()
    for folders in ((None,), (tmp_path / "both", tmp_path / "both"), (tmp_path / "file" / "cannot be",)):
        workers = [Metrics("1", folder=folder) for folder in folders]
        for n in range(10):
            worker = workers[n % len(workers)]
            worker.hear(Event("lookup", "llm", 0.25 * n))
            worker.hear(Event("reply", "own", outcome=Outcome.SHARED, count=n))
            worker.hear(Event("store", "llm", error="StoreError"))
            worker.answered("GET", "other", 404, 2.0**n)
        pages += [worker.render() for worker in workers]
    assert len(pages) == 4 and len(set(pages)) == 1, pages
    for line in (b'cache_hits_total{cache_type="own"} 45.0', b'cache_step_duration_seconds_bucket{cache_type="llm",le="0.25",step="lookup"} 2.0', b'cache_step_duration_seconds_sum{cache_type="llm",step="lookup"} 11.25',
                 b'http_request_duration_seconds_bucket{le="120.0",method="GET",path="other"} 7.0', b'http_request_duration_seconds_count{method="GET",path="other"} 10.0', b"cache_hit_rate 100.0"):  # fmt: skip
        assert line in pages[0], line
    assert "cannot be kept" in caplog.text
