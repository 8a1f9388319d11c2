"""The candidate's side: runs the program in the jail, then serves what the judge asks of it.

Nothing here is trusted: the program shares this process and may change all of it. What it sends is
data, and is read as such by `gem_ds.evaluate.sandbox.judge`. The messages:

    ("value", result, states)                states: what the request's containers hold now
    ("raised", bases, args, text, states)    an exception, by the names of its builtin bases
    ("call",), (number, args, kwargs)        calls a function that was an argument

The first answer comes unasked, when the program has run, and tests that came with it.
"""

from __future__ import annotations

import _operator as operator  # in C; see gem_ds.evaluate.sandbox.wire
import builtins
import itertools
import os
import sys

from gem_ds.evaluate.sandbox.wire import TYPE_CHECKING, Channel, Decoder, Encoder, contents

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

MODULE = "candidate"  # not __main__: what a program does when it is run as a script is not judged

#: what may be asked of two objects of the candidate, but of none together with plain data
SYMMETRIC = (
    *("eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod"),
    *("pow", "matmul", "and_", "or_", "xor"),
)
UNARY = ("neg", "pos", "abs", "invert")
ITEMS = ("getitem", "setitem", "delitem")


def main(job: int, channel: int) -> None:
    """Runs the job of one open file, on the channel of another."""
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
        service.send_error(error, [])
        return
    channel.send(Encoder().encode(("value", None, ())))
    while service.answer():
        pass
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()  # a program ends when its threads have ended


class _Service:
    """Answers the judge's requests about the program's objects."""

    def __init__(self, namespace: dict[str, Any], channel: Channel) -> None:
        self._namespace = namespace
        self._channel = channel
        self._lent: list[Any] = []
        self._operations: dict[str, Callable[..., Any]] = {
            "call": lambda function, /, *args, **kwargs: function(*args, **kwargs),
            "take": lambda items, count: list(itertools.islice(items, count)),  # less at the end
            **{f.__name__: f for f in (getattr, setattr, isinstance, iter, len, hash)},
            **{f.__name__: f for f in (bool, int, float, str, repr)},
            **{name: getattr(operator, name) for name in (*SYMMETRIC, *UNARY, *ITEMS)},
        }

    def answer(self) -> bool:
        """Serves one request; false if there are no more."""
        request = Decoder(self._resolve)
        message = self._channel.receive()
        try:
            operation, args, kwargs = request.decode(message)
            if operation == "finish":
                return False
            result = self._operations[operation](*args, **kwargs)
            self._send(("value", result), request.objects)
        except BaseException as error:
            self.send_error(error, request.objects)
        return True

    def send_error(self, error: BaseException, objects: list[Any]) -> None:
        """Reports an exception as data."""
        bases = tuple(b.__name__ for b in type(error).__mro__ if b.__module__ == "builtins")
        try:
            text = f"{type(error).__name__}: {error}"[:1000]
            self._send(("raised", bases, error.args, text), objects)
        except Exception:  # its arguments or its text cannot be had
            self._send(("raised", bases, (), type(error).__name__), [])

    def _send(self, message: tuple[Any, ...], objects: list[Any]) -> None:
        states = tuple(contents(value) for value in objects)
        self._channel.send(Encoder(self._refer, objects).encode((*message, states)))

    def _refer(self, value: Any) -> tuple[str, Any]:
        if isinstance(value, _Borrowed):
            return "function", value.number
        self._lent.append(value)
        return "object", len(self._lent) - 1

    def _resolve(self, kind: str, name: Any) -> Any:
        if kind == "object":
            return self._lent[name]
        if kind == "function":
            return _Borrowed(name, self)
        if name in self._namespace:
            return self._namespace[name]
        if hasattr(builtins, name):
            return getattr(builtins, name)
        raise NameError(f"name {name!r} is not defined")

    def call_judge(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls the judge's function of that number."""
        self._channel.send(Encoder().encode(("call",)))
        self._channel.send(Encoder(self._refer).encode((number, args, kwargs)))
        kind, *content = Decoder(self._resolve).decode(self._channel.receive())
        if kind == "value":
            return content[0]
        name, arguments = content
        raise getattr(builtins, name)(*arguments)


class _Borrowed:
    """A function that the judge passed as an argument."""

    def __init__(self, number: int, service: _Service) -> None:
        self.number = number
        self._service = service

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._service.call_judge(self.number, args, kwargs)
