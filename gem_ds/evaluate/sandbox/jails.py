"""Ways to start a candidate alone, by level; each is made once per server.

At every level the judge's process starts the candidate, and each is confined. Where the judge is
the first process of a pid namespace, it has the candidate's identity and the kernel keeps signals
from it; at the other levels it has one of its own, if root lends them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable

from gem_ds.evaluate.sandbox import candidate, confine, kernel, room
from gem_ds.evaluate.sandbox.kernel import ProcessTable, adopt_orphans, fork

ENVIRONMENT = {
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "MALLOC_ARENA_MAX": "1",  # an arena per thread would use up the address space
    "PATH": "/usr/bin:/bin",
    "PYTHONHASHSEED": "0",  # the same sample gets the same verdict
}


def command(folder: str, module: str, function: str, *arguments: object) -> list[str]:
    """A fresh interpreter that calls a function of ours, found in `folder` and nothing else there.

    The folder may be that of all installed packages, from which programs are not to import.
    """
    source = f"import sys; sys.path.append({folder!r}); "
    source += f"from gem_ds.evaluate.sandbox.{module} import {function}; sys.path.pop(); "
    source += f"{function}(*{arguments})"
    return [room.interpreter(), "-s", "-S", "-P", "-c", source]


class NamespaceJail:
    """Own user, pid, mount, network, ipc and uts namespaces; see `gem_ds.evaluate.sandbox.room`.

    The judge is process 1 of the cell's pid namespace: when it ends, the kernel kills the rest. It
    is deaf to signals from within, and there is no /proc to see it by. It shares the candidate's
    identity, filter and files, but imports nothing from where the candidate may write.
    """

    def __init__(self, fresh: bool) -> None:
        self._fresh = fresh
        self._filter = confine.SystemCallFilter()
        self._room = room.Room()
        self.processes = self._room.processes
        sys.path[:] = [folder for folder in sys.path if not folder.startswith(room.SCRATCH)]
        confine.limit()

    def start_judge(self, judge: Callable[[], None]) -> int:
        """Runs `judge` in a new process of the returned number."""
        self._room.enter_cell()
        pid = fork(judge)
        self._room.leave_cell()
        return pid

    def start_candidate(self, job: int, channel: int, memory_mb: int) -> int:
        """Confines the calling judge, which has read no test yet, and starts its candidate.

        Of the judge's open files the candidate keeps these two. Returns its process's number.
        """
        os.setpgid(0, 0)  # signals to one's own group would leave the pid namespace
        confine.drop_privileges(self._room.identity)
        self._filter.install()
        return fork(lambda: self._become_candidate(job, channel, memory_mb))

    def clear(self) -> None:
        """Ends what is left when the judge's process has ended: the kernel has done it."""

    def _become_candidate(self, job: int, channel: int, memory_mb: int) -> None:
        confine.keep_only([job, channel])
        confine.limit_memory(memory_mb)
        os.chdir(room.SCRATCH[0])
        if self._fresh:
            _become_fresh(job, channel, ENVIRONMENT)
        candidate.main(job, channel)


class _RoomlessJail:
    """What the levels without a room of ours share; methods as those of `NamespaceJail`."""

    def __init__(self) -> None:
        self._filter = confine.SystemCallFilter()
        self._readable = list(room.sources())
        self._identity, self._judge_identity = room.lend(self._readable)
        self.processes = ProcessTable()
        adopt_orphans()
        # Where the candidate is this user, his other threads count with its own.
        confine.limit(self.processes.threads_of(os.getuid()) if self._identity is None else 0)

    def start_judge(self, judge: Callable[[], None]) -> int:
        """Runs `judge` in a new process."""
        return fork(judge)

    def start_candidate(self, job: int, channel: int, memory_mb: int) -> int:
        """Starts the candidate, and then confines the calling judge."""
        adopt_orphans()
        pid = fork(lambda: self._become_candidate(job, channel, memory_mb))
        confine.drop_privileges(self._judge_identity)
        self._filter.install()
        return pid

    def clear(self) -> None:
        """Kills all that descends from the server."""
        self.processes.end_descendants(self._identity)

    def _become_candidate(self, job: int, channel: int, memory_mb: int) -> None:
        raise NotImplementedError


