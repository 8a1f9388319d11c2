"""What goes into the sandbox, and what comes out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Status = Literal["passed", "failed", "timeout", "crashed"]

MIN_MEMORY_MB = 64


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
