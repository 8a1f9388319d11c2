"""Calibration on real ranks against the oracle's dense gradients in one process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from gem_ds.data.batches import Batches
from gem_ds.distributed.comm import Comm
from gem_ds.distributed.engine import Engine
from gem_ds.distributed.process_group import init_distributed
from gem_ds.errors import PeerError
from gem_ds.models.loss import summed_answer_loss
from gem_ds.models.targets import find_targets
from gem_ds.select.selection import Selection
from gem_ds.sparse.calibrate import calibrate, sum_gradients
from gem_ds.sparse.entries import gather_indices
from gem_ds.sparse.layers import TargetLayers
from tests import oracle
from tests.ranks import run_ranks
from tests.tiny import (
    PAD_TOKEN_ID,
    Setting,
    assert_selected_up_to_rounding,
    bits,
    checkpointed,
    make_engine,
    make_model,
    naive_examples,
    naive_loss,
    random_examples,
    summed_loss_of,
)

pytestmark = pytest.mark.slow  # starts engines or programs

NUM_EXAMPLES = 17
MICRO_BATCH_SIZE = 3
K = 61

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A model in an engine."""

    architecture: str
    setting: Setting
    checkpointing: bool = False

    def __str__(self) -> str:
        ending = " checkpointed" if self.checkpointing else ""
        return f"{self.architecture} {self.setting}{ending}"


CASES = {
    1: [Case("bert", Setting(0))],
    2: [
        Case("llama", Setting(1)),
        Case("opt", Setting(3)),
        Case("opt", Setting(3), checkpointing=True),
        Case("bert", Setting(2), checkpointing=True),
        Case("llama", Setting(3, variant="offload")),
    ],
    3: [Case("llama", Setting(3), checkpointing=True)],
}
ALL_CASES = [(size, case) for size, cases in CASES.items() for case in cases]


@dataclass
class Outcome:
    """What the ranks know at the end of one calibration.

    Attributes:
        gradients: by weight name the ranks' statistics put together, flat.
        selection: of this rank.
        indices: by weight name the ranks' flat indices put together.
        num_forwards: of the first target layer, by micro-batch.
        num_progress: calls of ``progress``.
        changes: parameters that are no longer as they were or that hold a gradient.
    """

    gradients: Tensors
    selection: Selection
    indices: Tensors
    num_forwards: float
    num_progress: int
    changes: list[str]


def _batches(comm: Comm, num_examples: int = NUM_EXAMPLES) -> Batches:
    return Batches(
        random_examples(num_examples),
        comm,
        global_batch_size=MICRO_BATCH_SIZE * comm.world_size,
        micro_batch_size=MICRO_BATCH_SIZE,
        seed=0,
        pad_token_id=PAD_TOKEN_ID,
    )


def _gathered(comm: Comm, layers: TargetLayers, shards: list[Tensor]) -> Tensors:
    return {
        layer.name: torch.cat(comm.all_gather(shard))
        for layer, shard in zip(layers, shards, strict=True)
    }


@contextmanager
def _counting(module: nn.Module) -> Iterator[list[None]]:
    calls: list[None] = []
    handle = module.register_forward_hook(lambda *_: calls.append(None))
    yield calls
    handle.remove()


def _changes(engine: Engine, architecture: str, dtype: torch.dtype) -> list[str]:
    original = dict(make_model(architecture, dtype).named_parameters())
    changed = []
    for name, parameter in engine.model.named_parameters():
        if parameter is engine.vectors[0].values:
            continue
        start, stop = engine.weights.shard_range(parameter)
        before = original[name].detach().flatten()[start:stop]
        if parameter.grad is not None or not torch.equal(
            bits(engine.weights.read_shard(parameter)), bits(before)
        ):
            changed.append(name)
    return changed


def _calibrate(comm: Comm, case: Case) -> Outcome:
    model = make_model(case.architecture, case.setting.torch_dtype)
    if case.checkpointing:
        checkpointed(model)
    model.train()
    engine, layers = make_engine(case.setting, comm, model, K)
    batches = _batches(comm)
    summed_loss = summed_loss_of(case.architecture)
    shards = sum_gradients(engine, layers, batches, summed_loss)
    progress: list[None] = []
    with _counting(layers[0].module) as forwards:
        selection = calibrate(
            engine, layers, batches, summed_loss, K, progress=lambda: progress.append(None)
        )
    return Outcome(
        gradients=_gathered(comm, layers, shards),
        selection=selection,
        indices=dict(
            zip(
                find_targets(make_model(case.architecture)),
                gather_indices(selection.indices, comm),
                strict=True,
            )
        ),
        num_forwards=len(forwards) / batches.steps_per_epoch,
        num_progress=len(progress),
        changes=_changes(engine, case.architecture, case.setting.torch_dtype),
    )


