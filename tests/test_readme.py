"""Nothing on README.md is there without having been run or checked: every Python block, every line of bash, every query, table and link."""
from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from aurea_orchestrator.config import describe
from aurea_orchestrator.events import Event, Outcome
from aurea_orchestrator.main import create_app
from aurea_orchestrator.metrics import METRICS, Metrics

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
KEY = "a key for this test"


class Block(NamedTuple):
    "A fenced block, and the `text` block that follows it, which is then its output."

    language: str
    text: str
    output: str | None


def blocks(page: str) -> list[Block]:
    found = list(re.finditer(r"^(`{3,})(\w*)\n(.*?)^\1$", page, re.M | re.S))
    after = [*found[1:], None]
    follows = [b and b[2] == "text" and not page[a.end() : b.start()].strip() for a, b in zip(found, after)]
    return [Block(a[2], a[3], b[3].strip() if b and out else None) for a, b, out in zip(found, after, follows)]


BLOCKS = blocks(README)
PYTHON = [block for block in BLOCKS if block.language == "python"]
BASH = [block for block in BLOCKS if block.language == "bash"]


def test_each_block_is_of_a_language_that_is_checked_here():
    assert {block.language for block in BLOCKS} == {"python", "bash", "text", "mermaid", "promql"}
    assert len(re.findall(r"^`{3,}", README, re.M)) == 2 * len(BLOCKS)
    assert sum(block.language == "text" for block in BLOCKS) == sum(block.output is not None for block in BLOCKS)


# ---- Python: all blocks in one fresh process, like the cells of a notebook

RUN = """
import ast, asyncio, inspect, json, linecache, sys
async def main():
    for n, source in enumerate(json.load(sys.stdin)):
        name, top = f"<block {n} of README.md>", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        linecache.cache[name] = len(source), None, source.splitlines(True), name
        tree = ast.parse(source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        code = compile(tree, name, "exec", top)
        if inspect.iscoroutine(begun := eval(code, globals())): await begun
        value = last and eval(compile(ast.Expression(last.value), name, "eval", top), globals())
        if inspect.iscoroutine(value): value = await value
        print(json.dumps(None if value is None else repr(value)))
asyncio.run(main())
"""
VISIT = """
import httpx2
async def get(app, path):
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://readme") as client:
        return (await client.get(path)).json()
said = [await get(app, "/summary?text=one+two+three&words=2") for _ in range(2)]
said += [await get(service, "/ai/health"), (await get(service, "/ai/ready"))["store"]["name"]]
await aurea.state.shut()
said, summary.cache_info().misses
"""


