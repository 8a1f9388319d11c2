"""One mask, whatever holds the matrices: any number of ranks, stage and cut of the examples.

From the same statistics the mask file holds the same bits, and they are the oracle's. Through
calibration the statistics round differently, and so may entries whose scores are that close.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gem_ds.data.batches import Batches
from gem_ds.data.packing import pack
from gem_ds.distributed.comm import Comm
from gem_ds.distributed.process_group import init_distributed
from gem_ds.files.mask import Mask, WeightInfo, index_dtype
from gem_ds.models.loss import summed_answer_loss
from gem_ds.models.targets import find_targets
from gem_ds.select.selection import Selection, select_shards
from gem_ds.select.shards import TargetShard
from gem_ds.sparse.calibrate import calibrate
from gem_ds.sparse.entries import gather_indices
from tests import oracle
from tests.ranks import run_ranks
from tests.tiny import (
    MAX_LENGTH,
    PAD_TOKEN_ID,
    Setting,
    assert_selected_up_to_rounding,
    make_engine,
    make_model,
    naive_examples,
    naive_loss,
    random_examples,
)

pytestmark = pytest.mark.slow  # starts engines or programs

WORLD_SIZES = (1, 3, 4)
STAGES = (1, 3)  # below stage 3 all have the same ranges
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

Tensors = dict[str, Tensor]


# The same statistics


def _weights() -> Tensors:
    """Few different values, zeros of both signs among them."""
    generator = torch.Generator().manual_seed(1)
    levels = torch.tensor([-0.0, 0.0, 0.5, -0.5, 1.0, -2.0])
    weights = {
        name: levels[torch.randint(0, len(levels), shape, generator=generator)]
        for name, shape in SHAPES.items()
    }
    weights["twin"] = weights["large"].clone()
    return weights


def _quantised(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    gradients = {
        name: torch.randint(-2, 3, shape, generator=generator).float()
        for name, shape in SHAPES.items()
    }
    gradients["twin"] = gradients["large"].clone()
    return gradients


def _heavy_tailed(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    gradients = {
        name: torch.exp(4 * torch.randn(shape, generator=generator))
        for name, shape in SHAPES.items()
    }
    for name in ("three", "even"):
        gradients[name].zero_()
    return gradients


def _given() -> dict[str, tuple[Tensors, int]]:
    """Statistics and K, by a name."""
    cases = {
        "all zero": (_zeros(), 50),
        "all zero, one entry": (_zeros(), 1),
        "everything": (_quantised(0), NUM_ENTRIES),
        "one entry": (_quantised(0), 1),
        "one gradient": (_with("odd", 76, 3.0), 5),
    }
    for seed in range(8):
        generator = torch.Generator().manual_seed(100 + seed)
        total = int(torch.randint(1, NUM_ENTRIES, (), generator=generator))
        cases[f"quantised {seed}"] = (_quantised(seed), total)
        cases[f"heavy-tailed {seed}"] = (_heavy_tailed(seed), total // 9 + 1)
    return cases


def _zeros() -> Tensors:
    return {name: torch.zeros(shape) for name, shape in SHAPES.items()}


def _with(name: str, flat_index: int, value: float, into: Tensors | None = None) -> Tensors:
    gradients = into or _zeros()
    gradients[name].view(-1)[flat_index] = value
    return gradients


def _refused() -> dict[str, tuple[Tensors, list[str]]]:
    """Statistics, and the matrices to be named; the culprit lies on one rank only."""
    infinity, nan = float("inf"), float("nan")
    cases = {
        "first entry": (_with("large", 0, infinity), ["large"]),
        "last entry": (_with("large", -1, infinity, _quantised(0)), ["large"]),
        "minus infinity": (_with("odd", 40, -infinity, _quantised(0)), ["odd"]),
        "not a number": (_with("prime", 126, nan, _heavy_tailed(0)), ["prime"]),
        "smallest matrix": (_with("point", 0, infinity), ["point"]),
    }
    two = _with("three", 2, nan, _with("even", 0, infinity, _quantised(0)))
    return cases | {"two matrices": (two, ["three", "even"])}


GIVEN, REFUSED = _given(), _refused()
IN_BF16 = ("quantised 0", "quantised 1", "heavy-tailed 2")


class Matrices(nn.Module):
    """The weights, each a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        for name, weight in _weights().items():
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight.data.copy_(weight)
            self.add_module(name, layer)


