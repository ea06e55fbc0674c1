"""A batch of 1,000 cached embeddings of 1,536 floats, against the bytes alone and against redisvl."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import redis
from redisvl.extensions.cache.embeddings import EmbeddingsCache

from aurea_orchestrator import Cache, cache_embedding
from bench.cases import Case, Lab

TEXTS, FLOATS = 1000, 1536


def embeddings(lab: Lab) -> Iterator[Case]:
    "Rows of numpy."
    lab.empty()
    texts, asked = [f"text number {i}" for i in range(TEXTS)], []
    vectors = np.random.default_rng(0).standard_normal((TEXTS, FLOATS), dtype=np.float32)

    @cache_embedding(cache=Cache.from_url(lab.url, timeout=10))
    def embed(texts: list[str]) -> Any:
        asked.append(len(texts))
        return vectors[:len(texts)]

    assert np.array_equal(embed(texts), vectors) and np.array_equal(embed(texts), vectors) and asked == [TEXTS], "not hits"
    with redis.Redis.from_url(lab.redis.url) as client:
        client.mset({f"raw:{text}": row.tobytes() for text, row in zip(texts, vectors, strict=True)})
        names = [f"raw:{text}" for text in texts]

        def raw() -> Any: return [np.frombuffer(data, np.float32) for data in client.mget(names)]

        ours = lab.timed(lambda: embed(texts), TEXTS, 0.2)
        yield Case("1,000 embeddings in Redis", "MGET + numpy.frombuffer", ours, lab.timed(raw, TEXTS, 0.2), most=1.5)
        theirs = EmbeddingsCache(redis_url=lab.redis.url)
        theirs.mset([{"content": text, "model_name": "m", "embedding": row.tolist()} for text, row in zip(texts, vectors, strict=True)])
        assert len(theirs.mget(texts, "m")[0]["embedding"]) == FLOATS
        faster = [lambda side=side: 1e6 / side() for side in (ours, lab.timed(lambda: theirs.mget(texts, "m"), TEXTS, 0.2))]
        yield Case("1,000 embeddings in Redis", "redisvl mget", faster[0], faster[1], "texts/s", least=20.0, rounds=5)


CASES = (embeddings,)
