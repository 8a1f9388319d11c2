"""The encoding between judge and candidate: what is plain survives exactly, all else is refused."""

import contextlib
import datetime
import enum
import math
import os
import socket
from collections import ChainMap, Counter, OrderedDict, defaultdict, deque, namedtuple
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gem_ds.evaluate.sandbox.link import Channel
from gem_ds.evaluate.sandbox.values import MAX_BYTES, WireError, contents, refill
from gem_ds.evaluate.sandbox.wire import MAX_DEPTH, Decoder, Encoder

Point = namedtuple("Point", "x y")


TYPES = (type(None), bool, int, bytes, Fraction, datetime.date, datetime.timedelta)
any_text = st.text(st.characters(codec=None, categories=None))  # surrogates too
hashables = st.recursive(
    st.one_of(map(st.from_type, TYPES))
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | any_text
    | st.decimals(allow_nan=False)
    | st.datetimes().map(lambda moment: moment.replace(fold=0))
    | st.builds(range, st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 3))
    | st.sampled_from([..., NotImplemented, int, len, ValueError, dict]),
    lambda inner: (
        st.lists(inner, max_size=4).map(tuple)
        | st.frozensets(inner, max_size=4)
        | st.builds(Point, inner, inner)
    ),
    max_leaves=10,
)
values = st.recursive(
    hashables | st.binary().map(bytearray),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(hashables, inner, max_size=4)
        | st.dictionaries(hashables, inner, max_size=4).map(OrderedDict)
        | st.dictionaries(hashables, inner, max_size=4).map(lambda d: defaultdict(list, d))
        | st.lists(hashables, max_size=4).map(Counter)
        | st.sets(hashables, max_size=4)
        | st.builds(deque, st.lists(inner, max_size=4), st.none() | st.integers(4, 9))
    ),
    max_leaves=20,
)


@pytest.mark.parametrize("value", [bool, len, ValueError])
def test_what_a_named_tuple_holds_that_can_be_called_is_told(value):
    """It could be called like a method of the tests' own choice; who reads it has to decide."""
    decoder = Decoder()
    assert decoder.decode(Encoder().encode([Point(1, 2), Point(1, value)])) == [(1, 2), (1, value)]
    assert decoder.methods == [("y", value)]


def there_and_back(value):
    return Decoder().decode(Encoder().encode(value))


def same(a, b) -> bool:
    """Equal, and of the same types all the way down; named tuples by their names."""
    if isinstance(a, Point):
        return type(b).__name__ == "Point" and b._fields == a._fields and same(tuple(a), tuple(b))
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, set | frozenset):
        return a == b and Counter(type(x).__name__ for x in a) == Counter(
            type(x).__name__ for x in b
        )
    return a == b and repr(a) == repr(b)


@given(values)
@settings(max_examples=100, deadline=None)
def test_plain_data_survives_exactly(value):
    assert same(value, there_and_back(value))


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        "\ud83d\ude00",
        slice(1, None, 2),
        Decimal("NaN"),
        Decimal("1E+999999"),
        datetime.time(1, 2, 3, 4),
        {1: 2}.keys(),
        {1: 2}.items(),
        ChainMap({1: 2}, {1: 3, 4: 5}),
        MappingProxyType({1: 2}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_awkward_values_survive(value):
    found = there_and_back(value)
    assert type(found) is type(value)
    assert repr(found) == repr(value)


def test_integers_too_long_to_print_survive():
    assert there_and_back(-(10**50000)) == -(10**50000)


def test_subclasses_become_what_they_inherit_from():
    class Liar(int):
        def __eq__(self, other):
            return True

        __hash__ = int.__hash__

        def bit_length(self):
            return 1

        def to_bytes(self, *args, **kwargs):
            return b"\1"

    class LyingList(list):
        def __iter__(self):
            return iter([1, 2, 3])

        def __getitem__(self, at):
            return 9

    class Color(enum.IntEnum):
        RED = 3

    assert same(there_and_back([Liar(77), LyingList([5]), Color.RED]), [77, [5], 3])


def test_shared_and_cyclic_structure_survives():
    shared: list = [1]
    value: list = [shared, {"again": shared}]
    value.append(value)
    found = there_and_back(value)
    assert found[0] is found[1]["again"]
    assert found[2] is found


def test_a_reply_can_speak_of_the_requests_containers():
    """Otherwise a test would not see its arguments change, or the same object come back."""
    inner: list = [2]
    argument = {"a": inner, "b": set()}
    request = Encoder()
    received = Decoder()
    theirs = received.decode(request.encode((argument,)))[0]
    theirs["a"].append(theirs["b"])
    states = tuple(map(contents, received.objects))
    message = Encoder(known=received.objects).encode((theirs["a"], states))
    result, states = Decoder(known=request.objects).decode(message)
    for container, items in zip(request.objects, states, strict=True):
        refill(container, items)
    assert result is inner
    assert inner == [2, set()]
    assert inner[1] is argument["b"]


@pytest.mark.parametrize(
    "value",
    [object(), lambda: None, math, Exception("x"), iter([]), memoryview(bytearray(1))],
    ids=["object", "function", "module", "exception", "iterator", "what another may write"],
)
def test_what_is_not_plain_needs_a_reference(value):
    with pytest.raises(WireError, match="not plain data"):
        Encoder().encode([value])
    message = Encoder(lambda found: ("thing", 7)).encode([value])
    assert Decoder(lambda kind, name: (kind, name)).decode(message) == [("thing", 7)]
    with pytest.raises(WireError, match="means nothing"):
        Decoder().decode(message)


def test_limits():
    nested: list = []
    for _ in range(MAX_DEPTH + 1):
        nested = [nested]
    with pytest.raises(WireError, match="nested"):
        Encoder().encode(nested)
    with pytest.raises(WireError, match="MiB"):
        Encoder().encode(bytes(MAX_BYTES + 1))
    with pytest.raises(WireError, match="MiB"):
        Encoder().encode([bytes(MAX_BYTES // 2)] * 4)


@given(st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_value_or_refused(data):
    """A candidate can send any bytes; nothing but `WireError` may come of it."""
    with contextlib.suppress(WireError):
        Decoder().decode(data)


@given(values, st.data())
@settings(max_examples=60, deadline=None)
def test_a_damaged_message_is_a_value_or_refused(value, data):
    message = bytearray(Encoder().encode(value))
    at = data.draw(st.integers(0, len(message) - 1))
    message[at] = data.draw(st.integers(0, 255))
    del message[data.draw(st.integers(at, len(message))) :]
    with contextlib.suppress(WireError):
        Decoder().decode(bytes(message))


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (b"(\xff\xff\xff\xff", "cut off"),  # a length is not believed
        (b"s\xff\xff\xff\x7f", "cut off"),
        (Encoder().encode(Decimal(1)).replace(b"decimal.Decimal", b"os.system______"), "not plain"),
    ],
)
def test_hostile_messages_are_refused(message, told):
    with pytest.raises(WireError, match=told):
        Decoder().decode(message)


def test_channel():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender, receiver = Channel(ours.fileno()), Channel(theirs.fileno())
        sender.send(b"one")
        sender.send(b"")
        assert (receiver.receive(), receiver.receive()) == (b"one", b"")
        os.write(ours.fileno(), b"\xff\xff\xff\xff")
        with pytest.raises(WireError, match="MiB"):
            receiver.receive()
        ours.close()
        with pytest.raises(EOFError):
            receiver.receive()
