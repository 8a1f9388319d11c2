"""Landlock: a process gives up all files but some, and all TCP; needs no privilege at all."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable

from gem_ds.evaluate.sandbox import kernel

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG, _PATH_BENEATH = 1, 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_FOLDER = 1, 2, 4, 8
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | 1 << 14  # what a rule on a file may grant
_READ_ONLY = _EXECUTE | _READ_FILE | _READ_FOLDER
_ALL_FILES = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_MIN_VERSION = 3  # from which on truncating is refused too
_ALL_TCP, _ALL_SCOPES = 3, 3  # bind and connect; signals and abstract sockets of others


class _Ruleset(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("files", "network", "scopes")]


class _PathRule(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32)]


def version() -> int:
    """The kernel's Landlock version.

    Raises:
        OSError: It has none, or one that is too old to be of use.
    """
    found = kernel.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION_FLAG)
    if found < _MIN_VERSION:
        raise OSError(errno.ENOSYS, f"this kernel has Landlock {found}, and 3 is the least")
    return found


def restrict(readable: Iterable[str], writable: Iterable[str]) -> None:
    """Leaves the calling process these files and folders, for good; raises `OSError`.

    It must have given up new privileges before.
    """
    kernel_version = version()
    files = _ALL_FILES[max(v for v in _ALL_FILES if v <= kernel_version)]
    rules = _Ruleset(
        files=files,
        network=_ALL_TCP if kernel_version >= 4 else 0,
        scopes=_ALL_SCOPES if kernel_version >= 6 else 0,
    )
    size = ctypes.c_size_t(8 if kernel_version < 4 else 16 if kernel_version < 6 else 24)
    ruleset = kernel.syscall(_CREATE_RULESET, ctypes.byref(rules), size, 0)
    for paths, allowed in ((readable, _READ_ONLY), (writable, files)):
        for path in paths:
            folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
            granted = allowed if os.path.isdir(path) else allowed & _OF_FILES & files
            rule = _PathRule(allowed=granted, folder=folder)
            kernel.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(rule), 0)
            os.close(folder)
    kernel.syscall(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
