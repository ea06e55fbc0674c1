"""The endpoints, over the ASGI interface."""
from __future__ import annotations

import json
import logging
import time

import httpx2
import pytest
from fastapi import FastAPI
from fastapi.exceptions import HTTPException
from fastapi.responses import JSONResponse

from aurea_orchestrator import Cache, routes
from aurea_orchestrator.asked import Asked, Recent
from aurea_orchestrator.config import Settings
from aurea_orchestrator.errors import ConfigError
from aurea_orchestrator.front import Front
from aurea_orchestrator.main import create_app
from tests.upstream import Upstream, expected, vector


@pytest.fixture(scope="module")
def _upstream():
    with Upstream() as up: yield up


@pytest.fixture
def upstream(_upstream):
    httpx2.post(f"{_upstream.url.removesuffix('/v1')}/reset", trust_env=False)
    return _upstream


def fault(up, **what): httpx2.post(f"{up.url.removesuffix('/v1')}/fault", json=what, trust_env=False)


@pytest.fixture
async def make():
    made = []
    def _make(**settings):
        app = create_app(Settings(_env_file=None, **{"cache_url": "memory://", "llm_timeout": 2, "host": "127.0.0.1", **settings}))
        client = httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://aurea", timeout=30)
        made.append((app, client))
        return client
    yield _make
    for app, client in made:
        await client.aclose()
        await app.state.shut()


def base(up): return {"llm_base_url": up.url, "llm_api_key": "sk-very-secret", "llm_model": "m"}


async def test_seed_endpoints(make):
    client = make(api_key="k")
    root = (await client.get("/")).json()
    assert root["name"] == "aurea-orchestrator" and root["version"] and root["cache_enabled"] is True
    health = await client.get("/health")
    assert health.status_code == 200 and health.json() == {"status": "healthy"}
    ready = (await client.get("/ready")).json()
    assert ready["status"] == "ready" and ready["store"]["name"] == "memory" and ready["backends"]["llm"]["name"] == "demo" and ready["degraded"] == []


async def test_miss_and_hit_have_the_same_bytes(make, upstream):
    client = make(**base(upstream))
    miss = await client.post("/llm/generate", params={"prompt": "Why?", "context": "c"})
    hit = await client.post("/llm/generate", json={"prompt": "Why?", "context": "c", "model": "m"})
    assert miss.status_code == hit.status_code == 200 and miss.content == hit.content
    assert miss.json()["response"] == expected("Why?", "c") and miss.json()["backend"] == "openai" and miss.json()["model"] == "m"
    assert (miss.headers["x-cache"], hit.headers["x-cache"]) == ("miss", "hit")
    assert "fwd=miss" in miss.headers["cache-status"] and "stored" in miss.headers["cache-status"] and hit.headers["cache-status"].startswith("aurea; hit")
    assert hit.headers["age"].isdigit() and 'key="llm:' in hit.headers["cache-status"] and 'ttl=3' in hit.headers["cache-status"]
    assert upstream.calls()["chat"] == 1
    fresh = await client.post("/llm/generate", json={"prompt": "Why?", "context": "c", "bypass_cache": True})
    assert fresh.headers["x-cache"] == "bypass" and upstream.calls()["chat"] == 2 and "fwd=request" in fresh.headers["cache-status"]
    assert (await client.post("/llm/generate?prompt=Why%3F&context=c&bypass_cache=1")).headers["x-cache"] == "bypass"


async def test_every_parameter_is_in_the_key_and_forwarded(make, upstream):
    client = make(**base(upstream))
    bodies = [{"prompt": "p"}, {"prompt": "p", "temperature": 0.5}, {"prompt": "p", "temperature": 1}, {"prompt": "p", "context": "c"}, {"prompt": "p", "model": "n"}, {"prompt": "p", "stop": ["a"]}]
    for want in ("miss", "hit"):
        assert [(await client.post("/llm/generate", json=b)).headers["x-cache"] for b in bodies] == [want] * len(bodies)
    assert upstream.calls()["chat"] == len(bodies)
    assert (await client.post("/llm/generate", json={"prompt": "p", "temperature": 0.5})).json()["response"] == expected("p", temperature=0.5)


