"""What is stored comes back equal and of the same type, or is refused; what is read runs nothing."""

import dataclasses
import enum
import math
import os
import pathlib
import subprocess
import sys
import textwrap
import threading
import types
import typing
import uuid
import zlib
from datetime import UTC, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any, Generic, NamedTuple, Optional, TypeVar
from zoneinfo import ZoneInfo

import attrs
import msgspec
import numpy as np
import openai
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from openai.types import CreateEmbeddingResponse
from openai.types.chat import ChatCompletion

from aurea_orchestrator.codec import Entry, batch, check, current, decode, encode, header, trusted
from aurea_orchestrator.errors import DamagedEntryError, UnstorableError
from aurea_orchestrator.events import Cost
from aurea_orchestrator.readable import payload_of
from aurea_orchestrator.records import made, shape_of
from aurea_orchestrator.values import FLOAT32, FLOAT64, to_payload

T = TypeVar("T")
RAN: list[str] = []
NOTHING = "unset"


# ---- the classes of a user


class Color(enum.Enum):
    RED, GREEN = "red", (0, 255, 0)


class Word(enum.StrEnum):
    YES = "yes"


class Level(enum.IntEnum):
    LOW, HIGH = 1, 2


class Right(enum.Flag):
    READ, WRITE, RUN = 1, 2, 4


class Bits(enum.IntFlag, boundary=enum.KEEP):
    ONE = 1

    @classmethod
    def _missing_(cls, value):
        RAN.append("Bits._missing_")
        return super()._missing_(value)


class Odd(enum.Enum):
    THING = object()
    NAN = math.nan


class Pair(NamedTuple):
    left: Any
    right: Any = None


class Sub(Pair):
    "A named tuple with a __dict__"


@dataclasses.dataclass
class Plain:
    a: Any
    b: Any = 2
    made: Any = dataclasses.field(init=False, default=7)

    def __post_init__(self):
        RAN.append("Plain")


@dataclasses.dataclass(frozen=True, slots=True)
class Cold(Generic[T]):
    a: T
    size: int = dataclasses.field(init=False)

    def __post_init__(self):
        RAN.append("Cold")
        object.__setattr__(self, "size", 3)


@dataclasses.dataclass
class Box(Generic[T]):
    a: T
    b: Any


@dataclasses.dataclass
class Inner(Plain):
    c: Any = None

    def __getattr__(self, name):
        raise AttributeError(name)

    def __setattr__(self, name, value):
        RAN.append("Inner.__setattr__")
        super().__setattr__(name, value)

    def __setstate__(self, state):
        RAN.append("Inner.__setstate__")


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    x: Any
    y: Any = 1
    _secret: Any = pydantic.PrivateAttr(default=0)
    _unset: int

    @pydantic.model_validator(mode="after")
    def validated(self):
        RAN.append("Model")
        return self

    def model_post_init(self, context):
        super().model_post_init(context)
        RAN.append("Model.post")


class Frozen(pydantic.BaseModel, frozen=True):
    x: int = pydantic.Field(gt=0)
    when: datetime | None = None


class Page(pydantic.BaseModel, Generic[T]):
    items: list[T]


class Root(pydantic.RootModel[list[int]]):
    pass


class Struct(msgspec.Struct, kw_only=True, frozen=True, rename="camel", tag="s"):
    some_name: Any
    b: Any = 1


class DictStruct(Struct, dict=True, kw_only=True):
    c: Any


class PostStruct(msgspec.Struct):
    a: int

    def __post_init__(self):
        RAN.append("PostStruct")


@attrs.define
class Attr:
    a: Any
    b: Any = attrs.field(init=False, default=4)

    def __attrs_post_init__(self):
        RAN.append("Attr")


@attrs.frozen(cache_hash=True)
class Hashed:
    a: str


# ---- equal and of the same type, all the way down


def same(one, two):
    if type(one) is not type(two):
        return False
    if isinstance(one, np.ndarray):
        return (
            one.dtype == two.dtype
            and one.dtype.byteorder == two.dtype.byteorder
            and one.shape == two.shape
            and one.tobytes() == two.tobytes()
        )
    if isinstance(one, np.generic):
        return one.dtype == two.dtype and one.tobytes() == two.tobytes()
    if isinstance(one, enum.Enum):
        return one is two
    if isinstance(one, float):
        return one == two and math.copysign(1, one) == math.copysign(1, two) or one != one and two != two
    if isinstance(one, complex):
        return same(one.real, two.real) and same(one.imag, two.imag)
    if isinstance(one, Decimal):
        return one.as_tuple() == two.as_tuple()
    if isinstance(one, (datetime, time)):
        return one.replace(tzinfo=None) == two.replace(tzinfo=None) and one.fold == two.fold and same_zone(one.tzinfo, two.tzinfo)
    if isinstance(one, dict):
        return len(one) == len(two) and all(same(a, b) for a, b in zip(one.items(), two.items(), strict=True))
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two)) and same_state(one, two)
    if isinstance(one, (set, frozenset)):
        rest = list(two)
        for item in one:
            at = next((i for i, other in enumerate(rest) if same(item, other)), None)
            if at is None:
                return False
            del rest[at]
        return not rest
    return same_state(one, two) if shape_of(type(one)) else one == two


