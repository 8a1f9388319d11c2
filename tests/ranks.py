"""Ranks as processes: what a launcher starts, for tests of everything that needs a real network.

    results = run_ranks(2, function, argument)     # function(argument) in two processes

``function`` finds RANK, WORLD_SIZE and so on in its environment, as under any launcher, and joins
the others by :func:`distributed.process_group.init_distributed`. It has to be importable by name.

Many checks on the same ranks, each to be reported under its own name:

    def checks(cases: Cases) -> None:
        with cases("reading"):
            assert ...

    outcomes = run_cases(2, checks)                # once per test module
    outcomes.check("reading")                      # in a test of its own

The ranks run on the CPU with one thread each, whatever the machine has. They are forked from one
server process that has imported DeepSpeed already, which takes longer than most tests.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from gem_ds.distributed.comm import free_port

CPU_ONLY = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
PRELOADED = ["deepspeed", "gem_ds.distributed.engine", "transformers.models.llama.modeling_llama"]
GRACE = 2.0  # seconds that the other ranks get to report too, once one has failed


class RankError(RuntimeError):
    """At least one rank failed; the message holds the tracebacks of all that did."""


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 180.0
) -> list[Any]:
    """Call ``function(*args)`` in ``world_size`` processes at once.

    Args:
        world_size: number of processes.
        function: importable by name; what it returns must be picklable.
        args: picklable.
        timeout: seconds after which the ranks are killed.

    Returns:
        What the ranks returned, in rank order.

    Raises:
        RankError: a rank raised, died, or had not returned in time. The others are killed.
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
            environment = _launcher_environment(rank, world_size, port)
            process = context.Process(target=_main, args=(theirs, environment, function, args))
            process.start()
            theirs.close()  # so that a rank's death reads as the end of the pipe
            processes.append(process)
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


def _launcher_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _main(
    result: connection.Connection,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(CPU_ONLY | environment)
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


class Cases:
    """A rank's record of which checks have passed, kept in a file so that it outlives the rank."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Record the block under ``name``; an exception in it is recorded and raised."""
        try:
            yield
        except BaseException:
            self._record(name, traceback.format_exc())
            raise
        self._record(name, None)

    def _record(self, name: str, error: str | None) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps([name, error]) + "\n")


class Outcomes:
    """What became of the cases of one :func:`run_cases`.

    Attributes:
        names: of all cases that a rank has begun and ended.
    """

    def __init__(self, by_rank: list[dict[str, str | None]], ending: str) -> None:
        self._by_rank = by_rank
        self._ending = ending
        self.names = {name for outcomes in by_rank for name in outcomes}

    def check(self, name: str) -> None:
        """Fail the running test unless the case passed on every rank."""
        errors = [(rank, outcomes.get(name)) for rank, outcomes in enumerate(self._by_rank)]
        told = [f"rank {rank}: {error}" for rank, error in errors if error is not None]
        if told:
            pytest.fail("\n".join(told), pytrace=False)
        if any(name not in outcomes for outcomes in self._by_rank):
            pytest.fail(f"did not run to its end: {self._ending}", pytrace=False)


def run_cases(
    world_size: int, function: Callable[..., None], *args: Any, timeout: float = 180.0
) -> Outcomes:
    """Call ``function(cases, *args)`` on every rank, like :func:`run_ranks`, and keep its cases.

    The first case that fails on any rank ends all of them: ranks that have gone different ways
    cannot go on together. Cases that were not reached by then have no outcome, which
    :meth:`Outcomes.check` reports as a failure.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{rank}.jsonl") for rank in range(world_size)]
        ending = "there is no case of this name"
        try:
            run_ranks(world_size, _call_with_cases, paths, function, args, timeout=timeout)
        except RankError as error:
            ending = f"the ranks stopped before.\n{error}"
        return Outcomes([_read_cases(path) for path in paths], ending)


def _call_with_cases(paths: list[Path], function: Callable[..., None], args: Any) -> None:
    function(Cases(paths[int(os.environ["RANK"])]), *args)


def _read_cases(path: Path) -> dict[str, str | None]:
    if not path.is_file():
        return {}
    return dict(json.loads(line) for line in path.read_text().splitlines())
