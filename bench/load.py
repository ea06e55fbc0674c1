"""Ask a server as fast as it answers:  python -m bench.load PORT CONNECTIONS SECONDS      prints requests per second"""
from __future__ import annotations

import selectors
import socket
import sys
import time
from urllib.parse import urlencode

ASKED = [{"prompt": f"Why is the sky blue? {i}", "context": "For a child.", "model": "m"} for i in range(64)]
QUESTIONS = [f"/llm/generate?{urlencode(one)}" for one in ASKED]
ASKS = [f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Length: 0\r\n\r\n".encode() for path in QUESTIONS]


def whole(data: bytes) -> bool:
    "Whether a response is all there. Anything but 200 is an error."
    head, found, body = data.partition(b"\r\n\r\n")
    if not found: return False
    if not head.startswith(b"HTTP/1.1 200"): raise RuntimeError(data[:300].decode(errors="replace"))
    low = head.lower()
    at = low.index(b"content-length:") + 15
    return len(body) >= int(low[at:].split(b"\r", 1)[0])


def ask(port: int, connections: int, seconds: float) -> float:
    "Keep each connection busy with one request at a time."
    chosen = selectors.DefaultSelector()
    for n in range(connections):
        link = socket.create_connection(("127.0.0.1", port))
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        chosen.register(link, selectors.EVENT_READ, [b"", n])
        link.sendall(ASKS[n % len(ASKS)])
    done, began = 0, time.perf_counter()
    end = began + seconds
    while (now := time.perf_counter()) < end:
        for key, _ in chosen.select(1):
            state, link = key.data, key.fileobj
            got = link.recv(1 << 16)
            if not got: raise RuntimeError("the server hung up")
            state[0] += got
            if whole(state[0]):
                done += 1
                state[0], state[1] = b"", state[1] + 1
                link.sendall(ASKS[state[1] % len(ASKS)])
    for key in list(chosen.get_map().values()): key.fileobj.close()
    return done / (now - began)


if __name__ == "__main__":
    print(ask(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
