"""What a kernel is said to hold beside its result: against the storages that it makes.

The library's kernel has sparse tensors, whose storages cannot be told.
"""

import pytest
import torch

from gem_ds.planning.live import LiveBytes
from gem_ds.sddmm import Pattern, add_sampled_product
from gem_ds.sddmm.memory import strips_bytes, temporary_bytes
from gem_ds.sddmm.strips import Strips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("num_entries", [0, 900, 20_000])
@pytest.mark.parametrize(("tokens", "shape"), [(100, (600, 700)), (1100, (3000, 1000))])
@pytest.mark.parametrize("kernel", ["dense", "tiled", "gather"])
def test_a_kernel_holds_what_is_foretold(kernel, tokens, shape, num_entries, dtype):
    rows, columns = shape
    torch.manual_seed(0)
    chosen = torch.randperm(rows * columns)[:num_entries].sort().values.to(torch.int32)
    pattern = Pattern.of(chosen, shape)
    dy, x = torch.randn(tokens, rows).to(dtype), torch.randn(tokens, columns).to(dtype)
    out = torch.zeros(num_entries)
    add_sampled_product(out, dy, x, pattern, kernel)  # what is made once is made now
    known = [dy, x, out, pattern.flat_index, pattern.row_bounds]
    live = LiveBytes()
    live.know(torch.nn.ParameterList(torch.nn.Parameter(t, False) for t in known))
    with live:
        add_sampled_product(out, dy, x, pattern, kernel)
    foretold = temporary_bytes(
        kernel,
        tokens=tokens,
        shape=shape,
        num_entries=num_entries,
        itemsize=dy.element_size(),
        on_cpu=True,
    )
    assert foretold == pytest.approx(live.peak, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [100, 1100])
def test_a_whole_matrix_makes_copies_of_its_factors_at_most(tokens, dtype):
    shape = 600, 700
    pattern = Pattern.of(torch.arange(600 * 700, dtype=torch.int32), shape)
    dy, x = torch.randn(tokens, 600).to(dtype), torch.randn(tokens, 700).to(dtype)
    out = torch.zeros(600 * 700)
    live = LiveBytes()
    live.know(torch.nn.ParameterList(torch.nn.Parameter(t, False) for t in (dy, x, out)))
    with live:
        add_sampled_product(out, dy, x, pattern)
    foretold = temporary_bytes(
        "whole",
        tokens=tokens,
        shape=shape,
        num_entries=600 * 700,
        itemsize=dy.element_size(),
        on_cpu=True,
    )
    assert foretold == pytest.approx(live.peak, rel=0.02)


@pytest.mark.parametrize("num_entries", [0, 200, 3000, 100_000])
def test_strips_keep_no_more_than_is_foretold(num_entries):
    """Hardly less where few entries share any, or all possible strips have some."""
    shape = 600, 700
    torch.manual_seed(0)
    chosen = torch.randperm(shape[0] * shape[1])[:num_entries].sort().values
    kept = sum(tensor.nbytes for tensor in vars(Strips.of(chosen, shape[1])).values())
    assert 0.9 * strips_bytes(shape, num_entries) <= kept <= strips_bytes(shape, num_entries)
