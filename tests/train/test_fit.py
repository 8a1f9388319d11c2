"""The loop's own decisions: a skipped step, a loss that diverges, dropout's noise."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from gem_ds.data.batches import Batches
from gem_ds.distributed.comm import Comm
from gem_ds.distributed.engine import Engine
from gem_ds.distributed.process_group import init_distributed
from gem_ds.files.checkpoint import TrainerState
from gem_ds.models.loss import refuse_leaking_rows, summed_answer_loss
from gem_ds.sparse.entries import SelectedEntries
from gem_ds.train.fit import DivergedError, StepResult, fit, mean_loss, seed_noise
from tests.ranks import run_ranks
from tests.tiny import (
    PAD_TOKEN_ID,
    Setting,
    make_engine,
    make_model,
    naive_examples,
    naive_loss,
    random_examples,
)

pytestmark = pytest.mark.slow  # starts engines or programs

K = 40
SKIPPED = 2  # the step, from 0, whose gradient is not finite
NUM_STEPS = 5
NUM_EXAMPLES = 6


def _entries(comm: Comm, architecture: str = "llama") -> SelectedEntries:
    engine, layers = make_engine(Setting(3), comm, make_model(architecture), K)
    per_layer = K // len(layers)
    indices = [torch.arange(per_layer) * 2 for _ in layers]
    entries = SelectedEntries(engine, layers, indices)
    entries.start_from_weights()
    return entries


def _batches(comm: Comm, global_batch_size: int = 4) -> Batches:
    return Batches(
        random_examples(NUM_EXAMPLES),
        comm,
        global_batch_size=global_batch_size,
        micro_batch_size=2,
        seed=0,
        pad_token_id=PAD_TOKEN_ID,
    )


class SkippingEngine:
    """Stands in for an fp16 engine: one step finds a gradient that is not finite, and skips."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.num_calls = 0

    def step(self) -> bool:
        """A step as the engine takes it, but for one."""
        self.num_calls += 1
        if self.num_calls != SKIPPED + 1:
            return Engine.step(self.engine)
        self.engine.vectors[0].values.grad = None
        return False


def _train_with_a_skipped_step() -> tuple[list[StepResult], list[Tensor], int]:
    """What the steps found, the entries before and after each, and the number of updates."""
    comm = init_distributed()
    entries = _entries(comm)
    engine = entries.engine
    state = TrainerState(max_steps=NUM_STEPS)
    scheduler = LambdaLR(engine.optimizer, lambda num_updates: 1 / (1 + num_updates))
    results, values = [], [entries.read()]
    skipping = SkippingEngine(engine)
    with (
        mock.patch.object(engine, "step", skipping.step),
        mock.patch.object(Engine, "lowers_loss_scale", True),
    ):
        for result in fit(
            engine, [entries], _batches(comm), summed_answer_loss, scheduler, state, seed=0
        ):
            results.append(result)
            values.append(entries.read())
    assert state.global_step == NUM_STEPS
    return results, values, engine.num_updates


def test_a_skipped_step_of_fp16_changes_nothing_but_the_step_count() -> None:
    ((results, values, num_updates),) = run_ranks(1, _train_with_a_skipped_step)
    moved = [not torch.equal(before, after) for before, after in itertools.pairwise(values)]
    assert moved == [step != SKIPPED for step in range(NUM_STEPS)]
    assert num_updates == NUM_STEPS - 1
    assert [result.learning_rate for result in results] == pytest.approx(
        [0.01, 0.01 / 2, 0.01 / 3, 0.01 / 3, 0.01 / 4]
    ), "the schedule waits"


