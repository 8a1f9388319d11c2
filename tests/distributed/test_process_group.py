"""Joining the process group and leaving it, and what DeepSpeed leaves behind on a CPU."""

import os
import threading
import time
from unittest import mock

import pytest
import torch

from gem_ds.distributed import process_group
from gem_ds.distributed.comm import is_joined
from gem_ds.distributed.process_group import init_distributed, leave_distributed
from tests.ranks import VARIABLES, run_ranks


def _without_a_launcher() -> list[tuple[int, int, int]]:
    for name in VARIABLES:
        del os.environ[name]
    seen = []
    for _ in range(2):  # a process may leave one group and join another
        comm = init_distributed()
        total = comm.all_reduce(torch.ones(1), "sum")
        seen.append((comm.rank, comm.world_size, int(total)))
        leave_distributed()
        assert os.environ.keys().isdisjoint(VARIABLES), (
            "a later program would think it was launched"
        )
        assert not is_joined()
    leave_distributed()  # nothing to leave
    return seen


def test_one_process_needs_no_launcher():
    assert run_ranks(1, _without_a_launcher) == [[(0, 1, 1)] * 2]


def _in_a_group_of_the_caller() -> int:
    torch.distributed.init_process_group("gloo")  # noqa: TID251
    comm = init_distributed()
    leave_distributed()
    assert os.environ.keys() >= set(VARIABLES)
    return int(comm.all_reduce(torch.ones(1), "sum"))


def test_a_group_of_the_caller_stays():
    assert run_ranks(2, _in_a_group_of_the_caller) == [2, 2]


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_several_processes_without_ranks_are_refused(name, monkeypatch):
    """Each would believe that it is alone."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(name, "2")
    with pytest.raises(ValueError, match="start them with deepspeed or torchrun"):
        process_group.init_distributed()


def _gpus(number: int, monkeypatch: pytest.MonkeyPatch) -> tuple[mock.Mock, mock.Mock]:
    """What DeepSpeed would be to rank 3 on a machine that shows it so many GPUs."""
    accelerator = mock.Mock(
        **{
            "device_name.return_value": "cuda",
            "device_count.return_value": number,
            "current_device_name.return_value": "meta",
        }
    )
    deepspeed = mock.Mock(**{"accelerator.get_accelerator.return_value": accelerator})
    monkeypatch.setattr(process_group, "load_deepspeed", lambda: deepspeed)
    monkeypatch.setenv("RANK", "3")
    return accelerator, deepspeed


def test_the_only_process_of_a_machine_need_not_be_told_so(monkeypatch):
    """A pod of Kubernetes; of several GPUs nobody knows which is meant."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    accelerator, _ = _gpus(1, monkeypatch)
    init_distributed()
    leave_distributed()
    accelerator.set_device.assert_called_once_with(0)
    assert "LOCAL_RANK" not in os.environ
    _gpus(8, monkeypatch)
    with pytest.raises(ValueError, match="set LOCAL_RANK to the number of the process on its ma"):
        init_distributed()


@pytest.mark.parametrize(("visible", "taken"), [(1, 0), (4, 3)])
def test_a_process_that_sees_one_gpu_takes_that(visible, taken, monkeypatch):
    """As Slurm shows them with --gpus-per-task 1; DeepSpeed too goes by LOCAL_RANK."""
    seen: list[str] = []
    accelerator, deepspeed = _gpus(visible, monkeypatch)
    deepspeed.init_distributed = lambda *_, **__: seen.append(os.environ["LOCAL_RANK"])
    monkeypatch.setenv("LOCAL_RANK", "3")
    init_distributed()
    leave_distributed()
    accelerator.set_device.assert_called_once_with(taken)
    assert seen == [str(taken)]
    assert os.environ["LOCAL_RANK"] == "3", "what this process was told"


@pytest.mark.parametrize("age", [0, 60, 3600])
def test_a_lock_is_waited_for_until_it_is_too_old_to_be_held(age, tmp_path, monkeypatch, capsys):
    """In silence where the other process is only loading what has been compiled."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py3_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - age,) * 2)
    other = threading.Timer(0.5, lock.unlink)
    if age < 600:
        other.start()
    process_group._wait_for_locks(is_telling=True)
    assert not lock.exists()
    assert not other.is_alive()
    assert (str(lock) in capsys.readouterr().err) == (age == 60)
