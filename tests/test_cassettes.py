"""What is exported can be read, reviewed and loaded anywhere, exactly; what is damaged costs one line."""

import asyncio
import dataclasses
import json
import os
import re
import signal
import stat
import struct
import subprocess
import sys
import threading
import tracemalloc
import unicodedata
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aurea_orchestrator import codec, keys
from aurea_orchestrator.cache import Cache
from aurea_orchestrator.cassettes import Loaded, export, load, read, written
from aurea_orchestrator.decorators import cache_embedding, cache_llm_response, cached
from aurea_orchestrator.effects import adrive, drive
from aurea_orchestrator.entries import look
from aurea_orchestrator.errors import CodecError, ConfigError, StoreUnavailableError, UnstorableError
from aurea_orchestrator.events import Clock
from aurea_orchestrator.stores.base import Item
from tests.test_codec import VALUES, same

COST = codec.header(codec.encode(None, born=0.0)).cost
SECONDS = st.floats(0, 1e6)
COSTS = SECONDS if isinstance(COST, float) else st.builds(type(COST), SECONDS, st.integers(0, 2**40), st.integers(0, 2**40), SECONDS)


class Noon(Clock):
    def __init__(self, at=1_800_000_000.0):
        self.at = at

    def now(self):
        return self.at


def key_of(n, kind="llm", namespace=None):
    return keys.prefix(kind, namespace) + f"{n:064x}"


def entry(key, value, born=1_799_999_000.0, ttl=None, **facts):
    return codec.encode(value, born=born, ttl=ttl, seal=key.encode(), **facts)


def put(cache, key, value, **facts):
    drive(cache.store.put_many([Item(key, entry(key, value, **facts), 3600.0)]))


def held(cache, key):
    (blob,) = drive(cache.store.get_many([key]))
    return None if blob is None else codec.decode(blob, key.encode())


def fresh():
    return Cache.from_url("memory://", clock=Noon())


STORES = ["memory", "sqlite", "redis"]


@pytest.fixture
def make(request, tmp_path):
    made = []

    def one(name):
        if name == "redis":  # One database a cache
            server = request.getfixturevalue("redis_server")
            url = re.sub(r"(/\d+)?$", f"/{len(made)}", server.url, count=1)
        else:
            url = "memory://" if name == "memory" else f"sqlite:///{tmp_path}/{len(made)}.db"
        made.append(Cache.from_url(url, timeout=5.0))
        return made[-1]

    yield one
    for cache in made:
        cache.close()


@dataclasses.dataclass
class Answer:
    text: str
    score: float = 0.5


SAMPLES = [
    "Gold — “yes”.", "", "two\nlines\r\nand \u2028 and \u202e", "\ud800", b'{"id": "chatcmpl-1"}', b"", b"\xff\x00", b"\0" * 100, None, True, 0, 2**70, 1.0, -0.0,
    float("nan"), float("inf"), [1, 1.0, True], (1, (2,)), {"b": 1, "a": {"!bytes": "no tag"}}, {1: "a", "1": "b", None: 3}, {1, 2}, Answer("x"), [Answer("y")],
    [n / 8 for n in range(1536)], [0.1] * 20, (0.5,) * 20, np.arange(6, dtype="<f4").reshape(2, 3), np.ones(1536, ">f8"), np.array(["a", "é"]), np.float32(0.1),
    np.asfortranarray(np.ones((2, 3), "i2")), {"embedding": np.zeros((3, 100)), "text": "x"}, bytearray(b"abc"), {"!stream": 1}, {"!payload": [0, ""]}, {"key": 1},
]  # fmt: skip


# ---- there and back


FACTS = st.fixed_dictionaries(
    {
        "born": st.one_of(st.floats(0, 4e9), st.floats(allow_nan=False)),
        "ttl": st.one_of(st.none(), st.just(1e300)),
        "cost": COSTS,
        "meta": st.one_of(
            st.none(),
            st.dictionaries(
                st.sampled_from(["name", "model", "args", "rows", "!odd"]),
                st.recursive(st.one_of(st.text(), st.integers(-(2**63), 2**63), st.floats(allow_nan=False)), lambda x: st.dictionaries(st.text(max_size=3), x), max_leaves=3),
            ),
        ),
    }
)


