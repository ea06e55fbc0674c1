"""The decorators as a data scientist meets them."""
from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import gc
import inspect
import pickle
import subprocess
import sys
import threading
import time
import typing
import warnings

import numpy as np
import pydantic
import pytest

from aurea_orchestrator import Cache, cache_embedding, cache_llm_response, cached, codec, get_cache, replay, use_cache
from aurea_orchestrator.call import Binder
from aurea_orchestrator.effects import drive
from aurea_orchestrator.errors import BatchError, ConfigError, StoreError, UnkeyableError
from aurea_orchestrator.events import Clock
from aurea_orchestrator.facts import digest
from aurea_orchestrator.stores.base import Item
from aurea_orchestrator.stores.memory import MemoryStore


@pytest.fixture(params=["memory", "sqlite"], autouse=True)
def cache(request, tmp_path):
    cache = Cache.from_url("memory://" if request.param == "memory" else f"sqlite:///{tmp_path}/cache.db")
    with use_cache(cache): yield cache
    cache.close()


class Counting:
    "Counts the calls of a function that it makes."

    def __init__(self): self.calls = []
    def __len__(self): return len(self.calls)


@pytest.fixture
def counting(): return Counting()


# ---- what makes two calls the same

def test_positional_keyword_and_default_are_one_call(counting):
    @cache_llm_response
    def ask(prompt, context="", *, model="m"):
        counting.calls.append((prompt, context, model))
        return f"{prompt}/{context}/{model}"
    want = "p//m"
    assert [ask("p"), ask(prompt="p"), ask("p", ""), ask("p", context="", model="m"), ask(model="m", prompt="p")] == [want] * 5
    assert counting.calls == [("p", "", "m")]


@pytest.mark.parametrize("one, other", [
    ((["a", "b"],), (["a:b"],)), ((None,), ("",)), ((1,), ("1",)), ((1,), (1.0,)), ((1,), (True,)), (("a", "b"), ("ab", "")), (([1, 2],), ((1, 2),)), (({"a": 1},), ({"a": 2},)),
])  # fmt: skip
def test_different_calls_do_not_share(counting, one, other):
    @cache_llm_response
    def ask(a, b=0): counting.calls.append(1); return [repr(a), repr(b)]
    assert ask(*one) != ask(*other)
    assert len(counting) == 2


def test_every_parameter_counts(counting):
    @cache_llm_response
    def ask(prompt, **options): counting.calls.append(options); return dict(options)
    variants = [{}, {"temperature": 0.0}, {"temperature": 0}, {"user": "u", "stop": "s"}, {"user": "ustop: s"}, {"sample": 1}, {"sample": 2}]
    for _ in range(2):
        assert [ask("p", **v) for v in variants] == variants
    assert len(counting) == len(variants)
    assert ask("p", stop="s", user="u") == {"user": "u", "stop": "s"}
    assert len(counting) == len(variants)


def test_two_functions_do_not_share(counting):
    @cache_llm_response
    def formal(prompt): return "Good day."
    @cache_llm_response
    def casual(prompt): return "Hi."
    assert (formal("hello"), casual("hello"), formal("hello")) == ("Good day.", "Hi.", "Good day.")


def test_namespaces_are_walls(counting, cache):
    def ask(prompt): counting.calls.append(1); return len(counting)
    one, two = cache_llm_response(namespace="team-a")(ask), cache_llm_response(namespace="team-b")(ask)
    assert (one("p"), two("p"), one("p"), two("p")) == (1, 2, 1, 2)
    assert one.key("p").startswith("llm:team-a:")
    assert cache.clear(namespace="team-a") == 1
    assert (one("p"), two("p")) == (3, 2)


def test_a_version_forgets(counting):
    def ask(prompt): counting.calls.append(1); return len(counting)
    assert [cache_llm_response(version=v)(ask)("p") for v in ("1", "1", "2", "1")] == [1, 1, 2, 1]


def test_ignore(counting):
    @cache_llm_response(ignore=("client",))
    def ask(prompt, client=None): counting.calls.append(1); return "a"
    assert ask("p", client=object()) == ask("p", object()) == ask("p")
    assert len(counting) == 1


def test_what_has_no_key_is_refused_with_the_cure(counting):
    @cache_llm_response
    def ask(prompt, client=None): counting.calls.append(1)
    with pytest.raises(UnkeyableError, match=r"client.*ignore=\(\"client\",\)") as caught: ask("secret prompt", client=object())
    assert isinstance(caught.value, TypeError) and "secret prompt" not in str(caught.value)
    assert not counting.calls


def test_wrong_calls_raise_what_the_function_would(counting):
    @cache_llm_response
    def ask(prompt): return prompt
    with pytest.raises(TypeError, match=r"ask\(\) missing 1 required positional argument: 'prompt'"): ask()
    with pytest.raises(TypeError, match="unexpected keyword argument 'promt'"): ask("p", promt=1)


# ---- it stays the function it was

def test_it_looks_like_the_function():
    @cache_llm_response
    def ask(prompt: str, n: int = 1) -> str:
        "Ask."
        return prompt
    @cache_llm_response
    async def aask(prompt: str) -> str: return prompt
    @cache_llm_response
    def stream(prompt: str): yield prompt
    @cache_llm_response
    async def astream(prompt: str): yield prompt
    assert (ask.__name__, ask.__doc__, ask.__module__) == ("ask", "Ask.", __name__)
    assert str(inspect.signature(ask)) == "(prompt: 'str', n: 'int' = 1) -> 'str'"
    assert typing.get_type_hints(ask) == {"prompt": str, "n": int, "return": str}
    assert callable(ask) and ask.__wrapped__("x") == "x"
    assert inspect.iscoroutinefunction(aask) and not inspect.iscoroutinefunction(ask)
    assert inspect.isgeneratorfunction(stream) and inspect.isasyncgenfunction(astream)


