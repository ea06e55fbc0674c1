"However a call is written, it means one thing; and who is asked is told by name, or by code that means the same."
from __future__ import annotations

import functools
import importlib.util
import inspect
import itertools
import operator
import re
import shutil
import subprocess
import sys
import textwrap
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aurea_orchestrator.call import Binder, fingerprint, identity
from aurea_orchestrator.errors import ConfigError, UnkeyableError
from aurea_orchestrator.forms import canonical, encode

ROOT = Path(__file__).parent.parent

# ---- binding, against the interpreter

P = inspect.Parameter
NAMES = ["a", "b", "c", "type", "plain", "rest", "d_a", "_", "__f", "float", "self", "set"]


@st.composite
def functions(draw: Any) -> Any:
    "A function of any signature."
    names = iter(draw(st.permutations(NAMES)))
    parameters, optional = [], False
    for kind, most in ((P.POSITIONAL_ONLY, 2), (P.POSITIONAL_OR_KEYWORD, 3), (P.VAR_POSITIONAL, 1), (P.KEYWORD_ONLY, 3), (P.VAR_KEYWORD, 1)):
        for name in itertools.islice(names, draw(st.integers(0, most))):
            if kind in (P.VAR_POSITIONAL, P.VAR_KEYWORD): parameters.append(P(name, kind)); continue
            optional = draw(st.booleans()) if kind is P.KEYWORD_ONLY else optional or draw(st.booleans())
            parameters.append(P(name, kind, default=draw(st.integers(0, 2)) if optional else P.empty))
    space: dict[str, Any] = {}
    exec(f"def asked{inspect.Signature(parameters)}: return locals()", space)
    return space["asked"]


calls = st.tuples(st.lists(st.integers(0, 2), max_size=6), st.dictionaries(st.sampled_from([*NAMES, "x", "y"]), st.integers(0, 2), max_size=5))