@settings(max_examples=250, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(VALUES, FACTS), max_size=4))
def test_everything_comes_back_exactly(tmp_path_factory, values):
    there, here, folder = Cache.from_url("memory://", clock=Noon(0.0)), Cache.from_url("memory://", clock=Noon(0.0)), tmp_path_factory.mktemp("x")
    blobs = {}
    for n, (value, facts) in enumerate(values):
        try:
            blobs[key_of(n)] = entry(key_of(n), value, **{**facts, "ttl": facts["ttl"] if facts["born"] > 0 else None})
        except UnstorableError:
            continue
    drive(there.store.put_many([Item(key, blob, 60.0) for key, blob in blobs.items()]))
    assert drive(export(there, folder / "a")) == len(blobs)
    assert drive(load(here, folder / "a")) == Loaded(len(blobs), [])
    for key, blob in blobs.items():
        before, after = codec.decode(blob, key.encode()), held(here, key)
        assert same(before.value, after.value) and (before.born, before.cost, before.meta) == (after.born, after.cost, after.meta)
        assert after.ttl is None
    drive(export(here, folder / "b"))
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()


@pytest.mark.parametrize("source", STORES)
@pytest.mark.parametrize("target", STORES)
def test_from_any_store_into_any_other(make, tmp_path, source, target):
    there, here = make(source), make(target)
    for n, value in enumerate(SAMPLES):
        put(there, key_of(n, ("llm", "embedding", "own")[n % 3], (None, "team")[n % 2]), value, born=1.7e9 + n / 7, cost=COST, meta={"name": f"app.f{n % 5}", "n": n})
    drive(there.store.bump({"own:miss": 0.0}))
    assert drive(export(there, tmp_path / "a")) == len(SAMPLES)
    assert drive(load(here, tmp_path / "a")).loaded == len(SAMPLES)
    for n, value in enumerate(SAMPLES):
        one = held(here, key_of(n, ("llm", "embedding", "own")[n % 3], (None, "team")[n % 2]))
        assert same(one.value, value) and (one.born, one.ttl, one.meta) == (1.7e9 + n / 7, None, {"name": f"app.f{n % 5}", "n": n})
    assert asyncio.run(adrive(export(here, tmp_path / "b"))) == len(SAMPLES)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert asyncio.run(adrive(load(here, tmp_path / "b"))).loaded == len(SAMPLES)
    assert here.clear() == len(SAMPLES)  # Kinds that were never asked for here are known all the same


@pytest.mark.parametrize("ttl", [None, 600.0])
@pytest.mark.parametrize("store", STORES)
def test_a_notebook_with_its_cassette_calls_nothing(make, tmp_path, store, ttl):
    calls = []

    def notebook(cache):
        @cache_llm_response(cache=cache, namespace="nb")
        def ask(prompt, temperature=0.0):
            calls.append(prompt)
            return Answer(prompt, temperature)

        @cache_llm_response(cache=cache, namespace="nb")
        def says(prompt):
            calls.append(prompt)
            yield from prompt.split()
            yield {"done": True}
            return len(prompt)

        @cache_llm_response(cache=cache, namespace="nb")
        async def later(prompt):
            calls.append(prompt)
            for word in prompt.split():
                yield word

        @cache_embedding(cache=cache, namespace="nb")
        def embed(texts):
            calls.extend(texts)
            return np.array([[len(text), 0.1] for text in texts], "f4")

        async def all_of(stream):
            return [piece async for piece in stream]

        return [ask("a"), ask("b", temperature=1.0), list(says("to be or")), list(says("")), asyncio.run(all_of(later("not to be"))), embed(["x", "yy"]).tolist()]

    there, here = make("memory"), make(store)
    before, n = notebook(there), len(calls)
    drive(export(there, tmp_path / "a.jsonl"))
    drive(load(here, tmp_path / "a.jsonl", ttl))
    assert notebook(here) == before and len(calls) == n == 7
    assert here.stats()["total"]["misses"] == 0
    text = (tmp_path / "a.jsonl").read_text()
    assert '{"!stream": {"pieces": ["to", "be", "or", {"done": true}], "returned": 8}}' in text


# ---- what a person sees