class Holder:
    """The matrices in an engine, which decides on the ranges."""

    def __init__(self, comm: Comm, stage: int, dtype: str = "fp32") -> None:
        self.comm = comm
        setting = Setting(stage, dtype)
        model = Matrices().to(setting.torch_dtype)  # every weight is exact in bf16 too
        targets = {f"{name}.weight": getattr(model, name) for name in SHAPES}
        self.engine, self.layers = make_engine(
            setting, comm, model, num_selected=7, targets=targets
        )
        if stage == 3:  # what lies behind a partition is nobody's business
            for layer in self.layers:
                start, stop = self.engine.weights.shard_range(layer.weight)
                partition: Tensor = layer.weight.ds_tensor  # type: ignore[attr-defined]
                partition.data.view(-1)[stop - start :] = float("nan")

    def select(self, gradients: Tensors, total: int) -> Selection:
        """Select from this rank's ranges of dense statistics."""
        shards = []
        for layer, gradient in zip(self.layers, gradients.values(), strict=True):
            start, stop = self.engine.weights.shard_range(layer.weight)
            shards.append(
                TargetShard(
                    name=layer.name,
                    numel=layer.numel,
                    start=start,
                    gradient=gradient.flatten()[start:stop].clone(),
                    weight=self.engine.weights.read_shard(layer.weight),
                    device=self.engine.device,
                )
            )
        return select_shards(shards, total, self.comm)

    def mask_file(self, gradients: Tensors, total: int, path: Path) -> Tensors:
        """The tensors of the mask file that this rank would write."""
        selection = self.select(gradients, total)
        indices = gather_indices(selection.indices, self.comm)
        mask = Mask(
            indices={
                layer.name: index.to(index_dtype(layer.numel))
                for layer, index in zip(self.layers, indices, strict=True)
            },
            weights={
                layer.name: WeightInfo(shape=layer.shape, dtype="float32", checksum="0" * 64)
                for layer in self.layers
            },
            base_model="matrices",
            settings={},
        )
        mask.save(path)
        return load_file(path)

    def refusal(self, gradients: Tensors) -> str:
        """What selection says."""
        try:
            self.select(gradients, 10)
        except ValueError as error:
            return str(error)
        return "no error"


# Through calibration


@dataclass(frozen=True)
class Cut:
    """How the examples are cut, and where the model lies."""

    stage: int
    micro_batch_size: int
    packed: bool

    def __str__(self) -> str:
        packed = " packed" if self.packed else ""
        return f"zero{self.stage} in micro-batches of {self.micro_batch_size}{packed}"


CUTS = [Cut(3, 1, False), Cut(3, 7, True), Cut(0, 3, False)]
CUT_WORLD_SIZES = (1, 3)
NUM_EXAMPLES = 16
K = 70


def _calibrated(comm: Comm, cut: Cut) -> Tensors:
    engine, layers = make_engine(Setting(cut.stage), comm, make_model("llama"), K)
    examples = random_examples(NUM_EXAMPLES)
    batches = Batches(
        pack(examples, MAX_LENGTH) if cut.packed else examples,
        comm,
        global_batch_size=cut.micro_batch_size * comm.world_size,
        micro_batch_size=cut.micro_batch_size,
        seed=cut.micro_batch_size,
        pad_token_id=PAD_TOKEN_ID,
    )
    selection = calibrate(engine, layers, batches, summed_answer_loss, K)
    return dict(
        zip([layer.name for layer in layers], gather_indices(selection.indices, comm), strict=True)
    )


# The runs


