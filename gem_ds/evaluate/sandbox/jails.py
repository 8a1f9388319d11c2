"""Ways to start a candidate alone, by level; each is made once per server.

At every level the judge's process starts the candidate, and each is confined. Where the judge is
the first process of a pid namespace, it has the candidate's identity and the kernel keeps signals
from it; at the other levels it has one of its own, if root lends them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Protocol

from gem_ds.evaluate.sandbox import (
    candidate,
    confine,
    kernel,
    landlock,
    processes,
    room,
    seccomp,
)
from gem_ds.evaluate.sandbox.identity import lend

ENVIRONMENT = {
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "MALLOC_ARENA_MAX": "1",  # an arena per thread would use up the address space
    "PATH": "/usr/bin:/bin",
    "PYTHONHASHSEED": "0",  # the same sample gets the same verdict
}
PYTHON_FLAGS = ("-s", "-S", "-P")


class Jail(Protocol):
    """What `gem_ds.evaluate.sandbox.server` asks of a level."""

    def start_judge(self, judge: Callable[[], None]) -> int:
        """Runs `judge` in a new process of the returned number."""

    def start_candidate(self, job: int, channel: int, memory_mb: int) -> int:
        """Confines the calling judge, which has read no test yet, and starts its candidate.

        Of the judge's open files the candidate keeps these two. Returns its process's number.
        """

    def memory_in_use(self) -> int:
        """Bytes that the server's descendants hold for themselves."""

    def clear(self) -> None:
        """Ends what is left when the judge's process has ended."""


class NamespaceJail:
    """Own user, pid, mount, network, ipc and uts namespaces; see `gem_ds.evaluate.sandbox.room`.

    The judge is process 1 of the cell's pid namespace: when it ends, the kernel kills the rest. It
    is deaf to signals from within, and there is no /proc to see it by. It shares the candidate's
    identity, filter and files, but imports nothing from where the candidate may write.
    """

    def __init__(self, fresh: bool) -> None:
        self._fresh = fresh
        self._filter = seccomp.Filter()
        self._room = room.enter()
        sys.path[:] = [folder for folder in sys.path if not folder.startswith(room.SCRATCH)]
        confine.prepare()

    def start_judge(self, judge: Callable[[], None]) -> int:
        """See `Jail`."""
        room.enter_cell()
        pid = processes.fork(judge)
        room.leave_cell(self._room)
        return pid

    def start_candidate(self, job: int, channel: int, memory_mb: int) -> int:
        """See `Jail`."""
        os.setpgid(0, 0)  # signals to one's own group would leave the pid namespace
        confine.drop_privileges(self._room.identity)
        self._filter.install()
        return processes.fork(lambda: self._become_candidate(job, channel, memory_mb))

    def memory_in_use(self) -> int:
        """See `Jail`."""
        return self._room.processes.memory_of_descendants()

    def clear(self) -> None:
        """See `Jail`; the kernel has done it."""

    def _become_candidate(self, job: int, channel: int, memory_mb: int) -> None:
        confine.keep_only([job, channel])
        confine.limit_memory(memory_mb)
        os.chdir(room.SCRATCH[0])
        if self._fresh:
            for descriptor in (job, channel):
                os.set_inheritable(descriptor, True)
            command = fresh_command(job, channel)
            os.execve(command[0], command, ENVIRONMENT)
        candidate.main(job, channel)


def fresh_command(job: int, channel: int) -> list[str]:
    """The command line of a fresh interpreter that becomes the candidate in a room."""
    source = f"import sys; sys.path.append({room.CODE!r}); "
    source += "from gem_ds.evaluate.sandbox.candidate import main; sys.path.pop(); "
    source += f"main({job}, {channel})"
    return [room.interpreter(), *PYTHON_FLAGS, "-c", source]


