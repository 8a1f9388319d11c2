"""Each rule's choice of entries: against a naive one, over any cut; and chance that is fair."""

from dataclasses import replace
from itertools import pairwise
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gem_ds.select import shards as shards_module
from gem_ds.select.rules import CALIBRATED_METHODS, RULES, SPARSE_METHODS
from gem_ds.select.scores import _splitmix64, chance
from gem_ds.select.selection import Selection, select_shards
from gem_ds.select.shards import Solo, TargetShard
from tests import oracle
from tests.thread_group import ThreadGroup, run_threads, shards_of

Tensors = dict[str, Tensor]
WORLD_SIZES = (1, 2, 3, 7)
CPU = torch.device("cpu")


def _random() -> tuple[Tensors, Tensors]:
    """Weights of different spread, one in bf16, whose rounding ties them; a matrix of one entry."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (20, 31), "v": (17, 8), "wide": (30, 30), "one": (1, 1), "dead": (4, 5)}
    spread = {"q": 0.02, "v": 0.3, "wide": 0.05, "one": 1.0, "dead": 0.001}
    weights = {n: spread[n] * torch.randn(s, generator=generator) for n, s in shapes.items()}
    weights["q"], weights["v"] = weights["q"].bfloat16(), weights["v"].bfloat16()
    weights["wide"][3] = 0
    gradients = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    gradients["wide"] = torch.exp(5 * gradients["wide"])
    gradients["dead"] = torch.zeros(shapes["dead"])
    return gradients, weights


def _tied() -> tuple[Tensors, Tensors]:
    """Very few different numbers, of both signs, and two equal layers."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"a": (11, 13), "b": (11, 13), "c": (2, 2), "d": (21, 20)}
    gradients, weights = (
        {n: torch.randint(-2, 3, s, generator=generator).float() for n, s in shapes.items()}
        for _ in range(2)
    )
    gradients["b"], weights["b"] = gradients["a"].clone(), -weights["a"]
    return gradients, weights


def _subnormal() -> tuple[Tensors, Tensors]:
    generator = torch.Generator().manual_seed(4)
    numbers = torch.randint(0, 2000, (2, 20, 30), generator=generator) * 2.0**-149
    return dict(zip("ab", numbers, strict=True)), {n: torch.ones(20, 30) for n in "ab"}


ZEROS = {"a": torch.zeros(5, 6), "b": torch.zeros(3, 4)}
CASES = {"random": _random(), "tied": _tied(), "subnormal": _subnormal(), "zero": (ZEROS, ZEROS)}


def _select(
    rule: str,
    gradients: Tensors,
    weights: Tensors,
    total: int,
    world_size: int,
    seed: int = 0,
    keep_zeros: bool | None = False,
) -> list[Selection]:
    looked_at = gradients if rule in CALIBRATED_METHODS else None  # the others must not look

    def work(group: ThreadGroup) -> Selection:
        shards = shards_of(group, weights, looked_at)
        return select_shards(shards, total, group, rule=rule, seed=seed, keep_zeros=keep_zeros)

    return run_threads(world_size, work)


def _indices(ranks: list[Selection]) -> list[list[int]]:
    """Of each layer, those of rank 0 first."""
    by_layer = zip(*(rank.indices for rank in ranks), strict=True)
    return [torch.cat(parts).tolist() for parts in by_layer]