def test_what_json_can_say_is_plain(tmp_path):
    key = key_of(1)
    for value in ["text", 1, 1.5, None, True, [1, "a", 2.0], {"b": [1], "a": {"c": None}}, [0.25] * 30, {"z": 1, "a": 2}]:
        line = json.loads(written(key, entry(key, value)))
        assert same(line["value"], value)
    for value, tag in [((1,), "!tuple"), ({1}, "!set"), (b"text", "!bytes"), ({1: 2}, "!dict"), (float("nan"), "!float"), (2**70, "!int"), (np.zeros(2), "!array"), ({"!x": 1}, "!map")]:
        line = json.loads(written(key, entry(key, value)))
        assert list(line["value"]) == [tag]
    assert json.loads(written(key, entry(key, b'{"a": "\xc3\xa9"}')))["value"] == {"!bytes": '{"a": "é"}'}


def test_a_line_says_who_when_and_how_much():
    key = key_of(1, "llm", "team")
    line = json.loads(written(key, entry(key, "x", born=1_800_000_000.25, meta={"z": 1, "name": "app.ask", "model": "m-1"})))
    assert list(line) == ["function", "key", "value", "born", "cost", "meta", "check"]
    assert (line["function"], line["key"], line["born"]) == ("app.ask", key, "2027-01-15T08:00:00.25Z")
    assert list(line["meta"].items()) == [("model", "m-1"), ("z", 1)] and line["cost"] == {"seconds": 0.0, "prompt_tokens": 0, "completion_tokens": 0, "usd": 0.0}


def test_long_vectors_have_a_preview_and_stay_short():
    key = key_of(1)
    line = written(key, entry(key, {"object": "list", "data": [n / 8 for n in range(1536)]}))
    assert json.loads(line)["value"]["object"] == "list" and json.loads(line)["value"]["data"]["preview"] == "1536 numbers: 0, 0.125, 0.25, 0.375, …"
    assert len(line) < 1536 * 4 * 1.4 + 400


