"""Ways to start a candidate alone, by level; each is made once per server."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

from eval.sandbox import candidate, confine, kernel, processes, room, seccomp

ENVIRONMENT = {
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "MALLOC_ARENA_MAX": "1",  # an arena per thread would use up the address space
    "PATH": "/usr/bin:/bin",
    "PYTHONHASHSEED": "0",  # the same sample gets the same verdict
}
PYTHON_FLAGS = ("-s", "-S", "-P")


class Jail(Protocol):
    """What `eval.sandbox.server` asks of a level."""

    #: whom to become before meeting what a candidate made; None: stay
    identity: int | None
    #: the seccomp filter
    seccomp_filter: seccomp.Filter
    #: whether each candidate gets a fresh interpreter
    fresh: bool

    def start(self, job: int, channel: int, memory_mb: int) -> int:
        """Starts a candidate on two open files; killing the process it returns ends all of it."""

    def memory_in_use(self) -> int:
        """Bytes that the server's descendants hold for themselves."""


class NamespaceJail:
    """Own user, pid, mount, network, ipc and uts namespaces; see `eval.sandbox.room`."""

    def __init__(self, fresh: bool) -> None:
        self.fresh = fresh
        self.seccomp_filter = seccomp.Filter()
        self._room = room.enter()
        self.identity = self._room.identity
        confine.prepare()

    def start(self, job: int, channel: int, memory_mb: int) -> int:
        """See `Jail`."""
        kernel.unshare(kernel.CLONE_NEWPID)
        pid = processes.fork(lambda: self._first_process(job, channel, memory_mb))
        kernel.setns(self._room.pid_namespace, kernel.CLONE_NEWPID)  # for the server's next child
        return pid

    def memory_in_use(self) -> int:
        """Bytes that the server's descendants hold for themselves."""
        return self._room.processes.memory_of_descendants()

    def _first_process(self, job: int, channel: int, memory_mb: int) -> None:
        """Process 1 of the cell: it owns no secret, and when it ends the kernel kills the rest."""
        confine.keep_only([job, channel])
        room.open_cell()
        pid = processes.fork(lambda: run_candidate(self, job, channel, memory_mb))
        os.close(job)
        os.close(channel)
        confine.drop_privileges(self.identity)
        while True:
            ended, status = os.wait()
            if ended == pid:
                os._exit(processes.shell_status(status))


def run_candidate(jail: Jail, job: int, channel: int, memory_mb: int) -> None:
    """Becomes the candidate, in this interpreter or in a fresh one."""
    confine.keep_only([job, channel])
    confine.confine(jail.identity, memory_mb, jail.seccomp_filter)
    if jail.fresh:
        for descriptor in (job, channel):
            os.set_inheritable(descriptor, True)
        os.execve(room.interpreter(), fresh_command(room.CODE, job, channel), ENVIRONMENT)
    os.environ.clear()
    os.environ.update(ENVIRONMENT)
    candidate.main(job, channel)


def fresh_command(code: str, job: int, channel: int) -> list[str]:
    """The command line of a fresh interpreter that becomes the candidate."""
    source = f"import sys; sys.path.append({code!r}); "
    source += f"from eval.sandbox.candidate import main; main({job}, {channel})"
    return [room.interpreter(), *PYTHON_FLAGS, "-c", source]


JAILS: dict[str, Callable[[bool], Jail]] = {"namespaces": NamespaceJail}
