"""A small OpenAI-compatible upstream over real HTTP, that can fail in every way an upstream fails.

    python tests/upstream.py --port 0            prints its port, serves until it is stopped
    with Upstream() as up: up.url, up.calls()    the same in a thread

POST /v1/chat/completions, /v1/embeddings    answers are functions of the request: see `expected` and `vector`
GET  /calls   {"chat", "embeddings", "texts", "open", "most_open", "per_prompt": {digest(prompt): calls}}
POST /fault   {"kind", "times": 1, "retry_after": …, "on": "chat" | "embeddings", "message": …}
              the next requests fail so; kind null stops it
POST /delay   {"seconds": 0.1}    before each answer, and over the pieces of a stream
POST /reset   no counts, no faults, no delay

Faults: any status ("429", "500", "302", …); hang, reset, half, garbage, html, empty, array, gzip_garbage;
no_choices, null_content, parts, tool_calls, length, filter, error_in_200, big;
wrong_count, too_many, ragged, nan, no_index, shuffled, twice, base64; cut (a stream that ends too early).
Messages of errors may say {key} and {body}: what the request carried, echoed as indiscreet upstreams do.
"""
from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import json
import struct
import threading
import urllib.request
from collections import Counter
from typing import Any

DIMENSIONS = 8


def digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def expected(prompt: str, context: str = "", model: str = "m", **params: Any) -> str:
    """The answer to a call, so that a test can tell whose answer it got."""
    return f"answer {digest(prompt, context, model, params)} to {prompt[:60]}"


def vector(text: str, model: str = "m", dimensions: int = DIMENSIONS) -> list[float]:
    """The vector of a text; its numbers are exact in 32 bits."""
    return [int(digest(text, model, at)[:4], 16) / 65536 - 0.5 for at in range(dimensions)]


def _usage(words: int) -> dict[str, Any]:
    return {"prompt_tokens": 7, "completion_tokens": words, "total_tokens": 7 + words}


class Hangup(Exception):
    """Close the connection without another word."""


