"""What a process holds: on the device, or of the machine's memory above what libraries take."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

# Loaded here, since at ZeRO stages 1 to 3 it is loaded late, and with it torch's compiler (45 MB).
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import torch


def library_bytes() -> int:
    """What this process holds now, to be called before the model is loaded."""
    return _status("VmRSS")


def start_peak(device: torch.device) -> None:
    """Forget the peak so far; memory that was freed goes back to the system first."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device, libraries: int) -> int:
    """The most memory held since :func:`start_peak`; on a CPU without :func:`library_bytes`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") - libraries


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
    assert found, f"/proc/self/status has no {field}"
    return int(found.group(1)) * 1024
