"""A head that is trained whole beside selected entries, against dense AdamW of two groups.

The reference differentiates a dense model by ordinary autograd, one example at a time, and steps
``tests.oracle.DenseMaskedAdamW`` with a learning rate for the entries and another one for the head.
A run has to come to the same losses and values at any ZeRO stage and on any number of ranks, clip
both vectors by their common norm, and leave every other parameter as it was, to the bit. Before a
calibration the head alone is trained; that has a reference of the same kind, and leaves no trace.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from gem_ds.data.batches import Batches, BatchSchedule
from gem_ds.distributed.comm import Comm
from gem_ds.distributed.process_group import init_distributed
from gem_ds.files.checkpoint import TrainerState
from gem_ds.models.choices import summed_pair_loss
from gem_ds.models.encoders import head_names
from gem_ds.models.targets import find_targets
from gem_ds.select.selection import Selection
from gem_ds.sparse.calibrate import calibrate
from gem_ds.sparse.entries import HeadEntries, SelectedEntries
from gem_ds.train import sparse_tuning
from gem_ds.train.config import MethodArguments, TrainArguments
from gem_ds.train.fit import fit
from gem_ds.train.sparse_tuning import SparseTuning
from tests import oracle
from tests.ranks import run_ranks
from tests.tiny import Setting, bits
from tests.tiny_classifier import NUM_EXAMPLES, make_classifier, naive_pair_loss, random_pairs

pytestmark = pytest.mark.slow  # starts engines or programs

NUM_STEPS = 9
NUM_HEAD_STEPS = 4  # of the head alone, before the calibration
GLOBAL_BATCH_SIZE = 8  # the last batch of an epoch has one example: some ranks have none
SEED = 3
NUM_SELECTED = (41, 7, 60, 13)
K = sum(NUM_SELECTED)
HEAD_SIZE = 16 * 17 + 3 * 17  # pooler and classifier; neither two nor three ranks can share it
assert HEAD_SIZE % 2
assert HEAD_SIZE % 3

#: An Adam update is close to ``sign(g)`` where ``|g|`` is far above eps, and then a gradient that
#: is all rounding moves its weight as far as any other. With this eps, a hundredth of a usual
#: gradient, an update is as exact as its gradient, and its size depends on clipping.
ADAM: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
TRAIN = TrainArguments(
    learning_rate=0.01,
    head_learning_rate=0.03,
    adam_beta1=0.8,
    adam_beta2=0.95,
    adam_epsilon=1e-3,
    weight_decay=0.1,
)


def _rate_factor(step: int) -> float:
    return 1.0 - step / 25


@dataclass(frozen=True)
class Plan:
    """One run."""

    setting: Setting
    micro_batch_size: int = 2
    max_grad_norm: float = 0.5

    def __str__(self) -> str:
        return (
            f"{self.setting} in micro-batches of {self.micro_batch_size} clipped to "
            f"{self.max_grad_norm}"
        )


EXACT = [
    Plan(Setting(0)),
    Plan(Setting(1), micro_batch_size=1),
    Plan(Setting(2), micro_batch_size=8, max_grad_norm=0.0),
    Plan(Setting(3)),
    Plan(Setting(3, variant="offload"), micro_batch_size=3),
]
ROUNDED = [Plan(Setting(stage, "bf16")) for stage in (0, 3)]
PLANS = {1: EXACT[:1], 2: [*EXACT, *ROUNDED], 3: [EXACT[3], ROUNDED[1]]}
RUNS = [(size, plan) for size, plans in PLANS.items() for plan in plans]
EXACT_RUNS = [(size, plan) for size, plan in RUNS if plan in EXACT]


def _indices(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {
        name: torch.randperm(16 * 16, generator=generator)[:count].sort().values
        for name, count in zip(find_targets(model), NUM_SELECTED, strict=True)
    }


# A run on the ranks


@dataclass
class Outcome:
    """What one rank knows of a run.

    Attributes:
        losses: mean loss of each global batch, before its update.
        norms: of the gradient before clipping, where the stage computes it.
        values: the selected entries at the end.
        head: the head's parameters at the end, by name, flat.
        alone: the same as a calibration sees them, after the head alone was trained.
        violations: what is not as it should be to the bit, after calibration or a step.
    """

    losses: list[float]
    norms: list[float]
    values: Tensor
    head: dict[str, Tensor]
    alone: dict[str, Tensor]
    violations: list[str]


class Inspector:
    """Compares all weights that a rank holds with what they should be, to the bit."""

    def __init__(self, entries: SelectedEntries, head: HeadEntries) -> None:
        self.parts = [entries, head]
        self.engine = entries.engine
        base = make_classifier(self.engine.dtype)
        self.expected = {name: p.detach().clone() for name, p in base.named_parameters()}
        self.violations: list[str] = []

    def take_up_masters(self) -> None:
        """What is expected from now on."""
        for part in self.parts:
            masters = part.split(self.engine.get_state(part.vector)["master"].to(self.engine.dtype))
            for name, index in zip(part.names, part.flat_indices, strict=True):
                self.expected[name].view(-1)[index.long()] = masters[name]

    def compare(self, when: str) -> None:
        """Note what differs."""
        for name, whole in self.expected.items():
            parameter = self.engine.model.get_parameter(name)
            start, stop = self.engine.weights.shard_range(parameter)
            pairs = [(self.engine.weights.read_shard(parameter), whole.flatten()[start:stop])]
            if parameter.data.numel() == whole.numel():
                pairs.append((parameter.data, whole.view(parameter.data.shape)))
            for found, expected in pairs:
                if not torch.equal(bits(found), bits(expected)):
                    self.violations.append(f"{name} {when}")


def _train(comm: Comm, plan: Plan) -> Outcome:
    model = make_classifier(plan.setting.torch_dtype)
    indices = _indices(model)
    deepspeed = plan.setting.config(comm.world_size, plan.max_grad_norm, K)
    args: Any = SimpleNamespace(
        train=TRAIN, method=MethodArguments(calibration_head_steps=NUM_HEAD_STEPS)
    )
    run: Any = SimpleNamespace(targets=list(indices), budget=K, deepspeed=deepspeed)
    tuning = SparseTuning(args, run, model, sorted(head_names(model)), comm)
    head = tuning.head
    assert head is not None
    assert head.num_entries == HEAD_SIZE
    batches = Batches(
        random_pairs(),
        comm,
        global_batch_size=GLOBAL_BATCH_SIZE,
        micro_batch_size=plan.micro_batch_size,
        seed=SEED,
        pad_token_id=0,
    )
    seen: list[Tensor] = []  # the head, each time that a calibration begins

    def recorded(*arguments: Any, **options: Any) -> Selection:
        seen.append(head.read())
        return calibrate(*arguments, **options)

    untrained = head.read()
    scheduler = LambdaLR(tuning.engine.optimizer, _rate_factor)
    with mock.patch.object(sparse_tuning, "calibrate", recorded):
        tuning._select(batches, summed_pair_loss)  # must leave no trace
        args.method = MethodArguments(calibration_head_steps=0)
        tuning._select(batches, summed_pair_loss)
    assert scheduler.get_last_lr() == [g["lr"] for g in tuning.engine.optimizer.param_groups]
    assert torch.equal(bits(seen[1]), bits(untrained))
    assert all(vector.buffer is None for vector in tuning.engine.vectors)
    tuning.entries = SelectedEntries(tuning.engine, tuning.layers, list(indices.values()))
    inspector = Inspector(tuning.entries, head)
    inspector.compare("after calibration")
    for part in tuning.parts:
        part.start_from_weights()
    state = TrainerState(max_steps=NUM_STEPS)
    results = []
    for step in fit(
        tuning.engine, tuning.parts, batches, summed_pair_loss, scheduler, state, seed=0
    ):
        results.append(step)
        inspector.take_up_masters()
        inspector.compare(f"after step {state.global_step}")
    return Outcome(
        losses=[step.loss for step in results],
        norms=[step.grad_norm for step in results if step.grad_norm is not None],
        values=tuning.entries.read(),
        head=head.split(head.read()),
        alone=head.split(seen[0]),
        violations=inspector.violations,
    )


def _all_plans() -> dict[Plan, Outcome]:
    comm = init_distributed()
    return {plan: _train(comm, plan) for plan in PLANS[comm.world_size]}


Outcomes = Callable[[int, Plan], list[Outcome]]


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    """World size and plan -> what each rank knows."""
    run = functools.cache(lambda size: run_ranks(size, _all_plans))
    return lambda size, plan: [known[plan] for known in run(size)]


# The dense reference


@dataclass
class Dense:
    """The same run in one process, every weight and moment whole."""

    losses: list[float]
    norms: list[float]
    base: dict[str, Tensor]
    params: dict[str, Tensor]
    values: Tensor


@functools.cache
def _dense(max_grad_norm: float) -> Dense:
    model = make_classifier().eval()
    indices = _indices(model)
    head = sorted(head_names(model))
    params = {name: model.get_parameter(name) for name in [*indices, *head]}
    base = {name: p.detach().clone() for name, p in params.items()}
    masks = {name: torch.full(p.shape, name in head) for name, p in params.items()}
    for name, index in indices.items():
        masks[name].view(-1)[index] = True
    optimizer = oracle.DenseMaskedAdamW(params, masks, max_norm=max_grad_norm or None, **ADAM)
    rates = {
        name: TRAIN.head_learning_rate if name in head else TRAIN.learning_rate for name in params
    }
    losses, norms = [], []
    for step, batch in enumerate(_global_batches()):
        with torch.no_grad():
            losses.append(sum(float(naive_pair_loss(model, i)) for i in batch) / len(batch))
        gradients = oracle.summed_gradients(model, batch, naive_pair_loss, list(params))
        means = {name: gradient / len(batch) for name, gradient in gradients.items()}
        factor = _rate_factor(step)
        norms.append(optimizer.step(means, {n: rate * factor for n, rate in rates.items()}))
    values = torch.cat([params[n].detach().flatten()[index] for n, index in indices.items()])
    whole = {name: params[name].detach() for name in head}
    return Dense(losses, norms, base, whole, values)


def _global_batches() -> list[list[int]]:
    schedule = BatchSchedule(
        num_rows=NUM_EXAMPLES,
        global_batch_size=GLOBAL_BATCH_SIZE,
        micro_batch_size=1,
        rank=0,
        world_size=1,
        seed=SEED,
    )
    return [list(schedule.global_batch(step)) for step in range(NUM_STEPS)]


@functools.cache
def _dense_head(max_grad_norm: float) -> dict[str, Tensor]:
    """The head's parameters after it alone was trained."""
    model = make_classifier().eval()
    params = {name: model.get_parameter(name) for name in sorted(head_names(model))}
    masks = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in params.items()}
    optimizer = oracle.DenseMaskedAdamW(params, masks, max_norm=max_grad_norm or None, **ADAM)
    for step, batch in enumerate(_global_batches()[:NUM_HEAD_STEPS]):
        gradients = oracle.summed_gradients(model, batch, naive_pair_loss, list(params))
        means = {name: gradient / len(batch) for name, gradient in gradients.items()}
        rate = TRAIN.head_learning_rate * (1 - step / NUM_HEAD_STEPS)
        optimizer.step(means, dict.fromkeys(params, rate))
    return {name: parameter.detach() for name, parameter in params.items()}


