"""What a computation cost, read from the answers of real SDKs."""
from __future__ import annotations

import json
import subprocess
import sys
from collections import namedtuple
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurea_orchestrator import costs
from aurea_orchestrator.costs import Cost, cost_of

prices = pytest.importorskip("genai_prices")

tokens = st.integers(0, 10**9)
small = st.floats(0, 1e6, allow_nan=False)
some_cost = st.builds(Cost, small, tokens, tokens, small)


def objects(thing):
    "The same answer with attributes instead of items."
    if isinstance(thing, dict):
        return SimpleNamespace(**{k: objects(v) for k, v in thing.items()})
    return [objects(x) for x in thing] if isinstance(thing, list) else thing


# ---- arithmetic

@given(some_cost, st.integers(1, 300))
def test_rows_of_a_batch_add_up_to_the_batch(cost, n):
    rows = cost.shared(n)
    total = Cost()
    for row in rows:
        total = total.plus(row)
    assert len(rows) == n
    assert total[1:3] == cost[1:3] and all(type(t) is int for row in rows for t in row[1:3])
    given_out = [r.prompt_tokens for r in rows]
    assert given_out[0] - given_out[-1] <= 1 and given_out == sorted(given_out, reverse=True)
    assert total.seconds == pytest.approx(cost.seconds) and total.usd == pytest.approx(cost.usd)


@given(some_cost, st.integers(0, 50))
def test_times_is_plus_again_and_again(cost, n):
    total = Cost()
    for _ in range(n):
        total = total.plus(cost)
    assert total[1:3] == cost.times(n)[1:3] and total.seconds == pytest.approx(cost.times(n).seconds)


def test_no_rows_no_parts():
    assert Cost(1, 2, 3, 4).shared(0) == [] and Cost(1, 2, 3, 4).shared(1) == [Cost(1, 2, 3, 4)]


# ---- shapes

def chat(prompt, completion, cached, **more):
    return {"id": "c1", "object": "chat.completion", "created": 1, "model": "gpt-4o", "choices": [],
            "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
                      "prompt_tokens_details": {"cached_tokens": cached}}} | more


@given(tokens, tokens, tokens)
def test_openai_chat_as_dict_and_object_and_json(prompt, completion, cached):
    from openai.types.chat import ChatCompletion
    raw = chat(prompt, completion, cached)
    want = cost_of(raw, 1.5)
    assert want[:3] == (1.5, prompt, completion)
    assert cost_of(ChatCompletion.model_validate(raw), 1.5) == cost_of(objects(raw), 1.5) == cost_of(json.loads(json.dumps(raw)), 1.5) == want


