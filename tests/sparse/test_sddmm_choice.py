"""Which kernel is chosen for which layer, and which are refused."""

import itertools
from contextlib import nullcontext
from typing import get_args

import pytest
import torch

from gem_ds.sddmm import Pattern, add_sampled_product, check_kernel, choice, choose_kernel
from gem_ds.sddmm.choice import COSTS, KERNELS
from gem_ds.train.config import SddmmKernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_the_flag_takes_the_kernels():
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
        ((768, 768), 768 * 768 - 1, "tiled"),
    ],
)
def test_on_a_cpu_where_the_measurements_leave_no_doubt(shape, num_entries, kernel, dtype):
    assert choose_kernel("cpu", dtype, shape, num_entries) == kernel
    assert choose_kernel("xpu", dtype, shape, num_entries) == "tiled"  # which runs on any GPU


@pytest.mark.parametrize(("has_triton", "has_compiler"), [(False, True), (True, False), (1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_few_entries_are_for_triton_where_it_runs(
    has_triton, has_compiler, dtype, monkeypatch
):
    """All linear layers at 0.1 %; 5 % by products."""
    monkeypatch.setattr(choice, "_has_triton", lambda: has_triton)
    monkeypatch.setattr(choice, "_has_compiler", lambda: has_compiler)
    for shape in ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)):
        few, many = (round(share * shape[0] * shape[1]) for share in (0.001, 0.05))
        assert choose_kernel("cuda", dtype, shape, few) == (
            "triton" if has_triton and has_compiler else "tiled"
        )
        assert choose_kernel("cuda", dtype, shape, many) == "tiled"


def test_of_a_whole_matrix_nothing_is_picked():
    for device_type, dtype in itertools.product(("cpu", "cuda", "xpu"), DTYPES):
        assert choose_kernel(device_type, dtype, (50, 80), 4000) == "whole"


@pytest.mark.parametrize("num_entries", [3, 1500, 4000])
def test_auto_is_the_chosen_kernel(num_entries):
    shape = (50, 4000) if num_entries == 1500 else (50, 80)
    chosen = choose_kernel("cpu", torch.float32, shape, num_entries)
    dy, x = torch.randn(33, shape[0]), torch.randn(33, shape[1])
    pattern = Pattern.of(torch.arange(num_entries), shape)
    sums = {kernel: torch.zeros(num_entries) for kernel in ("auto", chosen)}
    for kernel, out in sums.items():
        add_sampled_product(out, dy, x, pattern, kernel)
    assert torch.equal(sums["auto"], sums[chosen])


@pytest.mark.parametrize("is_installed", [False, True])
def test_what_cannot_run_is_refused(is_installed, monkeypatch):
    """What torch computes runs anywhere; Triton's kernel where it is installed, on a GPU."""
    monkeypatch.setattr(choice, "_has_triton", lambda: is_installed)
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
