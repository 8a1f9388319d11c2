"""A program on its way: what goes into the sandbox, who defines which names, and the verdict.

Names that the tests use are the candidate's, the tests' own, or Python's. Only the tests and their
setup decide what is taken from the candidate: a program that defines its own `abs`, `math` or
`isclose` changes nothing about the one that the tests call.
"""

from __future__ import annotations

import ast
import builtins
import math
import sys
from dataclasses import dataclass
from typing import Literal, NamedTuple

from gem_ds.evaluate.sandbox.usage import Usage
from gem_ds.evaluate.sandbox.wire import Decoder, Encoder
from gem_ds.evaluate.syntax import IMPORT, Names, tree_of

Status = Literal["passed", "failed", "timeout", "crashed"]

MIN_MEMORY_MB = 64
_MAX_SOURCE = 3 << 20  # characters of a job: fewer bytes than a message may have
_MAX_PARSED = 1 << 20  # characters of a program; no task needs more, and a tree takes much memory


@dataclass(frozen=True)
class Program:
    """A program and the tests that it is to pass; fields as the arguments of `check_program`."""

    program: str
    tests: tuple[str, ...]
    setup: str = ""
    entry_point: str | None = None
    timeout: float = 3.0
    memory_mb: int = 1024

    def __post_init__(self) -> None:
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout must be a positive number of seconds, not {self.timeout}.")
        if self.memory_mb < MIN_MEMORY_MB:
            raise ValueError(
                f"memory_mb must be at least {MIN_MEMORY_MB} (the interpreter takes a part of it), "
                f"not {self.memory_mb}."
            )


@dataclass(frozen=True)
class Verdict:
    """What became of a program."""

    #: "passed"; "failed": an exception, or an assertion that is false; "timeout"; "crashed": the
    #: process was killed, ended itself or ran out of memory before it had answered
    status: Status
    #: the level at which the program was confined
    isolation: str
    #: one line for the reader
    detail: str = ""
    #: the candidate's own code had a say in the tests, so that a forged pass cannot be excluded
    in_jail: bool = False


class SandboxUnavailableError(ValueError):
    """No level that is strong enough can be had here; the message says what to do."""


class Job:
    """One program on its way."""

    def __init__(self, program: Program, isolation: str) -> None:
        self.program = program
        self.isolation = isolation
        self.verdict: Verdict | None = None
        self.num_lost = 0  # servers that ended over it
        self.roles = assign_roles(program)
        self.in_jail = self.roles.in_jail
        if sum(map(len, (program.program, program.setup, *program.tests))) > _MAX_SOURCE:
            self._decide("failed", "program and tests together are larger than 3 MiB")

    def messages(self) -> tuple[bytes, bytes]:
        """What the jail reads and what the judge reads."""
        program, roles, tests = self.program, self.roles, self.program.tests
        if not self.in_jail:
            for_jail: tuple[str, ...] = (roles.program_setup, program.program)
            for_judge = (program.setup, tests, roles.candidate, roles.modules, roles.shares_setup)
        else:
            sources = (program.setup, program.program)
            for_jail = (*(sources[::-1] if roles.setup_is_last else sources), *tests)
            for_judge = ("", (), (), (), True)
        return Encoder().encode(for_jail), Encoder().encode(for_judge)

    def settle(self, end: str, report: bytes) -> None:
        """Makes a verdict of the server's answer and the judge's report, if there can be one."""
        program = self.program
        if end == "timeout":
            self._decide("timeout", f"not done after {program.timeout:g} s")
        elif end == "memory":
            self._decide("crashed", f"its processes took more than {program.memory_mb} MiB")
        elif not report:
            self._decide("crashed", "its answers could not be judged")
        else:
            state, detail, had_a_say = Decoder().decode(report)
            if state == "in_jail":
                self.in_jail = True
                return
            self._decide(state, detail, had_a_say)

    def _decide(self, status: Status, detail: str, had_a_say: bool = False) -> None:
        self.verdict = Verdict(status, self.isolation, detail, self.in_jail or had_a_say)


class Roles(NamedTuple):
    """What runs where."""

    #: the candidate's names in setup and tests
    candidate: tuple[str, ...]
    #: modules that the tests use and that the program, not the setup, imports
    modules: tuple[str, ...]
    #: what of the setup the program gets to see: imports, calls on them, and what it refers to
    program_setup: str
    #: whether that is more than imports, so that the program may have seen what is expected
    shares_setup: bool
    #: whether the setup uses the program, and so must follow it
    setup_is_last: bool
    #: whether setup and tests can only run beside the program
    in_jail: bool


def assign_roles(job: Program) -> Roles:
    """Reads the sources; nothing is run. A source that does not parse defines and uses nothing."""
    setup = _parse(job.setup)
    tests = [*map(_parse, job.tests)]
    used, given = Names(setup, *tests), Names(setup)
    own = Names(_parse(job.program, _MAX_PARSED))
    foreign = used.read - used.bound
    candidate = {name for name in foreign if not hasattr(builtins, name)}
    modules = (candidate & own.imported & sys.stdlib_module_names) - {job.entry_point}
    candidate -= modules
    if job.entry_point is not None:
        candidate.add(job.entry_point)
    elif not candidate:  # a task may want a function of a builtin's name
        candidate = foreign & own.bound
    shared = _shared(setup, given, own.read - own.bound)
    judged = ast.Module([node for node in setup.body if not _is_call(node, given)], [])
    usage = Usage([judged, *tests], candidate, job.entry_point, used.bound, modules)
    return Roles(
        candidate=tuple(sorted(candidate)),
        modules=tuple(sorted(modules)),
        program_setup="\n".join(map(ast.unparse, shared)),
        shares_setup=any(Names(node).bound and not isinstance(node, IMPORT) for node in shared),
        setup_is_last=bool(given.read & candidate),
        in_jail=usage.runs_beside(),
    )


def _shared(setup: ast.Module, given: Names, lacking: set[str]) -> list[ast.stmt]:
    """The setup's statements that the program needs, where `lacking` are names it has not."""
    lacking = lacking - given.imported
    shared = []
    for node in reversed(setup.body):
        names = Names(node)
        if names.bound & lacking:
            lacking |= names.read
        elif not isinstance(node, IMPORT) and not _is_call(node, given):
            continue
        shared.append(node)
    return shared[::-1]


def _is_call(node: ast.stmt, given: Names) -> bool:
    """Whether it calls what was imported, with nothing else in it, for the sake of an effect."""
    read = Names(node).read
    return isinstance(node, ast.Expr) and bool(read) and read <= given.imported


def _parse(source: str, max_length: int = sys.maxsize) -> ast.Module:
    return tree_of(source, max_length) or ast.Module(body=[], type_ignores=[])
