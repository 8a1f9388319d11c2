"""Ranks as processes: what a launcher starts, for tests of everything that needs a real network.

    results = run_ranks(2, function, argument)     # function(argument) in two processes

``function`` finds RANK, WORLD_SIZE and so on in its environment, as under any launcher, and joins
the others by :func:`distributed.process_group.init_distributed`. It has to be importable by name.

The ranks run on the CPU with one thread each, whatever the machine has. They are forked from one
server process that has imported the libraries already, which takes longer than most tests.
"""

import gc
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from typing import Any
from unittest import mock

import torch

from gem_ds.distributed.comm import free_port

CPU_ONLY = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
#: What a launcher tells of the ranks.
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PRELOADED = ["deepspeed", "gem_ds.train.main", "peft", "transformers.models.llama.modeling_llama"]
GRACE = 2.0  # seconds that the other ranks get to report too, once one has failed


class RankError(RuntimeError):
    """At least one rank failed; the message holds the tracebacks of all that did."""


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 180.0
) -> list[Any]:
    """Call ``function(*args)`` in ``world_size`` processes at once.

    Function, arguments and results go through pickle; the results come in rank order. When a rank
    raises, dies or has not returned in ``timeout`` seconds, the others are killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, CPU_ONLY):
        forkserver.ensure_running()  # it keeps the environment that it starts in
    port = free_port()
    processes: list[BaseProcess] = []
    waiting: dict[connection.Connection, int] = {}
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            environment = CPU_ONLY | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            processes.append(
                context.Process(target=_main, args=(theirs, environment, function, args))
            )
            processes[-1].start()
            theirs.close()  # so that a rank's death reads as the end of the pipe
            waiting[ours] = rank
        results = _collect(waiting, processes, timeout)
        for process in processes:
            process.join(GRACE)
        return results
    finally:
        for process in processes:
            process.kill()
            process.join()
            process.close()


def _main(
    result: connection.Connection,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    gc.freeze()  # DeepSpeed collects for each engine: what was imported need not be walked again
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:  # pickled here: torch's own way of sending a tensor shares this rank's memory
        report = pickle.dumps((True, function(*args)))
    except BaseException:
        report = pickle.dumps((False, traceback.format_exc()))
    result.send_bytes(report)
    result.close()


def _collect(
    waiting: dict[connection.Connection, int], processes: list[BaseProcess], timeout: float
) -> list[Any]:
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    while waiting:
        ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        for pipe in ready:
            assert isinstance(pipe, connection.Connection)
            rank = waiting.pop(pipe)
            try:
                succeeded, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join(GRACE)
                succeeded, value = False, f"died with exit code {processes[rank].exitcode}"
            pipe.close()
            (results if succeeded else errors)[rank] = value
        if errors:
            deadline = min(deadline, time.monotonic() + GRACE)
        if not ready and not errors:
            errors |= dict.fromkeys(waiting.values(), f"did not return within {timeout} s")
        if not ready:
            break
    for pipe in waiting:
        pipe.close()
    if errors:
        told = "\n".join(f"rank {rank} of {len(processes)}: {errors[rank]}" for rank in errors)
        raise RankError(told)
    return [results[rank] for rank in range(len(processes))]


@contextmanager
def told_as(name: object) -> Iterator[None]:
    """A failure of the block, one of many checks on the same ranks, is told with the name."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"This was {name}.")
        raise