async def test_embeddings(make, upstream):
    client = make(**base(upstream))
    one = await client.post("/embedding/generate", params={"text": "a"})
    assert one.json()["embedding"] == vector("a") and one.headers["x-cache"] == "miss"
    again = await client.post("/embedding/generate", json={"text": "a"})
    assert again.content == one.content and again.headers["x-cache"] == "hit"
    many = await client.post("/embedding/generate", json={"text": ["b", "a", "c", "b"]})
    assert many.json()["embedding"] == [vector(t) for t in "bacb"]
    assert (many.headers["x-cache"], many.headers["x-cache-hits"], many.headers["x-cache-misses"]) == ("miss", "2", "2")
    assert upstream.calls()["embeddings"] == 2 and upstream.calls()["texts"] == 3
    full = await client.post("/embedding/generate", json={"text": ["b", "a", "c", "b"]})
    assert full.content == many.content and full.headers["x-cache"] == "hit"
    stats = (await client.get("/cache/stats")).json()
    assert stats["embedding"] == {"hits": 1 + 2 + 4, "misses": 3} and stats["total"]["hit_rate"] == 70.0


@pytest.mark.parametrize("path, given, status, says", [
    ("/llm/generate", {}, 422, "'prompt' is missing"),
    ("/llm/generate", {"json": {"prompt": ""}}, 422, "empty"),
    ("/llm/generate", {"params": {"prompt": "  "}}, 422, "empty"),
    ("/llm/generate", {"json": {"prompt": ["a"]}}, 422, "must be a string"),
    ("/llm/generate", {"json": {"prompt": "a", "context": 5}}, 422, "'context' must be a string"),
    ("/llm/generate", {"json": {"prompt": "a", "bypass_cache": "perhaps"}}, 422, "true or false"),
    ("/llm/generate", {"json": {"prompt": "a", "stream": True}}, 422, "stream"),
    ("/llm/generate", {"json": [1]}, 422, "send an object"),
    ("/llm/generate", {"content": b"{\"prompt\": \"a", "headers": {"content-type": "application/json"}}, 400, "not valid JSON"),
    ("/llm/generate", {"content": b"{\"prompt\": \"\xff\xfe\"}", "headers": {"content-type": "application/json"}}, 400, "UTF-8"),
    ("/llm/generate", {"content": b"prompt=a", "headers": {"content-type": "application/x-www-form-urlencoded"}}, 415, "application/json"),
    ("/llm/generate", {"params": {"prompt": "a"}, "json": {"prompt": "b"}}, 422, "give it once"),
    ("/llm/generate", {"params": {"prompt": "a", "temperature": "1"}}, 422, "unknown query parameter"),
    ("/llm/generate", {"content": b"[" * 100_000}, 400, "not valid JSON"),
    ("/embedding/generate", {"json": {"text": []}}, 422, "empty list"),
    ("/embedding/generate", {"json": {"text": ["a", ""]}}, 422, "text[1]"),
    ("/embedding/generate", {"json": {"text": {"a": 1}}}, 422, "must be a string"),
    ("/embedding/generate", {"json": {"text": ["a"] * 2049}}, 422, "at most 2048"),
    ("/embedding/generate", {"json": {"text": "a", "texts": ["b"]}}, 422, "'texts' cannot be a parameter"),
    ("/embedding/generate", {"json": {"text": "a", "self": 1}}, 422, "'self' cannot be a parameter"),
    ("/llm/generate", {"json": {"prompt": "a", "self": 1}}, 422, "'self' cannot be a parameter"),
    ("/llm/generate", {"json": {"prompt": None}}, 422, "'prompt' is missing"),
    ("/cache/clear", {"params": {"kind": "No Kind"}}, 422, "kind"),
    ("/cache/clear", {"params": {"namespace": "a:b"}}, 422, "namespace"),
    ("/cache/clear", {"params": {"knid": "llm"}}, 422, "knid"),
])  # fmt: skip
async def test_bad_input_is_told_what_to_do(make, path, given, status, says):
    reply = await make().post(path, **given)
    assert reply.status_code == status and says in reply.json()["detail"], reply.text


async def test_a_body_of_50_mb(make):
    client = make()
    body = json.dumps({"prompt": "x" * 50_000_000}).encode()
    reply = await client.post("/llm/generate", content=body)
    assert reply.status_code == 413 and "MAX_BODY" in reply.json()["detail"]


