"""A cached answer over HTTP, beside the proxy of LiteLLM:  python -m bench.proxy PORT CONNECTIONS SECONDS   is the load on that one"""
from __future__ import annotations

import json
import os
import secrets
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bench import load
from bench.apps import ANSWER
from bench.cases import Case, Lab
from bench.http import CONNECTIONS, OURS, loaded, served
from tests.servers import free_ports

CONFIG = {
    "model_list": [{"model_name": "m", "litellm_params": {"model": "openai/m", "api_key": "none", "mock_response": ANSWER["response"]}}],
    "litellm_settings": {"cache": True, "telemetry": False},
}  # fmt: skip
BODIES = [json.dumps({"model": "m", "messages": [{"role": "user", "content": one["prompt"]}]}).encode() for one in load.ASKED]
HEAD = ("POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {}\r\n"
        "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n")
KEY = "LITELLM_MASTER_KEY"                                                 # It does not start without one


def asked(port: int, key: str, body: bytes) -> str:
    "The id of the answer; a cached one keeps it."
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", body, headers)
    with urllib.request.urlopen(request, timeout=20) as reply: return str(json.loads(reply.read())["id"])


@contextmanager
def litellm(lab: Lab, key: str) -> Iterator[int]:
    "Its proxy as it comes, one worker, every question answered before; it keeps the answers in the same Redis."
    port, config = free_ports(1)[0], lab.folder / "litellm.yaml"
    cache = {"type": "redis", "host": "127.0.0.1", "port": lab.redis.port, "password": ""}
    config.write_text(json.dumps(CONFIG | {"litellm_settings": {**CONFIG["litellm_settings"], "cache_params": cache}}))  # JSON is YAML
    code = "import sys; from litellm import run_server; sys.argv[0] = 'litellm'; run_server()"
    with (lab.folder / "litellm.log").open("w") as log:
        process = lab.python("-c", code, "--config", str(config), "--port", str(port), "--host", "127.0.0.1",
                             env={"LITELLM_LOCAL_MODEL_COST_MAP": "True", KEY: key}, stdout=log, stderr=log)
    try:
        for _ in range(600):
            try:
                asked(port, key, BODIES[0])
                break
            except OSError: time.sleep(0.1)
            if process.poll() is not None: raise RuntimeError((lab.folder / "litellm.log").read_text()[-1000:])
        first = [asked(port, key, body) for body in BODIES]
        time.sleep(0.5)                                                     # It stores aside
        assert first == [asked(port, key, body) for body in BODIES] == [asked(port, key, body) for body in BODIES], "not hits"
        yield port
    finally:
        process.terminate()
        process.wait(20)


def proxy(lab: Lab) -> Iterator[Case]:
    "Both with one worker and the same Redis; theirs on the chat endpoint, ours on /llm/generate."
    lab.empty()
    key = f"sk-{secrets.token_hex(16)}"                                     # Of this run
    with litellm(lab, key) as theirs, served(lab, OURS, url=lab.url) as far, served(lab, OURS, url=lab.redis.url) as near:
        def slow() -> float: return float(lab.told("-m", "bench.proxy", str(theirs), str(CONNECTIONS), "3", env={KEY: key}))

        sides: list[tuple[str, Callable[[], float]]] = [("in Redis", loaded(lab, far)), ("Redis behind memory", loaded(lab, near))]
        for place, ours in sides:
            yield Case(f"HTTP hit, {place}", "LiteLLM proxy, chat completion cached in Redis", ours, slow, "requests/s", rounds=5)


CASES = (proxy,)

if __name__ == "__main__":
    load.ASKS = [HEAD.format(os.environ[KEY], len(body)).encode() + body for body in BODIES]
    print(load.ask(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
