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
from dataclasses import dataclass

import torch

KERNELS = ("dense", "tiled", "gather", "library", "triton")


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Nanoseconds per token of a kernel.

    Attributes:
        feature: for each row and each column.
        entry: for each selected entry.
        product: for each entry of the matrix.
    """

    feature: float = 0.0
    entry: float = 0.0
    product: float = 0.0

    def of(self, shape: tuple[int, int], num_entries: int) -> float:
        """Nanoseconds per token."""
        rows, columns = shape
        return (
            self.feature * (rows + columns)
            + self.entry * num_entries
            + self.product * rows * columns
        )


#: Whether on a CPU, whether dy and x are fp32 -> what may be chosen.
COSTS = {
    (True, True): {
        "library": Costs(feature=1.1, entry=0.065),
        "gather": Costs(entry=3.3),
        "tiled": Costs(product=0.0065),
    },
    (True, False): {
        "library": Costs(feature=0.9, entry=0.07),
        "gather": Costs(entry=2.8),
        "tiled": Costs(product=0.007),
    },
    (False, True): {"tiled": Costs()},
    (False, False): {"tiled": Costs()},
}


def choose_kernel(
    device_type: str, dtype: torch.dtype, shape: tuple[int, int], num_entries: int
) -> str:
    """Name the kernel that ``auto`` takes, for any number of tokens.

    Args:
        device_type: where dy and x lie: cpu, cuda or another.
        dtype: of dy and x; those of 16 bits are alike.
        shape: of the weight, [rows, columns].
        num_entries: k of this weight.
    """
    costs = COSTS[device_type == "cpu", dtype == torch.float32]
    return min(costs, key=lambda kernel: costs[kernel].of(shape, num_entries))


def check_kernel(kernel: str, device_type: str) -> None:
    """Refuse a kernel that cannot run.

    Raises:
        ValueError: one sentence that says what to change.
    """
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