@pytest.mark.parametrize("kind, status", [("500", 502), ("401", 502), ("404", 502), ("400", 400), ("422", 422), ("html", 502), ("garbage", 502), ("half", 502), ("reset", 502), ("empty", 502), ("no_choices", 502), ("error_in_200", 502)])
async def test_an_upstream_failure_has_its_status_and_is_never_stored(make, upstream, kind, status):
    client = make(**base(upstream))
    fault(upstream, kind=kind, times=50)
    bad = await client.post("/llm/generate", json={"prompt": "p"})
    assert bad.status_code == status and bad.json()["detail"] and bad.headers["x-cache"] == "error", bad.text
    assert "sk-very-secret" not in bad.text
    httpx2.post(f"{upstream.url.removesuffix('/v1')}/reset", trust_env=False)
    good = await client.post("/llm/generate", json={"prompt": "p"})
    assert good.status_code == 200 and good.headers["x-cache"] == "miss" and good.json()["response"] == expected("p")
    stats = (await client.get("/cache/stats")).json()
    assert stats["llm"] == {"hits": 0, "misses": 2} and stats["outcomes"]["llm"]["error"] == 1


async def test_a_list_may_have_2048_texts(make):
    client = make()
    many = await client.post("/embedding/generate", json={"text": ["a"] * 2047 + ["b"], "dimensions": 1})
    assert many.status_code == 200 and len(many.json()["embedding"]) == 2048
    schema = (await client.get("/openapi.json")).json()["paths"]["/embedding/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"]["text"]["oneOf"][1]["maxItems"] == 2048


async def test_null_is_as_if_it_were_left_out(make, upstream):
    client = make(**base(upstream))
    assert (await client.post("/llm/generate", json={"prompt": "p"})).headers["x-cache"] == "miss"
    for name in ("context", "model", "bypass_cache", "stream"):
        reply = await client.post("/llm/generate", json={"prompt": "p", name: None})
        assert (reply.status_code, reply.headers["x-cache"]) == (200, "hit"), reply.text
    assert (await client.post("/embedding/generate", json={"text": "a", "model": None})).status_code == 200


@pytest.mark.parametrize("asked, told", [("0.4", "1"), ("90.5", "91"), ("90", "90"), ("0", "0")])
async def test_retry_after_is_never_less_than_was_asked_for(make, function, asked, told):
    client = make(llm_backend=function(f"from aurea_orchestrator.errors import BackendRefusedError\nasync def ask(prompt): raise BackendRefusedError('slow down', 429, {asked})\n"))
    reply = await client.post("/llm/generate", json={"prompt": "p"})
    assert (reply.status_code, reply.headers["retry-after"]) == (429, told)


async def test_offline_what_is_not_stored_is_504(make):
    cache, private = Cache.from_url("memory://", explain="text"), "the treasure is under the old oak"
    app = create_app(Settings(_env_file=None, host="127.0.0.1"), cache)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://aurea") as client:
        await client.post("/llm/generate", json={"prompt": private})
        cache.mode("offline")
        assert (await client.post("/llm/generate", json={"prompt": private})).headers["x-cache"] == "hit"
        for body in ({"prompt": "q"}, {"prompt": private, "bypass_cache": True}):
            miss = await client.post("/llm/generate", json=body)
            assert miss.status_code == 504 and miss.headers["x-cache"] == "error" and "fwd" not in miss.headers["cache-status"]
            assert miss.json()["detail"].endswith("there is no stored answer, and the mode is offline") and "oak" not in miss.text
        stats = (await client.get("/cache/stats")).json()
        assert stats["llm"] == {"hits": 1, "misses": 1} and stats["outcomes"]["llm"]["error"] == 2
        assert 'status="504"} 2.0' in (await client.get("/metrics")).text
    await app.state.shut()


async def test_429_keeps_its_retry_after_and_silence_is_504(make, upstream):
    client = make(**base(upstream))
    fault(upstream, kind="429", times=50, retry_after=7)
    busy = await client.post("/llm/generate", json={"prompt": "p"})
    assert busy.status_code == 429 and busy.headers["retry-after"] == "7"
    httpx2.post(f"{upstream.url.removesuffix('/v1')}/reset", trust_env=False)
    fault(upstream, kind="hang", times=50)
    silent = await client.post("/llm/generate", json={"prompt": "q"})
    assert silent.status_code == 504 and "timeout" in silent.json()["detail"].lower()


@pytest.mark.parametrize("kind", ["length", "filter"])
async def test_truncated_and_filtered_answers_are_returned_but_not_stored(make, upstream, kind):
    client = make(**base(upstream))
    fault(upstream, kind=kind, times=1)
    first = await client.post("/llm/generate", json={"prompt": "p"})
    assert first.status_code == 200 and first.json()["finish_reason"] in ("length", "content_filter") and "stored" not in first.headers["cache-status"]
    assert (await client.post("/llm/generate", json={"prompt": "p"})).headers["x-cache"] == "miss"


