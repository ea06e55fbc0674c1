"""Long runs: order, failures, interruptions, pace, retries, batches, the bar."""
from __future__ import annotations

import asyncio
import contextvars
import copy
import datetime
import gc
import itertools
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest

from aurea_orchestrator import Cache, cache_embedding, cache_llm_response, cached, pacing, use_cache
from aurea_orchestrator.entries import PAGE_BYTES
from aurea_orchestrator.errors import BackendRefusedError, BackendUnavailableError, BatchError, ConfigError, UnkeyableError
from aurea_orchestrator.events import Clock
from aurea_orchestrator.pacing import Pace, asked_to_wait, backoff, estimated, passing
from aurea_orchestrator.plans import Plan
from aurea_orchestrator.runs import RunError, arun_all, run_all

ROOT = Path(__file__).resolve().parents[1]


class Time:
    "A clock that only sleeping moves forward."

    def __init__(self): self.at, self.slept, self.lock = 1000.0, [], threading.Lock()

    def tick(self): return self.at

    def sleep(self, seconds):
        with self.lock: self.slept.append(seconds); self.at += seconds

    @property
    def clock(self): return Clock(self.tick, self.tick)


@pytest.fixture(autouse=True)
def cache():
    with use_cache(Cache.from_url("memory://")) as cache: yield cache


@pytest.fixture
def calls(): return []


@pytest.fixture
def ask(calls):
    @cache_llm_response
    def ask(prompt, model="m", temperature=0.0):
        calls.append(prompt)
        if "bad" in str(prompt): raise OSError(f"secret {prompt}")
        return f"{prompt}/{model}/{temperature}"
    return ask


@pytest.fixture
def aask(calls):
    @cache_llm_response
    async def aask(prompt, model="m"):
        calls.append(prompt)
        await asyncio.sleep(0.001)
        if "bad" in str(prompt): raise OSError("no")
        return f"{prompt}/{model}"
    return aask


@pytest.fixture
def embed(calls):
    @cache_embedding
    def embed(texts, model="m"):
        calls.append(list(texts))
        return [[float(len(t)), float(len(model))] for t in texts]
    return embed


def quiet(fn, inputs, **options): return run_all(fn, inputs, **{"progress": False, **options})


# ---- inputs and order

@pytest.mark.parametrize("make", [list, tuple, iter, pd.Series, pl.Series, np.array, lambda x: (i for i in x), lambda x: dict.fromkeys(x).keys(), pd.Index],
                         ids=["list", "tuple", "iter", "pandas", "polars", "numpy", "generator", "keys", "index"])
def test_any_list_of_inputs_in_order_and_the_same_keys(ask, calls, make):
    words = [f"w{i}" for i in range(40)]
    assert quiet(ask, make(words)) == [f"{w}/m/0.0" for w in words]
    assert Counter(calls) == Counter(words)
    calls.clear()
    assert [ask(w) for w in words] == [f"{w}/m/0.0" for w in words] and calls == []  # a plain call finds what the run stored
    assert all(type(c) is str for c in calls)


def test_numbers_of_a_column_are_plain_numbers(calls):
    @cached("sum")
    def add(n): calls.append(type(n)); return n + 1
    assert quiet(add, pd.Series([1, 2])) == quiet(add, np.array([1, 2])) == quiet(add, pl.Series([1, 2])) == [2, 3]
    assert calls == [int, int]


def test_dates_of_a_column_are_plain_dates(calls):
    @cached("age")
    def age(day): calls.append(type(day)); return str(day)
    days, years = [datetime.datetime(2026, 1, 2, 3), datetime.datetime(2026, 1, 3)], datetime.timedelta(days=2)
    assert quiet(age, pd.Series(days)) == quiet(age, days) == [str(day) for day in days]
    assert quiet(age, pd.Series([years])) == [str(years)] and set(calls) == {datetime.datetime, datetime.timedelta} and len(calls) == 3
    assert quiet(age, pd.Series([days[0], None]), errors="return")[0] == str(days[0])
    for unit in ("ns", "us", "s"):
        assert quiet(age, np.array(days, f"datetime64[{unit}]")) == [str(day) for day in days]
        assert quiet(age, np.array([years], f"timedelta64[{unit}]")) == [str(years)]


def test_an_argument_without_a_name_is_given_by_its_place():
    @cache_embedding(cache=Cache.from_url("memory://"))
    def embed(texts, /): return [[float(len(text))] for text in texts]
    assert quiet(embed, ["ab", "c"]) == [[2.0], [1.0]]


@pytest.mark.slow
def test_large_batches_that_are_written_at_once_are_all_stored(tmp_path, caplog):
    url = f"sqlite:///{tmp_path}/c.db"
    @cache_embedding
    def embed(texts): return [[0.5] * 3072 for _ in texts]
    with use_cache(Cache.from_url(url)) as cache:
        quiet(embed, [f"text {n}" for n in range(3000)])
        cache.close()
    with use_cache(Cache.from_url(url)) as cache:
        assert len(cache.entries(kind="embedding")) == 3000 and not caplog.records
        cache.close()


def test_results_are_in_order_though_calls_end_in_another():
    @cached("late")
    def late(n): time.sleep((5 - n) * 0.01); return n
    assert quiet(late, range(6), concurrency=6) == list(range(6))


def test_dictionaries_are_arguments_and_common_ones_are_said_once(ask):
    rows = [{"prompt": "a"}, {"prompt": "b", "temperature": 0.7}, {"prompt": "a", "model": "x"}, "plain"]
    assert quiet(ask, rows, model="big") == ["a/big/0.0", "b/big/0.7", "a/x/0.0", "plain/big/0.0"]


