"""The trusted side: runs the tests where the candidate is not, and asks the jail for results.

In the tests, the candidate's names are `Remote`s. Calling one sends the arguments into the jail as
plain data and gives back the result as plain data, of exact builtin types; comparing it with the
expected value happens here. So the expected values and the tests' text never enter the jail, and
an object that equals everything gets no chance to say so. Containers among the arguments are
brought up to date after the call.

What is not plain stays in the jail, and is a `Remote` too: it may be passed back, asked for its
attributes, items, length or text, iterated and called. With plain data it is never equal, and it
takes no part in arithmetic: it would have to be shown the other operand and be believed. Two of
them may be compared; the candidate's own code then answers, and the verdict says so (`in_jail`).
Where the tests compare it with a value of theirs that is not plain either (an array, a path), they
have to run beside the program.
"""

from __future__ import annotations

import builtins
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gem_ds.evaluate.sandbox.candidate import ITEMS, SYMMETRIC, UNARY
from gem_ds.evaluate.sandbox.wire import Channel, Decoder, Encoder, WireError, refill

_MAX_DETAIL = 300  # characters
_MAX_TAKEN = 1024  # items of an iterator at once


class NeedsJailError(Exception):
    """A value of the tests cannot be sent, so the tests have to run beside the program."""


class CandidateLostError(BaseException):
    """The jail closed before it answered; no test's `except Exception` may hide that."""


class CandidateLiedError(BaseException):
    """The jail answered with what is no answer."""


def judge(
    channel: Channel,
    setup: str,
    tests: Sequence[str],
    names: Sequence[str],
    modules: Sequence[str],
    had_a_say: bool,
) -> tuple[str, str, bool]:
    """Runs tests against the program at the channel's other end.

    `names` are the program's that setup and tests use, `modules` what they use and the program is
    expected to have imported; `had_a_say` is whether the candidate's code has had a say already.
    Returns the status, a line that explains it, and whether the candidate's code had a say.
    """
    jail = _Conversation(channel, had_a_say or len(names) > 1)
    where = "the program"
    try:
        jail.wait()
        where = "the setup"
        namespace: dict[str, Any] = {"__name__": "tests"}
        namespace |= {name: importlib.import_module(name) for name in modules}
        remotes = {name: Remote(jail, ("name", name)) for name in names}
        for number, source in enumerate([setup, *tests]):
            where = f"test {number}" if number else where
            namespace |= remotes if number < 2 else {}  # the setup may define the entry point too
            exec(compile(source, where, "exec", dont_inherit=True), namespace)
        where = "the program's end"
        jail.finish()
    except CandidateLostError:
        return "crashed", f"the process ended during {where}", jail.had_a_say
    except NeedsJailError:
        return "in_jail", "", True
    except BaseException as error:
        status = "crashed" if isinstance(error, MemoryError) and error is jail.raised else "failed"
        return status, _describe(where, error, jail), jail.had_a_say
    return "passed", "", jail.had_a_say


def _describe(where: str, error: BaseException, jail: _Conversation) -> str:
    """One line of printable characters, made of text of unknown origin."""
    if error is jail.raised:  # whose arguments may be the candidate's: they are not asked
        text = f"the program raised {jail.raised_text}"
    elif isinstance(error, AssertionError) and not error.args:
        text = "the assertion is false"
    else:
        text = f"{type(error).__name__}: {error}"
    line = " ".join(f"{where}: {text}".split())[:_MAX_DETAIL]
    return "".join(character if character.isprintable() else "?" for character in line)


