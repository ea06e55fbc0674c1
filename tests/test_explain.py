"""Why a call is a hit or a miss: what past answers count for, and what the search for the nearest call reads."""
from __future__ import annotations

import pytest

from aurea_orchestrator import Cache, cache_embedding, cache_llm_response, explain
from aurea_orchestrator.effects import drive
from aurea_orchestrator.entries import shared
from aurea_orchestrator.events import Clock
from aurea_orchestrator.stores.memory import MemoryStore


class Counting(MemoryStore):
    "Counts what is read, and how much at once."

    def __init__(self): super().__init__(); self.scans, self.reads = 0, []

    def scan(self, prefix, cursor=None, limit=1000):
        self.scans += 1
        return (yield from super().scan(prefix, cursor, limit))

    def get_many(self, wanted):
        self.reads.append(len(wanted))
        return (yield from super().get_many(wanted))


@pytest.fixture
def cache(): return Cache(Counting())


def asked(fn, *texts): return [(fn.key(text), {"texts": text}) for text in texts]


def test_what_is_past_its_ttl_is_an_answer_as_far_as_stale_reaches():
    at = [1000.0]
    cache = Cache.from_url("memory://", clock=Clock(lambda: at[0], lambda: at[0]))
    @cache_llm_response(cache=cache, ttl=60, stale=3600)
    def ask(prompt): return prompt
    ask("a")
    at[0] += 160
    def told(**more): return drive(explain.explain(cache, ask.key("a"), ask.name, ask._who, {"prompt": "a"}, **more))
    assert told().outcome == told(stale=100.0).outcome == told(stale=3600.0).outcome == "stale"
    for stale in (0.0, 99.0):
        assert told(stale=stale).outcome == "miss" and "expired 1 minute ago" in told(stale=stale).why and "stale=" in told(stale=stale).why


def test_one_search_serves_all_texts(cache):
    @cache_embedding(cache=cache)
    def embed(texts, model="m"): return [[1.0] for _ in texts]
    embed([f"t{n}" for n in range(300)])
    calls = [(embed.key([f"new{n}"], model="x")[0], {"texts": f"new{n}" if n else "t7", "model": "x"}) for n in range(20)]
    cache.store.scans, cache.store.reads = 0, []
    told = drive(explain.explain_all(cache, [*calls, (embed.key(["t5"])[0], {})], embed.name, embed._who))
    assert cache.store.scans == 1 and sum(cache.store.reads) == 21 + 300
    assert [one.outcome for one in told] == ["miss"] * 20 + ["hit"]
    assert [d.path for d in told[0].differences] == ["model"] and told[0].nearest == embed.key(["t7"])[0]
    assert [d.path for d in told[1].differences] == ["texts", "model"]
    assert told[3] == drive(explain.explain(cache, *calls[3][:1], embed.name, embed._who, calls[3][1]))


def test_no_more_is_read_than_is_allowed_whosever_it_is(cache, monkeypatch):
    @cache_llm_response(cache=cache)
    def other(prompt): return prompt
    @cache_llm_response(cache=cache)
    def ask(prompt): return prompt
    for n in range(2500): other(f"p{n}")
    monkeypatch.setattr(explain, "MOST", 1000)
    cache.store.reads = []
    assert "never asked" in drive(explain.explain(cache, ask.key("a"), ask.name, ask._who, {"prompt": "a"})).why
    assert 1000 <= sum(cache.store.reads) <= 1001 and max(cache.store.reads) <= 100


def test_large_entries_are_read_a_few_at_a_time(cache):
    @cache_llm_response(cache=cache)
    def ask(prompt): return bytes(300_000)
    for n in range(40): ask(f"p{n}")
    cache.store.reads = []
    assert drive(explain.explain(cache, ask.key("a"), ask.name, ask._who, {"prompt": "a"})).nearest
    assert max(cache.store.reads) <= 10 and max(cache.store.reads[2:]) <= 3


def test_the_search_pushes_nothing_out_of_the_memory(redis_url):
    cache, other = Cache.from_url(redis_url, timeout=5.0), Cache.from_url(redis_url, timeout=5.0)
    @cache_llm_response(cache=cache, namespace="n")
    def ask(prompt): return prompt
    with_other = cache_llm_response(cache=other, namespace="n")(ask.__wrapped__)
    for n in range(50): with_other(f"p{n}")
    assert ask("p0") == "p0" and shared(cache) is not cache.store
    assert ask.explain("new").nearest and cache.stats()["store"]["memory_entries"] <= 1
    assert [ask(f"p{n}") for n in range(50)] and cache.stats()["store"]["memory_entries"] == 50  # What it would hold, had it been asked
    cache.close(), other.close()
