"Two values share a form exactly when they are the same value: by type, by content, in whatever order."
from __future__ import annotations

import dataclasses
import math
import operator
import pathlib
import re
import string
import threading
import types
import typing
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from enum import Enum, Flag, IntEnum, StrEnum
from fractions import Fraction
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Optional, TypedDict
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from aurea_orchestrator.errors import UnkeyableError
from aurea_orchestrator.forms import canonical, encode, instance


def written(value: Any) -> bytes: return encode(canonical(value))


# ---- a reference notion of "the same value", written without forms

def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b): return False
    if isinstance(a, float): return math.isnan(a) and math.isnan(b) or a == b and math.copysign(1, a) == math.copysign(1, b)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict): return len(a) == len(b) and all(any(same(k, l) and same(v, b[l]) for l in b) for k, v in a.items())
    if isinstance(a, (set, frozenset)): return len(a) == len(b) and all(any(same(x, y) for y in b) for x in a)
    return bool(a == b)


tricky = st.sampled_from([
    None, True, False, 0, 1, -1, 0.0, -0.0, 1.0, math.nan, math.inf, "", "0", "1", "1.0", "None", "True", "nan", b"", b"1", b"\x01", "a", "b", "a:b", "a,b",
    2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, hex(2**64), "\ud800", "\udc00", "\ud800\udc00", "\U00010000", "é", "e\u0301", b"\xed\xa0\x80",
    "list", "dict", "int", "str", "set", "tuple", "\0", "a\0", 1e16, 10**16,
])
scalars = tricky | st.text(max_size=3) | st.integers() | st.floats() | st.binary(max_size=2)
hashable = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3), max_leaves=5)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple)
                      | st.dictionaries(hashable, inner, max_size=3) | st.sets(hashable, max_size=3), max_leaves=8)


def shuffled(value: Any, draw: Any) -> Any:
    "An equal value, built in another order."
    if isinstance(value, (list, tuple)): return type(value)(shuffled(x, draw) for x in value)
    if isinstance(value, dict): return {shuffled(k, draw): shuffled(value[k], draw) for k in draw(st.permutations(list(value)))}
    if isinstance(value, (set, frozenset)): return type(value)(shuffled(x, draw) for x in draw(st.permutations(list(value))))
    return value


def bent(value: Any, draw: Any) -> Any:
    "A value that looks much like it."
    if isinstance(value, (list, tuple)) and value and draw(st.booleans()):
        spot = draw(st.integers(0, len(value) - 1))
        return type(value)(bent(x, draw) if i == spot else x for i, x in enumerate(value))
    if isinstance(value, dict) and value and draw(st.booleans()):
        spot = draw(st.sampled_from(list(value)))
        return {k: bent(v, draw) if k is spot else v for k, v in value.items()}
    bends = [lambda: [value], lambda: (value,), lambda: str(value), lambda: None, lambda: draw(scalars)]
    if isinstance(value, (list, tuple)): bends += [lambda: list(value), lambda: tuple(value), lambda: [*value, None], lambda: value[:-1], lambda: value[::-1],
                                                   lambda: ["list", *value], lambda: dict(enumerate(value))]
    if isinstance(value, dict): bends += [lambda: list(value.items()), lambda: list(value), lambda: {**value, "": None}]
    if isinstance(value, (set, frozenset)): bends += [lambda: set(value), lambda: frozenset(value), lambda: sorted(map(repr, value))]
    if isinstance(value, (bool, int, float)) and abs(value) < 1e300: bends += [lambda: float(value), lambda: int(value), lambda: bool(value), lambda: -value]
    if isinstance(value, str) and value.isascii(): bends += [lambda: value.encode(), lambda: list(value), lambda: value + "\0"]
    try: return draw(st.sampled_from(bends))()
    except (TypeError, ValueError): return None


@st.composite
def pairs(draw: Any) -> tuple[Any, Any]:
    a = draw(values)
    return a, draw(st.sampled_from([lambda: draw(values), lambda: shuffled(a, draw), lambda: bent(a, draw)]))()


@given(pairs())
def test_two_values_share_a_form_exactly_when_they_are_the_same(pair):
    a, b = pair
    assume(sum(isinstance(k, float) and math.isnan(k) for x in (a, b) if isinstance(x, (dict, set)) for k in x) < 2)
    assert (written(a) == written(b)) is same(a, b)


