"""The Linux system calls of the sandbox that Python 3.11 has no function for, through ctypes.

Each raises `OSError` where it fails.
"""

from __future__ import annotations

import ctypes
import os
import struct

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

AT_FDCWD = -100
AT_RECURSIVE = 0x8000

MACHINE = os.uname().machine
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442  # on all architectures, as all later ones
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = 1, 4

_libc = ctypes.CDLL(None, use_errno=True)
_capset = _libc.capset


_CAP_HEADER = struct.pack("=Ii", 0x20080522, 0)  # version 3, of the calling process
_NO_CAPABILITIES = bytes(2 * 12)


def syscall(number: int, *arguments: object) -> int:
    """A system call by number."""
    return _checked(_libc.syscall(number, *arguments), f"system call {number}")


def unshare(flags: int) -> None:
    """Gives the calling process new namespaces."""
    _checked(_libc.unshare(flags), "unshare")


def setns(descriptor: int, kind: int) -> None:
    """Joins the namespace that an open file stands for."""
    _checked(_libc.setns(descriptor, kind), "setns")


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """Mounts."""
    arguments = [os.fsencode(text) or None for text in (source, target, kind)]
    result = _libc.mount(*arguments, ctypes.c_ulong(flags), options.encode() or None)
    _checked(result, f"mount {target}")


def restrict_mount(target: str, attributes: int, *, recursive: bool) -> None:
    """Sets MOUNT_ATTR_* on a mount, and on those below it."""
    attr = struct.pack("=4Q", attributes, 0, 0, 0)  # struct mount_attr: what is to be set
    flags = AT_RECURSIVE if recursive else 0
    syscall(_MOUNT_SETATTR, AT_FDCWD, os.fsencode(target), flags, attr, len(attr))


def open_tree(path: str) -> int:
    """An open file that stands for a copy of what is mounted at and below a path."""
    return syscall(_OPEN_TREE, AT_FDCWD, path.encode(), AT_RECURSIVE | _OPEN_TREE_CLONE)


def move_mount(tree: int, path: str) -> None:
    """Mounts what `open_tree` returned."""
    syscall(_MOVE_MOUNT, tree, b"", AT_FDCWD, path.encode(), _MOVE_MOUNT_F_EMPTY_PATH)


def pivot_root(new_root: str) -> None:
    """Makes the mount `new_root` the root, and drops the old one."""
    os.chdir(new_root)
    syscall(_PIVOT_ROOT[MACHINE], b".", b".")
    _checked(_libc.umount2(b".", MNT_DETACH), "umount the old root")
    os.chdir("/")


def prctl(option: int, argument: int = 0, pointer: object = None) -> None:
    """Sets an attribute of the calling process."""
    zero = ctypes.c_ulong(0)
    result = _libc.prctl(option, ctypes.c_ulong(argument), pointer or zero, zero, zero)
    _checked(result, f"prctl {option}")


def drop_bounding_set() -> None:
    """Keeps whatever is executed from here on from bringing back a capability.

    It takes a capability to do so. Who has none cannot get any once new privileges are given up.
    """
    capability = 0
    while _libc.prctl(PR_CAPBSET_READ, ctypes.c_ulong(capability)) >= 0:
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except PermissionError:
            return
        capability += 1


def drop_capabilities() -> None:
    """Gives up every capability."""
    _checked(_capset(_CAP_HEADER, _NO_CAPABILITIES), "capset")


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result