@pytest.mark.parametrize(
    ("case", "keep_zeros"), [*((case, False) for case in CASES), ("random", True), ("tied", True)]
)
@pytest.mark.parametrize("rule", SPARSE_METHODS)
def test_the_choice_is_the_naive_one_on_any_number_of_ranks(rule, case, keep_zeros):
    gradients, weights = CASES[case]
    kept = {name: weight.clone() for name, weight in weights.items()}
    size = sum(int(weight.count_nonzero()) for weight in weights.values())
    if not keep_zeros:
        size = sum(weight.numel() for weight in weights.values())
    # One; few; so many that small layers fill up; all but one; all.
    totals = (1, 2 + size // 50, size // 2, 4 * size // 5, size - 1, size)
    for number, total in enumerate(totals, start=SPARSE_METHODS.index(rule)):
        masks = oracle.select(gradients, weights, total, rule, seed=5, keep_zeros=keep_zeros)
        expected = [mask.flatten().nonzero().flatten().tolist() for mask in masks.values()]
        assert sum(map(len, expected)) == total
        for world_size in WORLD_SIZES[number % 2 :: 2]:  # in turn by total and rule
            ranks = _select(rule, gradients, weights, total, world_size, 5, keep_zeros)
            assert _indices(ranks) == expected, f"{total} on {world_size} ranks"
            for rank in ranks:
                assert rank.budgets == [len(index) for index in expected]
                assert rank.layer_scores == ranks[0].layer_scores
    assert all(torch.equal(weights[name], weight) for name, weight in kept.items())


def test_zeros_are_kept_where_a_matrix_was_pruned_or_it_is_asked_for():
    """More than 5 % of one matrix; zeros of either sign, whose ratios are the largest by far."""
    weights = {"whole": torch.ones(4, 10), "some": torch.ones(4, 10)}
    gradients = {name: torch.ones(4, 10) for name in weights}

    def selected_zeros(keep_zeros: bool | None) -> int:
        found = _indices(_select("gem", gradients, weights, 9, 2, keep_zeros=keep_zeros))
        pairs = zip(weights.values(), found, strict=True)
        return sum(int((w.flatten()[index] == 0).sum()) for w, index in pairs)

    weights["some"][1, :2] = torch.tensor([0.0, -0.0])
    assert [selected_zeros(keep) for keep in (None, False, True)] == [2, 2, 0]
    weights["some"][3, 9] = 0.0
    assert [selected_zeros(keep) for keep in (None, False, True)] == [0, 3, 0]


def test_fewer_entries_that_are_not_0_than_the_budget_are_refused():
    gradients, weights = _random()
    left = sum(int(weight.count_nonzero()) for weight in weights.values())
    assert sum(_select("gem", gradients, weights, left, 2, 0, True)[0].budgets) == left
    with pytest.raises(ValueError, match=f"hold {left:,} entries that are not 0, and {left + 1:,}"):
        _select("gem", gradients, weights, left + 1, 2, keep_zeros=True)


def test_the_rules_differ_in_what_the_table_says():
    """The idea of each in two layers of three entries."""
    weights = {"a": torch.tensor([[4.0, -1.0, 0.1]]), "b": torch.tensor([[-3.0, 2.0, 0.5]])}
    gradients = {"a": torch.tensor([[-2.0, 1.0, 0.2]]), "b": torch.tensor([[0.3, 0.4, -0.5]])}

    def chosen(rule: str, total: int = 2) -> list[list[int]]:
        return _indices(_select(rule, gradients, weights, total, 1))

    assert chosen("ratio") == [[2], [2]]  # 0.5 1 2, 0.1 0.2 1
    assert chosen("gradient") == [[0], [2]]
    assert chosen("magnitude") == [[0], [0]]
    assert chosen("supertuning", 3) == [[0], [0, 1]]
    # ||g|| H: 2.24 * 0.8 and 0.71 * 1.08: shares of four are 2.8 and 1.2
    assert chosen("entropy_gradient", 4) == [[0, 1, 2], [2]]


def test_budgets_by_shape_and_by_entropy():
    """Of a square matrix and a flat one with as many entries: 8 + 8 and 2 + 32 sides; 64 ways."""
    weights = {"square": torch.ones(8, 8), "flat": torch.ones(2, 32)}
    gradients = {"square": torch.ones(8, 8), "flat": torch.zeros(2, 32)}
    gradients["flat"][0, :16] = 9.0  # sixteen effective entries

    def budgets(rule: str, total: int) -> list[int]:
        return _select(rule, gradients, weights, total, 1)[0].budgets

    assert budgets("random_shira", 50) == [16, 34]
    assert budgets("lift", 50) == [16, 34]
    assert budgets("effective", 50) == [40, 10]
    # s = 8 log 64 = 33.3 and 36 log 16 = 99.8; the roots of 1 + s are 5.86 and 10.04
    assert budgets("gem", 40) == [10, 30]
    assert budgets("tempered", 40) == [15, 25]


def test_surgical_takes_whole_matrices_by_relative_norm_and_of_the_last_the_largest():
    """||g|| / ||w|| are 5 / 1, 10 / 20 and 2 / 1."""
    weights = {"a": torch.ones(1, 4) / 2, "b": torch.full((2, 2), 10.0), "c": torch.eye(1, 3)}
    gradients = {"a": torch.tensor([[3.0, 0, 0, -4]]), "b": torch.full((2, 2), 5.0)}
    gradients["c"] = torch.tensor([[0.0, -2.0, 0.0]])
    for rule in ("surgical", "auto_rgn"):
        for total, chosen in ((2, [[0, 3], [], []]), (5, [[0, 1, 2, 3], [], [1]])):
            (found,) = _select(rule, gradients, weights, total, 1)
            assert [index.tolist() for index in found.indices] == chosen
            assert found.layer_scores == [5.0, 0.5, 2.0]
    assert found.settings == {"rate_factors": {"a": [1.0], "b": [0.1], "c": [0.4]}}


def test_lift_takes_the_largest_of_what_the_leading_singular_vectors_span():
    """Not the largest weight, which is noise beside a pattern of rank one."""
    weights = {"w": torch.outer(torch.arange(1.0, 9), torch.arange(1.0, 9)) / 16}
    weights["w"][0, 0] += 5.0
    assert _indices(_select("magnitude", weights, weights, 1, 1)) == [[0]]
    assert _indices(_select("lift", weights, weights, 1, 1)) == [[63]]


@pytest.mark.parametrize("bad", [-torch.inf, torch.nan])
@pytest.mark.parametrize(
    ("rule", "where"),
    [
        *((rule, 0 if rule in CALIBRATED_METHODS else 1) for rule in RULES if "random" not in rule),
        ("damped", 1),  # its root mean square is no number, though the ratio to it would be 0
    ],
)
def test_what_is_not_finite_is_refused_by_name(rule, where, bad):
    """In what the rule looks at, gradients or weights. The random ones look at nothing."""
    tensors = _random()
    tensors[where]["v"][-1, -1] = bad
    with pytest.raises(ValueError, match="of v are not finite"):
        _select(rule, *tensors, 5, 3)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "lift"])