@cache_llm_response
def module_level(prompt): return prompt


def test_it_pickles_by_name(): assert pickle.loads(pickle.dumps(module_level)) is module_level


def test_methods(counting):
    class Agent:
        def __init__(self, model): self.model = model
        @cache_llm_response
        def ask(self, prompt): counting.calls.append(1); return f"{self.model}:{prompt}"
        @cache_llm_response
        async def aask(self, prompt): counting.calls.append(1); return f"{self.model}:{prompt}"
        @cache_llm_response
        def stream(self, prompt): counting.calls.append(1); yield from (self.model, prompt)
        @classmethod
        @cache_llm_response
        def make(cls, prompt): counting.calls.append(1); return f"{cls.__name__}:{prompt}"
        @staticmethod
        @cache_llm_response
        def plain(prompt): counting.calls.append(1); return prompt
        @cache_llm_response
        @classmethod
        def outer(cls, prompt): counting.calls.append(1); return f"outer {cls.__name__}:{prompt}"
    small, large = Agent("small"), Agent("large")
    for _ in range(2):
        assert (small.ask("p"), large.ask("p"), Agent("small").ask(prompt="p")) == ("small:p", "large:p", "small:p")
        assert asyncio.run(small.aask("p")) == "small:p"
        assert list(small.stream("p")) == ["small", "p"]
        assert (Agent.make("p"), small.plain("p"), Agent.plain("p"), small.outer("p")) == ("Agent:p", "p", "p", "outer Agent:p")
    assert len(counting) == 7
    assert inspect.iscoroutinefunction(small.aask)
    assert str(inspect.signature(small.ask)) == "(prompt)"
    assert small.ask.key("p") == Agent("small").ask.key(prompt="p") != large.ask.key("p")
    assert small.ask.invalidate("p") == 1 and small.ask.refresh("p") == "small:p"
    assert small.ask.cache_info().misses == 2


def test_functions_from_a_factory_do_not_share(counting):
    def make(model):
        @cache_llm_response
        def ask(prompt): counting.calls.append(1); return f"{model}:{prompt}"
        return ask
    assert (make("small")("p"), make("large")("p"), make("small")("p")) == ("small:p", "large:p", "small:p")
    assert len(counting) == 2


# ---- the verbs

def test_bypass_computes_and_stores(counting):
    @cache_llm_response
    def ask(prompt): counting.calls.append(1); return len(counting)
    assert (ask("p"), ask("p"), ask("p", bypass_cache=True), ask("p"), ask("p", bypass_cache=False)) == (1, 1, 2, 2, 2)
    info = ask.cache_info()
    assert (info.hits, info.misses, info.outcomes["bypass"]) == (3, 1, 1)


def test_a_declared_bypass_is_seen_and_no_part_of_the_key(counting):
    @cache_llm_response
    def ask(prompt, bypass_cache=False): counting.calls.append(bypass_cache); return len(counting)
    assert (ask("p"), ask("p", True), ask("p"), ask("p", bypass_cache=True), ask("p")) == (1, 2, 2, 3, 3)
    assert counting.calls == [False, True, True]
    assert ask.key("p") == ask.key("p", True)


def test_verbs(counting, cache):
    @cache_llm_response
    def ask(prompt): counting.calls.append(1); return len(counting)
    @cache_llm_response
    def other(prompt): return "other"
    ask("p"), ask("q"), other("p")
    assert ask.invalidate("p") == 1 and ask.invalidate("p") == 0
    assert ask("p") == 3 and ask.refresh(prompt="q") == 4 and ask("q") == 4
    assert ask.cache_clear() == 2
    assert (ask("p"), ask("q")) == (5, 6)
    before = cache.stats()["llm"]["misses"]
    other("p")
    assert cache.stats()["llm"]["misses"] == before  # `cache_clear` left the other function alone


async def test_async_verbs(counting):
    @cache_llm_response
    async def ask(prompt): counting.calls.append(1); return len(counting)
    assert [await ask("p"), await ask("p"), await ask("p", bypass_cache=True), await ask.refresh("p")] == [1, 1, 2, 3]
    assert await ask.invalidate("p") == 1 and await ask("p") == 4 and await ask.cache_clear() == 1
    assert ask.key("p").startswith("llm:") and ask.cache_info().hits == 1


def test_ttl_and_default_cache(counting, tmp_path):
    @cache_llm_response(ttl=1.5)
    def ask(prompt): counting.calls.append(1); return len(counting)
    assert (ask("p"), ask("p")) == (1, 1)
    time.sleep(1.6)
    assert ask("p") == 2
    own = Cache.from_url("memory://")
    mine = cached("mine", cache=own)(lambda x: x)
    mine(1)
    assert own.stats()["mine"] == {"hits": 0, "misses": 1}
    with use_cache(own): assert get_cache() is own
    assert get_cache() is not own


@pytest.mark.parametrize("options", [{"ttl": 0}, {"ttl": -1}, {"ttl": "1h"}, {"ttl": True}, {"stale": -1}, {"namespace": "a:b"}, {"namespace": ""}, {"ignore": ("nope",)}, {"tll": 5}])
def test_options_that_cannot_work_are_refused_at_decoration(options):
    with pytest.raises(ConfigError): cache_llm_response(**options)(lambda prompt: prompt)


def test_misuse_is_explained():
    with pytest.raises(ConfigError, match="needs a kind"): cached(lambda x: x)
    with pytest.raises(ConfigError, match="cannot be cached"): cache_llm_response(5)