@pytest.mark.parametrize("kind", ["wrong_count", "too_many", "ragged", "nan"])
async def test_a_wrong_batch_is_refused_and_not_stored(make, upstream, kind):
    client = make(**base(upstream))
    fault(upstream, kind=kind, times=1, on="embeddings")
    assert (await client.post("/embedding/generate", json={"text": ["a", "b"]})).status_code == 502
    good = await client.post("/embedding/generate", json={"text": ["a", "b"]})
    assert good.json()["embedding"] == [vector("a"), vector("b")] and good.headers["x-cache-misses"] == "2"


async def test_keys_protect_the_cache(make):
    client = make(api_key="old-key, new-key")
    for path, call in (("/cache/stats", client.get), ("/cache/clear", client.post)):
        for headers in ({}, {"x-api-key": "wrong"}, {"x-api-key": ""}, {"x-api-key": "old-key,new-key"}, {"x-api-key": "ключ".encode()}):
            reply = await call(path, headers=headers)
            assert reply.status_code == 401 and "X-API-Key" in reply.json()["detail"] and "www-authenticate" in reply.headers
        for key in ("old-key", "new-key"): assert (await call(path, headers={"x-api-key": key})).status_code == 200
    assert (await make().get("/cache/stats")).status_code == 200
    for path in ("/", "/health", "/ready", "/metrics"): assert (await client.get(path)).status_code == 200


async def test_clear(make):
    client = make()
    for prompt in "ab": await client.post("/llm/generate", json={"prompt": prompt})
    await client.post("/embedding/generate", json={"text": "a"})
    assert (await client.post("/cache/clear", params={"kind": "embedding"})).json() == {"message": "Cache cleared successfully", "deleted_keys": 1}
    assert (await client.post("/cache/clear", json={"namespace": "team"})).json()["deleted_keys"] == 0
    assert (await client.post("/cache/clear")).json()["deleted_keys"] == 2
    assert (await client.post("/llm/generate", json={"prompt": "a"})).headers["x-cache"] == "miss"


async def test_metrics_and_stats_agree(make):
    client = make()
    for prompt in "aabac": await client.post("/llm/generate", json={"prompt": prompt})
    await client.post("/llm/generate", json={"prompt": "a", "bypass_cache": True})
    await client.post("/nowhere/at/all")
    page = (await client.get("/metrics")).text
    for line in ('cache_hits_total{cache_type="llm"} 2.0', 'cache_misses_total{cache_type="llm"} 3.0', "cache_hit_rate 40.0", 'cache_outcomes_total{cache_type="llm",outcome="bypass"} 1.0',
                 'http_requests_total{method="POST",path="/llm/generate",status="200"} 6.0', 'http_requests_total{method="POST",path="other",status="404"} 1.0', "cache_store_up 1.0",
                 'cache_step_duration_seconds_count{cache_type="llm",step="compute"} 4.0'):  # fmt: skip
        assert line in page, line
    for step in ("request", "key", "lookup", "lease", "compute", "store", "reply"):
        assert f'cache_step_duration_seconds_count{{cache_type="llm",step="{step}"}} 0.0' not in page, step
    stats = (await client.get("/cache/stats")).json()
    assert stats["llm"] == {"hits": 2, "misses": 3} and stats["total"] == {"hits": 2, "misses": 3, "requests": 5, "hit_rate": 40.0}


async def test_disabled(make, upstream):
    client = make(cache_enabled=False, **base(upstream))
    replies = [await client.post("/llm/generate", json={"prompt": "p"}) for _ in range(2)]
    assert [r.headers["x-cache"] for r in replies] == ["bypass"] * 2 and "fwd=bypass" in replies[0].headers["cache-status"] and upstream.calls()["chat"] == 2
    assert (await client.get("/")).json()["cache_enabled"] is False


async def test_mounted_under_a_prefix_in_another_app(upstream):
    outer = FastAPI()
    inner = create_app(Settings(_env_file=None, cache_url="memory://", **base(upstream)))
    outer.mount("/ai", inner)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(outer), base_url="http://outer") as client:
        assert [(await client.post("/ai/llm/generate", json={"prompt": "p"})).headers["x-cache"] for _ in range(2)] == ["miss", "hit"]
        assert (await client.get("/ai/health")).json() == {"status": "healthy"}
        assert 'path="/llm/generate"' in (await client.get("/ai/metrics")).text
        assert (await client.get("/ai/")).json()["docs"] == "/ai/docs"
    await inner.state.shut()


