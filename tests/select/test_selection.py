"""From gradients to masks: against the oracle, one mask for any number of ranks, bad input."""

import pytest
import torch
from torch import Tensor

from gem_ds.select.rules import SPARSE_METHODS, TargetShard
from gem_ds.select.scores import Solo
from gem_ds.select.selection import Selection, select_entries, select_shards
from tests import oracle
from tests.thread_group import ThreadGroup, cut, run_threads

Tensors = dict[str, Tensor]
WORLD_SIZES = (1, 3, 7)


def _random(seed: int = 0) -> tuple[Tensors, Tensors]:
    """Gradients and weights as they come: bf16 weights, some zero; heavy-tailed gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (40, 50), "v": (20, 51), "tail": (33, 61), "small": (2, 3), "dead": (5, 7)}
    weights = {n: 0.02 * torch.randn(s, generator=generator) for n, s in shapes.items()}
    gradients = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    gradients["tail"] = torch.exp(5 * gradients["tail"])
    gradients["dead"] = torch.zeros(shapes["dead"])
    weights["v"][0] = 0
    weights["q"] = weights["q"].bfloat16()
    return gradients, weights


def _tied() -> tuple[Tensors, Tensors]:
    """Ratios of very few values, and two equal layers, so that scores and remainders tie."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"a": (31, 17), "b": (31, 17), "c": (9, 9), "d": (1, 2), "e": (64, 64)}
    gradients = {n: torch.randint(0, 3, s, generator=generator).float() for n, s in shapes.items()}
    gradients["b"] = gradients["a"].clone()
    weights = {n: torch.ones(s) for n, s in shapes.items()}
    return gradients, weights


def _subnormal() -> tuple[Tensors, Tensors]:
    generator = torch.Generator().manual_seed(4)
    gradients = {
        n: torch.randint(0, 2000, (30, 30), generator=generator) * 2.0**-149 for n in ("a", "b")
    }
    return gradients, {n: torch.ones(30, 30) for n in gradients}


def _dead() -> tuple[Tensors, Tensors]:
    return (
        {"a": torch.zeros(30, 2), "b": torch.zeros(20)},
        {"a": torch.randn(30, 2), "b": torch.zeros(20)},
    )


CASES = {"random": _random(), "tied": _tied(), "subnormal": _subnormal(), "dead": _dead()}


def _sharded(gradients: Tensors, weights: Tensors, total: int, world_size: int) -> list[Selection]:
    def work(group: ThreadGroup) -> Selection:
        shards = []
        for name, weight in weights.items():
            start, gradient = cut(gradients[name], group.rank, world_size)
            _, part = cut(weight, group.rank, world_size)
            numel = weight.numel()
            shards.append(
                TargetShard(
                    name=name,
                    numel=numel,
                    start=start,
                    gradient=gradient,
                    weight=part,
                    device=part.device,
                )
            )
        return select_shards(shards, total, group)

    return run_threads(world_size, work)


def _flat(masks: Tensors) -> dict[str, list[int]]:
    return {name: mask.flatten().nonzero().flatten().tolist() for name, mask in masks.items()}


