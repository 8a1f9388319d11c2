"""Files are whole or absent, and a bad file is refused in one sentence."""

import errno
import fcntl
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gem_ds.comparison.cell_folder import lock
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

KIND = "gem_mask"
METADATA = {"count": 3, "rate": 0.1, "name": None, "nested": {"shape": [2, 3]}, "text": "ä\n"}


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


# Round trips


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_tensors_and_metadata_come_back_bit_for_bit(tmp_path_factory, data):
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64]
    tensors = {}
    for name in data.draw(st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=4)):
        dtype = data.draw(st.sampled_from(dtypes))
        count = data.draw(st.integers(0, 9))
        content = data.draw(st.binary(min_size=count * 8, max_size=count * 8))
        raw = torch.tensor(list(content), dtype=torch.uint8)
        tensors[name] = raw.view(dtype) if count else torch.empty(0, dtype=dtype)
    scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    fields = st.text().filter(lambda name: name not in ("kind", "format_version"))
    metadata = data.draw(st.dictionaries(fields, scalars | st.lists(scalars), max_size=3))
    path = tmp_path_factory.mktemp("files") / "f.safetensors"
    save_tensors(path, tensors, metadata, kind=KIND)
    loaded, found = load_tensors(path, KIND)
    assert found == metadata
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert bytes_of(loaded[name]) == bytes_of(tensor)


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


def test_json_comes_back(tmp_path):
    save_json(tmp_path / "f.json", METADATA)
    assert json.loads((tmp_path / "f.json").read_text()) == METADATA
    assert os.listdir(tmp_path) == ["f.json"]


# Writing is all or nothing


def write_within(folder: Path) -> None:
    (folder / "within").mkdir()
    (folder / "within" / "f").write_text("new")


@pytest.mark.parametrize(
    ("write_whole", "write", "expected"),
    [
        (atomic_write, lambda path: path.write_text("new"), {"sync file": 1}),
        (atomic_folder, write_within, {"sync file": 1, "sync folder": 2}),
    ],
)
def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path, monkeypatch, write_whole, write, expected
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
    assert Counter(calls[:place]) == expected
    assert calls[place:] == ["rename", "sync folder"]


@pytest.mark.parametrize(
    "failure", [RuntimeError("bug"), KeyboardInterrupt(), OSError("no number")]
)
def test_an_exception_midway_keeps_the_old_file_and_goes_through(tmp_path, failure):
    path = tmp_path / "f"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("ne")
        raise failure

    with pytest.raises(type(failure)) as caught:
        atomic_write(path, write)
    assert caught.value is failure
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


def test_a_full_disk_keeps_the_old_file_and_says_what_to_do(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.symlink_to("/dev/full")  # the kernel answers ENOSPC to every write
        temporary.write_bytes(b"new")

    with pytest.raises(OSError, match="free space on that disk") as caught:
        atomic_write(path, write)
    assert caught.value.errno == errno.ENOSPC
    assert str(path) in str(caught.value)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


def test_tensors_cut_off_by_the_system_keep_the_old_file(tmp_path):
    path = tmp_path / "f.safetensors"
    save_tensors(path, {"a": torch.zeros(2)}, {}, kind=KIND)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(OSError, match="cannot be written") as caught:
            save_tensors(path, {"a": torch.ones(2**19)}, {}, kind=KIND)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert torch.equal(load_tensors(path, KIND)[0]["a"], torch.zeros(2))
    assert os.listdir(tmp_path) == ["f.safetensors"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"away/f.*create its folder first"):
        save_json(tmp_path / "away" / "f", {})


def test_a_full_disk_under_the_writer_of_safetensors_is_recognised(tmp_path):
    """`save_pretrained` saves through it, and its exception is no OSError."""
    with pytest.raises(OSError, match="create its folder first") as caught:
        atomic_write(tmp_path / "f", lambda path: save_file({}, tmp_path / "away" / "f"))
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_sigkill_midway_leaves_the_old_content(tmp_path, kind):
    program = f"""
import os, signal
from pathlib import Path
from gem_ds.files.atomic import atomic_folder, atomic_write
def write_file(path):
    path.write_text("ha")
    os.kill(os.getpid(), signal.SIGKILL)
def write_folder(path):
    write_file(path / "content")
if {kind!r} == "file":
    atomic_write({str(tmp_path / "f")!r}, write_file)
else:
    atomic_folder({str(tmp_path / "f")!r}, write_folder)
"""
    content = tmp_path / "f" if kind == "file" else tmp_path / "f" / "content"
    content.parent.mkdir(exist_ok=True)
    content.write_text("whole")
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    assert content.read_text() == "whole"
    leftover = [name for name in os.listdir(tmp_path) if name != "f"]
    assert all(name.startswith(".") and name.endswith(".tmp") for name in leftover)


def test_sigkill_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "f.safetensors"
    program = f"""
import torch
from gem_ds.files.atomic import save_tensors
step, n = 0, 200_000
while True:
    save_tensors({str(path)!r}, {{"a": torch.full((n,), step)}}, {{"step": step}}, kind={KIND!r})
    step += 1
"""
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(20):  # stopped while it is read: safetensors opens a file twice
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)
            tensors, metadata = load_tensors(path, KIND)
            assert torch.equal(tensors["a"], torch.full((200_000,), metadata["step"]))
            process.send_signal(signal.SIGCONT)
            time.sleep(0.003)
    finally:
        process.kill()
        process.wait()
    tensors, metadata = load_tensors(path, KIND)
    assert torch.equal(tensors["a"], torch.full((200_000,), metadata["step"]))


