"""What the conformance test of the engine works on: engines of every kind beside dense twins.

A :class:`Bench` is a small odd-shaped model in an engine with a dense copy, and :class:`DenseAdamW`
is the optimizer as one process would run it.
"""

import copy
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from gem_ds.distributed.comm import Comm
from gem_ds.distributed.engine import Engine
from gem_ds.distributed.optim import SparseAdamW
from gem_ds.sddmm import Pattern
from gem_ds.sparse.entries import SampledSink
from gem_ds.sparse.target_layers import TargetLayers
from tests.tiny import Setting, whole_state

BATCH = 6
FEATURES = 7
CLIPPING = 1.0
ADAM = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 0.1, "weight_decay": 0.2}
"""A large eps, so that the size of a gradient matters to the update and clipping shows."""

Vectors = dict[str, Tensor]


class OddModel(nn.Module):
    """Weights that ranks cannot share evenly, one that they cannot share, one transposed.

    The first target's input needs no gradient; two targets lie in a checkpointed block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 5)  # 35 entries, a target
        self.norm = nn.LayerNorm(5)
        self.widen = nn.Linear(5, 9)
        self.inner = nn.Linear(9, 11, bias=False)  # 99, a target
        self.transposed = Conv1D(3, 11)  # 33, a target
        self.narrow = nn.Linear(3, 1)  # 3, a target
        self.point = nn.Linear(1, 1)  # 1, a target: a rank without an entry
        self.spread = nn.Linear(1, 4)
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x).tanh())
        h = checkpoint(self._block, h, use_reentrant=False) if self.training else self._block(h)
        return self.head(h) + self.spread(self.point(self.narrow(h)).tanh())

    def _block(self, h: Tensor) -> Tensor:
        return self.transposed(self.inner(self.widen(h).tanh()).tanh()).tanh()


NUM_SELECTED = {"first": 20, "inner": 30, "transposed": 17, "narrow": 3, "point": 1}
K = sum(NUM_SELECTED.values())
assert all(K % size for size in (2, 3)), "the flat parameter pads too"


def generator(*seed: int) -> torch.Generator:
    number = functools.reduce(lambda sum, part: sum * 1009 + part, seed)
    return torch.Generator().manual_seed(number)


def some_vectors(seed: int, total: int = K) -> Vectors:
    """Masters and moments that are not round in bf16."""
    random = generator(seed)
    return {
        "master": torch.randn(total, generator=random),
        "exp_avg": torch.randn(total, generator=random) * 0.1,
        "exp_avg_sq": torch.rand(total, generator=random) * 0.01,
    }


def no_vectors() -> Vectors:
    """Masters and moments of an engine that nothing was told."""
    return {key: torch.zeros(K) for key in ("master", "exp_avg", "exp_avg_sq")}


def flat_gradient(rank: int, step: int, total: int = K) -> Tensor:
    """A rank's gradient, with so few bits that no cast or mean of two ranks rounds it."""
    whole = torch.randint(-60, 61, (total,), generator=generator(rank, step, 7))
    return whole * 2.0 ** (-10 if step % 2 else -4)


