"""The app as a real server: `uvicorn aurea_orchestrator.main:app` in processes of its own, on a free port."""
from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx2
import psutil

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Service:
    def __init__(self, folder: Path, workers: int = 1, app: str = "aurea_orchestrator.main:app", **settings: object) -> None:
        self.folder, self.workers, self.app, self.port = folder, workers, app, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        plain = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV") if name in os.environ}
        own = {name: str(value) for name, value in settings.items() if value is not None}
        self.env = {**plain, "PYTHONPATH": f"{ROOT}:{folder}", "XDG_CACHE_HOME": str(folder / "cache"), **own}
        self.log_file = folder / f"service-{self.port}.log"

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "uvicorn", self.app, "--host", "127.0.0.1", "--port", str(self.port), "--workers", str(self.workers), "--no-access-log"]
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(command, env=self.env, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 60
        while not self._started():
            if time.monotonic() > deadline or self.process.poll() is not None: raise AssertionError(f"the service did not start:\n{self.log}")
            time.sleep(0.05)
        return self

    def _started(self) -> bool:
        if self.log.count("Application startup complete") < self.workers: return False
        try: return bool(urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200)
        except (urllib.error.URLError, OSError): return False

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try: return self.process.wait(20)
        except subprocess.TimeoutExpired:
            for child in psutil.Process(self.process.pid).children(recursive=True): child.kill()
            self.process.kill()
            return self.process.wait(10)

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def worker_pids(self) -> list[int]:
        children = psutil.Process(self.process.pid).children()
        return [child.pid for child in children if "spawn_main" in " ".join(child.cmdline())]

    def client(self, **more: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=60, trust_env=False, **more)

    def aclient(self, **more: Any) -> httpx2.AsyncClient:
        limits = httpx2.Limits(max_connections=64, max_keepalive_connections=64)
        return httpx2.AsyncClient(base_url=self.url, timeout=60, trust_env=False, limits=limits, **more)


class Call(NamedTuple):
    "What a customer saw: when it asked, how long it took, where the answer came from, and what was asked."

    at: float
    seconds: float
    outcome: str
    prompt: str


class Load:
    """Customers who ask a service one thing after the other, half of them new, and check every answer.

        async with Load(service, expected) as load: ...    # they ask while this goes on
        load.calls
    """

    def __init__(self, service: Service, expected: Callable[[str], str], customers: int = 4, seed: int = 1, pause: float = 0.01) -> None:
        self.service, self.expected, self.customers, self.pause = service, expected, customers, pause
        self.calls, self.asked_again, self._chance, self._until, self._new = list[Call](), 0, random.Random(seed), float("inf"), 0

    async def __aenter__(self) -> Self:
        self._client = self.service.aclient()
        self._tasks = [asyncio.create_task(self._customer()) for _ in range(self.customers)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._until = 0
        await asyncio.gather(*self._tasks)  # What one of them did not like is raised here
        await self._client.aclose()

    def prompt(self) -> str:
        if self._chance.random() < 0.5: return f"common {self._chance.randrange(30)}"
        self._new += 1
        return f"new {self._new // 3}"  # which others ask for at the same time

    async def _customer(self) -> None:
        while time.monotonic() < self._until:
            await self.ask(self.prompt())
            await asyncio.sleep(self.pause)

    async def ask(self, prompt: str) -> Call:
        "One answer, which must be right. A connection whose worker was killed under it is no answer: ask again, as customers do."
        leave = {"connection": "close"} if self._chance.random() < 0.05 else {}  # and come back, maybe to another worker
        began = time.monotonic()
        while True:
            try: reply = await self._client.post("/llm/generate", json={"prompt": prompt}, headers=leave)
            except httpx2.TransportError:
                self.asked_again += 1
                await asyncio.sleep(0.05)
                continue
            break
        assert reply.status_code == 200 and reply.json()["response"] == self.expected(prompt), (reply.status_code, reply.text)
        self.calls.append(Call(began, time.monotonic() - began, reply.headers["x-cache"], prompt))
        return self.calls[-1]

    def between(self, start: float, end: float = float("inf")) -> list[Call]:
        "The calls that began in a time."
        return [call for call in self.calls if start <= call.at < end]


def samples(page: str) -> dict[str, float]:
    "The samples of a /metrics page by name and labels, as they stand."
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in page.splitlines() if line and not line.startswith("#")}
