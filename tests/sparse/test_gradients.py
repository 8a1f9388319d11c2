"""The sums of gradients: buffered or not they are the oracle's, and what they hold and send."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from gem_ds.data.batches import Batches
from gem_ds.distributed.comm import Comm
from gem_ds.distributed.process_group import init_distributed
from gem_ds.models.targets import find_targets
from gem_ds.sparse.calibrate import sum_gradients
from gem_ds.sparse.gradients import BufferedSink, ShardReducer, ShardSink, buffered_layers
from gem_ds.sparse.layers import TargetLayer
from tests import oracle
from tests.ranks import run_ranks
from tests.tiny import (
    PAD_TOKEN_ID,
    Setting,
    make_engine,
    make_model,
    naive_examples,
    naive_loss,
    random_examples,
    summed_loss_of,
)

pytestmark = pytest.mark.slow  # starts engines or programs

NUM_EXAMPLES = 17
NUM_STEPS = {1: 3, 2: 2}  # of two micro-batches of up to three examples on each rank
ARCHITECTURE = "llama"  # query weights of 200 entries, value weights of 40; two of each
SOME = 0.6e-6  # gigabytes: room for both value weights, and for one of the query weights on 2 ranks

Tensors = dict[str, Tensor]


class Traffic:
    """A rank's reductions of gradients: what is handed over, and what is on its way together."""

    def __init__(self, comm: Comm) -> None:
        self.lengths: list[int] = []
        self.under_way = self.most = 0
        self._start = comm.start_reduce_scatter

    def start_reduce_scatter(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Count."""
        self.lengths.append(tensor.numel())
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        wait = self._start(tensor)

        def counting_wait() -> Tensor:
            self.under_way -= 1
            return wait()

        return counting_wait


@dataclass
class Outcome:
    """One calibration.

    Attributes:
        gradients: by weight name the ranks' statistics put together, flat.
        lengths: of what was reduced, in order.
        most: reductions on their way together.
        left: reductions still on their way at the end.
        num_buffered: layers.
    """

    gradients: Tensors
    lengths: list[int]
    most: int
    left: int
    num_buffered: int


@contextmanager
def _watched(comm: Comm) -> Iterator[Traffic]:
    traffic = Traffic(comm)
    with mock.patch.object(comm, "start_reduce_scatter", traffic.start_reduce_scatter):
        yield traffic


def _outcome(comm: Comm, setting: Setting, buffer_gb: float) -> Outcome:
    engine, layers = make_engine(setting, comm, make_model(ARCHITECTURE, setting.torch_dtype), 61)
    batches = Batches(
        random_examples(NUM_EXAMPLES),
        comm,
        global_batch_size=6 * comm.world_size,
        micro_batch_size=3,
        seed=0,
        pad_token_id=PAD_TOKEN_ID,
    )
    assert batches.steps_per_epoch == NUM_STEPS[comm.world_size]
    summed_loss = summed_loss_of(ARCHITECTURE)
    with _watched(comm) as traffic:
        shards = sum_gradients(engine, layers, batches, summed_loss, buffer_gb=buffer_gb)
    assert all(parameter.grad is None for parameter in engine.model.parameters())
    named = zip(layers, shards, strict=True)
    partitions = [engine.weights.partition_size(layer.weight) for layer in layers]
    return Outcome(
        gradients={layer.name: torch.cat(comm.all_gather(shard)) for layer, shard in named},
        lengths=traffic.lengths,
        most=traffic.most,
        left=traffic.under_way,
        num_buffered=len(buffered_layers(partitions, comm.world_size, buffer_gb)),
    )


def _outcomes() -> dict[str, Outcome]:
    comm = init_distributed()
    settings = (Setting(3), Setting(2, "bf16"))
    return {
        f"{setting} {buffer_gb:g}": _outcome(comm, setting, buffer_gb)
        for setting in settings
        for buffer_gb in (0.0, SOME, 1.0)
    }


@pytest.fixture(scope="module")
def outcomes() -> Callable[[int, Setting, float], list[Outcome]]:
    """World size, kind of engine and buffer -> what each rank found."""
    run = functools.cache(lambda size: run_ranks(size, _outcomes))
    return lambda size, setting, gb: [found[f"{setting} {gb:g}"] for found in run(size)]


def _error(gradients: Tensors, expected: Tensors) -> float:
    """The largest, relative to the largest entry of its matrix."""
    return max(
        float((gradients[name].flatten() - g.flatten()).abs().max() / g.abs().max())
        for name, g in expected.items()
    )


@pytest.mark.parametrize("buffer_gb", [0.0, SOME, 1.0])
@pytest.mark.parametrize("world_size", [1, 2])
class TestSums:
    """Each size of the buffer gives the same sums, and takes what it says."""

    def test_are_the_oracles(self, outcomes: Callable, world_size: int, buffer_gb: float) -> None:
        model = make_model(ARCHITECTURE).eval()
        examples = naive_examples(random_examples(NUM_EXAMPLES), range(NUM_EXAMPLES))
        names = list(find_targets(model))
        expected = oracle.summed_gradients(model, examples, naive_loss, names)
        for outcome in outcomes(world_size, Setting(3), buffer_gb):
            assert list(outcome.gradients) == names
            assert _error(outcome.gradients, expected) <= 1e-5

    def test_of_bf16_are_those_without_a_buffer_but_for_the_rounding_of_fp32(
        self, outcomes: Callable, world_size: int, buffer_gb: float
    ) -> None:
        setting = Setting(2, "bf16")
        plain = outcomes(world_size, setting, 0.0)[0].gradients
        for outcome in outcomes(world_size, setting, buffer_gb):
            assert all(gradient.dtype == torch.float32 for gradient in outcome.gradients.values())
            assert _error(outcome.gradients, plain) <= 1e-5

    def test_cross_the_network_once_where_they_are_buffered(
        self, outcomes: Callable, world_size: int, buffer_gb: float
    ) -> None:
        num_buffered = {0.0: 0, SOME: 3, 1.0: 4}[buffer_gb]
        if world_size == 1:
            num_buffered = 4  # the range is the whole matrix
        num_passes = 2 * NUM_STEPS[world_size]
        for outcome in outcomes(world_size, Setting(3), buffer_gb):
            assert outcome.num_buffered == num_buffered
            assert len(outcome.lengths) == num_buffered + (4 - num_buffered) * num_passes
            assert outcome.left == 0

    def test_are_on_their_way_one_at_a_time(
        self, outcomes: Callable, world_size: int, buffer_gb: float
    ) -> None:
        for outcome in outcomes(world_size, Setting(3), buffer_gb):
            assert outcome.most == 1


class Later(Comm):
    """One rank whose network answers when it is asked to, which is recorded."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.events: list[str] = []

    def start_reduce_scatter(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begin."""
        number = len(self.events)
        self.events.append(f"start {number}")

        def wait() -> Tensor:
            self.events.append(f"wait {number}")
            return tensor

        return wait


def test_a_reduction_is_waited_for_when_the_next_begins() -> None:
    """So that the backward of the next layer runs meanwhile."""
    comm = Later()
    reducer, shard = ShardReducer(comm), torch.zeros(2)
    reducer.finish()  # nothing is on its way
    reducer.add(shard, torch.tensor([1.0, 2.0, 99.0]), 1.0)
    assert comm.events == ["start 0"]
    assert shard.tolist() == [0, 0]
    reducer.add(shard, torch.tensor([10.0, 20.0, 99.0]), 0.5)
    assert comm.events == ["start 0", "wait 0", "start 2"]
    assert shard.tolist() == [1, 2]
    reducer.finish()
    reducer.finish()
    assert comm.events == ["start 0", "wait 0", "start 2", "wait 2"]
    assert shard.tolist() == [6, 12]


def test_both_sinks_weigh_each_micro_batch_by_its_scale() -> None:
    comm = Comm(torch.device("cpu"))
    layer = TargetLayer("w", nn.Linear(5, 4))
    reducer = ShardReducer(comm)
    plain = ShardSink(layer, reducer, partition_size=20, shard=torch.zeros(20))
    buffered = BufferedSink(layer, comm, whole=torch.zeros(20), length=20)
    expected = torch.zeros(4, 5, dtype=torch.float64)
    for scale in (1.0, 0.0, 3 / 1024):
        dy, x = torch.randn(7, 4), torch.randn(7, 5)
        plain.scale = buffered.scale = scale
        plain(dy, x)
        buffered(dy, x)
        plain.scale = float("nan")  # a sum on its way keeps the scale that it came with
        expected += scale * (dy.double().t() @ x.double())
    reducer.finish()
    for sink in (plain, buffered):
        torch.testing.assert_close(sink.take(), expected.flatten().float())


def test_on_one_rank_the_buffer_is_the_result() -> None:
    """No copy of a matrix is made."""
    whole = torch.zeros(20)
    sink = BufferedSink(TargetLayer("w", nn.Linear(5, 4)), Comm(torch.device("cpu")), whole, 20)
    assert sink.take().data_ptr() == whole.data_ptr()
