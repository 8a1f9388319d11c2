"""Where a sum of gradients waits, what weighs it, what it holds; the sums: test_calibrate.py's."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gem_ds.calibration.gradients import (
    GradientSink,
    ShardReducer,
    auto_buffer_gb,
    buffered_layers,
)
from gem_ds.distributed.comm import Comm
from gem_ds.sparse.layers import TargetLayer

ALONE = Comm(torch.device("cpu"))


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


def test_a_reduction_is_waited_for_when_the_next_begins():
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


@pytest.mark.parametrize("statistic", ["sum", "magnitudes", "squares"])
def test_both_sinks_weigh_each_micro_batch_by_its_scale(statistic):
    of_each = {"sum": lambda g: g, "magnitudes": torch.abs, "squares": torch.square}[statistic]
    layer, reducer = TargetLayer("weight", nn.Linear(5, 4)), ShardReducer(ALONE)
    plain, buffered = (
        GradientSink(layer, reducer, 20, torch.zeros(20), is_buffered, statistic)
        for is_buffered in (False, True)
    )
    expected = torch.zeros(4, 5, dtype=torch.float64)
    for scale in (1.0, 0.0, 3 / 1024):
        dy, x = torch.randn(7, 4), torch.randn(7, 5)
        plain.scale = buffered.scale = scale
        plain(dy, x)
        buffered(dy, x)
        plain.scale = float("nan")  # a sum on its way keeps the scale that it came with
        expected += of_each(scale * (dy.double().t() @ x.double()))
    reducer.finish()
    for sink in (plain, buffered):
        torch.testing.assert_close(sink.take(), expected.flatten().float())


def test_on_one_rank_the_buffer_is_the_result():
    """No copy of a matrix is made."""
    whole = torch.zeros(20)
    layer = TargetLayer("weight", nn.Linear(5, 4))
    sink = GradientSink(layer, ShardReducer(ALONE), 20, whole, is_buffered=True)
    assert sink.take().data_ptr() == whole.data_ptr()


@pytest.mark.parametrize(
    ("world_size", "num_bytes", "expected"),
    [
        (1, 0, {0, 1, 2, 3}),  # the range is the whole matrix
        (2, 0, set()),
        (2, 79, set()),
        (2, 80, {1}),  # the smallest, the first of equals
        (2, 560, {0, 1, 3}),
        (3, 560, {1, 3}),  # of three ranks two others' ranges are held too
        (2, 960, {0, 1, 2, 3}),
    ],
)
def test_as_many_layers_are_buffered_as_fit(world_size, num_bytes, expected):
    assert buffered_layers([100, 20, 100, 20], world_size, (num_bytes + 0.5) / 1e9) == expected


def test_a_buffer_by_itself_takes_half_of_what_the_statistics_leave():
    assert auto_buffer_gb(5e9 + 480, [100, 20]) == pytest.approx(2.5)
    assert auto_buffer_gb(400, [100, 20]) == 0
