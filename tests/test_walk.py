"""A whole analysis in fresh processes: interrupted, continued, asked otherwise, shipped, run again without a model."""
from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.service import ROOT
from tools.nbrun import wiped

TEXTS = [f"question {n % 40}" for n in range(50)]  # 40 that differ
DIFFERENT = set(TEXTS)
CROWD = 4

# What stands in a notebook. `think` is the model: a line in a log before it answers, and one after.
ANALYSIS = """
import asyncio, json, sys, time
from datetime import timedelta
from aurea_orchestrator import cache_embedding, cache_llm_response, get_cache

mode, log, folder = sys.argv[1:4]
texts = json.load(open(folder + "/texts.json"))

def note(*words):
    with open(log, "a") as file: file.write(json.dumps(words) + "\\n")

if mode == "forbidden":
    def think(*_): note("called"); raise SystemExit("a model was called")
    vector = think
else:
    def think(text):
        note("begun", text)
        time.sleep(0.05)
        note("done", text)
        return len(text) % 7
    def vector(text): note("vector", text); return [float(len(text)), 0.5]

@cache_llm_response(ttl=timedelta(days=30))
{define} classify(text, instructions, model="gpt-4o-mini"):
    answer = {think}
    return {{"model": model, "choices": [{{"message": {{"content": f"{{instructions}} {{answer}}"}}}}],
            "usage": {{"prompt_tokens": 10, "completion_tokens": 2}}}}

@cache_embedding(ttl=timedelta(days=30))
def embed(texts):
    return [vector(text) for text in texts]

def analysis(instructions):
    return classify.map(texts, instructions=instructions, concurrency={crowd}, progress=False), embed.map(texts, progress=False)
"""
KINDS = {"def": ("def", "think(text)"), "async def": ("async def", "await asyncio.to_thread(think, text)")}


class Desk:
    "Somebody with a folder, a cache in it, and the analysis in a script."

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.log = folder, folder / "log"
        define, think = KINDS[kind]
        self.code = ANALYSIS.format(define=define, think=think, crowd=CROWD)
        (folder / "texts.json").write_text(json.dumps(TEXTS))

    def begin(self, last: str, mode: str = "on", **settings: str) -> subprocess.Popen[str]:
        "A fresh process, that does the analysis and a line more."
        script = self.folder / "analysis.py"
        script.write_text(self.code + last)
        env = wiped(os.environ, self.folder) | {"CACHE_URL": f"sqlite:///{self.folder}/cache.sqlite", "PYTHONPATH": str(ROOT), **settings}
        return subprocess.Popen([sys.executable, str(script), mode, str(self.log), str(self.folder)], env=env, cwd=self.folder,
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, last: str, mode: str = "on", **settings: str) -> tuple[int, str, str]:
        process = self.begin(last, mode, **settings)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def said(self, *, clear: bool = True) -> list[list[str]]:
        "What was noted since the last look."
        if not self.log.exists(): return []
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        if clear: self.log.unlink()
        return lines

    def asked(self, word: str = "done") -> Counter[str]:
        return Counter(text for each, text in self.said() if each == word)


@pytest.fixture(params=list(KINDS))
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Desk:
    return Desk(tmp_path, request.param)


ANSWERS = "print(json.dumps(analysis('short')))"
OFFLINE = {"CACHE_URL": "memory://", "CACHE_MODE": "offline"}  # An empty store: all there is comes from the cassette


@pytest.mark.slow
def test_interrupted_and_continued(desk):
    stopped = desk.begin("analysis('short')")
    while len([1 for word, _ in desk.said(clear=False) if word == "done"]) < 12:
        assert stopped.poll() is None, stopped.communicate()
        time.sleep(0.01)
    stopped.send_signal(signal.SIGINT)
    _, err = stopped.communicate(timeout=30)
    assert stopped.returncode in (-signal.SIGINT, 130, 1) and "KeyboardInterrupt" in err
    told = re.search(r"classify: (\d+) of 50 inputs are done.*; what was computed is in the cache", err)
    assert told, err
    before = desk.said()
    begun, done = ({text for word, text in before if word == which} for which in ("begun", "done"))
    assert 12 - CROWD <= int(told[1]) <= len(begun) < len(DIFFERENT), "it did not stop"

    code, out, err = desk.run(ANSWERS)
    assert code == 0, err
    asked = desk.asked()
    assert set(asked) | done == DIFFERENT and set(asked.values()) == {1}
    lost = set(asked) & done   # A call that awaits is cancelled; what its thread came to nevertheless has nobody to store it
    assert not lost if "async" not in desk.code else len(lost) <= CROWD
    answers, vectors = json.loads(out)
    assert [one["choices"][0]["message"]["content"] for one in answers] == [f"short {len(text) % 7}" for text in TEXTS]
    assert vectors == [[len(text), 0.5] for text in TEXTS]

    code, again, err = desk.run(ANSWERS)
    assert code == 0 and again == out and desk.said() == [], err


@pytest.mark.slow
def test_another_prompt_computes_what_depends_on_it_and_nothing_else(desk):
    assert desk.run(ANSWERS)[0] == 0
    desk.said()
    code, out, err = desk.run("found = analysis('long'); old = analysis('short'); info = classify.cache_info(); print(json.dumps([len(found[0]), info.hits, info.misses, info.spent, info.saved]))")
    assert code == 0, err
    said = desk.said()
    assert Counter(text for word, text in said if word == "done") == dict.fromkeys(DIFFERENT, 1)
    assert not [text for word, text in said if word == "vector"]
    found, hits, misses, spent, saved = json.loads(out)
    assert (found, misses, hits) == (50, 40, 10 + 50)   # 10 twins within the run; then all of the old prompt
    assert spent[1:3] == [400, 80] and saved[1:3] == [600, 120] and spent[0] >= 40 * 0.05


@pytest.mark.slow
def test_shipped_and_run_again_without_a_model(desk):
    code, out, err = desk.run(ANSWERS + "; get_cache().export('answers.jsonl', functions=[classify, embed])")
    assert code == 0, err
    desk.said()
    load = "print(get_cache().load('answers.jsonl').skipped, file=sys.stderr); "
    code, again, err = desk.run(load + ANSWERS, "forbidden", **OFFLINE)
    assert code == 0 and again == out and err == "[]\n", err

    changed = "print(json.dumps(analysis('long')))"
    code, nothing, err = desk.run(load + changed, "forbidden", **OFFLINE)
    assert code not in (0, None) and nothing == "" and "OfflineMissError" in err
    words = err.partition("OfflineMissError")[2].partition("\n")[0]
    assert "classify" in words and "`instructions`" in words and "`text`" not in words, "it names function and argument"
    assert "question" not in re.sub(r'File ".*', "", words), "and not what was asked"

    code, nothing, err = desk.run(load + "embed.map([*texts, 'never asked'])", "forbidden", **OFFLINE)
    assert code not in (0, None) and "OfflineMissError" in err and "embed" in err.partition("OfflineMissError")[2]
    assert desk.said() == [], "no function was called"