# The tests


@pytest.mark.parametrize(("world_size", "plan"), EXACT_RUNS, ids=str)
class TestSameTraining:
    """1e-5 relative in fp32."""

    def test_losses(self, outcomes: Outcomes, world_size: int, plan: Plan) -> None:
        expected = _dense(plan.max_grad_norm).losses
        for outcome in outcomes(world_size, plan):
            assert outcome.losses == pytest.approx(expected, rel=1e-5)

    def test_gradient_norms(self, outcomes: Outcomes, world_size: int, plan: Plan) -> None:
        """Of entries and head together."""
        expected = _dense(plan.max_grad_norm).norms
        for outcome in outcomes(world_size, plan):
            if plan.setting.stage > 0:  # an fp32 engine of stage 0 does not tell
                assert outcome.norms == pytest.approx(expected, rel=1e-5)

    def test_values(self, outcomes: Outcomes, world_size: int, plan: Plan) -> None:
        dense = _dense(plan.max_grad_norm)
        for outcome in outcomes(world_size, plan):
            _assert_close(outcome.values, dense.values)
            assert outcome.head.keys() == dense.params.keys()
            for name, parameter in dense.params.items():
                _assert_close(outcome.head[name], parameter.flatten())

    def test_the_head_alone(self, outcomes: Outcomes, world_size: int, plan: Plan) -> None:
        dense = _dense_head(plan.max_grad_norm)
        for outcome in outcomes(world_size, plan):
            assert outcome.alone.keys() == dense.keys()
            for name, parameter in dense.items():
                _assert_close(outcome.alone[name], parameter.flatten())


