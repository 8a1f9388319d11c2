"""The exact top k of sharded scores: against a sort, for any number of ranks."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gem_ds.select import shards as shards_module
from gem_ds.select.shards import Solo
from gem_ds.select.topk import count_among_largest, top_k_indices
from tests import oracle
from tests.thread_group import ThreadGroup, cut, run_threads

LARGEST = torch.finfo(torch.float32).max
SUBNORMAL = 2.0**-149

# Ties are the rule; neighbours differ in the last, the middle and the first digit.
TIED = st.sampled_from(
    [0.0, -0.0, SUBNORMAL, 2 * SUBNORMAL, 1.0, 1 + 2.0**-23, 1 + 2.0**-13, 1.5, LARGEST]
)
ANY = st.floats(min_value=0.0, width=32, allow_nan=False, allow_infinity=False)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Tensor], list[int]]:
    layers = draw(
        st.lists(
            st.one_of(st.lists(TIED, min_size=1, max_size=40), st.lists(ANY, min_size=1)),
            min_size=1,
            max_size=4,
        )
    )
    budgets = [draw(st.integers(0, len(layer))) for layer in layers]
    return [torch.tensor(layer) for layer in layers], budgets


def _over_ranks(layers: list[Tensor], budgets: list[int], world_size: int) -> list[list[int]]:
    """The indices of each layer, those of rank 0 first."""

    def work(group: ThreadGroup) -> list[Tensor]:
        cuts = [cut(layer, group.rank, world_size) for layer in layers]
        shards, starts = [shard for _, shard in cuts], [start for start, _ in cuts]
        return top_k_indices(shards, starts, budgets, group)

    by_rank = run_threads(world_size, work)
    return [torch.cat(parts).tolist() for parts in zip(*by_rank, strict=True)]


def _expected(layers: list[Tensor], budgets: list[int]) -> list[list[int]]:
    return [
        oracle.mask(layer, k).nonzero().flatten().tolist()
        for layer, k in zip(layers, budgets, strict=True)
    ]


@settings(max_examples=200, deadline=None)
@given(problems(), st.sampled_from([1, 2, 3, 4, 7]), st.sampled_from([3, 2**17]))
def test_the_choice_is_that_of_a_sort(problem, world_size, chunk):
    layers, budgets = problem
    with mock.patch.object(shards_module, "CHUNK", chunk):
        assert _over_ranks(layers, budgets, world_size) == _expected(layers, budgets)


@settings(max_examples=100, deadline=None)
@given(problems(), st.fractions(0, 1), st.sampled_from([1, 2, 3, 7]), st.sampled_from([3, 2**17]))
def test_the_count_among_the_largest_is_that_of_a_sort(problem, share, world_size, chunk):
    layers, _ = problem
    pool = sorted((-value, i) for i, layer in enumerate(layers) for value in layer.tolist())
    total = max(1, round(share * len(pool)))
    chosen = [layer for _, layer in pool[:total]]
    expected = [chosen.count(layer) for layer in range(len(layers))]

    def work(group: ThreadGroup) -> list[int]:
        shards = [cut(layer, group.rank, world_size)[1] for layer in layers]
        return count_among_largest(shards, total, group)

    with mock.patch.object(shards_module, "CHUNK", chunk):
        assert run_threads(world_size, work) == [expected] * world_size


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_larger_matrices_of_many_kinds(world_size):
    generator = torch.Generator().manual_seed(0)
    n = 5003
    layers = [
        torch.exp(5 * torch.randn(n, generator=generator)),
        torch.randn(n, generator=generator).abs().to(torch.bfloat16).float(),
        torch.randint(0, 3, (n,), generator=generator).float(),
        torch.zeros(n),
        torch.full((n,), 0.3),
        torch.randint(0, 2**20, (n,), generator=generator) * SUBNORMAL,
    ]
    for k in (0, 1, 17, n // 2, n - 1, n):
        budgets = [k] * len(layers)
        assert _over_ranks(layers, budgets, world_size) == _expected(layers, budgets)


def test_values_are_those_of_torch_topk_beyond_one_chunk():
    generator = torch.Generator().manual_seed(1)
    layer = 1 / torch.randn(300_000, generator=generator).abs()
    (found,) = top_k_indices([layer], [0], [3000], Solo())
    assert found.dtype == torch.int32
    assert bool((found.diff() > 0).all())
    assert torch.equal(layer[found].sort(descending=True).values, layer.topk(3000).values)


@pytest.mark.parametrize("start", [2**33, 2**31 - 2])
@pytest.mark.parametrize("budget", [2, 3])
def test_indices_beyond_32_bits(start, budget):
    (found,) = top_k_indices([torch.tensor([0.0, 5.0, 1.0])], [start], [budget], Solo())
    assert found.tolist() == [start, start + 1, start + 2][-budget:]
