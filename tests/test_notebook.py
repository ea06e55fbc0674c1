"""Magics and displays in a real kernel."""
from __future__ import annotations

import os
import signal
import threading

import pytest

jupyter_client = pytest.importorskip("jupyter_client")
pytestmark = pytest.mark.slow

SETUP = """
%load_ext aurea_orchestrator
from aurea_orchestrator import cache_llm_response, cache_embedding, get_cache
calls = []
@cache_llm_response
def ask(prompt, temperature=0.2): calls.append(prompt); return prompt.upper()
@cache_llm_response
async def aask(prompt): calls.append(prompt); return prompt.upper()
"""


class Kernel:
    def __init__(self, url):
        self.manager, self.client = jupyter_client.manager.start_new_kernel(kernel_name="python3", env={**os.environ, "CACHE_URL": url})

    def run(self, code):
        "All that a cell shows: text, and HTML where it has some, and errors; how it ended is in `status`, how many errors were shown in `errors`."
        shown, html, errors = [], [], []
        def hear(message):
            content = message["content"]
            if message["msg_type"] == "stream": shown.append(content["text"])
            if message["msg_type"] in ("execute_result", "display_data"):
                shown.append(content["data"].get("text/plain", ""))
                html.append(content["data"].get("text/html", ""))
            if message["msg_type"] == "error": shown.append(f"{content['ename']}: {content['evalue']}"); errors.append(content["ename"])
        self.status = self.client.execute_interactive(code, output_hook=hear, timeout=60)["content"]["status"]
        self.html, self.errors = "".join(html), errors
        return "".join(shown)

    def complete(self, code):
        reply = self.client.complete(code, reply=True, timeout=30)
        return reply["content"]["matches"]

    def stop(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def kernel(tmp_path):
    kernel = Kernel(f"sqlite:///{tmp_path}/c.db")
    kernel.run(SETUP)
    yield kernel
    kernel.stop()


def test_the_magics(kernel):
    kernel.run('ask("p"); await aask("p")')
    assert "1 of" not in kernel.html
    shown = kernel.run("%aurea stats")
    assert "Aurea cache" in shown and "<table" in kernel.html and "llm" in kernel.html
    assert "temperature" in kernel.run('%aurea explain ask("p", temperature=0.7)')
    assert "hit" in kernel.run('%aurea explain aask("p")')
    assert kernel.run("len(calls)") == "2"
    assert kernel.run("%aurea mode").strip() == "the cache is in the mode on"
    shown = kernel.run('%%aurea offline\nprint(ask("p"))\nask("never")')
    assert "P\n" in shown and "OfflineMissError" in shown and kernel.run("%aurea mode").strip().endswith("on")
    kernel.run('%%aurea refresh\nask("p"); ask("p")')
    kernel.run('%%aurea refresh\nawait aask("p")')
    assert kernel.run("len(calls)") == "5"
    assert kernel.run("%aurea mode offline").strip().endswith("offline") and "OfflineMissError" in kernel.run('await aask("new")')
    assert "OfflineMissError" in kernel.run('ask.refresh("p")')
    kernel.run("%aurea mode on")
    assert kernel.run("%aurea clear ask").startswith("1 answers") and kernel.run("%aurea clear all").startswith("1 answers")


def test_what_is_wrong_is_said(kernel):
    for line, word in {"": "stats, explain", "clear": "say what", "hello": "stats, explain", "mode hello": "refresh", "explain ask": "wants a call", "explain ask(": "wants a call",
                       "explain print(1)": "not a cached function", "clear Hello!": "neither a kind"}.items():
        assert "UsageError" in (said := kernel.run(f"%aurea {line}")) and word in said, line
    assert "no mode" in kernel.run("%%aurea hello\n1")


@pytest.mark.parametrize("code, name", [('ask("never")', "OfflineMissError"), ('await aask("never")', "OfflineMissError"), ("1/0", "ZeroDivisionError"), ("await aask(1/0)", "ZeroDivisionError"),
                                        ("def f(:", "SyntaxError"), ("raise SystemExit(3)", "SystemExit"), ("%%aurea on\n1/0", "ZeroDivisionError")])
def test_a_cell_in_a_mode_fails_where_its_code_fails(kernel, code, name):
    shown = kernel.run(f"%%aurea offline\n{code}")
    assert kernel.status == "error" and kernel.errors == [name], shown
    assert kernel.run("%aurea mode").strip().endswith("on") and kernel.status == "ok"
    assert "ZeroDivisionError" in kernel.run("1/0") and kernel.errors == ["ZeroDivisionError"]


@pytest.mark.parametrize("loop", ["for n in range(100): done.append(await slow(n))", "for n in range(100): done.append(n); time.sleep(0.1)"], ids=["await", "block"])
def test_an_interrupt_ends_a_cell_in_a_mode(kernel, loop):
    kernel.run("""import asyncio, time
done = []
@cache_llm_response
async def slow(n): await asyncio.sleep(0.1); return n""")
    threading.Timer(2.0, os.kill, [kernel.manager.provisioner.pid, signal.SIGINT]).start()
    assert "KeyboardInterrupt" in kernel.run(f"%%aurea refresh\n{loop}") and kernel.status == "error" and len(kernel.errors) == 1
    reached = int(kernel.run("len(done)"))
    assert 0 < reached < 100 and kernel.run("get_cache().current_mode") == "'on'"
    assert int(kernel.run("time.sleep(0.5); len(done)")) == reached


def test_context_variables_reach_a_cell_that_awaits(kernel):
    kernel.run("import contextvars; who = contextvars.ContextVar('who', default='nobody'); token = who.set('me')")
    assert kernel.run("who.get()") == kernel.run("%%aurea on\nimport asyncio; await asyncio.sleep(0); who.get()")


def test_a_line_is_taken_as_it_stands(kernel):
    kernel.run('name, k = "world", 7; ask("hello {name}"); ask("costs $name"); ask({"k": 5}["k"].__str__())')
    for code in ('ask("hello {name}")', 'ask("costs $name")', 'ask(str({"k": 5}["k"]))'):
        assert kernel.run(f"%aurea explain {code}").startswith("hit"), code


def test_only_cached_functions_are_cleared(kernel):
    kernel.run("""import functools
@functools.lru_cache
def fib(n): return n
class Bot:
    @cache_llm_response(ignore="self")
    def ask(self, prompt): return prompt
bot = Bot(); bot.ask("x"); fib(3)""")
    kernel.run("%aurea clear fib")
    assert "not a cached function" in kernel.run("%aurea explain fib(3)")
    assert kernel.run("fib.cache_info().currsize") == "1" and "fib" not in kernel.complete("%aurea clear ") and "ask" in kernel.complete("%aurea clear ")
    assert kernel.run('%aurea explain bot.ask("x")').startswith("hit")
    assert kernel.run("%aurea clear bot.ask").startswith("1 answers") and kernel.run('%aurea explain bot.ask("x")').startswith("miss")
    assert "neither a kind" in kernel.run("%aurea clear bot.nothing")


def test_completion_and_help(kernel):
    assert {"stats", "clear", "explain", "mode"} <= set(kernel.complete("%aurea "))
    assert set(kernel.complete("%aurea mode ")) >= {"on", "refresh", "offline", "off"}
    assert {"ask(", "aask("} <= set(kernel.complete("%aurea explain "))
    assert "offline" in kernel.complete("%%aurea of")
    reply = kernel.client.inspect("%aurea", reply=True, timeout=30)
    assert "compute the answers of this cell anew" in reply["content"]["data"]["text/plain"]


def test_a_function_and_its_numbers_are_tables(kernel):
    kernel.run('ask("p")')
    for what in ("ask", "ask.cache_info()", "get_cache().stats()", 'ask.explain("p")'):
        assert kernel.run(what) and "<table" in kernel.html, what


def test_two_kernels_share_their_answers(kernel, tmp_path):
    kernel.run('ask("p")')
    other = Kernel(f"sqlite:///{tmp_path}/c.db")
    try:
        other.run(SETUP)
        other.run('answer = ask("p")')
        assert other.run("answer, calls") == "('P', [])"
    finally: other.stop()
