"""Starting processes, and seeing what has become of them."""

from __future__ import annotations

import os
from collections.abc import Callable

_PAGE = os.sysconf("SC_PAGESIZE")


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


def shell_status(status: int) -> int:
    """A wait status as an exit status: 128 and the signal's number for a death by one."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


class ProcessTable:
    """The processes as they are seen through a /proc that was opened once, whatever is mounted now.

    Made by a server before it has children: what it holds itself by then, its forks share with it.
    """

    def __init__(self) -> None:
        self._folder = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
        self._inherited = self._own_memory("self")

    def memory_of_descendants(self) -> int:
        """Bytes that the caller's descendants hold, beyond what they inherited and files."""
        pids, total = self.children(), 0
        while pids:
            pid = pids.pop()
            pids += self.children(pid)
            total += max(0, self._own_memory(str(pid)) - self._inherited)
        return total

    def children(self, pid: int | None = None) -> list[int]:
        """The children of a process, by default of the caller, as they are numbered outside."""
        name = os.readlink("self", dir_fd=self._folder) if pid is None else str(pid)
        return [int(child) for child in self._read(f"{name}/task/{name}/children").split()]

    def _own_memory(self, pid: str) -> int:
        sizes = self._read(f"{pid}/statm").split()
        return (int(sizes[1]) - int(sizes[2])) * _PAGE if sizes else 0

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
