"""What to give up when memory is full: SIEVE, as in `stores.memory`, beside LRU and FIFO, on made-up traffic.

    python -m bench.eviction [seed]

Prompts are asked for by Zipf's law; scans (a batch job, a clear by name) ask for many keys once. Entries are of one size, so a bound
is a number of entries. Rates are hits among the Zipf requests alone: nobody expects a scan to hit. Nothing is timed, so the same seed
prints the same table everywhere.
"""
from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate
from typing import Protocol

from aurea_orchestrator.stores.memory import OVERHEAD_BYTES, MemoryStore

KEYS, REQUESTS = 20_000, 200_000
SCAN_EVERY, SCAN = 10_000, 4_000     # After so many requests, so many keys that nobody asks for again


class Shelf(Protocol):
    def ask(self, key: str) -> bool: ...


class Lru:
    "Gives up what was not asked for the longest."

    def __init__(self, room: int) -> None: self.room, self.keys = room, OrderedDict[str, None]()

    def ask(self, key: str) -> bool:
        "Whether it was there; now it is."
        if hit := key in self.keys: self.touch(key)
        else:
            if len(self.keys) >= self.room: self.keys.popitem(last=False)
            self.keys[key] = None
        return hit

    def touch(self, key: str) -> None: self.keys.move_to_end(key)


class Fifo(Lru):
    "Gives up what came first."

    def touch(self, key: str) -> None: pass


class Sieve:
    "The memory store itself."

    def __init__(self, room: int) -> None:
        self.store = MemoryStore(max_bytes=room * (OVERHEAD_BYTES + len(zipf(0))))

    def ask(self, key: str) -> bool:
        if self.store.peek(key) is not None: return True
        self.store.keep(key, b"", 3600)
        return False


def zipf(n: int) -> str: return f"zipf:{n:08}"


def trace(alpha: float, scans: bool, seed: int) -> Iterator[str]:
    "Requests, in order; those of a scan begin with `scan:`."
    chance = random.Random(f"{seed} {alpha}")
    weights = list(accumulate(1 / rank**alpha for rank in range(1, KEYS + 1)))
    scanned = 0
    for _ in range(REQUESTS // SCAN_EVERY):
        yield from map(zipf, chance.choices(range(KEYS), cum_weights=weights, k=SCAN_EVERY))
        if scans:
            yield from (f"scan:{n:08}" for n in range(scanned, scanned + SCAN))
            scanned += SCAN


def rate(shelf: Shelf, requests: Iterator[str]) -> float:
    "Hits among the requests that are not part of a scan."
    hits = total = 0
    for key in requests:
        hit = shelf.ask(key)
        if key.startswith("zipf"): hits, total = hits + hit, total + 1
    return hits / total


def main(seed: int) -> None:
    print(f"{REQUESTS:,} requests for {KEYS:,} keys, seed {seed}; a scan is {SCAN:,} keys after each {SCAN_EVERY:,} requests\n")
    print(f"{'Zipf':>5} {'room':>6} {'scans':>6} {'FIFO':>7} {'LRU':>7} {'SIEVE':>7}   misses of SIEVE / of LRU")
    for alpha in (0.8, 1.0, 1.2):
        for part in (0.01, 0.1):
            for scans in (False, True):
                room = int(KEYS * part)
                fifo, lru, sieve = (rate(kind(room), trace(alpha, scans, seed)) for kind in (Fifo, Lru, Sieve))
                said = f"{alpha:5} {part:6.0%} {'yes' if scans else 'no':>6} {fifo:7.1%} {lru:7.1%} {sieve:7.1%}"
                print(f"{said}   {(1 - sieve) / (1 - lru):.2f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
