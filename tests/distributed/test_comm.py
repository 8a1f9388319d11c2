"""What ranks say to each other: three of them against plain sums, and one that talks to nobody."""

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from gem_ds.distributed.comm import Comm
from gem_ds.distributed.memory import _left_to_groups, free_bytes
from gem_ds.distributed.process_group import init_distributed
from gem_ds.errors import PeerError
from tests.ranks import RankError, run_ranks

RANKS = range(3)


def _of_rank(rank: int, dtype: torch.dtype) -> Tensor:
    """Six numbers of a rank; int64 ones too large for a float, fp32 ones whose sums are exact."""
    if dtype == torch.int64:
        return torch.tensor([2**60, -(2**60), 0, 1, -1, 7]) * (rank + 1) + rank
    return torch.tensor([0.5, -0.25, 0.0, 3.0, -1e6, 2.0**100]) * (rank + 1)


def _reductions(comm: Comm) -> None:
    own = slice(2 * comm.rank, 2 * comm.rank + 2)
    for dtype in (torch.int64, torch.float32):
        parts = [_of_rank(rank, dtype) for rank in RANKS]
        mine = parts[comm.rank].clone()
        assert torch.equal(comm.all_reduce(mine, "sum"), sum(parts))
        assert torch.equal(mine, sum(parts)), "in place"
        largest = comm.all_reduce(parts[comm.rank].clone(), "max")
        assert torch.equal(largest, torch.stack(parts).amax(0))
        assert torch.equal(comm.reduce_scatter(parts[comm.rank].clone()), sum(parts)[own])
        waits = [comm.start_reduce_scatter(parts[comm.rank] * 2**i) for i in range(3)]
        assert comm.largest(comm.rank) == 2, "others may speak meanwhile"
        for i, wait in enumerate(waits):
            assert torch.equal(wait(), (sum(parts) * 2**i)[own])
        reduce = torch.distributed.reduce_scatter_tensor  # noqa: TID251
        with mock.patch("torch.distributed.reduce_scatter_tensor", wraps=reduce) as called:
            with comm.reducing_apart():
                assert torch.equal(comm.reduce_scatter(parts[comm.rank].clone()), sum(parts)[own])
            assert torch.equal(comm.reduce_scatter(parts[comm.rank].clone()), sum(parts)[own])
        apart, together = (call.kwargs["group"] for call in called.call_args_list)
        assert apart is not None, "a group that no other collective stands in line of"
        assert together is None
    with pytest.raises(AssertionError, match=r"7 entries.*3 ranks"):
        comm.reduce_scatter(torch.zeros(7))


def _gathers(comm: Comm) -> None:
    for dtype in (torch.int64, torch.float32, torch.bfloat16):
        for lengths in ([4, 0, 1], [0, 0, 5], [0, 0, 0], [2, 2, 2]):
            parts = [(torch.arange(n) + 10 * rank).to(dtype) for rank, n in enumerate(lengths)]
            gathered = comm.gather(parts[comm.rank])
            expected = parts if comm.is_main else []
            assert [part.tolist() for part in gathered] == [part.tolist() for part in expected]
            assert all(part.dtype == dtype for part in gathered)
        shards = [(torch.arange(3) + 10 * rank).to(dtype) for rank in RANKS]
        assert torch.equal(comm.gather_shards(shards[comm.rank]), torch.cat(shards))


def _objects(comm: Comm) -> None:
    value = {"rank": comm.rank, "budget": [2**70, comm.rank]}
    assert comm.broadcast_object(value) == {"rank": 0, "budget": [2**70, 0]}
    assert comm.gather_objects([comm.rank] * comm.rank) == [[], [1], [2, 2]]
    assert all(comm.any(comm.rank == rank) for rank in RANKS)
    assert not comm.any(False)
    assert comm.largest(2**60 + comm.rank) == 2**60 + 2
    assert comm.largest(-5 - comm.rank) == -5


def _raises(comm: Comm, error: Exception | None) -> Exception | None:
    """What leaves ``comm.agreement`` on this rank, if ``error`` is raised in it."""
    try:
        with comm.agreement():
            if error is not None:
                raise error
    except Exception as caught:
        return caught
    return None


