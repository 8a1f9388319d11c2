"""The kernel: system calls that Python 3.11 has no function for, and which processes there are.

The calls go through ctypes, and raise `OSError` where they fail.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import glob
import os
import resource
import signal
import struct
from collections.abc import Callable

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
PR_SET_CHILD_SUBREAPER = 36  # the parent of what its descendants leave behind

MACHINE = os.uname().machine
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442  # on all architectures, as all later ones
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = 1, 4
_AT_FDCWD, _AT_RECURSIVE, _MNT_DETACH = -100, 0x8000, 2
_PR_CAPBSET_READ, _PR_CAPBSET_DROP = 23, 24
_CAP_HEADER = struct.pack("=Ii", 0x20080522, 0)  # version 3, of the calling process
_NO_CAPABILITIES = bytes(2 * 12)

_libc = ctypes.CDLL(None, use_errno=True)


def call(function: str, *arguments: object, what: str = "") -> int:
    """A function of libc's by its name; `what` is what an error says instead of that."""
    result = int(getattr(_libc, function)(*arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what or function}: {os.strerror(number)}")
    return result


def syscall(number: int, *arguments: object) -> int:
    """A system call by number."""
    return call("syscall", number, *arguments, what=f"system call {number}")


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """Mounts."""
    names = [os.fsencode(text) or None for text in (source, target, kind)]
    rest = (ctypes.c_ulong(flags), options.encode() or None)
    call("mount", *names, *rest, what=f"mount {target}")


def restrict_mount(target: str, attributes: int, *, recursive: bool) -> None:
    """Sets MOUNT_ATTR_* on a mount, and on those below it."""
    attr = struct.pack("=4Q", attributes, 0, 0, 0)  # struct mount_attr: what is to be set
    flags = _AT_RECURSIVE if recursive else 0
    syscall(_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(target), flags, attr, len(attr))


def open_tree(path: str) -> int:
    """An open file that stands for a copy of what is mounted at and below a path."""
    return syscall(_OPEN_TREE, _AT_FDCWD, path.encode(), _AT_RECURSIVE | _OPEN_TREE_CLONE)


def move_mount(tree: int, path: str) -> None:
    """Mounts what `open_tree` returned."""
    syscall(_MOVE_MOUNT, tree, b"", _AT_FDCWD, path.encode(), _MOVE_MOUNT_F_EMPTY_PATH)


def pivot_root(new_root: str) -> None:
    """Makes the mount `new_root` the root, and drops the old one."""
    os.chdir(new_root)
    syscall(_PIVOT_ROOT[MACHINE], b".", b".")
    call("umount2", b".", _MNT_DETACH, what="umount the old root")
    os.chdir("/")


def prctl(option: int, argument: int = 0, pointer: object = None) -> None:
    """Sets an attribute of the calling process."""
    zero = ctypes.c_ulong(0)
    arguments = (ctypes.c_ulong(argument), pointer or zero, zero, zero)
    call("prctl", option, *arguments, what=f"prctl {option}")


def drop_bounding_set() -> None:
    """Keeps whatever is executed from here on from bringing back a capability.

    It takes a capability to do so. Who has none cannot get any once new privileges are given up.
    """
    capability = 0
    with contextlib.suppress(PermissionError):
        while _libc.prctl(_PR_CAPBSET_READ, ctypes.c_ulong(capability)) >= 0:
            prctl(_PR_CAPBSET_DROP, capability)
            capability += 1


def drop_capabilities() -> None:
    """Gives up every capability."""
    call("capset", _CAP_HEADER, _NO_CAPABILITIES)


# Processes


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


class ProcessTable:
    """The processes as they are seen through a /proc that was opened once, whatever is mounted now.

    Made by a server before it has children: what it holds itself by then, its forks share with it.
    """

    def __init__(self) -> None:
        self._folder = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
        self._open = functools.partial(os.open, dir_fd=self._folder)
        self._inherited = self._own_memory("self")

    def memory_of_descendants(self) -> int:
        """Bytes beyond files and what they inherited; what they share counts for each of them."""
        own = map(self._own_memory, self._descendants())
        return sum(max(0, size - self._inherited) for size in own)

    def threads_of(self, uid: int) -> int:
        """How many threads a user has, main ones included, as the kernel counts them."""
        found = map(self._status, filter(str.isdigit, os.listdir(self._folder)))
        return sum(int(s["Threads"][0]) for s in found if s.get("Uid", [""])[0] == str(uid))

    def end_descendants(self, identity: int | None) -> None:
        """Kills all that descends from the caller, a subreaper.

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
            for pid in doomed:
                with contextlib.suppress(ChildProcessError):  # it is not ours yet
                    os.waitpid(pid, 0)

    def _descendants(self) -> list[int]:
        """The caller's children, theirs and so on, as they are numbered outside."""
        found = self._children("self")
        for pid in found:  # which grows meanwhile
            found += self._children(pid)
        return found

    def _children(self, pid: object) -> list[int]:
        lists = glob.glob(f"{pid}/task/*/children", dir_fd=self._folder)
        return [int(child) for path in lists for child in self._read(path).split()]

    def _status(self, pid: object) -> dict[str, list[str]]:
        """What is told of a process, by name; nothing where it has ended."""
        lines = (line.partition(":") for line in self._read(f"{pid}/status").split("\n"))
        return {name: value.split() for name, _, value in lines}

    def _own_memory(self, pid: object) -> int:
        status = self._status(pid)
        return sum(int(status[name][0]) << 10 for name in ("RssAnon", "RssShmem") if name in status)

    def _read(self, path: str) -> str:
        """A small file's text, empty where the process has ended."""
        try:
            # A process may take a name that is no text, or holds other ends of lines.
            with open(path, encoding="latin-1", newline="\n", opener=self._open) as file:
                return file.read()
        except OSError:
            return ""


def _kill_all_of(identity: int) -> None:
    os.setresuid(identity, identity, identity)
    with contextlib.suppress(ProcessLookupError):  # if there is none
        os.kill(-1, signal.SIGKILL)
