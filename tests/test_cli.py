"""The command `aurea`: on every store, for people and for scripts, when all is well and when it is not."""
from __future__ import annotations

import csv
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import httpx2
import pytest
from typer.testing import CliRunner

from aurea_orchestrator import Cache
from aurea_orchestrator.address import without_secrets
from aurea_orchestrator.backends.base import Answer, Backend, Embeddings
from aurea_orchestrator.cli import cli
from aurea_orchestrator.config import Settings
from aurea_orchestrator.doctor import of_clock, of_server
from aurea_orchestrator.errors import ConfigError
from aurea_orchestrator.looking import read_seconds
from aurea_orchestrator.main import build, create_app
from aurea_orchestrator.origins import misspelt
from aurea_orchestrator.warming import Summary, Wish, read, warm
from tests.service import free_port
from tools.nbrun import wiped

ROOT = Path(__file__).parents[1]
COMMANDS = ["serve", "stats", "ls", "show", "explain", "clear", "export", "import", "warm", "doctor"]
APP = '''
import pathlib, time
log = pathlib.Path(__file__).with_name("asked")
def note(what):
    with log.open("a") as file: file.write(what + "\\n")
def answer(prompt, temperature=1.0, context=""):
    note(prompt)
    if "bad" in prompt: raise ValueError("the model is ill")
    if "slow" in prompt: time.sleep(0.1)
    return {"response": f"about {prompt}\\nand more", "model": "m", "usage": {"prompt_tokens": 3, "completion_tokens": 5}}
def embed(texts):
    for text in texts: note(text)
    return [[float(len(text)), 1.0] for text in texts]
'''


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.redis)])
def url(request, tmp_path):
    return request.getfixturevalue("redis_url") if request.param == "redis" else f"sqlite:///{tmp_path}/cache.db"


@pytest.fixture
def env(tmp_path):
    "A user's shell: a folder with a module of their own, and nothing set but who answers."
    (tmp_path / "app.py").write_text(APP)
    plain = {name: value for name, value in wiped(os.environ, tmp_path / "home").items() if name not in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS")}
    return {**plain, "PYTHONPATH": str(ROOT), "LLM_BACKEND": "app:answer", "EMBEDDING_BACKEND": "app:embed", "COLUMNS": "100"}


@pytest.fixture
def shell(env, tmp_path):
    "Run the command as a process of its own."
    def run(*words, stdin="", **more):
        return subprocess.run([sys.executable, "-m", "aurea_orchestrator", *map(str, words)], env={**env, **more}, cwd=tmp_path, input=stdin, text=True, capture_output=True, timeout=60)
    return run


@pytest.fixture
def aurea(env, tmp_path, monkeypatch):
    "Run the command in this process, which is quicker."
    for name in list(os.environ):
        if name not in env: monkeypatch.delenv(name)
    for name, value in env.items(): monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "app", raising=False)
    def run(*words, stdin=""):
        return CliRunner().invoke(cli, [str(word) for word in words], input=stdin)
    yield run
    sys.modules.pop("app", None)


def told(result, code=0):
    "The one JSON document of a command that ended so."
    assert (result.exit_code if hasattr(result, "exit_code") else result.returncode) == code, result.stderr
    return json.loads(result.stdout)


def an_empty_store(url):
    "A store that is there, with nothing in it."
    with closing(Cache.from_url(url)) as cache: cache.clear()


