"""A listing sees every entry once, decodes none, changes none, and stumbles over nothing."""

import asyncio
import dataclasses
import functools

import pytest

from aurea_orchestrator import codec, keys
from aurea_orchestrator.cache import Cache
from aurea_orchestrator.decorators import cache_embedding, cache_llm_response, cached
from aurea_orchestrator.effects import adrive, drive
from aurea_orchestrator.entries import look, remove, shared, walk, whose
from aurea_orchestrator.errors import ConfigError
from aurea_orchestrator.events import Clock
from aurea_orchestrator.readable import Payload, payload_of, type_name
from aurea_orchestrator.stores.base import Item, Page
from aurea_orchestrator.stores.memory import MemoryStore
from aurea_orchestrator.values import to_payload


@pytest.fixture(params=["memory", "sqlite", "redis", "redis without memory"])
def cache(request, tmp_path):
    if "redis" in request.param:
        url = request.getfixturevalue("redis_url") + ("?memory=0" if "without" in request.param else "")
    else:
        url = "memory://" if request.param == "memory" else f"sqlite:///{tmp_path}/cache.db"
    one = Cache.from_url(url, timeout=5.0)
    yield one
    one.close()


@dataclasses.dataclass
class Answer:
    text: str


def key_of(n, kind="llm", namespace=None):
    return keys.prefix(kind, namespace) + f"{n:064x}"


def keep(cache, key, value="x", name=None, born=None, ttl=600.0, **meta):
    facts = {**({"name": name} if name else {}), **meta}
    born = cache.clock.now() if born is None else born
    drive(cache.store.put_many([Item(key, codec.encode(value, born=born, ttl=ttl, meta=facts, seal=key.encode()), 600.0)]))


def test_what_decorated_functions_left_is_seen_as_they_left_it(cache):
    @cache_llm_response(cache=cache, ttl=100)
    def ask(prompt):
        return Answer(prompt)

    @cache_embedding(cache=cache, namespace="team")
    def embed(texts):
        return [[float(len(text))] * 20 for text in texts]

    @cached("report", cache=cache)
    def pieces(n):
        yield from range(n)

    @cached("report", cache=cache)
    def table(n):
        return {"n": n}

    ask("a"), embed(["b", "cc"]), list(pieces(3)), table(1)
    by = {}
    for one in drive(look(cache)):
        by.setdefault(one.function.rpartition(".")[2], []).append(one)
    assert {name: len(found) for name, found in by.items()} == {"ask": 1, "embed": 2, "pieces": 1, "table": 1}
    (answer,) = by["ask"]
    assert (answer.key, answer.kind, answer.namespace, answer.ttl) == (ask.key("a"), "llm", None, 100)
    assert 90 < answer.left <= 100 and answer.value_type == f"{__name__}.Answer"
    assert {(one.kind, one.namespace, one.value_type) for one in by["embed"]} == {("embedding", "team", "list")}
    assert [one.value_type for one in by["pieces"] + by["table"]] == ["stream", "dict"]
    for one in drive(look(cache)):
        assert one.size_bytes == len(drive(cache.store.get_many([one.key]))[0])


