"""What a rank holds and sends while it trains is of the size of the selected entries.

With ZeRO-3 on two ranks, the process is walked for every tensor alive, and every collective is
counted where torch hands it to the network.

DeepSpeed's communication buckets are as large as the configuration asks for, whatever is trained;
they are made small here. A tensor that only C++ holds cannot be walked to; a dense gradient would
be a product of matrices first, and those are recorded too.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.steps.traffic import Collectives, tensors_in
from gem_ds.calibration.calibrate import calibrate
from gem_ds.data.batches import Batches
from gem_ds.distributed.engine import Engine
from gem_ds.distributed.process_group import init_distributed
from gem_ds.files.checkpoint import TrainerState
from gem_ds.models.loss import chunked_answer_loss
from gem_ds.select.selection import gather_indices
from gem_ds.sparse.entries import SelectedEntries
from gem_ds.sparse.layers import Sink
from gem_ds.train.fit import fit
from tests.ranks import run_ranks
from tests.tiny import Setting, make_batches, make_engine, random_examples

pytestmark = pytest.mark.slow  # starts engines or programs

WORLD_SIZE = 2
HIDDEN_SIZE = 64
TARGET_SIZE = HIDDEN_SIZE**2  # entries of each target
PARTITION = TARGET_SIZE // WORLD_SIZE
NUM_TARGETS = 4
NUM_CALIBRATION_PASSES = 4  # forward and backward
NUM_STEPS = 4
NUM_MICRO_BATCHES = 2  # per rank and step; of one example, so that activations stay small
FEW, MANY = 240, 600  # two values of K, both above the persistence threshold


def _larger_than(num_bytes: float, engine: Engine) -> list[str]:
    """Storages of more than so many bytes that are not the model's weights, of all that is alive.

    Weights are partitions, what is gathered of them at the moment, and what is on its way, either
    way.
    """
    messages = engine.model.ds_inflight_param_registry.values()  # type: ignore[union-attr, operator]
    arriving = [part for message in messages for h in _handles(message) for part in h.partitions]
    weights = {
        tensor.untyped_storage().data_ptr()
        for parameter in engine.model.parameters()
        if parameter is not engine.vectors[0].values
        for tensor in (parameter.data, parameter.ds_tensor.data)  # type: ignore[attr-defined]
    }
    weights |= {part.untyped_storage().data_ptr() for part in arriving}
    blocks: Any = engine.model.model.layers  # type: ignore[union-attr]
    sent = {sum(p.ds_tensor.numel() for p in block.parameters()) for block in blocks}
    found = {}
    gc.collect()  # what only waits to be freed does not count
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are looked at
        for tensor in [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]:
            storage = tensor.untyped_storage()
            is_sent = tensor.numel() in sent  # a rank's part of a block, until the message is gone
            if storage.nbytes() > num_bytes and storage.data_ptr() not in weights and not is_sent:
                found[storage.data_ptr()] = f"{tensor.dtype} {tuple(tensor.shape)}"
    return list(found.values())


def _handles(message: Any) -> list[Any]:
    """Those of DeepSpeed's messages of several weights; a single weight lies in its message."""
    parts = getattr(message, "handles", [message])
    return [part for part in parts if hasattr(part, "partitions")]


class Products(TorchDispatchMode):
    """Records the largest result of a product of matrices, in entries."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and look at it."""
        result = func(*args, **(kwargs or {}))
        if any(part in str(func) for part in ("mm", "matmul", "linear")):
            self.largest = max(self.largest, *(_num_values(t) for t in tensors_in(result)))
        return result


def _num_values(tensor: Tensor) -> int:
    return tensor.values().numel() if tensor.layout == torch.sparse_csr else tensor.numel()


# The run


@dataclass
class Account:
    """What one rank found; sizes of products are in entries, traffic in bytes per step."""

    calibration: Looking
    calibration_product: int
    dense_in_backward: list[str]  # of a partition or more, inside a backward of training
    training_product: int
    after_training: list[str]  # larger than [K] in fp32
    gradients: list[str]  # parameters that hold one after training
    state_bytes: int  # masters and moments on this rank
    payload: float  # in collectives other than weight gathers
    gathers: float  # of weights, which gather the selected values too


class Looking:
    """Looks at the process as a layer's gradient is handed to the network, and has arrived."""

    def __init__(self) -> None:
        self.dense: list[list[str]] = []  # of a target's size or more, when one is handed over
        self.dense_on_the_way: list[list[str]] = []  # the same, when one has arrived
        self.parts: list[list[str]] = []  # of a partition's size or more then

    def at(self, engine: Engine) -> Any:
        """Within the block, look at the gradients that the engine's Comm reduces."""
        start = engine.comm.start_reduce_scatter

        def start_reduce_scatter(tensor: Tensor) -> Callable[[], Tensor]:
            for _ in range(100):  # a thread of gloo's may hold what has arrived a little longer
                if len(found := _larger_than(4 * TARGET_SIZE - 1, engine)) == 1:
                    break
                time.sleep(0.01)
            self.dense.append(found)
            wait = start(tensor)

            def look_and_wait() -> Tensor:
                self.dense_on_the_way.append(_larger_than(4 * TARGET_SIZE - 1, engine))
                self.parts.append(_larger_than(4 * PARTITION - 1, engine))
                return wait()

            return look_and_wait

        return mock.patch.object(engine.comm, "start_reduce_scatter", start_reduce_scatter)