def same_zone(one, two):
    return type(one) is type(two) and (one == two if isinstance(one, timezone) else repr(one) == repr(two))


def same_state(one, two):
    if (shape := shape_of(type(one))) is None:
        return True
    names = {*shape.slots, *getattr(one, "__dict__", ()), *getattr(two, "__dict__", ())} - {"__orig_class__"}
    return all(same(getattr(one, name, NOTHING), getattr(two, name, NOTHING)) for name in names)


def again(value):
    return decode(encode(value, born=1.0, ttl=2.0)).value


ZONES = st.sampled_from(
    [
        None,
        UTC,
        timezone(timedelta(hours=-5, minutes=-30)),
        timezone(timedelta(seconds=7), "odd"),
        ZoneInfo("Europe/Berlin"),
        ZoneInfo("UTC"),
        pydantic.TypeAdapter(datetime).validate_python("2026-01-01T00:00:00+02:00").tzinfo,
    ]
)
TEXTS = st.text(st.characters(exclude_categories=()), max_size=20)
NUMBERS = st.one_of(
    st.integers(), st.integers(-(2**200), 2**200), st.sampled_from([2**63, 2**64, 2**64 - 1, -(2**63), -(2**63) - 1]), st.floats()
)
MEMBERS = st.sampled_from([*Color, *Word, *Level, *Right, Right(0), Right.READ | Right.RUN, Bits(9), Bits(0), *Odd])
HASHABLE = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    TEXTS,
    st.binary(max_size=20),
    st.complex_numbers(),
    st.dates(),
    st.times(),
    st.timedeltas(),
    st.builds(lambda when, zone, fold: when.replace(tzinfo=zone, fold=fold), st.datetimes(), ZONES, st.integers(0, 1)),
    st.builds(lambda when, zone, fold: when.replace(tzinfo=zone, fold=fold), st.times(), ZONES, st.integers(0, 1)),
    st.decimals(allow_nan=False),
    st.sampled_from([Decimal("NaN123"), Decimal("-0"), Decimal("1.500"), Decimal("-Infinity")]),
    st.fractions(),
    st.uuids(),
    MEMBERS,
    st.builds(pathlib.Path, TEXTS.filter(lambda t: "\0" not in t)),
    st.builds(pathlib.PurePosixPath, TEXTS),
    st.builds(pathlib.PureWindowsPath, st.just("C:/a/b")),
)
DTYPES = st.one_of(
    nps.boolean_dtypes(),
    nps.integer_dtypes(endianness="?"),
    nps.unsigned_integer_dtypes(endianness="?"),
    nps.floating_dtypes(endianness="?"),
    nps.complex_number_dtypes(endianness="?"),
    nps.byte_string_dtypes(),
    nps.unicode_string_dtypes(),
    nps.datetime64_dtypes(),
    nps.timedelta64_dtypes(),
)
ARRAYS = st.builds(
    lambda a, order: np.array(a, order=order),
    nps.arrays(DTYPES, nps.array_shapes(min_dims=0, min_side=0, max_dims=3, max_side=4)),
    st.sampled_from("CF"),
)
SCALARS = nps.arrays(DTYPES, ()).map(lambda a: a[()])


def branches(inner):
    keys = st.one_of(HASHABLE, st.tuples(HASHABLE, HASHABLE), st.frozensets(HASHABLE, max_size=2), st.builds(Pair, HASHABLE, HASHABLE))
    return st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(TEXTS, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=3),
        st.sets(keys, max_size=4),
        st.frozensets(keys, max_size=4),
        st.builds(lambda make, x, y: make(x, y), st.sampled_from(MAKERS), inner, inner),
    )


MAKERS = [
    Pair,
    Sub,
    Plain,
    Box,
    Box[int],
    lambda x, y: Cold(x),
    lambda x, y: Inner(x, c=y),
    lambda x, y: Model(x=x, extra=y),
    lambda x, y: Page[Any](items=[x, y]),
    lambda x, y: Struct(some_name=x, b=y),
    lambda x, y: DictStruct(some_name=x, c=y),
    lambda x, y: Attr(x),
]


VALUES = st.recursive(
    st.one_of(HASHABLE, ARRAYS, SCALARS, st.binary().map(bytearray), st.lists(st.floats(), min_size=16, max_size=20)),
    branches,
    max_leaves=12,
)