def asked(tmp_path): return (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").exists() else []


def test_every_command_has_help_with_an_example_and_no_colours_under_a_pipe(aurea, shell):
    said = shell("--help")
    assert said.returncode == 0 and "\x1b" not in said.stdout and all(word in said.stdout for word in [*COMMANDS, "Exit codes"])
    assert said.stderr == ""
    for command in COMMANDS:
        said = aurea(command, "--help")
        text = re.sub(r"\x1b\[[0-9;]*m", "", said.stdout)
        assert said.exit_code == 0 and "Example" in text and f"aurea {command}" in text, command


def test_the_whole_life_of_entries_on_every_store(aurea, url, tmp_path):
    at = ["--url", url, "--json"]
    (tmp_path / "q.jsonl").write_text('{"prompt": "dew", "temperature": 0.2}\n"sky"\n{"text": "fog"}\n')
    warmed = told(aurea("warm", "q.jsonl", *at))
    assert (warmed["lines"], warmed["misses"], warmed["hits"], warmed["errors"], warmed["stopped"]) == (3, 3, 0, 0, None)
    assert warmed["spent"]["completion_tokens"] == 10 and sorted(asked(tmp_path)) == ["dew", "fog", "sky"]

    listed = told(aurea("ls", *at))
    assert listed["total"] == 3 and {one["function"] for one in listed["entries"]} == {"/llm/generate", "/embedding/generate"}
    assert set(listed["entries"][0]) == {"key", "kind", "namespace", "function", "born", "ttl", "left", "size_bytes", "hits", "cost", "model", "value_type", "age"}
    assert [one["born"] for one in listed["entries"]] == sorted((one["born"] for one in listed["entries"]), reverse=True)
    assert told(aurea("ls", "--kind", "embedding", *at))["total"] == 1 == told(aurea("ls", "-f", "/embedding/generate", *at))["total"]
    assert told(aurea("ls", "--older", "1h", *at))["total"] == 0

    hit = told(aurea("explain", "--prompt", "dew", "-p", "temperature=0.2", *at))
    assert hit["outcome"] == "hit" and hit["saves"]["completion_tokens"] == 5
    miss = told(aurea("explain", "--prompt", "dew", "-p", "temperature=0.3", *at))
    assert miss["outcome"] == "miss" and miss["nearest"] and any("temperature" in one["path"] for one in miss["differences"])
    assert told(aurea("explain", "--text", "fog", *at))["outcome"] == "hit"
    assert told(aurea("explain", hit["key"][:14], *at))["outcome"] == "hit"
    assert len(asked(tmp_path)) == 3, "to explain asks nobody"

    shown = told(aurea("show", hit["key"][4:14], *at))
    assert shown["key"] == hit["key"] and shown["value"]["response"] == "about dew\nand more"
    assert "about dew\nand more" in aurea("show", hit["key"], "--url", url).stdout

    stats = told(aurea("stats", *at))
    assert stats["llm"]["misses"] == 2 and stats["total"]["hits"] == 0 and stats["spent"]["completion_tokens"] == 10 and stats["store"]["up"]

    assert told(aurea("export", "all.jsonl", *at))["entries"] == 3
    assert told(aurea("clear", "--dry-run", *at)) == {"matched": 3, "removed": 0, "dry_run": True}
    assert told(aurea("clear", "--kind", "embedding", "--yes", *at))["removed"] == 1
    assert told(aurea("clear", "-f", "/llm/generate", "--older", "1h", "--yes", *at))["removed"] == 0
    assert told(aurea("clear", "--yes", *at)) == {"matched": 2, "removed": 2, "dry_run": False}
    assert told(aurea("ls", *at))["entries"] == []
    assert told(aurea("import", "all.jsonl", *at)) == {"file": "all.jsonl", "loaded": 3, "kept": 0, "skipped": []}
    assert told(aurea("warm", "q.jsonl", *at))["hits"] == 3 and len(asked(tmp_path)) == 3
    assert told(aurea("stats", *at))["total"]["hits"] == 0, "nobody has asked for what a warming found"


async def test_what_was_warmed_is_a_hit_of_the_server(shell, env, url, tmp_path, monkeypatch):
    (tmp_path / "q.jsonl").write_text('{"prompt": "dew", "temperature": 0.2, "context": "short"}\n{"text": "fog"}\n')
    told(shell("warm", "q.jsonl", "--json", CACHE_URL=url))
    key = told(shell("explain", "--prompt", "dew", "-p", "temperature=0.2", "--context", "short", "--json", CACHE_URL=url))["key"]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    app = create_app(Settings(_env_file=None, cache_url=url, llm_backend="app:answer", embedding_backend="app:embed", host="127.0.0.1"))
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://aurea") as client:
        reply = await client.post("/llm/generate", json={"prompt": "dew", "temperature": 0.2, "context": "short"})
        assert reply.headers["x-cache"] == "hit" and key.rpartition(":")[2][:8] in reply.headers["cache-status"]
        assert (await client.post("/embedding/generate", json={"text": "fog"})).headers["x-cache"] == "hit"
        reply = await client.post("/llm/generate", json={"prompt": "new"})
        assert reply.headers["x-cache"] == "miss"
    await app.state.shut()
    sys.modules.pop("app", None)
    assert told(shell("explain", "--prompt", "new", "--json", CACHE_URL=url))["outcome"] == "hit"


def test_a_listing_is_sorted_cut_and_says_so(aurea, tmp_path):
    url = f"sqlite:///{tmp_path}/cache.db"
    (tmp_path / "q.txt").write_text("".join(f"{'long ' * n}question {n}\n" for n in range(25)))
    told(aurea("warm", "q.txt", "--url", url, "--json"))
    by = {sort: told(aurea("ls", "--sort", sort, "-n", 0, "--url", url, "--json"))["entries"] for sort in ("age", "size", "key", "cost", "left", "hits", "function")}
    assert all(len(entries) == 25 for entries in by.values())
    sizes = [one["size_bytes"] for one in by["size"]]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    assert [one["key"] for one in by["key"]] == sorted(one["key"] for one in by["key"])
    text = aurea("ls", "--url", url).stdout
    assert "and 5 more" in text and text.count("/llm/generate") == 20
    assert all(len(line) <= 80 for line in text.splitlines())
    said = aurea("ls", "--sort", "colour", "--url", url)
    assert said.exit_code == 2 and "colour" in said.stderr
    said = aurea("ls", "-f", "answer", "--url", url)
    assert said.exit_code == 0 and "/llm/generate" in said.stderr, "the names that there are"


def test_an_abbreviation_must_mean_one_entry(aurea, tmp_path):
    url = f"sqlite:///{tmp_path}/cache.db"
    (tmp_path / "q.txt").write_text("".join(f"question {n}\n" for n in range(40)))
    told(aurea("warm", "q.txt", "--url", url, "--json"))
    keys = [one["key"] for one in told(aurea("ls", "-n", 0, "--url", url, "--json"))["entries"]]
    digits = [key[4:] for key in keys]
    twice = next(d[0] for d in digits if sum(e.startswith(d[0]) for e in digits) > 1)
    said = aurea("show", twice, "--url", url)
    assert said.exit_code == 1 and said.stdout == "" and sum(key in said.stderr for key in keys) > 1
    once = next(d[:n] for d in digits for n in range(1, 9) if sum(e.startswith(d[:n]) for e in digits) == 1)
    assert told(aurea("show", once, "--url", url, "--json"))["key"] == told(aurea("show", f"llm:{once}", "--url", url, "--json"))["key"]
    assert aurea("show", "llm:" + "0" * 64, "--url", url).exit_code == 1
    assert aurea("show", "not hex", "--url", url).exit_code == 2


@pytest.mark.parametrize("words", [["stats"], ["ls"], ["show", "3fa9"], ["explain", "3fa9"], ["clear", "--yes"], ["clear", "--yes", "--older", "1h"], ["export", "x.jsonl"],
                                   ["import", "in.jsonl"], ["warm", "q.txt"]])
def test_a_store_that_is_away_is_one_line(aurea, tmp_path, words):
    (tmp_path / "in.jsonl").write_text('{"aurea": "cassette", "version": 1}\n{"key": "llm:' + "0" * 64 + '", "value": "dew"}\n')
    (tmp_path / "q.txt").write_text("dew\n")
    said = aurea(*words, "--url", "redis://me:s3cret@127.0.0.1:1/0")
    assert said.exit_code == 1 and said.stdout == "" and not (tmp_path / "x.jsonl").exists()
    assert said.stderr.count("\n") == 1 and "127.0.0.1:1" in said.stderr and "s3cret" not in said.stderr
    assert asked(tmp_path) == [], "nobody is paid for an answer that cannot be kept"


def test_what_cannot_work_is_a_usage_error(aurea, tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path}/cache.db"
    (tmp_path / "t.csv").write_text("id,question\n1,dew\n")
    for words in (["stats"], ["ls"], ["clear", "--yes"], ["explain", "--prompt", "dew"]):
        assert aurea(*words, "--url", url).exit_code == 1 and not (tmp_path / "cache.db").exists(), "a slip of the fingers makes no file"
    monkeypatch.setenv("CACHE_URL", url)
    said = aurea("stats")
    assert said.exit_code == 0 and "no cache file" in said.stderr, "nothing was asked so far"
    for words in (["ls", "--kind", "LLM"], ["ls", "--namespace", "a b"], ["ls", "--older", "soon"], ["explain"], ["explain", "--prompt", "a", "--text", "b"], ["explain", "--prompt", ""],
                  ["warm", "t.csv"], ["warm", "t.csv", "--kind", "poem"], ["explain", "--prompt", "a", "-p", "temperature"]):
        said = aurea(*words, "--url", url)
        assert said.exit_code == 2 and said.stdout == "" and said.stderr.startswith("aurea: ") and said.stderr.count("\n") == 1, words
    assert aurea("ls", "--url", "ftp://me:s3cret@h/").exit_code == 2
    monkeypatch.setenv("REDIS_PORT", "many")
    said = aurea("stats")
    assert said.exit_code == 2 and "REDIS_PORT" in said.stderr and "Traceback" not in said.stderr


@pytest.mark.parametrize("words", [
    ["clear", "--yes", "--older="], ["clear", "--yes", "--older", " "], ["clear", "--yes", "--function="], ["clear", "--yes", "--function", "ask", "--function="],
    ["clear", "--yes", "--url="], ["clear", "--yes", "--kind="], ["clear", "--yes", "--namespace="], ["ls", "--older="], ["ls", "--url="], ["ls", "--function="],
    ["stats", "--url="], ["export", "x.jsonl", "--function="], ["import", "in.jsonl", "--ttl="], ["import", "in.jsonl", "--url="], ["warm", "in.jsonl", "--column="],
    ["warm", "in.jsonl", "--url="], ["doctor", "--url="], ["serve", "--host="],
])
def test_an_option_that_is_empty_is_refused_by_its_name(aurea, tmp_path, monkeypatch, words):
    "As a script gives it whose variable is not set: it must not mean everything."
    monkeypatch.setenv("CACHE_URL", f"sqlite:///{tmp_path}/cache.db")
    (tmp_path / "in.jsonl").write_text('{"aurea": "cassette", "version": 1}\n{"key": "llm:' + "0" * 64 + '", "value": "dew"}\n')
    said = aurea(*words)
    name = next(word.removesuffix("=") for word in reversed(words) if word.startswith("--"))
    assert (said.exit_code, said.stdout, said.stderr) == (2, "", f"aurea: {name} is empty; give it a value, or leave it out\n")
    assert not (tmp_path / "cache.db").exists() and asked(tmp_path) == [], "it is refused before anything is opened"


@pytest.mark.parametrize("seconds", ["inf", "nan", "-1", "0", "1e300"])
def test_a_watch_that_would_never_look_again_is_refused(aurea, tmp_path, seconds):
    an_empty_store(url := f"sqlite:///{tmp_path}/cache.db")
    said = aurea("stats", "--watch", "--every", seconds, "--url", url)
    assert said.exit_code == 2 and said.stdout == "" and said.stderr.startswith("aurea: --every is a number of seconds") and said.stderr.count("\n") == 1


def test_a_file_that_is_not_there_or_is_something_else(aurea, tmp_path):
    url = f"sqlite:///{tmp_path}/cache.db"
    told(aurea("warm", "-", "--url", url, "--json", stdin="dew\n"))
    for words in (["import", "no.jsonl"], ["warm", "no.jsonl"], ["export", "no/such/folder/x.jsonl"], ["export", "."]):
        said = aurea(*words, "--url", url)
        assert said.exit_code == 1 and said.stderr.splitlines()[-1].startswith("aurea: ") and "Traceback" not in said.stderr, words
    (tmp_path / "notes.txt").write_text("precious\n")
    assert aurea("export", "notes.txt", "--url", url).exit_code == 1 and (tmp_path / "notes.txt").read_text() == "precious\n"
    assert aurea("export", "notes.txt", "--force", "--url", url).exit_code == 0 and (tmp_path / "notes.txt").read_text().startswith('{"aurea"')
    assert aurea("export", "notes.txt", "--url", url).exit_code == 0, "a cassette may be replaced"
    (tmp_path / "notes.txt").write_bytes(b"\xff\xfe\x00")
    assert aurea("warm", "notes.txt", "--url", url).exit_code == 2
    said = aurea("import", "notes.txt", "--url", url, "--json")
    assert told(said, 1)["skipped"][0]["line"] == 1 and "line 1" in said.stderr
    (tmp_path / "cache2.db").write_text("this is no database, and long enough to be looked at. " * 50)
    said = aurea("stats", "--url", f"sqlite:///{tmp_path}/cache2.db")
    assert said.exit_code == 1 and "no SQLite file" in said.stderr


def on_a_terminal(env, folder, answer, *words):
    "Run the command with a terminal as its stdin; what it said there and elsewhere."
    mine, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "aurea_orchestrator", *words], env=env, cwd=folder, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.close(theirs)
    os.write(mine, answer.encode())
    out, err = process.communicate(timeout=60)
    os.close(mine)
    return process.returncode, out, err