def _diverges() -> tuple[str, str, bool]:
    comm = init_distributed()
    errors = []
    entries = _entries(comm)
    before = entries.engine.get_state()

    def broken_loss(model: object, batch: dict[str, Tensor]) -> Tensor:
        loss = summed_answer_loss(model, batch)  # type: ignore[arg-type]
        return loss * (float("nan") if comm.rank == comm.world_size - 1 else 1.0)

    def broken_gradient(model: object, batch: dict[str, Tensor]) -> Tensor:
        loss = summed_answer_loss(model, batch)  # type: ignore[arg-type]
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    for loss in (broken_loss, broken_gradient):
        state = TrainerState(max_steps=3)
        scheduler = LambdaLR(entries.engine.optimizer, lambda _: 1.0)
        try:
            for _ in fit(entries.engine, [entries], _batches(comm), loss, scheduler, state, seed=0):
                pass
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    after = entries.engine.get_state()
    return *errors, all(torch.equal(after[key], before[key]) for key in before)  # type: ignore[return-value]


def test_a_loss_or_gradient_that_is_not_finite_ends_the_run_on_every_rank() -> None:
    first, second = run_ranks(2, _diverges)
    for what, told, followed in zip(("loss", "gradient"), first, second, strict=False):
        assert told.startswith(f"{DivergedError.__name__}: The {what} is not finite at step 1")
        assert followed.startswith("PeerError: ")
    assert first[-1], "masters and moments are as before"
    assert second[-1]


@dataclass
class Losses:
    """What one of two ranks has found without a change of the weights.

    Attributes:
        noisy: the held-out loss, twice, of a model that drops out in train mode.
        held_out: that of another model.
        trained: the mean loss of its first step on the same examples.
        was_training: whether that model was in train mode, for each micro-batch of both.
    """

    noisy: list[float]
    held_out: float
    trained: float
    was_training: list[bool]


def _losses() -> Losses:
    comm = init_distributed()
    engine = _entries(comm, "opt").engine  # it drops out 30 % in train mode
    engine.model.train()
    noisy = [mean_loss(engine, _batches(comm), summed_answer_loss) for _ in range(2)]
    entries = _entries(comm)
    engine, modes = entries.engine, []

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        modes.append(engine.model.training)
        return summed_answer_loss(model, batch)

    held_out = mean_loss(engine, _batches(comm), loss)
    scheduler = LambdaLR(engine.optimizer, lambda _: 1.0)
    whole = _batches(comm, global_batch_size=NUM_EXAMPLES)
    (step,) = fit(engine, [entries], whole, loss, scheduler, TrainerState(max_steps=1), seed=0)
    return Losses(noisy, held_out, step.loss, modes)


@pytest.fixture(scope="module")
def losses() -> list[Losses]:
    """By rank."""
    return run_ranks(2, _losses)


def test_the_held_out_loss_knows_no_dropout(losses: list[Losses]) -> None:
    for found in losses:
        assert found.noisy[0] == found.noisy[1]


def test_losses_are_the_mean_over_the_ranks_examples(losses: list[Losses]) -> None:
    model, dataset = make_model("llama"), random_examples(NUM_EXAMPLES)
    examples = naive_examples(dataset, range(NUM_EXAMPLES))
    with torch.no_grad():
        total = sum(float(naive_loss(model, example)) for example in examples)
    mean = pytest.approx(total / dataset.num_items(range(NUM_EXAMPLES)), rel=1e-5)
    assert [(found.held_out, found.trained) for found in losses] == [(mean, mean)] * 2


def test_a_step_after_an_evaluation_is_in_train_mode_again(losses: list[Losses]) -> None:
    for found in losses:
        assert found.was_training == [False] * 2 + [True] * 2


def test_noise_is_that_of_the_seed_the_step_and_the_rank() -> None:
    drawn = []
    for key in itertools.product((0, 1), repeat=3):
        for _ in range(2):
            seed_noise(*key)
            drawn.append(tuple(torch.rand(4).tolist()))
    assert drawn[::2] == drawn[1::2]
    assert len(set(drawn)) == 8


@pytest.mark.parametrize(("architecture", "leaks"), [("opt", True), ("llama", False)])
def test_packing_is_refused_where_examples_see_each_other(architecture: str, leaks: bool) -> None:
    model = make_model(architecture)
    for micro_batch_size in (1, 3):
        args = (model, torch.device("cpu"), model.config.vocab_size, micro_batch_size)
        refused = "packed examples see each other: leave --packing out"
        with pytest.raises(ValueError, match=refused) if leaks else nullcontext():
            refuse_leaking_rows(*args)