def test_an_input_is_for_the_first_argument_that_is_open(calls):
    @cache_llm_response(ignore="client")
    def ask(client, prompt): return f"{client}:{prompt}"
    assert quiet(ask, ["a"], client="c") == ["c:a"]

    @cached("only")
    def only(a, /, b=2): return a, b
    assert quiet(only, [1], b=3) == [(1, 3)]

    @cached("rest")
    def rest(*args): return list(args)
    assert quiet(rest, [1, 2]) == [[1], [2]]


@pytest.mark.parametrize("wrong, says", [("a text", "str is one input"), (b"x", "bytes is one input"), (np.array("abc"), "is one input"), (np.array(7), "no list of inputs"), ({"prompt": "x"}, "dict is one input"),
                                         (pd.DataFrame({"a": [1]}), "a table"), (pl.DataFrame({"a": [1]}), "a table"), (7, "no list of inputs")])
def test_what_is_no_list_is_refused_before_anything_is_asked(ask, calls, wrong, says):
    with pytest.raises(ConfigError, match=says): quiet(ask, wrong)
    assert calls == []


@pytest.mark.parametrize("options", [{"concurrency": 0}, {"concurrency": 2.5}, {"concurrency": True}, {"errors": "ignore"}, {"rpm": 0}, {"tpm": -1},
                                     {"retries": -1}, {"delay": float("nan")}, {"batch_size": 0}, {"concurency": 3}, {"on": "OSError"}, {"on": [OSError, 429]}])
def test_options_that_cannot_work_are_refused(ask, calls, options):
    with pytest.raises(ConfigError): quiet(ask, ["a"], **options)
    assert calls == []


def test_a_function_that_is_not_cached_is_refused():
    with pytest.raises(ConfigError, match="not a cached function"): quiet(len, ["a"])


def test_nothing_and_one(ask):
    assert quiet(ask, []) == [] and quiet(ask, iter(())) == [] and quiet(ask, ["a"]) == ["a/m/0.0"]


def test_an_iterator_is_not_read_ahead(calls):
    taken, most = 0, []
    @cached("slow")
    def slow(n): most.append(taken - len(calls)); calls.append(n); return n
    def source():
        nonlocal taken
        for n in range(500): taken += 1; yield n
    assert quiet(slow, source(), concurrency=3) == list(range(500))
    assert max(most) <= 4


def test_an_iterator_that_waits_does_not_hold_up_what_came(ask):
    "Results are put in their places while the next input is not there yet."
    def source():
        yield "a"
        for _ in range(200):
            if ask.cache_info().misses and ask(prompt="a"): break
            time.sleep(0.01)
        else: raise AssertionError("the first call waited for the second input")
        yield "b"
    assert quiet(ask, source(), concurrency=2) == ["a/m/0.0", "b/m/0.0"]


@pytest.mark.parametrize("concurrency", [1, 4])
def test_an_iterator_that_breaks_ends_the_run_with_its_own_error(ask, aask, concurrency):
    def source(): yield "a"; yield "b"; raise LookupError("the file ends here")
    with pytest.raises(LookupError, match="ends here"): quiet(ask, source(), concurrency=concurrency)
    with pytest.raises(LookupError, match="ends here"): quiet(aask, source(), concurrency=concurrency)
    assert quiet(ask, ["a", "b"]) and ask.cache_info().hits == 2


# ---- duplicates

def test_duplicates_are_computed_once_and_each_counts_as_a_lookup(ask, calls):
    out = quiet(ask, ["a", "b", "a", {"prompt": "a", "temperature": 0.0}, "b"], concurrency=8)
    assert out == ["a/m/0.0", "b/m/0.0", "a/m/0.0", "a/m/0.0", "b/m/0.0"] and sorted(calls) == ["a", "b"]
    assert ask.cache_info()[:2] == (3, 2)


def test_duplicates_have_values_of_their_own():
    @cached("box")
    def box(n): return {"n": [n]}
    one, two = quiet(box, [1, 1])
    one["n"].append(2)
    assert two == {"n": [1]}


def test_duplicates_of_a_failure_fail_without_another_try(ask, calls):
    out = quiet(ask, ["bad", "a", "bad"], errors="return")
    assert out[0] is out[2] and isinstance(out[0], OSError) and calls.count("bad") == 1


@pytest.mark.filterwarnings("ignore:.*not cached")
def test_duplicates_of_what_is_not_stored_are_computed_once_too(calls):
    @cached("odd")
    def odd(n): calls.append(n); return iter([n])
    one, two = quiet(odd, [1, 1])
    assert one is two and calls == [1]
    with use_cache(Cache.from_url("memory://", enabled=False)):
        @cached("off")
        def off(n): calls.append(n); return [n]
        calls.clear()
        assert quiet(off, [1, 1, 2]) == [[1], [1], [2]] and sorted(calls) == [1, 2]


def test_a_refresh_of_all_computes_each_once(ask, calls):
    quiet(ask, ["a", "b"])
    calls.clear()
    assert quiet(ask, ["a", "b", "a"], bypass_cache=True) == ["a/m/0.0", "b/m/0.0", "a/m/0.0"] and sorted(calls) == ["a", "b"]
    assert ask.cache_info().outcomes == {"miss": 2, "bypass": 2, "hit": 1}


# ---- errors

