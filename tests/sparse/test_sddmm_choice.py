"""Which kernel is chosen for which layer, and which are refused."""

import importlib.util
import itertools
from contextlib import nullcontext
from typing import get_args

import pytest
import torch

from gem_ds.sparse.sddmm import Pattern, add_sampled_product, check_kernel, choose_kernel
from gem_ds.sparse.sddmm.choice import COSTS, KERNELS
from gem_ds.train.config import SddmmKernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_the_flag_takes_the_kernels() -> None:
    assert get_args(SddmmKernel) == ("auto", *KERNELS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "num_entries", "kernel"),
    [
        ((4096, 4096), 50, "gather"),
        ((4096, 4096), 4096 * 4096 // 1000, "library"),
        ((4096, 11008), 4096 * 11008 // 100, "library"),
        ((4096, 4096), 4096 * 4096 // 3, "tiled"),
        ((768, 768), 768 * 768 // 10, "tiled"),
        ((768, 768), 768 * 768, "tiled"),
    ],
)
def test_on_a_cpu_where_the_measurements_leave_no_doubt(
    shape: tuple[int, int], num_entries: int, kernel: str, dtype: torch.dtype
) -> None:
    assert choose_kernel("cpu", dtype, shape, num_entries) == kernel
    for device_type in ("cuda", "xpu"):  # what runs on any GPU and needs no measurement
        assert choose_kernel(device_type, dtype, shape, num_entries) == "tiled"


@pytest.mark.parametrize("num_entries", [3, 1500, 4000])
def test_auto_is_the_chosen_kernel(num_entries: int) -> None:
    shape = (50, 4000) if num_entries == 1500 else (50, 80)
    chosen = choose_kernel("cpu", torch.float32, shape, num_entries)
    dy, x = torch.randn(33, shape[0]), torch.randn(33, shape[1])
    pattern = Pattern.of(torch.arange(num_entries), shape)
    sums = {kernel: torch.zeros(num_entries) for kernel in ("auto", chosen)}
    for kernel, out in sums.items():
        add_sampled_product(out, dy, x, pattern, kernel)
    assert torch.equal(sums["auto"], sums[chosen])


@pytest.mark.parametrize("is_installed", [False, True])
def test_what_cannot_run_is_refused(is_installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch computes runs anywhere; Triton's kernel where it is installed, on a GPU."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if is_installed else None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert all(kernel in KERNELS for costs in COSTS.values() for kernel in costs)
    unknown = "takes auto or one of dense, tiled"
    for kernel, device_type in itertools.product(("auto", *KERNELS, "fast"), ("cpu", "cuda")):
        message = unknown if kernel == "fast" else None
        if kernel == "triton" and not is_installed:
            message = "pip install"
        elif kernel == "triton" and device_type == "cpu":
            message = "needs a GPU"
        with pytest.raises(ValueError, match=message) if message else nullcontext():
            check_kernel(kernel, device_type)