def test_clear_asks(aurea, env, tmp_path):
    url = f"sqlite:///{tmp_path}/cache.db"
    (tmp_path / "q.txt").write_text("dew\nsky\n")
    told(aurea("warm", "q.txt", "--url", url, "--json"))
    said = aurea("clear", "--url", url)
    assert said.exit_code == 2 and "--yes" in said.stderr
    code, out, err = on_a_terminal(env, tmp_path, "n\n", "clear", "--url", url)
    assert code == 1 and "Remove 2 entries" in err and out == "" and told(aurea("ls", "--url", url, "--json"))["total"] == 2
    code, out, err = on_a_terminal(env, tmp_path, "y\n", "clear", "--url", url, "--json")
    assert code == 0 and json.loads(out)["removed"] == 2 and told(aurea("ls", "--url", url, "--json"))["total"] == 0


def test_watch_goes_on_until_it_is_stopped(env, tmp_path):
    words = [sys.executable, "-m", "aurea_orchestrator", "stats", "--watch", "--every", "0.1", "--json"]
    process = subprocess.Popen(words, env={**env, "CACHE_URL": f"sqlite:///{tmp_path}/cache.db"}, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        looks = [json.loads(process.stdout.readline()) for _ in range(3)]
        assert all(look["total"]["requests"] == 0 for look in looks) and process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in err


def test_a_closed_pipe_is_no_drama(env, tmp_path):
    (tmp_path / "q.txt").write_text("dew\nsky\n")
    script = f'"{sys.executable}" -m aurea_orchestrator stats --watch --every 0.1 | head -n 1'
    done = subprocess.run(["bash", "-c", script], env={**env, "CACHE_URL": "sqlite:///cache.db"}, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() and "Traceback" not in done.stderr


def test_an_interrupted_warming_goes_on_where_it_stopped(shell, env, tmp_path):
    url, n = f"sqlite:///{tmp_path}/cache.db", 60
    (tmp_path / "q.txt").write_text("".join(f"slow question {i}\n" for i in range(n)))
    words = [sys.executable, "-m", "aurea_orchestrator", "warm", "q.txt", "-c", "2", "--url", url, "--json"]
    process = subprocess.Popen(words, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 30
    while len(asked(tmp_path)) < 6 and time.monotonic() < end: time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    first = json.loads(out)
    assert process.returncode == 130 and first["stopped"] == "interrupted" and 0 < first["misses"] < n and "Traceback" not in err
    assert first["left"] == n - first["misses"]
    again = told(shell("warm", "q.txt", "-c", "8", "--url", url, "--json"))
    assert again["hits"] >= first["misses"] and again["hits"] + again["misses"] == n
    assert len(asked(tmp_path)) <= n + 2, "only what was under way is asked again"


def test_warming_reports_lines_and_gives_up_where_it_is_of_no_use(aurea, tmp_path):
    at = ["--url", f"sqlite:///{tmp_path}/cache.db", "--json"]
    (tmp_path / "q.jsonl").write_text('"dew"\n{oops\n{"prompt": "bad one"}\n{"prompt": ""}\n\n{"prompt": "dew", "bypass_cache": "perhaps"}\n[1]\n"sky"\n')
    said = aurea("warm", "q.jsonl", *at)
    found = told(said, 1)
    assert (found["lines"], found["misses"], found["errors"], found["left"]) == (7, 2, 5, 0)
    assert [one["line"] for one in found["failures"]] == [2, 4, 6, 7, 3] and "the model is ill" in said.stderr
    (tmp_path / "bad.txt").write_text("".join(f"bad {i}\n" for i in range(500)))
    found = told(aurea("warm", "bad.txt", "-c", 4, *at), 1)
    (tmp_path / "odd.jsonl").write_text('{"a": "dew"}\n' * 300)
    said = aurea("warm", "odd.jsonl", *at)
    assert told(said, 1)["errors"] == 300 and said.stderr.count("\n") == 1 and "and 295 more: it has no prompt or text; it has a;" in said.stderr
    assert found["errors"] < 30 and "in a row" in found["stopped"] and found["left"] > 450


def test_a_list_of_texts_is_the_error_of_its_line_and_of_no_other(aurea, tmp_path):
    at = ["--url", f"sqlite:///{tmp_path}/cache.db", "--json"]
    (tmp_path / "q.jsonl").write_text('{"text": "a"}\n{"text": ["b"]}\n{"text": ["c", "d"]}\n{"text": []}\n{"text": "e"}\n')
    said = told(aurea("warm", "q.jsonl", *at), 1)
    assert (said["lines"], said["misses"], said["errors"], said["left"]) == (5, 2, 3, 0) and asked(tmp_path) == ["a", "e"]
    assert [one["line"] for one in said["failures"]] == [2, 3, 4] and "one text" in said["failures"][0]["error"]


def test_a_field_of_a_table_may_be_long_and_no_line_is_lost(aurea, tmp_path):
    usual, long = csv.field_size_limit(), "long " * 30_000
    assert list(read(f"prompt\nx\n{long}\ny\n", "csv")) == [Wish(2, {"prompt": "x"}), Wish(3, {"prompt": long}), Wish(4, {"prompt": "y"})]
    assert csv.field_size_limit() == usual
    (tmp_path / "q.csv").write_text(f'prompt\nx\n"{long}"\ny\nz\n')
    said = told(aurea("warm", "q.csv", "--url", f"sqlite:///{tmp_path}/cache.db", "--json"))
    assert (said["lines"], said["misses"], said["errors"]) == (4, 4, 0)


class Moody(Backend):
    "It fails in ways that nobody has foreseen."

    name, identity = "moody", "moody"
    kinds = {"type": TypeError, "unicode": UnicodeError, "key": KeyError, "os": OSError}

    async def generate(self, prompt, context="", model=None, **params):
        if prompt in self.kinds: raise self.kinds[prompt]("so it is")
        return Answer(f"about {prompt}", "m")

    async def embed(self, texts, model=None, **params):
        return Embeddings([[1.0] for _ in texts], "m")


async def test_whatever_fails_at_a_line_is_its_error_and_the_others_go_on():
    text = '"a"\n' + "".join(f'{{"prompt": "{kind}"}}\n' for kind in Moody.kinds) + '{"prompt": "b", "self": 1}\n{"text": "c", "texts": 1}\n{"prompt": "d\\ud800", "x\\ud800": 1}\n"z"\n'
    with ExitStack() as stack, closing(Cache.from_url("memory://")) as cache:
        house = build(Settings(_env_file=None), stack, cache)
        house.llm = house.embedding = Moody()
        await warm(house, read(text, "jsonl"), done := Summary(), concurrency=1)
    failed = dict(done.failures)
    assert done.stopped is None and done.lines == 9 and done.left == 0 and done.misses + done.errors == 9 and done.misses >= 2
    assert {2, 3, 4, 5, 6, 7} <= failed.keys() <= {2, 3, 4, 5, 6, 7, 8} and failed[2] == "TypeError: so it is"


def test_warming_says_what_is_missing_and_asks_again_when_told(aurea, tmp_path):
    at = ["--url", f"sqlite:///{tmp_path}/cache.db", "--json"]
    (tmp_path / "q.csv").write_text('id,question,context\n1,"dew, and\nfog",short\n2,sky,\n3,sky,\n')
    dry = told(aurea("warm", "q.csv", "--column", "question", "--dry-run", *at))
    assert (dry["lines"], dry["misses"], dry["repeated"], dry["dry"]) == (3, 2, 1, True) and asked(tmp_path) == []
    assert told(aurea("warm", "q.csv", "--column", "question", *at))["misses"] == 2
    assert told(aurea("warm", "q.csv", "--column", "question", "--refresh", *at))["misses"] == 2 and asked(tmp_path).count("sky") == 2
    assert told(aurea("warm", "-", *at, stdin="sky\nmoon\n"))["hits"] == 1, "plain lines from stdin have the same keys"
    batch = told(aurea("warm", "-", "--kind", "embedding", "--batch", 2, *at, stdin="a\nb\nc\na\n"))
    assert (batch["misses"], batch["repeated"]) == (3, 1)
    assert told(aurea("warm", "-", "--kind", "embedding", *at, stdin="c\nd\n"))["hits"] == 1


def test_warming_refuses_to_pay_for_what_is_not_kept(aurea, tmp_path, monkeypatch):
    (tmp_path / "q.txt").write_text("dew\n")
    for mode in ("off", "offline"):
        monkeypatch.setenv("CACHE_MODE", mode)
        said = aurea("warm", "q.txt", "--url", f"sqlite:///{tmp_path}/cache.db")
        assert said.exit_code == 2 and mode in said.stderr
    assert asked(tmp_path) == []


@pytest.mark.redis
def test_a_store_that_goes_away_ends_a_warming(env, own_redis, tmp_path):
    (tmp_path / "q.txt").write_text("".join(f"slow question {i}\n" for i in range(200)))
    words = [sys.executable, "-m", "aurea_orchestrator", "warm", "q.txt", "-c", "2", "--url", own_redis.url, "--json"]
    process = subprocess.Popen(words, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 30
    while len(asked(tmp_path)) < 4 and time.monotonic() < end: time.sleep(0.02)
    own_redis.kill()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "store is in trouble" in json.loads(out)["stopped"] and len(asked(tmp_path)) < 100 and "Traceback" not in err


def finding(report, about): return [(one["status"], one["says"]) for one in report["findings"] if one["about"] == about]


def test_the_doctor_is_content(aurea, url):
    an_empty_store(url)
    report = told(aurea("doctor", "--url", url, "--json"))
    assert report["healthy"] and report["store"]["up"] and {one["status"] for one in report["findings"] if one["about"] in ("store", "reads", "writes", "hearing")} == {"ok"}
    latency = report["store"]["latency_seconds"]
    assert 0 < latency["read"]["p50"] <= latency["read"]["p95"] <= latency["read"]["worst"] and latency["hearing"]["worst"] < 3
    assert {"python", "aurea-orchestrator", "redis-py"} <= set(report["versions"])
    assert told(aurea("ls", "--url", url, "--json")) | {"entries": []} == {"entries": [], "total": 0, "size_bytes": 0, "damaged": 0, "foreign": 0}, "nothing is left behind"


def test_the_doctor_makes_no_file(aurea, tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path}/no/such.db"
    report = told(aurea("doctor", "--url", url, "--json"), 1)
    assert not report["healthy"] and finding(report, "store")[0][0] == "wrong" and "there is no such cache file" in finding(report, "store")[0][1]
    monkeypatch.setenv("CACHE_URL", url)
    report = told(aurea("doctor", "--json"))
    assert report["healthy"] and finding(report, "store")[0][0] == "note" and "no cache file yet" in finding(report, "store")[0][1] and report["store"]["up"] is None
    assert not (tmp_path / "no").exists()
    (tmp_path / "no").write_text("a file where a folder should be")
    report = told(aurea("doctor", "--json"), 1)
    assert finding(report, "store")[0][0] == "wrong" and "none can be made" in finding(report, "store")[0][1]


@pytest.mark.redis
def test_the_doctor_knows_the_memory_of_redis(aurea, own_redis):
    warned = finding(told(aurea("doctor", "--url", own_redis.url, "--json")), "memory")
    assert [status for status, _ in warned] == ["warning"] and "maxmemory is 0" in warned[0][1]
    with own_redis.client() as client: client.config_set("maxmemory", "100mb")
    assert "noeviction" in finding(told(aurea("doctor", "--url", own_redis.url, "--json")), "memory")[0][1]
    assert aurea("doctor", "--strict", "--url", own_redis.url).exit_code == 1
    with own_redis.client() as client: client.config_set("maxmemory-policy", "allkeys-lru")
    assert "leases" in finding(told(aurea("doctor", "--url", own_redis.url, "--json")), "memory")[0][1]
    with own_redis.client() as client: client.config_set("maxmemory-policy", "volatile-lfu")
    assert [status for status, _ in finding(told(aurea("doctor", "--url", own_redis.url, "--json")), "memory")] == ["ok"]
    with own_redis.client() as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "1mb")
    report = told(aurea("doctor", "--url", own_redis.url, "--json"), 1)
    assert finding(report, "writes")[0][0] == "wrong" and "full" in finding(report, "writes")[0][1]


@pytest.mark.redis
def test_the_doctor_finds_a_redis_that_is_stopped_or_hangs(aurea, own_redis):
    own_redis.pause()
    began = time.monotonic()
    report = told(aurea("doctor", "--url", own_redis.url, "--json"), 1)
    own_redis.resume()
    assert time.monotonic() - began < 15 and finding(report, "reads")[0][0] == "wrong" and "did not answer" in finding(report, "reads")[0][1]
    own_redis.kill()
    said = aurea("doctor", "--url", own_redis.url)
    assert said.exit_code == 1 and "cannot be reached" in " ".join(said.stdout.split()) and said.stdout.startswith("Not well")
    assert not told(aurea("doctor", "--url", own_redis.url, "--json"), 1)["healthy"]


@pytest.mark.redis
def test_the_doctor_finds_out_who_may_not_listen(aurea, own_redis):
    with own_redis.client() as client:
        client.execute_command("ACL", "SETUSER", "deaf", "on", ">pw", "~*", "&*", "+@all", "-client|tracking")
    report = told(aurea("doctor", "--url", own_redis.url.replace("redis://", "redis://deaf:pw@"), "--json"), 1)
    assert [status for status, _ in finding(report, "hearing")] == ["wrong"] and "pw@" not in json.dumps(report)


def test_the_doctor_finds_a_file_that_may_only_be_read(aurea, tmp_path):
    url = f"sqlite:///{tmp_path}/shelf/cache.db"
    an_empty_store(url)
    told(aurea("doctor", "--url", url, "--json"))
    shelf = tmp_path / "shelf"
    if os.geteuid():
        for path in shelf.glob("cache.db*"): path.chmod(0o444)
        shelf.chmod(0o555)
    elif subprocess.run(["mount", "--bind", shelf, shelf], capture_output=True).returncode or subprocess.run(["mount", "-o", "remount,bind,ro", shelf], capture_output=True).returncode:
        pytest.skip("nothing can be made read-only here")
    try:
        report = told(aurea("doctor", "--url", url, "--json"), 1)
    finally:
        if os.geteuid(): shelf.chmod(0o755)
        else: subprocess.run(["umount", "-l", shelf], check=True)
    assert finding(report, "reads")[0][0] == "ok" and finding(report, "writes")[0][0] == "wrong" and "cannot be written" in finding(report, "writes")[0][1]


def test_the_doctor_shows_settings_and_no_secret(aurea, tmp_path, monkeypatch):
    (tmp_path / ".env").write_text("LLM_MODEL=from-the-file\nCACHE_LLM_TTL=60\nREDIS_PASSWORD=s3cret-1\n")
    for name, value in {"CACHE_LLM_TTL": "70", "API_KEY": "s3cret-2", "OPENAI_API_KEY": "s3cret-3", "LLM_BASE_URL": "https://me:s3cret-4@h.example/v1?key=s3cret-5", "CACHE_LLM_TLL": "1"}.items():
        monkeypatch.setenv(name, value)
    an_empty_store(f"sqlite:///{tmp_path}/cache.db")
    said = aurea("doctor", "--url", f"sqlite:///{tmp_path}/cache.db?memory=0", "--json")
    source = {one["name"]: (one["value"], one["source"]) for one in told(said)["settings"]}
    assert source["LLM_MODEL"] == ("from-the-file", ".env") and source["CACHE_LLM_TTL"] == ("70.0", "environment") and source["CACHE_URL"][1] == "option"
    assert source["LLM_API_KEY"] == ("(hidden)", "environment (OPENAI_API_KEY)") and source["REDIS_PASSWORD"] == ("(hidden)", ".env") and source["PORT"] == ("8000", "default")
    assert "s3cret" not in said.stdout + said.stderr + aurea("doctor", "--url", f"sqlite:///{tmp_path}/cache.db").stdout
    assert [says for _, says in finding(told(said), "settings")] == ["CACHE_LLM_TLL is no setting and is not read"]


@pytest.mark.parametrize(("url", "shown"), [
    ("https://me:s3cret@h.example/v1?key=s3cret", "https://…@h.example/v1"), ("https://me:s3/cret@h.example/v1", "https://…@h.example/v1"), ("https://me:s3@cret@h.example", "https://…@h.example"),
    ("https://me:s3?cret@h.example/v1", "https://…"), ("https://me:s3#cret@h.example/v1", "https://…"), ("https://h.example/v1?key=s3@cret", "https://…"), ("me:s3cret@h.example/v1", "…@h.example/v1"),
    ("https://me:s3://cret@h.example/v1", "https://…@h.example/v1"), ("https://me:s3\ncret@h.example/v1", "https://…@h.example/v1"), ("redis://:s3cret@h:1/0", "redis://…@h:1/0"),
    ("sqlite:////home/a@b/c.db?max_bytes=1GB", "sqlite:////home/a@b/c.db"), ("http://localhost:11434/v1", "http://localhost:11434/v1"), ("h.example:1", "h.example:1"),
])
def test_an_address_is_shown_without_what_may_be_secret(aurea, tmp_path, monkeypatch, url, shown):
    assert without_secrets(url) == shown
    monkeypatch.setenv("LLM_BASE_URL", url)
    an_empty_store(store := f"sqlite:///{tmp_path}/cache.db")
    said = aurea("doctor", "--url", store, "--json")
    assert {one["name"]: one["value"] for one in json.loads(said.stdout)["settings"]}["LLM_BASE_URL"] == shown


def test_the_doctor_diagnoses_settings_that_cannot_work(aurea, tmp_path, monkeypatch):
    an_empty_store(f"sqlite:///{tmp_path}/cache.db")
    monkeypatch.setenv("LLM_BACKEND", "no.such:thing")
    report = told(aurea("doctor", "--url", f"sqlite:///{tmp_path}/cache.db", "--json"), 1)
    assert finding(report, "backends")[0][0] == "wrong" and report["store"]["up"]
    monkeypatch.setenv("CACHE_LLM_TTL", "-1")
    report = told(aurea("doctor", "--json"), 1)
    assert finding(report, "settings")[0][0] == "wrong" and "CACHE_LLM_TTL" in finding(report, "settings")[0][1] and report["store"] == {}


def test_a_clock_a_replica_and_a_full_server_are_found():
    assert of_clock(0.2).status == "ok" and of_clock(-90).status == "warning" and "behind" in of_clock(-90).says
    full = {"maxmemory": "100", "used_memory": "99", "maxmemory_policy": "noeviction", "role": "slave"}
    assert [(one.about, one.status) for one in of_server(full)] == [("role", "wrong"), ("memory", "wrong")]
    assert [one.mend for one in misspelt(["LLM_MODLE", "CACHE_DIR", "LLM_MODEL", "HOME"])] == ["perhaps LLM_MODEL was meant"]


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("15m", 900), ("1.5h", 5400), ("7d", 604800), ("2 w", 1209600), ("5min", 300)])
def test_durations(text, seconds): assert read_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-1", "1y", "1h30m", "NaN", "1e9"])
def test_no_durations(text):
    with pytest.raises(ConfigError): read_seconds(text)


def test_the_forms_of_a_file():
    assert list(read("\ufeffa\n\n b \r\nc".removeprefix("\ufeff"))) == [Wish(1, {"prompt": "a"}), Wish(3, {"prompt": "b"}), Wish(4, {"prompt": "c"})]
    assert list(read("a\n", kind="embedding")) == [Wish(1, {"text": "a"})]
    assert list(read('{"q": "a", "id": 7, "model": "m"}\n{"id": 8}\n', "jsonl", column="q")) == [Wish(1, {"prompt": "a", "model": "m"}), (2, "it has no q; it has id; say --column NAME")]
    assert list(read("text\tid\nfog\t1\n\t2\n", "tsv")) == [Wish(2, {"text": "fog"})]
    with pytest.raises(ConfigError, match="id, q"): list(read("id,q\n1,a\n", "csv"))
    with pytest.raises(ConfigError, match="nothing"): list(read("", "csv"))
    assert list(read('{"a": 1, "b": 2}\n', "jsonl")) == [(1, "it has no prompt or text; it has a, b; say --column NAME")]


def test_help_imports_nothing_that_it_does_not_need():
    script = "import sys\nfrom aurea_orchestrator.cli import cli\nfrom typer.testing import CliRunner\nassert CliRunner().invoke(cli, ['--help']).exit_code == 0\n" \
             "print([m for m in ('fastapi', 'pydantic', 'redis', 'uvicorn', 'sqlite3', 'httpx2', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_progress_is_for_terminals(env, tmp_path):
    (tmp_path / "q.txt").write_text("".join(f"slow {i}\n" for i in range(8)))
    words = [sys.executable, "-m", "aurea_orchestrator", "warm", "q.txt", "-c", "1", "--json", "--url", f"sqlite:///{tmp_path}/cache.db"]
    mine, theirs = pty.openpty()
    process = subprocess.Popen(words, env={**env, "TERM": "xterm"}, cwd=tmp_path, stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    seen, end = b"", time.monotonic() + 30
    while time.monotonic() < end:
        if select.select([mine], [], [], 0.1)[0]:
            try: seen += os.read(mine, 65536)
            except OSError: break
        elif process.poll() is not None: break
    out = process.communicate(timeout=20)[0]
    os.close(mine)
    assert json.loads(out)["misses"] == 8 and b"computed" in seen and "\x1b" not in out


@contextmanager
def serving(env, folder, *words, **more):
    "`aurea serve` on a port of its own: where, the process, and the file of what it says."
    port, log = free_port(), folder / "serve.log"
    words = [sys.executable, "-m", "aurea_orchestrator", "serve", "--port", str(port), *words]
    with log.open("wb") as file:
        process = subprocess.Popen(words, env={**env, "CACHE_URL": "memory://", "LLM_BACKEND": "", "EMBEDDING_BACKEND": "", **more}, cwd=folder, stdout=file, stderr=file)
    try:
        end = time.monotonic() + 60
        while "Application startup complete" not in log.read_text():
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        yield port, process, log
    finally:
        process.kill()
        process.wait(20)


@pytest.mark.slow
@pytest.mark.parametrize(("host", "given", "workers", "open"), [("127.0.0.1", "0.0.0.0", 1, True), ("0.0.0.0", "127.0.0.1", 1, False), ("127.0.0.1", "0.0.0.0", 2, True)])
def test_the_warning_of_an_open_door_is_about_the_address_that_is_served(env, tmp_path, host, given, workers, open):
    with serving(env, tmp_path, "--host", given, "--workers", str(workers), HOST=host) as (port, _, log):
        notes = httpx2.get(f"http://127.0.0.1:{port}/ready", trust_env=False).json()["notes"]
        assert any("API_KEY is not set" in note for note in notes) is open is ("API_KEY is not set" in log.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_what_hangs_does_not_keep_the_server_from_stopping(env, tmp_path, how):
    with serving(env, tmp_path, "--host", "127.0.0.1", LLM_TIMEOUT="0.5") as (port, process, log), socket.create_connection(("127.0.0.1", port)) as slow:
        slow.sendall(b"POST /llm/generate HTTP/1.1\r\nHost: aurea\r\nContent-Length: 100\r\n\r\n{")  # And never the rest
        time.sleep(0.5)
        process.send_signal(how)
        process.wait(20)
        assert "Finished server process" in log.read_text()