async def test_openapi_has_examples(make):
    client = make()
    schema = (await client.get("/openapi.json")).json()
    post = schema["paths"]["/llm/generate"]["post"]
    assert {p["name"] for p in post["parameters"]} == {"prompt", "context", "model", "bypass_cache"}
    assert post["requestBody"]["content"]["application/json"]["example"]["prompt"] and "502" in post["responses"]
    assert (await client.get("/docs")).status_code == 200


async def test_secrets_are_nowhere(make, upstream, caplog):
    caplog.set_level(logging.DEBUG)
    client = make(**base(upstream), api_key="door-key", debug=True)
    fault(upstream, kind="500", times=50, message="your key {key} and body {body}")
    failed = [await client.post("/llm/generate", json={"prompt": "a very private prompt", **more}) for more in ({}, {"context": "private context"})]
    failed += [await client.post("/embedding/generate", json={"text": text}) for text in ("a very private text", ["a private text", "another private text"])]
    assert all(reply.status_code == 502 and "Bearer [key]" in reply.text and "[prompt]" in reply.text for reply in failed), [reply.text for reply in failed]
    await client.get("/cache/stats", headers={"x-api-key": "door-key"})
    seen = caplog.text + "".join(reply.text + str(reply.headers) for reply in failed) + (await client.get("/metrics")).text + (await client.get("/ready")).text
    for secret in ("sk-very-secret", "door-key", "private"): assert secret not in seen


async def test_a_user_function_answers(make, tmp_path, monkeypatch):
    (tmp_path / "mymodels.py").write_text("calls = []\ndef ask(prompt, model='mine'):\n    calls.append(prompt)\n    return prompt.upper()\nasync def embed(texts):\n    return [[float(len(t)), 0.5] for t in texts]\n")
    monkeypatch.syspath_prepend(tmp_path)
    client = make(llm_backend="mymodels:ask", embedding_backend="mymodels:embed")
    replies = [await client.post("/llm/generate", json={"prompt": "hi"}) for _ in range(2)]
    assert replies[0].json()["response"] == "HI" and replies[0].json()["backend"] == "function" and replies[1].headers["x-cache"] == "hit"
    refused = await client.post("/llm/generate", json={"prompt": "hi", "temperature": 1})
    assert refused.status_code == 400 and "temperature" in refused.json()["detail"]
    assert (await client.post("/embedding/generate", json={"text": ["a", "bb"]})).json()["embedding"] == [[1.0, 0.5], [2.0, 0.5]]


@pytest.fixture
def function(tmp_path, monkeypatch):
    "Make a function of a user, by name."
    monkeypatch.syspath_prepend(tmp_path)
    def function(code):
        name = f"mine_{abs(hash(code))}"
        (tmp_path / f"{name}.py").write_text(code)
        return f"{name}:ask"
    return function


@pytest.mark.parametrize("reply", ["{'response': 'x', 'raw': object()}", "{'response': 'x', 'usage': object()}", "{'response': 'x', 'finish_reason': ['a']}", "{'response': 'x', 'said': 'cut \\ud83d'}"])
async def test_what_a_function_returns_that_is_no_answer_is_502(make, function, reply):
    bad = await make(llm_backend=function(f"def ask(prompt): return {reply}\n")).post("/llm/generate", json={"prompt": "p"})
    assert bad.status_code == 502 and "returned an answer that cannot be sent as JSON" in bad.json()["detail"] and bad.headers["x-cache"] == "error"


async def test_half_a_character_is_replied_as_one_that_cannot_be_shown(make, function):
    client = make(llm_backend=function("def ask(prompt): return 'cut \\ud83d'\n"))
    assert [(reply.json()["response"], reply.headers["x-cache"]) for reply in [await client.post("/llm/generate", json={"prompt": "p"}) for _ in "ab"]] == [("cut \ufffd", "miss"), ("cut \ufffd", "hit")]


