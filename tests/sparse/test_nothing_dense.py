"""What a rank holds and sends while it trains is of the size of the selected entries.

With ZeRO-3 on two ranks, the process is walked for every tensor alive, and every collective is
counted where torch hands it to the network.

DeepSpeed's communication buckets are as large as the configuration asks for, whatever is trained;
they are made small here. A tensor that only C++ holds cannot be walked to; a dense gradient would
be a product of matrices first, and those are recorded too.
"""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.steps.traffic import Collectives, tensors_in
from gem_ds.data.batches import Batches
from gem_ds.distributed.comm import Comm
from gem_ds.distributed.engine import Engine
from gem_ds.distributed.process_group import init_distributed
from gem_ds.models.loss import chunked_answer_loss
from gem_ds.sparse.calibrate import calibrate
from gem_ds.sparse.entries import SelectedEntries, gather_indices
from gem_ds.sparse.layers import Sink, TargetLayers
from tests.ranks import run_ranks
from tests.tiny import PAD_TOKEN_ID, Setting, fit_entries, make_engine, random_examples

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


# What is alive


def _storages() -> dict[int, tuple[int, str]]:
    """Of all tensors that Python knows: where each storage lies -> its bytes and a description."""
    found = {}
    gc.collect()  # what only waits to be freed does not count
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are looked at
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        for tensor in tensors:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = (storage.nbytes(), f"{tensor.dtype} {tuple(tensor.shape)}")
    return found


def _weight_storages(engine: Engine) -> set[int]:
    """Where the model's own weights lie: partitions, and what is gathered at the moment."""
    places = set()
    for parameter in engine.model.parameters():
        for tensor in (parameter.data, parameter.ds_tensor.data):  # type: ignore[attr-defined]
            if parameter is not engine.vectors[0].values:
                places.add(tensor.untyped_storage().data_ptr())
    return places


def _larger_than(num_bytes: float, engine: Engine) -> list[str]:
    """Storages of more than so many bytes that are not the model's weights."""
    weights = _weight_storages(engine)
    return [
        f"{size} bytes, seen as {description}"
        for place, (size, description) in _storages().items()
        if size > num_bytes and place not in weights
    ]


# What is computed


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
    """What one rank found.

    Attributes:
        dense_in_calibration: what is of the size of a target or more, each time that a layer's
            gradient is handed to the network.
        dense_on_the_way: the same, each time that one has arrived.
        parts_in_calibration: what is of the size of a partition or more then.
        calibration_product: entries of the largest product of matrices in calibration.
        dense_in_backward: what is of the size of a partition or more inside a backward of training.
        training_product: entries of the largest product of matrices in training.
        after_training: what is larger than [K] in fp32 after training.
        gradients: parameters that hold a gradient after training.
        state_bytes: masters and moments on this rank.
        payload: bytes per step in collectives other than weight gathers.
        gathers: bytes per step in weight gathers, which gather the selected values too.
    """

    dense_in_calibration: list[list[str]]
    dense_on_the_way: list[list[str]]
    parts_in_calibration: list[list[str]]
    calibration_product: int
    dense_in_backward: list[str]
    training_product: int
    after_training: list[str]
    gradients: list[str]
    state_bytes: int
    payload: float
    gathers: float


class Looking:
    """A rank's Comm that looks at the process whenever it reduces a layer's gradient."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.dense: list[list[str]] = []
        self.dense_on_the_way: list[list[str]] = []
        self.parts: list[list[str]] = []
        self._start = engine.comm.start_reduce_scatter

    def start_reduce_scatter(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Look, then begin to reduce; look again before the result is used."""
        self.dense.append(_larger_than(4 * TARGET_SIZE - 1, self.engine))
        wait = self._start(tensor)

        def look_and_wait() -> Tensor:
            self.dense_on_the_way.append(_larger_than(4 * TARGET_SIZE - 1, self.engine))
            self.parts.append(_larger_than(4 * PARTITION - 1, self.engine))
            return wait()

        return look_and_wait


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


def _batches(comm: Comm) -> Batches:
    return Batches(
        random_examples(8),
        comm,
        global_batch_size=NUM_MICRO_BATCHES * WORLD_SIZE,
        micro_batch_size=1,
        seed=0,
        pad_token_id=PAD_TOKEN_ID,
    )