def _agreements(comm: Comm) -> None:
    assert _raises(comm, None) is None
    for culprit in RANKS:
        error = _raises(comm, ValueError("Lower the density.") if comm.rank == culprit else None)
        if comm.rank == 0:  # tells the user, whosever error it is
            assert type(error) is ValueError
            assert "Lower the density." in str(error)
        else:
            assert type(error) is PeerError
            assert f"Rank {culprit}" in str(error)
    defect = KeyError("no such layer") if comm.rank == 1 else None
    error = _raises(comm, defect)
    assert (error is defect) if comm.rank == 1 else (error is not None)
    error = _raises(comm, OSError(f"disk {comm.rank} is full"))
    assert type(error) is (OSError if comm.rank == 0 else PeerError)
    assert comm.largest(comm.rank) == 2, "the ranks go on together"


def _speak() -> None:
    comm = init_distributed()
    for check in (_reductions, _gathers, _objects, _agreements, _free_memory):
        check(comm)
    named = Path("/dev/shm").glob(f"deepspeed_*_{os.environ['MASTER_PORT']}_*")
    assert not list(named), "shared memory would outlive the ranks"


def _free_memory(comm: Comm) -> None:
    """The ranks of a host share what it has; the least of what they find is all ranks'."""
    available = 1000 - 30 * comm.rank
    with mock.patch("gem_ds.distributed.memory._available_bytes", return_value=available):
        assert free_bytes(comm) == 940 // 3
        with mock.patch("socket.gethostname", return_value=f"host {comm.rank > 0}"):
            assert free_bytes(comm) == 940 // 2
    assert 0 < 3 * free_bytes(comm) < 2**50


def test_what_torch_holds_in_reserve_on_a_gpu_is_free():
    comm: Any = SimpleNamespace(device=torch.device("cuda"), largest=lambda value: value)
    numbers = {"mem_get_info": (700, 1000), "memory_reserved": 250, "memory_allocated": 200}
    found = {name: mock.Mock(return_value=value) for name, value in numbers.items()}
    with mock.patch.multiple(torch.cuda, **found):
        assert free_bytes(comm) == 750


def test_three_ranks():
    run_ranks(len(RANKS), _speak)


def test_one_rank_talks_to_nobody():
    comm = Comm(torch.device("cpu"))
    assert (comm.rank, comm.world_size, comm.is_main) == (0, 1, True)
    tensor = torch.tensor([1, 2, 3])
    assert torch.equal(comm.all_reduce(tensor.clone(), "sum"), tensor)
    assert torch.equal(comm.reduce_scatter(tensor.clone()), tensor)
    assert comm.start_reduce_scatter(tensor)() is tensor
    assert comm.gather_shards(tensor) is tensor
    assert [part.tolist() for part in comm.gather(tensor)] == [[1, 2, 3]]
    assert (comm.broadcast_object("word"), comm.gather_objects("word")) == ("word", ["word"])
    assert (comm.any(True), comm.any(False), comm.largest(-3)) == (True, False, -3)
    for error in (None, ValueError("too small"), KeyError("layer"), OSError("full")):
        assert _raises(comm, error) is error


# What the other test files rely on: no rank that fails can hang a test.


def _fails_before_a_collective() -> None:
    comm = init_distributed()
    if comm.rank == 1:
        raise ValueError("only I am wrong")
    comm.any(False)


@pytest.mark.parametrize(
    ("message", "timeout", "function", "args"),
    [
        ("rank 1 of 2.*ValueError: only I am wrong", 20, _fails_before_a_collective, ()),
        ("rank . of 2: died with exit code 7", 20, os._exit, (7,)),
        ("did not return within 1", 1, time.sleep, (60,)),
    ],
)
def test_ranks_that_fail_are_reported_and_ended(message, timeout, function, args):
    start = time.monotonic()
    with pytest.raises(RankError, match=f"(?s){message}"):
        run_ranks(2, function, *args, timeout=timeout)
    assert time.monotonic() - start < 15


def test_a_containers_limit_is_what_is_left_of_the_host(tmp_path):
    """Also that of the group around its own; a group without one has the word max, or no file."""
    for group, limit, taken in (("", None, 0), ("a", "1000", 300), ("a/b", "max", 100)):
        folder = tmp_path / group
        folder.mkdir(exist_ok=True)
        if limit is not None:
            (folder / "memory.max").write_text(f"{limit}\n")
            (folder / "memory.current").write_text(f"{taken}\n")
    assert list(_left_to_groups(tmp_path, "/a/b")) == [700]
    (tmp_path / "a/b/memory.max").write_text("50\n")
    assert list(_left_to_groups(tmp_path, "/a/b")) == [0, 700]
    assert list(_left_to_groups(tmp_path, "/")) == []
