"""Joining the process group and leaving it, through DeepSpeed.

On a CPU DeepSpeed compiles an op for the ranks of one machine and gives each shared memory; what it
leaves behind, a lock and named buffers, is cleared away here.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, redirect_stdout, suppress
from io import StringIO
from pathlib import Path

import torch
from torch.utils.cpp_extension import get_default_build_root

from gem_ds.distributed.comm import Comm, collective_timeout, free_port, is_joined
from gem_ds.distributed.weights import load_deepspeed

#: Where launchers that set no RANK say how many processes they have started.
_NUM_PROCESSES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")

#: Seconds. A rank that loads the op holds the lock for less than the one; compiling takes a minute.
_SHORT_LOCK, _OLD_LOCK = 5, 600

#: Undoes what joining has changed in this process, which may go on.
_leaving = ExitStack()


def init_distributed() -> Comm:
    """Join the process group that the launcher describes, or form one of a single process."""
    if "RANK" not in os.environ:
        if any(int(os.environ.get(name, 1)) > 1 for name in _NUM_PROCESSES):
            raise ValueError(
                "Several processes and no RANK: start them with deepspeed or torchrun, under Slurm "
                "one torchrun on each node."
            )
        own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        own["MASTER_PORT"] = str(free_port())
        os.environ.update(own)
        _leaving.callback(_unset, own)
    deepspeed = load_deepspeed()
    deepspeed.utils.logger.setLevel(logging.ERROR)  # it warns of our optimizer, on each rank
    accelerator = deepspeed.accelerator.get_accelerator()
    if accelerator.device_name() == "cpu":
        _wait_for_locks(is_telling=os.environ.get("LOCAL_RANK", "0") == "0")
    else:
        if "LOCAL_RANK" not in os.environ:  # as where each machine, or pod, has one process
            if accelerator.device_count() > 1:
                raise ValueError(
                    "RANK is set, LOCAL_RANK is not, and there are several GPUs: set LOCAL_RANK to "
                    "the number of the process on its machine."
                )
            os.environ["LOCAL_RANK"] = "0"
            _leaving.callback(_unset, {"LOCAL_RANK": "0"})
        if accelerator.device_count() == 1 and os.environ["LOCAL_RANK"] != "0":
            # A scheduler shows each process its own GPU alone. DeepSpeed compares both.
            for name in {"LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"} & os.environ.keys():
                _leaving.callback(os.environ.update, {name: os.environ[name]})
                os.environ[name] = "0"
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    was_joined = is_joined()
    with redirect_stdout(StringIO()):  # each rank would print that it has built an op
        deepspeed.init_distributed(
            accelerator.communication_backend_name(),
            verbose=False,
            timeout=collective_timeout(),
        )
    if not was_joined:
        _leaving.callback(_destroy)
    comm = Comm(torch.device(accelerator.current_device_name()))
    if comm.device.type == "cpu":
        _unlink_buffer(comm)
    return comm


def _unlink_buffer(comm: Comm) -> None:
    """Take the name of DeepSpeed's shared memory away: 66 MiB a rank would outlive the process."""
    comm.any(False)  # every rank has mapped those of all, and keeps them
    group = f"{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}"
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{group}_{comm.rank}").unlink(missing_ok=True)


def _wait_for_locks(*, is_telling: bool) -> None:
    """On a CPU torch compiles an op at the first start, behind a lock that a killed process leaves.

    torch would wait for ever and say nothing. A lock older than any compilation is deleted.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    for lock in Path(root).glob("**/deepspeed_shm_comm/lock"):
        with suppress(FileNotFoundError):  # released, or deleted by another rank
            while (age := time.time() - lock.stat().st_mtime) < _OLD_LOCK:
                if is_telling and age > _SHORT_LOCK:
                    is_telling = False
                    told = "Waiting for the process that compiles deepspeed_shm_comm"
                    print(f"{told}; if there is none, delete {lock}", file=sys.stderr)
                time.sleep(1)
            lock.unlink()


def leave_distributed() -> None:
    """Undo what joining has done, so that this process may join another group."""
    _leaving.close()  # a group that was there before is the caller's and stays


def _destroy() -> None:
    comm = load_deepspeed().comm  # which forgets the group too
    if comm.is_initialized():
        comm.destroy_process_group()


def _unset(variables: Mapping[str, str]) -> None:
    """A later program of this process is under no launcher either."""
    for name, value in variables.items():
        if os.environ.get(name) == value:
            del os.environ[name]
