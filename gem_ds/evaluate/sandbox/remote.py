"""What stands in the tests for a name or an object of the candidate's.

A `Remote` may be called, passed back, asked for its attributes, items, length or text, iterated and
copied; what its own methods answer is data, or another `Remote`. With plain data it is never equal,
nor less or greater, for it would have to be shown the other operand and be believed. It takes part
in arithmetic, and two of them may be compared.

An `heir` is plain data of a class of the candidate's that inherits from a plain type (a member of
an IntEnum, a named tuple with a property). It behaves as what it inherits; only attributes and keys
that this has not are asked of the candidate.

Whatever is asked of an object but the next item of an iteration counts as a say (`in_jail`).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

from gem_ds.evaluate.sandbox.candidate import (
    ARITHMETIC,
    BUILTIN,
    COMPARED,
    IN_PLACE,
    ITEMS,
    UNARY,
)
from gem_ds.evaluate.sandbox.values import MUTABLE, contents, refill


class NeedsJailError(BaseException):
    """A value of the tests cannot be sent, so the tests have to run beside the program."""


class Remote:
    """A name or an object of the candidate's, by its reference; objects know their hash.

    `jail` is the `judge.Conversation` that is asked.
    """

    __slots__ = ("_hash", "_jail", "_reference")
    _jail: Any
    _reference: tuple[str, Any]
    _hash: int | None

    def __init__(self, jail: Any, reference: tuple[str, Any], hash_: int | None = None) -> None:
        for name, value in (("_jail", jail), ("_reference", reference), ("_hash", hash_)):
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._jail.ask("getattr", self, name)

    def __iter__(self) -> Iterator[Any]:
        iterator = self._jail.ask("iter", self)
        return iterator if isinstance(iterator, Remote) else iter(iterator)

    def __hash__(self) -> int:
        if self._hash is None and self._reference[0] == "object":
            raise TypeError("unhashable type")
        return hash(self._reference) if self._hash is None else self._hash

    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError("an object of the program cannot be pickled here")

    def __deepcopy__(self, memo: object) -> Any:
        return self._jail.ask("deepcopy", self)


class RemoteIterator(Remote):
    """What is iterated, and knows no length: `list` would else ask for it."""

    __slots__ = ()
    __len__ = None

    def __iter__(self) -> Iterator[Any]:
        return self


def _asking(operation: str) -> Callable[..., Any]:
    return lambda self, /, *args, **kwargs: self._jail.ask(operation, self, *args, **kwargs)


def _asking_reflected(operation: str) -> Callable[..., Any]:
    return lambda self, other: self._jail.ask(operation, other, self)


def _comparing(operation: str) -> Callable[[Remote, object], Any]:
    def method(self: Remote, other: object) -> Any:
        if self._jail.may_compare(other):
            return self._jail.ask(operation, self, other)
        return NotImplemented

    return method


for _name in ("call", "next", "copy", *UNARY, *BUILTIN, *ITEMS, *IN_PLACE):
    if _name != "hash":
        setattr(Remote, f"__{_name}__", _asking(_name))
for _name in ARITHMETIC:
    setattr(Remote, f"__{_name.rstrip('_')}__", _asking(_name))
    setattr(Remote, f"__r{_name.rstrip('_')}__", _asking_reflected(_name))
for _name in COMPARED:
    setattr(Remote, f"__{_name}__", _comparing(_name))


_HEIRS: dict[type, type] = {}  # by what they inherit from; a named tuple is of a class of its own


def heir(remote: Remote, inherited: Any) -> Any:
    """The plain value `inherited`, of which `remote` stands for all that it has beyond that."""
    kind = type(inherited)
    own = {
        "_remote": None,
        "__getattr__": lambda self, name: getattr(self._remote, name),
        "__copy__": lambda self: self._remote.__copy__(),
        "__deepcopy__": lambda self, memo: self._remote.__deepcopy__(memo),
        "__str__": lambda self: str(self._remote),
        "__repr__": lambda self: repr(self._remote),
        "__format__": lambda self, spec: format(self._remote, spec),
    }
    if issubclass(kind, dict):
        own["__missing__"] = lambda self, key: self._remote[key]
    made = _HEIRS.get(kind) or type(kind.__name__, (kind,), own)
    if not isinstance(inherited, tuple):
        _HEIRS[kind] = made
    if isinstance(inherited, defaultdict):
        value = made(inherited.default_factory)
    elif isinstance(inherited, deque):
        value = made((), inherited.maxlen)
    elif isinstance(inherited, MUTABLE):
        value = made()
    elif isinstance(inherited, tuple):
        value = tuple.__new__(made, inherited)
    else:
        value = made(inherited)
    if isinstance(inherited, MUTABLE):
        refill(value, contents(inherited))
    value._remote = remote
    return value


def remote_of(value: Any) -> Remote | None:
    """What stands for an heir; None for all else."""
    return vars(value).get("_remote") if "_remote" in vars(type(value)) else None