def test_stale_is_served_while_refreshed_and_on_error(counting):
    fail = []
    @cache_llm_response(ttl=0.2, stale=30)
    def ask(prompt):
        counting.calls.append(1)
        if fail: raise RuntimeError("upstream down")
        return len(counting)
    assert ask("p") == 1
    time.sleep(0.3)
    fail.append(1)
    assert ask("p") == 1 and ask("p") == 1  # the refresh fails in the background; the old answer is served
    deadline = time.monotonic() + 5
    while len(counting) < 2 and time.monotonic() < deadline: time.sleep(0.01)
    fail.clear()
    while ask("p") == 1 and time.monotonic() < deadline: time.sleep(0.02)
    assert ask("p") > 1
    assert ask.cache_info().outcomes["stale"] >= 2


# ---- values

@dataclasses.dataclass(frozen=True)
class Point:
    x: int
    tags: tuple = ()


class Model(pydantic.BaseModel):
    name: str
    at: dt.datetime
    inner: dict[str, list[int]] = {}


VALUES = [
    {"a": [1, 2.5, None, True, "ü"], "b": {}}, b"\x00\xff", "", None, 2**70, (1, (2,)), {1, 2}, dt.datetime(2026, 1, 1, tzinfo=dt.UTC), dt.datetime(2026, 1, 1),
    dt.date(2026, 1, 1), dt.timedelta(1), Point(1, ("a",)), [Point(2)], Model(name="n", at=dt.datetime(2026, 1, 1), inner={"a": [1]}), [0.1, 0.2, 0.30000000000000004],
    np.arange(6, dtype=np.float32).reshape(2, 3), np.array(5), np.float64(2.5), np.array(["a", "bc"]), float("inf"),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=[type(v).__name__ + str(i) for i, v in enumerate(VALUES)])
def test_values_come_back_equal_and_of_the_same_type(value, counting):
    @cached("value")
    def get(n): counting.calls.append(1); return value
    get(1)
    again = get(1)
    assert len(counting) == 1 and type(again) is type(value)
    if isinstance(value, np.ndarray):
        assert again.dtype == value.dtype and np.array_equal(again, value)
        again.flat[0] = again.flat[0]  # writable
    else:
        assert again == value


def test_openai_objects_come_back(counting):
    from openai.types.chat import ChatCompletion
    message = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}
    completion = ChatCompletion.model_validate({"id": "i", "object": "chat.completion", "created": 1, "model": "m", "choices": [{"index": 0, "finish_reason": "tool_calls", "message": message}]})
    @cache_llm_response
    def ask(prompt): counting.calls.append(1); return completion
    ask("p")
    again = ask("p")
    assert again == completion and type(again) is ChatCompletion and again is not completion and len(counting) == 1
    assert type(again.choices[0].message.tool_calls[0]) is type(completion.choices[0].message.tool_calls[0])


def test_no_two_callers_hold_one_object(counting):
    @cache_llm_response
    def ask(prompt): return {"answer": [1]}
    first, second, third = ask("p"), ask("p"), ask("p")
    first["answer"].append(2), second["answer"].append(3)
    assert third == {"answer": [1]} == ask("p")


def test_what_cannot_be_stored_is_returned_and_warned_about_once(counting):
    @cache_llm_response
    def ask(prompt): counting.calls.append(1); return threading.Lock()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        values = [ask("a secret prompt") for _ in range(3)]
    assert len(values) == len(counting) == 3 and len(said) == 1
    assert "ask" in str(said[0].message) and "lock" in str(said[0].message) and "secret" not in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        @cache_llm_response
        def again(prompt): return threading.Lock()
        assert again("p") is not None  # a filter that raises does not fail the call


def test_errors_are_not_remembered(counting):
    @cache_llm_response
    def ask(prompt):
        counting.calls.append(1)
        if len(counting) == 1: raise ValueError("first")
        return "second"
    with pytest.raises(ValueError, match="first"): ask("p")
    assert ask("p") == "second"
    info = ask.cache_info()
    assert (info.hits, info.misses, info.outcomes["error"]) == (0, 2, 1)


def test_a_damaged_entry_is_a_miss_and_is_replaced(counting, cache):
    @cache_llm_response
    def ask(prompt): counting.calls.append(1); return "answer"
    ask("p")
    key = ask.key("p")
    (blob,) = drive(cache.store.get_many([key]))
    for damaged in (b"", b"foreign", blob[:-1], blob[:20], blob[:-5] + bytes([blob[-5] ^ 1]) + blob[-4:]):
        drive(cache.store.put_many([Item(key, damaged, 60)]))
        before = len(counting)
        if cache.store.name != "memory":  # what is in this process's own memory is not checked again
            assert (ask("p"), ask("p")) == ("answer", "answer") and len(counting) == before + 1


def test_an_entry_under_another_key_is_not_believed(counting, cache):
    @cache_llm_response
    def ask(prompt): return prompt
    ask("one")
    (blob,) = drive(cache.store.get_many([ask.key("one")]))
    drive(cache.store.put_many([Item(ask.key("two"), blob, 60)]))
    if cache.store.name != "memory": assert ask("two") == "two"


# ---- lists of texts

def test_lists_of_texts(counting):
    @cache_embedding
    def embed(texts, model="m"):
        counting.calls.append(list(texts))
        return [[float(len(t)), float(ord(t[0]))] for t in texts]
    want = lambda texts: [[float(len(t)), float(ord(t[0]))] for t in texts]
    for texts in (["a", "bb"], ["bb", "c", "a", "c", "dd"], ["dd", "c", "bb", "a"], [], ["c"]):
        assert embed(texts) == want(texts)
    assert counting.calls == [["a", "bb"], ["c", "dd"]]
    assert embed(("a", "bb"), model="n") == want(["a", "bb"]) and len(counting) == 3
    assert embed(texts=["a"]) == want(["a"]) and len(counting) == 3
    info = embed.cache_info()
    assert (info.hits, info.misses) == (3 + 4 + 1 + 1, 2 + 2 + 2)
    assert embed.key(["a", "b"]) == [*embed.key(["a"]), *embed.key(["b"])]
    assert embed.invalidate(["a", "bb", "never"]) == 2
    assert embed(["a"]) == want(["a"]) and len(counting) == 4


