"""Plain data as bytes: all that judge and candidate can say to each other.

The candidate's side is hostile, so the encoding can express data and nothing else: no class is
looked up by a name that the other side chose, nothing is called but the constructors listed here,
and every length is checked before it is believed.

Plain, and kept to the exact type: None, booleans, integers, floats, strings (surrogates too),
bytes, list, tuple, dict, set, frozenset, deque, bytearray, Counter, OrderedDict, defaultdict, named
tuples, views of dicts, and what `_CONSTRUCTED` and `_BUILTINS` list. An instance of a subclass is
sent as what it inherits from, read by that type's own methods, so that nothing which it overrides
is asked. All else is *foreign*: `refer` gives it a reference, of which `resolve` makes something.

Containers that can change are numbered in the order in which they are met, and met again they are
written as their number. So shared and cyclic structure survives; and as both sides number alike, a
reply can speak of the request's containers: see `contents` and `refill`.
"""

from __future__ import annotations

import builtins
import os
import sys

# In C, and so there already: a fresh interpreter imports this file for each program, and to load
# `collections`, `operator` or `typing` as files would take longer than all the rest.
from _collections import OrderedDict, defaultdict, deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    Refer = Callable[[Any], tuple[str, Any]]  # gives a value's kind, and its name or number
    Resolve = Callable[[str, Any], Any]

MAX_BYTES = 16 << 20  # of one message
MAX_DEPTH = 400  # of nesting; comparing deeper values would exhaust the stack anyway
_FRAMES = 8 * MAX_DEPTH  # that reading or writing it takes
_MAX_LIMIT = (1 << 31) - 1  # of recursion, which programs like to set to the most there is


class WireError(ValueError):
    """The value cannot be sent, or the bytes are not a value."""


_SINGLES = {b"N": None, b"1": True, b"0": False, b"E": Ellipsis, b"I": NotImplemented}
_SINGLE_TAGS = {id(value): tag for tag, value in _SINGLES.items()}
_TEXT = ("utf-8", "surrogatepass")
_FUNCTIONS = (abs, all, any, chr, len, max, min, ord, pow, repr, sorted, sum)
_BUILTINS = {
    **{function.__name__: function for function in _FUNCTIONS},
    **{name: kind for name, kind in vars(builtins).items() if isinstance(kind, type)},
}
_BUILTIN_NAMES = {id(value): name for name, value in _BUILTINS.items()}
_CONSTRUCTED: dict[str, Callable[[Any], tuple[Any, ...]]] = {
    "builtins.complex": lambda x: (x.real, x.imag),
    "builtins.range": lambda x: (x.start, x.stop, x.step),
    "builtins.slice": lambda x: (x.start, x.stop, x.step),
    "decimal.Decimal": lambda x: (str(x),),
    "fractions.Fraction": lambda x: (x.numerator, x.denominator),
    "datetime.timedelta": lambda x: (x.days, x.seconds, x.microseconds),
    "datetime.date": lambda x: (x.year, x.month, x.day),
    "datetime.time": lambda x: (x.hour, x.minute, x.second, x.microsecond),
    "datetime.datetime": lambda x: (*x.timetuple()[:6], x.microsecond),
}
_VIEWS = {type({}.keys()): b"k", type({}.values()): b"v", type({}.items()): b"m"}
_MUTABLE_KINDS: dict[bytes, type] = {  # the most special first
    b"V": defaultdict,
    b"O": OrderedDict,
    b"D": dict,
    b"L": list,
    b"S": set,
    b"Q": deque,
    b"A": bytearray,
}
_COUNTER = b"C"  # the one that is not in C, and is loaded if there is one


def contents(container: Any) -> tuple[Any, ...] | bytes:
    """What a mutable container holds: its items, keys and values in turn, or bytes."""
    if isinstance(container, dict):
        kind: Any = OrderedDict if isinstance(container, OrderedDict) else dict
        return tuple(part for item in kind.items(container) for part in item)
    if isinstance(container, bytearray):
        return bytes(bytearray.__getitem__(container, slice(None)))
    kind = next(kind for kind in (list, set, deque) if isinstance(container, kind))
    return tuple(kind.__iter__(container))


