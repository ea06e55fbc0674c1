"""Whether the machine itself stood still: what was timed meanwhile says nothing about us."""
from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

TICK, STILL = 0.01, 0.1  # seconds between two beats; a gap between two that is no longer our own doing

BEAT = f"""
import os, sys, time
parent, last = os.getppid(), time.monotonic()
with open(sys.argv[1], "a", buffering=1) as gaps:
    while os.getppid() == parent:
        time.sleep({TICK})
        now = time.monotonic()
        if now - last > {STILL}: gaps.write(f"{{now}}\\n")
        last = now
"""


class Pulse:
    "A process that does nothing but look at the clock, and notes when it could not."

    def __init__(self) -> None:
        self.folder, self.since = tempfile.TemporaryDirectory(), time.monotonic()
        self.gaps = Path(self.folder.name) / "gaps"
        self.gaps.touch()
        self.process = subprocess.Popen([sys.executable, "-S", "-c", BEAT, str(self.gaps)])

    def begin(self) -> None:
        "What was before does not count."
        self.since = time.monotonic()

    def missed(self) -> bool:
        "Whether the machine stood still for a moment since `begin`."
        time.sleep(2 * TICK)  # a gap that has just ended is noted by now
        return any(float(line) > self.since for line in self.gaps.read_text().splitlines())

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()
