"""Warms a server up: what it has done itself, its forks do faster.

Python specializes code as it runs and remembers where it found attributes, and the linker binds a
function when it is first called. A fork that does so for itself copies the pages that hold it.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable

from gem_ds.evaluate.sandbox import candidate, processes
from gem_ds.evaluate.sandbox.judge import judge
from gem_ds.evaluate.sandbox.wire import Channel

_SOURCES = ("", "def f(x): return x")
_TESTS = ("assert f([1, (2.5, 'a')]) == [1, (2.5, 'a')]",) * 16


def warm_up() -> None:
    """Plays judge and then candidate in this process, with the other side in a fork of it."""
    _converse(_judge, _answer)
    _converse(_answer, _judge)
    del sys.modules[candidate.MODULE]


def _converse(here: Callable[[Channel], None], there: Callable[[Channel], None]) -> None:
    ours, theirs = socket.socketpair()

    def other_side() -> None:
        ours.close()
        there(Channel(theirs.fileno()))

    pid = processes.fork(other_side)
    theirs.close()
    with ours:
        here(Channel(ours.fileno()))
    os.waitpid(pid, 0)


def _judge(channel: Channel) -> None:
    verdict = judge(channel, "", _TESTS, ("f",), (), False)
    assert verdict == ("passed", "", False), verdict


def _answer(channel: Channel) -> None:
    candidate.run(_SOURCES, channel)
