"""Runs generated programs against tests: nothing escapes, and nothing is fooled.

    >>> check_program("def double(x): return 2 * x", ["assert double(4) == 8"]).status
    'passed'

The program runs alone in a jail; the tests run in a process of their own, and ask it for results
as plain data (`judge`). The files, from the caller to the kernel:

    program, pool            what is asked, by whom it is run, in what order, and the verdict
    usage                    whether the tests can run away from the program
    server, judge            processes of ours: one for each worker, one for each program
    remote                   what stands for the candidate's objects, and asks for results
    errors, link             exceptions and containers that both sides know, and the channel
    wire, values             plain data as bytes
    candidate                the program's process
    packages, finder         what it may import beside the standard library
    jails, room, confine     what it is kept in, what it sees there, what it has given up
    kernel

Not protected against: flaws of the kernel; what can be learned from timing or from the load on
shared processors, caches and memory; a program that knows its task's answers by heart, or that
tells tests from their arguments; tests or setups that are themselves hostile. Where the tests use
the candidate's own classes beyond plain data, or look at more than data, its code has a say, and so
it could forge a pass (`Verdict.in_jail`). Uncounted is the memory that /tmp and /dev/shm hold (64
MiB each) and what lies in pipes and sockets.

A result of more than 16 MiB, or nested more than 400 deep, fails. Programs can import the standard
library, and packages that the caller names. Where the tests do not run beside the program, a NaN is
not the same object as before, and lists that hold more than some hundred items are copies from one
call to the next.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from gem_ds.evaluate.sandbox.pool import Sandbox, check_program
    from gem_ds.evaluate.sandbox.program import Program, SandboxUnavailableError, Verdict

__all__ = ["Program", "Sandbox", "SandboxUnavailableError", "Verdict", "check_program"]


def __getattr__(name: str) -> object:
    # Late, because the server and the candidate import this package too and must stay lean.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gem_ds.evaluate.sandbox import pool

    return getattr(pool, name)