def test_the_number_of_collectives_does_not_grow_with_the_layers(rule):
    """Rounds are shared: a model of a hundred matrices waits for the network as often as one.

    Only lift gathers a matrix at a time.
    """

    def num_calls(num_layers: int, numel: int) -> int:
        group = mock.Mock(wraps=Solo(), rank=0, world_size=1)
        tensors = {str(i): torch.randn(numel) for i in range(num_layers)}
        select_shards(shards_of(group, tensors, tensors), num_layers, group, rule=rule)
        return group.all_reduce.call_count

    assert num_calls(1, 50) == num_calls(2, 50) == num_calls(30, 50) == num_calls(2, 5000)
    assert 3 <= num_calls(30, 50) <= 10


# Chance


def test_splitmix64_gives_the_published_sequence():
    """Its first outputs from the seed 1234567, as published with the algorithm (Rosetta Code)."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    found = _splitmix64(torch.arange(1, 6), 1234567)
    assert [word % 2**64 for word in found.tolist()] == published
    assert [oracle.splitmix64(1234567, i) for i in range(1, 6)] == published, "the oracle's own"


@settings(max_examples=50, deadline=None)
@given(key=st.integers(0, 2**64 - 1), first=st.integers(0, 2**40))
def test_splitmix64_wraps_as_unsigned_words_do(key, first):
    index = torch.arange(first, first + 5)
    found = [word % 2**64 for word in _splitmix64(index, key).tolist()]
    assert found == [oracle.splitmix64(key, i) for i in index.tolist()]


def _shard(start: int, stop: int, name: str = "w", numel: int = 1000) -> TargetShard:
    return TargetShard(
        name=name, shape=(numel,), start=start, weight=torch.ones(stop - start), device=CPU
    )


@pytest.mark.parametrize("chunk", [7, 2**17])
def test_chances_do_not_depend_on_the_cut(chunk):
    expected = oracle.chances("w", 3, 1000)
    with mock.patch.object(shards_module, "CHUNK", chunk):
        for bounds in ([0, 1000], [0, 400, 400, 1000], [0, 1, 999, 1000]):
            found = torch.cat([chance(_shard(*ends), seed=3) for ends in pairwise(bounds)])
            assert found.view(torch.int32).tolist() == expected
            assert found.isfinite().all()
    far = chance(_shard(2**33, 2**33 + 4), seed=0)
    assert len(set(far.tolist())) == 4, "indices beyond 32 bits count whole"


def _chosen(name: str, seed: int, size: int, count: int) -> set[int]:
    shard = _shard(0, size, name, size)
    return set(select_shards([shard], count, Solo(), rule="random", seed=seed).indices[0].tolist())


def test_chance_differs_by_seed_and_by_name():
    """Two choices of 500 of 5000 share about 50; alike ones would share all 500."""
    choices = [_chosen(name, seed, 5000, 500) for name in ("a", "b") for seed in (0, 1, 2)]
    for i, choice in enumerate(choices):
        for other in choices[:i]:
            assert 20 <= len(choice & other) <= 85


def test_chance_is_fair():
    """Chi-square over 20 bins of positions, and how often each entry comes up over many seeds."""
    size, count = 20_000, 4000
    expected = count / 20
    statistics = []
    for seed in range(10):
        bins = [0] * 20
        for index in _chosen("w", seed, size, count):
            bins[index * 20 // size] += 1
        statistics.append(sum((found - expected) ** 2 / expected for found in bins))
    # 19 degrees of freedom, less what drawing without replacement takes (4 in 5): mean 15.2.
    assert all(3 < statistic < 45 for statistic in statistics)
    assert 9 < sum(statistics) / len(statistics) < 22
    often = torch.zeros(50)
    for seed in range(400):
        often[list(_chosen("w", seed, 50, 10))] += 1
    assert 80 - 36 < often.min() <= often.max() < 80 + 36, "4.5 standard deviations of 8"


def test_entries_are_drawn_in_proportion_to_their_gradients():
    """Of 1,000 with |g| of 1, 2 and 4 in turn, 70: 10, 20 and 40 of each kind, and no other."""
    gradient = torch.tensor([1.0, -2.0, 4.0, 0.0]).repeat(250)
    kinds = torch.zeros(4)
    for seed in range(40):
        shard = replace(_shard(0, 1000), gradient=gradient.clone())
        (found,) = select_shards([shard], 70, Solo(), rule="drawn", seed=seed).indices
        kinds += torch.bincount(found % 4, minlength=4)
    shares = kinds / kinds.sum() * 7
    assert kinds[3] == 0
    # Of 2,800 draws the standard deviations are 0.06, 0.08 and 0.09.
    assert all(abs(share - due) < 0.3 for share, due in zip(shares[:3], (1, 2, 4), strict=True))
