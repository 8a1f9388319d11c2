"""How often ZeRO-3 gathers the weights of a Llama whose blocks are recomputed, on two real ranks.

Every collective is counted where torch hands it to the network: with blocks gathered whole, and as
DeepSpeed gathers them when nobody tells it of blocks. Both select and train the same.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from benchmarks.steps.traffic import Collectives
from gem_ds.calibration.calibrate import select, sum_gradients
from gem_ds.distributed.engine import Engine
from gem_ds.distributed.optim import SparseAdamW
from gem_ds.distributed.process_group import init_distributed
from gem_ds.distributed.weights import num_parameters
from gem_ds.distributed.zero_config import read_config
from gem_ds.files.checkpoint import TrainerState
from gem_ds.models.blocks import block_sizes
from gem_ds.models.encoders import head_names, without_head
from gem_ds.models.loss import answer_loss_of, chunked_answer_loss, summed_answer_loss
from gem_ds.models.objective import summed_pair_loss
from gem_ds.models.targets import find_targets, head_layers
from gem_ds.planning.forecast import Setting, forecast
from gem_ds.select.selection import gather_indices
from gem_ds.sparse.entries import HeadEntries, SelectedEntries
from gem_ds.sparse.target_layers import TargetLayers
from gem_ds.train.arguments import parse_arguments
from gem_ds.train.fit import fit, mean_loss
from tests import tiny
from tests.ranks import run_ranks
from tests.tiny import DS_CONFIGS, Tensors, checkpointed, make_batches, make_engine, random_examples

pytestmark = pytest.mark.slow  # starts engines or programs

K = 240
NUM_STEPS = 4
NUM_BLOCKS = 4
HIDDEN, VOCABULARY = 64, 300
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 172,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
ENCODER_SIZES = {key: n for key, n in SIZES.items() if key != "num_key_value_heads"}


@dataclass
class Account:
    """What one rank found; traffic is that of the last step, of one micro-batch."""

    entries: float  # gathered
    messages: int
    reaches_embedding: bool  # whether a gradient comes to the embedding's output
    whole: list[str]  # parameters that stay gathered between steps
    gradients: Tensors  # that a calibration sums, of this rank's ranges
    indices: list[torch.Tensor]
    trained: torch.Tensor  # [K] after some steps
    held_out: float


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def _account(knows_blocks: bool, is_checkpointed: bool) -> Account:
    comm, model = init_distributed(), _model()
    if is_checkpointed:
        checkpointed(model)
    if not knows_blocks:  # as transformers has it
        model.enable_input_require_grads()
    with mock.patch.object(tiny, "block_sizes", block_sizes if knows_blocks else lambda _: {}):
        engine, layers = make_engine(tiny.Setting(3), comm, model, K)
    needed = list[bool]()
    model.get_input_embeddings().register_forward_hook(
        lambda *call: needed.append(call[-1].requires_grad)
    )
    batches = make_batches(random_examples(8), comm, 1)
    summed_loss = answer_loss_of(model, comm)
    assert summed_loss is chunked_answer_loss
    gradients = sum_gradients(engine, layers, batches, summed_loss)
    selection = select(engine, layers, [part.clone() for part in gradients], K)
    indices = gather_indices(selection.indices, comm)
    entries = SelectedEntries(engine, layers, indices, kernel="library")
    entries.start_from_weights()
    state, scheduler = TrainerState(max_steps=NUM_STEPS), LambdaLR(engine.optimizer, lambda _: 1.0)
    steps = fit(engine, [entries], batches, summed_loss, scheduler, state, seed=0)
    for _ in range(NUM_STEPS):
        with (collectives := Collectives()).counted():
            next(steps)
    named: dict[str, Any] = dict(model.named_parameters())
    return Account(
        entries=collectives.weights / 4,
        messages=collectives.num_gathers,
        reaches_embedding=any(needed),
        whole=[name for name, p in named.items() if p.ds_status.name != "NOT_AVAILABLE"],
        gradients=dict(zip((layer.name for layer in layers), gradients, strict=True)),
        indices=indices,
        trained=entries.read(),
        held_out=mean_loss(engine, batches, summed_loss),
    )


@dataclass
class Unpreceded:
    """Traffic of a training before which no forward pass went alone: no chunked loss was tried."""

    entries: float  # gathered in a step
    messages: int
    most_held: int  # entries of weights that were whole, or on their way, when a module began
    block: int
    ends: int  # entries of all but the blocks


def _encoder() -> Any:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**ENCODER_SIZES))


#: Models and targets of which no chunked loss is tried.
UNPRECEDED: dict[str, tuple[Callable[[], Any], list[str] | None]] = {
    "encoder": (_encoder, None),
    "output layer": (_model, ["q_proj", "v_proj", "lm_head"]),
}


def _unpreceded(kind: str) -> Unpreceded:
    make, target_modules = UNPRECEDED[kind]
    comm, model = init_distributed(), checkpointed(make())
    head, sizes = sorted(head_names(model)), block_sizes(model)
    parts = [TargetLayers(model, find_targets(model, target_modules), K)]
    summed_loss, examples = summed_answer_loss, random_examples(8)
    if head:
        size = sum(model.get_parameter(name).numel() for name in head)
        parts.append(TargetLayers(model, head_layers(model, head), size, "gem_head"))
        summed_loss = summed_pair_loss
        examples = replace(examples, prompt_lengths=None, answers=torch.arange(8) % 2)
    weights: list[Any] = list(model.parameters())
    num_entries = sum(weight.numel() for weight in weights)
    config = tiny.Setting(3).config(2, 1.0, K, sizes)
    engine = Engine(model, [part.vector for part in parts], _optimizer, config, comm)
    indices = [torch.arange(K), *[torch.arange(0)] * (len(parts[0]) - 1)]
    trained: list[Any] = [SelectedEntries(engine, parts[0], indices, kernel="library")]
    trained += [HeadEntries(engine, part) for part in parts[1:]]
    for entries in trained:
        entries.start_from_weights()
    batches, state = make_batches(examples, comm, 1), TrainerState(max_steps=NUM_STEPS)
    scheduler = LambdaLR(engine.optimizer, lambda _: 1.0)
    steps = fit(engine, trained, batches, summed_loss, scheduler, state, seed=0)
    held = [0]

    def look(*_: Any) -> None:
        held.append(sum(w.ds_numel for w in weights if w.ds_status.name != "NOT_AVAILABLE"))

    for _ in range(NUM_STEPS):
        collectives = Collectives()
        with ExitStack() as stack:
            stack.enter_context(collectives.counted())
            stack.callback(register_module_forward_pre_hook(look).remove)
            next(steps)
    (block,) = sizes.values()
    return Unpreceded(
        entries=collectives.weights / 4,
        messages=collectives.num_gathers,
        most_held=max(held),
        block=block,
        ends=num_entries - NUM_BLOCKS * block,
    )


def _optimizer(values: list[Any]) -> SparseAdamW:
    return SparseAdamW([{"params": [vector]} for vector in values], lr=0.01)


def _accounts() -> tuple[dict[tuple[bool, bool], Account], dict[str, Unpreceded]]:
    """By whether blocks are gathered whole, and recomputed."""
    accounts = {key: _account(*key) for key in ((False, True), (True, True), (True, False))}
    return accounts, {kind: _unpreceded(kind) for kind in UNPRECEDED}


Accounts = list[dict[tuple[bool, bool], Account]]
"""By rank."""


@pytest.fixture(scope="module")
def found() -> list[Any]:
    return run_ranks(2, _accounts)


@pytest.fixture(scope="module")
def accounts(found: list[Any]) -> Accounts:
    return [accounts for accounts, _ in found]


def test_blocks_are_gathered_once_for_each_pass_and_the_ends_of_the_model_once(accounts):
    """Embedding and output layer for the forward pass only; in a fifth of the messages."""
    num_entries = sum(p.numel() for p in _model().parameters())
    for account in accounts:
        single, whole = account[False, True], account[True, True]
        assert single.entries > 2.5 * num_entries, "what is mended"
        for blocks in (whole, account[True, False]):
            assert blocks.entries == 2 * (num_entries + K) - 2 * VOCABULARY * HIDDEN
            assert blocks.entries <= 2.0 * num_entries
            assert blocks.messages <= single.messages / 5
            assert not blocks.reaches_embedding
            assert blocks.whole == []
        assert single.reaches_embedding


@pytest.mark.parametrize("kind", ["encoder", "output layer"])
def test_without_a_forward_pass_before_blocks_are_let_go_too(found, kind):
    """Two stand gathered, beside the ends of the model; embeddings are gathered once."""
    for _, by_kind in found:
        one = by_kind[kind]
        num_entries = one.ends + NUM_BLOCKS * one.block
        assert one.entries <= 2.0 * num_entries
        assert one.most_held <= 2 * one.block + one.ends


def test_how_weights_are_gathered_changes_nothing_else(accounts):
    for account in accounts:
        single, whole, plain = account[False, True], account[True, True], account[True, False]
        for name, gradient in single.gradients.items():
            error = (whole.gradients[name] - gradient).abs().max() / gradient.abs().max()
            assert error <= 1e-6, name
            assert torch.equal(whole.gradients[name], plain.gradients[name])
        for index, other, again in zip(single.indices, whole.indices, plain.indices, strict=True):
            assert torch.equal(index, other)
            assert torch.equal(index, again)
        assert torch.equal(whole.trained, plain.trained)
        torch.testing.assert_close(whole.trained, single.trained, rtol=1e-6, atol=1e-6)
        assert whole.held_out == plain.held_out == pytest.approx(single.held_out, rel=1e-6)


@pytest.mark.parametrize("kind", [False, True, *UNPRECEDED])
def test_the_planner_foretells_them(found, kind):
    """Of a Llama, recomputed or not; of what no forward pass goes before."""
    accounts, by_kind = found[0]
    make, target_modules = (_model, None) if isinstance(kind, bool) else UNPRECEDED[kind]
    model = make()
    density = (K + 0.5) / num_parameters(without_head(model))
    flags = ["--model_name_or_path", "m", "--max_length", "8", "--density", f"{density:.8f}"]
    flags += ["--gradient_checkpointing"] * bool(kind)
    flags += ["--target_modules", *target_modules] if target_modules else []
    told = forecast(
        Setting(
            args=parse_arguments(flags, needed=[]),
            config=model.config,
            deepspeed=read_config(DS_CONFIGS / "zero3.json"),
            world_size=2,
            on_cpu=True,
        )
    )
    counted = accounts[True, kind] if isinstance(kind, bool) else by_kind[kind]
    assert told.weight_gathers == pytest.approx(4 * counted.entries, rel=0.01)
    assert told.num_gathers == pytest.approx(counted.messages, abs=2)


def test_blocks_are_those_that_checkpointing_recomputes():
    model = _model()
    size = sum(p.numel() for p in model.model.layers[0].parameters())
    assert block_sizes(model) == {"LlamaDecoderLayer": size}
    with mock.patch.object(GradientCheckpointingLayer, "__call__", create=True):
        assert block_sizes(model) == {}, "with their hooks a block would be gathered anew"