def _all_cases() -> dict[str, Outcome]:
    comm = init_distributed()
    return {str(case): _calibrate(comm, case) for case in CASES[comm.world_size]}


@pytest.fixture(scope="module")
def outcomes() -> Callable[[int, Case], list[Outcome]]:
    """World size and case -> what each rank knows."""
    run = functools.cache(lambda size: run_ranks(size, _all_cases))
    return lambda size, case: [known[str(case)] for known in run(size)]


@functools.cache
def _dense(architecture: str) -> tuple[Tensors, Tensors]:
    """The oracle's gradients, and the weights."""
    model = make_model(architecture).eval()
    names = list(find_targets(model))
    examples = naive_examples(random_examples(NUM_EXAMPLES), range(NUM_EXAMPLES))
    gradients = oracle.summed_gradients(model, examples, naive_loss, names)
    return gradients, {name: model.get_parameter(name).detach() for name in names}


def _max_error(gradients: Tensors, expected: Tensors) -> float:
    """The largest error of a matrix, relative to its largest entry."""
    return max(
        float((gradients[name].flatten() - gradient.flatten()).abs().max() / gradient.abs().max())
        for name, gradient in expected.items()
    )


@pytest.mark.parametrize(("world_size", "case"), ALL_CASES, ids=str)
class TestOracle:
    """Each line of the method, on every kind of engine."""

    def test_statistics(self, outcomes: Callable, world_size: int, case: Case) -> None:
        expected, _ = _dense(case.architecture)
        for outcome in outcomes(world_size, case):
            assert list(outcome.gradients) == list(expected)
            assert _max_error(outcome.gradients, expected) <= 1e-5

    def test_layer_scores(self, outcomes: Callable, world_size: int, case: Case) -> None:
        gradients, weights = _dense(case.architecture)
        expected = [oracle.layer_score(oracle.ratio(gradients[n], w)) for n, w in weights.items()]
        for outcome in outcomes(world_size, case):
            assert outcome.selection.layer_scores == pytest.approx(expected, rel=1e-5)

    def test_budgets_and_mask_of_these_statistics(
        self, outcomes: Callable, world_size: int, case: Case
    ) -> None:
        _, weights = _dense(case.architecture)
        for outcome in outcomes(world_size, case):
            gradients = {n: g.view_as(weights[n]) for n, g in outcome.gradients.items()}
            masks = oracle.select(gradients, weights, K)
            expected = {name: mask.flatten().nonzero()[:, 0] for name, mask in masks.items()}
            assert outcome.selection.budgets == [len(index) for index in expected.values()]
            assert all(torch.equal(outcome.indices[n], index) for n, index in expected.items())

    def test_mask_of_dense_gradients(self, outcomes: Callable, world_size: int, case: Case) -> None:
        for outcome in outcomes(world_size, case):
            assert_selected_up_to_rounding(outcome.indices, *_dense(case.architecture), K)

    def test_nothing_of_the_model_changes(
        self, outcomes: Callable, world_size: int, case: Case
    ) -> None:
        assert [o.changes for o in outcomes(world_size, case)] == [[]] * world_size

    def test_each_micro_batch_runs_once_or_is_checkpointed(
        self, outcomes: Callable, world_size: int, case: Case
    ) -> None:
        steps = -(-NUM_EXAMPLES // (MICRO_BATCH_SIZE * world_size))
        for outcome in outcomes(world_size, case):
            assert outcome.num_progress == steps
            assert outcome.num_forwards == (2 if case.checkpointing else 1)


def test_checkpointing_leaves_no_trace_in_the_statistics(outcomes: Callable) -> None:
    plain, again = (
        outcomes(2, Case("opt", Setting(3), checkpointing=flag))[0].gradients
        for flag in (False, True)
    )
    assert all(torch.equal(plain[name], again[name]) for name in plain)


# What calibration refuses, and what it has to live with


@dataclass
class Oddities:
    """A rank's account of calibrations in which something is odd.

    Attributes:
        dead: the error where attention's output is cut off in the second block.
        unused: the error where a target is never called.
        one_row: the error where a layer's gradient lies in the first rank's range only.
        diverged: the error where the loss of the last rank alone is not finite, in step 2.
        after: statistics of a calibration in the engine that has just refused one.
        before: of the same one in the same engine, before.
        single: statistics of one example, which only rank 0 reads.
        bf16: statistics of a bf16 model.
    """

    dead: str
    unused: str
    one_row: str
    diverged: str
    before: Tensors
    after: Tensors
    single: Tensors
    bf16: Tensors


def _error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except (ValueError, PeerError) as error:
        return str(error)
    return "no error"


def _all_oddities() -> Oddities:
    comm = init_distributed()
    setting = Setting(3)

    cut_off = make_model("llama")
    cut_off.model.layers[1].self_attn.o_proj.weight.data.zero_()
    engine, layers = make_engine(setting, comm, cut_off, K)
    args = (engine, layers, _batches(comm), summed_answer_loss, K)
    dead = _error_of(lambda: calibrate(*args))

    extended, spare = make_model("llama"), nn.Linear(3, 3)
    extended.add_module("spare", spare)
    targets = {**find_targets(extended), "spare.weight": spare}
    engine, layers = make_engine(setting, comm, extended, K, targets=targets)
    args = (engine, layers, _batches(comm), summed_answer_loss, K)
    unused = _error_of(lambda: calibrate(*args))

    reached_at_one = make_model("llama")
    v_proj = reached_at_one.model.layers[1].self_attn.v_proj
    is_first = torch.arange(v_proj.out_features) < 1
    v_proj.register_forward_hook(lambda module, inputs, y: y * is_first)
    engine, layers = make_engine(setting, comm, reached_at_one, K)
    one_row = _error_of(lambda: sum_gradients(engine, layers, _batches(comm), summed_answer_loss))

    engine, layers = make_engine(setting, comm, make_model("llama"), K)

    def statistics(num_examples: int = NUM_EXAMPLES) -> Tensors:
        batches = _batches(comm, num_examples)
        shards = sum_gradients(engine, layers, batches, summed_answer_loss)
        return _gathered(comm, layers, shards)

    num_calls = 0

    def diverging_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        broken = num_calls == 2 and comm.rank == comm.world_size - 1
        return summed_answer_loss(model, batch) * (float("nan") if broken else 1.0)

    before = statistics()
    diverged = _error_of(lambda: sum_gradients(engine, layers, _batches(comm), diverging_loss))
    assert num_calls == 2, "the rank stopped at once"
    after, single = statistics(), statistics(num_examples=1)

    model = make_model("llama", torch.bfloat16)
    engine, layers = make_engine(Setting(3, "bf16"), comm, model, K)
    bf16 = statistics()
    return Oddities(dead, unused, one_row, diverged, before, after, single, bf16)


@pytest.fixture(scope="module")
def oddities() -> list[Oddities]:
    """By rank."""
    return run_ranks(2, _all_oddities)


def test_target_without_gradient_is_refused_by_name_on_every_rank(oddities: list[Oddities]) -> None:
    for account in oddities:
        assert account.dead == oddities[0].dead
        assert "No gradient reaches" in account.dead
        for name in find_targets(make_model("llama")):
            assert (name in account.dead) == ("layers.1." in name)


def test_target_that_is_never_called_is_refused_by_name(oddities: list[Oddities]) -> None:
    for account in oddities:
        assert account.unused.startswith("No gradient reaches spare.weight:")


def test_gradient_in_the_range_of_one_rank_is_enough(oddities: list[Oddities]) -> None:
    assert [account.one_row for account in oddities] == ["no error"] * 2


def test_loss_that_is_not_finite_on_one_rank_is_refused_on_every_rank(
    oddities: list[Oddities],
) -> None:
    for account in oddities:
        assert account.diverged == oddities[0].diverged
        assert "loss is not finite" in account.diverged


def test_refusal_leaves_the_engine_usable(oddities: list[Oddities]) -> None:
    for account in oddities:
        for name, gradient in account.before.items():
            assert torch.equal(account.after[name], gradient), name


def test_rank_without_an_example_adds_nothing(oddities: list[Oddities]) -> None:
    model = make_model("llama").eval()
    examples = naive_examples(random_examples(1), [0])
    expected = oracle.summed_gradients(model, examples, naive_loss, list(find_targets(model)))
    for account in oddities:
        assert _max_error(account.single, expected) <= 1e-5


def test_bf16_costs_what_it_costs_ordinary_autograd(oddities: list[Oddities]) -> None:
    model = make_model("llama", torch.bfloat16).eval()
    examples = naive_examples(random_examples(NUM_EXAMPLES), range(NUM_EXAMPLES))
    names = list(find_targets(model))
    ordinary = oracle.summed_gradients(model, examples, naive_loss, names)
    exact = oracle.summed_gradients(model.float(), examples, naive_loss, names)
    for account in oddities:
        assert all(gradient.dtype == torch.float32 for gradient in account.bf16.values())
        assert _max_error(account.bf16, exact) <= 1.5 * _max_error(ordinary, exact) < 0.2
