"""The safetensors files of GEM: tensors and one JSON object, written whole and read back.

A GEM file is an ordinary safetensors file whose string metadata has the single key ``gem``. Its
value is one JSON object: ``kind``, ``format_version``, the caller's fields and

    digests    tensor name -> digest of its dtype, shape and bytes
    digest     of the whole object but for itself, and so of all that the file holds

Reading checks both, so that a flipped bit is no other result. Older files have neither.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gem_ds.errors import refusing
from gem_ds.files.atomic import atomic_write
from gem_ds.files.digests import digest_of_json, digest_of_tensor
from gem_ds.files.stream import LazyTensor, stream_tensors

FORMAT_VERSION = 1
METADATA_KEY = "gem"

#: Fields of the JSON object that are not the caller's.
_RESERVED = {"kind", "format_version", "digests", "digest"}


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], *, kind: str
) -> None:
    """Writes a GEM safetensors file, atomically; raises as `atomic_write`.

    No tensor is copied that lies on the CPU. (safetensors' own file writer hides the number of an
    `OSError` besides, and creates files that only their owner can read.)
    """
    assert metadata.keys().isdisjoint(_RESERVED), "reserved fields"
    header = {"kind": kind, "format_version": FORMAT_VERSION, **metadata}
    header["digests"] = {name: digest_of_tensor(tensor) for name, tensor in tensors.items()}
    header["digest"] = digest_of_json(header)
    written = {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}
    text = {METADATA_KEY: json.dumps(header)}
    atomic_write(path, lambda temporary: stream_tensors(temporary, written, text))


def load_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a GEM safetensors file of one kind; a ValueError says why it is none."""
    path = Path(path)
    noun = kind.removeprefix("gem_")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: pass the {noun} file in it")
    if not path.exists():
        raise FileNotFoundError(f"There is no {noun} file at {path}: check the path.")
    with path.open("rb"):  # whose errors are true: to safetensors any file is missing that is shut
        pass
    problem = (
        f"{path} is not a whole safetensors file ({{}}): it was truncated or has another format, "
        f"so copy it again or pass a {noun} file that gem_ds wrote"
    )
    with refusing(problem, SafetensorError), safe_open(path, framework="pt", device="cpu") as file:
        header = _parse_header(path, noun, kind, file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    digests = header.pop("digests", None)
    for name in sorted(digests.keys() | tensors.keys()) if digests is not None else ():
        if name not in tensors or digest_of_tensor(tensors[name]) != digests.get(name):
            raise ValueError(
                f"{path} is damaged (tensor {name!r} is not what was written, by its digest): copy "
                "it again"
            )
    return tensors, header


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

    ValueErrors raised inside are told with `path` before and `remedy` after them.
    """
    tensors, metadata = load_tensors(path, kind)
    with refusing(f"{path} cannot be used: {{}}; {remedy}", ValueError):
        yield tensors, metadata
        if tensors:
            name = min(tensors)
            raise ValueError(f"it holds tensor {name!r}, which its metadata does not describe")


def _parse_header(path: Path, noun: str, kind: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The JSON object under the key `gem`, checked, without its digest, kind and version."""
    remedy = f"pass a {noun} file that gem_ds wrote"
    if METADATA_KEY not in metadata:
        raise ValueError(f"{path} is a safetensors file without GEM metadata: {remedy}")
    problem = f"{path} has damaged GEM metadata ({{}}): {remedy}"
    with refusing(problem, ValueError, RecursionError):
        header: Any = json.loads(metadata[METADATA_KEY])
        if not isinstance(header, dict):
            raise ValueError("not a JSON object")
        digest = header.pop("digest", None)
        is_whole = digest == digest_of_json(header) and isinstance(header.get("digests"), dict)
        if not is_whole and (digest is not None or "digests" in header):  # older files have neither
            raise ValueError("it is not what was written, by its digest")
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