@pytest.mark.parametrize("make", [list, tuple, np.array, lambda rows: [np.array(r, dtype=np.float32) for r in rows]], ids=["list", "tuple", "array", "arrays"])
def test_the_shape_of_a_batch_is_kept(make, counting):
    @cache_embedding
    def embed(texts): counting.calls.append(list(texts)); return make([[float(len(t)), 1.0] for t in texts])
    for texts in (["a", "bb"], ["bb", "ccc", "a"], ["ccc", "a"]):
        got, plain = embed(texts), make([[float(len(t)), 1.0] for t in texts])
        assert type(got) is type(plain) and np.array_equal(np.array(got), np.array(plain))
        if isinstance(got, list): assert {type(row) for row in got} == {type(row) for row in plain}
        if isinstance(got, np.ndarray): assert got.dtype == plain.dtype
    assert counting.calls == [["a", "bb"], ["ccc"]]


@pytest.mark.parametrize("wrong", [
    lambda n: [[1.0]] * (n - 1), lambda n: [[1.0]] * (n + 1), lambda n: [], lambda n: None, lambda n: 5.0, lambda n: [1.0] * n, lambda n: "x" * n, lambda n: b"x" * n,
    lambda n: {str(i): [1.0] for i in range(n)}, lambda n: np.ones(n), lambda n: ["x"] * n, lambda n: [[1.0]] * (n - 1) + [None],
])  # fmt: skip
def test_counts_are_checked_and_nothing_is_stored(wrong, counting):
    state = {"wrong": True}
    @cache_embedding
    def embed(texts): counting.calls.append(1); return wrong(len(texts)) if state["wrong"] else [[1.0]] * len(texts)
    with pytest.raises(BatchError, match="embed"): embed(["a", "b"])
    state["wrong"] = False
    assert embed(["a", "b"]) == [[1.0], [1.0]] and len(counting) == 2


ROWS = {
    "array": lambda n: np.arange(n * 4, dtype=np.float32).reshape(n, 4),
    "big-endian": lambda n: np.arange(n * 4, dtype=">f8").reshape(n, 4),
    "matrices": lambda n: np.arange(n * 6, dtype=np.int16).reshape(n, 2, 3),
    "times": lambda n: np.arange(n * 2).astype("datetime64[s]").reshape(n, 2),
    "arrays": lambda n: [np.arange(i, i + 4, dtype=np.float16) for i in range(n)],
    "dtypes": lambda n: [np.arange(4, dtype=dtype) for dtype in ("f4", "f8", "i2")[:n]],
    "lengths": lambda n: tuple(np.arange(2.0 + i) for i in range(n)),
    "lists": lambda n: [[float(i), 0.5] * 20 for i in range(n)],
}  # fmt: skip


@pytest.mark.parametrize("make", ROWS.values(), ids=ROWS.keys())
def test_the_rows_of_a_batch_are_exact_and_nobody_elses(make, counting):
    @cache_embedding
    def embed(texts): counting.calls.append(1); return make(len(texts))
    want = make(3)
    for _ in range(3):
        got = embed(["a", "b", "c"])
        assert type(got) is type(want) and len(got) == 3 and len(counting) == 1
        for row, plain in zip(got, want, strict=True):
            assert type(row) is type(plain) and np.array_equal(row, plain)
            if isinstance(row, np.ndarray):
                assert row.dtype == plain.dtype and row.dtype.str == plain.dtype.str and row.flags.writeable
                assert isinstance(got, np.ndarray) or row.base is None   # who keeps one row of a list keeps no more than that
            row[0] = row[1]                                              # it is the caller's own
    twice = embed(["b", "b"])
    twice[0][0] = twice[0][1]
    assert np.array_equal(twice[1], want[1]) and len(counting) == 1


@pytest.mark.parametrize("make", [ROWS["array"], ROWS["lists"]], ids=["array", "lists"])
def test_one_damaged_row_is_one_miss(make, counting, cache):
    @cache_embedding
    def embed(texts): counting.calls.append(texts); return make(3)[[ord(t) - 97 for t in texts]] if make is ROWS["array"] else [make(3)[ord(t) - 97] for t in texts]
    keys, want = embed.key(["a", "b", "c"]), embed(["a", "b", "c"])
    (blob,), (other,) = (drive(cache.store.get_many([key])) for key in (keys[1], keys[2]))
    for damaged in (b"", b"foreign", blob[:-1], blob[:20], blob[:-5] + bytes([blob[-5] ^ 1]) + blob[-4:], other):
        drive(cache.store.put_many([Item(keys[1], damaged, 60)]))
        before = len(counting), embed.cache_info().misses
        assert np.array_equal(embed(["a", "b", "c"]), want) and np.array_equal(embed(["c", "b"]), [want[2], want[1]])
        assert counting.calls[before[0]:] == [["b"]] and embed.cache_info().misses == before[1] + 1


def test_no_texts_are_no_lookup(counting):
    @cache_embedding
    def embed(texts): counting.calls.append(1); return np.ones((len(texts), 2))
    assert embed([]) == [] == embed(()) and not counting.calls and embed.cache_info()[:3] == (0, 0, {})


class Watched(MemoryStore):
    "Knows how often it was looked into; may be away."
    looks, away = 0, False
    def get_many(self, keys):
        self.looks += 1
        if self.away: raise StoreError("away")
        return (yield from super().get_many(keys))


