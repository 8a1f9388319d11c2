"""The levels, ways to start a candidate alone; each is made once per server.

At every level the judge's process starts the candidate, and each is confined. Where the judge is
the first process of a pid namespace (`room`), it has the candidate's identity and the kernel keeps
signals from it; at the other levels it has one of its own, if root lends them. The interpreter may
lie under root's own home: the way to it is then opened in a mount namespace of the server's.
"""

from __future__ import annotations

import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from gem_ds.evaluate.sandbox import candidate, confine, kernel, room, system_calls
from gem_ds.evaluate.sandbox.kernel import ProcessTable, fork

_FIRST_LENT = 1_000_000_000  # identity: far from what systems and containers give out


class _RoomlessJail(ABC):
    """What the levels without a room of ours share; methods as those of `NamespaceJail`."""

    def __init__(self, packages: Sequence[str], *, hides_files: bool) -> None:
        self._rules = system_calls.filter_rules(hides_files=hides_files)
        self.packages = packages
        self._readable = list(room.sources(packages))
        self._identity: int | None = None
        self._judge_identity: int | None = None
        if os.geteuid() == 0:
            open_to_all(self._readable)
            self._identity = _FIRST_LENT + 2 * os.getpid()  # no other process has it
            self._judge_identity = self._identity + 1
        self.processes = ProcessTable()
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
        # Where the candidate is this user, his other threads count with its own.
        confine.limit(self.processes.threads_of(os.getuid()) if self._identity is None else 0)

    def start_judge(self, judge: Callable[[], None]) -> int:
        """Runs `judge` in a new process."""
        return fork(judge)

    def start_candidate(self, job: int, channel: int, memory_mb: int) -> int:
        """Starts the candidate, and then confines the calling judge."""
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
        pid = fork(lambda: self._become_candidate(job, channel, memory_mb))
        confine.drop_privileges(self._judge_identity)
        system_calls.install(self._rules)
        return pid

    def clear(self) -> None:
        """Kills all that descends from the server."""
        self.processes.end_descendants(self._identity)

    @abstractmethod
    def _become_candidate(self, job: int, channel: int, memory_mb: int) -> None:
        """Confines the calling process and runs the candidate in it."""


class BubblewrapJail(_RoomlessJail):
    """What `NamespaceJail` has, built by bubblewrap, which may where we may not.

    Each candidate gets a bubblewrap and a fresh interpreter; only a room of its own making could
    fork one, and bubblewrap gives away none of the privileges that takes.
    """

    def __init__(self, fresh: bool, packages: Sequence[str] = ()) -> None:
        programs = [f"{folder}/bwrap" for folder in os.defpath.split(":")]
        found = next((path for path in programs if os.access(path, os.X_OK)), None)
        if found is None:
            raise FileNotFoundError("bubblewrap is not installed (apt-get install bubblewrap)")
        self._program = found
        super().__init__(packages, hides_files=True)

    def _become_candidate(self, job: int, channel: int, memory_mb: int) -> None:
        confine.keep_only([job, channel])
        confine.limit_memory(memory_mb)
        confine.drop_privileges(self._identity)
        rules = os.memfd_create("seccomp")
        os.pwrite(rules, self._rules, 0)
        os.set_inheritable(rules, True)
        # No environment: its first process keeps it in sight.
        shown = room.places_of(self.packages)
        room.become_fresh(job, channel, shown, {}, [*self._command(rules), "--"])

    def _command(self, rules: int) -> list[str]:
        words = [self._program, "--unshare-all", "--new-session", "--die-with-parent"]
        for source, target in room.sources(self.packages).items():
            if os.path.islink(source) and os.path.isdir(source):
                words += ["--symlink", os.readlink(source), target]
            else:
                words += ["--ro-bind", source, target]
        for device in room.DEVICES:
            words += ["--dev-bind", device, device]
        for folder in room.SCRATCH:
            words += ["--size", str(room.SCRATCH_MB << 20), "--tmpfs", folder]
        for name, value in room.ENVIRONMENT.items():
            words += ["--setenv", name, value]
        return [*words, "--remount-ro", "/", "--chdir", room.SCRATCH[0], "--seccomp", str(rules)]


class LandlockJail(_RoomlessJail):
    """Landlock, seccomp and limits: files and TCP are out of reach, processes are not hidden.

    Weak: there is one pid, network and ipc namespace for all, the disk is limited by the size of
    each file only, and what a candidate starts is found and killed by walking, not by the kernel.
    What files there are, and how large, can be seen; modes and times cannot be set, not even of a
    candidate's own files. Before Linux 6.12 an ordinary user's processes can be signalled.
    Candidates are always forked.
    """

    def __init__(self, fresh: bool, packages: Sequence[str] = ()) -> None:
        confine.landlock_version()
        super().__init__(packages, hides_files=False)
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
        system_calls.install(self._rules)
        os.environ.update(HOME=self._scratch, TMPDIR=self._scratch)
        candidate.main(job, channel)


def open_to_all(paths: list[str]) -> None:
    """Gives the calling process, root's, a view of the files in which anyone can read `paths`."""
    hidden = [path for path in paths if _closed_folder(path)]
    if not hidden:
        return
    kernel.call("unshare", kernel.CLONE_NEWNS)
    kernel.mount("", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    trees = [(path, os.path.isdir(path), kernel.open_tree(path)) for path in hidden]
    for path, is_folder, tree in trees:
        while closed := _closed_folder(path):  # to be covered by one that leads to the paths only
            kernel.mount("tmpfs", closed, "tmpfs", room.NO_DEVICES, "mode=755,size=1m")
        room.make_target(path, is_folder=is_folder)
        kernel.move_mount(tree, path)
        os.close(tree)


def _closed_folder(path: str) -> str | None:
    """The first folder on the way to `path` that is not open to all."""
    folders = itertools.accumulate(path.split("/")[:-1], "{}/{}".format)
    closed = (f for f in folders if os.path.isdir(f) and not os.stat(f).st_mode & 0o001)
    return next(closed, None)


Jail = room.NamespaceJail | BubblewrapJail | LandlockJail
JAILS: dict[str, Callable[[bool, Sequence[str]], Jail]] = {
    "bubblewrap": BubblewrapJail,
    "namespaces": room.NamespaceJail,
    "landlock": LandlockJail,
}
