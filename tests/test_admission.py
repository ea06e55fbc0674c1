"""What is worth keeping: an answer that its model has finished, whichever API it came from."""
from __future__ import annotations

from enum import Enum, IntEnum
from types import SimpleNamespace

import pytest

from aurea_orchestrator import Cache, cache_llm_response
from aurea_orchestrator.admission import whole


def objects(thing):
    "The same answer with attributes instead of items."
    if isinstance(thing, dict):
        return SimpleNamespace(**{k: objects(v) for k, v in thing.items()})
    return [objects(x) for x in thing] if isinstance(thing, list) else thing


def chat(reason, **more): return {"object": "chat.completion", "choices": [{"index": 0, "message": {"content": "so"}, "finish_reason": reason} | more]}
def pieces(reason): return [{"choices": [{"delta": {"content": text}, "finish_reason": None}]} for text in "so"] + [chat(reason), {"choices": [], "usage": {}}]
def message(reason): return {"type": "message", "role": "assistant", "content": [{"type": "text", "text": "so"}], "stop_reason": reason}
def events(reason): return [
    {"type": "message_start", "message": message(None)}, {"type": "content_block_delta", "delta": {"text": "so"}},
    {"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": None}}, {"type": "message_stop"}]
def gemini(reason): return {"candidates": [{"content": {"parts": [{"text": "so"}]}, "finishReason": reason}]}
def snake(reason): return {"candidates": [{"content": {"parts": [{"text": "so"}]}, "finish_reason": reason}]}
def response(status, why=None): return {
    "object": "response", "status": status, "incomplete_details": why and {"reason": why}, "output": [{"type": "message", "status": status}]}
def told(status, why=None): return [
    {"type": "response.created", "response": response("in_progress")}, {"type": "response.output_text.delta", "delta": "so"},
    {"type": f"response.{status}", "response": response(status, why)}]


CUT = {
    "chat": chat("length"), "chat, filtered": chat("content_filter"), "second choice": {"choices": chat("stop")["choices"] + chat("length")["choices"]},
    "stream": pieces("length"), "Anthropic": message("max_tokens"), "Anthropic, refused": message("refusal"), "Anthropic, stream": events("max_tokens"),
    "Gemini": gemini("MAX_TOKENS"), "Gemini, filtered": gemini("SAFETY"), "Gemini, Python": snake("MAX_TOKENS"), "Gemini, stream": [gemini(None), gemini("RECITATION")],
    "Responses": response("incomplete", "max_output_tokens"), "Responses, stream": told("incomplete", "max_output_tokens"), "Responses, failed": response("failed"),
    "Responses, bare": {"status": "incomplete", "incomplete_details": {"reason": "content_filter"}}, "Responses, to come": response("queued"),
    "Bedrock": {"stopReason": "max_tokens"}, "Ollama": {"message": {"content": "so"}, "done_reason": "length"},
    "LangChain": {"content": "so", "response_metadata": {"finish_reason": "length"}},
    "wrapped": {"response": chat("length")}, "wrapped too": {"message": message("max_tokens")}, "Instructor": {"name": "so", "_raw_response": chat("length")},
}
GOOD = {
    **{f"chat, {reason}": chat(reason) for reason in ("stop", "tool_calls", "function_call", "", None)}, "stream": pieces("stop"), "stream of tools": pieces("tool_calls"),
    **{f"Anthropic, {reason}": message(reason) for reason in ("end_turn", "tool_use", "stop_sequence", None)},
    **{f"Anthropic, stream, {reason}": events(reason) for reason in ("end_turn", "tool_use", "stop_sequence", None)},
    "Gemini": gemini("STOP"), "Gemini, Python": snake("STOP"), "Gemini, stream": [gemini(None), gemini("FINISH_REASON_UNSPECIFIED"), gemini("STOP")],
    "Responses": response("completed"), "Responses, stream": told("completed"), "wrapped": {"response": chat("stop")},
    "vLLM": chat("stop", stop_reason="\n\n"), "vLLM, token": chat("stop", stop_reason=128001), "Bedrock": {"stopReason": "end_turn"}, "Ollama": {"done_reason": "stop"},
    "an own status": {"status": "incomplete", "todo": ["more"]}, "an own list": {"choices": ["a", "b"], "candidates": "c", "delta": 0.5, "message": "m"},
    "nothing": {}, "rows": [{"status": "failed"}, {"response": "text"}, "text", 1.5, None],
}


