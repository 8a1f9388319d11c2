"""The ratio and the layer statistics: against exact sums, and bit for bit over any cut."""

from unittest import mock

import pytest
import torch
from torch import Tensor

from gem_ds.select import shards as shards_module
from gem_ds.select.scores import LayerStatistics, layer_statistics, ratio
from gem_ds.select.shards import TargetShard
from gem_ds.select.sums import _exact_sum
from tests import oracle
from tests.thread_group import ThreadGroup, run_threads, shards_of

WORLD_SIZES = (1, 2, 3, 4, 7)
SUBNORMAL = 2.0**-149


def _layers() -> dict[str, Tensor]:
    """Ratios of many kinds and sizes; some matrices are smaller than the largest world."""
    generator = torch.Generator().manual_seed(0)

    def normal(n: int) -> Tensor:
        return torch.randn(n, generator=generator)

    dominated = torch.full((3000,), 1e-7)
    dominated[1234] = 1.0
    return {
        "half normal": normal(9001).abs(),
        "lognormal, sigma 5": torch.exp(5 * normal(12345)),
        "reciprocal of normal": 1 / (normal(8192).abs() + 1e-8),
        "quantised": torch.randint(0, 5, (6007,), generator=generator).float(),
        "dominated by one entry": dominated,
        "subnormal": torch.randint(0, 9, (700,), generator=generator) * SUBNORMAL,
        "huge": normal(513).abs() * 2.0**120,
        "five entries": normal(5).abs(),
        "two entries": torch.tensor([3.0, 1.0]),
        "one entry": torch.tensor([0.3]),
        "one of many": torch.eye(20).flatten()[:20],
        "zeros": torch.zeros(100),
    }


def _statistics(layers: dict[str, Tensor], world_size: int) -> list[list[LayerStatistics]]:
    """By rank and layer."""

    def work(group: ThreadGroup) -> list[LayerStatistics]:
        shards = shards_of(group, layers, None)
        return layer_statistics([shard.weight for shard in shards], shards, group)

    return run_threads(world_size, work)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 35])
def test_ratio_is_the_formula_in_fp32_and_in_place(dtype, size):
    generator = torch.Generator().manual_seed(size)
    gradient = torch.randn(size, generator=generator)
    weight = torch.randn(size, generator=generator).to(dtype)
    weight[: size // 3] = 0
    expected, kept = oracle.ratio(gradient, weight), weight.clone()
    shard = TargetShard(
        name="w", shape=(size,), weight=weight, gradient=gradient, device=weight.device
    )
    with mock.patch.object(shards_module, "CHUNK", 10):
        result = ratio(shard)
    assert result is gradient
    assert torch.equal(result, expected)
    assert torch.equal(weight, kept)


def test_statistics_agree_with_exactly_rounded_sums():
    layers = _layers()
    found = dict(zip(layers, _statistics(layers, 1)[0], strict=True))
    for name, r in layers.items():
        expected = (oracle.ratio_sum(r), oracle.ratio_norm(r), oracle.entropy(r))
        assert found[name] == pytest.approx(expected, rel=1e-12, abs=0.0), name
    # The cases that the definition settles by itself.
    for name in ("zeros", "one entry", "one of many"):  # -1 log(1 + 1e-8) is below 0
        assert found[name].entropy == 0.0
    assert found["subnormal"].norm * found["subnormal"].entropy > 0


@pytest.mark.parametrize("numel", [1, 2, 3, 1024, 1025, 70000])
def test_equal_ratios_have_known_statistics_and_do_not_overflow(numel):
    value = 1.7014118346046923e38  # 2^127: every term is the largest, so the integers are too
    ((found,),) = _statistics({"w": torch.full((numel,), value)}, 1)
    assert found.total == numel * value
    assert found.norm == pytest.approx(numel**0.5 * value, rel=1e-15)
    expected = -torch.tensor(1 / numel + 1e-8, dtype=torch.float64).log().item()
    assert found.entropy == pytest.approx(max(0.0, expected), rel=1e-12)


def test_terms_far_below_the_largest_are_not_lost():
    """2^18 entries beside one of 1: each, or its square, is below half a unit of 2^-b, b = 35."""
    small = 2**18
    numel = small + 1
    layers = {"sum": torch.full((numel,), 2.0**-45), "squares": torch.full((numel,), 2.0**-24)}
    for layer in layers.values():
        layer[777] = 1.0
    ((in_sum, in_squares),) = _statistics(layers, 1)
    assert in_sum.total == 1 + small * 2.0**-45
    assert in_squares.total == 1 + small * 2.0**-24
    assert in_squares.norm == (1 + small * 2.0**-48) ** 0.5


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_statistics_are_the_same_bits_for_any_number_of_ranks(world_size):
    layers = _layers()
    expected = _statistics(layers, 1)[0]
    assert all(found == expected for found in _statistics(layers, world_size))


@pytest.mark.parametrize("chunk", [1000, 4096, 2**17])
def test_statistics_do_not_depend_on_order_or_chunks(chunk):
    layers = _layers()
    expected = _statistics(layers, 1)[0]
    generator = torch.Generator().manual_seed(chunk)
    shuffled = {
        name: r[torch.randperm(r.numel(), generator=generator)] for name, r in layers.items()
    }
    with mock.patch.object(shards_module, "CHUNK", chunk):
        assert _statistics(shuffled, 2)[0] == expected


def test_large_chunks_sum_to_the_same_bits():
    """As on a GPU: 2^19 integers of 35 bits, whose sum is odd and more than fp64 counts to."""
    integers = 2**35 - 1 - torch.arange(2**19) % 3
    integers[0] -= 1 - int(integers.sum()) % 2
    assert int(_exact_sum(integers.double())) == sum(integers.tolist())


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_ratios_that_are_not_finite_are_refused_by_name_on_every_rank(world_size, bad):
    layers = {name: torch.ones(20) for name in ("q", "k", "v", "o")}
    layers["k"][19] = bad  # on the last rank alone
    layers["o"][0] = bad  # on the first rank alone

    def work(group: ThreadGroup) -> str:
        shards = shards_of(group, layers, None)
        with pytest.raises(ValueError, match="of k, o are not finite") as refusal:
            layer_statistics([shard.weight for shard in shards], shards, group)
        return str(refusal.value)

    assert len(set(run_threads(world_size, work))) == 1