def _account(total: int) -> Account:
    gc.freeze()  # what importing has made is not walked
    comm = init_distributed()
    engine, layers = make_engine(Setting(3), comm, _model(), total)
    batches, looking, calibration_products = _batches(comm), Looking(engine), Products()
    watched = mock.patch.object(comm, "start_reduce_scatter", looking.start_reduce_scatter)
    with watched, calibration_products:
        selection = calibrate(engine, layers, batches, chunked_answer_loss, total)
    indices = gather_indices(selection.indices, comm)
    del selection
    entries = SelectedEntries(engine, layers, indices, kernel="library")  # auto: by tiles, of 4 MiB
    del indices
    entries.start_from_weights()
    dense_in_backward, products = _watched_backward(engine, layers, entries, batches)
    collectives = Collectives()
    with collectives.counted():
        fit_entries(entries, batches, NUM_STEPS)
    return Account(
        dense_in_calibration=looking.dense,
        dense_on_the_way=looking.dense_on_the_way,
        parts_in_calibration=looking.parts,
        calibration_product=calibration_products.largest,
        dense_in_backward=dense_in_backward,
        training_product=products.largest,
        after_training=_larger_than(4 * total, engine),
        gradients=[name for name, p in engine.model.named_parameters() if p.grad is not None],
        state_bytes=engine.optimizer_state_bytes(),
        payload=collectives.others / NUM_STEPS,
        gathers=collectives.weights / NUM_STEPS,
    )


def _watched_backward(
    engine: Engine, layers: TargetLayers, entries: SelectedEntries, batches: Batches
) -> tuple[list[str], Products]:
    """A step's backward passes; what the process holds at the end of each layer's."""
    seen: list[str] = []
    sinks: Sequence[Sink] = [_looking(sink, engine, seen) for sink in entries.sinks()]
    products = Products()
    engine.model.train()
    with layers.sinks(sinks), products:
        for i, batch in enumerate(batches.micro_batches(0)):
            engine.backward(
                functools.partial(chunked_answer_loss, batch=batch),
                deliver=i == NUM_MICRO_BATCHES - 1,
            )
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
class TestMemory:
    """What a rank holds beside the model's own weights."""

    def test_calibration_holds_its_ranges_and_two_products(
        self, accounts: Accounts, total: int
    ) -> None:
        for account in accounts[total]:
            assert len(account.dense_in_calibration) == NUM_TARGETS * NUM_CALIBRATION_PASSES
            assert all(len(product) == 1 for product in account.dense_in_calibration)
            # One on its way, and the next layer's, which the last of a backward does not have.
            alive = [len(products) for products in account.dense_on_the_way]
            assert alive == ([2] * (NUM_TARGETS - 1) + [1]) * NUM_CALIBRATION_PASSES
            parts = [len(tensors) - NUM_TARGETS for tensors in account.parts_in_calibration]
            assert parts == [1 + products for products in alive], "ranges, products, one sum"

    def test_backward_of_training_holds_nothing_of_the_size_of_a_partition(
        self, accounts: Accounts, total: int
    ) -> None:
        for account in accounts[total]:
            assert account.dense_in_backward == []

    def test_training_computes_no_dense_gradient(self, accounts: Accounts, total: int) -> None:
        for account in accounts[total]:
            assert account.calibration_product >= TARGET_SIZE, "the recorder sees products"
            assert account.training_product < PARTITION

    def test_nothing_larger_than_the_selected_entries_stays(
        self, accounts: Accounts, total: int
    ) -> None:
        for account in accounts[total]:
            assert account.after_training == []
            assert account.gradients == []

    def test_optimizer_state(self, accounts: Accounts, total: int) -> None:
        for account in accounts[total]:
            assert account.state_bytes == 12 * total / WORLD_SIZE


class TestPayload:
    """What crosses the network per step."""

    def test_is_proportional_to_the_selected_entries(self, accounts: Accounts) -> None:
        """Gradients out and values back, 4 bytes each, and a few numbers."""
        for few, many in zip(accounts[FEW], accounts[MANY], strict=True):
            assert (many.payload - few.payload) / (MANY - FEW) == pytest.approx(8)
            assert 8 * FEW <= few.payload <= 8 * FEW + 300

    def test_gathers_of_weights_carry_the_values_along(self, accounts: Accounts) -> None:
        """Once for each forward and each backward pass."""
        for few, many in zip(accounts[FEW], accounts[MANY], strict=True):
            assert (many.gathers - few.gathers) / (MANY - FEW) <= 8 * NUM_MICRO_BATCHES
            assert few.gathers >= 4 * TARGET_SIZE, "the counter sees the weights"