@settings(max_examples=400, suppress_health_check=list(HealthCheck))
@given(VALUES)
def test_a_value_comes_back_equal_and_of_the_same_type(value):
    try:
        blob = encode(value, born=1.0)
    except UnstorableError as error:
        assert "is a path that its own text does not name" in str(error)  # pathlib before 3.12 has such paths
        return
    RAN.clear()
    first, second = decode(blob).value, trusted(blob)
    assert same(value, first) and same(first, second)
    assert not RAN, "reading ran something"


def test_the_comparison_of_this_file_can_tell_things_apart():
    for one, two in [
        (1, True),
        (1, 1.0),
        ((1,), [1]),
        (0.0, -0.0),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({1}, frozenset({1})),
        (Pair(1), (1, None)),
        (Plain(1), Plain(2)),
        (Struct(some_name=1), Struct(some_name=1.0)),
        (np.float32(1), np.float64(1)),
        (Decimal("1.0"), Decimal("1.00")),
        (np.arange(2, dtype=">i4"), np.arange(2, dtype="<i4")),
        (Model(x=1), Model(x=1, y=1)),
        (b"", bytearray()),
        (Level.LOW, 1),
    ]:
        assert not same(one, two)


# ---- kinds that deserve a test of their own


def test_instances_are_made_without_running_their_class():
    values = [Plain([1], {2}), Cold((1, Cold(None))), Inner(1, c=Plain(3)), Attr({}), Model(x=(1,), more=[Frozen(x=1)])]
    values[0].other = "not a field"
    values[4]._secret = {"a": 1}
    blob = encode(values, born=0.0)
    RAN.clear()
    back = trusted(blob)
    assert RAN == [] and same(values, back)
    assert back[0].other == "not a field" and back[1].size == 3 and back[4]._secret == {"a": 1} and back[4].more == [Frozen(x=1)]
    assert back[4].model_fields_set == {"x", "more"} and not hasattr(back[4], "_unset")


def test_nothing_is_validated_again():
    wrong = Frozen.model_construct(x=-5)
    assert again(wrong).x == -5 and again(wrong).model_fields_set == {"x"} and again(wrong) == wrong


def test_an_unset_field_stays_unset():
    value = object.__new__(Cold)
    assert not hasattr(again(value), "a")


def test_a_default_that_was_stored_outlives_an_edit_of_the_class(monkeypatch):
    blob = encode(Plain(1), born=0.0)
    monkeypatch.setattr(Plain, "made", 8)
    assert trusted(blob).made == 7


def test_pydantic_times_keep_their_zone():
    value = Frozen.model_validate_json('{"x": 1, "when": "2026-07-01T12:00:00+05:30"}')
    assert (
        type(again(value).when.tzinfo) is type(value.when.tzinfo)
        and again(value) == value
        and again(value).when.utcoffset() == timedelta(hours=5.5)
    )


@pytest.mark.parametrize(
    "page",
    [
        Page[int],
        Page[Frozen],
        Page[Optional[Frozen]],
        Page[list[Frozen]],
        Page[dict[str, Page[int]]],
        Page[list[int]],
        Page[T],
        Page,
    ],
)
def test_generic_models_keep_their_class(page):
    value = page.model_construct(items=[1])
    assert type(again(value)) is page and again(value) == value


def test_root_models_and_generic_dataclasses():
    assert again(Root([1, 2])) == Root([1, 2])
    assert again(Box[int](1, 2)) == Box(1, 2)


def test_a_named_tuple_may_carry_a_dict():
    value = Sub(1)
    value.note = "x"
    assert again(value).note == "x" and type(again(value)) is Sub


def test_local_and_replaced_classes_work_in_this_process():
    @dataclasses.dataclass
    class Local:
        a: int

    class LocalModel(pydantic.BaseModel):
        b: Page[Frozen]

    value = [Local(1), LocalModel(b=Page[Frozen](items=[])), Page[LocalModel](items=[])]
    assert same(again(value), value)

    module = types.ModuleType("aurea_test_notebook")
    sys.modules[module.__name__] = module
    source = "from dataclasses import dataclass\n@dataclass\nclass Answer:\n    text: str\n"
    try:
        exec(source, module.__dict__)
        old = module.Answer("old")
        blob = encode(old, born=0.0)
        exec(source, module.__dict__)  # The cell is run again
        assert type(trusted(blob)) is module.Answer  # What was stored before is of the class of today
        assert type(again(old)) is type(old)  # What is stored now is of its own class
        exec(source + "    more: int = 0\n", module.__dict__)
        with pytest.raises(DamagedEntryError, match="changed"):
            decode(blob)
    finally:
        del sys.modules[module.__name__]
    with pytest.raises(DamagedEntryError, match="import the module"):
        decode(blob)


