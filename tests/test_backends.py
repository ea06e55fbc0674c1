"""Backends over real HTTP: right answers, all that an upstream does wrong, and nothing that gets out."""
from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import math
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest

import aurea_orchestrator.testing as testing
from aurea_orchestrator.backends.base import Answer, Backend, Embeddings, FunctionBackend, checked, load
from aurea_orchestrator.backends.demo import DemoBackend, lexical
from aurea_orchestrator.backends.openai import OpenAIBackend, Pause
from aurea_orchestrator.backends.wire import retry_after, veil
from aurea_orchestrator.errors import (
    BackendAnswerError,
    BackendError,
    BackendRefusedError,
    BackendTimeoutError,
    BackendUnavailableError,
    ConfigError,
)
from tests.upstream import Upstream, digest, expected, vector

KEY = "sk-proj-Zq8mVx2LkT7pRw4N"
PROMPT = "The patient in room 7 asks whether her diagnosis is final."
QUICK = Pause(first=0.001, most=0.002)


@pytest.fixture(scope="module")
def _upstream() -> Iterator[Upstream]:
    with Upstream() as up: yield up


@pytest.fixture
def up(_upstream: Upstream) -> Upstream:
    _upstream.reset()
    return _upstream


def play(up: Upstream, act: Callable[[OpenAIBackend], Awaitable[Any]], **options: Any) -> Any:
    async def scene() -> Any:
        backend = OpenAIBackend(up.url, **{"api_key": KEY, "pause": QUICK, "default_model": "m", **options})
        try: return await act(backend)
        finally: await backend.aclose()
    return asyncio.run(scene())


Params = dict[str, Any] | None


def ask(up: Upstream, prompt: str = PROMPT, context: str = "", model: str | None = None, params: Params = None, **options: Any) -> Answer:
    answer: Answer = play(up, lambda backend: backend.generate(prompt, context, model, **params or {}), **options)
    return answer


# What the suite asks of every backend


class TestDemo(testing.BackendSuite):
    def make(self) -> Backend: return DemoBackend()


class TestOpenAI(testing.BackendSuite):
    @pytest.fixture(autouse=True)
    def _up(self, up: Upstream) -> None: self.up = up

    def make(self) -> Backend: return OpenAIBackend(self.up.url, default_model="m")


class TestOpenAIInSmallBatches(TestOpenAI):
    def make(self) -> Backend: return OpenAIBackend(self.up.url, KEY, "m", batch_size=2)


async def answering(prompt: str, context: str = "") -> str: return f"{context}{prompt}"
def embedding(texts: list[str]) -> Any: return np.array([vector(text) for text in texts], dtype=np.float32)
def embedding_one(text: str) -> list[float]: return vector(text)
async def embedding_one_async(text: str) -> Any: return np.array(vector(text), dtype=np.float32)


class TestFunction(testing.BackendSuite):
    embeds = False
    def make(self) -> Backend: return FunctionBackend(answering)


class TestFunctionOfTexts(testing.BackendSuite):
    generates = False
    def make(self) -> Backend: return FunctionBackend(embedding)


class TestFunctionOfOneText(TestFunctionOfTexts):
    def make(self) -> Backend: return FunctionBackend(embedding_one)


class TestAsyncFunctionOfOneText(TestFunctionOfTexts):
    def make(self) -> Backend: return FunctionBackend(embedding_one_async)


# The upstream itself: what the official client sees