def ran(folder: Path) -> list[str | None]:
    "What the last expression of each block shows, and then of VISIT; in a new process on the same store."
    env = os.environ | {"PYTHONPATH": str(ROOT), "CACHE_URL": f"sqlite:///{folder}/cache.sqlite"}
    sources = json.dumps([*(block.text for block in PYTHON), VISIT])
    done = subprocess.run([sys.executable, "-c", RUN], input=sources, env=env, cwd=folder, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_python_blocks_show_what_the_page_shows_and_tomorrow_it_is_all_there(tmp_path):
    *shown, visited = ran(tmp_path)
    assert shown == [block.output for block in PYTHON]
    assert visited == "([{'summary': 'one two'}, {'summary': 'one two'}, {'status': 'healthy'}, 'sqlite'], 1)"
    *again, visited = ran(tmp_path)
    assert again[:3] == ["(True, 0)", "({'hit': 2}, 0.0)", "([[4.0, 1.0], [3.0, 1.0], [3.0, 1.0], [3.0, 1.0]], [])"]
    assert again[3] == shown[3].replace("(3, 2,", "(3, 0,") != shown[3]
    assert visited.endswith(", 0)")


# ---- bash: each line is of a known sort, or this test has to learn it

SORTS = {
    "make": r"make [a-z]+",                                            # `make -n` knows the target
    "install": r"pip install \.",                                      # not run here: tests/house/test_packaging.py builds and installs
    "compose": r"docker compose( --profile [a-z]+)? up -d --build",    # no engine here: the file is read
    "server": r"([A-Z_]+=\S+ )*uvicorn aurea_orchestrator\.main:app( --workers \d+)?",
    "aurea": r"aurea (stats|ls|explain|warm|clear|doctor) ?.*",
    "curl": r"curl .*localhost:8000/.*",
}


def lines(block: Block) -> list[tuple[str, str]]:
    "The logical lines of a block without comments, each with its sort."
    joined = block.text.replace("\\\n", " ").splitlines()
    bare = [line for text in joined if (line := re.sub(r"\s+# .*$|^# .*$", "", text).strip())]
    sorts = [[sort for sort, form in SORTS.items() if re.fullmatch(form, line)] for line in bare]
    assert all(sorts), f"not known to tests/test_readme.py: {[line for line, sort in zip(bare, sorts) if not sort]}"
    return [(sort[0], line) for sort, line in zip(sorts, bare)]


def of_sort(*wanted: str) -> list[str]:
    return [line for block in BASH for sort, line in lines(block) if sort in wanted]


def test_an_unknown_command_would_be_seen():
    with pytest.raises(AssertionError, match="rm -rf"):
        lines(Block("bash", "make serve   # a comment\nrm -rf /tmp/x", None))
    assert all(of_sort(sort) for sort in SORTS), "a sort that nothing is of any more"


@pytest.mark.parametrize("line", of_sort("aurea"))
def test_aurea_knows_the_command_and_its_options(line):
    _, command, *rest = shlex.split(line)
    usage = subprocess.run([sys.executable, "-m", "aurea_orchestrator", command, "--help"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert usage.returncode == 0 and [word for word in rest if word.startswith("-") and not re.search(rf"(^|\s|,){word}\b", usage.stdout)] == [], usage.stdout


@pytest.mark.parametrize("line", of_sort("make"))
def test_make_knows_the_target(line):
    done = subprocess.run([*line.split(), "-n", "-C", str(ROOT)], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert {"make serve": "aurea_orchestrator serve", "make test": "pytest"}[line] in done.stdout


@pytest.mark.parametrize("line", of_sort("compose"))
def test_the_compose_file_has_what_the_line_asks_for(line):
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))["services"]
    profile = re.search(r"--profile (\w+)", line)
    up = {name for name, one in services.items() if not one.get("profiles") or profile and profile[1] in one["profiles"]}
    assert up == ({"app", "redis", "prometheus", "grafana"} if profile else {"app", "redis"})


@contextmanager
def served(line: str, folder: Path) -> Iterator[int]:
    "Run a line that starts the service, on a free port; gives the port."
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for block in PYTHON:
        if named := re.match(r"# (\w+\.py)\n", block.text): (folder / named[1]).write_text(block.text)
    env = {"CACHE_URL": "memory://", "API_KEY": KEY} | os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = f"{line.replace('uvicorn ', 'exec uvicorn ')} --host 127.0.0.1 --port {port}"
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(["bash", "-c", command], env=env, cwd=folder, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 40
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.1)
        yield port
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    "The service as `make serve` has it, but on a free port and in memory."
    with served("uvicorn aurea_orchestrator.main:app", tmp_path_factory.mktemp("serve")) as port: yield port


def curl(line: str, port: int) -> str:
    if not shutil.which("curl"): pytest.skip("no curl on this machine, and the page is full of it")
    script = 'set -o pipefail; curl() { command curl --fail --noproxy "*" --max-time 30 "$@"; }; ' + line.replace("localhost:8000", f"127.0.0.1:{port}")
    done = subprocess.run(["bash", "-c", script], env=os.environ | {"API_KEY": KEY}, text=True, capture_output=True)
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return "\n".join(text.rstrip() for text in done.stdout.splitlines())


@pytest.mark.parametrize("block", [b for b in BASH if {s for s, _ in lines(b)} == {"curl"}], ids=lambda b: b.text[:40].split("'")[0])
def test_the_curl_lines_say_what_the_page_says(block, port):
    said = [curl(line, port) for _, line in lines(block)]
    assert all(said) and (block.output is None or "\n".join(said) == block.output)


@pytest.mark.parametrize("block", [b for b in BASH if "server" in {s for s, _ in lines(b)}], ids=lambda b: b.text[:40].split("/")[0])
def test_the_lines_that_start_the_service_do(block, tmp_path):
    (first, start), *rest = lines(block)
    assert first == "server" and {sort for sort, _ in rest} <= {"curl"}
    with served(start, tmp_path) as port:
        ready = json.loads(curl("curl -s localhost:8000/ready", port))
        said = [curl(line, port) for _, line in rest]
    assert block.output is None or "\n".join(said) == block.output
    given = dict(re.findall(r"([A-Z_]+)=(\S+)", start))
    names = {"LLM_BASE_URL": "openai", "LLM_BACKEND": "function"}
    assert ready["backends"]["llm"]["name"] == next((name for key, name in names.items() if key in given), "demo")
    assert ready["store"]["name"] == given.get("CACHE_URL", "memory").partition(":")[0]


# ---- tables

def rows(pattern: str) -> list[str]:
    return [m[1] for line in README.splitlines() if (m := re.match(pattern, line))]


def test_the_configuration_table_is_what_the_settings_say():
    table = [f"| `{name}` | {f'`{default}`' if default else '–'} | {sentence} |" for name, default, sentence in describe()]
    assert "| name | default | |\n|---|---|---|\n" + "\n".join(table) + "\n\n" in README


def test_every_endpoint_has_a_row_and_every_row_an_endpoint():
    paths = create_app().openapi()["paths"]
    assert sorted(rows(r"\| `((?:GET|POST) /\S*)` \|")) == sorted(f"{method.upper()} {path}" for path, verbs in paths.items() for method in verbs)


def test_the_headers_of_the_table_are_in_a_reply(port):
    body = "-H 'Content-Type: application/json' -d '{\"text\": [\"a\", \"b\"]}'"
    reply = curl(f"curl -si localhost:8000/embedding/generate {body}", port).lower()
    named = [name for cell in rows(r"\| ((?:`[A-Z][\w-]+`(?:, )?)+) \|") for name in re.findall(r"`([\w-]+)`", cell) if not name.isupper()]
    assert "X-Cache" in named and [name for name in named if f"\n{name.lower()}: " not in reply] == []


def test_every_outcome_is_named():
    assert f"seven outcomes: {', '.join(f'`{one}`' for one in Outcome)}." in README


# ---- queries

def series() -> dict[str, set[str]]:
    "Each series of /metrics with its labels."
    metrics = Metrics("0")
    for event in (Event("lookup", "llm"), Event("lookup", "llm", error="StoreError"), Event("reply", "llm", outcome=Outcome.HIT)): metrics.hear(event)
    metrics.answered("GET", "/", 200, 0.0)
    found: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^(\w+)(?:\{(.*)\})? ", metrics.render().decode(), re.M):
        found.setdefault(name, set()).update(re.findall(r"(\w+)=\"", labels))
    return found


QUERIES = [line for block in BLOCKS if block.language == "promql" for line in block.text.splitlines() if line and not line.startswith("#")]


def test_every_metric_has_a_row():
    assert rows(r"\| `(\w+)` \| .*\|$")[-len(METRICS):] == list(METRICS)
    assert [f"| `{name}` | {sentence} |" in README for name, sentence in METRICS.items()] == [True] * len(METRICS)


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_asks_for_series_that_there_are(query):
    known = series()
    bare = re.sub(r"\{[^}]*\}|\[\w+\]|\bby \([^)]*\)|\"[^\"]*\"", " ", query)
    asked = set(re.findall(r"[a-z_]{2,}", bare)) - {"sum", "rate", "increase", "histogram_quantile"}
    assert asked and asked <= known.keys() and query.count("(") == query.count(")")
    for name, labels in re.findall(r"(\w+)\{([^}]*)\}", query):
        assert set(re.findall(r"(\w+)(?:=|=~|!=|!~)\"", labels)) <= known[name]
    for group in re.findall(r"\bby \(([^)]*)\)", query):
        assert set(group.split(", ")) <= set.intersection(*(known[name] for name in asked))


def test_there_are_enough_queries_to_be_of_use():
    assert len(QUERIES) >= 6


# ---- links

def test_every_link_leads_to_a_file_of_the_repository():
    "Relative, so that it leads there on GitHub and in a clone, and to its page on the site."
    urls = re.findall(r"\]\(([^)]+)\)", README)
    assert len(urls) > 10 and [url for url in urls if not (ROOT / url.partition("#")[0]).is_file()] == []
    tutorials = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "nbs" / "tutorials").glob("*.ipynb"))
    linked = [url for url in urls if "/tutorials/" in url]
    assert len(linked) >= 5 and linked == tutorials[:len(linked)]