@given(tokens, tokens, tokens)
def test_openai_responses(prompt, completion, cached):
    from openai.types.responses import Response, ResponseCompletedEvent, ResponseTextDeltaEvent
    usage = {"input_tokens": prompt, "output_tokens": completion, "total_tokens": prompt + completion,
             "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
    raw = {"id": "r1", "created_at": 1, "model": "gpt-4o", "object": "response", "output": [], "parallel_tool_calls": False,
           "tool_choice": "auto", "tools": [], "usage": usage}
    whole = Response.model_validate(raw)
    events = [ResponseTextDeltaEvent.construct(type="response.output_text.delta", delta="a"),
              ResponseCompletedEvent.construct(type="response.completed", response=whole, sequence_number=2)]
    assert cost_of(raw, 1)[:3] == (1, prompt, completion)
    assert cost_of(whole, 1) == cost_of(events, 1) == cost_of(raw, 1)


def test_openai_embeddings_and_a_list_of_their_batches():
    from openai.types import CreateEmbeddingResponse
    batch = CreateEmbeddingResponse.model_validate({"object": "list", "model": "text-embedding-3-small", "data": [], "usage": {"prompt_tokens": 7, "total_tokens": 7}})
    assert cost_of(batch, 1)[:3] == (1, 7, 0)
    assert cost_of([batch, batch], 1)[:3] == (1, 14, 0) == cost_of([batch.model_dump()] * 2, 1)[:3]


@pytest.mark.parametrize("form", [lambda x: x, objects], ids=["dicts", "objects"])
def test_a_stream_is_one_answer_and_two_answers_are_two(form):
    from openai.types.chat import ChatCompletionChunk
    def chunk(usage, id_="s1"):
        return {"id": id_, "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o", "choices": [], "usage": usage}
    last = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}
    stream = [chunk(None)] * 40 + [chunk(last)]
    assert cost_of(form(stream), 1)[:3] == (1, 9, 4)
    assert cost_of([ChatCompletionChunk.model_validate(x) for x in stream], 1) == cost_of(stream, 1)
    counting = [chunk({"prompt_tokens": 9, "completion_tokens": n, "total_tokens": 9 + n}) for n in range(1, 5)]  # vLLM: continuous_usage_stats
    assert cost_of(form(counting), 1)[:3] == (1, 9, 4)
    assert cost_of(form([chunk(last, "s1"), chunk(last, "s2")]), 1)[:3] == (1, 18, 8)
    assert cost_of(form([chat(1, 2, 0, id="a"), chat(10, 20, 0, id="b")]), 1)[:3] == (1, 11, 22)
    assert cost_of(("the text", form(chat(1, 2, 0))), 1)[:3] == (1, 1, 2)


@pytest.mark.parametrize("form", [lambda x: x, objects], ids=["dicts", "objects"])
@given(fresh=tokens, read=tokens, wrote=tokens, completion=st.integers(2, 10**9))
def test_anthropic_counts_its_cache_beside_the_prompt(form, fresh, read, wrote, completion):
    usage = {"input_tokens": fresh, "output_tokens": completion, "cache_read_input_tokens": read, "cache_creation_input_tokens": wrote,
             "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": wrote}, "service_tier": "standard"}
    message = {"id": "m1", "type": "message", "model": "claude-sonnet-4-5-20250929", "content": [], "usage": usage}
    want = (1, fresh + read + wrote, completion)
    assert cost_of(form(message), 1)[:3] == want
    events = [{"type": "message_start", "message": message | {"usage": usage | {"output_tokens": 1}}}, {"type": "content_block_delta", "delta": {"text": "a"}},
              {"type": "message_delta", "delta": {}, "usage": {"output_tokens": completion}}, {"type": "message_stop"}]
    assert cost_of(form(events), 1) == cost_of(form(message), 1)
    assert cost_of({"usage": {"inputTokens": fresh, "outputTokens": completion, "cacheReadInputTokens": read, "cacheWriteInputTokens": wrote}}, 1)[:3] == want  # Bedrock


def test_litellm_reports_the_cache_both_ways_and_it_counts_once():
    usage = {"prompt_tokens": 1000, "completion_tokens": 5, "total_tokens": 1005, "prompt_tokens_details": {"cached_tokens": 900},
             "cache_read_input_tokens": 900, "cache_creation_input_tokens": 50}
    assert cost_of({"model": "claude-sonnet-4-5", "usage": usage}, 1)[:3] == (1, 1000, 5)


@given(tokens, tokens, tokens, tokens)
def test_google(prompt, answer, thoughts, cached):
    snake = {"usage_metadata": {"prompt_token_count": prompt, "candidates_token_count": answer, "thoughts_token_count": thoughts, "cached_content_token_count": cached}, "model_version": "gemini-2.5-flash"}
    camel = {"usageMetadata": {"promptTokenCount": prompt, "candidatesTokenCount": answer, "thoughtsTokenCount": thoughts, "cachedContentTokenCount": cached}, "modelVersion": "gemini-2.5-flash"}
    if prompt or answer:
        assert cost_of(snake, 1)[:3] == (1, prompt, answer + thoughts)
    assert cost_of(snake, 1) == cost_of(objects(snake), 1) == cost_of(camel, 1) == cost_of([camel, camel], 1)