# Folders


def fill(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "new").write_text("new")


def test_a_folder_is_created_and_replaced_as_a_whole(tmp_path):
    target = tmp_path / "f"
    atomic_folder(target, fill)
    (target / "stale").write_text("of the earlier folder")
    atomic_folder(target, fill)
    assert os.listdir(tmp_path) == ["f"]
    assert os.listdir(target) == ["deep"]
    assert (target / "deep" / "new").read_text() == "new"


def test_a_folder_that_fails_midway_keeps_the_old_one(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "old").write_text("old")

    def write(folder: Path) -> None:
        fill(folder)
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="free space"):
        atomic_folder(tmp_path / "f", write)
    assert os.listdir(tmp_path) == ["f"]
    assert (tmp_path / "f" / "old").read_text() == "old"


def test_a_folder_whose_last_rename_fails_is_put_back(tmp_path, monkeypatch):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "old").write_text("old")
    replace = os.replace

    def failing(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(errno.EIO, "broken")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="cannot be written"):
        atomic_folder(tmp_path / "f", fill)
    assert os.listdir(tmp_path) == ["f"]
    assert (tmp_path / "f" / "old").read_text() == "old"


# Leftovers


@pytest.mark.parametrize("write", [atomic_write, atomic_folder])
def test_what_a_killed_write_leaves_is_found_and_deleted(tmp_path, monkeypatch, write):
    """Nothing cleans up, as after a kill: neither in the midst of a write nor between renames."""
    monkeypatch.setattr(files, "delete", lambda path: None)
    path = tmp_path / "all_results.json"

    def fail(temporary: Path) -> None:
        temporary.mkdir(exist_ok=True)
        (temporary / "half").touch()
        raise OSError(errno.EIO, "killed")

    with pytest.raises(OSError, match="cannot be written"):
        write(path, fail)
    (tmp_path / ".all_results.json.0a1b2c3d.old").mkdir()
    others = {"all_results.json", ".all_results.json.tmp", ".results.json.0a1b2c3d.tmp", "x.tmp"}
    for name in others:
        (tmp_path / name).touch()
    found = leftovers(path)
    assert len(found) == 2
    for entry in found:
        delete(entry)
    assert set(os.listdir(tmp_path)) == others


def test_deleting_a_link_spares_what_it_points_to(tmp_path):
    fill(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "deep")
    for _ in range(2):
        delete(tmp_path / "link")
    assert os.listdir(tmp_path) == ["deep"]
    assert os.listdir(tmp_path / "deep") == ["new"]


# Locks


def test_a_lock_keeps_others_out_while_the_file_is_open(tmp_path):
    with open(tmp_path / "log", "wb") as mine, open(tmp_path / "log", "wb") as other:
        assert try_lock(mine)
        assert try_lock(mine), "it is ours"
        assert not try_lock(other)
        mine.close()
        assert try_lock(other.fileno())


@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK", "ENOTSUP", "EINVAL", "EBADF"])
def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch, name):
    def flock(*_: object) -> None:
        raise OSError(getattr(errno, name), name)

    monkeypatch.setattr(fcntl, "flock", flock)
    with open(tmp_path / "log", "wb") as log:
        assert try_lock(log)
        lock(log, tmp_path)  # a comparison's, which died of it
    with output_dir_of_one_run(tmp_path):
        pass


def test_a_lock_that_fails_otherwise_says_so(tmp_path, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", flock)
    with open(tmp_path / "log", "wb") as log, pytest.raises(OSError, match="broken"):
        try_lock(log)


# Reading refuses what is not a whole file of the kind


@pytest.fixture(scope="module")
def good_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "f.safetensors"
    save_tensors(path, {"a": torch.arange(50), "b": torch.ones(7)}, METADATA, kind=KIND)
    return path.read_bytes()


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_every_truncation_is_refused(good_bytes, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "f.safetensors"
    path.write_bytes(good_bytes[: data.draw(st.integers(0, len(good_bytes) - 1))])
    with pytest.raises(ValueError, match="truncated") as caught:
        load_tensors(path, KIND)
    assert str(path) in str(caught.value)


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
    with pytest.raises(ValueError, match=message) as caught:
        load_tensors(path, KIND)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no mask file at"):
        load_tensors(tmp_path / "f.safetensors", KIND)
    with pytest.raises(ValueError, match="is a folder: pass the mask file in it"):
        load_tensors(tmp_path, KIND)
