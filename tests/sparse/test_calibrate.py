"""Calibration on real ranks against the oracle's dense gradients in one process.

However the model is held, the examples are cut and the gradients travel, sums and masks are the
oracle's but for the rounding of fp32.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from gem_ds.calibration.calibrate import NUM_TRIED_STEPS, calibrate, sum_gradients
from gem_ds.data.batches import SummedLoss, permutation
from gem_ds.data.dataset import Dataset
from gem_ds.data.packing import pack
from gem_ds.distributed.comm import Comm
from gem_ds.distributed.engine import Engine
from gem_ds.distributed.process_group import init_distributed
from gem_ds.errors import PeerError
from gem_ds.models.loss import summed_answer_loss
from gem_ds.models.targets import find_targets
from gem_ds.select.rules import RULES
from gem_ds.select.selection import Selection, gather_indices
from gem_ds.sparse.target_layers import TargetLayers
from tests import oracle
from tests.ranks import run_ranks
from tests.tiny import (
    MAX_LENGTH,
    Setting,
    Tensors,
    assert_selected_up_to_rounding,
    bits,
    checkpointed,
    make_batches,
    make_engine,
    make_model,
    max_error,
    naive_gradients,
    random_examples,
    summed_loss_of,
)

pytestmark = pytest.mark.slow  # starts engines or programs

NUM_EXAMPLES = 17
NUM_TARGETS = 4
K = 61
SOME = 0.6e-6  # gigabytes: on 2 ranks room for Llama's value weights and one of its query weights


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model in an engine, and what it is calibrated on."""

    architecture: str = "llama"
    setting: Setting
    checkpointing: bool = False
    micro_batch_size: int = 3
    accumulation: int = 1
    packed: bool = False
    buffer_gb: float = 0.0
    rule: str = "gem"

    def num_buffered(self, world_size: int) -> int:
        """Layers; on one rank the range is the whole matrix."""
        return (
            {0.0: 0, SOME: 3, 1.0: NUM_TARGETS}[self.buffer_gb] if world_size > 1 else NUM_TARGETS
        )

    def __str__(self) -> str:
        told = [self.architecture, str(self.setting)] + ["checkpointed"] * self.checkpointing
        told.append(f"{self.accumulation} x {self.micro_batch_size}" + " packs" * self.packed)
        return " ".join([*told, f"buffer {self.buffer_gb:g}", self.rule])


CASES = {
    1: [
        Case(architecture="bert", setting=Setting(0)),
        Case(setting=Setting(3), micro_batch_size=7, packed=True),
        Case(setting=Setting(1), micro_batch_size=1, accumulation=4, rule="gem_abs"),
    ],
    2: [
        Case(setting=Setting(1), accumulation=2),
        Case(setting=Setting(3), accumulation=2, buffer_gb=SOME),
        Case(setting=Setting(3), accumulation=2, buffer_gb=1.0),
        Case(setting=Setting(3, variant="offload")),
        Case(architecture="opt", setting=Setting(3)),
        Case(architecture="opt", setting=Setting(3), checkpointing=True),
        Case(architecture="bert", setting=Setting(2), checkpointing=True),
        Case(setting=Setting(3), micro_batch_size=1, accumulation=4, buffer_gb=SOME, rule="fish"),
    ],
    3: [
        Case(setting=Setting(3), checkpointing=True, micro_batch_size=1),
        Case(setting=Setting(3), checkpointing=True, micro_batch_size=1, rule="gem_abs"),
        Case(setting=Setting(1), micro_batch_size=1, accumulation=2, rule="gradient_abs"),
        Case(setting=Setting(3), micro_batch_size=7, packed=True),
    ],
}
IN_BF16 = [Case(setting=Setting(3, "bf16"), buffer_gb=gb) for gb in (0.0, SOME)]  # on 2 ranks
ALL_CASES = [(size, case) for size, cases in CASES.items() for case in cases]


@dataclass
class Outcome:
    """What a rank knows at the end of one calibration; tensors are all ranks' put together."""

    gradients: Tensors  # the statistics by weight name, flat
    indices: Tensors  # flat, by weight name
    selection: Selection  # of this rank


