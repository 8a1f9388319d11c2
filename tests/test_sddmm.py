"""Gradients of a weight at selected entries, against the dense product picked apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gem_ds.sddmm import add_product_, product, sampled_product


def _dense(dy: Tensor, x: Tensor) -> Tensor:
    """The whole product, in fp64."""
    return dy.double().t() @ x.double()


def _assert_sampled(dy: Tensor, x: Tensor, flat_index: Tensor) -> None:
    dense = _dense(dy, x).flatten()[flat_index.long()]
    scale = _dense(dy.abs(), x.abs()).flatten()[flat_index.long()]  # bounds every partial sum
    sampled = sampled_product(dy, x, flat_index)
    assert sampled.dtype == torch.float32
    assert sampled.shape == flat_index.shape
    assert ((sampled - dense).abs() <= 1e-5 * scale).all()


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    tokens, rows, columns = (draw(st.integers(1, n)) for n in (40, 20, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    dy = torch.randn(tokens, rows, generator=generator).to(dtype)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    k = draw(st.integers(0, rows * columns))
    flat_index = torch.randperm(rows * columns, generator=generator)[:k].sort().values
    return dy, x, flat_index.to(draw(st.sampled_from([torch.int32, torch.int64])))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_random_shapes_and_dtypes(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    _assert_sampled(*problem)


@settings(max_examples=30, deadline=None)
@given(problems())
def test_the_whole_product(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    dy, x, _ = problem
    scale = _dense(dy.abs(), x.abs())
    whole = product(dy, x)
    assert whole.dtype == torch.float32
    assert ((whole - _dense(dy, x)).abs() <= 1e-5 * scale).all()
    out = torch.full_like(whole, float("nan"))
    assert product(dy, x, out) is out
    assert torch.equal(out, whole)
    sums = out.clone()
    assert add_product_(sums, dy, x, scale=-2.5) is sums
    assert ((sums + 1.5 * _dense(dy, x)).abs() <= 1e-5 * scale).all()


def test_no_entry_is_selected() -> None:
    none = torch.zeros(0, dtype=torch.int32)
    sampled = sampled_product(torch.ones(3, 2), torch.ones(3, 4), none)
    assert sampled.shape == (0,)
    assert sampled.dtype == torch.float32


def test_no_tokens() -> None:
    index = torch.tensor([0, 5], dtype=torch.int32)
    assert sampled_product(torch.ones(0, 2), torch.ones(0, 4), index).tolist() == [0.0, 0.0]
    assert product(torch.ones(0, 2), torch.ones(0, 4)).tolist() == [[0.0] * 4] * 2


def test_all_entries_of_one_row_and_none_of_the_others() -> None:
    dy, x = torch.randn(9, 5), torch.randn(9, 6)
    _assert_sampled(dy, x, torch.arange(12, 18, dtype=torch.int32))


def test_every_entry() -> None:
    dy, x = torch.randn(9, 5), torch.randn(9, 6)
    _assert_sampled(dy, x, torch.arange(30))
    sampled = sampled_product(dy, x, torch.arange(30))
    torch.testing.assert_close(sampled, product(dy, x).flatten(), rtol=0, atol=1e-5)


def test_the_corners() -> None:
    dy, x = torch.randn(9, 5), torch.randn(9, 6)
    _assert_sampled(dy, x, torch.tensor([0, 5, 24, 29], dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_that_are_not_contiguous(dtype: torch.dtype) -> None:
    dy, x = torch.randn(5, 18).to(dtype).t()[::2], torch.randn(18, 12).to(dtype)[::2, ::2]
    assert not dy.is_contiguous()
    assert not x.is_contiguous()
    _assert_sampled(dy, x, torch.arange(0, 30, 3))
    torch.testing.assert_close(product(dy, x), _dense(dy, x).float())


def test_low_precision_inputs_are_summed_in_fp32() -> None:
    """300 ones: bf16 cannot count past 256."""
    ones = torch.ones(300, 1, dtype=torch.bfloat16)
    assert sampled_product(ones, ones, torch.tensor([0])).tolist() == [300.0]
    assert product(ones, ones).tolist() == [[300.0]]


def test_what_is_not_finite_shows_in_its_entry_only() -> None:
    dy, x = torch.ones(3, 2), torch.ones(3, 2)
    dy[1, 1] = float("inf")
    assert sampled_product(dy, x, torch.tensor([0, 2])).tolist() == [3.0, float("inf")]
    x[0, 0] = float("nan")
    sampled = sampled_product(dy, x, torch.tensor([0, 1]))
    assert sampled.isnan().tolist() == [True, False]