async def test_a_function_s_exception_tells_neither_prompt_nor_key(make, function, caplog):
    caplog.set_level(logging.DEBUG)
    client = make(llm_backend=function("def ask(prompt): raise LookupError('Incorrect API key provided: sk-proj-abcdef1234567890; prompt was: ' + prompt)\n"), debug=True)
    bad = await client.post("/llm/generate", json={"prompt": "a very private prompt"})
    assert bad.status_code == 502 and "LookupError: Incorrect API key provided: [key]" in bad.json()["detail"]
    for secret in ("sk-proj", "7890", "private"): assert secret not in bad.text + str(bad.headers) + caplog.text


@pytest.mark.timed
@pytest.mark.parametrize("code", ["import asyncio\nasync def ask(prompt): await asyncio.sleep(30)\n", "import time\ndef ask(prompt): time.sleep(30)\n"])
async def test_the_time_limit_holds_for_functions(make, function, code):
    began = time.monotonic()
    late = await make(llm_backend=function(code), llm_timeout=0.3).post("/llm/generate", json={"prompt": "p"})
    assert late.status_code == 504 and "0.3 s" in late.json()["detail"] and time.monotonic() - began < 5


async def test_the_same_bytes_are_read_once_and_answered_alike(make, upstream, monkeypatch):
    read, parameters = [], routes.parameters
    monkeypatch.setattr(routes, "parameters", lambda *given: read.append(1) or parameters(*given))
    client = make(**base(upstream))
    for how in ({"params": {"prompt": "ü", "context": "c"}}, {"json": {"prompt": "ü", "context": "d"}}):
        replies, before = [await client.post("/llm/generate", **how) for _ in range(4)], len(read)
        assert [r.headers["x-cache"] for r in replies] == ["miss", "hit", "hit", "hit"] and len({r.content for r in replies}) == 1
        assert len({r.headers["cache-status"].partition("key=")[2] for r in replies}) == 1
        await client.post("/cache/clear")
        again = await client.post("/llm/generate", **how)  # remembered, and computed from its parameters all the same
        assert again.headers["x-cache"] == "miss" and again.json() == replies[0].json() and len(read) == before + 2  # one of them for the clear
    assert len(read) == 2 * 3 and upstream.calls()["chat"] == 4


async def test_what_is_refused_or_wants_a_fresh_answer_is_not_remembered(make, upstream):
    client = make(**base(upstream))
    for _ in range(3): assert "unknown query" in (await client.post("/llm/generate?promt=p")).json()["detail"]
    for _ in range(3): assert (await client.post("/llm/generate?prompt=p&bypass_cache=1")).headers["x-cache"] == "bypass"
    assert (await client.post("/llm/generate?prompt=p")).headers["x-cache"] == "hit" and upstream.calls()["chat"] == 3
    for body in ({"text": ["a"]}, {"text": "a"}) * 2: reply = await client.post("/embedding/generate", json=body)
    assert reply.json()["embedding"] == vector("a") and (await client.post("/embedding/generate", json={"text": ["a"]})).json()["embedding"] == [vector("a")]
    assert (await client.post("/embedding/generate", json={"prompt": "p"})).status_code == 422  # the same bytes at another door


def test_what_is_remembered_is_bounded():
    seen, asked = Recent(most=10, size=100), Asked(("llm:1",), "m")
    for n in range(1000):
        seen.keep(("llm", b"?%d" % n, b""), asked)
        seen.keep(("llm", b"often", b""), seen.get(("llm", b"often", b"")) or asked._replace(model="often"))
        assert len(seen.young) + len(seen.old) <= 20
    assert seen.get(("llm", b"often", b"")).model == "often" and seen.get(("llm", b"?999", b"")) and not seen.get(("llm", b"?5", b""))
    for raw, what in ((("llm", b"x" * 60, b"x" * 60), asked), (("llm", b"y", b""), asked._replace(keys=("1", "2"))), (("llm", b"z", b""), asked._replace(fresh=True))):
        seen.keep(raw, what)
        assert seen.get(raw) is None


async def test_a_function_that_changes_its_arguments_changes_nothing_that_is_remembered(make, tmp_path, monkeypatch):
    (tmp_path / "greedy.py").write_text("def ask(prompt, stop=()):\n    said = ','.join(stop)\n    stop.append('more')\n    return said\n")
    monkeypatch.syspath_prepend(tmp_path)
    client = make(llm_backend="greedy:ask")
    for want in ("miss", "hit", "miss", "hit"):
        reply = await client.post("/llm/generate", json={"prompt": "p", "stop": ["a"]})
        assert reply.headers["x-cache"] == want and reply.json()["response"] == "a"
        if want == "hit": await client.post("/cache/clear")


