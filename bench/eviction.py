"""What to give up when memory is full: `stores.memory` beside LRU, SIEVE, S3-FIFO and GDSF, on made-up traffic.

    python -m bench.eviction [seed]

Keys are asked for by Zipf's law. Sizes are lognormal, and so are the seconds that a value costs: without regard to its size, in
proportion to it (longer answers take longer), or mixed (half are vectors: 6 KB, quick; half are answers: slow). The traffic stays as it
is, or scans ask for many keys once, or a tenth of the keys change ranks now and then, or everybody turns to other keys at once. Rates are
of the Zipf requests alone, after a fifth for warming up: nobody expects a scan to hit. Nothing is timed, so the same seed prints the same
table everywhere. Some minutes.
"""
from __future__ import annotations

import heapq
import math
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import accumulate, product
from typing import Any

from aurea_orchestrator import codec
from aurea_orchestrator.stores.memory import OVERHEAD_BYTES, MemoryStore
from aurea_orchestrator.stores.urls import worth

KEYS, REQUESTS, EVERY, SCAN = 10_000, 100_000, 5_000, 2_000  # After so many requests a scan of so many keys, or other ranks
ROOMS, ALPHAS = (0.01, 0.05, 0.2), (0.7, 0.9, 1.1)
COSTS, TRAFFIC = ("any", "by size", "mixed"), ("steady", "scans", "drift", "break")


class Lru:
    "Gives up what was not asked for the longest."

    def __init__(self, room: int) -> None: self.room, self.used, self.kept = room, 0, OrderedDict[str, int]()

    def ask(self, key: str, size: int, cost: float) -> bool:
        "Whether it was there; now it is."
        if key in self.kept:
            self.kept.move_to_end(key)
            return True
        while self.used + size > self.room: self.used -= self.kept.popitem(last=False)[1]
        self.kept[key] = size
        self.used += size
        return False


class Sieve:
    "A hit sets a mark; a hand goes round, takes marks away, and takes who has none (NSDI 2024)."

    def __init__(self, room: int) -> None:
        self.room, self.used, self.marks, self.queue = room, 0, dict[str, list[int]](), deque[str]()
        self.passed = deque[str]()                                          # Between the old end and the hand

    def ask(self, key: str, size: int, cost: float) -> bool:
        if key in self.marks:
            self.marks[key][1] = 1
            return True
        while self.used + size > self.room: self.evict()
        self.marks[key] = [size, 0]
        self.queue.append(key)
        self.used += size
        return False

    def evict(self) -> None:
        while True:
            if not self.queue: self.queue, self.passed = self.passed, deque()
            key = self.queue.popleft()
            if not self.marks[key][1]: break
            self.marks[key][1] = 0
            self.passed.append(key)
        self.used -= self.marks.pop(key)[0]


class S3Fifo:
    "A small queue to prove oneself, a main one, and a list of who left the small one lately (SOSP 2023)."

    def __init__(self, room: int) -> None:
        self.room, self.kept, self.ghosts = room, dict[str, list[int]](), OrderedDict[str, int]()
        self.small, self.main, self.used = deque[str](), deque[str](), [0, 0, 0]       # Bytes of small, main, ghosts

    def ask(self, key: str, size: int, cost: float) -> bool:
        if key in self.kept:
            self.kept[key][1] = min(3, self.kept[key][1] + 1)
            return True
        while self.used[0] + self.used[1] + size > self.room: self.evict()
        known = self.ghosts.pop(key, 0)
        self.used[2] -= known
        (self.main if known else self.small).append(key)
        self.used[bool(known)] += size
        self.kept[key] = [size, 0]
        return False

    def evict(self) -> None:
        while self.small and (self.used[0] >= self.room / 10 or not self.main):
            key = self.small.popleft()
            size, hits = self.kept[key]
            self.used[0] -= size
            if hits <= 1:
                del self.kept[key]
                self.ghosts[key] = size
                self.used[2] += size
                while self.used[2] > self.room * 0.9: self.used[2] -= self.ghosts.popitem(last=False)[1]
                return
            self.main.append(key)
            self.used[1] += size
            self.kept[key][1] = 0
        while True:
            key = self.main.popleft()
            size, hits = self.kept[key]
            if not hits: break
            self.kept[key][1] -= 1
            self.main.append(key)
        self.used[1] -= size
        del self.kept[key]