@given(st.text(st.characters(exclude_categories=())))
def test_no_character_deceives_who_reviews(text):
    line = written(key_of(1), entry(key_of(1), ["before", text, "after"]))
    assert read(line.encode(), 0.0).entry(None) == entry(key_of(1), ["before", text, "after"])
    assert line.splitlines() == [line] and not [each for each in line if each in "\u200b\ufeff\x7f" or unicodedata.bidirectional(each) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")]


def test_no_prompt_and_no_argument_is_in_the_file(tmp_path):
    cache = fresh()

    @cache_llm_response(cache=cache)
    def ask(prompt, token):
        return "forty-two"

    ask("the secret of life", token="sk-123")
    drive(export(cache, tmp_path / "a"))
    text = (tmp_path / "a").read_text()
    assert "forty-two" in text and "secret" not in text and "sk-123" not in text


# ---- git


def test_one_new_answer_is_one_new_line(tmp_path):
    cache = fresh()
    for n in (5, 3, 9):
        put(cache, key_of(n), {n: "x"}, meta={"name": "app.ask" if n % 2 else ""})
    drive(export(cache, tmp_path / "a"))
    put(cache, key_of(4), "new", meta={"name": "app.ask"})
    drive(export(cache, tmp_path / "b"))
    before, after = (tmp_path / "a").read_bytes().splitlines(), (tmp_path / "b").read_bytes().splitlines()
    assert json.loads(before[0]) == {"aurea": "cassette", "version": 1}
    assert [line for line in after if line in before] == before and len(after) == len(before) + 1
    assert [json.loads(line)["key"] for line in after[1:]] == [key_of(n) for n in (3, 4, 5, 9)]


def test_lines_are_sorted_by_function_then_key(tmp_path):
    cache = fresh()
    for n in range(30):
        put(cache, key_of(n * 7 % 30, ("llm", "embedding")[n % 2], (None, "team")[n % 3 == 0]), n, meta={"name": f"app.f{n % 4}"} if n % 5 else {})
    drive(export(cache, tmp_path / "a"))
    lines = [json.loads(line) for line in (tmp_path / "a").read_bytes().splitlines()[1:]]
    order = [(line["function"] or "", line["key"]) for line in lines]
    assert order == sorted(order) and len(order) == len(set(order)) == 30


EXPORT = """
import sys
from aurea_orchestrator.cache import Cache
from aurea_orchestrator.cassettes import export
from aurea_orchestrator.effects import drive
cache = Cache.from_url(sys.argv[1])
drive(export(cache, sys.argv[2]))
cache.close()
assert "numpy" not in sys.modules and "tests.test_codec" not in sys.modules
"""


def test_another_process_without_the_classes_writes_the_same_file(tmp_path, make):
    cache = make("sqlite")
    for n, value in enumerate([*SAMPLES, {"a", "b", "c"}, Answer("z")]):
        put(cache, key_of(n), value, meta={"name": "app.ask", "args": {"b": "1", "a": "2"}}, born=cache.clock.now())
    drive(export(cache, tmp_path / "here"))
    for seed in ("1", "2"):
        subprocess.run([sys.executable, "-c", EXPORT, cache.store.url, tmp_path / seed], check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        assert (tmp_path / seed).read_bytes() == (tmp_path / "here").read_bytes()


def test_a_conflict_of_two_branches_loads_both_sides(tmp_path):
    cache, lines = fresh(), [written(key_of(n), entry(key_of(n), value, born=born)) for n, value, born in [(1, "old", 10.0), (1, "new", 20.0), (2, "b", 5.0)]]
    for order in (lines, lines[::-1]):
        (tmp_path / "a").write_text("\n".join(['{"aurea": "cassette", "version": 1}', "<<<<<<< HEAD", order[0], "=======", *order[1:], ">>>>>>> other", ""]))
        with pytest.warns(UserWarning, match="3 lines were skipped: line 2: this is no JSON"):
            report = drive(load(cache, tmp_path / "a"))
        assert [number for number, _ in report.skipped] == [2, 4, 7] and held(cache, key_of(1)).value == "new" and held(cache, key_of(2)).value == "b"
        cache.clear()


# ---- edited by hand


def test_an_edited_answer_is_believed_without_its_check_alone(tmp_path):
    key, cache = key_of(1), fresh()
    line = written(key, entry(key, {"label": "complaint", "n": [1, (2,)]}, meta={"name": "app.ask"}))
    (tmp_path / "a").write_text(line.replace("complaint", "praise"))
    with pytest.warns(UserWarning, match="line 1: the check is wrong; if the line was edited on purpose, remove"):
        assert drive(load(cache, tmp_path / "a")).loaded == 0
    (tmp_path / "a").write_text(re.sub(r', "check": "[0-9a-f]{16}"', "", line.replace("complaint", "praise")))
    assert drive(load(cache, tmp_path / "a")) == Loaded(1, [])
    assert held(cache, key).value == {"label": "praise", "n": [1, (2,)]} and held(cache, key).meta == {"name": "app.ask"}
    drive(export(cache, tmp_path / "b"))
    assert '"check"' in (tmp_path / "b").read_text()


def test_a_line_laid_out_otherwise_is_the_same_line(tmp_path):
    key, cache = key_of(1), fresh()
    line = json.loads(written(key, entry(key, {"b": 1, "a": "é\u202e"}, meta={"name": "x"})))
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf" + json.dumps(dict(reversed(line.items())), separators=(",", ":")).encode() + b"\r\n\r\n")
    assert drive(load(cache, tmp_path / "a")) == Loaded(1, []) and list(held(cache, key).value.items()) == [("b", 1), ("a", "é\u202e")]
    line["value"] = {"a": "é\u202e", "b": 1}  # Another order is another value
    (tmp_path / "a").write_text(json.dumps(line))
    with pytest.warns(UserWarning, match="check is wrong"):
        assert drive(load(cache, tmp_path / "a")).loaded == 0


def test_a_line_by_hand_needs_a_key_and_a_value(tmp_path):
    cache = fresh()
    values = ["hi", {"n": 2**70}, [0.5] * 20, [1] * 20, [], {}, "\ud800", 1.0]
    (tmp_path / "a").write_text("\n".join(json.dumps({"key": key_of(n), "value": value}) for n, value in enumerate(values)))
    assert drive(load(cache, tmp_path / "a")) == Loaded(len(values), [])
    for n, value in enumerate(values):
        one = held(cache, key_of(n))
        assert same(one.value, value) and (one.born, one.cost, one.meta) == (cache.clock.now(), COST, {})
        assert drive(cache.store.get_many([key_of(n)]))[0] == entry(key_of(n), value, born=cache.clock.now())  # Just as a call would have stored it


# ---- damage


def test_every_kind_of_damage_costs_its_line_alone(tmp_path):
    good = [written(key_of(n), entry(key_of(n), n, meta={"name": "f"})) for n in range(3)]
    said = json.loads(good[0])
    del said["check"]
    bad = {
        "no JSON": ["{", "not json", good[0][:-5], "NaN", "[" * 100_000, '{"key": NaN}', "\xff"],
        "no line of a cassette": ["1", "[]", "{}", '{"aurea": "tape"}', '{"value": 1}'],
        "check is wrong": [good[0].replace('"value": 0', '"value": 1'), good[0].replace(key_of(0), key_of(9)), json.dumps({**said, "check": "0" * 16}), json.dumps({**said, "check": None})],
        "none of ours": [json.dumps({**said, "key": key}) for key in ("x", "", 5, None, "llm:team", "flushall\r\n", "aurea:" + "0" * 64)],
        "cannot be read": [
            *(json.dumps({**said, "value": value}) for value in ({"!base64": "%%%"}, {"!base64": "QUJ"}, {"!payload": [0, "%"]}, {"!payload": 5}, {"!payload": [99, ""]}, {"!payload": [0, "wQ=="]},
              {"!unheard": 1}, {"!tuple": 5}, {"!set": [[1]]}, {"!int": "zz"}, {"!array": ["<f4 C 2", [1.0]]}, {"!array": ["O C 2", [1]]}, {"!a": 1, "!b": 2}, {"!stream": []}, {"!stream": {"pieces": 1}},
              {"!record": ["os:system", 1, {}, {}]}, {"!record": ["builtins:int", 1, {}, {}]}, {"!float": "1.5"}, {"!dict": [[{}, 1]]}, {"!bytes": 5}, {"!hex": "xyz"}, {"!decimal": ["x"]})),
            *(json.dumps({**said, "born": born}) for born in ("yesterday", [], {}, "2026-13-01T00:00:00Z")),
            *(json.dumps({**said, "cost": cost}) for cost in (5, {"seconds": "x"})), *(json.dumps({**said, "meta": meta}) for meta in (5, "x", [1])), json.dumps({"key": key_of(1)}),
        ],
    }  # fmt: skip
    for why, lines in bad.items():
        for line in lines:
            cache = fresh()
            (tmp_path / "a").write_bytes("\n".join(['{"aurea": "cassette", "version": 1}', good[1], line, good[2], ""]).encode("latin-1" if line == "\xff" else "utf-8"))
            with pytest.warns(UserWarning, match="a: 1 lines were skipped: line 3"):
                report = drive(load(cache, tmp_path / "a"))
            assert report.loaded == 2 and [number for number, _ in report.skipped] == [3] and why in report.skipped[0][1], (line[:200], report)
            assert held(cache, key_of(1)).value == 1 and held(cache, key_of(2)).value == 2 and len(drive(look(cache))) == 2


def test_a_cassette_of_tomorrow_is_left_alone_and_said_so(tmp_path):
    cache, good = fresh(), [written(key_of(n), entry(key_of(n), n)) for n in range(3)]
    (tmp_path / "a").write_text("\n".join([good[0], '{"aurea": "cassette", "version": 2}', good[1], '{"aurea": "cassette", "version": 1}', good[2]]))
    with pytest.warns(UserWarning, match="line 2: a cassette of version 2, where this reads version 1"):
        report = drive(load(cache, tmp_path / "a"))
    assert report.loaded == 2 and [number for number, _ in report.skipped] == [2] and held(cache, key_of(1)) is None


def test_the_warning_names_no_data_and_is_one(tmp_path):
    (tmp_path / "a").write_text("my secret\n" * 1000)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = drive(load(fresh(), tmp_path / "a"))
    assert len(report.skipped) == 1000 and len(caught) == 1 and "995 more" in str(caught[0].message) and "secret" not in str(caught[0].message)


ONE = written(key_of(1), entry(key_of(1), {"label": ["a", 1.5, {"x": (1, b"b")}]}, meta={"name": "app.ask", "model": "m"}))


@settings(max_examples=500, suppress_health_check=list(HealthCheck))
@given(st.integers(0, len(ONE.encode()) - 1), st.binary(max_size=2), st.integers(0, 3))
def test_no_accident_in_a_line_changes_an_answer(at, other, cut):
    line = ONE.encode()
    hurt = line[:at] + other + line[at + cut :]
    try:
        got = read(hurt, 5.0)
    except ValueError:
        return
    assert got == read(line, 5.0)  # Blanks, or the name of the check


@settings(max_examples=500)
@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from(["AAAA", "os:system", "nan", "0x10", "<f4 C 1"])),
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(["a", "!tuple", "!set", "!record", "!member", "!stream", "!array", "!payload", "!float", "!base64", "!dict", "!map", "!scalar", "!datetime", "!float32", "!text", "pieces", "returned"]), inner, max_size=2)),
        max_leaves=8,
    )
)  # fmt: skip
def test_whatever_stands_in_a_line_is_an_answer_or_a_reason(value):
    try:
        line = read(json.dumps({"key": key_of(1), "value": value}).encode(), 5.0)
    except ValueError:
        return
    blob = line.entry(None)
    assert codec.decode(blob, key_of(1).encode()).born == 5.0
    assert read(written(key_of(1), blob).encode(), 0.0).entry(None) == blob


