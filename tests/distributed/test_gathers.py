"""How often ZeRO-3 gathers the weights of a Llama whose blocks are recomputed, on two real ranks.

Every collective is counted where torch hands it to the network: with blocks gathered whole, and as
DeepSpeed gathers them when nobody tells it of blocks. Both select and train the same.
"""

from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from benchmarks.steps.traffic import Collectives
from gem_ds.distributed.process_group import init_distributed
from gem_ds.distributed.zero_config import read_config
from gem_ds.distributed.zero_gathers import fill_stage3
from gem_ds.files.checkpoint import TrainerState
from gem_ds.models.blocks import block_sizes
from gem_ds.models.loss import answer_loss_of, chunked_answer_loss
from gem_ds.planning.forecast import Setting, forecast
from gem_ds.sparse.calibrate import select, sum_gradients
from gem_ds.sparse.entries import SelectedEntries, gather_indices
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


@dataclass
class Account:
    """What one rank found; traffic is that of a micro-batch."""

    entries: list[float]  # gathered in each step
    messages: list[int]
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
    traffic = [Collectives() for _ in range(NUM_STEPS)]
    for collectives in traffic:
        with collectives.counted():
            next(steps)
    named: dict[str, Any] = dict(model.named_parameters())
    return Account(
        entries=[collectives.weights / 4 for collectives in traffic],
        messages=[collectives.num_gathers for collectives in traffic],
        reaches_embedding=any(needed),
        whole=[name for name, p in named.items() if p.ds_status.name != "NOT_AVAILABLE"],
        gradients=dict(zip((layer.name for layer in layers), gradients, strict=True)),
        indices=indices,
        trained=entries.read(),
        held_out=mean_loss(engine, batches, summed_loss),
    )


def _accounts() -> dict[tuple[bool, bool], Account]:
    """By whether blocks are gathered whole, and recomputed."""
    return {key: _account(*key) for key in ((False, True), (True, True), (True, False))}


Accounts = list[dict[tuple[bool, bool], Account]]
"""By rank."""


@pytest.fixture(scope="module")
def accounts() -> Accounts:
    return run_ranks(2, _accounts)


def test_blocks_are_gathered_once_for_each_pass_and_the_ends_of_the_model_once(
    accounts: Accounts,
) -> None:
    """Embedding and output layer for the forward pass only; in a fifth of the messages."""
    num_entries = sum(p.numel() for p in _model().parameters())
    for account in accounts:
        single, whole = account[False, True], account[True, True]
        assert single.entries[-1] > 2.5 * num_entries, "what is mended"
        for blocks in (whole, account[True, False]):
            assert blocks.entries[-1] == 2 * (num_entries + K) - 2 * VOCABULARY * HIDDEN
            assert blocks.entries[-1] <= 2.0 * num_entries
            assert blocks.messages[-1] <= single.messages[-1] / 5
            assert not blocks.reaches_embedding
            assert blocks.whole == []
        assert single.reaches_embedding


def test_how_weights_are_gathered_changes_nothing_else(accounts: Accounts) -> None:
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


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_the_planner_foretells_them(accounts: Accounts, is_checkpointed: bool) -> None:
    flags = "--model_name_or_path m --max_length 8 --density 0.00109"
    flags += " --gradient_checkpointing" * is_checkpointed
    told = forecast(
        Setting(
            args=parse_arguments(flags.split(), needed=[]),
            config=LlamaConfig(**SIZES),
            deepspeed=read_config(DS_CONFIGS / "zero3.json"),
            world_size=2,
            on_cpu=True,
        )
    )
    counted = accounts[0][True, is_checkpointed]
    assert told.num_trained == K
    assert told.weight_gathers == pytest.approx(4 * counted.entries[-1], rel=0.01)
    assert told.num_gathers == pytest.approx(counted.messages[-1], abs=2)


# The rule


BLOCKS = {"Block": 100, "Large": 1000}


@pytest.mark.parametrize(
    ("given", "filled"),
    [
        ({}, (["Block", "Large"], 1000, 2000, 0)),
        ({"stage3_max_live_parameters": 999}, (["Block"], 100, 999, 0)),
        ({"stage3_max_live_parameters": 99}, (None, 90, 99, 100)),
        ({"stage3_prefetch_bucket_size": 7}, (["Block", "Large"], 7, 2000, 0)),
        ({"leaf_module": {"classes": ["Other"]}}, (["Other"], 90, None, 100)),
        ({"stage3_module_granularity_threshold": 5}, (None, 90, None, 100)),
    ],
    ids=["all", "one too large", "all too large", "a size told", "leaves told", "by granularity"],
)
def test_blocks_are_leaves_unless_they_are_too_large_or_the_json_decides(
    given: dict[str, Any], filled: tuple[list[str] | None, int, int | None, int]
) -> None:
    zero = {"stage3_param_persistence_threshold": "auto"} | given
    fill_stage3(zero, 10, BLOCKS)
    found = (
        zero.get("leaf_module", {}).get("classes"),
        zero["stage3_prefetch_bucket_size"],
        zero.get("stage3_max_live_parameters"),
        zero["stage3_param_persistence_threshold"],
    )
    assert found == filled


def test_blocks_are_those_that_checkpointing_recomputes() -> None:
    model = _model()
    size = sum(p.numel() for p in model.model.layers[0].parameters())
    assert block_sizes(model) == {"LlamaDecoderLayer": size}
    with mock.patch.object(GradientCheckpointingLayer, "__call__", create=True):
        assert block_sizes(model) == {}, "with their hooks a block would be gathered anew"
