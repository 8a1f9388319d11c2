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
from collections.abc import Callable, Iterable, Iterator, Mapping
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

    An OSError keeps its number and says what to do; the earlier file is whole, no temporary left.
    """
    with _replacing(Path(path)) as temporary:
        write(temporary)


def atomic_folder(path: str | Path, write: Callable[[Path], object]) -> None:
    """Writes a folder, which `write` fills, as `atomic_write` does a file.

    A folder cannot be exchanged in one step, so an earlier one is moved aside first, to a name
    beside it that ends with ``.old``; only a kill between the two renames leaves it there.
    """
    with _replacing(Path(path)) as temporary:
        temporary.mkdir()
        write(temporary)


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
    """Writes a GEM safetensors file, atomically; raises as `atomic_write`.

    The bytes are made in memory first (two transient copies of the tensors, which hold selected
    entries only): safetensors' own file writer hides the number of an `OSError` and creates files
    that only their owner can read.
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


def save_jsonl(path: str | Path, rows: Iterable[Any]) -> None:
    """Writes `rows` as JSON, one on a line, atomically; raises as `atomic_write`."""
    payload = "".join(json.dumps(row) + "\n" for row in rows).encode()
    atomic_write(path, lambda temporary: temporary.write_bytes(payload))


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a GEM safetensors file of one kind; a ValueError says why it is none."""
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
    """One field of a file's metadata; a ValueError names it if it is absent or mistyped."""
    if name not in metadata or not isinstance(metadata[name], types):
        raise ValueError(f"the metadata field {name!r} is missing or has a wrong type")
    return metadata[name]


@contextmanager
def taking_tensors(
    path: str | Path, kind: str, remedy: str
) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
    """Reads as `load_tensors`, for a block that takes every tensor out of the mapping.

    The ValueErrors raised inside are told with `path` before and `remedy` after them.
    """
    tensors, metadata = load_tensors(path, kind)
    try:
        yield tensors, metadata
        if tensors:
            name = min(tensors)
            raise ValueError(f"it holds tensor {name!r}, which its metadata does not describe")
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}; {remedy}") from error


def _parse_header(path: Path, noun: str, kind: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The JSON object under the key `gem`, checked for kind and version, without these two."""
    remedy = f"pass a {noun} file that gem_ds wrote"
    if METADATA_KEY not in metadata:
        raise ValueError(f"{path} is a safetensors file without GEM metadata: {remedy}")
    try:
        header: Any = json.loads(metadata[METADATA_KEY])
        if not isinstance(header, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise ValueError(f"{path} has damaged GEM metadata ({error}): {remedy}") from error
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
def _replacing(path: Path) -> Iterator[Path]:
    """An unused name beside `path`; what the block leaves there is `path` afterwards."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with _explained(path):
            yield temporary
            for entry in (*temporary.rglob("*"), temporary):
                _flush(entry)
            _replace(temporary, path)
            _flush(path.parent)
    finally:
        delete(temporary)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Adds to an OSError about `path` what the user can do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        in_text = re.search(r"\(os error (\d+)\)", str(error))  # as safetensors tells the number
        number = error.errno if isinstance(error, OSError) else in_text and int(in_text[1])
        if number is None:
            raise
        raise OSError(
            number,
            f"{path} cannot be written ({os.strerror(number)}): "
            f"{_REMEDIES.get(number, 'check the path and the disk')}; nothing was changed.",
        ) from error


def _replace(source: Path, path: Path) -> None:
    """Renames `source` to `path`, over what stands there; puts that back if the rename fails."""
    if not (source.is_dir() and path.is_dir()):
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
    """Waits until a file's content, or a folder's names where it can do that, are on the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:  # some network file systems flush no folders
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
