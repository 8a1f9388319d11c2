"""Plain data as bytes: all that judge and candidate can say to each other.

The candidate's side is hostile, so the encoding can express data and nothing else: no class is
looked up by a name that the other side chose, nothing is called but the constructors of `values`,
and every length is checked before it is believed.

What is not plain is *foreign*: `refer` gives it a reference, of which `resolve` makes something. An
instance of a subclass of a plain type is an *heir*: where `refer` is told of it, its reference goes
before what it inherits; else it is sent as that alone.

Containers that can change are numbered in the order in which they are met, and met again they are
written as their number. So shared and cyclic structure survives, and what one message has numbered
the next ones can speak of (`link`).
"""

from __future__ import annotations

import sys
from _collections import defaultdict, deque
from _collections_abc import Callable, Iterable

from gem_ds.evaluate.sandbox import values
from gem_ds.evaluate.sandbox.values import MAX_BYTES, MUTABLE_KINDS, Any, WireError

Refer = Callable[[Any], tuple[str, Any]]  # gives a value's kind, and its name or number
Resolve = Callable[[str, Any], Any]

MAX_DEPTH = 400  # of nesting; comparing deeper values would exhaust the stack anyway
_FRAMES = 8 * MAX_DEPTH  # that reading or writing it takes
_MAX_LIMIT = (1 << 31) - 1  # of recursion, which programs like to set to the most there is
_SINGLE_TAGS = {id(value): tag for tag, value in values.SINGLES.items()}
_TEXT = ("utf-8", "surrogatepass")


def _refuse(value: object) -> tuple[str, Any]:
    raise WireError(f"a value of type {type(value).__name__} is not plain data")


def _meaningless(kind: str, name: Any) -> Any:
    raise WireError(f"a reference of kind {kind!r} means nothing here")


class Encoder:
    """Writes one message; `known` are the containers that both sides have numbered already."""

    def __init__(
        self, refer: Refer = _refuse, known: Iterable[Any] = (), *, tells_heirs: bool = False
    ) -> None:
        self.objects = list(known)  # held, so that no other object gets their ids
        self._numbers = {id(value): number for number, value in enumerate(self.objects)}
        self._refer = refer
        self._tells_heirs = tells_heirs
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
        if (name := values.constructed_name(value)) is not None:
            self._write_bytes(b"X", name.encode())
            self._write(values.CONSTRUCTED[name](value), depth + 1)
        elif kind in values.VIEWS:
            self._write_items(values.VIEWS[kind], iter(value), depth)
        elif id(value) in values.BUILTIN_NAMES:
            self._write_bytes(b"t", values.BUILTIN_NAMES[id(value)].encode())
        elif kind is _counter():
            self._write_mutable(value, depth)
        elif values.is_named_tuple(kind):
            self._write_named_tuple(value, depth)
        elif base := next((base for base in _WRITERS if issubclass(kind, base)), None):
            self._write_heir(value, base, depth)
        else:
            self._out += b"R"
            self._write(self._refer(value), depth + 1)

    def _write_heir(self, value: Any, base: type, depth: int) -> None:
        if self._numbers.get(id(value)) is None and self._tells_heirs:
            self._out += b"H"
            self._write(self._refer(value), depth + 1)
        if isinstance(getattr(type(value), "_fields", None), tuple) and base is tuple:
            self._write_named_tuple(value, depth)
        else:
            _WRITERS[base](self, value, depth)

    def _write_named_tuple(self, value: Any, depth: int) -> None:
        kind = type(value)
        self._out += b"U"
        self._write((kind.__name__, kind._fields), depth + 1)
        self._write_items(b"(", tuple.__iter__(value), depth)

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
        kinds = {values.COUNTER: _counter(), **MUTABLE_KINDS}
        self._out += next(tag for tag, kind in kinds.items() if isinstance(value, kind))
        if isinstance(value, deque):
            self._write(value.maxlen, depth + 1)
        elif isinstance(value, defaultdict):
            self._write(value.default_factory, depth + 1)
        self._write(values.contents(value), depth)


def _counter() -> Any:
    return getattr(sys.modules.get("collections"), "Counter", ())


def _packed(length: int) -> bytes:
    return length.to_bytes(4, "little")


def _int_bytes(value: int) -> bytes:
    return int.to_bytes(value, int.bit_length(value) // 8 + 1, "little", signed=True)


_ALL = slice(None)
_WRITERS: dict[type, Callable[[Encoder, Any, int], None]] = {
    int: lambda to, value, depth: to._write_bytes(b"i", _int_bytes(value)),
    float: lambda to, value, depth: to._write_bytes(b"f", float.hex(value).encode()),
    str: lambda to, value, depth: to._write_bytes(b"s", str.encode(value, *_TEXT)),
    bytes: lambda to, value, depth: to._write_bytes(b"b", bytes.__getitem__(value, _ALL)),
    tuple: lambda to, value, depth: to._write_items(b"(", tuple.__iter__(value), depth),
    frozenset: lambda to, value, depth: to._write_items(b"Z", frozenset.__iter__(value), depth),
    **dict.fromkeys(values.MUTABLE, Encoder._write_mutable),
}


class Decoder:
    """Reads one message; `known` are the containers that both sides have numbered already."""

    def __init__(self, resolve: Resolve = _meaningless, known: Iterable[Any] = ()) -> None:
        self.objects = list(known)
        #: what can be called and lies in a field of a named tuple, as if it were a method
        self.methods: list[tuple[str, Any]] = []
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
        if tag in values.SINGLES:
            return values.SINGLES[tag]
        if tag in MUTABLE_KINDS:
            return self._read_mutable(MUTABLE_KINDS[tag], depth)
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
        values.refill(container, self._read(depth))
        return container

    def _read_heir(self, depth: int) -> Any:
        kind, name = self._read(depth + 1)
        number = len(self.objects)
        inherited = self._read(depth)
        value = self._resolve("heir", (kind, name, inherited))
        if number < len(self.objects) and self.objects[number] is inherited:
            self.objects[number] = value
        return value

    def _read_named_tuple(self, depth: int) -> Any:
        named = __import__("collections").namedtuple(*self._read(depth + 1))
        value = named._make(self._read(depth))
        self.methods += [item for item in value._asdict().items() if callable(item[1])]
        return value

    def _read_constructed(self, depth: int) -> Any:
        name = self._take_sized().decode()
        if name not in values.CONSTRUCTED:
            raise WireError(f"{name!r} is not plain data")
        module = name.partition(".")[0]
        arguments = self._read(depth + 1)
        if module == "datetime" and not all(type(number) is int for number in arguments):
            raise WireError("a moment is made of numbers")  # it would take a pickled state too
        if name == "collections.ChainMap" and not all(isinstance(a, dict) for a in arguments):
            raise WireError("a chain is made of dicts")
        __import__(module)
        return values.class_of(name)(*arguments)


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
    b"t": lambda of, depth: values.BUILTINS[of._take_sized().decode()],
    b"r": lambda of, depth: of.objects[of._take_length()],
    b"R": lambda of, depth: of._resolve(*of._read(depth + 1)),
    b"H": Decoder._read_heir,
    b"U": Decoder._read_named_tuple,
    b"X": Decoder._read_constructed,
    values.COUNTER: lambda of, depth: of._read_mutable(__import__("collections").Counter, depth),
}