def test_errors_are_raised_when_everything_else_is_done(ask, calls):
    with pytest.raises(RunError) as info: quiet(ask, ["a", "bad one", "b", "bad two", "c"], concurrency=1)
    assert "2 of 5 inputs failed, at position 1 (OSError), 3 (OSError)" in str(info.value)
    assert "bad" not in str(info.value) and "secret" not in str(info.value)
    assert list(info.value.errors) == [1, 3] and info.value.results[::2] == ["a/m/0.0", "b/m/0.0", "c/m/0.0"]
    assert info.value.results[1] is info.value.errors[1] is info.value.__cause__
    calls.clear()
    with pytest.raises(RunError): quiet(ask, ["a", "bad one", "b", "bad two", "c"])
    assert sorted(calls) == ["bad one", "bad two"]


def test_errors_as_values(ask):
    out = quiet(ask, ["a", "bad", "b"], errors="return")
    assert out[0] == "a/m/0.0" and isinstance(out[1], OSError) and out[2] == "b/m/0.0"


def test_the_error_can_be_copied_and_sent(ask):
    with pytest.raises(RunError) as info: quiet(ask, ["a", "bad", "b"])
    for other in (copy.copy(info.value), pickle.loads(pickle.dumps(info.value))):
        assert str(other) == str(info.value) and other.results[0] == "a/m/0.0" and list(other.errors) == [1] and type(other.errors[1]) is OSError


def test_many_failures_make_a_short_message(ask):
    with pytest.raises(RunError) as info: quiet(ask, [f"bad {n}" for n in range(300)])
    assert "300 of 300" in str(info.value) and "and 292 more" in str(info.value) and len(str(info.value)) < 400


def test_what_has_no_key_or_does_not_fit_fails_alone(ask):
    out = quiet(ask, ["a", object(), {"prompt": "b", "nonsense": 1}, {}], errors="return")
    assert out[0] == "a/m/0.0" and isinstance(out[1], UnkeyableError) and isinstance(out[2], TypeError) and isinstance(out[3], TypeError)


# ---- async, streams, methods

async def test_amap_shares_the_loop_and_keeps_to_its_number():
    now, most, loops = 0, 0, set()
    @cached("wide")
    async def wide(n):
        nonlocal now, most
        now += 1; most = max(most, now); loops.add(asyncio.get_running_loop())
        await asyncio.sleep(0.001)
        now -= 1
        return n
    assert await arun_all(wide, range(30), concurrency=5, progress=False) == list(range(30))
    assert most == 5 and loops == {asyncio.get_running_loop()}


async def test_map_of_an_async_function_inside_of_a_running_loop(aask):
    assert quiet(aask, ["a", "b", "a"]) == ["a/m", "b/m", "a/m"] and aask.cache_info()[:2] == (1, 2)
    with pytest.raises(RunError): quiet(aask, ["bad"])


def test_map_of_an_async_function_without_a_loop(aask):
    assert quiet(aask, ["a", "b"]) == ["a/m", "b/m"] == quiet(aask, ["a", "b"])


async def test_amap_of_a_blocking_function_leaves_the_loop_free(calls):
    gate = threading.Event()
    @cached("block")
    def block(n): assert gate.wait(10); return threading.current_thread() is threading.main_thread()
    async def opens(): await asyncio.sleep(0.01); gate.set()
    out, _ = await asyncio.gather(arun_all(block, [1, 2], progress=False), opens())
    assert out == [False, False]


async def test_a_run_that_only_hits_lets_others_run():
    ticks = itertools.count()
    with use_cache(Cache.from_url("memory://", clock=Clock(time.time, lambda: next(ticks) / 1000))):
        @cached("quick")
        async def quick(n): return n
        await arun_all(quick, range(2000), progress=False)
        beats, done = 0, False
        async def heart():
            nonlocal beats
            while not done: beats += 1; await asyncio.sleep(0)
        beating = asyncio.create_task(heart())
        await arun_all(quick, range(2000), concurrency=1, progress=False)
        done = True
        await beating
        assert beats > 50   # every 20 ms, here every 20 hits; without it half a dozen


async def test_streams_are_collected(calls):
    @cache_llm_response
    def stream(prompt): calls.append(prompt); yield from prompt.split()
    @cache_llm_response
    async def astream(prompt):
        calls.append(prompt)
        for word in prompt.split(): yield word
    for _ in range(2):
        assert quiet(stream, ["a b", "c"]) == [["a", "b"], ["c"]] == await arun_all(astream, ["a b", "c"], progress=False)
        assert await arun_all(stream, ["a b", "c"], progress=False) == quiet(astream, ["a b", "c"]) == [["a", "b"], ["c"]]
    assert sorted(calls) == ["a b", "a b", "c", "c"]


def test_methods():
    class Agent:
        def __init__(self, model): self.model = model
        @cache_llm_response
        def ask(self, prompt, end="."): return f"{self.model}: {prompt}{end}"
        @cache_llm_response
        async def aask(self, prompt): return f"{self.model}: {prompt}"
        @cache_embedding
        def embed(self, texts): return [[float(len(t) + len(self.model))] for t in texts]
    small, large = Agent("small"), Agent("large model")
    assert quiet(small.ask, ["hi", "ho"], end="!") == ["small: hi!", "small: ho!"] and quiet(large.ask, ["hi"]) == ["large model: hi."]
    assert quiet(small.aask, ["hi"]) == ["small: hi"] and quiet(small.embed, ["a", "bb", "a"]) == [[6.0], [7.0], [6.0]]


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_context_variables_are_carried_and_not_changed(concurrency):
    who = contextvars.ContextVar("who", default="nobody")
    @cached("who")
    def ask(n): seen = who.get(); who.set("worker"); return seen
    @cached("awho")
    async def aask(n): seen = who.get(); who.set("worker"); return seen
    who.set("me")
    assert quiet(ask, [1], concurrency=concurrency) == ["me"] and quiet(aask, [1], concurrency=concurrency) == ["me"]
    assert await arun_all(ask, [2], concurrency=concurrency, progress=False) == ["me"] == await arun_all(aask, [2], progress=False)
    assert who.get() == "me"