@given(st.data())
def test_order_of_dicts_and_sets_means_nothing(data):
    value = data.draw(values)
    assert written(shuffled(value, data.draw)) == written(value)


@given(st.lists(scalars, max_size=4), st.lists(scalars, max_size=4))
def test_nothing_moves_from_one_neighbour_to_the_next(a, b):
    assert (written([a, b]) == written([[*a, *b], []])) is (not b)
    assert written([a, b]) != written([*a, *b])


# ---- types

class Colour(Enum): RED, BLUE = 1, 2
class Number(IntEnum): ONE = 1
class Word(StrEnum): A = "a"
class Bits(Flag): A, B = 1, 2
class Odd(Enum): F = lambda: 0, 1  # A value without a form


@dataclasses.dataclass
class Message: role: str; content: Any = ""
@dataclasses.dataclass(frozen=True, slots=True)
class Slotted: role: str; content: Any = ""
class Struct(msgspec.Struct): role: str; content: Any = ""
class Named(NamedTuple): role: str; content: Any = ""
class Prompt(str): pass
class Big(int): pass
class Rows(list): pass
class Table(dict): pass
class Keyed:
    def __init__(self, what): self.what = what
    def __cache_key__(self): return self.what
class KeyedToo(Keyed): pass


zones = [datetime(2024, 7, 1, 12), datetime(2024, 7, 1, 12, tzinfo=timezone.utc), datetime(2024, 7, 1, 12, tzinfo=timezone(timedelta(hours=2))),
         datetime(2024, 7, 1, 12, tzinfo=ZoneInfo("Europe/Berlin")), datetime(2024, 7, 1, 12, tzinfo=ZoneInfo("Europe/Paris")),
         datetime(2024, 7, 1, 12, fold=1), datetime(2024, 7, 1, 12, 0, 0, 1)]
others = [
    date(2024, 7, 1), time(12), time(12, tzinfo=timezone.utc), timedelta(1), timedelta(seconds=1), Decimal("1"), Decimal("1.0"), Fraction(1), Fraction(1, 2),
    complex(1), complex(1, -0.0), 1, 1.0, True, uuid.UUID(int=1), uuid.UUID(int=1).bytes, str(uuid.UUID(int=1)),
    pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("a"), pathlib.Path("a"), "a", Prompt("a"), Word.A, Keyed("a"), KeyedToo("a"), Keyed(["a"]),
    Colour.RED, Colour.BLUE, Number.ONE, Big(1), Bits.A, Bits.B, Bits.A | Bits.B, Odd.F, b"a", bytearray(b"a"), memoryview(b"a"), memoryview(b"a").cast("b"),
    Message("a"), Message("a", None), Slotted("a"), Struct("a"), Named("a"), ("a", ""), {"role": "a", "content": ""}, Table(role="a", content=""),
    [], Rows(), deque(), deque(maxlen=3), range(0), range(1), slice(1), slice(None, 1, 1), {}, OrderedDict(), defaultdict(list), defaultdict(int), Counter(), set(), frozenset(), (), ...,
    re.compile("a"), re.compile(b"a"), re.compile("a", re.I),
    str, int, list, dict, Colour, Number, Message, Slotted, Struct, Named, list[str], list[int], dict[str, int], tuple[int, ...], int | None, Optional[str],
    Literal["a"], Literal["b"], Iterable[Message], list[Message], type(None), typing.Any,
]


def test_every_type_has_a_form_of_its_own():
    forms: dict[bytes, Any] = {}
    for value in [*zones, *others]:
        assert written(value) not in forms, f"{value!r} is taken for {forms[written(value)]!r}"
        forms[written(value)] = value


@pytest.mark.parametrize("a, b", [
    (OrderedDict(a=1, b=2), OrderedDict(b=2, a=1)), (deque([1, 2]), deque([2, 1])), (Message("a", [1]), Message("a", (1,))), (Struct("a", 1), Struct("a", True)),
    (Decimal("NaN"), Decimal("sNaN")), (defaultdict(int, a=1), defaultdict(int, a=2)), (Table(a=1), Table(a="1")), (Keyed({1}), Keyed({True})),
])
def test_contents_count(a, b):
    assert written(a) != written(b)