def test_old_rows_are_computed_and_stale_ones_served(counting):
    now = [1000.0]
    cache = Cache(Watched(), clock=Clock(now=lambda: now[0]))
    def embed(texts): counting.calls.append(list(texts)); return np.array([[float(len(t)), now[0]] for t in texts])
    strict, lenient = cache_embedding(cache=cache, ttl=10, version=1)(embed), cache_embedding(cache=cache, ttl=10, stale=100, version=2)(embed)
    for each in (strict, lenient):
        each(["a"])
        now[0] += 5
        assert each(["a", "bb"])[:, 1].tolist() == [now[0] - 5, now[0]]
        now[0] += 7                                                      # "a" is 12 seconds old, "bb" 7
        got = each(["a", "bb"])[:, 1].tolist()
        assert got == ([now[0], now[0] - 7] if each is strict else [now[0] - 12, now[0] - 7])
    assert strict.cache_info().outcomes == {"miss": 3, "hit": 2} and lenient.cache_info().outcomes["stale"] == 1
    deadline = time.monotonic() + 5
    while lenient(["a"])[0, 1] != now[0] and time.monotonic() < deadline: time.sleep(0.01)
    assert lenient(["a", "bb"])[:, 1].tolist() == [now[0], now[0] - 7] and counting.calls[-1] == ["a"]


def test_a_store_is_looked_into_once(counting):
    cache = Cache(Watched())
    @cache_embedding(cache=cache)
    def embed(texts): counting.calls.append(list(texts)); return [[float(len(t))] for t in texts]
    @cache_llm_response(cache=cache)
    def ask(prompt): return prompt
    looks = lambda call: (call(), cache.store.looks, setattr(cache.store, "looks", 0))[1]
    embed(["a", "bb"])
    cache.store.looks = 0
    assert looks(lambda: embed(["a", "bb", "a"])) == 1                   # all of it
    assert looks(lambda: embed(["a", "ccc"])) == 1 + 1                   # a part: what was found is not looked up again, but who computes asks for the lease
    cache.store.away = True
    assert looks(lambda: embed(["a"])) == looks(lambda: ask("p")) == 2 and counting.calls[-1] == ["a"]


def test_single_text_and_first_argument_rules(counting):
    @cache_embedding
    def embed(text): counting.calls.append(text); return np.ones(3, dtype=np.float16) * len(text)
    assert np.array_equal(embed("abc"), embed("abc")) and embed("abc").dtype == np.float16 and len(counting) == 1
    class Embedder:
        def __init__(self, model): self.model = model
        @cache_embedding
        def __call__(self, model, texts): counting.calls.append(texts); return [[float(len(model + self.model + t))] for t in texts]
    assert Embedder("e").__call__("m", ["a", "b"]) == Embedder("e").__call__("m", texts=["a", "b"]) == [[3.0], [3.0]]
    assert counting.calls == ["abc", ["a", "b"]]


async def test_async_batches(counting):
    @cache_embedding
    async def embed(texts): counting.calls.append(list(texts)); await asyncio.sleep(0.02); return [[float(len(t))] for t in texts]
    batches = [[str(n % 7) * (n % 3 + 1) for n in range(start, start + 5)] for start in range(10)]
    got = await asyncio.gather(*[embed(batch) for batch in batches])
    assert got == [[[float(len(t))] for t in batch] for batch in batches]
    sent = [t for call in counting.calls for t in call]
    assert len(sent) == len(set(sent))  # each distinct text was computed once, however the batches overlapped
    assert embed.cache_info().misses == len(sent)


# ---- streams

def test_streams_are_replayed_item_for_item(counting):
    pieces = ["", "a", "", None, {"b": [1]}, b"x", ""]
    @cache_llm_response
    def stream(prompt):
        counting.calls.append(1)
        yield from pieces
        return {"usage": 3}
    def whole(g):
        got = []
        while True:
            try: got.append(next(g))
            except StopIteration as end: return got, end.value
    assert whole(stream("p")) == whole(stream("p")) == (pieces, {"usage": 3}) and len(counting) == 1


def test_what_is_stored_under_the_key_of_a_stream_and_is_none_is_no_answer(cache, counting):
    @cache_llm_response
    def stream(prompt):
        counting.calls.append(1)
        yield from "abc"
    def put(value):
        key = stream.key("p")
        drive(cache.store.put_many([Item(key, codec.encode(value, born=cache.clock.now(), ttl=60.0, seal=key.encode()), 60.0)]))
    frozen = replay.freeze(None)
    for n, value in enumerate([None, 5, "ab", "hello", ["a", "b"], {"a": 1, "b": 2}, [[b"x"], frozen], [["x"], frozen], [5, frozen], [[], b""], [frozen, frozen], [[], None], [[frozen]]], 1):
        put(value)
        assert list(stream("p")) == ["a", "b", "c"] and len(counting) == n, value
        assert list(stream("p")) == ["a", "b", "c"] and len(counting) == n, value


def test_a_function_that_became_a_stream_is_another(counting):
    def made(source):
        exec(f"@cache_llm_response\ndef ask(prompt): {source}", space := {"cache_llm_response": cache_llm_response, "__name__": "some_module"})
        return space["ask"]
    plain, stream = made("return ['a', 'b']"), made("yield from 'abc'")
    for _ in range(2): assert plain("p") == ["a", "b"] and list(stream("p")) == ["a", "b", "c"]
    assert stream.cache_clear() == 1 and plain.cache_clear() == 1


