"""The loop's own decisions: a skipped step, a loss that diverges, dropout's noise."""

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from gem_ds.data.batches import Batches
from gem_ds.data.packing import refuse_leaking_rows
from gem_ds.distributed.comm import Comm
from gem_ds.distributed.engine import Engine
from gem_ds.distributed.process_group import init_distributed
from gem_ds.distributed.weights import Weights
from gem_ds.files.checkpoint import TrainerState
from gem_ds.models.loss import summed_answer_loss
from gem_ds.sparse.entries import SelectedEntries
from gem_ds.sparse.sam import Sam
from gem_ds.train.fit import DivergedError, StepResult, fit, mean_loss, seed_noise
from tests.ranks import run_ranks
from tests.tiny import (
    Setting,
    make_batches,
    make_engine,
    make_model,
    naive_examples,
    naive_loss,
    random_examples,
    whole_state,
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


def _batches(comm: Comm, accumulation: int = 1) -> Batches:
    return make_batches(random_examples(NUM_EXAMPLES), comm, 2, accumulation)


def _steps(
    entries: SelectedEntries, scheduler: LambdaLR, state: TrainerState, sam: Sam | None = None
) -> Iterator[StepResult]:
    comm, loss = entries.engine.comm, summed_answer_loss
    return fit(entries.engine, [entries], _batches(comm), loss, scheduler, state, seed=0, sam=sam)


@dataclass
class Skipping:
    """Five steps, of which one is skipped."""

    steps: list[StepResult]
    values: list[Tensor]  # the entries before and after each of them
    num_updates: int


@dataclass
class Facts:
    """What one of two ranks has found."""

    skipping: list[Skipping]  # where one of five is skipped; plain, and with SAM
    errors: list[str]  # how training ends with a loss, and with a gradient, that is not finite
    is_as_before: bool  # masters and moments, after these
    noisy: list[float]  # the held-out loss, twice, of a model that drops out in train mode
    held_out: float  # that of another model
    trained: float  # the mean loss of its first step on the same examples
    was_training: list[bool]  # whether it was in train mode, for each micro-batch of both
    passes: list[float]  # losses of two micro-batches, twice, where SAM hardly moves the weights
    order: list[str]  # of what the tail of each of two steps does


def _facts() -> Facts:
    comm = init_distributed()
    errors, is_as_before = _diverge(comm)
    skipping = [_skip_a_step(comm, sam_rho) for sam_rho in (0.0, 0.1)]
    return Facts(skipping, errors, is_as_before, *_losses(comm), _passes(comm), _order(comm))


def _order(comm: Comm) -> list[str]:
    told: list[str] = []

    def noting(owner: type, name: str) -> Any:
        own = getattr(owner, name)

        def call(*args: Any) -> Any:
            told.append(name)
            found = own(*args)
            return (lambda: (told.append("read"), found())[1]) if name == "start_reading" else found

        return mock.patch.object(owner, name, call)

    entries = _entries(comm)
    scheduler = LambdaLR(entries.engine.optimizer, lambda _: 1.0)
    state = TrainerState(max_steps=2)
    with (
        noting(Comm, "start_reading"),
        noting(Batches, "collate_ahead"),
        noting(Engine, "step"),
        noting(Weights, "write_entries"),
    ):
        list(_steps(entries, scheduler, state))
    return told


def _skip_a_step(comm: Comm, sam_rho: float) -> Skipping:
    """As an fp16 engine does, whose gradient is not finite."""
    step, calls = Engine.step, itertools.count()

    def skipping(engine: Engine) -> bool:
        if next(calls) != SKIPPED:
            return step(engine)
        engine.vectors[0].values.grad = None
        return False

    entries = _entries(comm)
    engine = entries.engine
    state = TrainerState(max_steps=NUM_STEPS)
    scheduler = LambdaLR(engine.optimizer, lambda num_updates: 1 / (1 + num_updates))
    results, values = [], [entries.read()]
    with (
        mock.patch.object(Engine, "step", skipping),
        mock.patch.object(Engine, "lowers_loss_scale", True),
    ):
        for result in _steps(entries, scheduler, state, Sam(sam_rho) if sam_rho else None):
            results.append(result)
            values.append(entries.read())
    assert state.global_step == NUM_STEPS
    return Skipping(results, values, engine.num_updates)


def _diverge(comm: Comm) -> tuple[list[str], bool]:
    errors = []
    entries = _entries(comm)
    before = whole_state(entries.engine)

    def broken_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        loss = summed_answer_loss(model, batch)
        return loss + (float("nan") if comm.rank == comm.world_size - 1 else 0.0)  # finite gradient

    def broken_gradient(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        loss = summed_answer_loss(model, batch)
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    for loss in (broken_loss, broken_gradient):
        state = TrainerState(max_steps=3)
        scheduler = LambdaLR(entries.engine.optimizer, lambda _: 1.0)
        try:
            list(fit(entries.engine, [entries], _batches(comm), loss, scheduler, state, seed=0))
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    after = whole_state(entries.engine)
    return errors, all(torch.equal(after[key], before[key]) for key in before)


def _losses(comm: Comm) -> tuple[list[float], float, float, list[bool]]:
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
    whole = _batches(comm, accumulation=2)
    (step,) = fit(engine, [entries], whole, loss, scheduler, TrainerState(max_steps=1), seed=0)
    return noisy, held_out, step.loss, modes


def _passes(comm: Comm) -> list[float]:
    """The losses of a step's micro-batches in both passes of SAM, of a model that drops out."""
    entries, losses = _entries(comm, "opt"), []

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        found = summed_answer_loss(model, batch)
        losses.append(found.item())
        return found

    scheduler = LambdaLR(entries.engine.optimizer, lambda _: 1.0)
    batches, state = _batches(comm, accumulation=2), TrainerState(max_steps=1)
    list(fit(entries.engine, [entries], batches, loss, scheduler, state, seed=0, sam=Sam(1e-3)))
    return losses


@pytest.fixture(scope="module")
def facts() -> list[Facts]:
    """By rank."""
    return run_ranks(2, _facts)


def test_a_skipped_step_of_fp16_changes_nothing_but_the_step_count(facts):
    for found in (skipping for rank in facts for skipping in rank.skipping):
        moved = [not torch.equal(*pair) for pair in itertools.pairwise(found.values)]
        assert moved == [step != SKIPPED for step in range(NUM_STEPS)]
        assert found.num_updates == NUM_STEPS - 1
        assert [step.learning_rate for step in found.steps] == pytest.approx(
            [0.01, 0.01 / 2, 0.01 / 3, 0.01 / 3, 0.01 / 4]
        ), "the schedule waits"


def test_a_loss_or_gradient_that_is_not_finite_ends_the_run_on_every_rank(facts):
    for what, told, followed in zip(("loss", "gradient"), *(f.errors for f in facts), strict=True):
        assert told.startswith(f"{DivergedError.__name__}: The {what} is not finite at step 1")
        assert followed.startswith("PeerError: ")
    assert all(found.is_as_before for found in facts), "masters and moments"


def test_losses_are_the_mean_over_the_ranks_examples_without_dropout(facts):
    model, dataset = make_model("llama"), random_examples(NUM_EXAMPLES)
    examples = naive_examples(dataset, range(NUM_EXAMPLES))
    with torch.no_grad():
        total = sum(float(naive_loss(model, example)) for example in examples)
    mean = pytest.approx(total / dataset.num_items(range(NUM_EXAMPLES)), rel=1e-5)
    for found in facts:
        assert (found.held_out, found.trained) == (mean, mean)
        assert found.noisy[0] == found.noisy[1]
        assert found.was_training == [False] * 2 + [True] * 2, "in train mode again"


def test_both_passes_of_sam_drop_out_the_same(facts):
    """Or the gradient would be that of another loss than the one that the weights climb."""
    for found in facts:
        first, second = found.passes[:2], found.passes[2:]
        assert first == pytest.approx(second, rel=5e-3)
        assert first != second, "the weights moved"


def test_the_next_batch_is_made_before_the_device_is_waited_for_and_that_is_once(facts):
    """The engine waits when it looks at the gradient; the loss has come to the host by then."""
    step = ["start_reading", "collate_ahead", "step", "read", "write_entries"]
    assert all(found.order == 2 * step for found in facts)


def test_noise_is_that_of_the_seed_the_step_and_the_rank():
    drawn = []
    for key in itertools.product((0, 1), repeat=3):
        for _ in range(2):
            seed_noise(*key)
            drawn.append(tuple(torch.rand(4).tolist()))
    assert drawn[::2] == drawn[1::2]
    assert len(set(drawn)) == 8


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_packing_is_refused_where_examples_see_each_other(micro_batch_size):
    for architecture, leaks in (("opt", True), ("llama", False)):
        model = make_model(architecture)
        args = (model, torch.device("cpu"), model.config.vocab_size, micro_batch_size)
        refused = "packed examples see each other: leave --packing out"
        with pytest.raises(ValueError, match=refused) if leaks else nullcontext():
            refuse_leaking_rows(*args)