def _looking(sink: Sink, engine: Engine, seen: list[str]) -> Sink:
    def call(dy: Tensor, x: Tensor) -> None:
        sink(dy, x)
        seen.extend(_larger_than(4 * PARTITION - 1, engine))

    return call


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def _account(total: int) -> Account:
    gc.freeze()  # what importing has made is not walked
    comm = init_distributed()
    engine, layers = make_engine(Setting(3), comm, _model(), total)
    batches = make_batches(random_examples(8), comm, 1, NUM_MICRO_BATCHES)
    looking, calibration_products = Looking(), Products()
    with looking.at(engine), calibration_products:
        selection = calibrate(engine, layers, batches, chunked_answer_loss, total)
    indices = gather_indices(selection.indices, comm)
    del selection
    entries = SelectedEntries(engine, layers, indices, kernel="library")  # auto: by tiles, of 4 MiB
    del indices
    entries.start_from_weights()
    dense_in_backward, products = _watched_backward(entries, batches)
    collectives, state = Collectives(), TrainerState(max_steps=NUM_STEPS)
    scheduler = LambdaLR(engine.optimizer, lambda _: 1.0)
    with collectives.counted():
        steps = fit(engine, [entries], batches, chunked_answer_loss, scheduler, state, seed=0)
        assert len(list(steps)) == NUM_STEPS
    return Account(
        calibration=looking,
        calibration_product=calibration_products.largest,
        dense_in_backward=dense_in_backward,
        training_product=products.largest,
        after_training=_larger_than(4 * total, engine),
        gradients=[name for name, p in engine.model.named_parameters() if p.grad is not None],
        state_bytes=engine.optimizer_state_bytes(),
        payload=collectives.others / NUM_STEPS,
        gathers=collectives.weights / NUM_STEPS,
    )


def _watched_backward(entries: SelectedEntries, batches: Batches) -> tuple[list[str], Products]:
    """A step's backward passes; what the process holds at the end of each layer's."""
    engine, seen, products = entries.engine, [], Products()
    sinks: Sequence[Sink] = [_looking(sink, engine, seen) for sink in entries.sinks()]
    engine.model.train()
    with entries.layers.sinks(sinks), products:
        for i, batch in enumerate(batches.micro_batches(0)):
            model = engine.module(deliver=i == NUM_MICRO_BATCHES - 1)
            engine.backward(chunked_answer_loss(model, batch))
    assert engine.step()
    entries.write_back()
    return seen, products


Accounts = dict[int, list[Account]]
"""By K and rank."""


@pytest.fixture(scope="module")
def accounts() -> Accounts:
    """Each K in processes of its own, as an engine that was once made stays alive."""
    return {total: run_ranks(WORLD_SIZE, _account, total) for total in (FEW, MANY)}


@pytest.mark.parametrize("total", [FEW, MANY])
def test_calibration_holds_its_ranges_and_two_products_and_training_nothing_dense(accounts, total):
    """Beside the model's own weights."""
    for account in accounts[total]:
        looking = account.calibration
        assert len(looking.dense) == NUM_TARGETS * NUM_CALIBRATION_PASSES
        assert all(len(product) == 1 for product in looking.dense), [
            product for product in looking.dense if len(product) != 1
        ]
        # One on its way, and the next layer's, which the last of a backward does not have.
        alive = [len(products) for products in looking.dense_on_the_way]
        assert alive == ([2] * (NUM_TARGETS - 1) + [1]) * NUM_CALIBRATION_PASSES
        parts = [len(tensors) - NUM_TARGETS for tensors in looking.parts]
        assert parts == [1 + products for products in alive], "ranges, products, one sum"
        assert account.dense_in_backward == []
        assert account.calibration_product >= TARGET_SIZE, "the recorder sees products"
        assert account.training_product < PARTITION
        assert account.after_training == []
        assert account.gradients == []
        assert account.state_bytes == 12 * total / WORLD_SIZE


def test_what_crosses_the_network_is_proportional_to_the_selected_entries(accounts):
    """Gradients out and values back, 4 bytes each; gathers of weights carry the values along."""
    for few, many in zip(accounts[FEW], accounts[MANY], strict=True):
        assert (many.payload - few.payload) / (MANY - FEW) == pytest.approx(8)
        assert 8 * FEW <= few.payload <= 8 * FEW + 300, "and a few numbers"
        # Once for each forward and each backward pass.
        assert (many.gathers - few.gathers) / (MANY - FEW) <= 8 * NUM_MICRO_BATCHES
        assert few.gathers >= 4 * TARGET_SIZE, "the counter sees the weights"