@pytest.mark.parametrize("a, b", [
    (int | None, Optional[int]), (Counter("ab"), Counter("ba")), (MappingProxyType({"a": 1}), {"a": 1}), (Message(content=1, role="a"), Message("a", 1)),
    ({1: 0, "1": 0, b"1": 0, False: 0}, {False: 0, b"1": 0, "1": 0, 1: 0}), ({(1,): 0, "(1,)": 0}, {"(1,)": 0, (1,): 0}),
    (math.nan, -math.nan), (Table(a=1, b=2), Table(b=2, a=1)), (datetime(2024, 1, 1, tzinfo=timezone.utc), datetime(2024, 1, 1, tzinfo=timezone(timedelta(0)))),
    (ZoneInfo.no_cache("Europe/Berlin").key and datetime(2024, 1, 1, tzinfo=ZoneInfo.no_cache("Europe/Berlin")), datetime(2024, 1, 1, tzinfo=ZoneInfo("Europe/Berlin"))),
])
def test_the_same_by_another_way(a, b):
    assert written(a) == written(b)


def test_huge_integers():
    assert len({written(10**5000), written(10**5000 + 1), written(-(10**5000))}) == 3


def test_a_class_is_known_by_module_and_name_which_cannot_be_glued_otherwise():
    first, second = type("c", (Keyed,), {"__module__": "a.b"}), type("c", (Keyed,), {"__module__": "a", "__qualname__": "b.c"})
    assert written(first(1)) != written(second(1))


def test_subclasses_are_told_by_their_content_and_their_attributes_whatever_they_override():
    class Lying(str):
        def __str__(self): return "the same"
        __repr__ = __str__
        def encode(self, *a): return b"the same"
        def isascii(self): return True
        def __eq__(self, other): return True
        __hash__ = str.__hash__
    assert written(Lying("a")) != written(Lying("b"))
    tagged = Prompt("a")
    tagged.tag = 1
    assert written(tagged) != written(Prompt("a"))
    assert written(Prompt("\ud800")) != written(Prompt("\ud801"))

    class Shy(dict):
        def __iter__(self): return iter(())
        def items(self): return []
        def keys(self): return []
    assert written(Shy(a=1)) != written(Shy(a=2))


def test_enums_are_told_by_name_and_value():
    one, two = Enum("Model", {"GPT": "gpt-4"}, module="m"), Enum("Model", {"GPT": "gpt-5"}, module="m")
    assert written(one.GPT) != written(two.GPT)
    assert written(one) != written(two)


def test_classes_are_told_by_their_fields():
    def person(name_="Person", **types): return dataclasses.make_dataclass(name_, types.items(), namespace={"__module__": "m"})
    assert written(person(name=str)) == written(person(name=str))
    forms = [written(x) for x in (person(name=str), person(name=int), person(name=str, age=int), person(age=int, name=str), TypedDict("Person", {"name": str}))]
    assert len(set(forms)) == len(forms)
    inner = [written(person(boss=person("Boss", name=t))) for t in (str, int)]
    assert inner[0] != inner[1], "a nested class has changed"


def test_pydantic():
    from pydantic import BaseModel, ConfigDict, Field

    def model(name="Person", **fields): return type(name, (BaseModel,), {"__annotations__": fields, "__module__": "m", "__qualname__": name})
    class Open(BaseModel):
        model_config = ConfigDict(extra="allow")
        name: str = Field("x", description="d")

    assert written(Open(name="x")) == written(Open()) != written(Open(name="y"))
    assert written(Open(extra=1)) != written(Open(extra=2)) != written(Open())
    assert written(model(name_=str)) == written(model(name_=str)) != written(model(name_=int))
    assert written(model(boss=model(name_=str))) != written(model(boss=model(name_=int)))
    assert written(list[model(name_=str)]) == written(list[model(name_=str)]) != written(list[model(name_=int)])
    holder = [written(dataclasses.make_dataclass("H", [("p", model(name_=t))], namespace={"__module__": "m"})) for t in (str, int)]
    assert holder[0] != holder[1]
    assert written(model(a=int)(a=1)) != written(model("Other", a=int)(a=1))
    class Node(BaseModel):
        text: str
        children: list[Node] = []
    Node.model_rebuild(_types_namespace={"Node": Node})
    assert written(Node) and written(Node(text="a", children=[Node(text="b")])) != written(Node(text="a", children=[Node(text="c")]))