# ---- which, how long, and against what is there


def test_choosing_what_is_exported(tmp_path):
    cache = fresh()

    @cache_llm_response(cache=cache, namespace="team")
    def ask(prompt):
        return prompt

    @cache_embedding(cache=cache)
    def embed(text):
        return [1.0]

    @cached("own", cache=cache)
    def own(text):
        return text

    ask("a"), ask("b"), embed("a"), own("a")
    cache.stats()
    for how, count in [({}, 4), ({"functions": ask}, 2), ({"functions": [ask, own]}, 3), ({"functions": "embed"}, 1), ({"namespace": "team"}, 2), ({"kind": "own"}, 1), ({"kind": "llm", "functions": embed}, 0)]:
        assert drive(export(cache, tmp_path / "a", **how)) == count
        assert len((tmp_path / "a").read_bytes().splitlines()) == count + 1
        assert drive(load(fresh(), tmp_path / "a")) == Loaded(count, [])


def test_what_is_past_its_ttl_or_damaged_is_not_exported(tmp_path):
    cache = fresh()
    put(cache, key_of(1), "good", ttl=2000.0), put(cache, key_of(2), "old", ttl=999.0), put(cache, key_of(4), "lasting")
    drive(cache.store.put_many([Item(key_of(3), b"junk", 60.0), Item("llm:lock", b"foreign", 60.0)]))
    assert drive(export(cache, tmp_path / "a")) == 2
    assert [json.loads(line)["value"] for line in (tmp_path / "a").read_bytes().splitlines()[1:]] == ["good", "lasting"]