def test_others_who_wrap_an_answer():
    assert cost_of({"model": "llama3", "message": {"role": "assistant"}, "prompt_eval_count": 26, "eval_count": 298}, 1) == Cost(1, 26, 298)     # Ollama
    assert cost_of({"text": "a", "prompt_tokens": 1, "completion_tokens": 2}, 1) == Cost(1, 1, 2)                                               # one's own
    assert cost_of({"prompt_tokens": 100}, 1) == Cost(1)                                              # a row of a table is no usage record
    lang = SimpleNamespace(usage_metadata={"input_tokens": 5, "output_tokens": 6, "input_token_details": {"cache_read": 4}}, response_metadata={"model_name": "gpt-4o"})
    assert cost_of(lang, 1) == cost_of(chat(5, 6, 4), 1)
    user = SimpleNamespace(name="Ann", _raw_response=objects(chat(5, 6, 4)))                            # Instructor
    assert cost_of(user, 1) == cost_of(chat(5, 6, 4), 1)


# ---- never raises

class Angry:
    def __getattribute__(self, name):
        raise RuntimeError(name)


class Loop:
    @property
    def response(self): return self
    message = response


class Rising:
    usage = property(lambda self: {"prompt_tokens": Angry(), "completion_tokens": 3})


junk = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5) | st.binary(max_size=5),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["usage", "message", "response", "prompt_tokens", "input_tokens", "output_tokens", "model", "id", "x"]), inner, max_size=5), max_leaves=12)


@given(junk)
def test_any_value_has_a_cost(value):
    for one in (value, objects(value), [value] * 20):
        cost = cost_of(one, 2.0)
        assert cost.seconds == 2.0 and type(cost.prompt_tokens) is int is type(cost.completion_tokens)
        assert 0 <= cost.prompt_tokens < 21 << 53 and 0 <= cost.completion_tokens < 21 << 53 and cost.usd >= 0


def test_odd_values():
    numpy, pandas = pytest.importorskip("numpy"), pytest.importorskip("pandas")
    Named = namedtuple("Named", "usage")
    values = [Angry(), Loop(), MagicMock(), lambda: 1, Cost, numpy.zeros((3, 3)), numpy.float64(1), pandas.DataFrame({"usage": [1], "model": [2]}), b'{"usage": {"prompt_tokens": 3}}',
              '{"usage": {"prompt_tokens": 3}}', [], (), {}, [Angry()] * 3, Named(None), {"usage": [1, 2]}, {"usage": {"prompt_tokens": True}}, {"usage": {"prompt_tokens": float("nan")}},
              {"usage": {"prompt_tokens": 1 << 60}}, {"usage": {"prompt_tokens": "12"}}]
    for value in values:
        assert cost_of(value, 3.0) == Cost(3.0), type(value)
    assert cost_of(Named({"prompt_tokens": 2.0, "completion_tokens": 1}), 3.0)[:3] == (3.0, 2, 1)
    assert cost_of(Rising(), 3.0)[:3] == (3.0, 0, 3)


# ---- dollars

def listed(model, provider=None, **usage):
    return float(prices.calc_price(prices.Usage(**usage), model, provider_id=provider).total_price)


