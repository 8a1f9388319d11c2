"""How much memory is free to each rank: of its GPU, or of what its host has for all ranks on it."""

from __future__ import annotations

import socket
from pathlib import Path

import torch

from gem_ds.distributed.comm import Comm


def free_bytes(comm: Comm) -> int:
    """Bytes that every rank can still take: of the one that has least. All call this together.

    On a GPU what no process holds and what torch holds in reserve; on a CPU what the host calls
    available, shared by the ranks that run on it.
    """
    if comm.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(comm.device)
        free += torch.cuda.memory_reserved(comm.device) - torch.cuda.memory_allocated(comm.device)
    else:
        hosts = comm.gather_objects(socket.gethostname())
        free = _available_bytes() // hosts.count(hosts[comm.rank])
    return -comm.largest(-free)


def _available_bytes() -> int:
    """What programs can take before the host swaps, as Linux estimates it."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    kibibytes = {name: value.split()[0] for name, _, value in (s.partition(":") for s in lines)}
    return 1024 * int(kibibytes["MemAvailable"])