def test_a_loaded_answer_does_not_end_unless_told_to(tmp_path):
    there, clock = fresh(), Noon()
    put(there, key_of(1), "x", ttl=2000.0)
    drive(export(there, tmp_path / "a"))
    lasting, ending = (Cache.from_url("memory://", clock=clock) for _ in range(2))
    drive(load(lasting, tmp_path / "a")), drive(load(ending, tmp_path / "a", ttl=60.0))
    assert (held(lasting, key_of(1)).born, held(ending, key_of(1)).born) == (1_799_999_000.0,) * 2
    assert held(lasting, key_of(1)).ttl is None and codec.until(drive(ending.store.get_many([key_of(1)]))[0]) == clock.at + 60.0
    (one,) = drive(look(ending))
    assert one.left == 60.0


@pytest.mark.parametrize("ttl", [0, -5, float("nan"), float("inf"), 1e-6, True, "60", timedelta(0)])
def test_a_ttl_that_cannot_work_loads_nothing(tmp_path, ttl):
    there, cache = fresh(), fresh()
    put(there, key_of(1), "x")
    drive(export(there, tmp_path / "a"))
    with pytest.raises(ConfigError, match="ttl="):
        cache.load(tmp_path / "a", ttl=ttl)
    assert drive(look(cache)) == []


def test_a_ttl_may_be_a_timedelta(tmp_path):
    there = fresh()
    put(there, key_of(1), "x")
    drive(export(there, tmp_path / "a"))
    cache = Cache.from_url("memory://", clock=Noon())
    assert cache.load(tmp_path / "a", ttl=timedelta(minutes=2)).loaded == 1 and drive(look(cache))[0].left == 120.0