class Gdsf:
    "Level + hits × cost / size, in a heap (Cherkasova 1998)."

    def __init__(self, room: int) -> None:
        self.room, self.used, self.level, self.kept, self.heap = room, 0, 0.0, dict[str, list[Any]](), list[tuple[float, str]]()

    def ask(self, key: str, size: int, cost: float) -> bool:
        if hit := key in self.kept: self.kept[key][0] += 1
        else:
            while self.used + size > self.room:
                due, other = heapq.heappop(self.heap)
                if other in self.kept and self.kept[other][2] == due:
                    self.level = due
                    self.used -= self.kept.pop(other)[1]
            self.kept[key] = [1, size, 0.0]
            self.used += size
        entry = self.kept[key]
        entry[2] = self.level + entry[0] * cost / size
        heapq.heappush(self.heap, (entry[2], key))
        return hit


class Ours:
    "The memory store itself, told of worth as `memory://` is. The seconds of an entry are in its header."

    def __init__(self, room: int, worth: Callable[[bytes], float] = worth) -> None:
        self.store, self.blobs = MemoryStore(max_bytes=room, worth=worth), dict[str, bytes]()

    def ask(self, key: str, size: int, cost: float) -> bool:
        if self.store.peek(key) is not None: return True
        if (blob := self.blobs.get(key)) is None:
            blob = codec.encode(b"", born=0.0, cost=cost)
            blob = self.blobs[key] = blob.ljust(size - OVERHEAD_BYTES - len(key), b"\0")
        self.store.keep(key, blob, 3600)
        return False


class Alike(Ours):
    "The memory tier: all entries are worth the same."

    def __init__(self, room: int) -> None: super().__init__(room, lambda blob: 1.0)


class Carried(Ours):
    "What the memory tier could be: the bytes of a trip count too."

    def __init__(self, room: int) -> None: super().__init__(room, lambda blob: 1.0 + len(blob) / A_TRIP)


A_TRIP = 100_000  # Bytes that take as long as a round trip to Redis: see `growth.sizes`