def _gathered(comm: Comm, layers: TargetLayers, shards: list[Tensor]) -> Tensors:
    named = zip(layers, shards, strict=True)
    return {layer.name: torch.cat(comm.gather_objects(shard)) for layer, shard in named}


def _assert_unchanged(engine: Engine, case: Case) -> None:
    original = make_model(case.architecture, case.setting.torch_dtype)
    for name, before in original.named_parameters():
        parameter = engine.model.get_parameter(name)
        start, stop = engine.weights.shard_range(parameter)
        found = engine.weights.read_shard(parameter)
        assert parameter.grad is None, name
        assert torch.equal(bits(found), bits(before.detach().flatten()[start:stop])), name


def _calibrate(comm: Comm, case: Case) -> Outcome:
    """Calibrates; each micro-batch runs once, gradients cross the network once where buffered."""
    model = make_model(case.architecture, case.setting.torch_dtype)
    if case.checkpointing:
        checkpointed(model)
    model.train()
    engine, layers = make_engine(case.setting, comm, model, K)
    examples = random_examples(NUM_EXAMPLES)
    dataset = pack(examples, MAX_LENGTH) if case.packed else examples
    batches = make_batches(dataset, comm, case.micro_batch_size, case.accumulation)
    given = (engine, layers, batches, summed_loss_of(case.architecture))
    start = comm.start_reduce_scatter
    with mock.patch.object(comm, "start_reduce_scatter", wraps=start) as reductions:
        statistic = RULES[case.rule].statistic
        shards = sum_gradients(*given, buffer_gb=case.buffer_gb, statistic=statistic)
    num_micro_batches = batches.steps_per_epoch * case.accumulation
    at_once = (NUM_TARGETS - case.num_buffered(comm.world_size)) * num_micro_batches
    assert reductions.call_count == case.num_buffered(comm.world_size) + at_once
    progress, forwards = mock.Mock(), mock.Mock(return_value=None)
    layers[0].module.register_forward_hook(forwards)
    selection = calibrate(*given, K, progress, rule=case.rule, buffer_gb=case.buffer_gb)
    assert progress.call_count == batches.steps_per_epoch
    assert forwards.call_count == num_micro_batches * (1 + case.checkpointing)
    _assert_unchanged(engine, case)
    indices = gather_indices(selection.indices, comm)
    return Outcome(
        gradients=_gathered(comm, layers, shards),
        indices=dict(zip((layer.name for layer in layers), indices, strict=True)),
        selection=selection,
    )


def _all_cases() -> dict[str, Outcome]:
    comm = init_distributed()
    cases = CASES[comm.world_size] + IN_BF16 * (comm.world_size == 2)
    return {str(case): _calibrate(comm, case) for case in cases}


@pytest.fixture(scope="module")
def outcomes() -> Callable[[int, Case], list[Outcome]]:
    """World size and case -> what each rank knows."""
    run = functools.cache(lambda size: run_ranks(size, _all_cases))
    return lambda size, case: [known[str(case)] for known in run(size)]


@functools.cache
def _dense(architecture: str, rule: str) -> tuple[Tensors, Tensors]:
    of_each = {"gem": lambda g: g, "fish": torch.square}.get(rule, torch.abs)
    return naive_gradients(make_model(architecture), NUM_EXAMPLES, of_each)


@pytest.mark.parametrize(("world_size", "case"), ALL_CASES, ids=str)
def test_statistics_and_mask_are_the_oracles(outcomes, world_size, case):
    """The mask is that of the ranks' statistics, and of dense gradients up to rounding."""
    dense, weights = _dense(case.architecture, case.rule)
    scores = [oracle.layer_score(oracle.ratio(dense[n], w)) for n, w in weights.items()]
    is_gem = case.rule.startswith("gem")
    for outcome in outcomes(world_size, case):
        assert list(outcome.gradients) == list(dense)
        assert max_error(outcome.gradients, dense) <= 1e-5
        assert not is_gem or outcome.selection.layer_scores == pytest.approx(scores, rel=1e-5)
        gradients = {n: g.view_as(weights[n]) for n, g in outcome.gradients.items()}
        masks = oracle.select(gradients, weights, K, case.rule)
        expected = {name: mask.flatten().nonzero()[:, 0] for name, mask in masks.items()}
        assert outcome.selection.budgets == [len(index) for index in expected.values()]
        assert all(torch.equal(outcome.indices[n], index) for n, index in expected.items())
        if is_gem:
            assert_selected_up_to_rounding(outcome.indices, dense, weights, K)