def test_prices_are_those_of_the_library():
    assert cost_of(chat(1000, 100, 0), 1).usd == listed("gpt-4o", input_tokens=1000, output_tokens=100) > 0
    assert cost_of(chat(1000, 100, 800), 1).usd == listed("gpt-4o", input_tokens=1000, output_tokens=100, cache_read_tokens=800)
    assert cost_of(chat(1000, 100, 800), 1).usd < cost_of(chat(1000, 100, 0), 1).usd
    assert cost_of(chat(1000, 100, 5000), 1).usd == cost_of(chat(1000, 100, 1000), 1).usd > 0  # More cached than sent: nonsense, with a price
    claude = {"model": "claude-sonnet-4-5", "usage": {"input_tokens": 10, "output_tokens": 5, "cache_read_input_tokens": 20, "cache_creation_input_tokens": 30}}
    assert cost_of(claude, 1).usd == listed("claude-sonnet-4-5", input_tokens=60, output_tokens=5, cache_read_tokens=20, cache_write_tokens=30)
    claude["usage"]["cache_creation"] = {"ephemeral_5m_input_tokens": 10, "ephemeral_1h_input_tokens": 20}
    longer = cost_of(claude, 1).usd
    assert longer == listed("claude-sonnet-4-5", input_tokens=60, output_tokens=5, cache_read_tokens=20, cache_write_tokens=30, cache_write_5m_tokens=10, cache_write_1h_tokens=20)
    assert longer > 0 and longer != listed("claude-sonnet-4-5", input_tokens=60, output_tokens=5, cache_read_tokens=20, cache_write_tokens=30)
    flex = cost_of(chat(1000, 100, 0, model="o3", service_tier="flex"), 1).usd
    assert flex < cost_of(chat(1000, 100, 0, model="o3", service_tier="default"), 1).usd == listed("o3", input_tokens=1000, output_tokens=100)


@pytest.mark.parametrize("model,plain,provider", [
    ("text-embedding-3-small", "text-embedding-3-small", "openai"), ("openai/gpt-4o-mini", "gpt-4o-mini", "openai"), ("models/gemini-2.5-flash", "gemini-2.5-flash", None),
    ("anthropic/claude-sonnet-4", "claude-sonnet-4", "anthropic"), ("GPT-4o", "gpt-4o", None)])
def test_spellings_of_a_model(model, plain, provider):
    usage = {"usage": {"prompt_tokens": 1000, "completion_tokens": 0}}
    assert cost_of(usage | {"model": model}, 1).usd == listed(plain, provider, input_tokens=1000) > 0
    assert cost_of(usage, 1, model).usd == cost_of(usage | {"model": model}, 1).usd


def test_who_is_asked_counts_where_the_answer_names_nobody_listed():
    assert cost_of(chat(10, 1, 0, model="gpt-4o"), 1, "gpt-4o-mini") == cost_of(chat(10, 1, 0, model="gpt-4o"), 1)
    assert cost_of(chat(10, 1, 0, model="my-deployment"), 1, "gpt-4o-mini") == cost_of(chat(10, 1, 0, model="gpt-4o-mini"), 1)
    assert cost_of(chat(10, 1, 0, model="my-deployment"), 1) == Cost(1, 10, 1, 0.0) == cost_of(chat(10, 1, 0, model=None), 1)


def test_tokens_without_the_library_or_with_one_that_fails(monkeypatch):
    monkeypatch.setattr(prices, "calc_price", lambda *a, **k: 1 / 0)
    assert cost_of(chat(10, 1, 0), 1) == Cost(1, 10, 1)
    costs._library.cache_clear(), costs._listed.cache_clear()
    monkeypatch.setitem(sys.modules, "genai_prices", None)
    assert cost_of(chat(10, 1, 0), 1) == Cost(1, 10, 1) and not costs.ready()
    costs._library.cache_clear(), costs._listed.cache_clear()


def test_nothing_is_fetched_and_nothing_is_imported_without_tokens():
    code = """
import socket, sys, threading
def no(*a, **k): raise SystemExit("a connection")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = no
from aurea_orchestrator.costs import Cost, cost_of
assert cost_of("text", 1) == cost_of({"usage": None}, 1) == Cost(1)
assert not {"genai_prices", "openai", "numpy", "rich"} & set(sys.modules), "imported for nothing"
assert cost_of({"model": "gpt-4o", "usage": {"prompt_tokens": 5, "completion_tokens": 1}}, 1).usd > 0
assert threading.active_count() == 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