def test_choosing(cache):
    now = cache.clock.now()
    for n in range(60):
        kind, namespace = ("llm", "embedding")[n % 2], (None, "team", "teams")[n % 3]
        keep(cache, key_of(n, kind, namespace), name=("app.ask", "lab.ask", "app.task")[n // 20], born=now - 10 * n, ttl=None)

    def found(**how):
        return {int(one.key[-64:], 16) for one in drive(look(cache, **how))}

    assert found() == set(range(60))
    assert found(kind="llm") == set(range(0, 60, 2))
    assert found(namespace="team") == set(range(1, 60, 3))  # And not that of `teams`
    assert found(kind="llm", namespace="teams") == set(range(2, 60, 6))
    assert found(function="ask") == set(range(40)) and found(function="app.ask") == set(range(20))
    assert found(function=["lab.ask", "task"]) == set(range(20, 60)) and found(function="sk") == set()
    assert found(older=305) == set(range(31, 60))
    assert found(function="app.task", older=505, kind="llm") == {52, 54, 56, 58}
    assert len(found(limit=7)) == 7 and found(limit=0) == set() and len(found(kind="llm", limit=100)) == 30
    assert drive(look(cache, kind="never")) == []
    for wrong in ({"kind": "No:"}, {"namespace": "a b"}, {"namespace": "a*"}):
        with pytest.raises(ConfigError):
            drive(look(cache, **wrong))


def test_a_function_chooses_itself():
    cache = Cache.from_url("memory://")

    @cache_llm_response(cache=cache)
    def ask(prompt):
        return prompt

    @cache_llm_response(cache=cache)
    def other(prompt):
        return prompt

    ask("a"), other("a")
    assert [one.key for one in drive(look(cache, function=ask))] == [ask.key("a")]
    assert len(drive(look(cache, function=[ask, other]))) == 2 and whose(ask)(ask.name) and not whose(other)(ask.name)


def test_a_method_chooses_itself(tmp_path):
    cache = Cache.from_url("memory://")

    class Bot:
        @cache_llm_response(cache=cache, ignore="self")
        def ask(self, prompt):
            return prompt

        @classmethod
        @cache_llm_response(cache=cache, ignore="cls")
        def of_class(cls, prompt):
            return prompt

        @staticmethod
        @cache_llm_response(cache=cache)
        def alone(prompt):
            return prompt

    bot = Bot()
    bot.ask("a"), bot.ask("b"), Bot.of_class("a"), Bot.alone("a")
    for chosen, n in ((bot.ask, 2), (Bot.ask, 2), (Bot.of_class, 1), (bot.of_class, 1), (bot.alone, 1), ([bot.ask, Bot.of_class], 3),
                      (functools.partial(bot.ask, "a"), 2), (functools.partial(functools.partial(Bot.alone), "a"), 1), (Bot.alone.__wrapped__, 1)):
        assert len(drive(look(cache, function=chosen))) == cache.export(tmp_path / "x.jsonl", functions=chosen) == n


@pytest.mark.parametrize("wrong", [[7], [None], [functools.partial(type("Thing", (), {"__call__": lambda self: 1})())]])
def test_what_is_no_function_is_refused(wrong):
    with pytest.raises(ConfigError, match="no function"):
        whose(wrong)


def test_what_is_not_ours_is_passed_over_and_counted(cache):
    keep(cache, key_of(1))
    good = drive(cache.store.get_many([key_of(1)]))[0]
    damaged = [b"", b"junk", good[:-1], good, good.replace(b"x", b"y"), codec.encode(1, born=0.0)[:2] + b"\x09" + good[3:]]
    drive(cache.store.put_many([Item(key_of(n), blob, 60.0) for n, blob in enumerate(damaged, 2)]))  # Also a good one under another key
    foreign = ["llm:lock", "llm:", "llm:team:" + "F" * 64, "embedding:a:b:" + "0" * 64]
    drive(cache.store.put_many([Item(key, b"of another program", 60.0) for key in foreign]))
    listing = drive(look(cache))
    assert [one.key for one in listing] == [key_of(1)] and listing.passed == (len(damaged), len(foreign))
    assert drive(remove(cache, listing)) == 1
    assert all(drive(cache.store.get_many(foreign)))


def test_an_entry_of_a_class_that_is_not_here_is_seen(cache):
    keep(cache, key_of(1), Answer("x"), "app.ask", model="m-1")
    blob = drive(cache.store.get_many([key_of(1)]))[0]
    payload = payload_of(blob)
    gone = Payload(payload.form, payload.data.replace(b"Answer", b"Absent"))
    assert type_name(gone) == f"{__name__}.Absent"
    (one,) = drive(look(cache))
    assert (one.function, one.model, one.value_type) == ("app.ask", "m-1", f"{__name__}.Answer")


def test_a_listing_is_no_lookup(cache):
    @cache_llm_response(cache=cache)
    def ask(prompt):
        return prompt

    ask("a"), ask("a")
    before = cache.stats()
    drive(look(cache)), asyncio.run(adrive(look(cache)))
    after = cache.stats()
    assert before["total"] == after["total"] and before["outcomes"] == after["outcomes"]
    assert before["store"].get("memory_entries") == after["store"].get("memory_entries")


def test_a_listing_leaves_the_memory_tier_alone(redis_url):
    cache, other = Cache.from_url(redis_url, timeout=5.0), Cache.from_url(redis_url, timeout=5.0)
    for n in range(50):
        keep(other, key_of(n))
    drive(cache.store.get_many([key_of(0)]))
    assert len(drive(look(cache))) == 50 and cache.stats()["store"]["memory_entries"] <= 1
    drive(cache.store.get_many([key_of(n) for n in range(50)]))
    assert cache.stats()["store"]["memory_entries"] == 50  # What it would hold, had it been asked
    cache.close(), other.close()


class Repeating(MemoryStore):
    "A store that tells of keys more than once, as Redis may while it grows."

    def scan(self, prefix, cursor=None, limit=1000):
        page = yield from super().scan(prefix, cursor and cursor.partition("/")[2] or None, limit)
        again = cursor is None
        return Page(page.keys + page.keys[:3], "again/" if again else None)


def test_an_entry_is_seen_once():
    cache = Cache(Repeating())
    for n in range(10):
        keep(cache, key_of(n))
    assert sorted(one.key for one in drive(look(cache))) == [key_of(n) for n in range(10)]


def test_past_its_ttl_and_without_end():
    class Noon(Clock):
        def now(self):
            return 1000.0

    cache = Cache.from_url("memory://", clock=Noon())
    keep(cache, key_of(1), born=100.0, ttl=60.0), keep(cache, key_of(2), born=100.0, ttl=None)
    stale, lasting = sorted(drive(look(cache)))
    assert (stale.left, lasting.left, lasting.ttl) == (-840.0, None, None)


def test_removing_takes_what_was_seen_and_nothing_else(cache):
    now = cache.clock.now()
    for n in range(2500):
        keep(cache, key_of(n), born=now - n, name="app.ask") if n < 40 else None
    drive(cache.store.put_many([Item(key_of(n), codec.encode(n, born=now - n, seal=key_of(n).encode()), 600.0) for n in range(40, 2500)]))
    old = drive(look(cache, older=1000))
    assert {int(one.key[-64:], 16) for one in old} >= set(range(1002, 2500))
    assert drive(remove(cache, old)) == len(old) and drive(remove(cache, old)) == 0
    assert len(drive(look(cache))) == 2500 - len(old)
    assert asyncio.run(adrive(remove(cache, drive(look(cache, limit=5))))) == 5


def test_entries_that_come_and_go_meanwhile_hurt_nobody(cache):
    for n in range(1500):
        keep(cache, key_of(n))
    met = []

    def take(key, blob):
        met.append(key)
        if len(met) == 1:
            drive(cache.store.delete([key_of(n) for n in range(0, 1500, 2)]))
            drive(cache.store.put_many([Item(key_of(n), b"junk", 60.0) for n in range(5000, 5010)]))
        return True

    drive(walk(cache, take))
    assert len(met) == len(set(met)) and {key_of(n) for n in range(1, 1500, 2)} <= set(met)


def test_large_entries_are_read_a_few_at_a_time(cache, monkeypatch):
    for n in range(60):
        keep(cache, key_of(n), bytes(300_000))
    asked, store = [], shared(cache)
    read = store.get_many
    monkeypatch.setattr(store, "get_many", lambda wanted: asked.append(len(wanted)) or read(wanted))
    assert len(drive(look(cache))) == 60
    assert max(asked) <= 10 and max(asked[1:]) * 300_000 <= 2**20 and len(asked) > 10


def test_hits_come_from_a_store_that_counts_them():
    cache = Cache.from_url("memory://")
    keep(cache, key_of(1)), keep(cache, key_of(2))

    def hottest(n):
        assert n == 10_000
        return {key_of(1): 42}
        yield

    cache.store.hottest = hottest
    assert [one.hits for one in sorted(drive(look(cache)))] == [42, 0]


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (None, "None"), (True, "bool"), (0, "int"), (-5, "int"), (-500, "int"), (2**40, "int"), (2**80, "int"), (1.5, "float"), ("", "str"),
        (b"", "bytes"), (bytearray(), "bytearray"), ([], "list"), ([1] * 20, "list"), ([1] * 70_000, "list"), ({}, "dict"),
        ({str(n): n for n in range(20)}, "dict"), ({1: 2}, "dict"), ((1,), "tuple"), ({1}, "set"), (Answer("x"), f"{__name__}.Answer"),
        ([0.5] * 16, "list"), ([[b"a"], b"b"], "list"), ([[], b"b"], "list"),
    ],
)
def test_the_type_is_told_without_the_value(value, name):
    assert type_name(Payload(*to_payload(value))) == name
