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

``dense`` is never chosen: it is as fast as ``tiled`` and makes more. Where all entries are selected
there is nothing to pick, and the product is added as it is.

No GPU was measured; for one the same formula holds bytes and operations, over what an H100 does:

                 of a number's bytes b            at
    tiled        2 operations of the product      600 TFLOP/s of 16 bits, 60 in fp32
    triton       4 b + b of the features          3.35 TB/s, copies; the cache's 5, read by blocks
                 b of the entries                 the half of the cache's 5.5 TB/s
                 32 operations of the entries     60 TFLOP/s in fp32; in 16 bits they are hidden

which counts a column of its own for every entry. Masks of trained models share them: in two of
SmolLM2-135M (576 columns, 1 % of the targets selected, blocks of 16 rows) 0.45 and 0.6 columns are
read for an entry. In 16 bits at 4096 x 4096 both take 56 ns a token at 0.36 % of the entries, so
``triton`` is for many targets: all linear layers at the usual 0.1 %, where dense products would be
57 TFLOP of a step of 4,096 tokens at 8B. GEM's default targets have 0.5 to 1 % of theirs selected,
which goes by products in 16 bits; in fp32, where products are slow, both take as long at 1.6 %.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from typing import NamedTuple

import torch

KERNELS = ("dense", "tiled", "gather", "library", "triton")
WHOLE = "whole"  # what auto takes where all entries are selected


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


#: Kind of device, and whether dy and x are fp32 -> what may be chosen.
COSTS = {
    ("cpu", True): {
        "library": Costs(feature=1.1, entry=0.065),
        "gather": Costs(entry=3.3),
        "tiled": Costs(product=0.0065),
    },
    ("cpu", False): {
        "library": Costs(feature=0.9, entry=0.07),
        "gather": Costs(entry=2.8),
        "tiled": Costs(product=0.007),
    },
    ("cuda", True): {
        "tiled": Costs(product=3.3e-5),
        "triton": Costs(feature=3.2e-3, entry=2.0e-3),
    },
    ("cuda", False): {
        "tiled": Costs(product=3.3e-6),
        "triton": Costs(feature=1.6e-3, entry=7.0e-4),
    },
}


def choose_kernel(
    device_type: str, dtype: torch.dtype, shape: tuple[int, int], num_entries: int
) -> str:
    """Name the kernel that ``auto`` takes; ``dtype`` is that of dy and x."""
    if num_entries == shape[0] * shape[1]:
        return WHOLE
    costs = COSTS.get((device_type, dtype == torch.float32), {"tiled": Costs()})
    kernels = [
        kernel for kernel in costs if kernel != "triton" or (_has_triton() and _has_compiler())
    ]
    return min(kernels, key=lambda kernel: costs[kernel].of(shape, num_entries))


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _has_compiler() -> bool:
    """Whether there is a C compiler, which Triton needs for what starts its kernels."""
    return any(map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang")))


def check_kernel(kernel: str, device_type: str) -> None:
    """Refuse a kernel that cannot run, in a ValueError that says what to change."""
    if kernel not in ("auto", *KERNELS):
        raise ValueError(f"--sddmm_kernel takes auto or one of {', '.join(KERNELS)}, not {kernel}.")
    if kernel != "triton":
        return
    if not _has_triton():
        raise ValueError(
            "--sddmm_kernel triton needs Triton: pip install 'gem_ds[triton]' (Linux), or leave "
            "the flag out."
        )
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("--sddmm_kernel triton needs a GPU: leave the flag out.")
