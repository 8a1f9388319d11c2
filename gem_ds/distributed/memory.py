"""How much memory is free to each rank: of its GPU, or of what its host has for all ranks on it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from gem_ds.distributed.comm import Comm


def free_bytes(comm: Comm) -> int:
    """Bytes that every rank can still take: of the one that has least. All call this together.

    On a GPU what no process holds and what torch holds in reserve; on a CPU what the host calls
    available, or less where a container has a limit, shared by the ranks that run on it.
    """
    if comm.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(comm.device)
        free += torch.cuda.memory_reserved(comm.device) - torch.cuda.memory_allocated(comm.device)
    else:
        hosts = comm.gather_objects(socket.gethostname())
        free = _available_bytes() // hosts.count(hosts[comm.rank])
    return -comm.largest(-free)


def _available_bytes() -> int:
    """What programs can take before the host swaps, as Linux estimates it, or a container ends."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    kibibytes = {name: value.split()[0] for name, _, value in (s.partition(":") for s in lines)}
    return min([1024 * int(kibibytes["MemAvailable"]), *_left_to_groups()])


def _left_to_groups(root: Path = Path("/sys/fs/cgroup"), own: str | None = None) -> Iterator[int]:
    """What the limits of this process' control groups (v2) leave, those around its own too.

    Pages of files that a group has read count as taken, so it may be more.
    """
    if own is None:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        own = next((line[3:] for line in lines if line.startswith("0::")), "/")
    folder = root / own.lstrip("/")
    for group in (folder, *folder.parents):
        if not group.is_relative_to(root):
            return
        with suppress(OSError, ValueError):  # no limit here: no file, or the word max
            limit = int((group / "memory.max").read_text())
            yield max(0, limit - int((group / "memory.current").read_text()))
