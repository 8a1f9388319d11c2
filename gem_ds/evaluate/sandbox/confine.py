"""What a process gives up before it runs, or reads, anything that a candidate made.

    memory, processes, descriptors, sizes of files   `limit`, `limit_memory`, `keep_only`
    who it is, and all capabilities                   `drop_privileges`
    files and TCP, by Landlock                        `keep_files`
    system calls, by seccomp                          `system_calls`

What fails raises `OSError`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import struct
from collections.abc import Iterable

from gem_ds.evaluate.sandbox import kernel

_MAX_PROCESSES = 128  # of candidates; threads count too
_LIMITS = {
    resource.RLIMIT_FSIZE: 32 << 20,
    resource.RLIMIT_NOFILE: 64,  # each may hold a buffer that nobody counts
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_MEMLOCK: 1 << 16,
}
_MOST_DESCRIPTORS = 1 << 20  # that a process may have at all (fs.nr_open)


def keep_only(descriptors: Iterable[int]) -> None:
    """Closes every descriptor from 3 on but these, those above a lowered limit too."""
    start = 3
    for descriptor in sorted(descriptors):
        os.closerange(start, descriptor)
        start = descriptor + 1
    os.closerange(start, _MOST_DESCRIPTORS)


def limit(num_others: int = 0) -> None:
    """Limits the calling process in what its descendants shall not have and it does not need.

    `num_others` are threads of the same user that the kernel counts with the candidates' processes.
    """
    for kind, most in (*_LIMITS.items(), (resource.RLIMIT_NPROC, num_others + _MAX_PROCESSES)):
        _limit(kind, most)
    kernel.drop_bounding_set()


def limit_memory(memory_mb: int) -> None:
    """Bounds the address space of the calling process and of each that it starts."""
    _limit(resource.RLIMIT_AS, memory_mb << 20)


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(kind, (most, most))


def drop_privileges(identity: int | None) -> None:
    """Gives up all capabilities, for good; from here on the process dies with its parent.

    It becomes user and group `identity`, if there is one: an ordinary user has none to spare.
    """
    if identity is not None:
        os.setgroups([])
        os.setresgid(identity, identity, identity)
        os.setresuid(identity, identity, identity)
    kernel.drop_capabilities()
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)


# Landlock, which takes no privilege at all

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_FOLDER = 1, 2, 4, 8
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | 1 << 14  # what a rule on a file may grant
_READ_ONLY = _EXECUTE | _READ_FILE | _READ_FOLDER
_ALL_FILES = {3: (1 << 15) - 1, 5: (1 << 16) - 1}  # by version; 3 is the first to refuse truncating
_ALL_TCP, _ALL_SCOPES = 3, 3  # bind and connect; signals and abstract sockets of others


def landlock_version() -> int:
    """The kernel's Landlock version, if it has one that is of use."""
    found = kernel.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION_FLAG)
    if found < min(_ALL_FILES):
        raise OSError(errno.ENOSYS, f"this kernel has Landlock {found}, and 3 is the least")
    return found


def keep_files(readable: Iterable[str], writable: Iterable[str]) -> None:
    """Leaves a process that has given up new privileges these paths and no TCP, for good."""
    version = landlock_version()
    files = _ALL_FILES[max(v for v in _ALL_FILES if v <= version)]
    refused = [files, *[_ALL_TCP] * (version >= 4), *[_ALL_SCOPES] * (version >= 6)]
    attr = struct.pack(f"={len(refused)}Q", *refused)
    ruleset = kernel.syscall(_CREATE_RULESET, attr, ctypes.c_size_t(len(attr)), 0)
    for paths, allowed in ((readable, _READ_ONLY), (writable, files)):
        for path in paths:
            folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
            granted = allowed if os.path.isdir(path) else allowed & _OF_FILES & files
            rule = struct.pack("=Qi", granted, folder)
            kernel.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
            os.close(folder)
    kernel.syscall(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)