def refill(container: Any, items: Any) -> None:
    """Makes `container`, of a type in this module's list, hold what `contents` returned."""
    container.clear()
    if isinstance(container, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            container[key] = value
    elif isinstance(container, set):
        container.update(items)
    else:
        container.extend(items)


def _refuse(value: object) -> tuple[str, Any]:
    raise WireError(f"a value of type {type(value).__name__} is not plain data")


def _meaningless(kind: str, name: Any) -> Any:
    raise WireError(f"a reference of kind {kind!r} means nothing here")


class Encoder:
    """Writes one message; `known` are the containers that both sides have numbered already."""

    def __init__(self, refer: Refer = _refuse, known: Iterable[Any] = ()) -> None:
        self.objects = list(known)  # held, so that no other object gets their ids
        self._numbers = {id(value): number for number, value in enumerate(self.objects)}
        self._refer = refer
        self._out = bytearray()

    def encode(self, value: object) -> bytes:
        """The message for `value`; raises `WireError` if it is too large or too deep."""
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(min(limit + _FRAMES, _MAX_LIMIT))
        try:
            self._write(value, 0)
        finally:
            sys.setrecursionlimit(limit)
        return bytes(self._out)

    def _write(self, value: Any, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise WireError(f"a value is nested more than {MAX_DEPTH} deep")
        if len(self._out) > MAX_BYTES:
            raise WireError(f"a value takes more than {MAX_BYTES >> 20} MiB")
        if (tag := _SINGLE_TAGS.get(id(value))) is not None:
            self._out += tag
        else:
            _WRITERS.get(type(value), Encoder._write_rare)(self, value, depth)

    def _write_rare(self, value: Any, depth: int) -> None:
        kind = type(value)
        name = f"{kind.__module__}.{kind.__qualname__}"
        if _is_constructed(value, name):
            self._write_bytes(b"X", name.encode())
            self._write(_CONSTRUCTED[name](value), depth + 1)
        elif kind in _VIEWS:
            self._write_items(_VIEWS[kind], iter(value), depth)
        elif id(value) in _BUILTIN_NAMES:
            self._write_bytes(b"t", _BUILTIN_NAMES[id(value)].encode())
        elif issubclass(kind, tuple) and isinstance(getattr(kind, "_fields", None), tuple):
            self._out += b"U"
            self._write((kind.__name__, kind._fields), depth + 1)  # type: ignore[attr-defined]
            self._write_items(b"(", tuple.__iter__(value), depth)
        elif base := next((base for base in _WRITERS if issubclass(kind, base)), None):
            _WRITERS[base](self, value, depth)
        else:
            self._out += b"R"
            self._write(self._refer(value), depth + 1)

    def _write_bytes(self, tag: bytes, data: bytes) -> None:
        if len(data) > MAX_BYTES:
            raise WireError(f"a value takes more than {MAX_BYTES >> 20} MiB")
        self._out += tag + _packed(len(data))
        self._out += data

    def _write_items(self, tag: bytes, items: Iterable[Any], depth: int) -> None:
        items = tuple(items)
        self._out += tag + _packed(len(items))
        for item in items:
            self._write(item, depth + 1)

    def _write_mutable(self, value: Any, depth: int) -> None:
        number = self._numbers.get(id(value))
        if number is not None:
            self._out += b"r" + _packed(number)
            return
        self._numbers[id(value)] = len(self.objects)
        self.objects.append(value)
        counter = getattr(sys.modules.get("collections"), "Counter", ())
        kinds = {_COUNTER: counter, **_MUTABLE_KINDS}
        self._out += next(tag for tag, kind in kinds.items() if isinstance(value, kind))
        if isinstance(value, deque):
            self._write(value.maxlen, depth + 1)
        elif isinstance(value, defaultdict):
            self._write(value.default_factory, depth + 1)
        self._write(contents(value), depth)


def _packed(length: int) -> bytes:
    return length.to_bytes(4, "little")


def _int_bytes(value: int) -> bytes:
    return int.to_bytes(value, int.bit_length(value) // 8 + 1, "little", signed=True)


def _is_constructed(value: Any, name: str) -> bool:
    """Whether it is of the class of that name in `_CONSTRUCTED`, and no moment in a time zone."""
    module, _, attribute = name.rpartition(".")
    return (
        name in _CONSTRUCTED
        and getattr(sys.modules.get(module), attribute, None) is type(value)
        and getattr(value, "tzinfo", None) is None
        and not getattr(value, "fold", 0)
    )


_ALL = slice(None)
_WRITERS: dict[type, Callable[[Encoder, Any, int], None]] = {
    int: lambda to, value, depth: to._write_bytes(b"i", _int_bytes(value)),
    float: lambda to, value, depth: to._write_bytes(b"f", float.hex(value).encode()),
    str: lambda to, value, depth: to._write_bytes(b"s", str.encode(value, *_TEXT)),
    bytes: lambda to, value, depth: to._write_bytes(b"b", bytes.__getitem__(value, _ALL)),
    tuple: lambda to, value, depth: to._write_items(b"(", tuple.__iter__(value), depth),
    frozenset: lambda to, value, depth: to._write_items(b"Z", frozenset.__iter__(value), depth),
    **dict.fromkeys(_MUTABLE_KINDS.values(), Encoder._write_mutable),
}


class Decoder:
    """Reads one message; `known` are the containers that both sides have numbered already."""

    def __init__(self, resolve: Resolve = _meaningless, known: Iterable[Any] = ()) -> None:
        self.objects = list(known)
        self._resolve = resolve
        self._data = b""
        self._at = 0

    def decode(self, data: bytes) -> Any:
        """The value of a message; raises `WireError` if the bytes are none, whatever they are."""
        self._data, self._at = data, 0
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(min(limit + _FRAMES, _MAX_LIMIT))
        try:
            value = self._read(0)
        except (TypeError, ValueError, ArithmeticError, LookupError, ImportError) as error:
            raise WireError(f"the bytes are not a message: {error}") from error
        finally:
            sys.setrecursionlimit(limit)
        if self._at != len(data):
            raise WireError("the bytes go on after the message")
        return value

    def _take(self, size: int) -> bytes:
        data = self._data[self._at : self._at + size]
        if len(data) < size:
            raise WireError("the message is cut off")
        self._at += size
        return data

    def _take_length(self) -> int:
        return int.from_bytes(self._take(4), "little")

    def _take_sized(self) -> bytes:
        return self._take(self._take_length())

    def _read(self, depth: int) -> Any:
        if depth > MAX_DEPTH + 1:
            raise WireError(f"a value is nested more than {MAX_DEPTH} deep")
        tag = self._take(1)
        if tag in _SINGLES:
            return _SINGLES[tag]
        if tag in _MUTABLE_KINDS:
            return self._read_mutable(_MUTABLE_KINDS[tag], depth)
        if tag not in _READERS:
            raise WireError(f"the tag {tag!r} is unknown")
        return _READERS[tag](self, depth)

    def _read_items(self, depth: int) -> list[Any]:
        count = self._take_length()
        if count > len(self._data) - self._at:
            raise WireError("the message is cut off")
        return [self._read(depth + 1) for _ in range(count)]

    def _read_mutable(self, kind: type, depth: int) -> Any:
        parameters = [self._read(depth + 1)] if kind in (deque, defaultdict) else []
        container = kind([], *parameters) if kind is deque else kind(*parameters)
        self.objects.append(container)
        refill(container, self._read(depth))
        return container

    def _read_named_tuple(self, depth: int) -> Any:
        named = __import__("collections").namedtuple(*self._read(depth + 1))
        values = self._read(depth)
        if any(id(value) in _BUILTIN_NAMES for value in values):
            raise WireError("a field of a named tuple may not pose as a method")
        return named._make(values)

    def _read_constructed(self, depth: int) -> Any:
        name = self._take_sized().decode()
        if name not in _CONSTRUCTED:
            raise WireError(f"{name!r} is not plain data")
        module, _, attribute = name.rpartition(".")
        arguments = self._read(depth + 1)
        if module == "datetime" and not all(type(number) is int for number in arguments):
            raise WireError("a moment is made of numbers")  # it would take a pickled state too
        return getattr(__import__(module), attribute)(*arguments)


_READERS: dict[bytes, Callable[[Decoder, int], Any]] = {
    b"i": lambda of, depth: int.from_bytes(of._take_sized(), "little", signed=True),
    b"f": lambda of, depth: float.fromhex(of._take_sized().decode()),
    b"s": lambda of, depth: of._take_sized().decode(*_TEXT),
    b"b": lambda of, depth: of._take_sized(),
    b"(": lambda of, depth: tuple(of._read_items(depth)),
    b"Z": lambda of, depth: frozenset(of._read_items(depth)),
    b"k": lambda of, depth: dict.fromkeys(of._read_items(depth)).keys(),
    b"v": lambda of, depth: dict(enumerate(of._read_items(depth))).values(),
    b"m": lambda of, depth: dict(of._read_items(depth)).items(),
    b"t": lambda of, depth: _BUILTINS[of._take_sized().decode()],
    b"r": lambda of, depth: of.objects[of._take_length()],
    b"R": lambda of, depth: of._resolve(*of._read(depth + 1)),
    b"U": Decoder._read_named_tuple,
    b"X": Decoder._read_constructed,
    _COUNTER: lambda of, depth: of._read_mutable(__import__("collections").Counter, depth),
}


class Channel:
    """Messages over an open stream socket, each after its length.

    Where the socket has timeouts, `while_waiting` is called at each.
    """

    def __init__(self, descriptor: int, while_waiting: Callable[[], None] = lambda: None) -> None:
        self._descriptor = descriptor
        self._while_waiting = while_waiting

    def send(self, message: bytes) -> None:
        """Sends one message; raises `OSError` where nobody receives."""
        data = memoryview(_packed(len(message)) + message)
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:
                self._while_waiting()

    def receive(self) -> bytes:
        """The next message; raises `EOFError` where none is to come, `WireError` for a huge one."""
        size = int.from_bytes(self._receive(4), "little")
        if size > MAX_BYTES + (1 << 20):
            raise WireError(f"a message takes more than {MAX_BYTES >> 20} MiB")
        return self._receive(size)

    def _receive(self, size: int) -> bytes:
        parts = []
        while size:
            try:
                part = os.read(self._descriptor, min(size, 1 << 20))
            except BlockingIOError:
                self._while_waiting()
                continue
            except ConnectionError:
                part = b""
            if not part:
                raise EOFError("the other side has closed")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)