def test_newer_wins(tmp_path):
    there = fresh()
    put(there, key_of(1), "line", born=100.0)
    drive(export(there, tmp_path / "a"))
    for born, ttl, stays in [(99.0, None, False), (100.0, None, False), (101.0, None, True), (101.0, 1e10, True), (101.0, 50.0, False)]:
        here = fresh()
        put(here, key_of(1), "there", born=born, ttl=ttl)
        assert drive(load(here, tmp_path / "a")) == Loaded(not stays, [], int(stays))
        assert held(here, key_of(1)).value == ("there" if stays else "line")
    here = fresh()
    drive(here.store.put_many([Item(key_of(1), b"junk", 60.0)]))
    assert drive(load(here, tmp_path / "a")).loaded == 1 == drive(load(here, tmp_path / "a")).loaded and held(here, key_of(1)).value == "line"


def test_a_memory_tier_does_not_hold_on_to_what_a_load_replaces(make, tmp_path):
    there, here = fresh(), make("redis")
    put(there, key_of(1), "line", born=here.clock.now() - 5), put(here, key_of(1), "there", born=here.clock.now() - 9)
    drive(export(there, tmp_path / "a"))
    assert held(here, key_of(1)).value == "there"
    drive(load(here, tmp_path / "a"))
    assert held(here, key_of(1)).value == "line"


def test_progress_is_told(tmp_path):
    cache, told = fresh(), []
    for n in range(250):
        put(cache, key_of(n), n)
    drive(export(cache, tmp_path / "a", progress=lambda *how: told.append(how)))
    assert told == [(100, 250), (200, 250), (250, 250)]
    told.clear()
    drive(load(fresh(), tmp_path / "a", progress=lambda *how: told.append(how)))
    size = (tmp_path / "a").stat().st_size
    assert told[-1] == (size, size) and told == sorted(told) and len(told) == 3


# ---- the file


KILLED = """
import os, signal, sys
from aurea_orchestrator.cache import Cache
from aurea_orchestrator.cassettes import export
from aurea_orchestrator.effects import drive
def killed(done, total):
    if done >= total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
drive(export(Cache.from_url(sys.argv[1]), sys.argv[2], progress=killed))
"""


def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path, make):
    cache, path = make("sqlite"), tmp_path / "out" / "a.jsonl"
    path.parent.mkdir()
    for n in range(500):
        put(cache, key_of(n), "x" * 1000, born=cache.clock.now())
    for before in (None, b"the old file\n"):
        if before is not None:
            path.write_bytes(before)
        done = subprocess.run([sys.executable, "-c", KILLED, cache.store.url, path])
        assert done.returncode == -signal.SIGKILL
        assert (path.read_bytes() if path.exists() else None) == before
        assert all(part.name.startswith(".a.jsonl.") and part.name.endswith(".part") for part in path.parent.iterdir() if part != path)
    assert drive(export(cache, path)) == 500 and drive(load(fresh(), path)).loaded == 500


