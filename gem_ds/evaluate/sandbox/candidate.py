"""The candidate's side: runs the program in the jail, then serves what the judge asks of it.

Nothing here is trusted: the program shares this process and may change all of it. What it sends is
data, and is read as such by `gem_ds.evaluate.sandbox.judge`. The messages, over a `Link`:

    ("ask", operation, args, named)      of the judge; `named` are names and values in turn
    ("call", number, args, kwargs)       of the candidate: calls a function that was an argument
    ("value", result)                    the answer to the last of these that has none yet, or
    ("raised", exception)                the exception that there was instead (`errors`)
    ("finish",)                          there are no more questions

The first answer comes unasked, when the program has run, and tests that came with it.
"""

from __future__ import annotations

import _operator as operator  # in C; see gem_ds.evaluate.sandbox.values
import builtins
import os
import sys
from _collections_abc import Callable, Sequence

from gem_ds.evaluate.sandbox.errors import Errors
from gem_ds.evaluate.sandbox.finder import NAMES, show
from gem_ds.evaluate.sandbox.link import Channel, Link
from gem_ds.evaluate.sandbox.values import MUTABLE, Any, contents, refill
from gem_ds.evaluate.sandbox.wire import Decoder

#: heirs of these behave as what they inherit, whatever package they are of
_HEIRS = (float, str, bytes)

MODULE = "candidate"  # not __main__: what a program does when it is run as a script is not judged

#: what may be asked of two objects of the candidate, but of none together with plain data
COMPARED = ("eq", "ne", "lt", "le", "gt", "ge")
#: what may be asked of an object and a second operand, in either order
ARITHMETIC = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
    *("and_", "or_", "xor", "lshift", "rshift"),
)
IN_PLACE = tuple(f"i{name.rstrip('_')}" for name in ARITHMETIC)
UNARY = ("neg", "pos", "abs", "invert", "index")
ITEMS = ("getitem", "setitem", "delitem")
#: functions of Python's, each asking an object's method of that name with two lines around it
BUILTIN = (
    *("setattr", "delattr", "len", "hash", "reversed", "round", "format", "divmod"),
    *("bool", "int", "float", "complex", "bytes", "str", "repr"),
)


def main(job: int, channel: int, packages: Sequence[str] = ()) -> None:
    """Runs the job of one open file, on the channel of another; `packages` as `finder.show`."""
    show(packages)
    sources = Decoder().decode(os.pread(job, os.fstat(job).st_size, 0))
    os.close(job)
    sys.argv = [f"{MODULE}.py"]
    sys.path.insert(0, "")
    run(sources, Channel(channel))
    os._exit(0)


