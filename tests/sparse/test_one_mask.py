"""One mask, whatever holds the matrices: any number of ranks, stage and dtype.

From the same statistics the mask file holds the same bits, and they are the oracle's. Through
calibration the statistics round differently; that is test_calibrate.py's.
"""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gem_ds.calibration.calibrate import select
from gem_ds.distributed.comm import Comm
from gem_ds.distributed.process_group import init_distributed
from gem_ds.errors import PeerError
from gem_ds.files.mask import Mask, WeightInfo
from gem_ds.select.rules import SPARSE_METHODS
from gem_ds.select.selection import gather_indices
from gem_ds.select.shards import index_dtype
from tests import oracle
from tests.ranks import run_ranks
from tests.tiny import Matrices, Setting, Tensors, make_engine

pytestmark = pytest.mark.slow  # starts engines or programs

WORLD_SIZES = (1, 3, 4)
SETTINGS = (Setting(1), Setting(3), Setting(3, "bf16"))  # below stage 3 all have the same ranges
SHAPES = {
    "point": (1, 1),  # a matrix for one rank at most
    "pair": (2, 1),
    "three": (1, 3),
    "even": (8, 12),  # nothing to pad
    "odd": (7, 11),  # padded on two, three and four ranks
    "prime": (1, 127),
    "large": (31, 17),
    "twin": (31, 17),  # of the same statistics as "large" in some cases: scores and shares tie
}
NUM_ENTRIES = sum(rows * columns for rows, columns in SHAPES.values())
SEED = 3


def _weights() -> Tensors:
    """Few different values, exact in bf16, zeros of both signs among them."""
    generator = torch.Generator().manual_seed(1)
    levels = torch.tensor([-0.0, 0.0, 0.5, -0.5, 1.0, -2.0])
    weights = {
        name: levels[torch.randint(0, len(levels), shape, generator=generator)]
        for name, shape in SHAPES.items()
    }
    weights["twin"] = weights["large"].clone()
    return weights


def _statistics(draw: Callable[..., Tensor], seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: draw(shape, generator=generator) for name, shape in SHAPES.items()}


def _quantised(seed: int) -> Tensors:
    gradients = _statistics(functools.partial(torch.randint, -2, 3), seed)
    return {n: g.float() for n, g in (gradients | {"twin": gradients["large"].clone()}).items()}


def _heavy_tailed(seed: int) -> Tensors:
    zeroed = ("three", "even")
    return {n: (4 * g).exp() * (n not in zeroed) for n, g in _statistics(torch.randn, seed).items()}


def _zeros() -> Tensors:
    return {name: torch.zeros(shape) for name, shape in SHAPES.items()}


def _with(name: str, flat_index: int, value: float, gradients: Tensors) -> Tensors:
    gradients[name].view(-1)[flat_index] = value
    return gradients


#: By a name: statistics, K, the rule, and whether zeros are kept where it is said.
GIVEN = {
    "all zero": (_zeros(), 50, "gem"),
    "all zero, one entry": (_zeros(), 1, "gem"),
    "everything": (_quantised(0), NUM_ENTRIES, "gem"),
    "one gradient": (_with("odd", 76, 3.0, _zeros()), 5, "gem"),
    **{f"quantised {seed}": (_quantised(seed), 1 + 250 * seed, "gem") for seed in range(5)},
    **{f"heavy-tailed {seed}": (_heavy_tailed(seed), 1 + 70 * seed, "gem") for seed in range(3)},
    **{f"quantised by {rule}": (_quantised(9), 400, rule) for rule in SPARSE_METHODS},
    **{f"zeros kept by {rule}": (_quantised(8), 900, rule, True) for rule in SPARSE_METHODS},
}


#: Rules that look at weights, whose dtype is another in the last setting.
OF_WEIGHTS = ("quantised by magnitude", "quantised by lift")


def _given(setting: Setting) -> list[str]:
    """The names of a setting's cases: one sees every rule, the others GEM and two in bf16."""
    if setting == SETTINGS[1]:
        return list(GIVEN)
    more = OF_WEIGHTS if setting.dtype == "bf16" else ()
    return [name for name in GIVEN if " by " not in name or name in more]


#: Statistics, and the matrices to be named; the culprits lie on one rank only.
REFUSED = {
    "last entry": (_with("large", -1, torch.inf, _quantised(0)), ["large"]),
    "smallest matrix": (_with("point", 0, -torch.inf, _zeros()), ["point"]),
    "two": (
        _with("three", 2, torch.nan, _with("even", 0, torch.inf, _heavy_tailed(0))),
        ["three", "even"],
    ),
}


