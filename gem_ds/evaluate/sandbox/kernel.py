"""The Linux system calls of the sandbox that Python 3.11 has no function for, through ctypes."""

from __future__ import annotations

import ctypes
import os

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

MACHINE = os.uname().machine
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_MOUNT_SETATTR = 442  # one number on all architectures, as all later ones
_AT_RECURSIVE = 0x8000
_AT_FDCWD = -100

_libc = ctypes.CDLL(None, use_errno=True)
_capset = _libc.capset


class _MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns_fd")]


class _CapHeader(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _CapData(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


_CAP_HEADER = _CapHeader(version=0x20080522)
_NO_CAPABILITIES = (_CapData * 2)()


def syscall(number: int, *arguments: object) -> int:
    """A system call by number.

    Raises:
        OSError: It failed.
    """
    return _checked(_libc.syscall(number, *arguments), f"system call {number}")


def unshare(flags: int) -> None:
    """Gives the calling process new namespaces; raises `OSError`."""
    _checked(_libc.unshare(flags), "unshare")


def setns(descriptor: int, kind: int) -> None:
    """Joins the namespace that an open file stands for; raises `OSError`."""
    _checked(_libc.setns(descriptor, kind), "setns")


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """Mounts; raises `OSError`."""
    arguments = [os.fsencode(text) or None for text in (source, target, kind)]
    result = _libc.mount(*arguments, ctypes.c_ulong(flags), options.encode() or None)
    _checked(result, f"mount {target}")


def unmount(target: str) -> None:
    """Takes a mount, with all below it, out of sight; raises `OSError`."""
    _checked(_libc.umount2(os.fsencode(target), MNT_DETACH), f"umount {target}")


def restrict_mount(target: str, attributes: int, *, recursive: bool) -> None:
    """Sets MOUNT_ATTR_* on a mount, and on those below it; raises `OSError`."""
    attr = _MountAttr(set=attributes)
    flags = _AT_RECURSIVE if recursive else 0
    path = os.fsencode(target)
    syscall(_MOUNT_SETATTR, _AT_FDCWD, path, flags, ctypes.byref(attr), ctypes.sizeof(attr))


def pivot_root(new_root: str) -> None:
    """Makes the mount `new_root` the root, and drops the old one; raises `OSError`."""
    os.chdir(new_root)
    syscall(_PIVOT_ROOT[MACHINE], b".", b".")
    unmount(".")
    os.chdir("/")


def prctl(option: int, argument: int = 0, pointer: object = None) -> None:
    """Sets an attribute of the calling process; raises `OSError`."""
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
    """Gives up every capability; raises `OSError`."""
    _checked(_capset(ctypes.byref(_CAP_HEADER), _NO_CAPABILITIES), "capset")


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result