def test_checkpointing_leaves_no_trace_in_the_statistics(outcomes):
    plain, again = (
        outcomes(2, Case(architecture="opt", setting=Setting(3), checkpointing=flag))[0].gradients
        for flag in (False, True)
    )
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_bf16_costs_what_it_costs_ordinary_autograd(outcomes):
    model = make_model("llama", torch.bfloat16)
    ordinary, _ = naive_gradients(model, NUM_EXAMPLES)
    exact, _ = naive_gradients(model.float(), NUM_EXAMPLES)
    plain, buffered = (outcomes(2, case) for case in IN_BF16)
    for outcome in plain + buffered:
        assert all(gradient.dtype == torch.float32 for gradient in outcome.gradients.values())
        assert max_error(outcome.gradients, exact) <= 1.5 * max_error(ordinary, exact) < 0.2
        assert max_error(outcome.gradients, plain[0].gradients) <= 1e-5


# What calibration refuses, and what it has to live with


def _route(experts: nn.ModuleList) -> Callable[..., Tensor]:
    """A hook that sends a block's output through one expert in the first pass, then the other."""
    turns = itertools.chain([experts[0]], itertools.repeat(experts[1]))
    return lambda module, inputs, output: output + next(turns)(output)


def _short_first() -> Dataset:
    """Three steps of two ranks; in the first, each answer is one token behind one."""
    examples = random_examples(200)
    lengths = examples.offsets.diff()
    short, others = (lengths == 2).nonzero()[:6, 0], (lengths > 2).nonzero()[:12, 0]
    places = torch.empty(18, dtype=torch.int64)
    places[permutation(18, seed=0, epoch=0)] = torch.cat([short, others])
    return examples.select(places.tolist())


