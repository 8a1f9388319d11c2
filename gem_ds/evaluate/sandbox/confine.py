"""What a process gives up before it runs, or reads, anything that a candidate made."""

from __future__ import annotations

import os
import resource
import signal

from gem_ds.evaluate.sandbox import kernel

MAX_FILE_BYTES = 32 << 20
MAX_PROCESSES = 128  # of candidates; threads count too
MAX_DESCRIPTORS = 64  # each may hold a buffer that nobody counts

_MOST_DESCRIPTORS = 1 << 20  # that a process may have at all (fs.nr_open)


def keep_only(descriptors: list[int]) -> None:
    """Closes every descriptor from 3 on but these.

    Not only up to the limit of descriptors: it may have been lowered since some were opened.
    """
    start = 3
    for descriptor in sorted(descriptors):
        os.closerange(start, descriptor)
        start = descriptor + 1
    os.closerange(start, _MOST_DESCRIPTORS)


def prepare(num_others: int = 0) -> None:
    """Limits the calling process in what its descendants shall not have and it does not need.

    Args:
        num_others: Threads that the kernel counts with the candidates' processes and that are none
            of theirs: those of the same user, where he has no number of his own in there.

    Raises:
        OSError: The bounding set is not empty and cannot be emptied.
    """
    for kind, limit in (
        (resource.RLIMIT_FSIZE, MAX_FILE_BYTES),
        (resource.RLIMIT_NPROC, num_others + MAX_PROCESSES),
        (resource.RLIMIT_NOFILE, MAX_DESCRIPTORS),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 1 << 16),
    ):
        _limit(kind, limit)
    kernel.drop_bounding_set()


def limit_memory(memory_mb: int) -> None:
    """Bounds the address space of the calling process and of each that it starts."""
    _limit(resource.RLIMIT_AS, memory_mb << 20)


def drop_privileges(identity: int | None) -> None:
    """Gives up all capabilities, for good, and becomes user and group `identity`.

    Without one (an ordinary user has none to spare) the process stays who it is. It dies with its
    parent from here on.
    """
    if identity is not None:
        os.setgroups([])
        os.setresgid(identity, identity, identity)
        os.setresuid(identity, identity, identity)
    kernel.drop_capabilities()
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)


def _limit(kind: int, limit: int) -> None:
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(kind, (limit, limit))