class Upstream:
    def __init__(self, port: int = 0, delay: float = 0.0) -> None:
        self.port, self.first_delay = port, delay
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reset()

    # the state, touched by the server's loop only

    def _reset(self) -> None:
        self.delay, self.faults = self.first_delay, list[dict[str, Any]]()
        self.counts, self.per_prompt, self.open, self.most_open = Counter[str](), Counter[str](), 0, 0
        self.seen: list[dict[str, Any]] = []  # Bodies of the last requests
        self.headers: list[dict[str, str]] = []

    def _fault(self, on: str) -> dict[str, Any]:
        for fault in self.faults:
            if fault.get("on", on) == on and fault.get("times", 1) > 0:
                fault["times"] = fault.get("times", 1) - 1
                return fault
        return {"kind": None}

    # HTTP

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, path, _ = head[0].split(" ", 2)
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                await self._request(method, path.partition("?")[0], headers, body, writer)
                await writer.drain()
                if headers.get("connection", "").lower() == "close":
                    break
        except (asyncio.IncompleteReadError, ConnectionError, Hangup):
            pass
        finally:
            writer.close()

    def _send(self, writer: asyncio.StreamWriter, status: int, body: bytes, kind: str = "application/json", **headers: str) -> None:
        more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode() + body)

    async def _request(self, method: str, path: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter) -> None:
        data = json.loads(body) if body else {}
        if path in ("/v1/chat/completions", "/v1/embeddings"):
            self.open += 1
            self.most_open = max(self.open, self.most_open)
            try:
                await self._model("chat" if "chat" in path else "embeddings", headers, data, writer)
            finally:
                self.open -= 1
            return
        if path == "/reset":
            self._reset()
        elif path == "/delay":
            self.delay = float(data["seconds"])
        elif path == "/fault":
            self.faults = [*self.faults, data] if data.get("kind") else []
        elif path == "/calls":
            counts = {name: self.counts[name] for name in ("chat", "embeddings", "texts")}
            data = {**counts, "open": self.open, "most_open": self.most_open, "per_prompt": self.per_prompt}
        else:
            self._send(writer, 404, b'{"error": {"message": "no such path"}}')
            return
        self._send(writer, 200, json.dumps(data).encode())

    async def _model(self, on: str, headers: dict[str, str], data: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.counts[on] += 1
        self.seen, self.headers = [*self.seen[-99:], data], [*self.headers[-99:], headers]
        texts = [] if on == "chat" else [data["input"]] if isinstance(data["input"], str) else data["input"]
        self.counts["texts"] += len(texts)
        self.per_prompt.update(map(digest, texts or [data["messages"][-1]["content"]]))
        fault = self._fault(on)
        kind = fault["kind"]
        if self.delay:
            await asyncio.sleep(self.delay)
        if kind and kind.isdigit():
            message = fault.get("message", f"fault {kind}")
            message = message.replace("{key}", headers.get("authorization", "")).replace("{body}", json.dumps(data))
            more = {"Retry_After": str(fault["retry_after"])} if "retry_after" in fault else {}
            more |= {"Location": f"http://127.0.0.1:{self.port}/v1/chat/completions"} if kind[0] == "3" else {}
            return self._send(writer, int(kind), json.dumps({"error": {"message": message, "type": "fault"}}).encode(), **more)
        if kind == "hang":
            await asyncio.sleep(3600)
        if kind == "reset":
            writer.transport.abort()
            raise Hangup
        plain = {"html": b"<!doctype html><title>Welcome</title>", "garbage": b"\x00\xff\x1bnot json", "empty": b"", "array": b"[]"}
        if kind in plain:
            return self._send(writer, 200, plain[kind], "text/html" if kind == "html" else "application/json")
        if kind == "gzip_garbage":
            return self._send(writer, 200, b"not gzip", Content_Encoding="gzip")
        if on == "chat" and data.get("stream"):
            return await self._stream(data, kind, writer)
        answer = json.dumps(self._chat(data, kind) if on == "chat" else self._embeddings(data, texts, kind)).encode()
        if kind == "half":
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(answer)}\r\n\r\n".encode())
            writer.write(answer[: len(answer) // 2])
            raise Hangup
        self._send(writer, 200, answer)

    # the model

    def _text(self, data: dict[str, Any]) -> str:
        context = "\n".join(m["content"] for m in data["messages"][:-1])
        params = {name: value for name, value in data.items() if name not in ("model", "messages", "stream", "stream_options")}
        return expected(data["messages"][-1]["content"], context, data["model"], **params)

    def _chat(self, data: dict[str, Any], kind: str | None) -> dict[str, Any]:
        text = self._text(data)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        ended = {"length": "length", "filter": "content_filter", "tool_calls": "tool_calls", "error_in_200": "stop"}.get(kind or "", "stop")
        if kind == "null_content":
            message["content"] = None
        elif kind == "parts":
            message["content"] = [{"type": "text", "text": text[:9]}, {"type": "text", "text": text[9:]}]
        elif kind == "tool_calls":
            call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
            message |= {"content": None, "tool_calls": [call]}
        elif kind == "big":
            message["content"] = "x" * (65 << 20)
        words = len(text.split(" "))
        body = {
            "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": data["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": ended}],
            "usage": {**_usage(words), "prompt_tokens_details": {"cached_tokens": 0}},
        }
        if kind == "no_choices":
            del body["choices"]
        return {"error": {"message": "the provider is down", "code": 502}} if kind == "error_in_200" else body

    async def _stream(self, data: dict[str, Any], kind: str | None, writer: asyncio.StreamWriter) -> None:
        words = self._text(data).split(" ")
        pieces = [{"role": "assistant", "content": ""}, *({"content": w if at == 0 else f" {w}"} for at, w in enumerate(words)), {}]
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": data["model"]}
        ended = "length" if kind == "length" else "stop"
        events: list[dict[str, Any]] = [
            {**base, "choices": [{"index": 0, "delta": piece, "finish_reason": None if piece else ended}]} for piece in pieces
        ]
        if (data.get("stream_options") or {}).get("include_usage"):
            events.append({**base, "choices": [], "usage": _usage(len(words))})
        for at, event in enumerate([*map(json.dumps, events), "[DONE]"]):
            if kind == "cut" and at == len(events) // 2:
                raise Hangup
            line = f"data: {event}\n\n".encode()
            writer.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
            await writer.drain()
            await asyncio.sleep(self.delay / len(events))
        writer.write(b"0\r\n\r\n")

    def _embeddings(self, data: dict[str, Any], texts: list[str], kind: str | None) -> dict[str, Any]:
        given: list[Any] = [vector(text, data["model"], data.get("dimensions", DIMENSIONS)) for text in texts]
        if kind == "nan":
            given[-1][0] = float("nan")
        if kind == "ragged":
            given[-1].pop()
        if kind == "base64" or data.get("encoding_format") == "base64":
            given = [base64.b64encode(struct.pack(f"<{len(v)}f", *v)).decode() for v in given]
        rows = [{"object": "embedding", "index": at, "embedding": v} for at, v in enumerate(given)]
        if kind == "wrong_count":
            rows.pop()
        if kind == "too_many":
            rows.append({**rows[-1], "index": len(rows)})
        if kind == "twice":
            rows[-1] = {**rows[0]}
        if kind == "shuffled":
            rows.reverse()
        if kind == "no_index":
            rows = [{"embedding": row["embedding"]} for row in rows]
        return {"object": "list", "data": rows, "model": data["model"], "usage": {"prompt_tokens": len(texts), "total_tokens": len(texts)}}

    # running it

    async def serve(self, started: Any = None) -> None:
        connections = set[asyncio.Task[None]]()

        async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            connections.add(task)
            try:
                await self._connection(reader, writer)
            except asyncio.CancelledError:
                pass
            finally:
                connections.discard(task)

        server = await asyncio.start_server(connection, "127.0.0.1", self.port, backlog=2048, limit=1 << 20)
        self.port = server.sockets[0].getsockname()[1]
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        if started:
            started()
        try:
            await self._stop.wait()
        finally:
            server.close()
            for task in list(connections):
                task.cancel()
            await asyncio.gather(*connections, return_exceptions=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Upstream:
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self.serve(ready.set)), daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def post(self, path: str, data: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask one of the steering paths, over HTTP."""
        raw = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", raw, {"Connection": "close"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as reply:
            found: dict[str, Any] = json.load(reply)
        return found

    def calls(self) -> dict[str, Any]:
        return self.post("/calls")

    def fault(self, kind: str | int, times: int = 1, **more: Any) -> None:
        self.post("/fault", {"kind": str(kind), "times": times, **more})

    def slow(self, seconds: float) -> None:
        self.post("/delay", {"seconds": seconds})

    def reset(self) -> None:
        self.post("/reset", {})


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--port", type=int, default=0)
    arguments.add_argument("--delay", type=float, default=0.0)
    options = arguments.parse_args()
    upstream = Upstream(options.port, options.delay)
    try:
        asyncio.run(upstream.serve(lambda: print(upstream.port, flush=True)))
    except KeyboardInterrupt:
        pass