@pytest.mark.parametrize("form", [lambda x: x, objects], ids=["dicts", "objects"])
@pytest.mark.parametrize("kept, answer", [*((False, a) for a in CUT.values()), *((True, a) for a in GOOD.values())],
                         ids=[*(f"cut: {n}" for n in CUT), *(f"good: {n}" for n in GOOD)])
def test_only_what_its_model_has_finished_is_kept(form, kept, answer):
    assert whole(form(answer)) is kept
    assert whole(("the text", form(answer))) is kept or answer == response("queued")  # In a list it is the first word of a stream


def test_reasons_may_be_enums():
    class Text(str, Enum): STOP, MAX_TOKENS = "STOP", "MAX_TOKENS"  # noqa: UP042  as SDKs have it
    class Number(IntEnum): FINISH_REASON_UNSPECIFIED, STOP, MAX_TOKENS = range(3)
    class Lower(Enum): ENDED, CUT = "stop", "length"
    assert all(whole(objects(gemini(reason))) for reason in (Text.STOP, Number.STOP, Number.FINISH_REASON_UNSPECIFIED, Lower.ENDED))
    assert not any(whole(objects(gemini(reason))) for reason in (Text.MAX_TOKENS, Number.MAX_TOKENS, Lower.CUT))


@pytest.mark.parametrize("kept", [True, False])
def test_answers_of_an_sdk(kept):
    from openai.types.chat import ChatCompletion, ChatCompletionChunk
    from openai.types.responses import Response, ResponseCompletedEvent, ResponseCreatedEvent, ResponseIncompleteEvent
    reason, status, Ended = ("stop", "completed", ResponseCompletedEvent) if kept else ("length", "incomplete", ResponseIncompleteEvent)
    base = {"id": "i", "created": 1, "model": "m"}
    said = ChatCompletion.model_validate(base | {"object": "chat.completion", "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "so"}, "finish_reason": reason}]})
    chunks = [ChatCompletionChunk.model_validate(base | {"object": "chat.completion.chunk", "choices": choices}) for choices in (
        [{"index": 0, "delta": {"content": "so"}, "finish_reason": None}], [{"index": 0, "delta": {}, "finish_reason": reason}], [])]
    def of(status): return Response.model_validate({"id": "r", "created_at": 1, "model": "m", "object": "response", "output": [], "parallel_tool_calls": False,
        "tool_choice": "auto", "tools": [], "status": status, "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None})
    stream = [ResponseCreatedEvent.construct(type="response.created", response=of("in_progress"), sequence_number=0),
              Ended.construct(type=f"response.{status}", response=of(status), sequence_number=1)]
    assert [whole(answer) for answer in (said, chunks, of(status), stream)] == [kept] * 4


def test_nothing_of_a_value_is_used_up_or_followed_without_end():
    class Own:
        def __init__(self): self.choices, self.message = iter([chat("length")]), self
    own = Own()
    assert whole(own) and next(own.choices)


@pytest.mark.parametrize("name", ["Anthropic, stream", "Gemini", "Responses, stream", "wrapped"])
def test_what_was_cut_short_is_asked_for_again(name):
    calls, cut, cache = [], CUT[name], Cache.from_url("memory://")
    @cache_llm_response(cache=cache)
    def ask(prompt): calls.append(1); return cut
    @cache_llm_response(cache=cache)
    def stream(prompt): calls.append(1); yield from cut
    if isinstance(cut, list):
        assert list(stream("p")) == list(stream("p")) == cut and len(calls) == 2
    else:
        assert ask("p") == ask("p") == cut and len(calls) == 2
