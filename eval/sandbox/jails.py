"""Ways to start a candidate alone, by level; each is made once per server."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection
from typing import Protocol

from eval.sandbox import (
    candidate,
    confine,
    kernel,
    landlock,
    processes,
    room,
    seccomp,
)
from eval.sandbox.identity import lend

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

    #: whom the candidate becomes, and whom the judge; None: they stay who they are
    identity: int | None
    judge_identity: int | None
    #: the seccomp filter
    seccomp_filter: seccomp.Filter
    #: whether each candidate gets a fresh interpreter
    fresh: bool

    def start(self, job: int, channel: int, memory_mb: int) -> int:
        """Starts a candidate on two open files; killing the process it returns ends all of it."""

    def memory_in_use(self) -> int:
        """Bytes that the server's descendants hold for themselves."""

    def clear(self, keep: Collection[int]) -> None:
        """Ends what is left of the candidate when that process has ended, all but `keep`."""


class NamespaceJail:
    """Own user, pid, mount, network, ipc and uts namespaces; see `eval.sandbox.room`."""

    def __init__(self, fresh: bool) -> None:
        self.fresh = fresh
        self.seccomp_filter = seccomp.Filter()
        self._room = room.enter()
        self.identity = self.judge_identity = self._room.identity
        confine.prepare()

    def start(self, job: int, channel: int, memory_mb: int) -> int:
        """See `Jail`."""
        kernel.unshare(kernel.CLONE_NEWPID)
        pid = processes.fork(lambda: self._first_process(job, channel, memory_mb))
        kernel.setns(self._room.pid_namespace, kernel.CLONE_NEWPID)  # for the server's next child
        return pid

    def memory_in_use(self) -> int:
        """See `Jail`."""
        return self._room.processes.memory_of_descendants()

    def clear(self, keep: Collection[int]) -> None:
        """See `Jail`; the kernel has done it."""

    def _first_process(self, job: int, channel: int, memory_mb: int) -> None:
        """Process 1 of the cell: when it ends, the kernel kills the rest.

        It holds no secret and reads nothing. The candidate cannot signal it: a first process is
        deaf to signals from within.
        """
        confine.keep_only([job, channel])
        os.setpgid(0, 0)  # signals to one's own group would leave the pid namespace
        room.open_cell()
        arguments = (self, job, channel, memory_mb, room.CODE, ENVIRONMENT)
        pid = processes.fork(lambda: run_candidate(*arguments))
        os.close(job)
        os.close(channel)
        while True:
            ended, status = os.wait()
            if ended == pid:
                os._exit(processes.shell_status(status))


def run_candidate(
    jail: Jail, job: int, channel: int, memory_mb: int, code: str, environment: dict[str, str]
) -> None:
    """Becomes the candidate, in this interpreter or in a fresh one that finds us in `code`."""
    confine.keep_only([job, channel])
    confine.limit_memory(memory_mb)
    confine.drop_privileges(jail.identity)
    jail.seccomp_filter.install()
    if jail.fresh:
        for descriptor in (job, channel):
            os.set_inheritable(descriptor, True)
        os.execve(room.interpreter(), fresh_command(code, job, channel), environment)
    os.environ.clear()
    os.environ.update(environment)
    candidate.main(job, channel)


def fresh_command(code: str, job: int, channel: int) -> list[str]:
    """The command line of a fresh interpreter that becomes the candidate."""
    source = f"import sys; sys.path.append({code!r}); "
    source += f"from eval.sandbox.candidate import main; main({job}, {channel})"
    return [room.interpreter(), *PYTHON_FLAGS, "-c", source]


class BubblewrapJail:
    """What `NamespaceJail` has, built by bubblewrap, which may where we may not.

    Each candidate gets a bubblewrap and a fresh interpreter; only a room of its own making could
    fork one, and bubblewrap gives away none of the privileges that takes.
    """

    def __init__(self, fresh: bool) -> None:
        self.fresh = True
        self.seccomp_filter = seccomp.Filter()
        programs = [f"{folder}/bwrap" for folder in os.defpath.split(":")]
        self._program = next((path for path in programs if os.access(path, os.X_OK)), None)
        if self._program is None:
            raise FileNotFoundError("bubblewrap is not installed (apt-get install bubblewrap)")
        self.identity, self.judge_identity = lend(list(room.sources()))
        self._processes = processes.ProcessTable()
        processes.adopt_orphans()
        confine.prepare()

    def start(self, job: int, channel: int, memory_mb: int) -> int:
        """See `Jail`."""
        return processes.fork(lambda: self._become_bubblewrap(job, channel, memory_mb))

    def memory_in_use(self) -> int:
        """See `Jail`."""
        return self._processes.memory_of_descendants()

    def clear(self, keep: Collection[int]) -> None:
        """See `Jail`."""
        processes.end_descendants(self.identity, keep)

    def _become_bubblewrap(self, job: int, channel: int, memory_mb: int) -> None:
        confine.keep_only([job, channel])
        confine.limit_memory(memory_mb)
        confine.drop_privileges(self.identity)
        rules = self.seccomp_filter.as_file()
        for descriptor in (job, channel, rules):
            os.set_inheritable(descriptor, True)
        command = [*self._command(rules), "--", *fresh_command(room.CODE, job, channel)]
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
        for folder in ("/tmp", "/dev/shm"):
            command += ["--size", scratch, "--tmpfs", folder]
        for name, value in ENVIRONMENT.items():
            command += ["--setenv", name, value]
        return [*command, "--remount-ro", "/", "--chdir", "/tmp", "--seccomp", str(rules)]


class LandlockJail:
    """Landlock, seccomp and limits: files and TCP are out of reach, processes are not hidden.

    Weak: there is one pid, network and ipc namespace for all, the disk is limited by the size of
    each file only, and what a candidate starts is found and killed by walking, not by the kernel.
    Candidates are always forked.
    """

    def __init__(self, fresh: bool) -> None:
        self.fresh = False
        self.seccomp_filter = seccomp.Filter()
        landlock.version()
        self._readable = list(room.sources())
        self.identity, self.judge_identity = lend(self._readable)
        self._processes = processes.ProcessTable()
        self._scratch = ""
        processes.adopt_orphans()
        confine.prepare()

    def start(self, job: int, channel: int, memory_mb: int) -> int:
        """See `Jail`."""
        self._scratch = f"/tmp/gem_ds-sandbox-{os.getpid()}-{os.urandom(8).hex()}"
        os.mkdir(self._scratch, 0o700)
        if self.identity is not None:
            os.chown(self._scratch, self.identity, self.identity)
        return processes.fork(lambda: self._become_candidate(job, channel, memory_mb))

    def memory_in_use(self) -> int:
        """See `Jail`."""
        return self._processes.memory_of_descendants()

    def clear(self, keep: Collection[int]) -> None:
        """See `Jail`."""
        processes.end_descendants(self.identity, keep)
        shutil.rmtree(self._scratch, ignore_errors=True)  # the candidate may have been before us

    def _become_candidate(self, job: int, channel: int, memory_mb: int) -> None:
        os.setsid()
        os.chdir(self._scratch)
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        landlock.restrict(self._readable, [self._scratch, *room.DEVICES])
        environment = ENVIRONMENT | {"HOME": self._scratch, "TMPDIR": self._scratch}
        run_candidate(self, job, channel, memory_mb, room.code_folder(), environment)


JAILS: dict[str, Callable[[bool], Jail]] = {
    "bubblewrap": BubblewrapJail,
    "namespaces": NamespaceJail,
    "landlock": LandlockJail,
}