def _totals(weights: Tensors) -> list[int]:
    size = sum(w.numel() for w in weights.values())
    return [1, size // 100 + 2, size // 2, size - 1, size]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("case", CASES)
def test_one_mask_for_any_number_of_ranks_and_it_is_the_oracles(case: str, world_size: int) -> None:
    gradients, weights = CASES[case]
    for total in _totals(weights):
        expected = _flat(oracle.select(gradients, weights, total))
        alone = _sharded(gradients, weights, total, 1)[0]
        ranks = _sharded(gradients, weights, total, world_size)
        for rank in ranks:
            assert rank.layer_scores == alone.layer_scores
            assert rank.budgets == alone.budgets == [len(i) for i in expected.values()]
            assert rank.names == list(weights)
            assert rank.numels == [w.numel() for w in weights.values()]
        for i, name in enumerate(weights):
            assert torch.cat([rank.indices[i] for rank in ranks]).tolist() == expected[name], name


@pytest.mark.parametrize("case", CASES)
def test_dense_call_selects_the_oracles_entries_and_changes_nothing(case: str) -> None:
    gradients, weights = CASES[case]
    kept = {n: (gradients[n].clone(), weights[n].clone()) for n in weights}
    for total in _totals(weights):
        found = select_entries(gradients, weights, total)
        assert list(found) == list(weights)
        assert all(i.dtype == torch.int64 for i in found.values())
        expected = _flat(oracle.select(gradients, weights, total))
        assert {name: i.tolist() for name, i in found.items()} == expected
    for name, (gradient, weight) in kept.items():
        assert torch.equal(gradients[name], gradient)
        assert torch.equal(weights[name], weight)


def test_strided_low_precision_and_trained_tensors_are_taken_as_they_are() -> None:
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
    found = select_entries(gradients, weights, 99)
    expected = _flat(oracle.select(gradients, weights, 99))
    assert {name: i.tolist() for name, i in found.items()} == expected
    assert list(found) == ["p", "t", "s"]  # layers come in the order of the weights


class Counting(Solo):
    """Counts what would cross the network."""

    def __init__(self) -> None:
        self.num_calls = 0

    def all_reduce(self, tensor: Tensor, op: str) -> Tensor:
        """Count, and reduce nothing."""
        self.num_calls += 1
        return tensor


@pytest.mark.parametrize("method", SPARSE_METHODS)
def test_the_number_of_collectives_does_not_grow_with_the_layers(method: str) -> None:
    """Rounds are shared: a model of a hundred matrices waits for the network as often as one."""

    def num_calls(num_layers: int, numel: int) -> int:
        group = Counting()
        shards = [
            TargetShard(
                name=str(i),
                numel=numel,
                start=0,
                gradient=torch.randn(numel),
                weight=torch.randn(numel),
                device=torch.device("cpu"),
            )
            for i in range(num_layers)
        ]
        select_shards(shards, num_layers, group, rule=method)
        return group.num_calls

    assert num_calls(1, 50) == num_calls(2, 50) == num_calls(30, 50) == num_calls(2, 5000)
    assert num_calls(30, 50) <= 9


def test_a_higher_gradient_on_a_smaller_weight_wins() -> None:
    """The idea of GEM in four entries: what counts is the gradient relative to the weight."""
    gradients = {"w": torch.tensor([[1.0, -1.0], [0.5, 0.1]])}
    weights = {"w": torch.tensor([[10.0, 1.0], [-0.1, 0.1]])}
    assert select_entries(gradients, weights, 2)["w"].tolist() == [1, 2]  # ratios 0.1 1 5 1


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_is_refused_by_name(world_size: int, bad: float) -> None:
    gradients, weights = _random()
    gradients = {n: g.clone() for n, g in gradients.items()}
    gradients["v"][-1, -1] = bad
    with pytest.raises(ValueError, match="of v are not finite"):
        _sharded(gradients, weights, 5, world_size)


def test_a_ratio_that_overflows_fp32_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="of w are not finite"):
        select_entries({"w": torch.tensor([1e38, 1.0])}, {"w": torch.zeros(2)}, 1)


@pytest.mark.parametrize("total", [-1, 0, 7])
def test_a_total_that_the_matrices_cannot_give_is_refused(total: int) -> None:
    ones = {"a": torch.ones(2, 2), "b": torch.ones(2)}
    with pytest.raises(ValueError, match=r"that hold 6: change the density"):
        select_entries(ones, ones, total)


def test_no_matrices_are_refused() -> None:
    with pytest.raises(ValueError, match="that hold 0"):
        select_entries({}, {}, 1)


@pytest.mark.parametrize(
    ("gradients", "weights", "message"),
    [
        ({"a": torch.ones(2)}, {"b": torch.ones(2)}, r"names \['a', 'b'\]"),
        ({"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(2)}, r"names \['b'\]"),
        ({"a": torch.ones(4)}, {"a": torch.ones(2, 2)}, r"Give a .* \(4,\) and \(2, 2\)"),
        ({"a": torch.ones(2).int()}, {"a": torch.ones(2)}, "floating dtype: .*int32"),
        ({"a": torch.ones(2)}, {"a": torch.ones(2).bool()}, "floating dtype: .*bool"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    gradients: Tensors, weights: Tensors, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        select_entries(gradients, weights, 1)
