"""The trusted side: runs the tests where the candidate is not, and asks the jail for results.

In the tests, the candidate's names are stand-ins (`remote`). What these ask goes into the jail, and
comes back, as plain data of exact builtin types; comparing it with the expected value happens here.
So the expected values and the tests' text never enter the jail, and an object that equals
everything gets no chance to say so. Containers among arguments and results are kept alike on both
sides (`link`).

What is not plain stays in the jail, and a stand-in takes its place here. Where the tests compare it
with a value of theirs that is not plain either (an array, a path), or hand over such a value, they
have to run beside the program.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence
from types import CodeType, FunctionType
from typing import Any

from gem_ds.evaluate.sandbox.errors import Errors, is_plain
from gem_ds.evaluate.sandbox.finder import NAMES
from gem_ds.evaluate.sandbox.link import Channel, Link
from gem_ds.evaluate.sandbox.remote import NeedsJailError, Remote, RemoteIterator, heir, remote_of
from gem_ds.evaluate.sandbox.values import MUTABLE, WireError, contents, is_method_name, refill
from gem_ds.evaluate.sandbox.wire import Encoder

_MAX_DETAIL = 300  # characters
_KINDS = {"object": Remote, "iterator": RemoteIterator}
_ITERATING = ("iter", "next")  # what the candidate's own code may answer without a say
_LAZY = 0x20 | 0x80 | 0x200  # flags of code: a generator, a coroutine, an asynchronous generator


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
    jail = Conversation(channel, had_a_say=had_a_say or len(names) > 1)
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


def _describe(where: str, error: BaseException, jail: Conversation) -> str:
    """One line of printable characters, made of text of unknown origin."""
    if error is jail.raised:  # whose arguments may be the candidate's: they are not asked
        text = f"the program raised {jail.errors.text}"
    elif isinstance(error, AssertionError) and not error.args:
        text = "the assertion is false"
    else:
        text = type(error).__name__
        try:
            text += f": {error}"
        except BaseException:  # a message made of what the program returned
            text += ", whose message cannot be shown"
    line = " ".join(f"{where}: {text}".split())[:_MAX_DETAIL]
    return "".join(character if character.isprintable() else "?" for character in line)


class Conversation:
    """Asks the candidate; `had_a_say` is whether its own code has had a say in the tests."""

    def __init__(self, channel: Channel, *, had_a_say: bool) -> None:
        self.had_a_say = had_a_say
        self.errors = Errors(is_plain)
        self.raised: BaseException | None = None  # the last exception of the candidate's
        self._link = Link(channel, self._refer, self._resolve)
        self._objects: dict[int, Any] = {}  # of the candidate's, by number
        self._num_calls = 0  # of the tests' functions, that are running
        self._is_reading = False

    def finish(self) -> None:
        """Lets the program end, and waits for that."""
        with contextlib.suppress(EOFError, OSError, WireError):
            self._link.send("finish")
            while True:
                self._link.channel.receive()

    def ask(self, operation: str, /, *args: Any, **kwargs: Any) -> Any:
        """The result of an operation in the jail; raises what it raises there.

        Whatever but the entry point is asked may be shown, or know, what is expected.
        """
        is_own_call = operation == "call" and args[0]._reference[0] == "name"
        self.had_a_say |= not (is_own_call or operation in _ITERATING)
        if not self._num_calls:
            self._link.forget_many()
        self._send("ask", operation, args, contents(kwargs))  # no dict, which would be shared
        return self.wait()

    def may_compare(self, other: object) -> bool:
        """Whether a `Remote` may be compared with this by its own code."""
        if self._is_reading:  # what a set or a dict holds is distinct
            return False
        with contextlib.suppress(WireError):
            Encoder(self._refer).encode(other)  # what cannot be sent is compared by its own code
        return isinstance(other, Remote)

    def wait(self) -> Any:
        """The next answer; the first one comes unasked, when the program has run."""
        while True:
            kind, *content = self._receive()
            if kind == "call":
                self._call(content)
                continue
            if len(content) != 1 or kind not in ("value", "raised"):
                raise CandidateLiedError("the program's answer is no answer")
            if kind == "value":
                return content[0]
            try:
                self.raised = self.errors.rebuilt(content[0])
            except WireError as error:
                raise CandidateLiedError(str(error)) from error
            raise self.raised

    def _send(self, *message: Any) -> None:
        try:
            self._link.send(*message)
        except OSError as error:
            raise CandidateLostError from error

    def _receive(self) -> tuple[Any, ...]:
        self._is_reading = True
        try:
            message, methods = self._link.receive()
        except EOFError as error:
            raise CandidateLostError from error
        except WireError as error:
            raise CandidateLiedError(str(error)) from error
        finally:
            self._is_reading = False
        if not message or type(message[0]) is not str:
            raise CandidateLiedError("the program's answer is no answer")
        for name, value in methods:
            self.had_a_say = True
            if not isinstance(value, Remote) and is_method_name(name):
                raise CandidateLiedError("a field of a named tuple may not pose as a method")
        return message

    def _refer(self, value: Any) -> tuple[str, Any]:
        if isinstance(value, Remote):
            return value._reference
        if (remote := remote_of(value)) is not None:
            return remote._reference
        if self._num_calls and hasattr(value, "__next__"):
            return "iterator", (self._link.number_of(value.__next__),)
        code = getattr(value, "__code__", None)
        is_lazy = isinstance(code, CodeType) and code.co_flags & _LAZY and not self._num_calls
        if not callable(value) or isinstance(value, type) or is_lazy:
            raise NeedsJailError
        name = getattr(value, "__name__", "")
        described = [_parameters(value.__code__)] if isinstance(value, FunctionType) else []
        return "function", (self._link.number_of(value), name, *described)

    def _resolve(self, kind: str, name: Any) -> Any:
        if kind == "function" and type(name) is int:
            self.had_a_say = True  # it chose which function of the tests it gives back
            return self._link.lent[name]
        if kind == "package" and NAMES:
            raise NeedsJailError  # how it compares with plain data, its own code must say
        inherited: Any = None
        if is_heir := kind == "heir":
            kind, name, inherited = name
        number, hash_ = name
        if type(number) is not int or type(hash_) not in (int, type(None)) or kind not in _KINDS:
            raise WireError("the reference is none")
        known = self._objects.get(number)
        if known is None or is_heir == isinstance(known, Remote):
            remote = _KINDS[kind](self, ("object", number), hash_)
            known = self._objects[number] = heir(remote, inherited) if is_heir else remote
        elif is_heir and isinstance(known, MUTABLE):
            refill(known, contents(inherited))
        return known

    def _call(self, content: Any) -> None:
        """Calls a function of the tests that was passed as an argument."""
        functions = self._link.lent
        kinds = [*map(type, content)]
        if kinds != [int, tuple, dict] or content[0] not in range(len(functions)):
            raise CandidateLiedError("the program's question is no question")
        number, args, kwargs = content
        self._num_calls += 1
        try:
            reply = ("value", functions[number](*args, **kwargs))
        except (Exception, NeedsJailError) as error:
            reply = ("raised", self.errors.described(error))
        try:
            self._send(*reply)
        except NeedsJailError:  # the candidate chose the arguments, and shall not choose the judge
            problem = TypeError("the result is not plain data")
            self._send("raised", self.errors.described(problem))
        finally:
            self._num_calls -= 1


def _parameters(code: CodeType) -> tuple[Any, ...]:
    """A function's parameters without their defaults, as `candidate` reads them."""
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount)
    num_stars = bool(code.co_flags & 4) + bool(code.co_flags & 8)
    names = code.co_varnames[: counts[0] + counts[2] + num_stars]
    return names, counts, code.co_flags & 0xF
