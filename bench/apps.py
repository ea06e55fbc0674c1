"""What our server is measured against, and what answers behind it."""
from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI, Response

ANSWER = {"response": "The sky is blue because air scatters short waves of light more than long ones. " * 17, "finish_reason": "stop"}
BODY = msgspec.json.encode(ANSWER)
HEAD = [(b"content-type", b"application/json"), (b"content-length", str(len(BODY)).encode())]


async def answer(prompt: str, context: str = "", model: str = "default") -> dict[str, Any]:
    "Behind ours."
    return ANSWER


fastapi = FastAPI()


@fastapi.post("/llm/generate")
async def generate(prompt: str, context: str = "", model: str = "default") -> Response:
    "The same three parameters, and a fixed body."
    return Response(BODY, media_type="application/json")


async def bare(scope: Any, receive: Any, send: Any) -> None:
    "The limit."
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": HEAD})
        await send({"type": "http.response.body", "body": BODY})