def test_a_member_whose_value_was_edited_is_a_miss(monkeypatch):
    blob = encode(Color.RED, born=0.0)
    monkeypatch.setattr(Color.RED, "_value_", "rouge")
    with pytest.raises(DamagedEntryError, match="changed"):
        decode(blob)


def test_floats_are_packed_without_losing_a_bit():
    exact = [n / 8 for n in range(1536)]
    tenths = [n / 10 for n in range(1536)]
    assert to_payload(exact)[0] == FLOAT32 and len(encode(exact, born=0.0)) < 4 * 1536 + 64
    assert to_payload(tenths)[0] == FLOAT64 and len(encode(tenths, born=0.0)) < 8 * 1536 + 64
    for value in (exact, tenths, [1.0] * 20 + [1e300], [0.5] * 20 + [5e-324], [1.0] * 16 + [math.inf, -math.inf, -0.0], [math.nan] * 17):
        assert same(again(value), value) and set(map(type, again(value))) == {float}
    for value in ([1.0] * 20 + [1], [1.0] * 20 + [True], [1] * 20, [np.float64(1)] * 20, (1.0,) * 20):
        assert same(again(value), value)


@pytest.mark.parametrize(
    "value",
    [
        np.arange(12).reshape(3, 4)[:, ::2],
        np.arange(5)[::-1],
        np.asfortranarray(np.ones((2, 3))),
        np.array(3.5),
        np.zeros((0, 4), ">f8"),
        np.zeros((2, 0)),
        np.array(["a\0b", "\ud800"]),
        np.array([b"x\0"]),
        np.array(["NaT", "2020-01-01"], "M8[25s]"),
        np.array([1], "m8[s]"),
        np.longlong(5),
        np.array([5], "q"),
        np.str_("end\0"),
        np.bytes_(b"end\0"),
        np.float16(math.nan),
        np.longdouble("0.1"),
        np.array([0.1], "g"),
        np.broadcast_to(np.float32(1), (3,)),
        np.str_("\ud800"),
    ],
)
def test_arrays_and_scalars(value):
    back = again([value])[0]
    assert type(back) is type(value) and back.dtype == value.dtype and back.dtype.type is value.dtype.type and back.shape == value.shape
    assert back.tobytes() == value.tobytes() and (not isinstance(value, (str, bytes)) or str(back) == str(value))
    if isinstance(value, np.ndarray):
        assert back.flags.writeable and back.flags.owndata and again(value).flags.writeable
        assert not value.flags.f_contiguous or back.flags.f_contiguous


# ---- openai

BODY = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "a_new_field": {"deep": [1]},
    "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3, "prompt_tokens_details": {"cached_tokens": 0}},
    "choices": [
        {
            "index": 0,
            "finish_reason": "tool_calls",
            "message": {
                "role": "assistant",
                "content": '{"x": 3}',
                "tool_calls": [{"id": "t", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
        }
    ],
}


def client(body):
    httpx = pytest.importorskip("httpx")
    answer = httpx.MockTransport(lambda request: httpx.Response(200, json=body, headers={"x-request-id": "req_1"}))
    return openai.OpenAI(api_key="none", http_client=httpx.Client(transport=answer))


def test_answers_of_the_openai_client():
    answer = client(BODY).chat.completions.create(model="m", messages=[])
    back = again(answer)
    assert type(back) is ChatCompletion and back == answer and same(back, answer) and back._request_id == "req_1"
    assert back.choices[0].message.tool_calls[0].function.name == "f" and back.a_new_field == {"deep": [1]}
    assert back.model_dump_json() == answer.model_dump_json() and back.model_dump(exclude_unset=True) == BODY


def test_parsed_answers_of_the_openai_client():
    body = {**BODY, "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": '{"x": 3}'}}]}
    answer = client(body).chat.completions.parse(model="m", messages=[], response_format=Frozen)
    back = again(answer)
    assert type(back) is type(answer) and back.choices[0].message.parsed == Frozen(x=3) and same(back, answer)


def test_vectors_of_the_openai_client_are_stored_packed():
    vector = [n / 256 for n in range(1536)]
    answer = CreateEmbeddingResponse.model_validate(
        {
            "object": "list",
            "model": "e",
            "data": [{"object": "embedding", "index": 0, "embedding": vector}],
            "usage": {"prompt_tokens": 1, "total_tokens": 1},
        }
    )
    blob = encode(answer, born=0.0)
    assert trusted(blob) == answer and trusted(blob).data[0].embedding == vector and len(blob) < 4 * 1536 + 1000


# ---- refusing


class Text(str):
    pass


@dataclasses.dataclass
class Failure(Exception):
    a: int


def generator():
    yield 1


