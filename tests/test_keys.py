"A key is the same wherever the same call is made, and nowhere else."
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurea_orchestrator.call import Binder, identity
from aurea_orchestrator.errors import AureaError, ConfigError, UnkeyableError
from aurea_orchestrator.forms import canonical
from aurea_orchestrator.keys import KEY_VERSION, check_kind, check_namespace, is_key, key_for, make, make_many, prefix, split
from tests.test_call import calls, functions
from tests.test_forms import pairs, same

ROOT = Path(__file__).parent.parent
HEX = "0123456789abcdef" * 4


def ask(prompt: Any, context: Any = "", model: Any = "m") -> None: ...
def chat(messages: Any, *, temperature: float = 1.0, **options: Any) -> None: ...


# ---- the same call, the same key

@given(pairs())
def test_two_calls_share_a_key_exactly_when_they_are_the_same(pair):
    key = key_for(ask, "llm")
    a, b = pair
    def keyed(x: Any) -> str:
        try: return key(x)
        except UnkeyableError: return "none"
    assert (keyed(a) == keyed(b)) is same(a, b) or "nan" in repr(pair)


@given(functions(), calls)
def test_the_quick_way_and_the_definition_agree(fn, call):
    args, kwargs = call
    try: fields = Binder(fn)(*args, **kwargs)
    except TypeError: return
    assert key_for(fn, "llm", "team")(*args, **kwargs) == make("llm", identity(fn, "team"), fields, "team")


@pytest.mark.parametrize("value", ["", "a", "é", "\ud800", 0, -1, 2**63, 2**64, -(2**63) - 1, 0.0, -0.0, float("nan"), -float("nan"), float("inf"), True, None, b"", b"a", [], {}, ()])
def test_so_they_do_for_each_scalar(value):
    key, bind = key_for(ask, "llm"), Binder(ask)
    assert key(value) == key(prompt=value) == make("llm", identity(ask), bind(value)) == make("llm", identity(ask), [["prompt", "context", "model"], [canonical(value), "", "m"]])


def test_everything_that_is_asked_and_who_is_asked_is_in_the_key():
    def other(prompt, context="", model="m"): ...
    keys = [key_for(ask, "llm")("a"), key_for(ask, "embedding")("a"), key_for(ask, "llm", "team")("a"), key_for(ask, "llm", "team2")("a"), key_for(ask, "llm", version=1)("a"),
            key_for(ask, "llm", version="1")("a"), key_for(ask, "llm", ignore="model")("a"), key_for(other, "llm")("a"), key_for(other, "llm", "team")("a"),
            key_for(ask, "llm")("a", "b"), key_for(ask, "llm")("a", model="b"), key_for(ask, "llm")("b")]
    assert len({split(key).digest for key in keys}) == len(keys)


def test_a_function_that_became_a_stream_has_other_keys():
    def made(source: str) -> Any:
        exec(source, space := {"__name__": "some_module"})
        return space["ask"]
    plain, stream = made("def ask(prompt): return 'hello'"), made("def ask(prompt): yield 'hello'")
    for how in ({}, {"namespace": "team"}, {"version": 1}): assert key_for(plain, "llm", **how)("p") != key_for(stream, "llm", **how)("p")


@pytest.mark.parametrize("one, two", [
    ((["a", "b"],), (["a:b"],)), ((None,), ("",)), ((1,), ("1",)), ((1,), (True,)), ((1,), (1.0,)), (("a", "b"), ("ab", "")), (("a\0b",), ("a", "b")), (("", "a"), ("a", "")),
])
def test_the_collisions_of_others(one, two):
    "cashews: joined lists, None, numbers as text; litellm: texts moved from one field to the next."
    assert key_for(ask, "llm")(*one) != key_for(ask, "llm")(*two)


def test_the_collisions_of_litellm():
    key = key_for(chat, "llm")
    assert key("hi", user="u", stop="s") == key("hi", stop="s", user="u") == key(messages="hi", temperature=1.0, user="u", stop="s")
    apart = [key("hi"), key("hi", user="u", stop="s"), key("hi", user="ustop: s"), key("hi", stop="s", user="u", seed=1), key("hi", temperature=0.5), key("hi", sample=1), key("hi", sample=2)]
    assert len(set(apart)) == len(apart)