@pytest.mark.parametrize("first_awaits", [False, True])
def test_a_blocking_and_an_awaited_stream_share_what_is_stored_and_not_a_running_one(first_awaits, counting):
    gate = threading.Event()
    def blocking():
        def ask(prompt):
            counting.calls.append("blocking")
            for word in "abc": yield word; assert gate.wait(20)
        ask.__qualname__ = "ask"
        return cache_llm_response(namespace="bot", version=1)(ask)
    def awaiting():
        async def ask(prompt):
            counting.calls.append("awaiting")
            for word in "abc":
                yield word
                while not gate.is_set(): await asyncio.sleep(0.001)
        ask.__qualname__ = "ask"
        return cache_llm_response(namespace="bot", version=1)(ask)
    one, other, got = blocking(), awaiting(), {}
    def read(): got["blocking"] = []; got["blocking"].extend(one("p"))
    def aread():
        async def all():
            async for word in other("p"): got.setdefault("awaiting", []).append(word)
        asyncio.run(all())
    assert one.key("p") == other.key("p")
    threads = [threading.Thread(target=run) for run in ((aread, read) if first_awaits else (read, aread))]
    for n, thread in enumerate(threads, 1):
        thread.start()
        deadline = time.monotonic() + 20
        while len(counting) < n and time.monotonic() < deadline: time.sleep(0.005)
    gate.set()
    for thread in threads: thread.join(20)
    assert got == {"blocking": ["a", "b", "c"], "awaiting": ["a", "b", "c"]} and sorted(counting.calls) == ["awaiting", "blocking"]
    read()
    aread()
    assert got["blocking"] == ["a", "b", "c"] and got["awaiting"] == ["a", "b", "c"] * 2 and len(counting) == 2


def test_a_stream_keeps_to_the_cache_it_was_asked_of(cache):
    @cache_llm_response
    def stream(prompt): yield from "abc"
    @cache_llm_response
    async def awaited(prompt):
        for item in "abc": yield item
    inner = Cache.from_url("memory://")
    with use_cache(inner):
        begun, asked = stream("1"), stream("2")
        next(begun)
    assert [*begun] == ["b", "c"] and [*asked] == ["a", "b", "c"]
    async def both():
        with use_cache(inner):
            begun, asked = awaited("1"), awaited("2")
            await anext(begun)
        return [item async for item in begun], [item async for item in asked]
    assert asyncio.run(both()) == (["b", "c"], ["a", "b", "c"])
    assert (len(inner.streams), len(cache.streams)) == (0, 0)
    assert (inner.stats()["llm"]["misses"], cache.stats()["llm"]["misses"]) == (4, 0)


def test_to_collect_a_stream_builds_no_cache(cache, monkeypatch):
    @cache_llm_response
    def stream(prompt): yield from "abc"
    begun = stream("p")
    next(begun)
    monkeypatch.setattr("aurea_orchestrator.decorators.get_cache", lambda: pytest.fail("the default cache was asked for"))
    begun.close()
    assert len(cache.streams) == 0


@pytest.mark.parametrize("nature", ["plain", "list"])
def test_one_call_asks_once_which_cache_it_uses(cache, nature, monkeypatch):
    asked = []
    monkeypatch.setattr("aurea_orchestrator.decorators.get_cache", lambda: asked.append(1) or cache)
    ask = (cache_llm_response if nature == "plain" else cache_embedding)(lambda texts: [[1.0]] * len(texts))
    for n, verb in enumerate([ask, ask, ask.explain, ask.refresh, ask.invalidate, ask.invalidate], 1):
        verb(["p", "q"])
        assert len(asked) == n, verb


def test_a_stream_that_is_left_or_fails_is_not_stored(counting):
    closed = []
    @cache_llm_response
    def stream(prompt):
        counting.calls.append(1)
        try:
            yield 1
            yield 2
            if prompt == "fails": raise ValueError("mid-stream")
        finally: closed.append(prompt)
    g = stream("left")
    assert next(g) == 1
    g.close()
    assert closed == ["left"]
    assert list(stream("left")) == [1, 2] and len(counting) == 2
    for n in (3, 4):
        got = []
        with pytest.raises(ValueError, match="mid-stream"):
            for item in stream("fails"): got.append(item)
        assert got == [1, 2] and len(counting) == n


async def test_async_streams_are_shared_while_they_run(counting):
    gate = asyncio.Event()
    @cache_llm_response
    async def stream(prompt):
        counting.calls.append(1)
        yield {"n": 1}
        await gate.wait()
        yield {"n": 2}
    first, second = stream("p"), stream("p")
    one, other = await anext(first), await anext(second)
    assert one == other == {"n": 1} and one is not other
    one["n"] = 99  # a reader who changes an item changes nobody else's
    gate.set()
    assert [i async for i in first] == [i async for i in second] == [{"n": 2}]
    assert [i async for i in stream("p")] == [{"n": 1}, {"n": 2}] and len(counting) == 1
    assert stream.cache_info().outcomes == {"miss": 1, "shared": 1, "hit": 1}


async def test_an_async_stream_that_all_have_left_is_closed(counting):
    closed = []
    @cache_llm_response
    async def stream(prompt):
        try:
            n = 0
            while True: yield n; n += 1
        finally: closed.append(n)
    async for item in stream("p"):
        if item == 3: break
    gc.collect()
    for _ in range(100):
        if closed: break
        await asyncio.sleep(0.01)
    assert closed == [3]


# ---- one computation