@pytest.mark.parametrize(
    "value",
    [
        threading.Lock(),
        generator(),
        generator,
        Plain,
        int,
        object(),
        ...,
        NotImplemented,
        range(3),
        memoryview(b"secret"),
        Text("secret"),
        Failure(1),
        ValueError("secret"),
        PostStruct(1),
        Hashed("secret"),
        np.array([object()]),
        np.zeros(1, "f4").view(np.recarray),
        np.ma.array([1]),
        np.zeros(2, "i4,i4"),
        np.zeros(1, "i4,i4")[0],
        np.random.default_rng(0),
        types.SimpleNamespace(a=1),
        typing.OrderedDict(a=1),
        typing.Counter("a"),
        os,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_lossless_form_is_refused_by_type_and_place(value):
    class Box(pydantic.BaseModel):
        choices: Any

    with pytest.raises(UnstorableError) as caught:
        encode(Box(choices=[Pair(0, {"x": value, "the secret of keys": 1})]), born=0.0)
    assert str(caught.value).startswith("value.choices[0].right['x'] is ") and "secret" not in str(caught.value)
    assert caught.value.__cause__ is None and (caught.value.__context__ is None or caught.value.__suppress_context__)
    with pytest.raises(UnstorableError, match="^value is "):
        encode(value, born=0.0)


def test_places_name_no_data():
    for value in (
        {"my secret prompt": ...},
        {("secret",): ...},
        [{1: ...}],
        {"secret" * 9: ...},
        {b"secret": ...},
        datetime(2020, 1, 1, tzinfo=type("Zone", (ZoneInfo,), {})("UTC")),
    ):
        with pytest.raises(UnstorableError, match=r"^value[^ ]*(\[…\]|\.tzinfo) is ") as caught:
            encode(value, born=0.0)
        assert "secret" not in str(caught.value)


def nested(depth, wrap):
    value: Any = 0
    for _ in range(depth):
        value = wrap(value)
    return value


@pytest.mark.parametrize(
    "wrap",
    [
        lambda v: [v],
        lambda v: (v,),
        lambda v: {"k": v},
        lambda v: {1: v},
        Plain,
        Cold,
        Pair,
        lambda v: Model.model_construct(x=v),
        lambda v: Struct(some_name=v),
    ],
)
def test_deep_values_come_back_and_too_deep_ones_are_refused(wrap):
    blob, back = encode(nested(100, wrap), born=0.0), nested(100, wrap)
    assert encode(decode(blob).value, born=0.0) == blob and type(trusted(blob)) is type(back)
    for depth in (102, 10_000):
        with pytest.raises(UnstorableError, match="deeper than 100 levels"):
            encode(nested(depth, wrap), born=0.0)


def test_values_that_hold_themselves_are_refused():
    loop: list[Any] = []
    loop += [loop, loop]
    with pytest.raises(UnstorableError, match="holds itself"):
        encode(loop, born=0.0)


def test_a_full_stack_is_an_error_of_ours():
    value, blob = nested(90, Plain), encode(nested(90, Plain), born=0.0)

    def down(left):
        return (
            down(left - 1)
            if left
            else (pytest.raises(UnstorableError, encode, value, born=0.0), pytest.raises(DamagedEntryError, decode, blob))
        )

    frame, depth = sys._getframe(), 0
    while frame:
        frame, depth = frame.f_back, depth + 1
    down(sys.getrecursionlimit() - depth - 60)


def test_facts_must_be_plain():
    with pytest.raises(UnstorableError, match="meta"):
        encode(1, born=0.0, meta={"x": object()})


# ---- the entry


def test_the_header_says_what_was_written():
    blob = encode([1], born=1.7e9 + 0.123456, ttl=3600.5, cost=1.25, meta={"function": "app.ask", "tokens": [1, 2]}, seal=b"llm:1")
    assert decode(blob, b"llm:1") == Entry([1], 1.7e9 + 0.123456, 3600.5, Cost(1.25), {"function": "app.ask", "tokens": [1, 2]})
    assert decode(encode([1], born=0.0, cost=Cost(0.5, 20, 100, 0.001))).cost == Cost(0.5, 20, 100, 0.001)
    assert header(blob) == decode(blob, b"llm:1")[1:] and trusted(blob) == [1] and check(blob, b"llm:1") is None
    assert decode(encode(None, born=0.0)) == Entry(None, 0.0, None, Cost(), {}) and header(encode(0, born=0.0, ttl=0.0)).ttl == 0.0


def test_a_payload_is_found_behind_facts_that_another_would_write_shorter():
    facts = b"\x81\xa1a\xcf" + bytes(7) + b"\x01"  # {"a": 1}, where the 1 takes nine bytes
    plain = encode("gold", born=1.0)
    body = plain[:28] + len(facts).to_bytes(4, "little") + facts + plain[32:-4]
    blob = body + zlib.crc32(body).to_bytes(4, "little")
    assert decode(blob) == Entry("gold", 1.0, None, Cost(), {"a": 1})
    assert payload_of(blob) == payload_of(plain) == (plain[3], b"gold")


def test_raw_bytes_and_texts_lie_in_the_entry_as_they_are():
    assert b'{"a":1}' in encode(b'{"a":1}', born=0.0) and "gold — ".encode() in encode("gold — ", born=0.0)
    assert len(encode(b"x" * 1500, born=0.0)) == 1536


def test_an_entry_opens_only_under_its_own_seal():
    blob = encode("a", born=0.0, seal=b"llm:1")
    for seal in (b"llm:2", b"", b"llm:1 "):
        with pytest.raises(DamagedEntryError, match="another key"):
            decode(blob, seal)


def test_changing_a_value_changes_nobody_elses():
    value = {"list": [1], "model": Model(x={"a": [1]}), "array": np.zeros(3), "bytes": bytearray(b"a"), "floats": [0.5] * 20}
    blob = encode(value, born=0.0)
    copy = bytes(bytearray(blob))
    mine, yours = trusted(blob), decode(blob).value
    for one in (value, mine):
        one["list"].append(2), one["model"].x["a"].append(2), one["array"].fill(9), one["bytes"].extend(b"b"), one["floats"].append(1.0)
        one["model"].model_fields_set.clear()
    assert (
        blob == copy
        and yours["list"] == [1]
        and yours["model"] == Model(x={"a": [1]})
        and not yours["array"].any()
        and yours["bytes"] == b"a"
    )
    assert same(decode(blob).value, yours)


# ---- damage

SAMPLES = [
    encode(v, born=1e9, ttl=60.0, cost=0.1, meta={"f": "x"}, seal=b"k")
    for v in (
        {"a": [1, (2, {3})], "b": Model(x=1)},
        "text",
        b"bytes",
        [0.1] * 16,
        np.ones((2, 2), "f4"),
        Color.RED,
        datetime(2026, 1, 1, tzinfo=UTC),
    )
]


@pytest.mark.parametrize("blob", SAMPLES)
def test_every_flipped_bit_and_every_cut_is_found(blob):
    for at in range(len(blob)):
        for bit in range(8):
            with pytest.raises(DamagedEntryError):
                decode(blob[:at] + bytes([blob[at] ^ 1 << bit]) + blob[at + 1 :], b"k")
        with pytest.raises(DamagedEntryError):
            decode(blob[:at], b"k")
    for other in (blob + b"\0", blob + blob, b"\0" + blob, b""):
        with pytest.raises(DamagedEntryError):
            decode(other, b"k")


def test_combined_flags_are_found_without_asking_their_class():
    blob = encode(Bits(40), born=0.0)
    Bits._value2member_map_.pop(40)
    RAN.clear()
    assert int(trusted(blob)) == 40 and type(trusted(blob)) is Bits and RAN == []


def test_another_version_is_a_miss():
    blob = encode(1, born=0.0)
    with pytest.raises(DamagedEntryError, match="format 2"):
        decode(blob[:2] + b"\2" + blob[3:])
    with pytest.raises(DamagedEntryError, match="not written by this version"):
        decode(sealed(99, b"a kind of tomorrow"))


def sealed(form, payload, meta=b"", size=None):
    "An entry with a right checksum over whatever an enemy likes."
    head = (
        encode(None, born=0.0)[:3]
        + bytes([form])
        + encode(None, born=0.0)[4:28]
        + (len(meta) if size is None else size).to_bytes(4, "little")
    )
    return (body := head + meta + payload) + zlib.crc32(body).to_bytes(4, "little")


def only_damage(blob):
    "Whatever the readers do, it is a value or a DamagedEntryError."
    for read in (decode, trusted, header, lambda blob: current(blob, 0.0), lambda blob: batch([blob, blob], 0.0)):
        try:
            read(blob)
        except DamagedEntryError as error:
            assert error.__cause__ is None


@pytest.mark.parametrize("rows", [
    [1, "two", None, [3.0] * 20, b"five", "\ud800", (6,), Color.RED], [np.ones(3), np.ones(4)], [np.ones(3), np.ones(3, "f4")], [np.ones(3), [1.0] * 3],
    [np.asfortranarray(np.ones((2, 3)))] * 2, [np.array(1.0), np.array(2.0)], [np.ones((2, 0)), np.ones((2, 0))],
], ids=["kinds", "lengths", "dtypes", "array and list", "fortran", "no dimension", "empty"])  # fmt: skip
def test_a_batch_reads_what_each_entry_reads(rows):
    blobs = [encode(row, born=10.0 + n, ttl=5, meta={"n": n % 2}) for n, row in enumerate(rows)]
    values, metas = batch(blobs, 15.0)
    assert len(values) == len(rows) and sorted(meta["n"] for meta in metas) == [0, 1]
    for value, blob in zip(values, blobs, strict=True):
        alone = trusted(blob)
        assert type(value) is type(alone) and np.array_equal(value, alone) and getattr(value, "dtype", 0) == getattr(alone, "dtype", 0)
    assert batch(blobs, 15.1) is None and current(blobs[0], 15.1) is None and current(blobs[1], 15.1) is not None
    assert batch([encode(1, born=0.0)] * 2, 1e12) == ([1, 1], [{}])       # no ttl is no limit


def test_rows_of_one_layout_are_one_array_of_its_own():
    rows = np.arange(12, dtype=">f4").reshape(3, 4)
    values, _ = batch([encode(row, born=0.0) for row in rows], 0.0)
    assert type(values) is np.ndarray and values.dtype.str == ">f4" and np.array_equal(values, rows) and values.flags.c_contiguous
    values[:] = 0                                                         # and nobody else's
    assert batch([encode(row, born=0.0) for row in rows], 0.0)[0][2, 3] == 11


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_are_no_entry(blob):
    with pytest.raises(DamagedEntryError):
        decode(blob)
    only_damage(blob)


@settings(max_examples=600)
@given(st.integers(0, 255), st.binary(max_size=100), st.binary(max_size=20), st.one_of(st.none(), st.integers(0, 2**32 - 1)))
def test_random_payloads_with_a_right_checksum(form, payload, meta, size):
    only_damage(sealed(form, payload, meta, size))


JUNK = st.recursive(
    st.one_of(
        st.none(),
        st.integers(-(2**63), 2**64 - 1),
        st.floats(),
        st.text(max_size=5),
        st.binary(max_size=5),
        st.sampled_from(
            [
                "os:system",
                "builtins:eval",
                "builtins:int",
                "test_codec:Plain",
                f"{__name__}:Plain",
                f"{__name__}:Color",
                f"{__name__}:Page",
                "RED",
                "|",
                "<f4 C 3",
                "O",
                b"<f4 C 1",
                b"|O C 1",
            ]
        ),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.dictionaries(st.one_of(st.text(max_size=3), st.integers(0, 3)), inner, max_size=3),
        st.builds(lambda code, v: msgspec.msgpack.Ext(code, msgspec.msgpack.encode(v)), st.integers(-3, 60), inner),
    ),
    max_leaves=8,
)


@settings(max_examples=1000)
@given(st.integers(0, 60), JUNK)
def test_well_formed_junk_with_a_right_checksum(form, junk):
    RAN.clear()
    only_damage(sealed(form, msgspec.msgpack.encode(junk)))
    assert RAN == []


@settings(max_examples=300)
@given(st.sampled_from(SAMPLES), st.integers(0, 500), st.integers(0, 255))
def test_altered_entries_with_a_right_checksum(blob, at, byte):
    body = bytearray(blob[:-4])
    body[at % len(body)] = byte
    only_damage(bytes(body) + zlib.crc32(body).to_bytes(4, "little"))


RECORD, MEMBER = 49, 48


@pytest.mark.parametrize(
    "ref",
    [
        "os:system",
        "subprocess:Popen",
        "builtins:eval",
        "builtins:exec",
        "posix:system",
        "importlib:import_module",
        "antigravity:x",
        "this:s",
        "aurea_no_such:x",
        "os:",
        ":",
        "",
        "os",
        "builtins:type",
        "builtins:object",
        "collections:OrderedDict",
        "threading:Thread",
        "enum:Enum",
        "openai.types.no:X",
        "openai.cli:main",
        "xml.dom.minidom:parse",
        ["builtins:list", "os:system"],
        ["os:system", "builtins:int"],
        ["|", "subprocess:Popen"],
        [],
        [[]],
        ["|"],
        7,
        {},
        [f"{__name__}:Color", "builtins:str"],
    ],
)
def test_references_to_anything_else_are_refused_and_nothing_runs(ref, monkeypatch):
    ran = []
    monkeypatch.setattr(os, "system", ran.append)
    monkeypatch.setattr(subprocess, "Popen", type("Popen", (), {"__init__": lambda *a, **k: ran.append(a)}))
    before = set(sys.modules)
    for form, parts in (
        (RECORD, [ref, 0, {}, {}]),
        (RECORD, [ref, shape_of(Plain).mark, {0: "echo"}, {"a": "echo"}]),
        (MEMBER, [ref, "RED", "red"]),
    ):
        with pytest.raises(DamagedEntryError):
            decode(sealed(form, msgspec.msgpack.encode(parts)))
    assert ran == [] and {"antigravity", "this", "openai.cli", "xml.dom.minidom"}.isdisjoint(set(sys.modules) - before)


@pytest.mark.parametrize(
    "payload",
    [
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x08",
        b"\x91" * 100_000,
        b"\x81" * 100_000,
        b"\xdd\xff\xff\xff\xff" * 10_000,
        b"\xc7\x02\x63\x00\x00",
        b"\xd4\xff\x00",
    ],
)
def test_huge_lengths_and_deep_nests_are_damage(payload):
    with pytest.raises(DamagedEntryError):
        decode(sealed(0, payload))
    blob = msgspec.msgpack.encode(None)
    for _ in range(2_000):
        blob = msgspec.msgpack.encode([msgspec.msgpack.Ext(8, blob)])
        if len(blob) > 60_000:
            break
    with pytest.raises(DamagedEntryError):
        decode(sealed(8, blob))


@pytest.mark.parametrize(
    "layout",
    [
        b"|O C 1",
        b"<f4 C 4611686018427387904 4",
        b"<f4 C -2",
        b"|S0 C 1000000000",
        b"<U0 C 1000000000",
        b"<f4 K 2",
        b"<f4 C",
        b"f4,f4 C 1",
        b"<f4 C 0 " + b"9" * 30,
        b"i4 C x",
        b"(2,)i4 C 1",
        b"V8 C 1",
        b"@ C",
        b"<f16@vax C 1",
        b"\xff",
    ],
)
def test_layouts_that_lie(layout):
    for data in (b"", b"12345678"):
        with pytest.raises(DamagedEntryError):
            decode(sealed(7, len(layout).to_bytes(2, "little") + layout + data))


def test_a_changed_class_is_not_filled_with_old_fields():
    with pytest.raises(LookupError):
        made(Plain, 12345, {}, {"a": 1})


# ---- other processes

SHAPES = """
    from dataclasses import dataclass
    from enum import Enum
    from typing import Generic, TypeVar
    import pydantic
    T = TypeVar("T")
    class Kind(Enum): A = 1
    @dataclass(frozen=True, slots=True)
    class Point: x: float; kind: Kind = Kind.A
    class Item(pydantic.BaseModel): n: int
    class Page(pydantic.BaseModel, Generic[T]): items: list[T]
"""
WRITE = """
    import pathlib, numpy as np
    from shapes_of_a_user import *
    from openai.types.chat import ChatCompletion
    from aurea_orchestrator.codec import encode
    class Here(pydantic.BaseModel): a: int
    value = [Point(1.5), Page[Item](items=[Item(n=1)]), {Point(2.0): (1,)}, np.arange(3, dtype=">i2"), {"a", "b"}, Here(a=1)]
    completion = ChatCompletion(id="c", choices=[], created=1, model="m", object="chat.completion")
    for name, what in (("value", value), ("completion", completion)):
        pathlib.Path(name).write_bytes(encode(what, born=1.0, seal=b"k"))
"""
READ = """
    import pathlib, sys
    from aurea_orchestrator.codec import decode
    from aurea_orchestrator.errors import DamagedEntryError
    completion = pathlib.Path("completion").read_bytes()
    assert "openai" not in sys.modules and "numpy" not in sys.modules and "pydantic" not in sys.modules
    assert type(decode(completion, b"k").value).__name__ == "ChatCompletion"
    blob = pathlib.Path("value").read_bytes()
    try: decode(blob, b"k")
    except DamagedEntryError as error: assert "import the module" in str(error) and "shapes_of_a_user" not in sys.modules
    else: raise SystemExit("read a class that was never imported")
    from shapes_of_a_user import *
    class Here(pydantic.BaseModel): a: int
    value = decode(blob, b"k").value
    import numpy as np
    assert value[0] == Point(1.5) and value[0].kind is Kind.A and type(value[1]) is Page[Item] and value[1].items == [Item(n=1)]
    assert value[2] == {Point(2.0): (1,)} and value[3].dtype == ">i2" and value[4] == {"a", "b"} and value[5] == Here(a=1)
    print("read")
"""


def test_what_one_process_stores_another_reads(tmp_path):
    (tmp_path / "shapes_of_a_user.py").write_text(textwrap.dedent(SHAPES))
    root = pathlib.Path(__file__).parent.parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(tmp_path)])}
    out = [
        subprocess.run(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(script)], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        for script in (WRITE, READ)
    ]
    assert [one.stderr for one in out] == ["", ""] and out[1].stdout == "read\n"


def test_importing_the_codec_imports_neither_numpy_nor_pydantic():
    code = """if True:
        import sys, aurea_orchestrator.codec as codec
        codec.decode(codec.encode({"a": [1.5] * 20}, born=0.0))
        print(sorted({"numpy", "pydantic", "openai"} & set(sys.modules)))"""
    root = pathlib.Path(__file__).parent.parent
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert out.stdout == "[]\n", out.stderr


def test_ids_of_uuids_keep_how_safe_they_are():
    value = uuid.uuid1()
    assert again(value).is_safe is value.is_safe and again(value) == value