def test_a_changed_default_is_another_call():
    def first(prompt, model="a"): ...
    def second(prompt, model="b"): ...
    second.__qualname__ = first.__qualname__
    assert key_for(first, "llm")("hi") != key_for(second, "llm")("hi") == key_for(first, "llm")("hi", "b")


def test_a_wrong_call_fails_as_the_function_would():
    key = key_for(ask, "llm")
    for args, kwargs in (((), {}), ((1, 2, 3, 4), {}), ((1,), {"x": 1}), ((1,), {"prompt": 1})):
        with pytest.raises(TypeError) as theirs: ask(*args, **kwargs)
        with pytest.raises(TypeError) as ours: key(*args, **kwargs)
        assert str(ours.value) == str(theirs.value) and not isinstance(ours.value, AureaError)


# ---- everywhere

STABLE = """
import sys; sys.path.insert(0, {root!r})
from datetime import datetime, timezone
from enum import Enum
from pathlib import PurePosixPath
from aurea_orchestrator.keys import key_for, make
from aurea_orchestrator.forms import canonical
class Colour(Enum): RED = "red"
def ask(prompt, context="", model="m", **options): ...
Colour.__module__ = ask.__module__ = "some_module"
key = key_for(ask, "llm", "team")
print(key("hi"))
print(key("\\u00fc \\ud83d", 2**70, -1.5, stop=None, seed=True))
print(key([{{"role": "user", "content": "hi"}}, ("a", 1)], {{"x", "y", "z", "longer", 1, 2.5, None, frozenset({{"p", "q"}})}}, {{(1, "a"): 1, "b": 2, 3: b"c"}}))
print(key([Colour.RED, Colour, str, list[int], int | None, PurePosixPath("/a"), datetime(2024, 1, 2, 3, tzinfo=timezone.utc)]))
print(key_for(ask, "embedding", version=2, ignore="context")("hi", object()))
print(make("mine", ["who"], canonical({{"b": 1, "a": 2}})))
"""
GOLDEN = [
    "llm:team:6de46acf01424b4e358398c533ea55d74fe541a212485105d9aeffab9a7c4460",
    "llm:team:4354c69fafa676f208e1b155361e14bb47c821807ce00c6d5a9486079c6053b0",
    "llm:team:e3eecb6e487315ee5a89f802f879e2844d23336eb77b3389ca58fb1017a2dc79",
    "llm:team:764bffbb81fc78c6ac1ec051fb399c79eb16b4e9022f5b79107d6d0d83325765",
    "embedding:fcb8f83a1b46aba15808803dc9f019dcdffa3872182e36b951d65600098bf3f0",
    "mine:59bcf1897adbe393e902694ddcc8d6172dd2452f45cf5094c5de783ebcb0b6ea",
]


def keys_of(python: str, seed: str) -> list[str]:
    found = subprocess.run([python, "-c", STABLE.format(root=str(ROOT))], capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": seed})
    assert found.returncode == 0, found.stderr
    return found.stdout.split()


@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_keys_are_what_they_were_in_every_process(seed):
    "If this fails because the encoding was changed: raise KEY_VERSION, and then put the new keys here."
    assert KEY_VERSION == 1
    assert keys_of(sys.executable, seed) == GOLDEN


@pytest.mark.slow
@pytest.mark.parametrize("version", [f"python3.{minor}" for minor in range(11, 16) if minor != sys.version_info[1]])
def test_keys_are_the_same_on_another_python(version):
    python = shutil.which(version)
    if not python or subprocess.run([python, "-c", "import msgspec"], capture_output=True).returncode: pytest.skip(f"no {version} with msgspec here")
    assert keys_of(python, "3") == GOLDEN


SCRIPT = """
import sys; sys.path.insert(0, {root!r})
from aurea_orchestrator.keys import key_for
def cached(kind): return lambda fn: fn
{source}
print(key_for(ask, "llm")("hi"))
"""


def test_a_notebook_keeps_its_answers_over_a_comment_and_not_over_a_prompt(tmp_path):
    def run(source: str) -> str:
        (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT), source=source))
        return subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    base = run("@cached('llm')\ndef ask(prompt): return f'Be brief. {prompt}'")
    assert base == run("# once more\n@cached('llm')\ndef ask(\n    prompt,\n):\n    # so\n    return f'Be brief. {prompt}'") == run("def ask(prompt): return 'Be brief. ' f'{prompt}'")
    assert base != run("@cached('llm')\ndef ask(prompt): return f'Be short. {prompt}'")


