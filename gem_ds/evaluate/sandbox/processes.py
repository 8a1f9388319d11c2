"""Starting processes, and seeing what has become of them."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable

from gem_ds.evaluate.sandbox import kernel

_PERIOD = 0.002  # seconds between two looks at a child that is about to end


def fork(child: Callable[[], None]) -> int:
    """Runs `child` in a new process, which then ends; nothing of the parent's runs in it."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        child()
        status = 0
    finally:
        os._exit(status)


def adopt_orphans() -> None:
    """Makes the caller the parent of what its descendants leave behind."""
    kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)


class Reaper:
    """Waits for what ends below the caller, so that it does not go on counting as a process.

    It has to be asked to now and then. A handler of SIGCHLD could be called by anyone who may send
    the signal, in the midst of anything, and the first process of a pid namespace is deaf to
    signals from within only where it handles none. A thread would cost a twelfth of all speed.
    """

    def __init__(self, child: int, at_its_end: Callable[[], None]) -> None:
        """`at_its_end` is called when that child is seen to have ended, whatever it left behind."""
        self._child = child
        self._at_its_end = at_its_end
        self._status: int | None = None

    def reap(self) -> None:
        """Waits for all that has ended by now, and for nothing else."""
        try:
            while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                if ended[0] == self._child:
                    code = os.waitstatus_to_exitcode(ended[1])
                    self._status = code if code >= 0 else 128 - code
                    self._at_its_end()
        except ChildProcessError:  # there is nothing left that could end
            return

    def wait(self, timeout: float) -> int | None:
        """The child's exit status, 128 + N for a death by signal N; None if it goes on longer."""
        deadline = time.monotonic() + timeout
        self.reap()
        while self._status is None and time.monotonic() < deadline:
            time.sleep(_PERIOD)
            self.reap()
        return self._status


class ProcessTable:
    """The processes as they are seen through a /proc that was opened once, whatever is mounted now.

    Made by a server before it has children: what it holds itself by then, its forks share with it.
    """

    def __init__(self) -> None:
        self._folder = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
        self._inherited = self._own_memory("self")

    def memory_of_descendants(self) -> int:
        """Bytes that the caller's descendants hold, beyond what they inherited and files.

        Memory that some of them share counts for each.
        """
        own = (self._own_memory(str(pid)) for pid in self._descendants())
        return sum(max(0, size - self._inherited) for size in own)

    def threads_of(self, uid: int) -> int:
        """How many threads a user has, main ones included, as the kernel counts them."""
        count = 0
        for name in filter(str.isdigit, os.listdir(self._folder)):
            lines = (line.partition(":") for line in self._read(f"{name}/status").splitlines())
            status = {key: value.split() for key, _, value in lines}
            if status and int(status["Uid"][0]) == uid:
                count += int(status["Threads"][0])
        return count

    def end_descendants(self, identity: int | None) -> None:
        """Kills all that descends from the caller, an adopter of orphans.

        Processes may start others faster than one can list them. If all of them, and nothing else,
        have an identity of their own, they are killed at one stroke; else each is first forbidden
        to start more.
        """
        while doomed := self._descendants():
            if identity is not None:
                os.waitpid(fork(lambda: _kill_all_of(identity)), 0)
            for pid in doomed:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    resource.prlimit(pid, resource.RLIMIT_NPROC, (0, 0))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for pid in set(doomed) & set(self._children()):
                os.waitpid(pid, 0)

    def _descendants(self) -> list[int]:
        """The caller's children, theirs and so on, as they are numbered outside."""
        found = self._children()
        for pid in found:  # which grows meanwhile
            found += self._children(pid)
        return found

    def _children(self, pid: int | None = None) -> list[int]:
        """The children of a process, by default of the caller."""
        name = os.readlink("self", dir_fd=self._folder) if pid is None else str(pid)
        try:
            tasks = os.open(f"{name}/task", os.O_RDONLY, dir_fd=self._folder)
        except OSError:  # it has ended
            return []
        try:
            threads = os.listdir(tasks)
        finally:
            os.close(tasks)
        lists = [self._read(f"{name}/task/{thread}/children") for thread in threads]
        return [int(child) for children in lists for child in children.split()]

    def _own_memory(self, pid: str) -> int:
        lines = self._read(f"{pid}/status").splitlines()
        sizes = [line.split()[1] for line in lines if line.startswith(("RssAnon:", "RssShmem:"))]
        return sum(map(int, sizes)) << 10

    def _read(self, path: str) -> str:
        """A small file's text, empty where the process has ended."""
        try:
            descriptor = os.open(path, os.O_RDONLY, dir_fd=self._folder)
        except OSError:
            return ""
        try:
            return os.read(descriptor, 1 << 16).decode()
        except ProcessLookupError:
            return ""
        finally:
            os.close(descriptor)


def _kill_all_of(identity: int) -> None:
    os.setresuid(identity, identity, identity)
    with contextlib.suppress(ProcessLookupError):  # if there is none
        os.kill(-1, signal.SIGKILL)
