"""One cached answer of 1.5 KB through a decorator: in this process, in SQLite, in Redis."""
from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from aurea_orchestrator import Cache, cache_llm_response
from bench.cases import ANSWER, ASKED, Case, Lab, Upstream, hit

SURE = {"timeout": 5.0}  # Seconds: a busy machine must not turn a hit into a miss


def blocking(lab: Lab, url: str) -> Callable[[], Any]:
    "A hit of ours for a function."
    upstream, cache = Upstream(), Cache.from_url(url, **SURE)
    cached = cache_llm_response(cache=cache)(upstream.function())
    call = functools.partial(cached, **ASKED)
    hit(upstream, call)
    return call


def awaiting(lab: Lab, url: str) -> Callable[[], Any]:
    "A hit of ours for an `async def`."
    upstream, cache = Upstream(), Cache.from_url(url, **SURE)
    cached = cache_llm_response(cache=cache)(upstream.afunction())
    call = functools.partial(cached, **ASKED)
    hit(upstream, call, lab.wait)
    return call


def cashews_call(lab: Lab, url: str, **options: Any) -> Callable[[], Any]:
    "A hit of cashews."
    from cashews import Cache as Cashews

    upstream, cache = Upstream(), Cashews()
    cache.setup(url, **options)
    call = functools.partial(cache(ttl="1h")(upstream.afunction()), **ASKED)
    hit(upstream, call, lab.wait)
    return call


def memory(lab: Lab) -> Iterator[Case]:
    "Against cashews, which knows only async functions, and against the floor."
    peer, sync, coro = cashews_call(lab, "mem://"), blocking(lab, "memory://"), awaiting(lab, "memory://")
    yield Case("hit in process, def", "cashews mem://", lab.timed(sync), lab.awaited(peer), most=0.1)
    yield Case("hit in process, async def", "cashews mem://", lab.awaited(coro), lab.awaited(peer), most=0.1)
    upstream = Upstream()
    floor = functools.partial(functools.lru_cache(upstream.function()), **ASKED)
    yield Case("hit in process, def", "functools.lru_cache (no key, no copy)", lab.timed(sync), lab.timed(floor))


def sqlite(lab: Lab) -> Iterator[Case]:
    "Against what keeps answers in files."
    import diskcache
    import joblib

    ours = lab.timed(blocking(lab, f"sqlite:///{lab.folder}/ours.sqlite?memory=0"))
    upstream = Upstream()
    theirs = functools.partial(joblib.Memory(lab.folder / "joblib", verbose=0).cache(upstream.function()), **ASKED)
    hit(upstream, theirs)
    yield Case("hit in SQLite, def", "joblib.Memory", ours, lab.timed(theirs), most=0.5)
    with diskcache.Cache(str(lab.folder / "diskcache")) as shelf:
        theirs = functools.partial(shelf.memoize()(upstream.function()), **ASKED)
        hit(upstream, theirs)
        yield Case("hit in SQLite, def", "diskcache", ours, lab.timed(theirs))


def redis(lab: Lab) -> Iterator[Case]:
    "Against the client alone: one GET, and what it got decoded."
    import redis
    import redis.asyncio

    lab.empty()
    plain, client = msgspec.json.encode(ANSWER), redis.asyncio.Redis.from_url(lab.redis.url)
    with redis.Redis.from_url(lab.redis.url) as blocked:
        blocked.set("plain", plain)
        yield Case("hit in Redis, def", "redis-py GET + decode", lab.timed(blocking(lab, lab.url)),
                   lab.timed(lambda: msgspec.json.decode(blocked.get("plain"))), most=1.25)
    coro = awaiting(lab, lab.url)

    async def get() -> Any: return msgspec.json.decode(await client.get("plain"))

    yield Case("hit in Redis, async def", "redis-py GET + decode", lab.awaited(coro), lab.awaited(get), most=1.25)
    peer = cashews_call(lab, lab.redis.url, pickle_type="json")
    yield Case("hit in Redis, async def", "cashews", lab.awaited(coro), lab.awaited(peer))
    upstream = Upstream()
    from aiocache import RedisCache, cached
    from aiocache.serializers import JsonSerializer
    peer = functools.partial(cached(cache=RedisCache, port=lab.redis.port, serializer=JsonSerializer())(upstream.afunction()), **ASKED)
    hit(upstream, peer, lab.wait)
    yield Case("hit in Redis, async def", "aiocache", lab.awaited(coro), lab.awaited(peer))
    lab.wait(client.aclose())


def tier(lab: Lab) -> Iterator[Case]:
    "With the memory tier before Redis, as it comes; cashews has a client-side cache."
    lab.empty()
    peer, coro = cashews_call(lab, lab.redis.url, pickle_type="json", client_side=True), awaiting(lab, lab.redis.url)
    yield Case("hit in Redis behind memory, async def", "cashews, client-side cache", lab.awaited(coro), lab.awaited(peer))


def together(lab: Lab) -> Iterator[Case]:
    "A hundred at once, each another key; throughput."
    import redis.asyncio

    lab.empty()
    n, upstream, cache = 100, Upstream(), Cache.from_url(lab.url, **SURE)
    cached = cache_llm_response(cache=cache)(upstream.afunction())
    client, prompts = redis.asyncio.Redis.from_url(lab.redis.url), [f"question {i}" for i in range(n)]

    async def ours() -> Any: return await asyncio.gather(*[cached(prompt) for prompt in prompts])
    async def theirs() -> Any: return await asyncio.gather(*[client.get(prompt) for prompt in prompts])

    lab.wait(client.mset(dict.fromkeys(prompts, msgspec.json.encode(ANSWER))))
    lab.wait(ours()), lab.wait(ours())
    assert upstream.asked == n, "not hits"
    ratio = [lab.awaited(ours, n), lab.awaited(theirs, n)]
    faster = [lambda side=side: 1e6 / side() for side in ratio]
    yield Case("100 hits at once in Redis", "redis-py GET", faster[0], faster[1], "hits/s", least=4.0)
    lab.wait(client.aclose())


def litellm(lab: Lab) -> Iterator[Case]:
    "`acompletion` with its cache on; last, because importing it changes much."
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"                     # Else it asks the network
    import litellm

    litellm.suppress_debug_info, litellm.telemetry = True, False
    said = [{"role": "user", "content": ASKED["prompt"]}]

    async def ask() -> Any:
        return await litellm.acompletion(model="gpt-4o-mini", messages=said, mock_response=ANSWER["response"], caching=True)

    for where, how, url in (("in process", {"type": "local"}, "memory://"),
                            ("in Redis", {"type": "redis", "host": "127.0.0.1", "port": lab.redis.port, "password": ""}, lab.url)):
        litellm.cache = litellm.Cache(**how)
        lab.wait(ask()), lab.wait(asyncio.sleep(0.3))                       # It stores aside
        first, again = lab.wait(ask()), lab.wait(ask())
        assert first.id == again.id, "not a hit"
        yield Case(f"hit {where}, async def", "litellm acompletion", lab.awaited(awaiting(lab, url)), lab.awaited(ask, seconds=0.1))


CASES = (memory, sqlite, redis, tier, together)
LAST = (litellm,)