@dataclass
class Account:
    """What one rank found.

    Attributes:
        files: by stage and case, the tensors of the mask file.
        refusals: by stage and case.
        calibrated: by cut, the flat indices.
    """

    files: dict[tuple[int, str], Tensors]
    refusals: dict[tuple[int, str], str]
    calibrated: dict[Cut, Tensors]


def _account(folder: Path) -> Account:
    comm = init_distributed()
    account = Account({}, {}, {})
    path = folder / f"{comm.world_size}-{comm.rank}.safetensors"
    for stage in STAGES:
        holder = Holder(comm, stage)
        for name, (gradients, total) in GIVEN.items():
            account.files[stage, name] = holder.mask_file(gradients, total, path)
        for name, (gradients, _) in REFUSED.items():
            account.refusals[stage, name] = holder.refusal(gradients)
        holder = Holder(comm, stage, "bf16")
        for name in IN_BF16:
            account.files[stage, f"{name}, bf16"] = holder.mask_file(*GIVEN[name], path)
    if comm.world_size in CUT_WORLD_SIZES:
        account.calibrated = {cut: _calibrated(comm, cut) for cut in CUTS}
    return account


Accounts = Callable[[int], list[Account]]


@pytest.fixture(scope="module")
def accounts(tmp_path_factory: pytest.TempPathFactory) -> Accounts:
    """World size -> the accounts by rank."""
    folder = tmp_path_factory.mktemp("masks")
    return functools.cache(lambda size: run_ranks(size, _account, folder))


@functools.cache
def _expected(name: str) -> Tensors:
    gradients, total = GIVEN[name.removesuffix(", bf16")]
    masks = oracle.select(gradients, _weights(), total)
    return {name: mask.flatten().nonzero()[:, 0].int() for name, mask in masks.items()}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
class TestSameStatistics:
    """Bit for bit the oracle's mask on every rank, so one mask for all of them."""

    @pytest.mark.parametrize("name", [*GIVEN, *(f"{name}, bf16" for name in IN_BF16)])
    def test_mask_file(self, accounts: Accounts, world_size: int, stage: int, name: str) -> None:
        expected = {f"{key}.weight.indices": index for key, index in _expected(name).items()}
        for account in accounts(world_size):
            tensors = account.files[stage, name]
            assert tensors.keys() == expected.keys()
            for key, index in expected.items():
                assert tensors[key].dtype == torch.int32
                assert torch.equal(tensors[key], index), key

    @pytest.mark.parametrize("name", REFUSED)
    def test_refusal(self, accounts: Accounts, world_size: int, stage: int, name: str) -> None:
        sentences = {account.refusals[stage, name] for account in accounts(world_size)}
        assert len(sentences) == 1, "the ranks agree"
        (sentence,) = sentences
        assert "not finite" in sentence
        _, culprits = REFUSED[name]
        assert [key for key in SHAPES if f"{key}.weight" in sentence] == culprits


def test_cases_tie() -> None:
    """The premise: at the border of many quantised masks there are more equals than places."""
    num_tied = 0
    for gradients, total in (GIVEN[f"quantised {seed}"] for seed in range(8)):
        masks = oracle.select(gradients, _weights(), total)
        for name, weight in _weights().items():
            ratio, mask = oracle.ratio(gradients[name], weight), masks[name]
            border = ratio[mask].min() if mask.any() else torch.inf
            num_tied += bool((ratio[~mask] == border).any())
    assert num_tied >= 20


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("world_size", CUT_WORLD_SIZES)
def test_through_calibration(accounts: Accounts, world_size: int, cut: Cut) -> None:
    gradients, weights = _dense()
    for account in accounts(world_size):
        assert_selected_up_to_rounding(account.calibrated[cut], gradients, weights, K)


@functools.cache
def _dense() -> tuple[Tensors, Tensors]:
    model = make_model("llama").eval()
    names = list(find_targets(model))
    examples = naive_examples(random_examples(NUM_EXAMPLES), range(NUM_EXAMPLES))
    gradients = oracle.summed_gradients(model, examples, naive_loss, names)
    return gradients, {name: model.get_parameter(name).detach() for name in names}