def world(costs: str, seed: int) -> list[tuple[int, float]]:
    "Size and cost of each key; those from `KEYS` on are for scans."
    chance, made = random.Random(f"{seed} {costs}"), []
    for _ in range(KEYS + REQUESTS // EVERY * SCAN):
        size, vary = round(max(50, chance.lognormvariate(math.log(2_000), 1.2))), chance.lognormvariate(0, 0.3)
        cost = chance.lognormvariate(math.log(2), 1.2) if costs == "any" else 0.3 + size / 300 * vary
        if costs == "mixed" and chance.random() < 0.5: size, cost = 6_200, 0.08 * vary
        if costs == "trips":
            size = round(max(50, chance.lognormvariate(math.log(4_000), 2)))
            cost = 1 + size / A_TRIP
        made.append((size + OVERHEAD_BYTES + 50, cost))
    return made


def trace(alpha: float, traffic: str, seed: int) -> Iterator[int]:
    "Keys in the order in which they are asked for."
    chance, names = random.Random(f"{seed} {alpha}"), list(range(KEYS))
    weights, scanned = list(accumulate(1 / rank**alpha for rank in range(1, KEYS + 1))), KEYS
    for n in range(REQUESTS // EVERY):
        yield from (names[rank] for rank in chance.choices(range(KEYS), cum_weights=weights, k=EVERY))
        if traffic == "scans":
            yield from range(scanned, scanned := scanned + SCAN)
        elif traffic == "drift":
            ranks = chance.sample(range(KEYS), KEYS // 10)
            for rank, name in zip(ranks, chance.sample([names[rank] for rank in ranks], len(ranks)), strict=True): names[rank] = name
        elif traffic == "break" and n % 5 == 4:
            names = names[KEYS // 4 :] + names[: KEYS // 4]


Figures = tuple[float, float, float]  # Misses, their bytes, their seconds; as shares of all
SHELVES = (Lru, Sieve, S3Fifo, Gdsf, Ours, Alike)


def run(shelves: tuple[Callable[[int], Any], ...], costs: str, room: float, alpha: float, traffic: str, seed: int) -> list[Figures]:
    "What each of the shelves misses."
    keys, found = world(costs, seed), []
    bound = round(sum(size for size, _ in keys[:KEYS]) * room)
    for kind in shelves:
        shelf, missed, total = kind(bound), [0.0] * 3, [0.0] * 3
        warm = REQUESTS // 5
        for n, key in enumerate(trace(alpha, traffic, seed)):
            size, cost = keys[key]
            hit = size <= bound and shelf.ask(f"key:{key:08}", size, cost)
            if n < warm or key >= KEYS: continue
            for at, weight in enumerate((1, size, cost)):
                total[at] += weight
                missed[at] += 0 if hit else weight
        found.append((missed[0] / total[0], missed[1] / total[1], missed[2] / total[2]))
    return found


def mean(values: list[float]) -> float: return math.exp(math.fsum(map(math.log, values)) / len(values))


def main(seed: int) -> None:
    plans = list(product(COSTS, ROOMS, ALPHAS, TRAFFIC))
    print(f"{REQUESTS:,} requests for {KEYS:,} keys, seed {seed}.")
    print("Misses / their bytes / their seconds: LRU's in percent of all, the others' times LRU's.\n")
    print(f"{'cost':>8} {'room':>5} {'Zipf':>5} {'traffic':>8} {'LRU':>16} " + " ".join(f"{kind.__name__:>15}" for kind in SHELVES[1:]))
    ratios: dict[str, list[list[Figures]]] = {traffic: [] for traffic in TRAFFIC}
    with ProcessPoolExecutor(2) as pool:
        jobs = [pool.submit(run, SHELVES, *plan, seed) for plan in plans]
        trips = [pool.submit(run, (Lru, Alike, Carried), "trips", *plan, seed) for plan in product(ROOMS, ALPHAS, TRAFFIC[:2])]
        for plan, job in zip(plans, jobs, strict=True):
            lru, *others = job.result()
            times = [tuple(a / b for a, b in zip(one, lru, strict=True)) for one in others]
            ratios[plan[-1]].append(times)
            said = f"{plan[0]:>8} {plan[1]:5.0%} {plan[2]:5} {plan[3]:>8} {'/'.join(f'{x:.1%}'[:-1] for x in lru):>16}"
            print(said, *(f"{'/'.join(f'{x:.2f}' for x in one):>15}" for one in times), flush=True)
    for traffic, rows in ratios.items():
        print(f"\n{traffic}: times LRU's, mean and (worst of {len(rows)})")
        for kind, column in zip(SHELVES[1:], zip(*rows, strict=True), strict=True):
            parts = zip(("misses", "bytes", "seconds"), zip(*column, strict=True), strict=True)
            print(f"  {kind.__name__:8}", *(f"{name} {mean(list(values)):.2f} ({max(values):.2f})" for name, values in parts))
    print("\nthe memory tier, where a miss takes a trip and its bytes: time of misses, times LRU's")
    told = [[one[2] / job.result()[0][2] for one in job.result()[1:]] for job in trips]
    for kind, values in zip((Alike, Carried), zip(*told, strict=True), strict=True):
        print(f"  {kind.__name__:8} {mean(list(values)):.3f} ({max(values):.3f})")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
