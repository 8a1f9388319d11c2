"""Training on real ranks against dense masked AdamW in one process.

The reference differentiates a dense model by ordinary autograd, one example at a time, and steps
``tests.oracle.DenseMaskedAdamW`` on the mean loss of the global batch. A run has to come to the
same losses and values at any ZeRO stage and on any number of ranks, and to leave every entry that
it does not train as it was, to the bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gem_ds.data.batches import Batches, BatchSchedule
from gem_ds.data.packing import pack, pack_rows
from gem_ds.distributed.comm import Comm
from gem_ds.distributed.engine import Engine
from gem_ds.distributed.process_group import init_distributed
from gem_ds.models.loss import chunked_answer_loss, refuse_leaking_rows
from gem_ds.models.targets import find_targets
from gem_ds.sparse.calibrate import sum_gradients
from gem_ds.sparse.entries import SelectedEntries
from tests import oracle
from tests.ranks import run_ranks
from tests.tiny import (
    MAX_LENGTH,
    PAD_TOKEN_ID,
    Setting,
    bits,
    checkpointed,
    fit_entries,
    make_engine,
    make_model,
    naive_examples,
    naive_loss,
    random_examples,
)

NUM_STEPS = 20
NUM_EXAMPLES = 17
GLOBAL_BATCH_SIZE = 8  # the last batch of an epoch has one example: some ranks have none
SEED = 3
LEARNING_RATE = 0.01
MAX_GRAD_NORM = 1.0
NUM_SELECTED = (41, 7, 60, 13)
K = sum(NUM_SELECTED)

#: An Adam update is close to ``sign(g)`` where ``|g|`` is far above eps, and then a gradient that
#: is all rounding moves its weight as far as any other. With this eps, a hundredth of a usual
#: gradient, an update is as exact as its gradient, and its size depends on clipping.
ADAM: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}


def _rate_factor(step: int) -> float:
    return 1.0 - step / 25


@dataclass(frozen=True)
class Plan:
    """One run."""

    setting: Setting
    micro_batch_size: int = 2
    packed: bool = False
    checkpointing: bool = True

    def __str__(self) -> str:
        return " ".join(
            [
                f"{self.setting} in micro-batches of {self.micro_batch_size}",
                *["packed"] * self.packed,
                *["all activations kept"] * (not self.checkpointing),
            ]
        )


EXACT = [
    *(Plan(Setting(stage)) for stage in range(4)),
    Plan(Setting(3, variant="offload")),
    Plan(Setting(3, variant="gathered")),
    Plan(Setting(3, variant="persistent")),
    Plan(Setting(3), packed=True),
    Plan(Setting(3), micro_batch_size=3),
    Plan(Setting(2), micro_batch_size=1, packed=True),
    Plan(Setting(3), checkpointing=False),
    Plan(Setting(0), micro_batch_size=8, checkpointing=False),
]
ROUNDED = [
    *(Plan(Setting(stage, "bf16")) for stage in range(4)),
    Plan(Setting(3, "bf16", "persistent"), packed=True),
]
PLANS = {
    1: [*EXACT[:5], *ROUNDED[:4]],
    2: [*EXACT, *ROUNDED],
    3: [Plan(Setting(stage)) for stage in (1, 3)],
}
RUNS = [(size, plan) for size, plans in PLANS.items() for plan in plans]
EXACT_RUNS = [(size, plan) for size, plan in RUNS if plan in EXACT]


def _indices(model: PreTrainedModel) -> dict[str, Tensor]:
    """Random entries of each target; the same from the dense and the partitioned model."""
    generator = torch.Generator().manual_seed(9)
    return {
        name: torch.randperm(numel, generator=generator)[:count].sort().values
        for (name, numel), count in zip(_target_sizes(model).items(), NUM_SELECTED, strict=True)
    }


def _target_sizes(model: PreTrainedModel) -> dict[str, int]:
    return {
        name: module.get_parameter("weight").numel() for name, module in find_targets(model).items()
    }


# A run on the ranks


@dataclass
class Outcome:
    """What one rank knows of a run.

    Attributes:
        losses: mean loss of each global batch, before its update.
        norms: of the gradient before clipping, where the stage computes it.
        values: the selected entries at the end, as ``SelectedEntries.read`` gives them.
        num_steps_checked: after how many steps the partitions were compared.
        violations: where a partition, or a whole copy of a weight, was not the base with the
            rounded masters at the selected entries.
    """

    losses: list[float]
    norms: list[float]
    values: Tensor
    num_steps_checked: int
    violations: list[str]


class Inspector:
    """Compares all weights that a rank holds with what they should be, to the bit."""

    def __init__(self, engine: Engine, base: PreTrainedModel, indices: dict[str, Tensor]) -> None:
        self.engine = engine
        self.expected = {name: p.detach().clone() for name, p in base.named_parameters()}
        self.indices = indices
        self.num_steps = 0
        self.violations: list[str] = []

    def __call__(self) -> None:
        """After an applied step, on all ranks."""
        masters = self.engine.get_state()["master"].to(self.engine.dtype)
        parts = masters.split(NUM_SELECTED)
        for (name, index), part in zip(self.indices.items(), parts, strict=True):
            self.expected[name].view(-1)[index] = part
        self.num_steps += 1
        for name, parameter in self.engine.model.named_parameters():
            if parameter is self.engine.vectors[0].values:
                continue
            whole = self.expected[name].flatten()
            start, stop = self.engine.weights.shard_range(parameter)
            self._compare(name, self.engine.weights.read_shard(parameter), whole[start:stop])
            if parameter.data.numel() == whole.numel():
                self._compare(f"the whole copy of {name}", parameter.data.flatten(), whole)

    def _compare(self, name: str, actual: Tensor, expected: Tensor) -> None:
        if not torch.equal(bits(actual), bits(expected)):
            self.violations.append(f"{name} after step {self.num_steps}")


def _train(comm: Comm, plan: Plan) -> Outcome:
    dtype = plan.setting.torch_dtype
    model = make_model("llama", dtype)
    if plan.checkpointing:
        checkpointed(model)
    indices = _indices(model)
    engine, layers = make_engine(
        plan.setting,
        comm,
        model,
        K,
        max_grad_norm=MAX_GRAD_NORM,
        lr=LEARNING_RATE,
        **ADAM,
    )
    batches = _batches(comm, plan)
    sum_gradients(engine, layers, batches, chunked_answer_loss)  # must leave no trace
    entries = SelectedEntries(engine, layers, list(indices.values()))
    entries.start_from_weights()
    inspector = Inspector(engine, make_model("llama", dtype), indices)
    results = fit_entries(
        entries, batches, NUM_STEPS, rate_factor=_rate_factor, after_step=inspector
    )
    return Outcome(
        losses=[step.loss for step in results],
        norms=[step.grad_norm for step in results if step.grad_norm is not None],
        values=entries.read(),
        num_steps_checked=inspector.num_steps,
        violations=inspector.violations,
    )


def _batches(comm: Comm, plan: Plan) -> Batches:
    examples = random_examples(NUM_EXAMPLES)
    return Batches(
        pack(examples, MAX_LENGTH) if plan.packed else examples,
        comm,
        global_batch_size=GLOBAL_BATCH_SIZE // (2 if plan.packed else 1),
        micro_batch_size=plan.micro_batch_size,
        seed=SEED,
        pad_token_id=PAD_TOKEN_ID,
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
    base: Tensor
    values: Tensor


@functools.cache
def _dense(packed: bool) -> Dense:
    model = make_model("llama").eval()
    indices = _indices(model)
    params = {name: model.get_parameter(name) for name in indices}
    masks = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in params.items()}
    for name, index in indices.items():
        masks[name].view(-1)[index] = True
    optimizer = oracle.DenseMaskedAdamW(params, masks, max_norm=MAX_GRAD_NORM, **ADAM)

    def selected() -> Tensor:
        return torch.cat([p.detach().flatten()[indices[name]] for name, p in params.items()])

    base = selected()
    losses, norms = [], []
    for step, batch in enumerate(_global_batches(packed)):
        examples = naive_examples(random_examples(NUM_EXAMPLES), batch)
        num_tokens = sum(len(tokens) - prompt_length for tokens, prompt_length in examples)
        with torch.no_grad():
            losses.append(sum(float(naive_loss(model, e)) for e in examples) / num_tokens)
        gradients = oracle.summed_gradients(model, examples, naive_loss, list(params))
        means = {name: gradient / num_tokens for name, gradient in gradients.items()}
        norms.append(optimizer.step(means, LEARNING_RATE * _rate_factor(step)))
    return Dense(losses, norms, base, selected())


def _global_batches(packed: bool) -> list[list[int]]:
    """The examples of each step."""
    dataset = random_examples(NUM_EXAMPLES)
    rows = pack_rows(dataset.lengths, MAX_LENGTH) if packed else [[i] for i in range(NUM_EXAMPLES)]
    schedule = BatchSchedule(
        num_rows=len(rows),
        global_batch_size=GLOBAL_BATCH_SIZE // (2 if packed else 1),
        micro_batch_size=1,
        rank=0,
        world_size=1,
        seed=SEED,
    )
    return [
        [example for row in schedule.global_batch(step) for example in rows[row]]
        for step in range(NUM_STEPS)
    ]


# The tests


@pytest.mark.parametrize(("world_size", "plan"), EXACT_RUNS, ids=str)
class TestSameTraining:
    """1e-5 relative in fp32, over 20 steps."""

    def test_losses(self, outcomes: Outcomes, world_size: int, plan: Plan) -> None:
        expected = _dense(plan.packed).losses
        for outcome in outcomes(world_size, plan):
            assert outcome.losses == pytest.approx(expected, rel=1e-5)

    def test_gradient_norms(self, outcomes: Outcomes, world_size: int, plan: Plan) -> None:
        expected = _dense(plan.packed).norms
        for outcome in outcomes(world_size, plan):
            if plan.setting.stage > 0:  # an fp32 engine of stage 0 does not tell
                assert outcome.norms == pytest.approx(expected, rel=1e-5)

    def test_values(self, outcomes: Outcomes, world_size: int, plan: Plan) -> None:
        dense = _dense(plan.packed)
        for outcome in outcomes(world_size, plan):
            error = (outcome.values - dense.values).abs().max()
            assert error <= 1e-5 * dense.values.abs().max()
            assert error <= 1e-4 * (dense.values - dense.base).abs().max()


@pytest.mark.parametrize(("world_size", "plan"), RUNS, ids=str)
def test_partitions_hold_the_base_and_the_rounded_masters(
    outcomes: Outcomes, world_size: int, plan: Plan
) -> None:
    """After each applied step, in every weight that a rank holds, to the bit."""
    for outcome in outcomes(world_size, plan):
        assert outcome.violations == []
        assert outcome.num_steps_checked == NUM_STEPS


@pytest.mark.parametrize(("world_size", "plan"), RUNS, ids=str)
def test_ranks_agree(outcomes: Outcomes, world_size: int, plan: Plan) -> None:
    first, *others = outcomes(world_size, plan)
    assert all(other.losses == first.losses for other in others)
    assert all(torch.equal(bits(other.values), bits(first.values)) for other in others)


@pytest.mark.parametrize("plan", ROUNDED, ids=str)
def test_bf16_trains_alike(outcomes: Outcomes, plan: Plan) -> None:
    expected = _dense(plan.packed).losses
    for outcome in outcomes(2, plan):
        assert outcome.losses == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("architecture", "leaks"), [("opt", True), ("llama", False)])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_packing_is_refused_where_examples_see_each_other(
    architecture: str, leaks: bool, micro_batch_size: int
) -> None:
    model = make_model(architecture)
    args = (model, torch.device("cpu"), model.config.vocab_size, micro_batch_size)
    if not leaks:
        refuse_leaking_rows(*args)
        return
    with pytest.raises(ValueError, match="packed examples see each other: leave --packing out"):
        refuse_leaking_rows(*args)


@pytest.mark.parametrize("packed", [False, True])
def test_reference_trains(packed: bool) -> None:
    """The premise: clipping acts in some steps, values move, batches are uneven."""
    dense = _dense(packed)
    assert min(dense.norms) < MAX_GRAD_NORM < max(dense.norms)
    assert (dense.values - dense.base).abs().mean() > 0.01
    assert len({len(batch) for batch in _global_batches(packed)}) > 1