def lasting(*bases: type, **more: Any) -> type:
    "A class with one field and something that is computed from it once."
    def length(self): return len(self.text)
    def client(self): return Client()
    body = {"__annotations__": {"text": str}, "__module__": "m", "__qualname__": "Lasting", **more, "length": cached_property(length), "client": cached_property(client)}
    for name in ("length", "client"): body[name].__set_name__(None, name)
    return types.new_class("Lasting", bases, {"dict": True} if msgspec.Struct in bases else {}, lambda space: space.update(body))


def test_what_was_computed_from_the_fields_is_no_field():
    attrs, pydantic = pytest.importorskip("attrs"), pytest.importorskip("pydantic")
    open_too = lasting(pydantic.BaseModel, model_config={"extra": "allow"})
    for kind in (lasting(pydantic.BaseModel), open_too, dataclasses.dataclass(lasting()), attrs.define(lasting()), attrs.define(slots=False)(lasting()), lasting(msgspec.Struct)):
        one = kind(text="kind")
        before = written(one)
        assert one.length == 4 and one.client and written(one) == before == written(kind(text="kind")) != written(kind(text="unkind"))
    assert len({written(open_too(text="a", **more)) for more in ({}, {"b": 1}, {"b": 2})}) == 3


def test_numpy():
    numpy = pytest.importorskip("numpy")
    grid = numpy.arange(6, dtype="int32").reshape(2, 3)
    assert written(grid.T) == written(numpy.ascontiguousarray(grid.T)) == written(numpy.asfortranarray(grid.T))
    kinds = [grid, grid.T, grid.ravel(), grid.astype("int64"), grid.astype("uint32"), grid.astype(">i4"), grid.tolist(), numpy.array(1, "f8"), numpy.float64(1), 1.0,
             numpy.float32(1), numpy.int64(1), numpy.bool_(True), numpy.str_("a"), numpy.bytes_(b"a"), numpy.datetime64(1, "s"), numpy.datetime64(1, "ms"),
             numpy.dtype("f4"), numpy.dtype("f8"), numpy.float32, numpy.float64, numpy.zeros(2, [("a", "i4")]), numpy.zeros(2, [("b", "i4")]), numpy.zeros(0), numpy.zeros((0, 1))]
    assert len({written(x) for x in kinds}) == len(kinds)
    masked = numpy.ma.masked_array([1, 2], [True, False])
    for bad in (numpy.array([object()]), numpy.zeros(1, [("a", "O")]), numpy.array(["a"], object), masked, numpy.array(["a"], dtype=numpy.dtypes.StringDType()) if hasattr(numpy.dtypes, "StringDType") else masked):
        with pytest.raises(UnkeyableError, match="argument x is a numpy.* whose bytes do not say all"): canonical(bad, "x")


# ---- what has no form

class Client:
    def __init__(self, secret="hunter2"): self.secret = secret
    def __repr__(self): return f"<Client {self.secret}>"


def refused(value: Any, path: str = "messages") -> str:
    with pytest.raises(UnkeyableError) as caught: canonical(value, path)
    assert isinstance(caught.value, TypeError) and "hunter2" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("value, where", [
    (Client(), "messages"), ([1, 2, Client()], "messages[2]"), ({"x": Client()}, "messages['x']"), ({7: [Client()]}, "messages[7][0]"),
    (Message("user", Client()), "messages.content"), ([{"a": Struct("user", (Client(),))}], "messages[0]['a'].content[0]"),
    ({"hunter2 is my password": Client()}, "messages[…]"), ({"x" * 41: Client()}, "messages[…]"), ({Client()}, "messages{…}"), (Keyed(Client()), "messages.__cache_key__()"),
    (OrderedDict(x=Client()), "messages['x']"), (defaultdict(lambda: 0), "messages"), (deque([Client()]), "messages[0]"),
])
def test_what_has_no_form_is_named_with_its_path(value, where):
    message = refused(value)
    assert message.startswith(f"argument {where} of type ") and 'ignore=("messages",)' in message