def test_the_test_upstream_speaks_as_the_official_client_expects(up: Upstream) -> None:
    with openai.OpenAI(base_url=up.url, api_key="k") as client:
        messages: Any = [{"role": "system", "content": "c"}, {"role": "user", "content": "p"}]
        whole = client.chat.completions.create(model="m", messages=messages)
        assert whole.choices[0].message.content == expected("p", "c", "m")
        stream = client.chat.completions.create(model="m", messages=messages, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected("p", "c", "m")
        made = client.embeddings.create(model="m", input=["a", "b"])
        assert [row.embedding for row in made.data] == [vector("a"), vector("b")]
    calls = up.calls()
    assert (calls["chat"], calls["embeddings"], calls["texts"], calls["per_prompt"][digest("p")]) == (2, 1, 2, 2)


def test_the_test_upstream_is_a_program_too() -> None:
    program = Path(__file__).with_name("upstream.py")
    with subprocess.Popen([sys.executable, program, "--port", "0"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            answer = asyncio.run(OpenAIBackend(f"http://127.0.0.1:{process.stdout.readline().strip()}").generate("p", model="m"))
            assert answer.response == expected("p")
        finally:
            process.terminate()


# Right answers


def test_an_answer_comes_whole(up: Upstream) -> None:
    answer = ask(up, "p", "c", "m-1", {"temperature": 0.5, "stop": ["x"], "stream": False, "n": 1})
    assert answer.response == expected("p", "c", "m-1", temperature=0.5, stop=["x"], n=1)
    assert (answer.model, answer.finish_reason, answer.complete, answer.extra) == ("m-1", "stop", True, {})
    assert answer.usage and answer.usage["total_tokens"] > 7 and all(type(count) is int for count in answer.usage.values())
    assert up.seen[-1]["messages"] == [{"role": "system", "content": "c"}, {"role": "user", "content": "p"}]


def test_no_context_no_system_message_and_no_key_no_header(up: Upstream) -> None:
    ask(up, api_key=None)
    assert up.seen[-1]["messages"] == [{"role": "user", "content": PROMPT}]
    assert set(up.headers[-1]) <= {"host", "accept", "accept-encoding", "connection", "user-agent", "content-type", "content-length"}


@pytest.mark.parametrize("model", [None, "", "default"])
def test_default_is_the_default_model(up: Upstream, model: str | None) -> None:
    assert ask(up, model=model, default_model="mine").model == "mine"
    assert ask(up, model=model, default_model=None).model == "default"


@pytest.mark.parametrize("prompt", ["", "\x00\n\r\t\"\\", "🐈" * 1000, "é" * 300_000, "\u2028 </script>"])
def test_any_text_goes_there_and_back(up: Upstream, prompt: str) -> None:
    assert ask(up, prompt).response == expected(prompt)


@pytest.mark.parametrize("base", ["", "/", "/v1", "/v1/", "/v1//", "/v1/chat/completions", "/v1/embeddings/"])
def test_addresses_as_people_paste_them(up: Upstream, base: str) -> None:
    backend = OpenAIBackend(f"  {up.url.removesuffix('/v1')}{base}\n", KEY, "m")
    assert asyncio.run(backend.generate("p")).response == expected("p")
    assert backend.identity == f"openai:{up.url}"


@pytest.mark.parametrize(("kind", "reason", "complete"), [("length", "length", False), ("filter", "content_filter", False)])
def test_a_cut_answer_is_returned_but_not_complete(up: Upstream, kind: str, reason: str, complete: bool) -> None:
    up.fault(kind)
    answer = ask(up)
    assert (answer.response, answer.finish_reason, answer.complete) == (expected(PROMPT), reason, complete)


def test_null_content_that_was_filtered_or_refused() -> None:
    def run(message: dict[str, Any], reason: str) -> Answer:
        body = {"choices": [{"message": {"content": None, **message}, "finish_reason": reason}]}
        upstream = httpx2.MockTransport(lambda request: httpx2.Response(200, json=body))
        return asyncio.run(OpenAIBackend("http://u", transport=upstream).generate("p"))
    filtered, refused = run({}, "content_filter"), run({"refusal": "I cannot help."}, "stop")
    assert (filtered.response, filtered.complete) == ("", False)
    assert (refused.response, refused.complete, refused.extra) == ("I cannot help.", True, {"refusal": "I cannot help."})


def test_half_a_character_in_an_answer_is_shown_as_one_that_cannot_be() -> None:
    said = (rb'{"model": "m\udc00", "choices": [{"message": {"content": "cut \ud83d", "reasoning_content": ["\ud83d\ude00", "\\ud83d", "\uDE00\uD83D"]},'
            rb' "finish_reason": "stop"}], "usage": {"total_tokens": 9007199254740993}}')
    for body in (said, said.decode().encode("utf-16")):
        upstream = httpx2.MockTransport(lambda request, body=body: httpx2.Response(200, content=body))
        answer = asyncio.run(OpenAIBackend("http://u", transport=upstream).generate("p"))
        assert (answer.response, answer.model, answer.usage) == ("cut \ufffd", "m\ufffd", {"total_tokens": 9007199254740993})
        assert answer.extra == {"reasoning_content": ["\U0001f600", "\\ud83d", "\ufffd\ufffd"]}
    upstream = httpx2.MockTransport(lambda request: httpx2.Response(400, content=rb'{"error": {"message": "what is \ud83d?"}}'))
    with pytest.raises(BackendRefusedError, match="what is \ufffd") as refused: asyncio.run(OpenAIBackend("http://u", transport=upstream).generate("p"))
    str(refused.value).encode()


def test_tool_calls_and_parts(up: Upstream) -> None:
    up.fault("tool_calls")
    called = ask(up)
    assert called.response == "" and called.complete and called.extra["tool_calls"][0]["function"]["name"] == "look"
    up.fault("parts")
    assert ask(up).response == expected(PROMPT)


@pytest.mark.parametrize(("name", "value"), [("messages", []), ("input", ""), ("stream", 1), ("n", 2), ("top_p", math.nan), ("tools", {1})])
def test_parameters_that_cannot_be_sent_are_named_and_not_sent(up: Upstream, name: str, value: object) -> None:
    with pytest.raises(BackendRefusedError, match=name) as refused: ask(up, params={name: value})
    assert refused.value.status == 400 and up.calls()["chat"] == 0


def test_half_a_character_is_the_callers_mistake(up: Upstream) -> None:
    with pytest.raises(BackendRefusedError, match="prompt") as refused: ask(up, "secret \ud83d")
    assert refused.value.status == 400 and "secret" not in str(refused.value)


# Vectors


def embed(up: Upstream, texts: list[str], params: dict[str, Any] | None = None, **options: Any) -> Embeddings:
    made: Embeddings = play(up, lambda backend: backend.embed(texts, **params or {}), **options)
    return made


TEXTS = [f"text {at}" for at in range(11)]
VECTORS = [vector(text) for text in TEXTS]


@pytest.mark.parametrize("kind", [None, "shuffled", "no_index", "base64"])
@pytest.mark.parametrize(("batch_size", "calls"), [(2048, 1), (11, 1), (10, 2), (3, 4), (1, 11)])
def test_vectors_come_in_order_in_batches(up: Upstream, kind: str | None, batch_size: int, calls: int) -> None:
    if kind: up.fault(kind, times=100)
    made = embed(up, TEXTS, batch_size=batch_size)
    assert made.vectors == VECTORS and made.usage == {"prompt_tokens": 11, "total_tokens": 11} and made.model == "m"
    assert (up.calls()["embeddings"], up.calls()["texts"]) == (calls, 11)


def test_the_caller_may_ask_for_base64_and_dimensions(up: Upstream) -> None:
    made = embed(up, TEXTS, {"encoding_format": "base64", "dimensions": 3})
    assert made.vectors == [vector(text, dimensions=3) for text in TEXTS]
    assert up.seen[-1]["encoding_format"] == "base64" and up.seen[-1]["dimensions"] == 3


@pytest.mark.parametrize("kind", ["wrong_count", "too_many", "twice", "ragged", "nan", "html", "garbage", "empty", "array"])
@pytest.mark.parametrize("batch_size", [2048, 4])
def test_wrong_vectors_are_no_answer(up: Upstream, kind: str, batch_size: int) -> None:
    up.fault(kind, times=100)
    with pytest.raises(BackendAnswerError): embed(up, TEXTS, batch_size=batch_size)


def test_vectors_of_another_dimension_in_a_later_batch() -> None:
    sizes = iter((2, 3))
    def upstream(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, json={"data": [{"index": 0, "embedding": [0.5] * next(sizes)}]})
    backend = OpenAIBackend("http://u", transport=httpx2.MockTransport(upstream), batch_size=1)
    with pytest.raises(BackendAnswerError, match="3 numbers"): asyncio.run(backend.embed(["a", "b"]))


@pytest.mark.parametrize("given", ["AAA", "!!!!", [], None, {"a": 1}, ["x"], [10**400], [[1.0]], [None], "", "AADAfw=="])  # The last is NaN
def test_what_is_not_a_vector(given: Any) -> None:
    upstream = httpx2.MockTransport(lambda request: httpx2.Response(200, json={"data": [{"index": 0, "embedding": given}]}))
    with pytest.raises(BackendAnswerError): asyncio.run(OpenAIBackend("http://u", transport=upstream).embed(["a"]))


@pytest.mark.parametrize("places", [[0, 0], [1, 2], [0, -1], [0, None], ["a", 0], [0.5, 1], [True, 0], [0, 10**30]])
def test_places_that_cannot_be(places: list[Any]) -> None:
    rows = [{"index": place, "embedding": [1.0]} for place in places]
    upstream = httpx2.MockTransport(lambda request: httpx2.Response(200, json={"data": rows}))
    with pytest.raises(BackendAnswerError): asyncio.run(OpenAIBackend("http://u", transport=upstream).embed(["a", "b"]))


# What passes is tried again; what does not, is not


@pytest.mark.parametrize("kind", ["408", "409", "425", "429", "500", "502", "503", "504", "529", "reset", "half"])
def test_what_passes_by_itself_is_tried_again(up: Upstream, kind: str) -> None:
    up.fault(kind, times=2)
    assert ask(up).response == expected(PROMPT) and up.calls()["chat"] == 3


@pytest.mark.parametrize(("kind", "error"), [("500", BackendRefusedError), ("429", BackendRefusedError),
                                             ("reset", BackendUnavailableError), ("half", BackendAnswerError)])
@pytest.mark.parametrize("retries", [0, 2])
def test_tries_are_counted(up: Upstream, kind: str, error: type[BackendError], retries: int) -> None:
    up.fault(kind, times=100)
    with pytest.raises(error): ask(up, retries=retries)
    assert up.calls()["chat"] == retries + 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 451, 501, 505])
def test_what_stays_is_not_tried_again(up: Upstream, status: int) -> None:
    up.fault(status, times=100, message="because of this")
    with pytest.raises(BackendRefusedError, match="because of this") as refused: ask(up)
    assert refused.value.status == status and up.calls()["chat"] == 1


def test_a_quota_that_is_used_up_does_not_pass() -> None:
    calls = []
    def upstream(request: httpx2.Request) -> httpx2.Response:
        calls.append(1)
        return httpx2.Response(429, json={"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}})
    backend = OpenAIBackend("http://u", transport=httpx2.MockTransport(upstream), pause=QUICK)
    with pytest.raises(BackendRefusedError, match="quota"): asyncio.run(backend.generate("p"))
    assert len(calls) == 1


NO_ANSWERS = ["html", "garbage", "empty", "array", "gzip_garbage", "no_choices", "null_content", "error_in_200", "302", "307"]


@pytest.mark.parametrize("kind", NO_ANSWERS)
def test_what_is_no_answer_is_not_one_and_is_not_asked_again(up: Upstream, kind: str) -> None:
    up.fault(kind, times=100)
    with pytest.raises(BackendAnswerError): ask(up)
    assert up.calls()["chat"] == 1


@pytest.mark.parametrize("choices", [None, {}, [], [None], [{}], [{"message": ""}], [{"message": {"content": 7}}], [{"text": "old"}]])
def test_shapes_that_are_no_answer(choices: Any) -> None:
    upstream = httpx2.MockTransport(lambda request: httpx2.Response(200, json={"choices": choices}))
    with pytest.raises(BackendAnswerError): asyncio.run(OpenAIBackend("http://u", transport=upstream).generate("p"))


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"error":' * 900 + b"1" + b"}" * 900, b'{"error": ["a", {"msg": 3}]}', b"\xff\xfe"])
@pytest.mark.parametrize("status", [200, 400])
def test_odd_bodies_end_in_our_errors(body: bytes, status: int) -> None:
    upstream = httpx2.MockTransport(lambda request: httpx2.Response(status, content=body))
    with pytest.raises(BackendError): asyncio.run(OpenAIBackend("http://u", transport=upstream).generate("p"))


def test_an_answer_without_end_is_cut_off(up: Upstream) -> None:
    up.fault("big")
    with pytest.raises(BackendAnswerError, match="more than"): ask(up)


def test_nobody_there() -> None:
    backend = OpenAIBackend("http://127.0.0.1:9", KEY, pause=QUICK, retries=1)
    with pytest.raises(BackendUnavailableError, match="127.0.0.1:9"): asyncio.run(backend.generate(PROMPT))


# Waiting


class Nap:
    "Sleeps no time, and remembers how long it should have been."
    def __init__(self) -> None: self.slept: list[float] = []
    async def __call__(self, seconds: float) -> None: self.slept.append(seconds)


def test_waits_double_are_bounded_and_are_drawn(up: Upstream) -> None:
    nap, draws = Nap(), iter((0.0, 0.5, 1.0, 1.0, 1.0, 1.0))
    up.fault("500", times=6)
    ask(up, retries=6, pause=Pause(first=1.0, most=5.0, sleep=nap, random=lambda: next(draws)))
    assert nap.slept == [0.0, 1.0, 4.0, 5.0, 5.0, 5.0]


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_waited(up: Upstream, form: str) -> None:
    nap, now = Nap(), datetime(2026, 1, 1, tzinfo=UTC)
    up.fault("429", retry_after="7" if form == "seconds" else format_datetime(now + timedelta(seconds=7), usegmt=True))
    ask(up, pause=Pause(sleep=nap, random=lambda: 0.5, now=now.timestamp))
    assert nap.slept == [7.0]


@pytest.mark.timed
def test_retry_after_that_does_not_fit_is_not_waited_for(up: Upstream) -> None:
    up.fault("429", times=100, retry_after=30)
    start = time.monotonic()
    with pytest.raises(BackendRefusedError) as refused: ask(up, timeout=5)
    assert (refused.value.status, refused.value.retry_after, up.calls()["chat"]) == (429, 30.0, 1)
    assert time.monotonic() - start < 4


@pytest.mark.parametrize(("headers", "seconds"), [
    ({}, None), ({"retry-after": ""}, None), ({"retry-after": "0"}, 0.0), ({"retry-after": "1.5"}, 1.5), ({"retry-after": "nan"}, None),
    ({"retry-after": "inf"}, None), ({"retry-after": "-3"}, None), ({"retry-after": "1e9"}, None), ({"retry-after": "1.2.3"}, None),
    ({"retry-after": "Thu, 01 Jan 1970 00:00:10 GMT"}, 8.0), ({"retry-after": "Thu, 01 Jan 1970 00:00:10 -0000"}, 8.0),
    ({"retry-after": "Thu, 01 Jan 1970 00:00:01 GMT"}, 0.0), ({"retry-after": "Mon, 99 Foo 9999"}, None),
    ({"retry-after-ms": "250"}, 0.25), ({"retry-after-ms": "x", "retry-after": "2"}, 2.0), ({"retry-after-ms": "1e99", "retry-after": "2"}, 2.0), ({"retry-after-ms": "250", "retry-after": "2"}, 0.25), ({"retry-after-ms": "nan"}, None),
])
def test_forms_of_retry_after(headers: dict[str, str], seconds: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try: assert retry_after(headers, now=2.0) == seconds
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.timed
@pytest.mark.parametrize("act", ["generate", "embed"])
def test_the_timeout_is_for_the_whole_call(up: Upstream, act: str) -> None:
    up.fault("500", times=2)
    up.slow(0.12)  # Two failures, and then batch after batch
    start = time.monotonic()
    with pytest.raises(BackendTimeoutError, match=r"0\.4 s") as timed_out:
        if act == "generate":
            up.fault("hang", times=9)
            ask(up, timeout=0.4)
        else:
            embed(up, TEXTS, timeout=0.4, batch_size=1)
    assert 0.3 < time.monotonic() - start < 3
    assert act == "embed" or "500" in str(timed_out.value)  # What went wrong before is told too


@pytest.mark.parametrize("timeout", [0, -1, math.nan, math.inf])
def test_a_timeout_that_cannot_work(timeout: float) -> None:
    with pytest.raises(ConfigError, match="timeout"): OpenAIBackend("http://u", timeout=timeout)


# Nothing gets out


ECHOES = ["Incorrect API key provided: {key}.", "you sent {key}{key}", "prefix{key}suffix", "bad input: {body}", "{body}{key}",
          f"Incorrect API key provided: {KEY[:8]}**********{KEY[-4:]}.", f"key {KEY[:7]}...{KEY[-4:]}", f"key ending in {KEY[-4:]}",
          f"starts {KEY[:10]}"]


@pytest.mark.parametrize("echo", ECHOES)
@pytest.mark.parametrize("kind", ["401", "400", "429", "500"])
def test_neither_key_nor_prompt_gets_out(up: Upstream, caplog: pytest.LogCaptureFixture, echo: str, kind: str) -> None:
    caplog.set_level(logging.DEBUG)
    up.fault(kind, times=9, message=echo)
    with pytest.raises(BackendRefusedError) as refused: ask(up, context="You are the physician on duty.", retries=1)
    with pytest.raises(BackendRefusedError) as embedded: embed(up, [PROMPT, "short", "another text that is private"], retries=1)
    out = caplog.text + str(refused.value) + repr(refused.value) + str(embedded.value)
    assert "127.0.0.1" in caplog.text, "the logs of the HTTP library were heard"
    for hidden in (KEY, KEY[:8], KEY[-4:], "patient", "diagnosis", "physician", "private"):
        assert hidden not in out
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("kind", [None, "html", "garbage", "half", "reset", "error_in_200", "null_content", "302"])
def test_nor_in_any_log(up: Upstream, caplog: pytest.LogCaptureFixture, kind: str | None) -> None:
    caplog.set_level(logging.DEBUG)
    if kind: up.fault(kind, times=9)
    error = ""
    try: ask(up, retries=1)
    except BackendError as failure: error = str(failure)
    assert bool(error) == bool(kind) and caplog.records
    assert KEY not in caplog.text + error and "patient" not in caplog.text + error


def test_an_error_carries_no_secret_along(up: Upstream) -> None:
    up.fault("reset", times=9)
    with pytest.raises(BackendUnavailableError) as failed: ask(up, retries=0)
    assert failed.value.__cause__ is None and failed.value.__suppress_context__


def test_a_backend_shows_no_secret() -> None:
    for backend in (OpenAIBackend("https://host", KEY), OpenAIBackend("https://me:pass-w0rd@host/v1", headers={"x-api-key": KEY})):
        shown = f"{backend!r} {backend.identity} {backend._line.address!r}"
        assert KEY not in shown and "pass-w0rd" not in shown and backend.identity == "openai:https://host/v1"


@pytest.mark.parametrize("base", [
    "", "host", "localhost:8000/v1", "ftp://host", "http://", "https:///v1", "http://host:99999", "http://host:x/v1", "http://a b/v1",
    "http://host/v1?key=SECRET", "http://host/v1#SECRET", "http://me:SECRET@", "http://me:SECRET@host:x", "http://me:SE/CRET@host",
    "http://me:SE?CRET@host", "me:SECRET@host", "http://h\x00st",
])
def test_a_base_url_that_cannot_work_is_refused_without_its_secrets(base: str) -> None:
    with pytest.raises(ConfigError, match="base URL") as refused: OpenAIBackend(base)
    assert "SECRET" not in str(refused.value) and "CRET" not in str(refused.value) and refused.value.__cause__ is None


@pytest.mark.parametrize("key", ["sk-sch\xf6n-1234567", "sk-12\n345678", "sk-\x7f12345678"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ConfigError, match="API key") as refused: OpenAIBackend("http://u", key)
    assert key not in str(refused.value) and "1234567" not in str(refused.value)


def test_a_key_from_a_file_is_trimmed(up: Upstream) -> None:
    ask(up, api_key=f" {KEY}\r\n")
    assert up.headers[-1]["authorization"] == f"Bearer {KEY}"


def test_other_ways_to_be_let_in(up: Upstream) -> None:
    ask(up, api_key=None, headers={"api-key": KEY, "user-agent": "mine"})
    assert up.headers[-1]["api-key"] == KEY and up.headers[-1]["user-agent"] == "mine" and "authorization" not in up.headers[-1]
    backend = OpenAIBackend(up.url.replace("//", "//me:p%40ss@") + "?api-version=2026-01-01", default_model="m")
    assert asyncio.run(backend.generate("p")).response == expected("p")
    assert up.headers[-1]["authorization"] == "Basic bWU6cEBzcw==" and backend.identity.endswith("/v1?api-version=2026-01-01")
    with pytest.raises(ConfigError, match="one"): OpenAIBackend("http://me:pw@u", KEY)


@pytest.mark.parametrize("said", ["sk-abcd...wxyz", f"x{KEY}y", f"{KEY[:6]}••••{KEY[-5:]}", f"{KEY[4:12]} {KEY[12:]}", "hf_abcdefghij0123"])
def test_what_looks_like_a_key_is_veiled(said: str) -> None:
    shown = veil(said, [KEY, "sk-abcd0123wxyz"], [])
    assert not any(KEY[at : at + 4] in shown for at in range(len(KEY) - 3)) and "abcd" not in shown and "wxyz" not in shown


def test_what_is_private_is_hidden_where_a_key_crosses_it() -> None:
    assert veil("bad: a very private prompt!", ["sk-very-secret"], ["a very private prompt"]) == "bad: [prompt][key][prompt]!"
    assert veil("bad: my sk-live-12345678 is lost", [], ["my sk-live-12345678 is lost"]) == "bad: [prompt][key][prompt]"
    assert "lost" not in veil(f"bad: {KEY} is lost, {KEY[:9]}", [KEY], [f"{KEY} is lost"])


def test_keys_of_others_are_veiled_too() -> None:
    assert veil("key sk-live-12345678 or ab***yz of project p", [], []) == "key [key] or [key] of project p"


@pytest.mark.timed
def test_a_veil_leaves_what_is_useful() -> None:
    said = "The model `gpt-9` does not exist or you do not have access to it."
    assert veil(said, [KEY, "x", ""], ["", "it", "Why?"]) == said
    start = time.perf_counter()
    veil("a" * 5000, [KEY], ["a" * 15 + "b" + "a" * 1_000_000])
    assert time.perf_counter() - start < 5


# Loops, cancellation, many at once


def test_many_at_once_get_their_own_answers(up: Upstream) -> None:
    up.slow(0.02)
    async def many(backend: OpenAIBackend) -> list[Answer]:
        return await asyncio.gather(*(backend.generate(f"p{at}") for at in range(300)))
    answers = play(up, many)
    assert [answer.response for answer in answers] == [expected(f"p{at}") for at in range(300)]
    assert 20 < up.calls()["most_open"] <= 256 and up.calls()["chat"] == 300


def test_one_backend_in_loops_one_after_another_and_in_threads(up: Upstream) -> None:
    backend = OpenAIBackend(up.url, KEY, "m")
    async def few(name: str) -> list[str]:
        return [answer.response for answer in await asyncio.gather(*(backend.generate(f"{name}{at}") for at in range(5)))]
    for name in "ab":
        assert asyncio.run(few(name)) == [expected(f"{name}{at}") for at in range(5)]
    async def threads() -> list[list[str]]:
        return await asyncio.gather(*(asyncio.to_thread(asyncio.run, few(name)) for name in "cdef"), few("g"))
    assert asyncio.run(threads()) == [[expected(f"{name}{at}") for at in range(5)] for name in "cdefg"]
    gc.collect()  # A connection left open would warn here, and warnings are errors
    assert not backend._line._clients._open or all(loop.is_closed() for loop in backend._line._clients._open)


def test_a_loop_that_ends_closes_its_connections(up: Upstream) -> None:
    backend, held = OpenAIBackend(up.url, KEY, "m"), []
    async def once() -> None:
        await backend.generate("p")
        held.append(await backend._line._clients.here())
        assert not held[0].is_closed
    asyncio.run(once())
    assert held[0].is_closed


@pytest.mark.filterwarnings("ignore:asynchronous generator")
def test_a_loop_that_goes_on_after_its_end(up: Upstream) -> None:
    backend, loop = OpenAIBackend(up.url, KEY, "m"), asyncio.new_event_loop()
    for _ in range(2):
        assert loop.run_until_complete(backend.generate("p")).response == expected("p")
        loop.run_until_complete(loop.shutdown_asyncgens())
    loop.run_until_complete(backend.aclose())
    loop.close()


@pytest.mark.timed
def test_cancelling_ends_the_waiting_and_leaves_the_backend_well(up: Upstream) -> None:
    up.fault("hang", times=3)
    async def cancel(backend: OpenAIBackend) -> str:
        tasks = [asyncio.create_task(backend.generate(f"h{at}")) for at in range(3)]
        while up.counts["chat"] < 3: await asyncio.sleep(0.01)
        for task in tasks: task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        return (await backend.generate("p")).response
    start = time.monotonic()
    assert play(up, cancel) == expected("p") and time.monotonic() - start < 5


def test_cancelling_during_a_pause(up: Upstream) -> None:
    up.fault("429", times=9, retry_after=50)
    async def cancel(backend: OpenAIBackend) -> None:
        with pytest.raises(TimeoutError): await asyncio.wait_for(backend.generate("p"), 0.3)
    play(up, cancel)
    assert up.calls()["chat"] == 1


def test_nothing_is_opened_before_it_is_used() -> None:
    backend = OpenAIBackend("http://u")
    assert not backend._line._clients._open
    asyncio.run(backend.aclose())


# Functions of users


def test_a_function_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_llm.py").write_text(
        "class Bot:\n    def __init__(self, sign): self.sign = sign\n    def ask(self, prompt): return prompt + self.sign\n"
        "    @staticmethod\n    def fixed(prompt): return 'fixed'\n"
        "bot = Bot('!')\nnumber = 7\nasync def later(prompt, temperature=1.0): return f'{prompt} {temperature}'\n"
    )
    (tmp_path / "mine_broken.py").write_text("raise RuntimeError('no weights')\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    for spec, says in {"mine_llm:bot.ask": "hi!", "mine_llm:Bot.fixed": "fixed", " mine_llm:later ": "hi 1.0"}.items():
        backend = FunctionBackend(spec)
        assert asyncio.run(backend.generate("hi")).response == says and backend.identity == f"function:{spec.strip()}"
    wrong = {"mine_llm": "module:function", "mine_llm:": "module:function", ":f": "module:function", "a b:c": "module:function",
             "": "module:function", "mine_llm:nothing": "no 'nothing'", "mine_llm:bot.nothing": "no 'nothing'", "mine_llm:number": "int",
             "mine_llm:Bot.ask": "instance", "mine_llm2:f": "mine_llm2", "mine_broken:f": "no weights"}
    for spec, why in wrong.items():
        with pytest.raises(ConfigError, match=why): load(spec)


def test_a_function_gets_what_it_takes_and_no_parameter_is_dropped() -> None:
    def plain(prompt: str) -> str: return prompt
    def modelled(prompt: str, *, model: str) -> str: return model
    def with_default(prompt: str, model: str = "own") -> str: return model
    def all_of_it(**params: Any) -> str: return repr(sorted(params))
    def needy(prompt: str, temperature: float) -> str: return str(temperature)
    def run(function: Any, *args: Any, **params: Any) -> Answer: return asyncio.run(FunctionBackend(function).generate(*args, **params))
    assert run(plain, "p", "", "gpt-5").model.endswith("plain"), "it was not told of the model, so it is not reported under it"
    assert run(modelled, "p", "", "gpt-5") == Answer("gpt-5", "gpt-5")
    assert run(with_default, "p") == Answer("own", "own") and run(with_default, "p", "", "x").response == "x"
    assert run(all_of_it, "p", "c", "m", top_p=1).response == "['context', 'model', 'prompt', 'top_p']"
    assert run(needy, "p", temperature=0.5).response == "0.5"
    refusals: list[tuple[Any, str, dict[str, Any], str]] = [
        (plain, "", {"temperature": 1}, "'temperature'"), (plain, "context!", {}, "'context'"), (needy, "", {}, "'temperature'"),
    ]
    for function, context, params, named in refusals:
        with pytest.raises(BackendRefusedError, match=named) as refused: run(function, "p", context, **params)
        assert refused.value.status == 400
    def neither(question: str) -> str: return question
    with pytest.raises(ConfigError, match="prompt"): FunctionBackend(neither)


def test_replies_of_functions() -> None:
    replies: list[Any] = [
        "text", {"response": "r", "model": "m2", "usage": {"total_tokens": 1}, "finish_reason": "length", "mood": 1}, Answer("a", "b"),
        None, 7, {"answer": "x"}, {"response": 7}, b"bytes", (word for word in ["a"]),
    ]
    def run(reply: Any) -> Answer:
        def fn(prompt: str) -> Any: return reply
        return asyncio.run(FunctionBackend(fn).generate("p"))
    assert run(replies[0]).response == "text"
    told = run(replies[1])
    assert (told.response, told.model, told.usage, told.complete, told.extra) == ("r", "m2", {"total_tokens": 1}, False, {"mood": 1})
    assert run(replies[2]) == Answer("a", "b")
    for reply in replies[3:]:
        with pytest.raises(BackendAnswerError): run(reply)


@pytest.mark.parametrize("reply", [
    {"response": "x", "raw": object()}, {"response": "x", "usage": object()}, {"response": "x", "usage": "many"}, {"response": "x", "finish_reason": ["a"]},
    {"response": "x", "model": 5}, {"response": "x", "raw": "\ud83d"}, {"response": "x", None: 1}, Answer(7, "m"), Answer("x", "m", usage={"total_tokens": object()}),  # type: ignore[arg-type, dict-item]
])  # fmt: skip
def test_what_a_function_tells_has_a_json_form(reply: Any) -> None:
    async def fn(prompt: str) -> Any: return reply
    with pytest.raises(BackendAnswerError, match="fn returned"): asyncio.run(FunctionBackend(fn).generate("p"))


def test_a_function_may_tell_what_json_can_say() -> None:
    class Markup(str): pass
    told = {"usage": {"total_tokens": 1, "details": {"cached": 2}}, "scores": (1, 2.5, None), "big": 2**70}
    async def fn(prompt: str) -> Any: return {"response": Markup("cut \ud83d"), **told}
    answer = asyncio.run(FunctionBackend(fn).generate("p"))
    assert answer.response == "cut \ufffd" and type(answer.response) is str
    assert answer.usage == told["usage"] and answer.extra == {"scores": told["scores"], "big": told["big"]}


@pytest.mark.parametrize("way", ["sync", "async"])
def test_neither_the_prompt_nor_a_key_is_in_a_functions_failure(way: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    def words(*parts: Any) -> str: return f"401 Incorrect API key provided: {KEY}; {parts!r} is more than gpt-9 takes"
    def ask(prompt: str, context: str, model: str, stop: Any) -> str: raise PermissionError(words(prompt, context, stop))
    async def ask_later(prompt: str, context: str, model: str, stop: Any) -> str: raise PermissionError(words(prompt, context, stop))
    def embed(texts: list[str]) -> Any: raise PermissionError(words(texts))
    async def embed_one(text: str) -> Any: raise PermissionError(words(text))
    private = {"context": "You are the physician on duty.", "stop": [{"at": "Sincerely, the physician"}]}
    with pytest.raises(BackendError) as failed: asyncio.run(FunctionBackend(ask if way == "sync" else ask_later).generate(PROMPT, model="gpt-9", **private))
    with pytest.raises(BackendError) as embedded: asyncio.run(FunctionBackend(embed if way == "sync" else embed_one).embed([PROMPT, "a private text"]))
    for error in (failed.value, embedded.value):
        assert "PermissionError" in str(error) and "gpt-9" in str(error) and isinstance(error.__cause__, PermissionError)
        for hidden in (KEY[:8], KEY[-4:], "patient", "diagnosis", "physician", "private"): assert hidden not in str(error) + caplog.text


@pytest.mark.timed
@pytest.mark.parametrize("way", ["async", "sync", "text", "hidden"])
def test_a_function_has_a_time_limit(way: str) -> None:
    free = threading.Event()
    async def later(prompt: str) -> str: return str(await asyncio.sleep(30))
    def sync(prompt: str) -> str: return str(free.wait(30))
    def hidden(prompt: str) -> Any: return later(prompt)
    async def one(text: str) -> Any: await asyncio.sleep(0.15)
    backend = FunctionBackend({"async": later, "sync": sync, "text": one, "hidden": hidden}[way], threads=2, timeout=0.4)
    start = time.monotonic()
    with pytest.raises(BackendTimeoutError, match=r"did not answer within 0\.4 s"):
        asyncio.run(backend.embed(["t"] * 20) if way == "text" else backend.generate("p"))
    assert time.monotonic() - start < 5
    free.set()


def test_a_time_out_of_the_functions_own_is_its_failure() -> None:
    async def fn(prompt: str) -> str: raise TimeoutError("the database")
    with pytest.raises(BackendError, match="TimeoutError: the database") as failed: asyncio.run(FunctionBackend(fn, timeout=10).generate("p"))
    assert not isinstance(failed.value, BackendTimeoutError)


def test_a_function_that_hangs_does_not_keep_the_process() -> None:
    code = ("import asyncio, time\nfrom aurea_orchestrator.backends.base import FunctionBackend\n"
            "def fn(prompt): time.sleep(1000)\nasyncio.run(FunctionBackend(fn, timeout=0.2).generate('p'))")
    where = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=where, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "BackendTimeoutError" in done.stderr


def test_threads_are_bounded_used_again_and_free_when_their_function_is() -> None:
    ran: list[str] = []
    gate = threading.Event()
    def fn(prompt: str) -> str:
        if prompt == "hang": gate.wait(30)
        ran.append(prompt)
        return threading.current_thread().name
    async def run() -> None:
        backend = FunctionBackend(fn, threads=2)
        for _ in range(20): await backend.generate("p")
        assert backend._call._pool.count <= 2
        backend._call.timeout = 0.2
        hung = await asyncio.gather(*(backend.generate("hang") for _ in range(2)), return_exceptions=True)
        left = await asyncio.gather(backend.generate("left"), return_exceptions=True)  # No thread is free, and it is not called later either
        assert all(isinstance(error, BackendTimeoutError) for error in (*hung, *left))
        gate.set()
        backend._call.timeout = 10
        assert (await backend.generate("q")).response and backend._call._pool.count == 2 and "left" not in ran
    asyncio.run(run())


@pytest.mark.parametrize("kind", [ValueError, StopIteration, KeyError, SystemExit, TimeoutError])
@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_functions_failure_has_its_type_and_message(kind: type[BaseException], way: str) -> None:
    error = kind("bad luck")
    def sync(prompt: str) -> str: raise error
    async def later(prompt: str) -> str: raise error
    async def run() -> None:
        await asyncio.wait_for(FunctionBackend(sync if way == "sync" else later).generate("p"), 10)
    with pytest.raises(BackendError, match=kind.__name__) as failed: asyncio.run(run())
    assert failed.value.__cause__ is not None and (kind is StopIteration or "bad luck" in str(failed.value))


def test_a_functions_own_backend_error_keeps_its_name() -> None:
    async def limited(prompt: str) -> str: raise BackendRefusedError("slow down", 429, 3.0)
    with pytest.raises(BackendRefusedError) as refused: asyncio.run(FunctionBackend(limited).generate("p"))
    assert refused.value.retry_after == 3.0


def test_plain_functions_run_beside_each_other_and_off_the_shared_threads() -> None:
    together = threading.Barrier(20)
    def slow(prompt: str) -> str:
        together.wait(10)
        return threading.current_thread().name
    async def run() -> list[Answer]:
        backend = FunctionBackend(slow)
        try: return await asyncio.gather(*(backend.generate(str(at)) for at in range(20)))
        finally: await backend.aclose()
    assert all(answer.response.startswith("aurea-function") for answer in asyncio.run(run()))


def test_context_variables_reach_a_plain_function() -> None:
    from contextvars import ContextVar
    who: ContextVar[str] = ContextVar("who")
    def fn(prompt: str) -> str: return who.get()
    async def run() -> str:
        who.set("me")
        return (await FunctionBackend(fn).generate("p")).response
    assert asyncio.run(run()) == "me"


def test_vectors_of_functions() -> None:
    def run(reply: Any, texts: int = 2) -> list[list[float]]:
        def fn(texts: list[str]) -> Any: return reply
        return asyncio.run(FunctionBackend(fn).embed(["t"] * texts)).vectors
    wanted = [[1.0, 2.0], [3.0, 4.0]]
    arrays = np.array(wanted, dtype=np.float16)
    for reply in ([[1, 2], [3, 4]], arrays, list(arrays), [tuple(arrays[0]), [3, 4]], iter(wanted), np.array(wanted, dtype=np.int8)):
        got = run(reply)
        assert got == wanted and all(type(number) is float for vector in got for number in vector)
    wrong: list[Any] = [
        wanted[:1],
        [*wanted, [5, 6]], [[1, 2], [3]], [[], []], [[1, math.inf]] * 2, ["ab", "cd"], "ab", None, 7, np.float64(1),
        np.array(7.0), [None, None], {"a": 1, "b": 2}, [{1: 2}, {3: 4}], np.zeros(2), np.zeros((2, 2, 2)),
        [[1, 2], [3, "4"]], [[1, 2], [3, 1j]],
    ]
    for reply in wrong:
        with pytest.raises(BackendAnswerError): run(reply)
    assert run(None, texts=0) == [], "nothing to embed, nobody asked"


def test_one_failing_text_ends_the_batch() -> None:
    started, ended = [], []
    async def fn(text: str) -> list[float]:
        started.append(text)
        if text == "0": raise ValueError("bad text")
        try: await asyncio.sleep(30)
        finally: ended.append(text)
        return [1.0]
    async def run() -> None:
        backend = FunctionBackend(fn, threads=4)
        with pytest.raises(BackendError, match="bad text"): await backend.embed([str(at) for at in range(10)])
        await asyncio.sleep(0)
        assert len(started) <= 5 and set(ended) == set(started) - {"0"}
    asyncio.run(run())


def test_checked_keeps_what_is_right() -> None:
    assert checked([], 0) == [] and checked([(1, 2)], 1) == [[1.0, 2.0]]
    assert struct.pack("<f", checked(np.array([[0.1]], dtype=np.float32), 1)[0][0]) == struct.pack("<f", 0.1)


# The demo


def test_the_demo_never_pretends() -> None:
    answer = asyncio.run(DemoBackend().generate("p", model="gpt-5"))
    assert answer.model == "demo" and "demo" in answer.response and "LLM_BASE_URL" in answer.response and "not gpt-5" in answer.response
    assert asyncio.run(DemoBackend().embed(["p"], model="text-embedding-3")).model == "demo"


def test_the_demos_answer_differs_where_the_call_differs() -> None:
    long = "word " * 1000
    calls: list[tuple[Any, ...]] = [("p",), ("q",), ("p", "c"), ("p", "", "m"), (long,), (long + "x",), ("\ud800",), ("",)]
    async def run() -> list[str]:
        warm = await DemoBackend().generate("p", temperature=1)
        return [warm.response] + [(await DemoBackend().generate(*call)).response for call in calls]
    answers = asyncio.run(run())
    assert len(set(answers)) == len(answers) and max(map(len, answers)) < 1000


def test_the_demo_is_the_same_in_every_process() -> None:
    code = ("import asyncio; from aurea_orchestrator.backends.demo import *; d = DemoBackend(); "
            "print(asyncio.run(d.generate('p', 'c')), asyncio.run(d.embed(['Grüße', ''])))")
    def run(seed: str) -> str:
        where = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])}
        return subprocess.run([sys.executable, "-c", code], env=where, capture_output=True, text=True, check=True).stdout
    assert run("1") == run("2")


@pytest.mark.parametrize("text", ["", " ", "a", "???", "🐈", "\ud800", "x" * 100_000, "日本語のテキスト", "a\x00b"])
@pytest.mark.parametrize("dimensions", [1, 2, 256, 4096])
def test_lexical_vectors_have_length_one(text: str, dimensions: int) -> None:
    made = lexical(text, dimensions)
    assert len(made) == dimensions and math.isclose(math.hypot(*made), 1, rel_tol=1e-5)


def test_near_texts_are_near_and_others_are_not() -> None:
    def near(a: str, b: str) -> float: return sum(x * y for x, y in zip(lexical(a), lexical(b), strict=True))
    pairs = [("How do I reset my password?", "how can I reset my password"), ("Where is my order?", "Where's my order"),
             ("日本語のテキスト", "日本語のテキストです")]
    strangers = [("How do I reset my password?", "Best pasta"), ("Where is my order?", "Explain quantum optics"), ("日本語", "rain")]
    assert min(near(*pair) for pair in pairs) > 0.6 > 0.35 > max(near(*pair) for pair in strangers)
    assert near("???", "!!!") < 0.99, "texts without words differ too"


@pytest.mark.parametrize("dimensions", [0.5, -1, 4097, "8", True, [8]])
def test_dimensions_that_cannot_be(dimensions: Any) -> None:
    with pytest.raises(BackendRefusedError, match="dimensions"): asyncio.run(DemoBackend().embed(["a"], dimensions=dimensions))


def test_the_demo_can_be_slow() -> None:
    nap = Nap()
    asyncio.run(DemoBackend(delay=3, sleep=nap).generate("p"))
    assert nap.slept == [3]