def test_threads_share_one_computation(counting):
    @cache_llm_response
    def ask(prompt): counting.calls.append(1); time.sleep(0.2); return {"n": len(counting)}
    got = []
    threads = [threading.Thread(target=lambda: got.append(ask("p"))) for _ in range(20)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert got == [{"n": 1}] * 20 and len(counting) == 1 and len({id(g) for g in got}) == 20
    info = ask.cache_info()
    assert info.hits + info.misses == 20 and info.misses == 1


async def test_tasks_share_one_computation_whoever_leaves(counting):
    @cache_llm_response
    async def ask(prompt): counting.calls.append(1); await asyncio.sleep(0.1); return "a"
    tasks = [asyncio.create_task(ask("p")) for _ in range(50)]
    await asyncio.sleep(0.02)
    for t in tasks[:25]: t.cancel()
    assert await asyncio.gather(*tasks[25:]) == ["a"] * 25 and len(counting) == 1


async def test_when_all_have_left_it_is_cancelled(counting):
    begun, ended = asyncio.Event(), asyncio.Event()
    @cache_llm_response
    async def ask(prompt):
        begun.set()
        try: await asyncio.sleep(30)
        except asyncio.CancelledError: ended.set(); raise
    tasks = [asyncio.create_task(ask("p")) for _ in range(3)]
    await asyncio.wait_for(begun.wait(), 10)
    for t in tasks: t.cancel()
    assert [type(r) for r in await asyncio.gather(*tasks, return_exceptions=True)] == [asyncio.CancelledError] * 3
    await asyncio.wait_for(ended.wait(), 10)


def test_recursion_with_the_same_arguments_does_not_wait_for_itself(counting):
    @cache_llm_response
    def ask(prompt):
        counting.calls.append(1)
        return "deep" if len(counting) == 3 else ask(prompt)
    assert ask("p") == "deep"


def test_two_loops_one_after_the_other(counting):
    @cache_llm_response
    async def ask(prompt): counting.calls.append(1); await asyncio.sleep(0.01); return "a"
    assert [asyncio.run(ask("p")) for _ in range(3)] == ["a"] * 3 and len(counting) == 1


def test_a_leader_whose_loop_ends_does_not_stop_those_who_wait(counting):
    begun = threading.Event()
    @cache_llm_response
    async def ask(prompt):
        counting.calls.append(1)
        begun.set()
        await asyncio.sleep(30 if len(counting) == 1 else 0)
        return "a"
    async def gives_up():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3): await asyncio.shield(asyncio.ensure_future(ask("p")))
    leader = threading.Thread(target=lambda: asyncio.run(gives_up()))
    leader.start()
    begun.wait(5)
    assert asyncio.run(ask("p")) == "a" and len(counting) == 2
    leader.join()


# ---- the cache itself

def test_sums_hold_and_kinds_are_apart(cache, counting):
    @cached("mine")
    def get(n): return n
    @cache_llm_response
    def ask(p): return p
    for n in (1, 2, 1, 1): get(n)
    ask("p")
    stats = cache.stats()
    assert stats["mine"] == {"hits": 2, "misses": 2} and stats["llm"] == {"hits": 0, "misses": 1} and stats["embedding"] == {"hits": 0, "misses": 0}
    assert stats["total"] == {"hits": 2, "misses": 3, "requests": 5, "hit_rate": 40.0}
    assert cache.clear(kind="mine") == 2 and cache.clear() == 1
    assert cache.stats()["total"]["requests"] == 5


def test_disabled(tmp_path, counting):
    with use_cache(Cache.from_url("memory://", enabled=False)) as off:
        @cache_llm_response
        def ask(p): counting.calls.append(1); return p
        @cache_llm_response
        def stream(p): counting.calls.append(1); yield p
        assert [ask("p"), ask("p"), list(stream("p")), list(stream("p"))] == ["p", "p", ["p"], ["p"]] and len(counting) == 4
        assert off.stats()["total"]["requests"] == 0 and off.stats()["outcomes"]["llm"]["bypass"] == 4


SCRIPT = """
import sys
from aurea_orchestrator import cache_llm_response, cache_embedding
calls = []
@cache_llm_response
def ask(prompt, model="m"):
    calls.append(prompt){edit}
    return "answer to " + prompt{body}
@cache_embedding
def embed(texts):
    calls.extend(texts)
    return [[1.5, 2.5] for _ in texts]
for n in range(20): ask("question %d" % n)
embed(["t%d" % n for n in range(10)])
print(len(calls))
"""


def run_script(path, home, edit="", body=""):
    path.write_text(SCRIPT.format(edit=edit, body=body))
    env = {"PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": str(home), "HOME": str(home), "PYTHONHASHSEED": str(abs(hash(edit)) % 1000), "PYTHONPATH": ":".join(sys.path), "CACHE_URL": f"sqlite:///{home}/c.db"}
    return int(subprocess.run([sys.executable, str(path)], env=env, cwd=home, check=True, capture_output=True, text=True).stdout)


def test_the_next_process_hits_and_edits_of_the_code_recompute(tmp_path):
    path = tmp_path / "script.py"
    assert run_script(path, tmp_path) == 30
    assert run_script(path, tmp_path) == 0
    assert run_script(path, tmp_path, edit="  # a comment changes nothing") == 0
    assert run_script(path, tmp_path, body=" + '!'") == 20  # in __main__ the function's source is part of the key


# ---- what is worth storing, and refreshing

@pytest.mark.parametrize("cut", [{"choices": [{"finish_reason": "length", "text": "so f"}]}, {"finish_reason": "content_filter"}, {"stop_reason": "max_tokens"}])
def test_answers_that_were_cut_short_are_returned_but_not_stored(counting, cut):
    @cache_llm_response
    def ask(prompt): counting.calls.append(1); return cut
    assert ask("p") == ask("p") == cut and len(counting) == 2


def test_a_stream_that_was_cut_short_is_not_stored(counting):
    @cache_llm_response
    def stream(prompt): counting.calls.append(1); yield {"text": "so"}; yield {"choices": [{"finish_reason": "length"}]}
    assert list(stream("p")) == list(stream("p")) and len(counting) == 2


def test_keep_decides_and_never_fails_the_call(counting):
    @cache_llm_response(keep=lambda answer: answer != "bad")
    def ask(prompt): counting.calls.append(1); return "bad" if len(counting) == 1 else "good"
    assert (ask("p"), ask("p"), ask("p")) == ("bad", "good", "good")
    @cache_llm_response(keep=lambda answer: 1 / 0)
    def other(prompt): return "answer"
    assert other("p") == "answer"