async def test_a_hit_tells_its_steps_to_whoever_listens(make):
    cache = Cache.from_url("memory://")
    app = create_app(Settings(_env_file=None, host="127.0.0.1"), cache)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://aurea") as client:
        await client.post("/llm/generate", params={"prompt": "p"})
        for _ in range(2):
            told = []
            with cache.bus.listening(told.append): await client.post("/llm/generate", params={"prompt": "p"})
            assert [(event.step, event.kind, event.outcome, event.count, event.error) for event in told] == [
                ("request", "llm", None, 1, None), ("key", "llm", None, 1, None), ("reply", "llm", "hit", 1, None), ("reply", "llm", None, 1, None)]  # fmt: skip
            assert all(0 <= event.seconds < 60 for event in told)
    await app.state.shut()


async def test_the_express_lane_answers_as_the_framework_does(make):
    cache = Cache.from_url("memory://")
    apps = [create_app(Settings(_env_file=None, host="127.0.0.1", max_body=50), cache) for _ in range(2)]
    apps[1].user_middleware.clear()  # No front: the framework's own routes answer
    heads = ("x-cache", "content-type", "content-length", "cache-status")
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(apps[0]), base_url="http://a") as a, httpx2.AsyncClient(transport=httpx2.ASGITransport(apps[1]), base_url="http://b") as b:
        await a.post("/llm/generate", params={"prompt": "p"}), await a.post("/embedding/generate", json={"text": ["a", "b"]})
        for path, how in (("/llm/generate", {"params": {"prompt": "p"}}), ("/embedding/generate", {"json": {"text": ["a", "b"]}}), ("/llm/generate", {}), ("/llm/generate", {"content": b"x" * 100}), ("/llm/generate", {"content": b"{"})):
            ours, theirs = await a.post(path, **how), await b.post(path, **how)
            assert (ours.status_code, ours.content) == (theirs.status_code, theirs.content)
            assert sorted(ours.headers) == sorted(theirs.headers) and [ours.headers.get(h) for h in heads] == [theirs.headers.get(h) for h in heads]
        for client in (a, b): assert (await client.get("/llm/generate")).status_code == 405
        page = (await a.get("/metrics")).text
    for line in ('{method="POST",path="/llm/generate",status="200"} 2.0', '{method="POST",path="/llm/generate",status="422"} 1.0', '{method="POST",path="/llm/generate",status="413"} 1.0', 'path="/llm/generate",status="405"} 1.0'):
        assert f"http_requests_total{line}" in page or line in page, line
    for app in apps: await app.state.shut()


@pytest.mark.parametrize("which", [HTTPException, 422])
@pytest.mark.parametrize("way", ["async", "sync"])
async def test_the_express_lane_asks_the_app_s_own_exception_handlers(which, way):
    replies = []
    for front in (True, False):
        app = create_app(Settings(_env_file=None, host="127.0.0.1"), Cache.from_url("memory://"))
        if not front: app.user_middleware.clear()
        def mine(request, error): return JSONResponse({"sorry": error.detail, "at": request.url.path}, 418)
        async def mine_later(request, error): return mine(request, error)
        app.add_exception_handler(which, mine if way == "sync" else mine_later)
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://a") as client:
            replies += [await client.post("/llm/generate", json={})]
            if front: assert 'path="/llm/generate",status="418"} 1.0' in (await client.get("/metrics")).text
        await app.state.shut()
    assert replies[0].status_code == replies[1].status_code == 418 and replies[0].content == replies[1].content and replies[0].headers == replies[1].headers


async def test_what_nobody_handles_is_raised_and_counted_as_500(monkeypatch):
    app = create_app(Settings(_env_file=None, host="127.0.0.1"), Cache.from_url("memory://"))
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app, raise_app_exceptions=False), base_url="http://a") as client:
        assert (await client.get("/health")).status_code == 200
        monkeypatch.setattr(routes, "cache_headers", lambda *_: 1 / 0)
        assert (await client.post("/llm/generate", json={"prompt": "p"})).status_code == 500
        assert 'path="/llm/generate",status="500"} 1.0' in (await client.get("/metrics")).text
    await app.state.shut()


