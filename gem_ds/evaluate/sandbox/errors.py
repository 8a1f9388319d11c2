"""Exceptions on their way between judge and candidate, as data.

    ("own", number, classes, name, args, text, attributes)    raised on the sender's side
    ("yours", number)                                          one that the receiver once sent

What comes back is the object that was sent. Another one is made anew: of its class, if that is
Python's or the library's and is loaded; else of a new class with the name and text of the
candidate's, that inherits from the nearest one which is. Attributes that are data come along.
"""

from __future__ import annotations

import builtins
import sys
from _collections_abc import Callable

from gem_ds.evaluate.sandbox.values import Any, WireError
from gem_ds.evaluate.sandbox.wire import Encoder

_MAX_TEXT = 1000  # characters
_NOT_TOLD = ("unittest",)  # whose exceptions tell a runner of tests what to do


class Errors:
    """The exceptions that one side has sent and received; `is_told` is of their arguments."""

    def __init__(self, is_told: Callable[[Any], bool]) -> None:
        self._is_told = is_told
        self.text = ""  #: of the last one that was received
        self._sent: list[BaseException] = []
        self._received: dict[int, tuple[BaseException, int]] = {}

    def described(self, error: BaseException) -> tuple[Any, ...]:
        """An exception as data."""
        if id(error) in self._received:
            return "yours", self._received[id(error)][1]
        self._sent.append(error)
        classes = tuple((kind.__module__, kind.__qualname__) for kind in type(error).__mro__)
        base = next(k for k in type(error).__mro__ if _class(k.__module__, k.__qualname__) is k)
        args, attributes = (), {}
        try:
            args = base.__reduce__(error)[1]
            attributes = {k: v for k, v in vars(error).items() if is_plain(v)}
        except Exception:  # the candidate's own class may do what it likes
            pass
        told = args if self._is_told(args) else ()
        number = len(self._sent) - 1
        return "own", number, classes, type(error).__name__, told, _text(error), attributes

    def rebuilt(self, description: Any) -> BaseException:
        """The exception that was described; raises `WireError` if it is no description."""
        error: BaseException
        try:
            where, number, *rest = description
            if where == "yours":
                error = self._sent[number]
                self.text = f"{type(error).__name__}: {_text(error)}"
                return error
            error = _made(*rest)
            self.text = f"{rest[1]}: {rest[3]}"
        except (TypeError, ValueError, LookupError, AttributeError, StopIteration) as problem:
            raise WireError(f"the exception is none: {problem}") from problem
        self._received[id(error)] = error, number
        return error


def is_plain(value: Any) -> bool:
    """Whether a value can be sent without a reference."""
    try:
        Encoder().encode(value)
    except WireError:
        return False
    return True


def _text(error: BaseException) -> str:
    try:
        return str(error)[:_MAX_TEXT]
    except BaseException:  # it is the candidate's code that says it
        return ""


def _made(classes: Any, name: str, args: Any, text: str, attributes: Any) -> BaseException:
    found = [_class(module, qualname) for module, qualname in classes]
    kind: type[BaseException] = next(kind for kind in found if kind is not None)
    if kind is not found[0]:
        own = {"__str__": lambda self: text, "__module__": "candidate"}
        kind = type(str(name), (kind,), own)
    try:
        error = kind(*args)
    except Exception:  # it wants other arguments
        error = kind.__new__(kind)
    for key, value in attributes.items():
        if not key.startswith("__") and not callable(value):
            error.__dict__[key] = value
    return error


def _class(module: str, qualname: str) -> Any:
    """A class of exceptions of that name, if it is loaded and neither side's own."""
    root = module.partition(".")[0]
    if root in _NOT_TOLD or root not in sys.stdlib_module_names:
        return None
    kind = getattr(sys.modules.get(module), qualname, None)
    is_builtin = getattr(builtins, qualname, None) is kind
    kinds = BaseException if is_builtin else Exception
    return kind if isinstance(kind, type) and issubclass(kind, kinds) else None