class BubblewrapJail(_RoomlessJail):
    """What `NamespaceJail` has, built by bubblewrap, which may where we may not.

    Each candidate gets a bubblewrap and a fresh interpreter; only a room of its own making could
    fork one, and bubblewrap gives away none of the privileges that takes.
    """

    def __init__(self, fresh: bool) -> None:
        programs = [f"{folder}/bwrap" for folder in os.defpath.split(":")]
        found = next((path for path in programs if os.access(path, os.X_OK)), None)
        if found is None:
            raise FileNotFoundError("bubblewrap is not installed (apt-get install bubblewrap)")
        self._program = found
        super().__init__()

    def _become_candidate(self, job: int, channel: int, memory_mb: int) -> None:
        confine.keep_only([job, channel])
        confine.limit_memory(memory_mb)
        confine.drop_privileges(self._identity)
        rules = self._filter.as_file()
        os.set_inheritable(rules, True)
        # No environment: its first process keeps it in sight.
        _become_fresh(job, channel, {}, [*self._command(rules), "--"])

    def _command(self, rules: int) -> list[str]:
        words = [self._program, "--unshare-all", "--new-session", "--die-with-parent"]
        for source, target in room.sources().items():
            if os.path.islink(source) and os.path.isdir(source):
                words += ["--symlink", os.readlink(source), target]
            else:
                words += ["--ro-bind", source, target]
        for device in room.DEVICES:
            words += ["--dev-bind", device, device]
        for folder in room.SCRATCH:
            words += ["--size", str(room.SCRATCH_MB << 20), "--tmpfs", folder]
        for name, value in ENVIRONMENT.items():
            words += ["--setenv", name, value]
        return [*words, "--remount-ro", "/", "--chdir", room.SCRATCH[0], "--seccomp", str(rules)]


class LandlockJail(_RoomlessJail):
    """Landlock, seccomp and limits: files and TCP are out of reach, processes are not hidden.

    Weak: there is one pid, network and ipc namespace for all, the disk is limited by the size of
    each file only, and what a candidate starts is found and killed by walking, not by the kernel.
    Candidates are always forked.
    """

    def __init__(self, fresh: bool) -> None:
        confine.landlock_version()
        super().__init__()
        self._scratch = ""

    def start_judge(self, judge: Callable[[], None]) -> int:
        """Gives it a folder that only its candidate may use."""
        self._scratch = f"/tmp/gem_ds-sandbox-{os.getpid()}-{os.urandom(8).hex()}"
        os.mkdir(self._scratch, 0o700)
        if self._identity is not None:
            os.chown(self._scratch, self._identity, self._identity)
        return super().start_judge(judge)

    def clear(self) -> None:
        """Removes that folder too."""
        super().clear()
        import shutil  # here, because its libraries would make each fork dearer at every level

        shutil.rmtree(self._scratch, ignore_errors=True)  # the candidate may have been before us

    def _become_candidate(self, job: int, channel: int, memory_mb: int) -> None:
        os.setsid()
        os.chdir(self._scratch)
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        confine.keep_files(self._readable, [self._scratch, *room.DEVICES])
        confine.keep_only([job, channel])
        confine.limit_memory(memory_mb)
        confine.drop_privileges(self._identity)
        self._filter.install()
        os.environ.update(HOME=self._scratch, TMPDIR=self._scratch)
        candidate.main(job, channel)


def _become_fresh(
    job: int, channel: int, environment: dict[str, str], prefix: Iterable[str] = ()
) -> None:
    """Becomes a fresh interpreter in a room, started by another program if there is a prefix."""
    for descriptor in (job, channel):
        os.set_inheritable(descriptor, True)
    words = [*prefix, *command(room.CODE, "candidate", "main", job, channel)]
    os.execve(words[0], words, environment)


Jail = NamespaceJail | BubblewrapJail | LandlockJail
JAILS: dict[str, Callable[[bool], Jail]] = {
    "bubblewrap": BubblewrapJail,
    "namespaces": NamespaceJail,
    "landlock": LandlockJail,
}