def test_what_fails_leaves_nothing_behind(tmp_path):
    cache, path = fresh(), tmp_path / "a"
    for n in range(300):
        put(cache, key_of(n), n)
    path.write_bytes(b"old")

    def fails(done, total):
        if done > 100:
            raise error

    for error in (StoreUnavailableError("away"), KeyboardInterrupt(), OSError(28, "No space left on device")):
        with pytest.raises(type(error)):
            drive(export(cache, path, progress=fails))
        with pytest.raises(type(error)):
            asyncio.run(adrive(export(cache, path, progress=fails)))
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]

    async def cancelled():
        task = asyncio.ensure_future(adrive(export(cache, path, progress=lambda *_: task.cancel())))
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]
    for wrong in (tmp_path, tmp_path / "no" / "a"):
        with pytest.raises(OSError):
            drive(export(cache, wrong))
    with pytest.raises(FileNotFoundError):
        drive(load(cache, tmp_path / "b"))
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.skipif(os.name != "posix", reason="rights are POSIX's")
def test_rights_and_links_stay(tmp_path):
    cache, path, link = fresh(), tmp_path / "a", tmp_path / "link"
    put(cache, key_of(1), 1)
    before = os.umask(0o027)
    try:
        drive(export(cache, path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        link.symlink_to(path)
        put(cache, key_of(2), 2)
        drive(export(cache, link))
    finally:
        os.umask(before)
    assert link.is_symlink() and stat.S_IMODE(path.stat().st_mode) == 0o604 and len(path.read_bytes().splitlines()) == 3


@pytest.mark.parametrize("store", STORES)
def test_exports_and_loads_at_once(make, tmp_path, store):
    cache, path, wrong = make(store), tmp_path / "a", []
    for n in range(300):
        put(cache, key_of(n), {"n": n}, born=cache.clock.now())
    drive(export(cache, path))

    def work(turn):
        try:
            for _ in range(5):
                if turn % 2:
                    drive(export(cache, path))
                else:
                    report = drive(load(cache, path))
                    assert report.skipped == [] and report.loaded + report.kept == 300, report
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=[turn]) for turn in range(6)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert wrong == [] and os.listdir(tmp_path).count("a") == 1 and not [name for name in os.listdir(tmp_path) if name.endswith(".part")]
    assert drive(export(cache, path)) == 300


def test_ten_thousand_entries_in_little_memory(tmp_path):
    there, here, path = Cache.from_url("sqlite:///" + str(tmp_path / "there.db"), timeout=60.0), Cache.from_url("sqlite:///" + str(tmp_path / "here.db"), timeout=60.0), tmp_path / "a"
    now, text = there.clock.now(), "An answer of some length. " * 80
    for begin in range(0, 10_000, 500):
        drive(there.store.put_many([Item(key_of(n), entry(key_of(n), f"{n} {text}", born=now), 3600.0) for n in range(begin, begin + 500)]))
    tracemalloc.start()
    try:
        assert drive(export(there, path)) == 10_000
        assert path.stat().st_size > 20_000_000
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
        tracemalloc.reset_peak()
        assert drive(load(here, path)) == Loaded(10_000, [])
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert held(here, key_of(9_999)).value == f"9999 {text}"
    there.close(), here.close()


def test_a_damaged_piece_of_a_stream_is_no_stream():
    key, piece = key_of(1), codec.encode("a", born=0.0)
    for value in ([[piece], piece[:-1] + b"x"], [[b"a"], piece], [[], piece], [[piece, piece], piece], [[piece]], [[codec.encode("a", born=1.0)], piece]):
        blob = entry(key, value)
        assert read(written(key, blob).encode(), 0.0).entry(None) == blob
    assert "!stream" in written(key, entry(key, [[piece], piece])) and "!stream" not in written(key, entry(key, [[b"a"], piece]))


@pytest.mark.parametrize(
    "value",
    [
        "\ud83d\ude00", ["\ud83d\ude00"], {"\ud83d\ude00": 1}, *struct.unpack("<2d", bytes.fromhex("010000000000f07f 000000000000f8ff")), [struct.unpack("<d", bytes.fromhex("020000000000f87f"))[0]],
        np.frombuffer(bytes.fromhex("0100a07f 000000ff"), "<f4"), np.frombuffer(b"\2\1", "?"), [float("nan")] * 20, {"!a": {"!b": ()}}, {"!payload": "x"}, [2**63], [-(2**63) - 1],
    ],
)  # fmt: skip
def test_what_json_would_change_comes_back_to_the_bit(value):
    blob = entry(key_of(1), value)
    assert read(written(key_of(1), blob).encode(), 0.0).entry(None) == blob


def test_depth_is_no_trouble():
    value = "x"
    for _ in range(99):
        value = [value]
    blob = entry(key_of(1), value)
    assert read(written(key_of(1), blob).encode(), 0.0).entry(None) == blob
    with pytest.raises((ValueError, CodecError)):
        read(b'{"key": "' + key_of(1).encode() + b'", "value": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", 0.0)


def test_nothing_is_imported_until_it_is_needed():
    code = "import sys, aurea_orchestrator; assert not {'aurea_orchestrator.cassettes', 'aurea_orchestrator.entries', 'aurea_orchestrator.readable'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


async def test_awaited_too(tmp_path):
    one, other, calls = Cache.from_url("memory://"), Cache.from_url("memory://"), []
    def make(cache):
        async def ask(prompt): calls.append(prompt); return prompt.upper()
        return cache_llm_response(cache=cache, namespace="n", version="1")(ask)
    assert await make(one)("p") == "P"
    assert await one.aexport(tmp_path / "answers.jsonl") == 1
    assert (await other.aload(tmp_path / "answers.jsonl")).loaded == 1
    assert await make(other)("p") == "P" and calls == ["p"]