def _assert_close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("world_size", "plan"), RUNS, ids=str)
def test_nothing_else_changes(outcomes: Outcomes, world_size: int, plan: Plan) -> None:
    """Calibration changes nothing; after each step weights are the base with rounded masters."""
    for outcome in outcomes(world_size, plan):
        assert outcome.violations == []


@pytest.mark.parametrize(("world_size", "plan"), RUNS, ids=str)
def test_ranks_agree(outcomes: Outcomes, world_size: int, plan: Plan) -> None:
    first, *others = outcomes(world_size, plan)
    for other in others:
        assert other.losses == first.losses
        assert torch.equal(bits(other.values), bits(first.values))
        for name, values in first.head.items():
            assert torch.equal(bits(other.head[name]), bits(values)), name


@pytest.mark.parametrize(("world_size", "plan"), [r for r in RUNS if r[1] in ROUNDED], ids=str)
def test_bf16_trains_alike(outcomes: Outcomes, world_size: int, plan: Plan) -> None:
    """And clips by the norm of both vectors; one of its own for each would move less."""
    dense = _dense(plan.max_grad_norm)
    for outcome in outcomes(world_size, plan):
        assert outcome.losses == pytest.approx(dense.losses, rel=0.05)
        assert outcome.norms == pytest.approx(dense.norms, rel=0.1)


def test_the_reference_trains() -> None:
    """The premise: clipping acts in nearly all steps and changes what comes out; all moves."""
    clipped, free = _dense(0.5), _dense(0.0)
    assert sorted(clipped.norms)[1] > 0.5
    assert max(abs(a - b) for a, b in zip(clipped.losses, free.losses, strict=True)) > 0.01
    for name, parameter in clipped.params.items():
        assert (parameter - clipped.base[name]).abs().min() > 0, name
