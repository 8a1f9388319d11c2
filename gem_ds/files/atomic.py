"""Writing files that are whole or absent, and reading back the safetensors files of GEM.

Writing: everything goes to a temporary name in the same folder, is flushed to the disk and only
then renamed. Whatever interrupts a write, the real name holds either the earlier content or the
new one. A killed process may leave a temporary, ``.<name>.<8 digits>.tmp`` (`leftovers` finds it).

Reading: a GEM file is an ordinary safetensors file whose string metadata has the single key
``gem``. Its value is one JSON object: ``kind``, ``format_version`` and the caller's fields.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

FORMAT_VERSION = 1
METADATA_KEY = "gem"

_REMEDIES = {
    errno.ENOSPC: "free space on that disk or choose another folder",
    errno.EDQUOT: "free space in your quota or choose another folder",
    errno.ENOENT: "create its folder first",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that you may write to",
    errno.ENOTDIR: "name a folder that is below no file",
}

#: What file systems without locks answer.
_NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL, errno.EBADF)


def atomic_write(path: str | Path, write: Callable[[Path], object]) -> None:
    """Writes one file, by `write(temporary path)`, so that `path` never holds a part of it.

    Raises:
        OSError: For example the disk is full. `errno` is kept, the message says what to do, the
            earlier file is whole, the temporary is gone.
    """
    path = Path(path)
    with _temporary(path) as temporary:
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)
        _flush_folder(path.parent)


def atomic_folder(path: str | Path, write: Callable[[Path], object]) -> None:
    """Writes a folder, which `write` fills, as `atomic_write` does a file.

    A folder cannot be exchanged in one step, so an earlier one is moved aside first, to a name
    beside it that ends with ``.old``; only a kill between the two renames leaves it there.
    """
    path = Path(path)
    with _temporary(path) as temporary:
        temporary.mkdir()
        write(temporary)
        for entry in temporary.rglob("*"):
            _flush_folder(entry) if entry.is_dir() else _flush(entry)
        _flush_folder(temporary)
        _replace_folder(temporary, path)
        _flush_folder(path.parent)


def leftovers(path: Path) -> list[Path]:
    """What killed writes of `path` left beside it, whole or not."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.(tmp|old)")
    return [entry for entry in path.parent.glob(".*") if name.fullmatch(entry.name)]


def delete(path: Path) -> None:
    """Deletes a file, a folder with what is in it, or a link, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def try_lock(file: int | IO[bytes]) -> bool:
    """Locks an open file or folder until the last copy of its descriptor is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def make_folder(path: str | Path) -> None:
    """Makes a folder with its parents, and sees whether files can be written in it."""
    path = Path(path)
    with _explained(path):
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{secrets.token_hex(4)}.tmp"
        probe.touch()
        probe.unlink()


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], *, kind: str
) -> None:
    """Writes a GEM safetensors file, atomically.

    The bytes are made in memory first (two transient copies of the tensors, which hold selected
    entries only): safetensors' own file writer hides the number of an `OSError` and creates files
    that only their owner can read.

    Raises:
        OSError: As `atomic_write`.
    """
    assert metadata.keys().isdisjoint({"kind", "format_version"}), "reserved fields"
    header = {"kind": kind, "format_version": FORMAT_VERSION, **metadata}
    packed = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    payload = serialize(packed, metadata={METADATA_KEY: json.dumps(header)})
    atomic_write(path, lambda temporary: temporary.write_bytes(payload))


def save_json(path: str | Path, obj: Any) -> None:
    """Writes `obj` as indented JSON, atomically; raises as `atomic_write`."""
    payload = (json.dumps(obj, indent=2) + "\n").encode()
    atomic_write(path, lambda temporary: temporary.write_bytes(payload))


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a GEM safetensors file of one kind.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is a folder, truncated, not safetensors, not written by GEM, of another kind
            or of a newer format.
    """
    path = Path(path)
    noun = kind.removeprefix("gem_")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: pass the {noun} file in it")
    if not path.exists():
        raise FileNotFoundError(f"There is no {noun} file at {path}: check the path.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = _parse_header(path, noun, kind, file.metadata() or {})
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}): it was truncated or has another "
            f"format, so copy it again or pass a {noun} file that gem_ds wrote"
        ) from error


def metadata_field(metadata: Mapping[str, Any], name: str, types: type | tuple[type, ...]) -> Any:
    """Returns one field of a file's metadata; a ValueError names it if it is absent or mistyped."""
    if name not in metadata or not isinstance(metadata[name], types):
        raise ValueError(f"the metadata field {name!r} is missing or has a wrong type")
    return metadata[name]


@contextmanager
def explaining(path: str | Path, remedy: str) -> Iterator[None]:
    """Puts `path` before and `remedy` after the ValueErrors raised inside, in one sentence."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}; {remedy}") from error


def _parse_header(path: Path, noun: str, kind: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The JSON object under the key `gem`, checked for kind and version, without these two."""
    remedy = f"pass a {noun} file that gem_ds wrote"
    if METADATA_KEY not in metadata:
        raise ValueError(f"{path} is a safetensors file without GEM metadata: {remedy}")
    try:
        header = json.loads(metadata[METADATA_KEY])
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} has damaged GEM metadata ({error}): {remedy}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} has damaged GEM metadata (not a JSON object): {remedy}")
    found, version = header.pop("kind", None), header.pop("format_version", None)
    if found != kind:
        raise ValueError(f"{path} is of kind {found!r}, not {kind!r}: {remedy}")
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"{path} has no valid format version ({version!r}): {remedy}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, and this gem_ds reads up to {FORMAT_VERSION}: "
            "upgrade gem_ds"
        )
    return header


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Yields an unused name beside `path`, explains OSErrors, and leaves nothing at that name."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with _explained(path):
            yield temporary
    finally:
        delete(temporary)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Adds to an OSError about `path` what the user can do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _error_number(error)
        if number is None:
            raise
        raise OSError(
            number,
            f"{path} cannot be written ({os.strerror(number)}): "
            f"{_REMEDIES.get(number, 'check the path and the disk')}; nothing was changed.",
        ) from error


def _error_number(error: OSError | SafetensorError) -> int | None:
    """The errno behind an exception; safetensors tells it only in the text of its own."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None


def _replace_folder(source: Path, path: Path) -> None:
    """Renames `source` to `path`, over what stands there; puts that back if the rename fails."""
    if not path.is_dir():
        os.replace(source, path)
        return
    earlier = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
    os.replace(path, earlier)
    try:
        os.replace(source, path)
    except OSError:
        os.replace(earlier, path)
        raise
    shutil.rmtree(earlier)


def _flush(path: Path) -> None:
    """Waits until the content of `path` is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(path: Path) -> None:
    """Waits until the names in `path` are on the disk, where the file system can do that."""
    try:
        _flush(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
