"""How many times a miss goes to Redis and back: counted on the wire, by a proxy."""
from __future__ import annotations

import functools
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from aurea_orchestrator import Cache, cache_llm_response
from bench.cases import Case, Lab, Upstream

BOOKKEEPING = b"aurea:counts"  # The counters are delivered twice a second, whatever happens


class Proxy:
    "Stands before a port. A round trip begins with what the client says after the server spoke."

    def __init__(self, port: int) -> None:
        self.behind, self.trips = port, 0
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port = self._door.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try: near, _ = self._door.accept()
            except OSError: return
            far, heard = socket.create_connection(("127.0.0.1", self.behind)), [True]
            for source, sink, asks in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._carry, args=[source, sink, asks, heard], daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, asks: bool, heard: list[bool]) -> None:
        try:
            while data := source.recv(1 << 16):
                if asks and heard[0] and BOOKKEEPING not in data: self.trips += 1
                heard[0] = not asks
                sink.sendall(data)
        except OSError: pass
        finally: source.close(), sink.close()

    def close(self) -> None: self._door.close()


def trips(lab: Lab) -> Iterator[Case]:
    "For a function and for an `async def`."
    proxy, numbers = Proxy(lab.redis.port), itertools.count()
    url = lab.url.replace(str(lab.redis.port), str(proxy.port))

    def counted(call: Callable[[str], Any]) -> Callable[[], float]:
        def round() -> float:
            before = proxy.trips
            call(f"never asked before {next(numbers)}")
            time.sleep(0.03)                                                # What is done aside counts too
            return proxy.trips - before
        return round

    for name, made, run in (("def", Upstream.function, lambda x: x), ("async def", Upstream.afunction, lab.wait)):
        cached = cache_llm_response(cache=Cache.from_url(url, timeout=5))(made(Upstream()))
        call = functools.partial(lambda cached, run, prompt: run(cached(prompt)), cached, run)
        yield Case(f"round trips to Redis of a miss, {name}", "", counted(call), None, "round trips", "=", most=3, rounds=21)
    proxy.close()


CASES = (trips,)
