"""Which kernel computes the sampled gradient, and what was measured for it.

The time of every kernel is proportional to the tokens, so a choice does not depend on them:

    library    feature * (rows + columns) + entry * k     transposes dy and x, then a dot per entry
    gather     entry * k                                  reads the columns that it needs only
    tiled      product * rows * columns                   a dense product, picked

Fitted by eye to ``python benchmarks/sddmm.py`` (two cores with AVX-512, torch 2.13, entries spread
evenly), which gives at 4096 x 4096 in fp32, in microseconds per token:

    density    library    gather    tiled    dense
    0.1 %         11         58       114      117
    0.5 %         18        260       108      119
    1 %           23                  101      108
    5 %           63                  107      108

``dense`` is never chosen: it is as fast as ``tiled`` and makes more.

CUDA was not measured; what stands here is a guess. There a dense product runs on tensor cores, 16
bits with sums in fp32, while a dot per entry is bound by memory: at 4096 x 4096 over 2,048 tokens
an H100 should take about 0.1 ms for the one and, at the 0.5 to 1 % of GEM's targets, for the other.
So the product it is, by tiles; ``--sddmm_kernel triton`` tries the other.
"""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

import torch

KERNELS = ("dense", "tiled", "gather", "library", "triton")


class Costs(NamedTuple):
    """Nanoseconds per token of a kernel."""

    feature: float = 0.0  # for each row and each column
    entry: float = 0.0  # for each selected entry
    product: float = 0.0  # for each entry of the matrix

    def of(self, shape: tuple[int, int], num_entries: int) -> float:
        """Nanoseconds per token."""
        rows, columns = shape
        counts = rows + columns, num_entries, rows * columns
        return sum(cost * count for cost, count in zip(self, counts, strict=True))


#: Whether dy and x are fp32 -> what may be chosen on a CPU.
COSTS = {
    True: {
        "library": Costs(feature=1.1, entry=0.065),
        "gather": Costs(entry=3.3),
        "tiled": Costs(product=0.0065),
    },
    False: {
        "library": Costs(feature=0.9, entry=0.07),
        "gather": Costs(entry=2.8),
        "tiled": Costs(product=0.007),
    },
}


def choose_kernel(
    device_type: str, dtype: torch.dtype, shape: tuple[int, int], num_entries: int
) -> str:
    """Name the kernel that ``auto`` takes; ``dtype`` is that of dy and x."""
    if device_type != "cpu":
        return "tiled"
    costs = COSTS[dtype == torch.float32]
    return min(costs, key=lambda kernel: costs[kernel].of(shape, num_entries))


def check_kernel(kernel: str, device_type: str) -> None:
    """Refuse a kernel that cannot run, in a ValueError that says what to change."""
    if kernel not in ("auto", *KERNELS):
        raise ValueError(f"--sddmm_kernel takes auto or one of {', '.join(KERNELS)}, not {kernel}.")
    if kernel != "triton":
        return
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            "--sddmm_kernel triton needs Triton: pip install 'gem_ds[triton]' (Linux), or leave "
            "the flag out."
        )
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("--sddmm_kernel triton needs a GPU: leave the flag out.")
