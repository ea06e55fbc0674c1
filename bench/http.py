"""Hits over HTTP: one uvicorn worker and 32 connections, ours beside FastAPI and beside no framework at all."""
from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from bench.cases import Case, Lab
from bench.load import QUESTIONS
from tests.servers import free_ports

CONNECTIONS, SECONDS = 32, 1.0
OURS = "aurea_orchestrator.main:app"


@contextmanager
def served(lab: Lab, app: str, workers: int = 1, url: str = "") -> Iterator[int]:
    "A server and its port, warm: every question was answered, ours from the cache."
    port = free_ports(1)[0]
    env = {"CACHE_URL": url, "LLM_BACKEND": "bench.apps:answer", "CACHE_TIMEOUT": "5"} if url else {}
    words = ["--port", str(port), "--workers", str(workers), "--no-access-log", "--log-level", "error"]
    with (lab.folder / "server.log").open("a") as log:
        process = lab.python("-m", "uvicorn", app, *words, env=env, stdout=log, stderr=log)
    try:
        for _ in range(600):
            with suppress(OSError):
                told(port, QUESTIONS[0])
                break
            if process.poll() is not None: raise RuntimeError((lab.folder / "server.log").read_text()[-1000:])
            time.sleep(0.05)
        time.sleep(0.3 * (workers - 1))
        for path in QUESTIONS * 2: last = told(port, path)
        assert not url or workers > 1 or last == "hit", f"not a hit but {last}"
        yield port
    finally:
        process.terminate()
        process.wait(20)


def told(port: int, path: str) -> str | None:
    with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}{path}", method="POST"), timeout=10) as reply:
        return reply.headers["x-cache"]


def loaded(lab: Lab, port: int, connections: int = CONNECTIONS, seconds: float = SECONDS) -> Callable[[], float]:
    "A round: requests per second."
    return lambda: float(lab.told("-m", "bench.load", str(port), str(connections), str(seconds)))


def http(lab: Lab) -> Iterator[Case]:
    "The seed endpoint /llm/generate."
    lab.empty()
    with (served(lab, OURS, url="memory://") as near, served(lab, OURS, url=lab.redis.url) as default,
          served(lab, OURS, url=lab.url) as far, served(lab, "bench.apps:fastapi") as framework,
          served(lab, "bench.apps:bare") as bare):
        *loads, fixed, limit = [loaded(lab, port) for port in (near, default, far, framework, bare)]
        for place, load in zip(("in process", "Redis behind memory", "in Redis"), loads, strict=True):
            yield Case(f"HTTP hit, {place}", "FastAPI, fixed body", load, fixed, "requests/s", least=1.0, rounds=5)
        yield Case("HTTP hit, in process", "bare ASGI, fixed body", loads[0], limit, "requests/s", rounds=5)


CASES = (http,)
