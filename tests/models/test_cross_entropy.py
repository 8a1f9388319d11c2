"""The fused loss against torch's own cross-entropy of whole logits: values and all gradients."""

from contextlib import AbstractContextManager
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from gem_ds.models import loss as losses
from gem_ds.models.loss import summed_cross_entropy
from tests.largest_tensor import LargestTensor

Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor]


def whole_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def inputs(
    num_rows: int,
    num_labels: int,
    *,
    width: int = 5,
    has_bias: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Inputs:
    random = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(dtype).requires_grad_()

    labels = torch.randint(0, num_labels, (num_rows,), generator=random)
    bias = some(num_labels) if has_bias else None
    return some(num_rows, width), some(num_labels, width), bias, labels


def chunks_of(num_rows: int) -> AbstractContextManager[object]:
    return mock.patch.object(losses, "rows_of_chunk", return_value=num_rows)


def assert_same(given: Inputs, factor: float, relative: float) -> None:
    """Same loss, same gradients of ``factor`` times the loss."""
    *tensors, labels = given
    trained = [t for t in tensors if t is not None and t.requires_grad]
    found = summed_cross_entropy(*tensors, labels)
    expected = whole_cross_entropy(*tensors, labels)
    assert found.dtype == torch.float32
    assert found.shape == ()
    torch.testing.assert_close(found, expected, rtol=min(relative, 1e-5), atol=1e-6)
    assert found.requires_grad == bool(trained)
    if not trained:
        return
    pairs = zip(
        torch.autograd.grad(found * factor, trained),
        torch.autograd.grad(expected * factor, trained),
        strict=True,
    )
    for own, whole in pairs:
        assert own.dtype == whole.dtype
        scale = whole.abs().max().item() if whole.numel() else 0.0
        torch.testing.assert_close(own, whole, rtol=relative, atol=relative * scale + 1e-7)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_size_cut_anywhere(data):
    """Chunks of one row to more than all; also those that end with the rows."""
    num_rows, num_labels = data.draw(st.integers(0, 12)), data.draw(st.integers(1, 9))
    given = inputs(
        num_rows,
        num_labels,
        width=data.draw(st.integers(1, 6)),
        has_bias=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 2**32)),
    )
    for tensor in given[:3]:
        if tensor is not None:
            tensor.requires_grad_(data.draw(st.booleans()))
    chunk_rows = data.draw(st.integers(1, num_rows + 2))
    with chunks_of(chunk_rows):
        assert_same(given, factor=data.draw(st.floats(-100, 100)), relative=1e-5)


def test_half_precision_rounds_logits_as_a_model_does():
    """The losses are equal as if in fp32, since both round the logits; gradients to rounding."""
    for dtype in (torch.bfloat16, torch.float16):
        with chunks_of(7):
            assert_same(inputs(40, 31, width=16, dtype=dtype), factor=0.3, relative=2e-2)


def test_the_factor_is_not_rounded_to_half_precision():
    """In bf16 it would be 180 / 256, and every gradient too large by a part in 359."""
    factor = 179.5 / 256
    hidden, weight, bias, labels = inputs(512, 4, width=16, dtype=torch.bfloat16)
    plain, scaled = (
        torch.autograd.grad(summed_cross_entropy(hidden, weight, bias, labels) * f, hidden)[0]
        for f in (1.0, factor)
    )
    slope = (scaled.double() * plain).sum() / plain.double().square().sum()
    assert slope.item() == pytest.approx(factor, rel=2**-12)


def test_weights_of_half_precision_sum_their_gradient_in_fp32():
    """A bf16 sum of 4096 equal chunks would stop at 256 of them."""
    num_rows = 4096
    hidden = torch.ones(num_rows, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    with chunks_of(1):
        loss = summed_cross_entropy(hidden, weight, None, torch.zeros(num_rows, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.flatten().tolist() == [-num_rows / 2, num_rows / 2]


def test_extreme_logits():
    """Probabilities of 0 and 1 in fp32: the loss is the logit's distance all the same."""
    hidden = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    weight = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    assert_same((hidden, weight, None, torch.tensor([0, 0])), factor=1.0, relative=1e-6)


def test_without_gradients_none_is_made_and_a_second_backward_is_refused():
    """It would cost a product more, or find its gradients scaled already."""
    hidden, weight, bias, labels = inputs(6, 4)
    with torch.no_grad(), mock.patch.object(losses, "add_product") as add_product:
        loss = summed_cross_entropy(hidden, weight, bias, labels)
    assert not loss.requires_grad
    add_product.assert_not_called()
    torch.testing.assert_close(loss, whole_cross_entropy(hidden, weight, bias, labels).detach())
    loss = summed_cross_entropy(hidden, weight, bias, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("is_trained", [False, True])
def test_nothing_is_larger_than_a_chunk_or_the_weight(is_trained):
    num_rows, num_labels, width, chunk_rows = 64, 500, 4, 8
    hidden, weight, _, labels = inputs(num_rows, num_labels, width=width, has_bias=False)
    weight.requires_grad_(is_trained)
    with chunks_of(chunk_rows):
        with LargestTensor() as largest:
            summed_cross_entropy(hidden, weight, None, labels).backward()
        with LargestTensor() as largest_whole:
            whole_cross_entropy(hidden, weight, None, labels).backward()
    assert largest_whole.num_entries == num_rows * num_labels, "the recorder sees logits"
    assert largest.num_entries == chunk_rows * num_labels