async def test_no_client_makes_series_grow(make):
    client = make()
    await client.get("/")  # opens the house, so that there is somebody who counts
    for n in range(20): assert (await client.request(f"X{n}", "/health")).status_code == 405
    assert (await client.request("Z" * 65_400, "/health")).status_code == 405
    page = (await client.get("/metrics")).text
    assert 'http_requests_total{method="other",path="/health",status="405"} 21.0' in page and "X7" not in page and "ZZ" not in page

    counted = []
    class House:
        class metrics:
            def answered(*what): counted.append(what[:3])
    async def fails(scope, receive, send): raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError): await Front(fails, House, {})({"type": "http", "method": "GET", "path": "/what/a/client/wrote"}, None, None)
    assert counted == [("GET", "other", 500)]


@pytest.mark.parametrize("path", ["/llm/generate", "/embedding/generate", "/cache/clear"])
async def test_a_client_that_hangs_up_while_it_sends_is_no_failure_of_ours(path, caplog):
    app, said = create_app(Settings(_env_file=None, cache_url="memory://", host="127.0.0.1")), []
    waiting = [{"type": "http.request", "body": b'{"pro', "more_body": True}, {"type": "http.disconnect"}]
    async def receive(): return waiting.pop(0)
    async def send(message): said.append(message)
    scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": path, "query_string": b"", "headers": [(b"content-length", b"99")], "root_path": "", "scheme": "http", "server": ("a", 80)}
    await app(scope, receive, send)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://a") as client:
        assert f'http_requests_total{{method="POST",path="{path}",status="499"}} 1.0' in (await client.get("/metrics")).text
    assert said == [] and "Traceback" not in caplog.text
    await app.state.shut()


@pytest.mark.parametrize("value", ["tcp://10.0.0.11:6379", "tcp://[fd00::1]:6379"])
def test_what_kubernetes_puts_beside_a_service_named_redis_is_no_setting(monkeypatch, value):
    for name in ("REDIS_HOST", "REDIS_URL", "CACHE_URL"): monkeypatch.delenv(name, raising=False)
    for name, given in {"REDIS_PORT": value, "REDIS_PORT_6379_TCP_ADDR": "10.0.0.11", "REDIS_SERVICE_HOST": "10.0.0.11", "REDIS_SERVICE_PORT": "6379"}.items(): monkeypatch.setenv(name, given)
    assert Settings(_env_file=None).redis_port == 6379 and not Settings(_env_file=None).redis_chosen
    assert Settings(_env_file=None, redis_host="mine").redis_chosen and Settings(_env_file=None, redis_port=6380).redis_port == 6380
    for wrong in ("tcp", "http://h:1", "0", "many"):
        monkeypatch.setenv("REDIS_PORT", wrong)
        with pytest.raises(ConfigError, match="REDIS_PORT"): Settings(_env_file=None)


@pytest.mark.parametrize("keys", ["schl\xfcssel", "good, schl\xfcssel", "a\nb", "a\tb", "\u200bkey"])
def test_a_door_key_that_nobody_can_send_is_refused_and_not_shown(keys):
    with pytest.raises(ConfigError, match="API_KEY.*ASCII") as refused: Settings(_env_file=None, api_key=keys)
    assert "ssel" not in str(refused.value)
    assert Settings(_env_file=None, api_key=" one,\ttwo words \r\n").api_keys == ("one", "two words")


@pytest.mark.parametrize("version, headers, sent, status", [
    ("1.1", [(b"content-length", b"0")], [], 422),
    ("1.1", [], [], 422),
    ("1.1", [(b"content-length", b"15")], [b'{"prompt": "p"}'], 200),
    ("1.1", [(b"transfer-encoding", b"chunked")], [b'{"prom', b'pt": "p"}'], 200),
    ("2", [], [b'{"prompt":', b' "p"}'], 200),
    ("2", [], [b""], 422),
])  # fmt: skip
async def test_a_body_is_read_when_there_is_one(make, version, headers, sent, status):
    app, said = create_app(Settings(_env_file=None, cache_url="memory://", host="127.0.0.1")), []
    waiting = [{"type": "http.request", "body": part, "more_body": part is not sent[-1]} for part in sent]
    async def receive(): return waiting.pop(0)  # Nothing more comes: to wait for it would be an IndexError here
    async def send(message): said.append(message)
    scope = {"type": "http", "http_version": version, "method": "POST", "path": "/llm/generate", "query_string": b"", "headers": headers, "root_path": "", "scheme": "http", "server": ("a", 80)}
    await app(scope, receive, send)
    assert said[0]["status"] == status and not waiting
    await app.state.shut()