def micro_batch(rank: int, i: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The i-th micro-batch of a rank: features and classes."""
    random = generator(rank, i, 11)
    x = torch.randn(BATCH, FEATURES, generator=random).to(dtype)
    return x, torch.randint(0, 4, (BATCH,), generator=random)


def delivered(engine: Engine) -> Tensor:
    """The gradient of an engine's only step from moments of zero."""
    return whole_state(engine)["exp_avg"] / (1 - ADAM["betas"][0])


def assert_close(actual: Vectors, expected: Vectors, relative: float = 1e-6) -> None:
    """Every vector within ``relative`` of the largest entry of the expected one."""
    for key, value in expected.items():
        error = (actual[key] - value).abs().max() / value.abs().max().clamp(min=1e-12)
        assert error <= relative, f"{key} is off by {error:.2e}"


def assert_equal(actual: Vectors, expected: Mapping[str, Tensor]) -> None:
    """Every vector equal to the bit, and no other."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), f"{key} differs in some bit"


class DenseAdamW:
    """torch's AdamW on whole vectors in one process, with the gradient of all ranks."""

    def __init__(self, vectors: Vectors, num_updates: int) -> None:
        self.master = vectors["master"].clone().requires_grad_()
        self.optimizer = torch.optim.AdamW([self.master], **ADAM)
        state = {key: value.clone() for key, value in vectors.items() if key != "master"}
        state["step"] = torch.tensor(float(num_updates))
        self.optimizer.state[self.master] = state

    def step(self, by_rank: list[Tensor]) -> float:
        """Average, clip, update; the norm before clipping."""
        self.master.grad = torch.stack(by_rank).mean(0)
        norm = torch.nn.utils.clip_grad_norm_([self.master], CLIPPING)
        self.optimizer.step()
        return float(norm)

    @property
    def vectors(self) -> Vectors:
        """Master and moments as they stand."""
        state = self.optimizer.state[self.master]
        moments = {key: state[key].clone() for key in ("exp_avg", "exp_avg_sq")}
        return {"master": self.master.detach().clone()} | moments


def config_of(setting: Setting, world_size: int) -> dict[str, Any]:
    """Buckets smaller than the flat vector; no weight is persistent, or all are."""
    config = setting.config(world_size, CLIPPING, FEATURES, {})
    if setting.stage == 3 and setting.variant != "persistent":
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


def make_engine(model: nn.Module, layers: TargetLayers, setting: Setting, comm: Comm) -> Engine:
    config = config_of(setting, comm.world_size)
    return Engine(model, [layers.vector], lambda params: SparseAdamW(params, **ADAM), config, comm)


class Bench:
    """A model in an engine of some setting, beside a dense twin of the same weights."""

    def __init__(self, setting: Setting, comm: Comm, num_selected: int = K) -> None:
        self.setting, self.comm = setting, comm
        torch.manual_seed(0)
        model = OddModel().to(setting.torch_dtype)
        self.dense = copy.deepcopy(model)
        targets = {f"{name}.weight": getattr(model, name) for name in NUM_SELECTED}
        self.layers = TargetLayers(model, targets, num_selected)
        random = generator(5)
        self.indices = [
            torch.randperm(layer.numel, generator=random)[:k].sort().values.int()
            for layer, k in zip(self.layers, NUM_SELECTED.values(), strict=True)
        ]
        starts = itertools.accumulate(map(len, self.indices), initial=0)
        self.sinks = [
            SampledSink(self.layers.vector, start, Pattern.of(index, layer.shape))
            for start, index, layer in zip(starts, self.indices, self.layers, strict=False)
        ]
        self.engine = make_engine(model, self.layers, setting, comm)

    def everyone(self, step: int, total: int = K) -> list[Tensor]:
        return [flat_gradient(rank, step, total) for rank in range(self.comm.world_size)]

    def batch(self, i: int) -> tuple[Tensor, Tensor]:
        return micro_batch(self.comm.rank, i, self.setting.torch_dtype)

    def gathered(self) -> Vectors:
        """Every weight of the engine's model as DeepSpeed itself shows it, but the trained one."""
        import deepspeed  # noqa: TID251

        named = dict(self.engine.model.named_parameters())
        named.pop("gem_entries.values")
        partitioned = list(named.values()) if self.setting.stage == 3 else []
        with deepspeed.zero.GatheredParameters(partitioned):
            return {name: parameter.data.clone() for name, parameter in named.items()}

    def step_with(self, gradient: Tensor) -> bool:
        """Deliver ``gradient`` [K] as this rank's and step."""
        self.engine.vectors[0].gradient(0, gradient.numel(), gradient.device).add_(gradient)
        x, _ = self.batch(0)
        with self.layers.sinks([lambda *_: None] * len(self.layers)):
            self.engine.backward(self.engine.module(deliver=True)(x).sum() * 0.0)
        return self.engine.step()

    def assert_values_are(self, master: Tensor) -> None:
        """The trained values are the masters, rounded."""
        values = self.engine.gather_values()
        assert torch.equal(values, master.to(self.setting.torch_dtype))
        assert values.dtype == self.setting.torch_dtype

    def write(self, values: Tensor) -> None:
        """Write ``values`` [K] into the engine's weights and into the dense twin's."""
        parts = values.to(self.setting.torch_dtype).split(list(NUM_SELECTED.values()))
        entries = [
            self.engine.weights.entries(layer.weight, index)
            for layer, index in zip(self.layers, self.indices, strict=True)
        ]
        self.engine.weights.write_entries(entries, torch.cat(parts))
        for layer, index, part in zip(self.layers, self.indices, parts, strict=True):
            self.dense.get_parameter(layer.name).data.view(-1)[index.long()] = part