class _Conversation:
    """The conversation with the candidate."""

    def __init__(self, channel: Channel, had_a_say: bool) -> None:
        self.had_a_say = had_a_say
        self.raised: BaseException | None = None
        self.raised_text = ""
        self._channel = channel
        self._functions: list[Callable[..., Any]] = []

    def finish(self) -> None:
        """Lets the program end, and waits for that."""
        try:
            self._channel.send(Encoder().encode(("finish", (), {})))
            while True:
                self._channel.receive()
        except (EOFError, OSError, WireError):
            pass

    def ask(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        """The result of an operation in the jail; raises what it raises there."""
        request = Encoder(self._refer)
        self._send(request.encode((operation, args, kwargs)))
        return self.wait(request.objects)

    def wait(self, objects: Sequence[Any] = ()) -> Any:
        """The next answer; the first one comes unasked, when the program has run."""
        kind, content = self._receive(objects)
        while kind == "call":
            self._send(self._call(self._read(())))
            kind, content = self._receive(objects)
        *found, states = content or (None,)
        if kind not in ("value", "raised") or type(states) is not tuple:
            raise CandidateLiedError("the program's answer is no answer")
        if len(states) not in (0, len(objects)):
            raise CandidateLiedError("the program's answer is no answer")
        try:
            for container, items in zip(objects, states, strict=False):
                refill(container, items)  # with what the request's containers hold in the jail
        except (TypeError, ValueError) as error:
            raise CandidateLiedError(f"an argument cannot be updated: {error}") from error
        if kind == "raised":
            self._raise(found)
        (value,) = found
        return value

    def _send(self, message: bytes) -> None:
        try:
            self._channel.send(message)
        except OSError as error:
            raise CandidateLostError from error

    def _read(self, known: Sequence[Any]) -> Any:
        try:
            return Decoder(self._resolve, known).decode(self._channel.receive())
        except EOFError as error:
            raise CandidateLostError from error
        except WireError as error:
            raise CandidateLiedError(str(error)) from error

    def _receive(self, known: Sequence[Any]) -> tuple[str, tuple[Any, ...]]:
        message = self._read(known)
        if type(message) is not tuple or not message or type(message[0]) is not str:
            raise CandidateLiedError("the program's answer is no answer")
        return message[0], message[1:]

    def _refer(self, value: Any) -> tuple[str, Any]:
        if type(value) is Remote:
            return value._reference
        if not callable(value):
            raise NeedsJailError
        self._functions.append(value)
        return "function", len(self._functions) - 1

    def _resolve(self, kind: str, number: int) -> Any:
        if type(number) is int and kind == "object":
            return Remote(self, (kind, number))
        if type(number) is int and kind == "function":
            return self._functions[number]
        raise WireError("the reference is none")

    def _raise(self, content: Sequence[Any]) -> None:
        """Raises the nearest builtin exception to the one that the program raised."""
        bases, args, text = content[:3]
        kinds = [getattr(builtins, name, None) for name in bases]
        kind = next(k for k in kinds if isinstance(k, type) and issubclass(k, BaseException))
        try:
            self.raised = kind(*args)
        except TypeError:  # it wants other arguments
            self.raised = kind.__new__(kind)
        self.raised_text = str(text)
        raise self.raised

    def _call(self, content: Any) -> bytes:
        """Calls a function of the tests that was passed as an argument."""
        if type(content) is not tuple or [*map(type, content)] != [int, tuple, dict]:
            raise CandidateLiedError("the program's question is no question")
        number, args, kwargs = content
        try:
            reply: tuple[Any, ...] = ("value", self._functions[number](*args, **kwargs))
        except Exception as error:
            kind = next(base for base in type(error).__mro__ if base.__module__ == "builtins")
            reply = ("raised", kind.__name__, tuple(str(part) for part in error.args))
        try:
            return Encoder(self._refer).encode(reply)
        except NeedsJailError:  # the candidate chose the arguments, and shall not choose the judge
            return Encoder().encode(("raised", "TypeError", ("the result is not plain data",)))


class Remote:
    """A name or an object of the candidate's; see the module's description."""

    _jail: _Conversation
    _reference: tuple[str, Any]

    def __init__(self, jail: _Conversation, reference: tuple[str, Any]) -> None:
        vars(self).update(_jail=jail, _reference=reference)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls it in the jail; raises what it raises there."""
        # What is not the entry point itself, say a method, may be shown what is expected.
        self._jail.had_a_say |= self._reference[0] == "object"
        return self._jail.ask("call", self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._jail.ask("getattr", self, name)

    def __iter__(self) -> Iterator[Any]:
        iterator = self._jail.ask("iter", self)
        if type(iterator) is not Remote:
            yield from iterator
            return
        count = 1  # one first: the second item may never come
        while items := self._jail.ask("take", iterator, count):
            yield from items
            if len(items) < count:
                return
            count = min(2 * count, _MAX_TAKEN)

    def __next__(self) -> Any:
        for item in self._jail.ask("take", self, 1):
            return item
        raise StopIteration

    def __instancecheck__(self, instance: Any) -> bool:
        if type(instance) is not Remote:
            return False
        self._jail.had_a_say = True
        return self._jail.ask("isinstance", instance, self) is True

    def __hash__(self) -> int:
        self._jail.had_a_say = True
        return int(self._jail.ask("hash", self))


def _asking_about_two(operation: str) -> Callable[[Remote, object], Any]:
    def method(self: Remote, other: object) -> Any:
        if type(other) is Remote:
            self._jail.had_a_say = True
            return self._jail.ask(operation, self, other)
        try:
            Encoder().encode(other)
        except WireError as error:  # what could not be sent is compared by its own code
            raise NeedsJailError from error
        return NotImplemented

    return method


def _asking(operation: str) -> Callable[..., Any]:
    return lambda self, *args: self._jail.ask(operation, self, *args)


for _name in (*UNARY, *("len", "bool", "int", "float", "str", "repr", "setattr"), *ITEMS):
    setattr(Remote, f"__{_name}__", _asking(_name))
for _name in SYMMETRIC:
    setattr(Remote, f"__{_name.rstrip('_')}__", _asking_about_two(_name))
