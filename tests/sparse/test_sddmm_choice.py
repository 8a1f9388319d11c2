"""Which kernel is chosen for which layer, and which are refused."""

from __future__ import annotations

import importlib.util
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gem_ds.sparse.sddmm import Pattern, add_sampled_product, check_kernel, choose_kernel
from gem_ds.sparse.sddmm.choice import COSTS, KERNELS
from gem_ds.train.config import SddmmKernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_the_flag_takes_the_kernels() -> None:
    assert get_args(SddmmKernel) == ("auto", *KERNELS)


@given(
    device_type=st.sampled_from(["cpu", "cuda", "xpu"]),
    dtype=st.sampled_from(DTYPES),
    shape=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    density=st.floats(0, 1),
)
def test_every_layer_has_a_kernel(
    device_type: str, dtype: torch.dtype, shape: tuple[int, int], density: float
) -> None:
    num_entries = int(density * shape[0] * shape[1])
    kernel = choose_kernel(device_type, dtype, shape, num_entries)
    assert kernel in KERNELS
    if device_type != "cpu":
        assert kernel == "tiled", "all that runs on any GPU and needs no measurement"


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
def test_on_a_cpu(
    shape: tuple[int, int], num_entries: int, kernel: str, dtype: torch.dtype
) -> None:
    """Cases in which the measurements leave no doubt."""
    assert choose_kernel("cpu", dtype, shape, num_entries) == kernel


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


def test_all_that_is_chosen_can_be_named() -> None:
    assert all(kernel in KERNELS for costs in COSTS.values() for kernel in costs)


@pytest.mark.parametrize("kernel", ["auto", "dense", "tiled", "gather", "library"])
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_what_torch_computes_runs_anywhere(kernel: str, device_type: str) -> None:
    check_kernel(kernel, device_type)


def test_triton_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a GPU"):
        check_kernel("triton", "cpu")
    check_kernel("triton", "cuda")


def test_triton_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install"):
        check_kernel("triton", "cuda")


def test_an_unknown_kernel() -> None:
    with pytest.raises(ValueError, match="takes auto or one of dense, tiled"):
        check_kernel("fast", "cpu")
