"""Files are whole or absent."""

import errno
import fcntl
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from gem_ds.comparison.runner import lock
from gem_ds.files import manifest
from gem_ds.files.atomic import atomic_write, leftovers, save_json, try_lock
from gem_ds.files.manifest import atomic_folder, clear_leftovers
from gem_ds.files.tensors import load_tensors, save_tensors
from gem_ds.train.output_dir import output_dir_of_one_run

KIND = "gem_mask"


# Writing is all or nothing


def write(path: Path, text: str = "whole") -> None:
    """A file, or a file in a folder within a folder."""
    if path.is_dir():
        (path / "deep").mkdir()
    content_of(path).write_text(text)


def content_of(path: Path) -> Path:
    return path / "deep" / "content" if path.is_dir() else path


def assert_whole(path: Path) -> None:
    assert content_of(path).read_text() == "whole"
    assert os.listdir(path.parent) == [path.name]


#: The folders that stand before the rename: itself, the one below, and twice for its manifest.
SYNCS = [(atomic_write, 1, 0), (atomic_folder, 4, 4)]


@pytest.mark.parametrize(("write_whole", "num_files", "num_folders"), SYNCS)
def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path, monkeypatch, write_whole, num_files, num_folders
):
    calls = []
    fsync, replace = os.fsync, os.replace

    def logged_fsync(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        calls.append("sync folder" if is_folder else "sync file")
        fsync(descriptor)

    def logged_replace(source, target):
        calls.extend(["rename"] * (target.name == "f"))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    write_whole(tmp_path / "f", write)
    place = calls.index("rename")
    assert sorted(calls[:place]) == ["sync file"] * num_files + ["sync folder"] * num_folders
    assert calls[place:] == ["rename", "sync folder"]


FULL = OSError(errno.ENOSPC, "full")


@pytest.mark.parametrize("write_whole", [atomic_write, atomic_folder])
@pytest.mark.parametrize(
    "failure", [RuntimeError("bug"), KeyboardInterrupt(), OSError("no number"), FULL]
)
def test_a_failure_midway_keeps_what_was_there_and_goes_through(tmp_path, write_whole, failure):
    def write_half(temporary: Path) -> None:
        write(temporary, "ha")
        raise failure

    path = tmp_path / "f"
    write_whole(path, write)
    with pytest.raises(type(failure)) as caught:
        write_whole(path, write_half)
    assert (caught.value is failure) == (failure is not FULL), "whose sentence says what to do"
    assert_whole(path)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_whose_last_rename_fails_is_put_back(tmp_path, monkeypatch, can_exchange):
    path, replace = tmp_path / "f", os.replace

    def failing(*names: Path) -> bool:
        if can_exchange or (names[0].suffix == ".tmp" and names[1] == path):
            raise FULL
        return bool(replace(*names))

    atomic_folder(path, write)
    if can_exchange:
        monkeypatch.setattr(manifest, "_exchange", failing)
    else:
        monkeypatch.setattr(manifest, "_exchange", lambda *names: False)
        monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="free space"):
        atomic_folder(path, lambda temporary: write(temporary, "new"))
    assert_whole(path)


def test_a_full_disk_is_told_with_what_to_do(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")

    def write_to_full(temporary: Path) -> None:
        temporary.symlink_to("/dev/full")  # the kernel answers ENOSPC to every write
        temporary.write_bytes(b"new")

    with pytest.raises(OSError, match=f"{path} .*free space on that disk") as caught:
        atomic_write(path, write_to_full)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "old"


def test_a_missing_folder_is_named_whoever_writes(tmp_path):
    """`save_pretrained` saves through safetensors, whose exception is no OSError."""
    with pytest.raises(FileNotFoundError, match=r"away/f.*create its folder first"):
        save_json(tmp_path / "away" / "f", {})
    with pytest.raises(OSError, match="create its folder first") as caught:
        atomic_write(tmp_path / "f", lambda path: save_file({}, tmp_path / "away" / "f"))
    assert caught.value.errno == errno.ENOENT


@contextmanager
def running(work: Callable[[], object]) -> Iterator[int]:
    """While the block lasts, another process works; its number."""
    if not (process := os.fork()):
        try:
            work()
        finally:
            os._exit(1)
    try:
        yield process
    finally:
        os.kill(process, signal.SIGKILL)
        assert os.waitpid(process, 0)[1] == signal.SIGKILL


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # which has other threads
@pytest.mark.parametrize("write_whole", [atomic_write, atomic_folder])
def test_sigkill_midway_leaves_the_old_content(tmp_path, write_whole):
    def write_half(temporary: Path) -> None:
        write(temporary, "ha")
        os.kill(os.getpid(), signal.SIGKILL)

    path = tmp_path / "f"
    write_whole(path, write)
    with running(lambda: write_whole(path, write_half)) as process:
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    assert len(leftovers(path)) == 1
    clear_leftovers(path)
    assert_whole(path)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_sigkill_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "f.safetensors"
    size = 200_000

    def write() -> None:
        for step in count():
            save_tensors(path, {"a": torch.full((size,), step)}, {"step": step}, kind=KIND)

    def check() -> None:
        tensors, metadata = load_tensors(path, KIND)
        assert torch.equal(tensors["a"], torch.full((size,), metadata["step"]))

    with running(write) as process:
        while not path.exists():
            ended = os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            assert ended is None
            time.sleep(0.01)
        for _ in range(20):  # stopped while it is read: safetensors opens a file twice
            os.kill(process, signal.SIGSTOP)
            os.waitid(os.P_PID, process, os.WSTOPPED)
            check()
            os.kill(process, signal.SIGCONT)
            time.sleep(0.003)
    check()


# Locks


def test_a_lock_keeps_others_out_while_the_file_is_open(tmp_path):
    with open(tmp_path / "log", "wb") as mine, open(tmp_path / "log", "wb") as other:
        assert try_lock(mine)
        assert try_lock(mine), "it is ours"
        assert not try_lock(other)
        mine.close()
        assert try_lock(other.fileno())


@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK", "ENOTSUP", "EINVAL", "EBADF", "EIO"])
def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch, name):
    """Any other failure says so."""
    error = OSError(getattr(errno, name), name)
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=error))
    with open(tmp_path / "log", "wb") as log:
        if name == "EIO":
            with pytest.raises(OSError, match="EIO"):
                try_lock(log)
            return
        assert try_lock(log)
        lock(log, tmp_path)  # a comparison's, which died of it
    with output_dir_of_one_run(tmp_path):
        pass