def test_keys_may_be_made_in_many_threads():
    from concurrent.futures import ThreadPoolExecutor
    key = key_for(ask, "llm")
    with ThreadPoolExecutor(8) as pool: found = list(pool.map(lambda i: key("x" * 5000 + str(i % 10)), range(400)))
    assert found == [key("x" * 5000 + str(i % 10)) for i in range(400)]


# ---- what a key looks like

@pytest.mark.parametrize("kind", ["llm", "embedding", "a", "a-b_1", "a" * 32])
def test_kinds(kind):
    assert check_kind(kind) == kind and is_key(make(kind, "who", [])) and make(kind, "who", []).startswith(prefix(kind))


@pytest.mark.parametrize("kind", ["", "LLM", "1a", "-a", "a:b", "a*", "a" * 33, "a\n", "é", "a b", "{a}", None, 1, "aurea"])
def test_kinds_that_cannot_work(kind):
    for refuse in (check_kind, prefix, lambda k: make(k, "who", []), lambda k: key_for(ask, k)):
        with pytest.raises(ConfigError, match="kind"): refuse(kind)


@pytest.mark.parametrize("namespace", ["team", "Team.a_b-1", ".", "a" * 64, "1", "a" * 63, "g" + "a" * 63])
def test_namespaces(namespace):
    if namespace == "a" * 64: return
    key = make("llm", "who", [], namespace)
    assert check_namespace(namespace) == namespace and key.startswith(prefix("llm", namespace)) and split(key)[:2] == ("llm", namespace) and is_key(key)


@pytest.mark.parametrize("namespace", ["", "a:b", "a/b", "a b", "é", "a*", "a?", "[a]", "{a}", "a" * 65, HEX, HEX.upper(), "0" * 64, "team\n", 1, b"team"])
def test_namespaces_that_cannot_work(namespace):
    for refuse in (check_namespace, lambda n: prefix("llm", n), lambda n: make("llm", "who", [], n), lambda n: key_for(ask, "llm", n)):
        with pytest.raises(ConfigError, match="namespace"): refuse(namespace)
    assert check_namespace(None) is None


@pytest.mark.parametrize("text", ["", "llm", "llm:", f"llm:{HEX}x", f"llm:{HEX[1:]}", f"llm:{HEX.upper()}", f":{HEX}", f"LLM:{HEX}", f"llm::{HEX}", f"llm:a:b:{HEX}", f"llm:{HEX}:{HEX}",
                                  f"llm:{HEX}\n", f" llm:{HEX}", f"llm:a b:{HEX}", "session:abc", "llm:*", f"llm:{'a' * 65}:{HEX}", "aurea:counts"])
def test_what_is_no_key_of_ours(text):
    assert not is_key(text)
    with pytest.raises(ConfigError, match="no key of ours"): split(text)


@given(st.text(max_size=80))
def test_only_what_can_be_split_is_a_key(text):
    assert not is_key(text) or prefix(*split(text)[:2]) + split(text).digest == text


def test_one_kinds_prefix_is_not_the_others():
    assert not make("llm-2", "who", []).startswith(prefix("llm")) and not make("llm", "who", [], "teams").startswith(prefix("llm", "team"))
    assert make("llm", "who", [], "team").startswith(prefix("llm"))


def test_the_texts_of_one_call_have_keys_of_their_own():
    found = make_many("embedding", "who", ["fields"], ["a", "b", "a", "", "\ud800"], "team")
    assert found[0] == found[2] and len(set(found)) == 4 and all(key.startswith("embedding:team:") and is_key(key) for key in found)
    assert make_many("embedding", "who", ["fields"], []) == []
    apart = [*make_many("embedding", "who", ["fields"], ["a"]), *make_many("embedding", "who", ["other"], ["a"]), *make_many("embedding", "else", ["fields"], ["a"]),
             *make_many("llm", "who", ["fields"], ["a"]), make("embedding", "who", ["fields", "a"]), make("embedding", "who", ["fields"]), found[0]]
    assert len({split(key).digest for key in apart}) == len(apart)
