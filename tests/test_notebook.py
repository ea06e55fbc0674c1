"""Magics and displays in a real kernel."""
from __future__ import annotations

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
        self.manager, self.client = jupyter_client.manager.start_new_kernel(kernel_name="python3", env={**__import__("os").environ, "CACHE_URL": url})

    def run(self, code):
        "All that a cell shows: text, and HTML where it has some; errors raise."
        shown, html = [], []
        def hear(message):
            content = message["content"]
            if message["msg_type"] == "stream": shown.append(content["text"])
            if message["msg_type"] in ("execute_result", "display_data"):
                shown.append(content["data"].get("text/plain", ""))
                html.append(content["data"].get("text/html", ""))
            if message["msg_type"] == "error": shown.append(f"{content['ename']}: {content['evalue']}")
        self.client.execute_interactive(code, output_hook=hear, timeout=60)
        self.html = "".join(html)
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