def _all_oddities() -> dict[str, Any]:
    """A rank's account of calibrations in which something is odd."""
    comm, found = init_distributed(), {}

    def engine_of(model: nn.Module, **options: Any) -> tuple[Engine, TargetLayers]:
        return make_engine(Setting(3), comm, model, K, **options)

    def error_of(
        engine: Engine,
        layers: TargetLayers,
        loss: SummedLoss = summed_answer_loss,
        examples: Dataset | None = None,
        **options: Any,
    ) -> str:
        """With how many steps were done before."""
        examples = random_examples(NUM_EXAMPLES) if examples is None else examples
        batches, steps = make_batches(examples, comm, 3), mock.Mock()
        try:
            sum_gradients(engine, layers, batches, loss, steps, **options)
        except (ValueError, PeerError) as error:
            return f"after {steps.call_count}: {error}"
        return "no error"

    cut_off = make_model("llama")
    cut_off.model.layers[1].self_attn.o_proj.weight.data.zero_()
    found["no gradient in the second block"] = error_of(*engine_of(cut_off))
    longer = random_examples(6 * (NUM_TRIED_STEPS + 2))
    found["none in many steps"] = error_of(*engine_of(cut_off), examples=longer)
    queries = {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    sound = make_model("llama")
    targets = {f"{name}.weight": sound.get_submodule(name) for name in queries}
    parts = engine_of(sound, targets=dict(sorted(targets.items())))
    found["a first step of two tokens"] = error_of(*parts, examples=_short_first())

    extended, spare = make_model("llama"), nn.Linear(3, 3)
    extended.add_module("spare", spare)
    targets = find_targets(extended) | {"spare.weight": spare}
    found["never called"] = error_of(*engine_of(extended, targets=targets))

    routed = make_model("llama")
    routed.add_module("experts", nn.ModuleList([nn.Linear(20, 20), nn.Linear(20, 20)]))
    experts = {f"experts.{i}.weight": expert for i, expert in enumerate(routed.experts)}
    routed.model.layers[1].register_forward_hook(_route(routed.experts))
    found["an expert's first token"] = error_of(*engine_of(routed, targets=experts))

    reached_at_one = make_model("llama")
    v_proj = reached_at_one.model.layers[1].self_attn.v_proj
    is_first = torch.arange(v_proj.out_features) < 1
    v_proj.register_forward_hook(lambda module, inputs, y: y * is_first)
    found["gradient in the first rank's range only"] = error_of(*engine_of(reached_at_one))

    for statistic, buffer_gb in itertools.product(("sum", "magnitudes", "squares"), (0.0, 1.0)):
        shared = make_model("llama")
        first, second = (block.self_attn for block in shared.model.layers)
        second.v_proj = first.v_proj
        targets = {"model.layers.0.self_attn.v_proj.weight": first.v_proj}
        parts = make_engine(Setting(1), comm, shared, K, targets=targets)
        found[f"{statistic} of a shared layer, buffer {buffer_gb:g}"] = error_of(
            *parts, statistic=statistic, buffer_gb=buffer_gb
        )

    engine, layers = engine_of(make_model("llama"))

    def statistics(num_examples: int = NUM_EXAMPLES) -> Tensors:
        batches = make_batches(random_examples(num_examples), comm, 3)
        shards = sum_gradients(engine, layers, batches, summed_answer_loss)
        return _gathered(comm, layers, shards)

    num_calls = 0

    def diverging_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        broken = num_calls == 2 and comm.rank == comm.world_size - 1
        return summed_answer_loss(model, batch) * (float("nan") if broken else 1.0)

    found["before"] = statistics()
    found["diverged"] = error_of(engine, layers, diverging_loss)
    assert num_calls == 2, "the rank stopped at once"
    found["after"], found["one example"] = statistics(), statistics(num_examples=1)
    return found


@pytest.fixture(scope="module")
def oddities() -> list[dict[str, Any]]:
    """By rank."""
    return run_ranks(2, _all_oddities)


def test_target_without_gradient_is_refused_by_name_on_every_rank(oddities):
    for account in oddities:
        sentence = account["none in many steps"]
        assert "No gradient reaches" in sentence
        for name in find_targets(make_model("llama")):
            assert (name in sentence) == ("layers.1." in name)
        assert account["never called"].startswith("after 0: No gradient reaches spare.weight:")
        assert sentence.startswith(f"after {NUM_TRIED_STEPS - 1}: "), "and not after the last"
        assert sentence[9:] == account["no gradient in the second block"][9:], "which are fewer"
        assert account["a first step of two tokens"] == "no error"
        assert account["an expert's first token"] == "no error"


def test_an_examples_gradient_that_comes_in_parts_is_refused(oddities):
    """Of |a + b| nothing can be told by |a| and |b|; of a sum of gradients it is no matter."""
    for account in oddities:
        told = {name: text for name, text in account.items() if "of a shared layer" in name}
        assert len(told) == 6
        for name, text in told.items():
            if name.startswith("sum"):
                assert text == "no error"
            else:
                assert "The model runs model.layers.0.self_attn.v_proj.weight more" in text
                assert "leave such layers out of --target_modules" in text


def test_gradient_in_the_range_of_one_rank_is_enough(oddities):
    for account in oddities:
        assert account["gradient in the first rank's range only"] == "no error"


def test_loss_that_is_not_finite_on_one_rank_is_refused_on_every_rank(oddities):
    """And the engine can be used again."""
    for account in oddities:
        assert account["diverged"] == oddities[0]["diverged"]
        assert "loss is not finite" in account["diverged"]
        for name, gradient in account["before"].items():
            assert torch.equal(account["after"][name], gradient), name


def test_rank_without_an_example_adds_nothing(oddities):
    expected, _ = naive_gradients(make_model("llama"), 1)
    for account in oddities:
        assert max_error(account["one example"], expected) <= 1e-5