def bound(fn: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    "What the interpreter makes of the call, in the order of the signature. (`inspect` is not asked: it refuses some good calls in 3.12.)"
    found = fn(*args, **kwargs)
    return {name: found[name] for name in inspect.signature(fn).parameters}


@given(functions(), calls)
def test_a_call_binds_as_python_does_or_fails_as_the_function_would(fn, call):
    args, kwargs = call
    try: meaning = bound(fn, args, kwargs)
    except TypeError as error:
        with pytest.raises(TypeError, match=f"^{re.escape(str(error))}$"): Binder(fn)(*args, **kwargs)
        return
    stars = {P.VAR_POSITIONAL: "*", P.VAR_KEYWORD: "**"}
    names, forms = Binder(fn)(*args, **kwargs)
    assert names == [stars.get(p.kind, "") + p.name for p in inspect.signature(fn).parameters.values()]
    assert encode(forms) == encode([canonical(value) for value in meaning.values()])


@given(st.data(), functions())
def test_all_ways_to_write_a_call_are_one(data, fn):
    "Give each argument its value in a way drawn from all that are allowed."
    values = {p.name: data.draw(st.integers(0, 2)) for p in inspect.signature(fn).parameters.values()}

    def written() -> Any:
        args, kwargs, positional = [], {}, True
        for p in inspect.signature(fn).parameters.values():
            value, left_out = values[p.name], p.default == values[p.name] and data.draw(st.booleans())
            if p.kind in (P.VAR_POSITIONAL, P.VAR_KEYWORD): continue
            if p.kind is P.KEYWORD_ONLY: positional = False
            if left_out: positional = False
            elif p.kind is P.POSITIONAL_ONLY and not positional: return None
            elif p.kind is P.POSITIONAL_ONLY or positional and data.draw(st.booleans()): args.append(value)
            else: positional = False; kwargs[p.name] = value
        return args, dict(data.draw(st.permutations(list(kwargs.items()))))

    ways = [way for way in (written() for _ in range(4)) if way]
    assert len({encode(Binder(fn)(*args, **kwargs)) for args, kwargs in ways}) <= 1


@given(functions(), calls, calls)
def test_calls_that_mean_two_things_have_two_forms(fn, one, two):
    try: meanings = [bound(fn, *one), bound(fn, *two)]
    except TypeError: return
    forms = [encode(Binder(fn)(*args, **kwargs)) for args, kwargs in (one, two)]
    assert (forms[0] == forms[1]) is (meanings[0] == meanings[1])


def test_keywords_are_not_taken_for_parameters_nor_for_each_other():
    def first(a=None, **kwargs): ...
    def second(a=None, kwargs=None): ...
    forms = [encode(x) for x in (Binder(first)(b=1), Binder(first)(1), Binder(first)(kwargs=1), Binder(second)(kwargs={"b": 1}), Binder(first)(b=1, c=2), Binder(first)(b="1, c=2"))]
    assert len(set(forms)) == len(forms)
    assert Binder(first)(b=1, c=2) == Binder(first)(c=2, b=1)
    def third(a, /, **kwargs): ...
    assert Binder(third)(1, a=2) != Binder(third)(2, a=1)
    assert Binder(third, ignore="a")(1, a=2) == Binder(third, ignore="a")(3, a=2) != Binder(third, ignore="a")(1, a=3)


def test_a_mutable_default_is_seen_as_it_is():
    history: list[str] = []
    def ask(prompt, history=history): ...
    bind = Binder(ask)
    before = encode(bind("hi"))
    history.append("said")
    assert encode(bind("hi")) != before and bind("hi") == bind("hi", ["said"])


def test_a_sentinel_default_is_nothing_given():
    class Omit: pass
    missing, omit = object(), Omit()
    def ask(prompt, a=missing, b=omit, c=None): ...
    bind = Binder(ask)
    assert bind("hi") == bind("hi", missing, b=omit) != bind("hi", None)
    for bad in ({"a": object()}, {"b": Omit()}, {"c": missing}):
        with pytest.raises(UnkeyableError, match=f"argument {next(iter(bad))} "): bind("hi", **bad)
    client = type("Client", (), {"__init__": lambda self: setattr(self, "x", 1)})()
    def other(prompt, client=client): ...
    with pytest.raises(UnkeyableError, match="argument client "): Binder(other)("hi")


def test_what_is_ignored_is_not_there():
    def ask(prompt, client, *, log=print, **options): ...
    bind = Binder(ask, ignore=("client", "log", "trace"))
    assert bind("hi", object()) == bind(client=1, prompt="hi", log=object(), trace=object()) != bind("hi", 1, trce=1)
    assert Binder(ask, ignore="client").names == ["prompt", "log", "**options"]
    assert Binder(ask, ["options", "client", "log"])("hi", 1, a=object()) == Binder(ask, ("log", "client", "options"))("hi", 2)


def test_bypass_cache_is_never_in():
    def declared(prompt, bypass_cache=False): ...
    def open_ended(prompt, **options): ...
    for fn in (declared, open_ended): assert Binder(fn)("hi", bypass_cache=True) == Binder(fn)("hi")
    def neither(prompt): ...
    with pytest.raises(TypeError, match="bypass_cache"): Binder(neither)("hi", bypass_cache=True)


@pytest.mark.parametrize("ignore, says", [
    (("cleint",), "'cleint' .*ask.. is given; its parameters are prompt, client"), ("prompt.x", "'prompt.x'"), (("self.client",), "'self.client'"), ([""], "''"),
])
def test_a_name_that_nothing_has_cannot_be_ignored(ignore, says):
    def ask(prompt, client): ...
    with pytest.raises(ConfigError, match=says): Binder(ask, ignore)
    with pytest.raises(ConfigError, match="it has no parameters"): Binder(lambda: 0, "a")


def test_paths_begin_with_the_parameter():
    class Client: pass
    def ask(prompt, *rest, options=None, **more): ...
    for args, kwargs, where, cure in (([Client()], {}, "prompt", "prompt"), ([1, 2, Client()], {}, r"rest\[1\]", "rest"), ([1], {"options": {"x": Client()}}, r"options\['x'\]", "options"),
                                      ([1], {"client": Client()}, "client", "client"), ([1], {"x": [Client()]}, r"x\[0\]", "x")):
        with pytest.raises(UnkeyableError, match=rf"argument {where} of type .*Client has no canonical form; leave .*ignore=\(\"{cure}\",\)") as caught: Binder(ask)(*args, **kwargs)
        assert Binder(ask, ignore=(cure,))(*args, **kwargs), caught.value


class Agent:
    def __init__(self, model, client=None): self.model, self.client = model, client
    def ask(self, prompt, other=None): ...
    @classmethod
    def make(cls, prompt): ...


def test_self_is_its_class_and_attributes_and_no_other_argument_may_be():
    bind = Binder(Agent.ask, method=True)
    assert bind(Agent("m"), "hi") == bind(prompt="hi", self=Agent("m")) != bind(Agent("n"), "hi")
    with pytest.raises(UnkeyableError, match=r"self\.client of type object .*ignore=\(\"self\.client\",\) or ignore=\(\"self\",\)"): bind(Agent("m", object()), "hi")
    with pytest.raises(UnkeyableError, match="argument other of type"): bind(Agent("m"), "hi", Agent("m"))
    with pytest.raises(UnkeyableError, match="argument self of type"): Binder(Agent.ask)(Agent("m"), "hi")
    some = Binder(Agent.ask, ignore=("self.client",), method=True)
    assert some(Agent("m", object()), "hi") == some(Agent("m"), "hi") != some(Agent("n"), "hi")
    none = Binder(Agent.ask, ignore=("self",), method=True)
    assert none(Agent("m", object()), "hi") == none(Agent("n"), "hi")


def test_cls_is_its_name():
    class Sub(Agent): pass
    bind = Binder(Agent.make.__func__, method=True)
    assert bind(Agent, "hi") == bind(Agent, "hi") != bind(Sub, "hi")


def test_the_values_that_are_in_the_key_are_told_by_name_and_no_others():
    class Bot:
        def __init__(self, model, key): self.model, self.key = model, key
        def ask(self, prompt, *rest, client=None, **options): ...
    told = Binder(Bot.ask, ("self.key", "client", "api_key"), method=True).named(Bot("m", "sk-1"), "hi", 1, client="sk-2", api_key="sk-3", stop="s", bypass_cache=True)
    assert told == {"self": f"{__name__}.{Bot.__qualname__}", "self.model": "m", "prompt": "hi", "rest": (1,), "options": {"stop": "s"}}
    assert Binder(Bot.ask, ("self", "rest", "options"), method=True).named(Bot("m", "sk-1"), "hi", 1, x=2) == {"prompt": "hi", "client": None}
    class Own(Bot):
        def __cache_key__(self): return self.model
    own = Own("m", "sk-1")
    assert Binder(Bot.ask, method=True).named(own, "hi")["self"] is own                     # `facts` asks it for its key
    assert Binder(Agent.make.__func__, method=True).named(Agent, "m")["cls"] == f"{__name__}.Agent"


def test_annotations_that_name_what_does_not_exist_do_not_matter():
    def ask(prompt: Nowhere, x: Missing[int] = 1) -> Nothing: ...  # noqa: F821
    assert Binder(ask)("hi") == Binder(ask)(prompt="hi", x=1)


def test_wrapped_functions_have_the_signature_of_the_inner_one():
    def ask(prompt, model="m"): ...
    @functools.wraps(ask)
    def wrapper(*args, **kwargs): ...
    assert Binder(wrapper)("hi") == Binder(wrapper)(model="m", prompt="hi")
    assert Binder(functools.partial(ask, model="n"))("hi") == Binder(functools.partial(ask, model="n"))("hi", model="n")


# ---- fingerprint

def load(tmp_path: Path, source: str, name: str = "asked") -> Any:
    "What a module of this source calls `name`."
    path = tmp_path / f"m{len(list(tmp_path.iterdir()))}.py"
    path.write_text(textwrap.dedent(source))
    spec = importlib.util.spec_from_file_location("some_module", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return operator.attrgetter(name)(module)


HEAD = """
import functools, types
def cached(*a, **k): return a[0] if a and callable(a[0]) else lambda fn: fn
def other(fn): return fn
cache_llm_response = cache_embedding = cached
aurea = types.SimpleNamespace(cached=cached, cache_llm_response=cached)
"""
PLAIN = '''
def asked(prompt, model="m"):
    """Answer."""
    text = f"{prompt}: {model!r:>10}"
    return text + "one two" if prompt else None
'''


@pytest.mark.parametrize("source", [
    "# a comment\n\n" + PLAIN, PLAIN.replace('model="m"', "model='m'"), PLAIN.replace("prompt, model", "prompt,   # the prompt\n          model"),
    PLAIN.replace("return text", "\n    # and so\n    return (text)").replace('"one two"', '("one " # 1\n    "two")'), PLAIN.replace("    ", "  "),
    PLAIN.replace('f"{prompt}: {model!r:>10}"', 'f"{ prompt }" f": " "" f"{model!r:>10}"'), "@cached\n" + PLAIN.lstrip(), '@cached("llm", ttl=3)\n' + PLAIN.lstrip(),
    "@aurea.cached('llm')\n" + PLAIN.lstrip(), "@aurea.cache_llm_response\n" + PLAIN.lstrip(), "@cache_embedding(\n    ttl=4,\n)\n" + PLAIN.lstrip(),
    "class C:\n" + textwrap.indent(PLAIN, "    ") + "asked = C.asked", "if True:\n" + textwrap.indent(PLAIN, "  "),
])
def test_layout_comments_and_our_own_decorators_are_no_code(tmp_path, source):
    assert fingerprint(load(tmp_path, HEAD + source)) == fingerprint(load(tmp_path, PLAIN))


@pytest.mark.parametrize("old, new", [
    ("one two", "one  two"), ("one two", "One two"), ('"one two"', 'b"one two"'), ('"m"', '"n"'), ('"m"', "1"), ("Answer", "Reply"), ("!r", "!s"), (">10", ">11"), (": {", ":{"),
    ("else None", "else 0"), ("if prompt", "if not prompt"), ("text", "words"), ("model", "name"), ('model="m"', '*, model="m"'), ('model="m"', 'model: str = "m"'),
    ("\ndef", "\n@other\ndef"), ("\ndef", "\nasync def"), ("    return", "    prompt = prompt\n    return"), ('"one two"', 'f"one two"'), ('"one two"', '"one", "two"'),
])
def test_everything_else_is(tmp_path, old, new):
    assert fingerprint(load(tmp_path, HEAD + PLAIN.replace(old, new))) != fingerprint(load(tmp_path, PLAIN))


def test_another_name_is_another_function_and_constants_are_typed(tmp_path):
    assert fingerprint(load(tmp_path, PLAIN.replace("def asked", "def other"), "other")) != fingerprint(load(tmp_path, PLAIN))
    constants = ["1", "1.0", "True", "'1'", "b'1'", "None", "...", "1j", "0.0", "-1", "''", "b''", "[]", "()", "{}", "f''", "10**5", "100000"]
    prints = [fingerprint(load(tmp_path, f"def asked(): return {c}")) for c in constants] + [fingerprint(load(tmp_path, "def asked(): return"))]
    assert len(set(prints)) == len(prints) - 1 and prints[5] != prints[-1] or len(set(prints)) == len(prints)


def test_texts_over_several_lines_are_not_dedented(tmp_path):
    def method(text): return load(tmp_path, f'class C:\n    def asked(self):\n        return """{text}"""\n', "C.asked")
    assert fingerprint(method("a\nb")) != fingerprint(method("a\n    b")) != fingerprint(method("a\n        b"))


def test_the_right_function_is_found_among_its_like(tmp_path):
    twice = "def asked(): return 1\nfirst = asked\ndef asked(): return 2\n"
    assert fingerprint(load(tmp_path, twice, "first")) != fingerprint(load(tmp_path, twice)) == fingerprint(load(tmp_path, "def asked(): return 2"))
    nested = "def make():\n    def asked(): return 3\n    return asked\nasked = make()"
    assert fingerprint(load(tmp_path, nested)) == fingerprint(load(tmp_path, "def asked(): return 3"))
    lambdas = "one = lambda x: x + 1\ntwo = call(\n    lambda x:\n        x + 1,  # so\n)\nthree, four = lambda x: x + 1, lambda x: x + 2"
    one, two, three, four = (fingerprint(load(tmp_path, "call = lambda x: x\n" + lambdas, name)) for name in ("one", "two", "three", "four"))
    assert one == two and three != four and three == fingerprint(load(tmp_path, "\n\n\na, b = lambda x: x + 1, 0\nthree, four = lambda x: x + 1, lambda x: x + 2", "three"))


def test_code_without_a_source_is_known_by_its_bytecode():
    def made(source: str) -> Any:
        space: dict[str, Any] = {}
        exec(source, space)
        return space["asked"]
    base = "def asked(x, n=2):\n    def inner(y): return {y, 'a', (1, 2.0)}\n    return inner(x)\n"
    assert fingerprint(made(base)) == fingerprint(made("\n\n" + base.replace("\n    return", "   # why\n    return")))
    for old, new in (("'a'", "'b'"), ("2.0", "2"), ("inner", "outer"), ("x", "z"), ("{y, 'a', (1, 2.0)}", "[y, 'a', (1, 2.0)]"), ("n=2", "*, n=2")):
        assert fingerprint(made(base)) != fingerprint(made(base.replace(old, new)))


def test_what_python_did_not_make_has_no_fingerprint():
    with pytest.raises(ConfigError, match="give version="): fingerprint(len)


GOLDEN = '''
class C:
    def method(self, a, /, b: int = 3, *args, c: "str" = 'x', **kw) -> dict[str, int]:
        """Doc
        of two lines"""
        return {**kw, "a": a, "b": b, **{}} if a else {1, 2.0, -3j}
def strings(x, w=10):
    y = f"a" "b" f"{x!r:>{w}}" f"{x=}" f"{x:}" f'{x + 1 = :.2f}' "c" f"{{lit}}" rf"\\d{x}" u"u"
    return y + f"" + "" f"" + f"{x}{w}" + f"{x:{w}.{w}}" + f"{f'{x}'}" + f"\\N{BULLET} {x:%Y-%m}" + f"{x, 1}"
async def flow(it, n):
    global g; g = yield n
    async with it as x, x as y:
        async for z in x: await z
    while (k := len(it)) > 10: it = it[k // 2:, ..., 1:2, None]
    match it:
        case {"a": 1, **rest}: pass
        case [1, *_] | (2, 3): pass
        case C(x=1, y=True) as q: pass
        case None | False | -1 | 1+2j | "s" "t": pass
        case _: raise ValueError from None
    try: pass
    except* ValueError as e: del e
    else: assert x, "m"
    finally: pass
    def inner():
        nonlocal x
        @wraps(1)
        def deep(): lambda *, k=1: k
        class K(C, metaclass=type): a: int; (b): str = "1"
    for a, *b in n: continue
    with (open(1) as f, open(2)): x += 1; x[0]: int = 1
    [10**30, 0x10, 1_000, b"a" b"\\xff", "\\ud800", 1e309, {}, [], (), not a, a @ b, a if b else 1, a < b <= x is not f, a and b or c]
    yield [(await i, [j async for j in i if j]) for i in it]
short = lambda x, y=1: (x, y, f"{x}")
'''
PRINTS = {
    "C.method": "82a18dd4c35fef204c8c4e68ddf7ccbbe9ea213b9df6d35868efc69532ab834c",
    "strings": "4092f812bb363f6b69bc0638d3515eb83bbcd8daeb9d4c0a37feeb063a989bb5",
    "flow": "3101c869c222b3d57253f1d690388e6ed0b0a231531ad9cece8ca4007077507d",
    "short": "51a935411b7f85bdfa912e6603cd704b6d5604db3a85e26fc38a55cd64bbf92d",
}


def test_fingerprints_are_what_they_were(tmp_path):
    "They are the same on each Python; if this fails, notebooks forget their answers: raise KEY_VERSION, and say so in the changelog."
    assert {name: fingerprint(load(tmp_path, GOLDEN, name)) for name in PRINTS} == PRINTS


@pytest.mark.slow
@pytest.mark.parametrize("version", [f"python3.{minor}" for minor in range(11, 16) if minor != sys.version_info[1]])
def test_fingerprints_are_the_same_on_another_python(tmp_path, version):
    python = shutil.which(version)
    if not python or subprocess.run([python, "-c", "import msgspec"], capture_output=True).returncode: pytest.skip(f"no {version} with msgspec here")
    (tmp_path / "golden.py").write_text(GOLDEN)
    code = f"import golden, operator; from aurea_orchestrator.call import fingerprint; print([fingerprint(operator.attrgetter(n)(golden)) for n in {list(PRINTS)}])"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert found.stdout.strip() == str(list(PRINTS.values())), found.stderr


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the syntax is of 3.12")
def test_type_parameters_count(tmp_path):
    a, b = (fingerprint(load(tmp_path, f"def asked{t}(x): return x")) for t in ("", "[T]"))
    assert a != b


# ---- identity

def who(*args: Any, **kwargs: Any) -> bytes: return encode(identity(*args, **kwargs))


def test_in_a_module_it_is_the_name(tmp_path):
    one, two = load(tmp_path, "def asked(): return 1\ndef other(): return 1"), load(tmp_path, "def asked(): return 2\ndef other(): return 1")
    assert who(one) == who(two) != who(load(tmp_path, "def other(): return 1", "other"))
    two.__module__ = "elsewhere"
    assert who(one) != who(two) and who(one, namespace="team") == who(two, namespace="team") != who(one)
    assert len({who(one), who(one, version=1), who(one, version="1"), who(one, version=2), who(one, "team"), who(one, "team", 1)}) == 6
    assert who(one, "team") != who(load(tmp_path, "def other(): return 1", "other"), "team")


def test_in_main_it_is_the_code_too(tmp_path):
    one, two, three = (load(tmp_path, s) for s in ("def asked(): return 1", "def asked(): return 2", "def asked():  # one\n    return 1"))
    for fn in (one, two, three): fn.__module__ = "__main__"
    assert who(one) == who(three) != who(two)
    assert who(one, version="1") == who(two, version="1") and who(one, namespace="team") == who(two, namespace="team")


def test_a_lambda_is_always_its_code_too(tmp_path):
    one, two = load(tmp_path, "asked = lambda x: x"), load(tmp_path, "asked = lambda x: -x")
    assert who(one) != who(two) and who(one, "team") != who(two, "team") and who(one, version=1) == who(two, version=1)


def test_a_stream_is_no_plain_function(tmp_path):
    plain, other, stream, awaited = (load(tmp_path, s) for s in ("def asked(): return 1", "async def asked(): return 1", "def asked(): yield 1", "async def asked(): yield 1"))
    for how in ({}, {"namespace": "team"}, {"version": 1}):
        assert who(plain, **how) == who(other, **how) != who(stream, **how) == who(awaited, **how)
    assert who(functools.partial(plain)) != who(functools.partial(stream))


class Model(Enum): A, B = "a", "b"


def test_sisters_of_one_factory_are_told_by_plain_values():
    def make(model):
        def ask(prompt): return model, prompt
        return ask
    different = ["gpt-4", "gpt-3", None, 1, 1.0, True, b"a", Model.A, Model.B, (), ("a",), (("a", 1),)]
    assert len({who(make(m)) for m in different}) == len(different)
    assert len({who(make(m), namespace="team", version=1) for m in different}) == len(different)
    others = [[], {}, object(), make, (object(),), {"a"}]
    assert len({who(make(m)) for m in others}) == 1
    assert who(make("gpt-4")) == who(make("gpt-4"))


def test_the_closure_is_read_once_and_may_be_empty_or_wrapped():
    def make(model):
        def ask(prompt): return model, later
        before = who(ask)
        later = 1
        @functools.wraps(ask)
        def wrapper(prompt): return ask(prompt)
        return before, wrapper
    assert make("a")[0] != make("b")[0] and who(make("a")[1]) != who(make("b")[1])


def test_other_callables():
    def ask(prompt, model): ...
    partials = [functools.partial(ask, model="a"), functools.partial(ask, model="b"), functools.partial(ask, "a"), functools.partial(ask)]
    assert len({who(p) for p in [ask, *partials]}) == 5
    class Caller(Agent):
        def __call__(self, prompt): ...
    assert len({who(x) for x in (Caller("a"), Caller("b"), Caller("a").ask, Caller("b").ask, Agent("a").ask, Agent.make, Caller.make, len, str.join)}) == 9
    assert Binder(Caller("a"))("hi") == Binder(Caller("a"))(prompt="hi")
    assert Binder(Agent("m").ask)("hi") == Binder(Agent("m").ask)(prompt="hi", other=None)
    for bad in ([].append, "a".upper, re.compile("a").match, operator.itemgetter(1)):
        with pytest.raises(ConfigError, match="wrap it in a `def`"): identity(bad)
    with pytest.raises(UnkeyableError, match="args"): identity(functools.partial(ask, object()))
    with pytest.raises(ConfigError, match="its parameters|the parameters"): Binder(dict.update)
