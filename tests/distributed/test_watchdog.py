"""A rank that stops ends the others, which name it; nothing that lives is taken for lost."""

import ctypes
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

from gem_ds.distributed import watchdog
from gem_ds.distributed.comm import Comm, store_of_group
from gem_ds.distributed.process_group import init_distributed, leave_distributed
from gem_ds.distributed.watchdog import watching
from tests.ranks import RankError, run_ranks, told_as


def _stop(comm: Comm, victims: list[int]) -> None:
    if comm.rank in victims:
        os.kill(os.getpid(), signal.SIGSTOP)
    comm.any(False)


def _die_unseen(comm: Comm, victims: list[int]) -> None:
    """As on a node that is gone: the network of the others does not notice."""
    if comm.rank in victims:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _hang(comm: Comm, victims: list[int]) -> None:
    """In a call that the kernel does not interrupt: a child is awaited that opens a pipe."""
    with mock.patch.object(watchdog, "PATIENCE", 2):
        if comm.rank in victims:
            libc = ctypes.CDLL(None)
            actions, argv = ctypes.create_string_buffer(256), (ctypes.c_char_p * 2)(b"true", None)
            libc.posix_spawn_file_actions_init(actions)
            libc.posix_spawn_file_actions_addopen(actions, 0, b"pipe", os.O_RDONLY, 0)
            libc.posix_spawn(ctypes.byref(ctypes.c_int()), b"/bin/true", actions, None, argv, None)
        comm.any(False)


def _until_lost(
    folder: Path, happen: Callable[[Comm, list[int]], None], victims: list[int]
) -> None:
    """Each rank's standard error goes to a file, as does its process."""
    comm = init_distributed()
    os.chdir(folder)
    Path(f"process{comm.rank}").write_text(str(os.getpid()))
    os.dup2(os.open(f"told{comm.rank}", os.O_CREAT | os.O_WRONLY), 2)
    with watching(comm, 1.0):
        happen(comm, victims)
    raise AssertionError("the watch should have ended this process")


@pytest.mark.parametrize(
    ("happen", "world_size", "victims", "sentence"),
    [
        (_stop, 3, [1], r"Error: rank 1 \(\S+, process {1}\) has shown no sign of life for 1 sec"),
        (_stop, 4, [2, 3], r"Error: ranks 2 \(.*{2}\), 3 \(.*{3}\) show no sign of life for 1 sec"),
        (_stop, 3, [0], r"Error: rank 0 on 127.0.0.1 has not answered rank [12] for 1 sec"),
        (_die_unseen, 3, [1], r"Error: rank 1 \(\S+, process {1}\) has shown no sign of life for"),
        (_hang, 2, [1], r"Warning: rank 1 \(\S+, process {1}\) has waited 1 seconds for a disk"),
    ],
    ids=["stopped", "two stopped", "keeper of the store stopped", "dead", "a disk that hangs"],
)
def test_a_lost_rank_is_named_and_ends_the_others(happen, world_size, victims, sentence, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    started = time.monotonic()
    with pytest.raises(RankError, match="exit code 1") as error:
        run_ranks(world_size, _until_lost, tmp_path, happen, victims, timeout=60)
    os.close(os.open(tmp_path / "pipe", os.O_RDWR))  # which lets the child go
    assert time.monotonic() - started < 30
    assert "Traceback" not in str(error.value)
    told = [(tmp_path / f"told{rank}").read_text() for rank in range(world_size)]
    processes = [(tmp_path / f"process{rank}").read_text() for rank in range(world_size)]
    tellers = [text for text in told if "Traceback" not in text and text]
    assert re.search(sentence.format(*processes), tellers[0])
    assert "--resume_from_checkpoint last" in tellers[0]
    assert len(tellers) == (world_size - 1 if victims == [0] else 1), "one tells, while it can"
    if happen is _hang:
        assert "Error: rank 1" in tellers[0], "when it has not answered for twice as long"
        assert "has waited 2 seconds" in tellers[0]


def _many_lives(seconds: float) -> None:
    comm = init_distributed()
    longer = 1.5 * seconds

    def be_busy() -> None:
        if comm.rank == 1:
            sum(i * i for i in range(3_000_000))  # Python's own loop lets no other thread run long
            time.sleep(longer)
        comm.any(False)

    def wait_for_a_peer() -> None:
        """On the group's connection to its store, as a process group that is being made does."""
        store = torch.distributed.distributed_c10d._get_default_store()  # noqa: TID251
        if comm.rank == 0:
            store.wait(["late"])
        else:
            time.sleep(longer)
            store_of_group().set("late", "")

    def be_suspended() -> None:
        """All ranks at once, as with Ctrl-Z; and one of them alone, but not for long."""
        processes = " ".join(map(str, comm.gather_objects(os.getpid())))
        if comm.rank == 0:
            script = f"kill -STOP {processes}; sleep {longer}; kill -CONT {processes}"
            subprocess.run(["sh", "-c", script], check=True)
        comm.any(False)
        if comm.rank == 1:
            script = f"kill -STOP {os.getpid()}; sleep {seconds / 4}; kill -CONT {os.getpid()}"
            subprocess.run(["sh", "-c", script], check=True)
        comm.any(False)

    def leave_early() -> None:
        if comm.rank == 0:
            time.sleep(longer)

    for live in (be_busy, wait_for_a_peer, be_suspended, leave_early):
        with told_as(live.__name__), watching(comm, seconds):
            live()
        comm.any(False)
    assert threading.active_count() == 1
    leave_distributed()


def test_nothing_that_lives_is_lost():
    """However long its main thread is away, or all ranks, or one that has nothing left to do."""
    run_ranks(2, _many_lives, 2.0)


def _unwatched(seconds: float) -> int:
    comm = init_distributed()
    with watching(comm, seconds):
        return threading.active_count()


def test_nobody_is_watched_where_there_is_nobody_or_who_should_not_be():
    assert run_ranks(1, _unwatched, 1.0) == [1]
    assert run_ranks(2, _unwatched, 0.0) == [1, 1]