def test_the_cure_fits():
    assert "test_forms.Client" in refused(Client()) and "give Client a method `__cache_key__`" in refused(Client())
    assert "__cache_key__" not in refused(lambda: 0) and "of type function" in refused(lambda: 0)
    assert "pass a list" in refused(x for x in "a") and "pass a list" in refused(iter([])) and "pass a list" in refused(map(str, []))
    assert "object" in refused(object()) and "_thread.lock" in refused(threading.Lock())
    assert "has no JSON schema" in refused(Client) and "has no canonical form" in refused(string)
    assert 'ignore=("options",)' in refused(Client(), "options['x']") and 'ignore=("options",)' in refused(Client(), "options.x")


def test_zones_without_a_name_or_an_offset_are_refused():
    class Odd(tzinfo):
        def utcoffset(self, when): return None if when is None else timedelta(hours=1)
        def tzname(self, when): return "CET"
        def dst(self, when): return None
    assert "neither a name nor a fixed offset" in refused(datetime(2024, 1, 1, tzinfo=Odd()))


def test_cycles_and_absurd_depth_are_refused_and_ordinary_depth_is_not():
    round_and_round: list[Any] = []
    round_and_round.append(round_and_round)
    itself: dict[str, Any] = {}
    itself["me"] = [itself]
    keyed = Keyed(None)
    keyed.what = keyed
    deep: Any = 1
    for _ in range(1000): deep = (deep,)
    for bad in (round_and_round, itself, keyed, deep):
        message = refused(bad)
        assert "nested deeper than 100 levels" in message and len(message) < 400
    fine: Any = 1
    for _ in range(50): fine = {"a": [fine]}
    assert written(fine)


def test_an_error_of_ones_own_cache_key_is_ones_own():
    class Broken:
        def __cache_key__(self): raise KeyError("mine")
    with pytest.raises(KeyError, match="mine"): canonical(Broken())


# ---- self

class Agent:
    model = "m"
    def __init__(self, **attributes): vars(self).update(attributes)
    @cached_property
    def client(self): return Client()


class Slots:
    __slots__ = ("model", "__hidden", "__weakref__")
    def __init__(self, model, hidden): self.model, self.__hidden = model, hidden


def own(value: Any, *ignore: str) -> bytes: return encode(instance(value, "self", ignore))


def test_instances_are_told_by_class_and_attributes():
    class Other(Agent): pass
    assert own(Agent(model="a", x=[1])) == own(Agent(x=[1], model="a"))
    different = [own(x) for x in (Agent(model="a"), Agent(model="b"), Agent(), Agent(modell="a"), Other(model="a"), Slots("a", 1), Slots("a", 2), Slots("b", 1), Message("a"), Struct("a"),
                                  Prompt("a"), Prompt("b"), Rows([1]), Rows([2]), Table(a=1), Named("a"), Colour.RED, Colour.BLUE, Keyed(1), Keyed(2), Agent, Other)]
    assert len(set(different)) == len(different)


def test_what_was_computed_once_is_not_looked_at():
    agent = Agent(model="a")
    before = own(agent)
    assert agent.client and own(agent) == before


def test_attributes_that_have_no_form_can_be_left_out_one_by_one():
    agent = Agent(model="a", client=Client(), pool={"x": Client()})
    with pytest.raises(UnkeyableError, match=re.escape("""argument self.pool['x'] of type""")) as caught: instance(Agent(pool={"x": Client()}))
    assert 'ignore=("self.pool",) or ignore=("self",), or give Client a method `__cache_key__`' in str(caught.value)
    assert own(agent, "client", "pool") == own(Agent(model="a"), "pool")


def test_what_hides_its_state_is_refused():
    numpy = pytest.importorskip("numpy")
    class Grid(numpy.ndarray): pass
    class Oops(Exception): pass
    class Local(threading.local): pass
    for hidden in (numpy.zeros(2).view(Grid), Oops("a"), Local(), operator.itemgetter(1), threading.Lock()):
        with pytest.raises(UnkeyableError, match="argument self of type .* extends a class in C and does not show"): instance(hidden)


def test_a_pydantic_self_is_told_by_its_private_attributes_too():
    from pydantic import BaseModel, PrivateAttr
    class Model(BaseModel):
        name: str = "a"
        _model: str = PrivateAttr("m")
    a, b = Model(), Model(name="a")
    assert own(a) == own(b)
    b._model = "n"
    assert own(a) != own(b)
