"""What a process holds: on the device, or of the machine's memory above what libraries take."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

# Loaded here, since at ZeRO stages 1 to 3 it is loaded late, and with it torch's compiler (45 MB).
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import torch

_LIBC = ctypes.CDLL("libc.so.6")
_M_MMAP_THRESHOLD = -3  # malloc.h: allocations of this size and more are mapped by themselves


def library_bytes() -> int:
    """What this process holds now, to be called before the model is loaded."""
    return _status("VmRSS")


def start_peak(device: torch.device) -> None:
    """Forget the peak so far; memory that was freed goes back to the system first."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    _LIBC.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def give_freed_memory_back() -> None:
    """From now on, at once: the resident set is then what lives, and each large tensor costs time.

    As it is, the C library keeps what is freed, and at ZeRO-3 that can be as much as what lives.
    """
    _LIBC.mallopt(_M_MMAP_THRESHOLD, 1 << 16)


def peak_bytes(device: torch.device, libraries: int) -> int:
    """The most memory held since :func:`start_peak`.

    Args:
        device: that of the model.
        libraries: of :func:`library_bytes`; not counted on a CPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") - libraries


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
    assert found, f"/proc/self/status has no {field}"
    return int(found.group(1)) * 1024