class BubblewrapJail:
    """What `NamespaceJail` has, built by bubblewrap, which may where we may not.

    Each candidate gets a bubblewrap and a fresh interpreter; only a room of its own making could
    fork one, and bubblewrap gives away none of the privileges that takes.
    """

    def __init__(self, fresh: bool) -> None:
        self._filter = seccomp.Filter()
        programs = [f"{folder}/bwrap" for folder in os.defpath.split(":")]
        self._program = next((path for path in programs if os.access(path, os.X_OK)), None)
        if self._program is None:
            raise FileNotFoundError("bubblewrap is not installed (apt-get install bubblewrap)")
        self._identity, self._judge_identity = lend(list(room.sources()))
        self._processes = processes.ProcessTable()
        processes.adopt_orphans()
        confine.prepare(_num_others(self._processes, self._identity))

    def start_judge(self, judge: Callable[[], None]) -> int:
        """See `Jail`."""
        return processes.fork(judge)

    def start_candidate(self, job: int, channel: int, memory_mb: int) -> int:
        """See `Jail`."""
        pid = processes.fork(lambda: self._become_bubblewrap(job, channel, memory_mb))
        confine.drop_privileges(self._judge_identity)
        self._filter.install()
        return pid

    def memory_in_use(self) -> int:
        """See `Jail`."""
        return self._processes.memory_of_descendants()

    def clear(self) -> None:
        """See `Jail`."""
        processes.end_descendants(self._identity)

    def _become_bubblewrap(self, job: int, channel: int, memory_mb: int) -> None:
        confine.keep_only([job, channel])
        confine.limit_memory(memory_mb)
        confine.drop_privileges(self._identity)
        rules = self._filter.as_file()
        for descriptor in (job, channel, rules):
            os.set_inheritable(descriptor, True)
        command = [*self._command(rules), "--", *fresh_command(job, channel)]
        os.execve(command[0], command, {})  # no environment: its first process keeps it in sight

    def _command(self, rules: int) -> list[str]:
        assert self._program is not None
        scratch = str(room.SCRATCH_MB << 20)
        command = [self._program, "--unshare-all", "--new-session", "--die-with-parent"]
        for source, target in room.sources().items():
            if os.path.islink(source) and os.path.isdir(source):
                command += ["--symlink", os.readlink(source), target]
            else:
                command += ["--ro-bind", source, target]
        for device in room.DEVICES:
            command += ["--dev-bind", device, device]
        for folder in room.SCRATCH:
            command += ["--size", scratch, "--tmpfs", folder]
        for name, value in ENVIRONMENT.items():
            command += ["--setenv", name, value]
        return [*command, "--remount-ro", "/", "--chdir", room.SCRATCH[0], "--seccomp", str(rules)]


class LandlockJail:
    """Landlock, seccomp and limits: files and TCP are out of reach, processes are not hidden.

    Weak: there is one pid, network and ipc namespace for all, the disk is limited by the size of
    each file only, and what a candidate starts is found and killed by walking, not by the kernel.
    Candidates are always forked.
    """

    def __init__(self, fresh: bool) -> None:
        self._filter = seccomp.Filter()
        landlock.version()
        self._readable = list(room.sources())
        self._identity, self._judge_identity = lend(self._readable)
        self._processes = processes.ProcessTable()
        self._scratch = ""
        processes.adopt_orphans()
        confine.prepare(_num_others(self._processes, self._identity))

    def start_judge(self, judge: Callable[[], None]) -> int:
        """See `Jail`."""
        self._scratch = f"/tmp/gem_ds-sandbox-{os.getpid()}-{os.urandom(8).hex()}"
        os.mkdir(self._scratch, 0o700)
        if self._identity is not None:
            os.chown(self._scratch, self._identity, self._identity)
        return processes.fork(judge)

    def start_candidate(self, job: int, channel: int, memory_mb: int) -> int:
        """See `Jail`."""
        processes.adopt_orphans()
        pid = processes.fork(lambda: self._become_candidate(job, channel, memory_mb))
        confine.drop_privileges(self._judge_identity)
        self._filter.install()
        return pid

    def memory_in_use(self) -> int:
        """See `Jail`."""
        return self._processes.memory_of_descendants()

    def clear(self) -> None:
        """See `Jail`."""
        processes.end_descendants(self._identity)
        import shutil  # here, because its libraries would make each fork dearer at every level

        shutil.rmtree(self._scratch, ignore_errors=True)  # the candidate may have been before us

    def _become_candidate(self, job: int, channel: int, memory_mb: int) -> None:
        os.setsid()
        os.chdir(self._scratch)
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        landlock.restrict(self._readable, [self._scratch, *room.DEVICES])
        confine.keep_only([job, channel])
        confine.limit_memory(memory_mb)
        confine.drop_privileges(self._identity)
        self._filter.install()
        os.environ.update(HOME=self._scratch, TMPDIR=self._scratch)
        candidate.main(job, channel)


def _num_others(table: processes.ProcessTable, identity: int | None) -> int:
    """The threads that count with those of a candidate who is this user, or has an identity."""
    return table.threads_of(os.getuid()) if identity is None else 0


JAILS: dict[str, Callable[[bool], Jail]] = {
    "bubblewrap": BubblewrapJail,
    "namespaces": NamespaceJail,
    "landlock": LandlockJail,
}
