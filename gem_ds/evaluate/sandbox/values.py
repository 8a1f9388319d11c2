"""Plain data: the types that judge and candidate can say to each other, and no others.

Kept to the exact type: None, booleans, integers, floats, strings (surrogates too), bytes, list,
tuple, dict, set, frozenset, deque, bytearray, Counter, OrderedDict, defaultdict, named tuples,
views of dicts, and what `CONSTRUCTED` and `BUILTINS` list.

An instance of a subclass is read by the methods of what it inherits from, so that nothing which it
overrides is asked.
"""

from __future__ import annotations

import builtins
import sys

# In C, or loaded with `os`: a fresh interpreter imports this file for each program, and to load
# `collections`, `operator` or `typing` as files would take longer than all the rest.
from _collections import OrderedDict, defaultdict, deque
from _collections_abc import Callable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any
else:
    Any = object

MAX_BYTES = 16 << 20  # of one message


class WireError(ValueError):
    """The value cannot be sent, or the bytes are not a value."""


SINGLES = {b"N": None, b"1": True, b"0": False, b"E": Ellipsis, b"I": NotImplemented}
_FUNCTIONS = (abs, all, any, chr, len, max, min, ord, pow, repr, sorted, sum)
BUILTINS = {
    **{function.__name__: function for function in _FUNCTIONS},
    **{name: kind for name, kind in vars(builtins).items() if isinstance(kind, type)},
}
BUILTIN_NAMES = {id(value): name for name, value in BUILTINS.items()}
#: by the name of a class: the arguments that make an equal object
CONSTRUCTED: dict[str, Callable[[Any], tuple[Any, ...]]] = {
    "builtins.complex": lambda x: (x.real, x.imag),
    "builtins.mappingproxy": lambda x: (dict(x),),
    "builtins.memoryview": lambda x: (x.tobytes(),),
    "builtins.range": lambda x: (x.start, x.stop, x.step),
    "builtins.slice": lambda x: (x.start, x.stop, x.step),
    "collections.ChainMap": lambda x: tuple(x.maps),
    "decimal.Decimal": lambda x: (str(x),),
    "fractions.Fraction": lambda x: (x.numerator, x.denominator),
    "datetime.timedelta": lambda x: (x.days, x.seconds, x.microseconds),
    "datetime.date": lambda x: (x.year, x.month, x.day),
    "datetime.time": lambda x: (x.hour, x.minute, x.second, x.microsecond),
    "datetime.datetime": lambda x: (*x.timetuple()[:6], x.microsecond),
}
_UNNAMED = {"builtins.mappingproxy": type(type.__dict__)}
VIEWS = {type({}.keys()): b"k", type({}.values()): b"v", type({}.items()): b"m"}
MUTABLE_KINDS: dict[bytes, type] = {  # the most special first
    b"V": defaultdict,
    b"O": OrderedDict,
    b"D": dict,
    b"L": list,
    b"S": set,
    b"Q": deque,
    b"A": bytearray,
}
MUTABLE = tuple(MUTABLE_KINDS.values())
COUNTER = b"C"  # the one that is not in C, and is loaded if there is one
#: what every class that `namedtuple` makes has, beside its fields
_OF_NAMED_TUPLES = {
    *("__annotate__", "__annotate_func__", "__annotations__", "__annotations_cache__", "__doc__"),
    *("__firstlineno__", "__getnewargs__", "__match_args__", "__module__", "__new__"),
    *("__orig_bases__", "__replace__", "__repr__", "__slots__", "__static_attributes__"),
    *("_asdict", "_field_defaults", "_fields", "_make", "_replace"),
}


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
    kind: Any = next(kind for kind in MUTABLE if isinstance(container, kind))
    kind.clear(container)
    if issubclass(kind, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            kind.__setitem__(container, key, value)
    elif kind is set:
        set.update(container, items)
    else:
        kind.extend(container, items)


def class_of(name: str) -> Any:
    """The class that an entry of `CONSTRUCTED` speaks of, as far as it is loaded."""
    module, _, attribute = name.rpartition(".")
    if name in _UNNAMED:
        return _UNNAMED[name]
    return getattr(sys.modules.get(module), attribute, None)


def constructed_name(value: Any) -> str | None:
    """The name in `CONSTRUCTED` for a value that its arguments would tell in full."""
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name not in CONSTRUCTED or class_of(name) is not kind:
        return None
    if getattr(value, "tzinfo", None) is not None or getattr(value, "fold", False):
        return None  # a moment in a time zone
    if isinstance(value, memoryview) and not (value.readonly and value.format == "B"):
        return None
    return name


def is_named_tuple(kind: type) -> bool:
    """Whether a class is one that `namedtuple` made, to which nothing was added."""
    fields = getattr(kind, "_fields", None)
    if kind.__bases__ != (tuple,) or not isinstance(fields, tuple):
        return False
    return _OF_NAMED_TUPLES.union(fields).issuperset(vars(kind))


def is_method_name(name: str) -> bool:
    """Whether plain data, or what is made of it, has an attribute of that name."""
    return any(hasattr(kind, name) for kind in (*BUILTINS.values(), *VIEWS, *MUTABLE))