async def test_an_early_refresh_runs_in_the_background(counting, cache):
    cache.chance = lambda: 1 - 1e-12  # this caller always draws the lot
    @cache_llm_response(ttl=60, early=50)
    async def ask(prompt): counting.calls.append(1); await asyncio.sleep(0.05); return len(counting)
    assert await ask("p") == 1
    assert await ask("p") == 1  # the old answer at once, while a new one is computed
    for _ in range(200):
        if len(counting) > 1: break
        await asyncio.sleep(0.01)
    cache.chance = lambda: 0.0
    for _ in range(200):
        if await ask("p") == 2: break
        await asyncio.sleep(0.01)
    assert await ask("p") == 2 and len(counting) == 2 and ask.cache_info().misses == 1


def test_functions_of_one_name_keep_their_answers_apart(counting):
    def made(version):
        @cache_llm_response(version=version)
        def ask(prompt): counting.calls.append(version); return version
        return ask
    one, two = made("1"), made("2")
    assert (one("p"), two("p")) == ("1", "2") and one.cache_clear() == 1
    assert (two("p"), one("p")) == ("2", "1") and counting.calls == ["1", "2", "1"]
    assert one.explain("p").outcome == "hit" and "source" in made("3").explain("p").why


# ---- what an entry remembers

@pytest.mark.parametrize("mode", ["text", "digest"])
def test_what_is_ignored_is_remembered_nowhere(mode):
    cache = Cache.from_url("memory://", explain=mode)
    class Known:
        def __init__(self, model, key): self.model, self.key = model, key
        def __repr__(self): return f"Known({self.model!r}, {self.key!r})"
    class Client(Known):
        def __cache_key__(self): return self.model
    class Bot(Known):
        @cache_llm_response(cache=cache, ignore=("self.key", "api_key"))
        def ask(self, prompt, client=None, **options): return prompt.upper()
        @cache_llm_response(cache=cache, ignore=("self.key", "api_key"))
        def stream(self, prompt, client=None, **options): yield prompt.upper()
        @cache_embedding(cache=cache, ignore=("self.key", "api_key"))
        def embed(self, texts, client=None, **options): return [[1.0] for _ in texts]
    args = []
    for verb, asked in ((Bot.ask, "p"), (Bot.stream, "p"), (Bot.embed, ["p", "q"])):
        call = (Bot("m", "sk-SECRET-1"), asked, Client("c", "sk-SECRET-2"))
        list(verb(*call, api_key="sk-SECRET-3", temperature=0.2))
        keys = verb.key(*call, temperature=0.2)
        args += [codec.header(cache.store.peek(key)).meta["args"] for key in ([keys] if isinstance(keys, str) else keys)]
        told = verb.explain(Bot("m", "sk-SECRET-4"), asked, Client("d", "sk-SECRET-5"), api_key="sk-SECRET-6", temperature=0.7)
        for one in told if isinstance(told, list) else [told]:
            assert "SECRET" not in repr(one) and {d.path for d in one.differences} - {"texts"} == {"client", "options.temperature"}
    secret = {digest(f"sk-SECRET-{n}") for n in range(1, 7)}
    assert len(args) == 4 and all("SECRET" not in repr(one) and not secret & {what[:8] for what in one.values()} for one in args)


def test_agents_are_remembered_by_class_and_attributes():
    cache = Cache.from_url("memory://", explain="text")
    class Bot:
        def __init__(self, model, key): self.model, self.key = model, key
        def __repr__(self): return f"Bot({self.model!r}, {self.key!r})"
        @cache_llm_response(cache=cache, ignore=("self.key",))
        def ask(self, prompt): return prompt
    class Other(Bot): pass
    Bot("small", "sk-SECRET-1").ask("hi")
    [where] = Bot("large", "sk-SECRET-2").ask.explain("hi").differences
    assert tuple(where) == ("self.model", "large", "small")
    [where] = Other("small", "sk-SECRET-2").ask.explain("hi").differences
    assert where.path == "self" and where.now.endswith("Other") and where.before.endswith("Bot")
    args = codec.header(cache.store.peek(Bot.ask.key(Bot("small", ""), "hi"))).meta["args"]
    assert list(args) == ["self", "self.model", "prompt"] and "SECRET" not in repr(args)


def test_a_list_of_texts_is_bound_once(monkeypatch):
    cache, bound = Cache.from_url("memory://"), []
    @cache_embedding(cache=cache)
    def embed(texts, model="m"): return [[1.0] for _ in texts]
    named = Binder.named
    monkeypatch.setattr(Binder, "named", lambda self, *args, **kwargs: bound.append(1) or named(self, *args, **kwargs))
    texts = [f"text {n}" for n in range(50)]
    embed(texts)
    assert len(bound) == 1
    args = [codec.header(cache.store.peek(key)).meta["args"] for key in embed.key(texts)]
    assert [one["texts"] for one in args] == [digest(text) for text in texts] and {one["model"] for one in args} == {digest("m")}
    assert [one.outcome for one in embed.explain(texts)] == ["hit"] * 50 and len(bound) <= 2


def test_who_is_asked_is_what_it_was_at_decoration(cache, counting):
    def make(model):
        @cache_llm_response
        def ask(prompt): counting.calls.append(1); return model
        def change(other): nonlocal model; model = other
        return ask, change
    (one, change), (again, _), (changed, _) = make("a"), make("a"), make("b")
    change("b")
    assert one.key("p") == again.key("p") != changed.key("p") and one("p") == "b"
    assert again.cache_clear() == 1, "an entry of `one`, whoever it says that it is"