def test_runs_within_runs():
    @cached("inner")
    def inner(n): return n * n
    @cached("outer")
    def outer(n): return sum(quiet(inner, range(n), concurrency=2))
    assert quiet(outer, range(6), concurrency=3) == [0, 0, 1, 5, 14, 30]
    assert inner.cache_info().misses == 5 and outer.cache_info()[:2] == (0, 6)


# ---- interrupted

SCRIPT = """
import asyncio, signal, sys, time
from aurea_orchestrator import Cache, cached, use_cache
from aurea_orchestrator.runs import run_all
how, url, log = sys.argv[1:]
use_cache(Cache.from_url(url))
def note(n):
    with open(log, "a") as f: f.write(f"{n}\\n")
@cached("job", version=1)
def job(n):
    time.sleep(0.05); note(n); return n * n
@cached("ajob", version=1)
async def ajob(n):
    await asyncio.sleep(0.05); note(n); return n * n
async def inside():
    signal.signal(signal.SIGINT, signal.default_int_handler)   # As in a notebook's cell
    return run_all(ajob, range(40), concurrency=4, progress=False)
try:
    if how == "inside": out = asyncio.run(inside())
    else: out = run_all(job if how == "sync" else ajob, range(40), concurrency=4, progress=False)
except KeyboardInterrupt as error: print("STOPPED", error); sys.exit(130)
assert out == [n * n for n in range(40)], out
print("DONE")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("how", ["sync", "async", "inside"])
def test_an_interrupted_run_keeps_what_is_done_and_goes_on(tmp_path, how):
    script, log, url = tmp_path / "job.py", tmp_path / "log", f"sqlite:///{tmp_path}/cache.db"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), how, url, str(log)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    end = time.monotonic() + 60
    while (not log.exists() or len(log.read_text().split()) < 8) and time.monotonic() < end and first.poll() is None: time.sleep(0.01)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 130 and "STOPPED" in out and "of 40 inputs are done" in out, out + err
    before = log.read_text().split()
    assert 8 <= len(before) < 40
    again = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert "DONE" in again.stdout, again.stdout + again.stderr
    assert Counter(log.read_text().split()) == Counter(map(str, range(40))), "each was computed exactly once over both runs"


async def test_a_cancelled_run_says_how_far_it_is_and_goes_on(aask, calls, caplog):
    task = asyncio.create_task(arun_all(aask, [f"w{n}" for n in range(300)], concurrency=2, progress=False))
    while aask.cache_info().misses < 10: await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError): await task
    done = len(set(calls))
    assert "of 300 inputs are done" in caplog.text and done < 300
    calls.clear()
    await arun_all(aask, [f"w{n}" for n in range(300)], progress=False)
    assert 300 - done <= len(calls) <= 300 - done + 2   # those that were under way, at most


# ---- pace

def test_never_more_than_so_many_in_any_minute():
    clock = Time()
    pace, begun = Pace(5, None, clock.tick), []
    for n in range(40):
        clock.at += n % 7
        seconds, _ = pace.take(1)
        clock.at += seconds
        begun.append(clock.at)
    assert max(sum(a <= b < a + 60 for b in begun) for a in begun) == 5


def test_tokens_in_any_minute_and_a_call_that_is_too_large_goes_alone():
    clock = Time()
    pace, begun = Pace(None, 100, clock.tick), []
    for tokens in (60, 30, 20, 500, 10):
        seconds, _ = pace.take(tokens)
        clock.at += seconds
        begun.append(clock.at - 1000)
    assert begun == [0, 0, 60, 120, 180]


@pytest.mark.parametrize("limit", ["rpm", "tpm"])
def test_only_computations_are_slowed_down(calls, limit):
    clock = Time()
    with use_cache(Cache.from_url("memory://", clock=clock.clock, ttl=1e6)):
        @cache_llm_response
        def ask(prompt): calls.append(clock.at); return "an answer"
        for n in range(50): ask(f"known {n:2}")
        calls.clear()
        inputs = [f"known {n:2}" for n in range(50)] + [f"new x {n:2}" for n in range(6)]     # 8 letters: 2 tokens
        out = quiet(ask, inputs, sleep=clock.sleep, concurrency=1, **{limit: 2 if limit == "rpm" else 4})
        assert len(out) == 56 and [at - 1000 for at in calls] == [0, 0, 60, 60, 120, 120] and clock.slept == [60, 60]


async def test_pace_for_async_functions(calls):
    clock = Time()
    with use_cache(Cache.from_url("memory://", clock=clock.clock, ttl=1e6)):
        @cache_llm_response
        async def ask(prompt): calls.append(clock.at - 1000); return "an answer"
        await arun_all(ask, ["a", "b", "c", "a"], rpm=1, sleep=clock.sleep, concurrency=1, progress=False)
        assert calls == [0, 60, 120]


def test_what_was_estimated_is_corrected_by_what_was_used(calls):
    clock = Time()
    with use_cache(Cache.from_url("memory://", clock=clock.clock, ttl=1e6)):
        @cache_llm_response
        def ask(prompt, max_tokens=90): calls.append(clock.at - 1000); return {"text": "!", "usage": {"prompt_tokens": 5, "completion_tokens": 5}}
        quiet(ask, [f"q{n}" for n in range(3)], tpm=120, sleep=clock.sleep, concurrency=1)
        assert calls == [0, 0, 0]       # 90 are feared and 10 used: 10 + 10 + 90 fit into 120
        calls.clear()
        @cache_llm_response
        def more(prompt, max_tokens=10): calls.append(clock.at - 1000); return {"usage": {"total_tokens": 110, "prompt_tokens": 100, "completion_tokens": 10}}
        quiet(more, [f"q{n}" for n in range(3)], tpm=120, sleep=clock.sleep, concurrency=1)
        assert calls == [0, 60, 120]    # 10 are feared and 110 used


def test_an_answer_that_another_has_stored_meanwhile_is_taken_out_of_the_log(calls):
    clock = Time()
    with use_cache(Cache.from_url("memory://", clock=clock.clock, ttl=1e6)):
        @cache_llm_response
        def ask(prompt): calls.append(clock.at - 1000); return "!"
        def sleep(seconds): clock.sleep(seconds); ask("b"); calls.clear()
        quiet(ask, ["a", "b", "c"], rpm=1, sleep=sleep, concurrency=1)
        assert calls == [60]            # "b" was a hit after its minute, so "c" need not wait another


def test_waiting_for_the_pace_ends_when_the_run_does():
    begun = threading.Event()
    @cached("paced")
    def paced(n):
        if n: begun.wait(10); raise SystemExit(3)
        return n
    def source(): yield 0; yield 1; begun.set(); yield 2
    started = time.monotonic()
    with pytest.raises(SystemExit): quiet(paced, source(), rpm=2, concurrency=3)
    for thread in threading.enumerate():
        if thread.name.startswith("aurea-run"): thread.join(10)
    assert not any(thread.name.startswith("aurea-run") for thread in threading.enumerate()) and time.monotonic() - started < 30


async def test_waiting_for_the_pace_ends_when_an_async_run_does():
    begun = asyncio.Event()
    @cached("apaced")
    async def apaced(n):
        if n: await begun.wait(); raise LookupError("enough")
        return n
    def source():
        yield 0; yield 1; begun.set(); yield 2
        raise OSError("the disk is gone")
    started = time.monotonic()
    with pytest.raises(OSError, match="the disk"): await arun_all(apaced, source(), rpm=2, concurrency=4, progress=False)
    assert time.monotonic() - started < 30 and len(asyncio.all_tasks()) == 1


def test_runs_of_one_function_share_its_pace(calls):
    clock, trouble = Time(), iter([None] * 3 + [KeyboardInterrupt])
    with use_cache(Cache.from_url("memory://", clock=clock.clock, ttl=1e6)):
        @cache_llm_response
        def ask(prompt):
            calls.append(clock.at - 1000)
            if error := next(trouble, None): raise error
            return prompt
        def go(inputs, rpm=5): return quiet(ask, inputs, rpm=rpm, concurrency=1, sleep=clock.sleep)
        with pytest.raises(KeyboardInterrupt): go(range(10))
        assert go(range(10)) == list(range(10)) and calls == [0] * 5 + [60] * 5 + [120]
        calls.clear()
        go(range(10, 13), rpm=2)   # Another limit, over the same minute: the call at 120 is one of two
        assert calls == [120, 180, 180]
        assert ask in pacing._logs


def test_a_pace_lives_as_long_as_its_function():
    def once():
        @cached("short")
        def short(n): return n
        quiet(short, [1], rpm=5)
        assert short in pacing._logs
    size = len(pacing._logs)
    once()
    gc.collect()
    assert len(pacing._logs) <= size


def test_a_turn_that_was_reserved_and_not_used_is_given_back(calls):
    clock = Time()
    with use_cache(Cache.from_url("memory://", clock=clock.clock, ttl=1e6)):
        @cached("paced")
        def paced(n): calls.append(clock.at - 1000); return n
        def impatient(seconds): raise KeyboardInterrupt
        for _ in range(5):
            with pytest.raises(KeyboardInterrupt): quiet(paced, range(3), rpm=2, concurrency=1, sleep=impatient)
        quiet(paced, range(3), rpm=2, concurrency=1, sleep=clock.sleep)
        assert calls == [0, 0, 60]


@pytest.mark.parametrize("arguments, tokens", [({"prompt": "x" * 40}, 10), ({"prompt": "x" * 40, "max_tokens": 5}, 15), ({"p": ["xx", {"y": "zz"}], "n": 7}, 1),
                                               ({"max_completion_tokens": 8}, 8), ({"max_tokens": None, "p": None}, 0)])
def test_the_rule_for_tokens(arguments, tokens): assert estimated(arguments) == tokens


# ---- once more

def flaky(errors, value="at last"):
    left = iter(errors)
    @cached("flaky")
    def flaky(n):
        for error in left: raise error
        return value
    return flaky


def test_retries_back_off_with_full_jitter():
    clock = Time()
    with use_cache(Cache.from_url("memory://", clock=clock.clock, chance=lambda: 0.5)):
        fn = flaky([OSError(), OSError(), OSError()])
        assert quiet(fn, [1], retries=3, sleep=clock.sleep) == ["at last"] and clock.slept == [0.5, 1.0, 2.0]
        assert fn.cache_info()[:2] == (0, 4) and fn.cache_info().outcomes["error"] == 3


def test_retries_end(calls):
    fn = flaky([OSError(str(n)) for n in range(9)])
    out = quiet(fn, [1], retries=2, sleep=calls.append, errors="return")
    assert str(out[0]) == "2" and len(calls) == 2


async def test_retries_of_async_functions(calls):
    left = iter([OSError()])
    @cached("aflaky")
    async def aflaky(n):
        for error in left: raise error
        return n
    assert await arun_all(aflaky, [1], retries=1, sleep=calls.append, progress=False) == [1] and len(calls) == 1


@pytest.mark.parametrize("error, tries", [(ValueError(), 1), (UnicodeError(), 1), (TypeError(), 1), (OSError(), 2), (BackendUnavailableError(), 2), (ConfigError(), 1),
                                          (BackendRefusedError("no", 400), 1), (BackendRefusedError("slow", 429), 2), (BackendRefusedError("oh", 503), 2), (BatchError(), 1)])
def test_which_errors_may_pass(error, tries, calls):
    @cached("tried")
    def tried(n): calls.append(n); raise error
    quiet(tried, [1], retries=1, sleep=lambda s: None, errors="return")
    assert len(calls) == tries and passing(error) == (tries == 2)


@pytest.mark.parametrize("on", [ValueError, (ValueError,), [ValueError], {ValueError}])
def test_on_replaces_the_choice(calls, on):
    @cached("mine")
    def mine(n): calls.append(n); raise (ValueError if n else OSError)()
    quiet(mine, [0, 1], retries=2, on=on, sleep=lambda s: None, errors="return")
    assert sorted(calls) == [0, 1, 1, 1]


def test_the_wait_that_an_error_asks_for_comes_first():
    clock = Time()
    with use_cache(Cache.from_url("memory://", clock=clock.clock, chance=lambda: 0.5)):
        assert quiet(flaky([BackendRefusedError("slow", 429, retry_after=20)]), [1], retries=1, sleep=clock.sleep) == ["at last"]
        assert clock.slept == [20.5]
        out = quiet(flaky([BackendRefusedError("tomorrow", 429, retry_after=86400)]), [2], retries=1, sleep=clock.sleep, errors="return")
        assert isinstance(out[0], BackendRefusedError) and clock.slept == [20.5]


@pytest.mark.parametrize("said, seconds", [("7", 7), ("Thu, 01 Jan 1970 00:01:40 GMT", 100), ("soon", 0), (None, 0), ("-5", 0), ("nan", 0), (float("inf"), 0)])
def test_what_an_error_asks_for(said, seconds):
    in_header = OSError(); in_header.response = SimpleNamespace(headers={"retry-after": said})
    as_attribute = OSError(); as_attribute.retry_after = said
    assert asked_to_wait(in_header, lambda: 0.0) == asked_to_wait(as_attribute, lambda: 0.0) == seconds
    assert asked_to_wait(OSError(), lambda: 0.0) == 0


def test_backoff_is_bounded(): assert [backoff(n, 1.0) for n in (0, 1, 5, 6, 7, 10**9)] == [1, 2, 32, 60, 60, 60]


# ---- texts

def test_only_missing_texts_are_sent_in_full_batches(embed, calls):
    texts = [f"text {n}" for n in range(100)]
    embed(texts[::3])
    calls.clear()
    before = embed.cache_info()
    assert quiet(embed, texts, batch_size=10, concurrency=3) == [[float(len(t)), 1.0] for t in texts]
    assert sorted(map(len, calls)) == [6, 10, 10, 10, 10, 10, 10]
    assert sorted(t for batch in calls for t in batch) == sorted(set(texts) - set(texts[::3]))
    after = embed.cache_info()
    assert (after.hits - before.hits, after.misses - before.misses) == (34, 66)
    calls.clear()
    assert len(quiet(embed, texts)) == 100 and calls == [] and embed.cache_info().hits == after.hits + 100


def test_duplicate_texts_are_sent_once_and_counted_each(embed, calls):
    out = quiet(embed, ["a", "bb", "a", "a", "ccc"], batch_size=2)
    assert out == [[1.0, 1.0], [2.0, 1.0], [1.0, 1.0], [1.0, 1.0], [3.0, 1.0]]
    assert sorted(map(tuple, calls)) == [("a", "bb"), ("ccc",)] and embed.cache_info()[:2] == (2, 3)


def test_arrays_of_vectors():
    @cache_embedding
    def embed(texts): return np.array([[len(t), 1] for t in texts], dtype=np.float32)
    for _ in range(2):
        out = quiet(embed, pd.Series(["a", "bb", "a"]), batch_size=2)
        assert [row.dtype for row in out] == [np.float32] * 3 and [row.tolist() for row in out] == [[1, 1], [2, 1], [1, 1]]


async def test_async_texts_and_common_arguments(calls):
    @cache_embedding
    async def embed(client, texts, model="m"): calls.append((model, len(texts))); return [[1.0]] * len(texts)
    out = await arun_all(embed, (f"t{n}" for n in range(5)), client="c", model="big", batch_size=3, progress=False)
    assert out == [[1.0]] * 5 and sorted(calls) == [("big", 2), ("big", 3)]


def test_a_batch_that_fails_fails_its_texts_only(calls):
    @cache_embedding
    def embed(texts):
        calls.append(texts)
        if "bad" in texts: raise OSError("no")
        return [[1.0] for _ in texts]
    with pytest.raises(RunError) as info: quiet(embed, ["a", "b", "bad", "c", "d", "bad"], batch_size=2, concurrency=1)
    assert sorted(info.value.errors) == [2, 3, 5] and info.value.results[4] == [1.0] and len(calls) == 3


@pytest.mark.parametrize("annotation, sizes", [(str, [1, 1, 1]), (list[str], [3]), ("str | list[str]", [3])])
def test_a_function_of_one_text_is_given_one(annotation, sizes, calls):
    def embed(text): calls.append(1 if isinstance(text, str) else len(text)); return [1.0] if isinstance(text, str) else [[1.0] for _ in text]
    embed.__annotations__["text"] = annotation
    assert quiet(cache_embedding(embed), ["a", "b", "c"]) == [[1.0]] * 3 and calls == sizes


def test_a_parameter_named_text_without_annotation_is_given_one(calls):
    @cache_embedding
    def embed(text): calls.append(text); return [float(len(text))]
    assert quiet(embed, ["a", "bb"]) == [[1.0], [2.0]] and sorted(calls) == ["a", "bb"]


@pytest.mark.parametrize("size", [None, 1, 2])
@pytest.mark.parametrize("annotation", [None, Any, np.ndarray, "Texts", "list[str]", list[str], "typing.Sequence[str]"])
def test_a_function_of_lists_is_given_lists(annotation, size, calls):
    def embed(texts): calls.append(texts); return [[float(len(t))] for t in texts]
    if annotation is not None: embed.__annotations__["texts"] = annotation
    embed = cache_embedding(embed)
    texts = ["ab", "c", None, np.str_("def"), float("nan"), type("Word", (str,), {})("gh"), b"i", "ab"]
    out = quiet(embed, texts, batch_size=size, errors="return")
    assert [out[n] for n in (0, 1, 3, 5, 7)] == [[2.0], [1.0], [3.0], [2.0], [2.0]] == embed(["ab", "c", "def", "gh", "ab"])
    assert all(isinstance(out[n], TypeError) and "no text" in str(out[n]) for n in (2, 4, 6))
    assert all(type(each) is list and set(map(type, each)) == {str} for each in calls)
    assert max(map(len, calls)) == (size or 4) and sorted(itertools.chain(*calls)) == ["ab", "c", "def", "gh"] and embed.cache_info()[:2] == (6, 4)


Words = list[str]


def test_a_list_by_another_name(calls):
    def embed(batch: Words): calls.append(batch); return [[float(len(t))] for t in batch]
    assert quiet(cache_embedding(embed), ["ab", "c"], batch_size=1, concurrency=1) == [[2.0], [1.0]] and calls == [["ab"], ["c"]]


def test_a_missing_text_fails_alone(embed):
    with pytest.raises(RunError) as info: quiet(embed, pd.Series(["ab", None, "c"]))
    assert info.value.results[::2] == [[2.0, 1.0], [1.0, 1.0]] and list(info.value.errors) == [1]
    assert quiet(embed, [None, None], errors="return")[1].args and quiet(embed, ["ab", "c"]) == embed(["ab", "c"]) and embed.cache_info().misses == 2


def test_a_column_of_texts_that_is_said_once_is_no_list_of_inputs(calls):
    @cache_embedding
    def embed(texts, queries): calls.append(queries); return [[float(len(t))] for t in texts]
    assert quiet(embed, ["one", "two"], texts=["a", "bb"]) == [[[1.0], [2.0]]] * 2 and sorted(calls) == ["one", "two"]


def test_large_entries_are_looked_up_a_few_at_a_time(cache, monkeypatch):
    @cache_embedding
    def embed(texts): return [np.zeros(25_000) for _ in texts]
    texts, asked, read = [f"t{n}" for n in range(40)], [], cache.store.get_many
    quiet(embed, texts)
    monkeypatch.setattr(cache.store, "get_many", lambda wanted: asked.append(len(wanted)) or read(wanted))
    assert len(quiet(embed, [*texts, *texts])) == 80
    assert max(asked) <= 10 and sorted(asked)[len(asked) // 2] * 200_000 <= PAGE_BYTES


def test_texts_with_arguments_of_their_own(embed):
    rows = [{"texts": "a"}, {"texts": "bb", "model": "large"}, "ccc", {"texts": "a"}, "a", {"texts": None}]
    assert quiet(embed, rows, errors="return")[:5] == [[1.0, 1.0], [2.0, 5.0], [3.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    assert quiet(embed, [{"texts": ["a", "bb"]}, {"texts": ["a"], "model": "large"}]) == [[[1.0, 1.0], [2.0, 1.0]], [[1.0, 5.0]]]


def test_refreshing_texts_sends_all_in_full_batches(embed, calls):
    quiet(embed, ["a", "bb", "ccc"])
    calls.clear()
    quiet(embed, ["a", "bb", "ccc", "a"], batch_size=2, bypass_cache=True)
    assert sorted(map(len, calls)) == [1, 2] and embed.cache_info().outcomes == {"miss": 3, "bypass": 3, "hit": 1}


def test_entries_that_are_past_their_ttl_count_as_missing(calls):
    clock = Time()
    with use_cache(Cache.from_url("memory://", clock=clock.clock, ttls={"embedding": 10})):
        @cache_embedding(stale=0)
        def embed(texts): calls.append(len(texts)); return [[1.0] for _ in texts]
        quiet(embed, ["a", "b"])
        clock.at += 11
        quiet(embed, ["a", "b", "c"], batch_size=3)
        assert calls == [2, 3]


def test_batches_are_paced_by_request(calls):
    clock = Time()
    with use_cache(Cache.from_url("memory://", clock=clock.clock)):
        @cache_embedding
        def embed(texts): calls.append(clock.at - 1000); return [[1.0] for _ in texts]
        quiet(embed, [f"t{n}" for n in range(6)], batch_size=2, rpm=1, concurrency=1, sleep=clock.sleep)
        assert calls == [0, 60, 120]


# ---- the bar

def test_the_bar_says_what_became_of_it(ask, capsys):
    ask("a")
    with pytest.raises(RunError): run_all(ask, ["a", "b", "bad", "b"], delay=0, concurrency=1)
    said = capsys.readouterr().err
    assert "ask: 100%" in said and "4/4" in said and "hits=2, misses=2, errors=1" in said and "s computed" in said


def test_the_bar_counts_texts(embed, capsys):
    embed(["a"])
    run_all(embed, ["a", "bb", "a", "ccc"], delay=0, batch_size=2)
    assert "4/4" in (said := capsys.readouterr().err) and "hits=2, misses=2, errors=0" in said


USED = {"prompt_tokens": 100_000, "completion_tokens": 100_000}


@pytest.mark.parametrize("how", [{}, {"model": "gpt-4o"}], ids=["default", "given"])
@pytest.mark.parametrize("nature", ["def", "async def", "generator"])
def test_the_bar_knows_money(how, nature, capsys):
    "It is that of `cache_info()`, to the last digit, also where the answer does not say who gave it."
    pytest.importorskip("genai_prices")
    @cache_llm_response
    def inner(prompt): return {"model": "gpt-4o", "usage": USED}
    if nature == "def":
        @cache_llm_response
        def ask(prompt, model="gpt-4o-mini"): inner(prompt); return {"usage": USED}
    elif nature == "async def":
        @cache_llm_response
        async def ask(prompt, model="gpt-4o-mini"): inner(prompt); return {"usage": USED}
    else:
        @cache_llm_response
        def ask(prompt, model="gpt-4o-mini"): inner(prompt); yield {"usage": USED}
    for inputs in (["a", "b"], ["b", "c"], ["c"] * 2):
        before = ask.cache_info().spent.usd
        run_all(ask, inputs, delay=0, concurrency=2, **how)
        new = ask.cache_info().spent.usd - before
        assert (f"errors=0, ${new:,.4f}" if new else "errors=0, 0.0 s computed") in capsys.readouterr().err
    assert ask.cache_info().spent.usd > 0


def test_the_bar_knows_what_texts_cost(capsys):
    clock = Time()
    with use_cache(Cache.from_url("memory://", clock=clock.clock)):
        @cache_embedding
        def embed(texts): clock.at += 7; return [[1.0] for _ in texts]
        run_all(embed, [f"t{n}" for n in range(7)], batch_size=3, delay=0, concurrency=1)
        assert "errors=0, 21.0 s computed" in capsys.readouterr().err and embed.cache_info().spent.seconds == pytest.approx(21)


@pytest.mark.parametrize("inputs, options", [(["a", "b"], {"progress": False, "delay": 0}), (["a"], {"delay": 0}), ([], {"delay": 0}), (["a", "b"], {})],
                         ids=["off", "one", "none", "short"])
def test_no_bar_where_none_is_wanted(ask, capsys, inputs, options):
    run_all(ask, inputs, **options)
    assert capsys.readouterr().err == ""


def test_two_runs_at_once_hear_only_their_own(capsys):
    gate = threading.Barrier(2)
    def make(kind):
        @cached(kind)
        def fn(n):
            if n == 0: gate.wait(10)
            return n
        return fn
    one, two = make("same"), cached("same", namespace="other")(make("same").__wrapped__)
    def go(fn, size): run_all(fn, range(size), delay=0, concurrency=1)
    threads = [threading.Thread(target=go, args=pair) for pair in ((one, 3), (two, 50))]
    for t in threads: t.start()
    for t in threads: t.join()
    said = capsys.readouterr().err
    assert "misses=3," in said and "misses=50," in said


def test_a_call_within_a_call_is_not_counted_for_the_run(capsys):
    @cache_llm_response
    def inner(n): return n
    @cache_llm_response
    def outer(n): return inner(n % 2)
    run_all(outer, range(10), delay=0, concurrency=1)
    assert "hits=0, misses=10, errors=0" in capsys.readouterr().err


def test_nobody_listens_after_a_run(cache, ask):
    with pytest.raises(RunError): quiet(ask, ["a", "bad"])
    assert not cache.bus


def test_the_bar_is_not_imported_by_the_package():
    code = "import sys, aurea_orchestrator, aurea_orchestrator.runs; print(sorted({'tqdm', 'pandas', 'numpy'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_plan_has_defaults(): assert (Plan().concurrency, Plan().errors, Plan().delay) == (8, "raise", 0.5)


# ---- as methods of the function

class TestMethods:
    async def test_map_and_amap(self, ask, aask):
        assert ask.map(["a", "b"], model="x", progress=False) == ["a/x/0.0", "b/x/0.0"] == await ask.amap(["a", "b"], model="x", progress=False)
        assert await aask.amap(["a"], progress=False) == ["a/m"] == aask.map(["a"], progress=False)

    async def test_of_an_instance(self):
        class Agent:
            def __init__(self, model): self.model = model
            @cache_llm_response
            def ask(self, prompt): return f"{self.model}: {prompt}"
        one, two = Agent("one"), Agent("two")
        assert one.ask.map(["a"], progress=False) == ["one: a"] and await two.ask.amap(["a"], progress=False) == ["two: a"]

    def test_an_argument_named_inputs(self):
        @cached("named")
        def named(x, inputs=0): return x + inputs
        assert named.map([1], inputs=2, progress=False) == [3]
