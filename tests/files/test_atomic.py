"""Files are whole or absent, and a bad file is refused in one sentence."""

import errno
import fcntl
import json
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
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gem_ds.comparison.runner import lock
from gem_ds.files import atomic as files
from gem_ds.files.atomic import (
    atomic_folder,
    atomic_write,
    delete,
    leftovers,
    load_tensors,
    save_json,
    save_tensors,
    try_lock,
)
from gem_ds.train.output_dir import output_dir_of_one_run
from tests.deltas import bytes_of

KIND = "gem_mask"
METADATA = {"count": 3, "rate": 0.1, "name": None, "nested": {"shape": [2, 3]}, "text": "ä\n"}


# Round trips


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64)
CONTENT = st.tuples(st.sampled_from(DTYPES), st.binary(max_size=72).map(lambda b: b[len(b) % 8 :]))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
FIELDS = st.text().filter(lambda name: name not in ("kind", "format_version"))


@settings(deadline=None, max_examples=60)
@given(
    content=st.dictionaries(st.text(min_size=1, max_size=8), CONTENT, max_size=4),
    metadata=st.dictionaries(FIELDS, SCALARS | st.lists(SCALARS), max_size=3),
)
def test_any_tensors_and_metadata_come_back_bit_for_bit(tmp_path_factory, content, metadata):
    tensors = {
        name: torch.tensor(list(raw), dtype=torch.uint8).view(dtype)
        for name, (dtype, raw) in content.items()
    }
    path = tmp_path_factory.mktemp("files") / "f.safetensors"
    save_tensors(path, tensors, metadata, kind=KIND)
    loaded, found = load_tensors(path, KIND)
    assert found == metadata
    assert {n: (t.dtype, bytes_of(t)) for n, t in loaded.items()} == content


def test_the_file_is_ordinary_safetensors_that_others_can_read(tmp_path):
    path = tmp_path / "f.safetensors"
    matrix = torch.arange(6.0).reshape(2, 3)
    umask = os.umask(0o022)
    try:
        save_tensors(path, {"a": matrix.t(), "b": matrix[0], "c": matrix[0]}, METADATA, kind=KIND)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    loaded = load_file(path)
    assert torch.equal(loaded["a"], matrix.t())
    assert torch.equal(loaded["b"], torch.tensor([0.0, 1.0, 2.0]))
    assert torch.equal(loaded["c"], loaded["b"])


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


@pytest.mark.parametrize(("write_whole", "num_folders"), [(atomic_write, 0), (atomic_folder, 2)])
def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path, monkeypatch, write_whole, num_folders
):
    calls = []
    fsync, replace = os.fsync, os.replace

    def logged_fsync(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        calls.append("sync folder" if is_folder else "sync file")
        fsync(descriptor)

    def logged_replace(source, target):
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    write_whole(tmp_path / "f", write)
    place = calls.index("rename")
    assert sorted(calls[:place]) == ["sync file"] + ["sync folder"] * num_folders
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


def test_a_folder_whose_last_rename_fails_is_put_back(tmp_path, monkeypatch):
    path, replace = tmp_path / "f", os.replace

    def failing(source: Path, target: Path) -> None:
        if source.suffix == ".tmp":
            raise FULL
        replace(source, target)

    atomic_folder(path, write)
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
    (leftover,) = leftovers(path)
    delete(leftover)
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


def test_a_folder_is_created_and_replaced_as_a_whole(tmp_path):
    atomic_folder(tmp_path / "f", lambda folder: write(folder, "old"))
    (tmp_path / "f" / "stale").write_text("of the earlier folder")
    atomic_folder(tmp_path / "f", write)
    assert os.listdir(tmp_path / "f") == ["deep"]
    assert_whole(tmp_path / "f")


def test_leftovers_are_found_and_deleted_and_links_spare_what_they_point_to(tmp_path):
    write(tmp_path)
    (tmp_path / ".a.json.0a1b2c3d.old").symlink_to(tmp_path / "deep")
    (tmp_path / ".a.json.0a1b2c3e.old").mkdir()
    write(tmp_path / ".a.json.0a1b2c3e.old")
    others = {"a.json", ".a.json.tmp", ".b.a.json.0a1b2c3d.tmp", ".a.json.0a1b2c3d.tmp.x"}
    for name in (*others, ".a.json.0a1b2c3d.tmp"):
        (tmp_path / name).touch()
    found = leftovers(tmp_path / "a.json")
    assert len(found) == 3
    for entry in found * 2:
        delete(entry)
    assert set(os.listdir(tmp_path)) == {*others, "deep"}
    assert os.listdir(tmp_path / "deep") == ["content"]


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


# Reading refuses what is not a whole file of the kind


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "f.safetensors"
    save_tensors(path, {"a": torch.arange(50), "b": torch.ones(7)}, METADATA, kind=KIND)
    good_bytes = path.read_bytes()
    for length in (*range(0, len(good_bytes), 9), len(good_bytes) - 1):
        path.write_bytes(good_bytes[:length])
        with pytest.raises(ValueError, match=f"{path} .* truncated"):
            load_tensors(path, KIND)


@settings(deadline=None, max_examples=80)
@given(content=st.binary(max_size=200))
def test_random_bytes_are_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("noise") / "f.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"not a whole safetensors file|without GEM"):
        load_tensors(path, KIND)


def header(**fields: object) -> dict[str, str]:
    return {"gem": json.dumps(fields)}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "without GEM metadata"),
        ({"format": "pt"}, "without GEM metadata"),
        ({"gem": "{"}, "damaged GEM metadata"),
        ({"gem": "[1]"}, "damaged GEM metadata"),
        (header(format_version=1), "is of kind None, not 'gem_mask'"),
        (header(kind="gem_delta", format_version=1), "is of kind 'gem_delta', not 'gem_mask'"),
        (header(kind=KIND), "no valid format version"),
        (header(kind=KIND, format_version="1"), "no valid format version"),
        (header(kind=KIND, format_version=0), "no valid format version"),
        (header(kind=KIND, format_version=files.FORMAT_VERSION + 1), "upgrade gem_ds"),
    ],
)
def test_other_safetensors_files_are_refused(tmp_path, metadata, message):
    path = tmp_path / "f.safetensors"
    save_file({"a": torch.zeros(2)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=f"{path} .*{message}"):
        load_tensors(path, KIND)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no mask file at"):
        load_tensors(tmp_path / "f.safetensors", KIND)
    with pytest.raises(ValueError, match="is a folder: pass the mask file in it"):
        load_tensors(tmp_path, KIND)
