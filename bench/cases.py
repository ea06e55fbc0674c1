"""What is compared, and how: rounds that alternate between two sides, so that each ratio is one of neighbours in time."""
from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

from tests.servers import Server
from tools.nbrun import wiped

ROOT = Path(__file__).resolve().parent.parent
WORDS = "The sky is blue because air scatters short waves of light more than long ones, and the eye sees more blue than violet. "
ANSWER = {                                                                 # 1.5 KB
    "response": (WORDS * 12)[:1330], "model": "gpt-4o-mini", "finish_reason": "stop", "id": "chatcmpl-8f3a6c1e",
    "usage": {"prompt_tokens": 27, "completion_tokens": 301, "total_tokens": 328},
}  # fmt: skip
ASKED = {"prompt": "Why is the sky blue?", "context": "Answer for a child.", "model": "gpt-4o-mini", "temperature": 0.2}

HOW: dict[str, Callable[[float, float], float]] = {
    "×": lambda ours, theirs: ours / theirs,          # So many times theirs
    "+": lambda ours, theirs: ours - theirs,          # So much more than theirs
    "=": lambda ours, theirs: ours,                   # By itself
}


@dataclass
class Case:
    "Two functions, each of which measures one round of its side; and what their ratio may be."

    name: str
    against: str                        # What theirs is; "" if there is none
    ours: Callable[[], float]
    theirs: Callable[[], float] | None
    unit: str = "µs"
    how: str = "×"                      # See `HOW`
    most: float | None = None           # The budget: at most this
    least: float | None = None          # Or at least this
    rounds: int = 25

    def best(self, side: Sequence[float]) -> float:
        "The round that nothing disturbed."
        return max(side) if "/s" in self.unit else min(side)

    def run(self, share: float = 1.0) -> dict[str, Any]:
        "Measure A B A B …"
        self.ours(), self.theirs and self.theirs()                         # Warm
        pairs = [(self.ours(), self.theirs() if self.theirs else 0.0) for _ in range(max(3, round(self.rounds * share)))]
        figures = [HOW[self.how](*pair) for pair in pairs]
        middle = statistics.median(figures)
        bound = "≤" if self.most is not None else "≥"
        budget = self.most if self.most is not None else self.least
        kept = None if budget is None else middle <= budget if bound == "≤" else middle >= budget
        ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
        return {
            "name": self.name, "against": self.against, "unit": self.unit, "how": self.how, "ours": ours,
            "theirs": theirs if self.theirs else None, "figure": middle, "low": min(figures), "high": max(figures),
            "best": HOW[self.how](*(self.best(side) for side in zip(*pairs, strict=True))),
            "bound": bound, "budget": budget, "kept": kept, "rounds": len(pairs),
        }  # fmt: skip


class Upstream:
    "What is cached: it answers at once, and knows how often it was asked."

    def __init__(self) -> None: self.asked = 0

    def answer(self) -> dict[str, Any]:
        self.asked += 1
        return {**ANSWER}

    def function(self) -> Callable[..., Any]:
        "A fresh function that asks."
        def answer(prompt: str, context: str = "", model: str = "default", temperature: float = 1.0) -> Any: return self.answer()
        return answer

    def afunction(self) -> Callable[..., Awaitable[Any]]:
        async def answer(prompt: str, context: str = "", model: str = "default", temperature: float = 1.0) -> Any: return self.answer()
        return answer


class Lab:
    "Where cases run: a folder, a Redis, one event loop, all gone at the end."

    def __init__(self, full: bool = False) -> None:
        self.full, self._stack = full, ExitStack()

    def __enter__(self) -> Lab:
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="aurea-bench-")))
        self.runner = self._stack.enter_context(asyncio.Runner())
        self.redis = Server(self.folder / "redis")
        self._stack.callback(self.redis.kill)
        self.wait = self.runner.run
        self.env = wiped(os.environ, self.folder) | {"PYTHONPATH": str(ROOT)}
        return self

    def __exit__(self, *error: Any) -> None: self._stack.close()

    @property
    def url(self) -> str: return f"{self.redis.url}?memory=0"              # Redis itself, no memory before it

    def empty(self) -> None:
        with self.redis.client() as client: client.flushall()

    def python(self, *words: str, **more: Any) -> subprocess.Popen[str]:
        "A Python beside this one, without any setting of ours."
        return subprocess.Popen([sys.executable, *words], env=self.env | more.pop("env", {}), cwd=self.folder, text=True, **more)

    def told(self, *words: str, **more: Any) -> str:
        "What a Python beside this one prints."
        process = self.python(*words, stdout=subprocess.PIPE, **more)
        out, _ = process.communicate(timeout=120)
        if process.returncode: raise RuntimeError(f"{' '.join(words)[:80]} ended with {process.returncode}")
        return out

    # ---- rounds

    def timed(self, call: Callable[[], Any], per: int = 1, seconds: float = 0.03) -> Callable[[], float]:
        "A round of blocking calls; µs for each of the `per` things that a call does."
        loops = 0

        def round() -> float:
            nonlocal loops
            if not loops:
                call()
                began = time.perf_counter(); call()
                loops = max(1, min(100_000, int(seconds / (time.perf_counter() - began))))
            began = time.perf_counter()
            for _ in repeat(None, loops): call()
            return (time.perf_counter() - began) / loops / per * 1e6
        return round

    def awaited(self, call: Callable[[], Awaitable[Any]], per: int = 1, seconds: float = 0.03) -> Callable[[], float]:
        "The same for calls that are awaited, on the one loop of the lab."
        loops = 0

        async def some(n: int) -> float:
            began = time.perf_counter()
            for _ in repeat(None, n): await call()
            return time.perf_counter() - began

        def round() -> float:
            nonlocal loops
            if not loops:
                self.wait(some(1))
                loops = max(1, min(100_000, int(seconds / self.wait(some(1)))))
            return self.wait(some(loops)) / loops / per * 1e6
        return round


def hit(upstream: Upstream, call: Callable[[], Any], wait: Callable[[Any], Any] = lambda answer: answer) -> None:
    "Make sure that what is going to be measured is a hit, and equal."
    wait(call())
    before, answer = upstream.asked, wait(call())
    assert upstream.asked == before and answer == ANSWER, "not a hit"
