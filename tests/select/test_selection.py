"""Selection from dense tensors: against the oracle, what is taken as it is, and bad input."""

import pytest
import torch
from torch import Tensor

from gem_ds.select.selection import select_entries, select_shards
from gem_ds.select.shards import Solo, TargetShard
from tests import oracle

Tensors = dict[str, Tensor]


def _assert_the_oracles(gradients: Tensors, weights: Tensors, total: int) -> None:
    kept = {name: (gradients[name].clone(), weights[name].clone()) for name in weights}
    found = select_entries(gradients, weights, total)
    expected = oracle.select(gradients, weights, total)
    assert list(found) == list(weights), "layers come in the order of the weights"
    for name, (gradient, weight) in kept.items():
        assert found[name].dtype == torch.int64
        assert found[name].tolist() == expected[name].flatten().nonzero().flatten().tolist()
        assert torch.equal(gradients[name], gradient)
        assert torch.equal(weights[name], weight)


def test_strided_low_precision_and_trained_tensors_are_taken_as_they_are():
    generator = torch.Generator().manual_seed(7)
    gradients = {
        "t": torch.randn(30, 20, generator=generator).t(),
        "s": torch.randn(10, 24, generator=generator)[:, ::2].bfloat16(),
        "p": torch.randn(50, generator=generator).half(),
    }
    weights = {
        "p": torch.nn.Parameter(torch.randn(50, generator=generator)),
        "t": torch.randn(30, 20, generator=generator).t(),
        "s": torch.randn(10, 24, generator=generator)[:, 1::2],
    }
    _assert_the_oracles(gradients, weights, 99)


def test_a_higher_gradient_on_a_smaller_weight_wins():
    """The idea of GEM in four entries: what counts is the gradient relative to the weight."""
    gradients = {"w": torch.tensor([[1.0, -1.0], [0.5, 0.1]])}
    weights = {"w": torch.tensor([[10.0, 1.0], [-0.1, 0.1]])}
    assert select_entries(gradients, weights, 2)["w"].tolist() == [1, 2]  # ratios 0.1 1 5 1
    for total in (1, 2, 3, 4):
        _assert_the_oracles(gradients, weights, total)


ONES = torch.ones(2)


@pytest.mark.parametrize(
    ("gradients", "weights", "total", "message"),
    [
        ({"a": ONES}, {"b": ONES}, 1, r"names \['a', 'b'\]"),
        ({"a": ONES}, {"a": ONES, "b": ONES}, 1, r"names \['b'\]"),
        ({"a": torch.ones(4)}, {"a": torch.ones(2, 2)}, 1, r"Give a .* \(4,\) and \(2, 2\)"),
        ({"a": ONES.int()}, {"a": ONES}, 1, "floating dtype: .*int32"),
        ({"a": ONES}, {"a": ONES.bool()}, 1, "floating dtype: .*bool"),
        ({"a": torch.tensor([1e38, 1.0])}, {"a": torch.zeros(2)}, 1, "of a are not finite"),
        ({}, {}, 1, "that hold 0"),
        *(({"a": ONES}, {"a": ONES}, total, "hold 2: change the density") for total in (-1, 0, 3)),
    ],
)
def test_what_is_refused(gradients, weights, total, message):
    with pytest.raises(ValueError, match=message):
        select_entries(gradients, weights, total)


def test_indices_into_a_parameter_of_experts_beyond_32_bits():
    """Those into each matrix fit."""
    shard = TargetShard(
        name="experts",
        shape=(3, 2**15, 2**15),
        start=2**31 - 2,  # the last of the second matrix and the first of the third
        weight=torch.ones(4),
        gradient=torch.tensor([0.0, 3.0, 1.0, 2.0]),
        device=torch.device("cpu"),
    )
    (found,) = select_shards([shard], 2, Solo(), rule="ratio_global").indices
    assert found.tolist() == [2**31 - 1, 2**31 + 1]