class Holder:
    """The matrices in an engine, which decides on the ranges."""

    def __init__(self, comm: Comm, setting: Setting) -> None:
        self.comm = comm
        model = Matrices(_weights()).to(setting.torch_dtype)
        self.engine, self.layers = make_engine(setting, comm, model, 7, targets=model.targets)
        if setting.stage == 3:  # what lies behind a partition is nobody's business
            for layer in self.layers:
                start, stop = self.engine.weights.shard_range(layer.weight)
                partition: Tensor = layer.weight.ds_tensor
                partition.data.view(-1)[stop - start :] = float("nan")

    def mask_file(
        self, path: Path, gradients: Tensors, total: int, rule: str, keep_zeros: bool = False
    ) -> Tensors:
        """The tensors of the mask file that this rank would write."""
        shards = []
        for layer, gradient in zip(self.layers, gradients.values(), strict=True):
            start, stop = self.engine.weights.shard_range(layer.weight)
            shards.append(gradient.flatten()[start:stop].clone())
        options: Any = {"rule": rule, "seed": SEED, "keep_zeros": keep_zeros}
        selection = select(self.engine, self.layers, shards, total, **options)
        indices = gather_indices(selection.indices, self.comm)
        named = dict(zip(self.layers, indices, strict=True))
        mask = Mask(
            indices={layer.name: i.to(index_dtype(layer.numel)) for layer, i in named.items()},
            weights={
                layer.name: WeightInfo(shape=layer.shape, dtype="float32", checksum="0" * 64)
                for layer in named
            },
            base_model="matrices",
            settings={},
        )
        mask.save(path)
        return load_file(path)


Account = dict[tuple[Setting, str], Any]
"""By setting and case the tensors of the mask file, or the sentence of a refusal."""


def _account(folder: Path) -> Account:
    comm, account = init_distributed(), Account()
    path = folder / f"{comm.world_size}-{comm.rank}.safetensors"
    for setting in SETTINGS:
        holder = Holder(comm, setting)
        for name in _given(setting):
            account[setting, name] = holder.mask_file(path, *GIVEN[name])
        for name, (gradients, _) in REFUSED.items():
            with pytest.raises((ValueError, PeerError), match="not finite") as refusal:
                holder.mask_file(path, gradients, 10, "gem")
            account[setting, name] = str(refusal.value)
    return account


Accounts = Callable[[int], list[Account]]


@pytest.fixture(scope="module")
def accounts(tmp_path_factory: pytest.TempPathFactory) -> Accounts:
    """World size -> the accounts by rank."""
    folder = tmp_path_factory.mktemp("masks")
    return functools.cache(lambda size: run_ranks(size, _account, folder))


@functools.cache
def _expected(name: str) -> Tensors:
    """The tensors of the mask file."""
    gradients, total, rule, *keep_zeros = GIVEN[name]
    named = [{f"{n}.weight": t for n, t in part.items()} for part in (gradients, _weights())]
    masks = oracle.select(*named, total, rule, SEED, *keep_zeros)
    return {f"{n}.indices": mask.flatten().nonzero()[:, 0].int() for n, mask in masks.items()}


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_mask_is_the_oracles(accounts, world_size, setting):
    """Bit for bit on every rank, so it is one mask for all; and all refuse in the same words."""
    for account, name in itertools.product(accounts(world_size), _given(setting)):
        found, expected = account[setting, name], _expected(name)
        assert found.keys() == expected.keys()
        for key, index in expected.items():
            assert found[key].dtype == torch.int32
            assert torch.equal(found[key], index), f"{name}: {key}"
    for name, (_, culprits) in REFUSED.items():
        (sentence,) = {account[setting, name] for account in accounts(world_size)}
        assert [key for key in SHAPES if f"{key}.weight" in sentence] == culprits


def test_cases_tie():
    """The premise: at the border of many quantised masks there are more equals than places."""
    num_tied = 0
    for gradients, total, *_ in (GIVEN[f"quantised {seed}"] for seed in range(5)):
        masks = oracle.select(gradients, _weights(), total)
        for name, weight in _weights().items():
            ratio, mask = oracle.ratio(gradients[name], weight), masks[name]
            border = ratio[mask].min() if mask.any() else torch.inf
            num_tied += bool((ratio[~mask] == border).any())
    assert num_tied >= 15