def run(sources: Sequence[str], channel: Channel) -> None:
    """Runs sources in one namespace, and answers until the judge has no more questions."""
    module = type(sys)(MODULE)
    sys.modules[MODULE] = module
    service = _Service(module.__dict__, channel)
    try:
        for source in sources:
            exec(compile(source, f"{MODULE}.py", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        service.send_error(error)
        return
    service.link.send("value", None)
    service.serve()
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()  # a program ends when its threads have ended


class _Service:
    """Answers the judge's requests about the program's objects."""

    def __init__(self, namespace: dict[str, Any], channel: Channel) -> None:
        self._namespace = namespace
        self.link = Link(channel, self._refer, self._resolve)
        self._errors = Errors(lambda args: True)
        self._borrowed: dict[int, Any] = {}
        self._missing: str | None = None  # a name in the request that the program does not define
        self._operations: dict[str, Callable[..., Any]] = {
            "copy": lambda value: __import__("copy").copy(value),
            "deepcopy": lambda value: __import__("copy").deepcopy(value),
            **{name: getattr(builtins, name) for name in ("getattr", "iter", "next", *BUILTIN)},
            **{
                name: getattr(operator, name)
                for name in ("call", *COMPARED, *ARITHMETIC, *IN_PLACE, *UNARY, *ITEMS)
            },
        }

    def serve(self) -> tuple[Any, ...]:
        """Serves requests until another message comes, and returns that."""
        while True:
            self._missing = None
            try:
                (kind, *content), _ = self.link.receive()
            except EOFError:
                os._exit(1)  # there is no judge any more
            except BaseException as error:  # an object of the program's that cannot be in a set
                self.send_error(error)
                continue
            if kind != "ask":
                return kind, *content
            try:
                if self._missing is not None:
                    raise NameError(f"name {self._missing!r} is not defined")
                operation, args, named = content
                kwargs: dict[str, Any] = {}
                refill(kwargs, named)
                self.link.send("value", self._operations[operation](*args, **kwargs))
            except BaseException as error:
                self.send_error(error)

    def send_error(self, error: BaseException) -> None:
        """Answers with an exception."""
        try:
            self.link.send("raised", self._errors.described(error))
        except Exception:  # its arguments cannot be had
            bare = Exception(type(error).__name__)
            self.link.send("raised", self._errors.described(bare))

    def call_judge(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls the judge's function of that number, which may ask something meanwhile."""
        self.link.send("call", number, args, kwargs)
        kind, content = self.serve()
        if kind == "value":
            return content
        raise self._errors.rebuilt(content)

    def _refer(self, value: Any) -> tuple[str, Any]:
        if type(value) is _Borrowed:
            return "function", value._number
        number = self.link.number_of(value)
        if type(value).__module__.partition(".")[0] in NAMES and not isinstance(value, _HEIRS):
            return "package", ()
        is_iterator = hasattr(type(value), "__next__") and not hasattr(type(value), "__len__")
        return "iterator" if is_iterator else "object", (number, _hash(value))

    def _resolve(self, kind: str, name: Any) -> Any:
        if kind == "object":
            return self.link.lent[name]
        if kind == "heir":
            _, number, inherited = name
            value = self.link.lent[number]
            if isinstance(value, MUTABLE):
                refill(value, contents(inherited))
            return value
        if kind in ("function", "iterator"):
            number, *described = name
            if number not in self._borrowed:
                self._borrowed[number] = _Borrowed(self, number, *described)
            function = self._borrowed[number]
            return function if kind == "function" else _each(function)
        if name in self._namespace:
            return self._namespace[name]
        if not hasattr(builtins, name):
            self._missing = name
        return getattr(builtins, name, None)


def _hash(value: Any) -> int | None:
    """What tells the value from others in a set; None if it cannot be in one."""
    try:
        return hash(value)
    except Exception:
        return None


def _each(function: Callable[[], Any]) -> Any:
    """An iterator of the judge's, by the function that gives the next item."""
    while True:
        try:
            item = function()
        except StopIteration as end:
            return end.value
        yield item


class _Borrowed:
    # A function that the judge passed as an argument. It has no docstring, and what it has is what
    # a function has, as far as that tells nothing of what the function does.

    __slots__ = (
        *("_service", "_number", "__name__", "__qualname__", "__code__", "__defaults__"),
        *("__kwdefaults__", "__annotations__", "__dict__", "__weakref__"),
    )

    def __init__(self, service: _Service, number: int, name: str = "", code: Any = None) -> None:
        self._service = service
        self._number = number
        self.__name__ = self.__qualname__ = name
        self.__annotations__ = {}
        if code is not None:
            names, counts, flags = code
            argcount, posonlyargcount, kwonlyargcount = counts
            self.__code__ = (lambda: None).__code__.replace(
                co_name=name,
                co_varnames=names,
                co_nlocals=len(names),
                co_argcount=argcount,
                co_posonlyargcount=posonlyargcount,
                co_kwonlyargcount=kwonlyargcount,
                co_flags=flags,
            )
            self.__defaults__ = self.__kwdefaults__ = None  # they are not told

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._service.call_judge(self._number, args, kwargs)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        return lambda *args, **kwargs: self(instance, *args, **kwargs)
