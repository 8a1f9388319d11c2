"""The files of a model's weights, opened before anything of them is loaded, or instead.

Headers and lengths of ``*.safetensors``; where there are none, the pickles of ``*.bin``, without
running code of theirs. Values are read from the disk where they are used.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Container
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RemoteEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import utils

from gem_ds.errors import refusing

#: What weights are loaded from: the first that is there.
_NAMES = (
    *(utils.SAFE_WEIGHTS_NAME, utils.SAFE_WEIGHTS_INDEX_NAME),
    *(utils.WEIGHTS_NAME, utils.WEIGHTS_INDEX_NAME),
)


def weight_files(
    name: str, revision: str | None = None
) -> tuple[dict[str, Any] | None, list[Path]]:
    """The index of a model in several files, and the files; those of the Hub are fetched.

    A ValueError where there are no weights.
    """
    path = next(filter(None, (_file_of(name, file, revision) for file in _NAMES)), None)
    if path is None:
        raise ValueError(f"{name} holds no weights ({' or '.join(_NAMES)})")
    if path.suffix != ".json":
        return None, [path]
    index = json.loads(path.read_text(encoding="utf-8"))
    found = {file: _file_of(name, file, revision) for file in set(index["weight_map"].values())}
    if missing := [file for file, path in found.items() if path is None]:
        raise ValueError(f"{name} lacks {min(missing)}, which its index names: copy it again.")
    return index, [path for _, path in sorted(found.items()) if path is not None]


def _file_of(name: str, file: str, revision: str | None) -> Path | None:
    if Path(name).is_dir():
        return path if (path := Path(name, file)).is_file() else None
    problem = f"The weights of {name} cannot be fetched: {{}}"
    with (
        refusing(problem, OSError, ValueError, EntryNotFoundError),
        suppress(RemoteEntryNotFoundError),
    ):
        return Path(hf_hub_download(name, file, revision=revision))
    return None


def map_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, mapped into memory, and its metadata.

    A number is read from the disk when it is used; one that is overwritten is so in this process.
    """
    problem = f"The weights of {path.parent} are damaged ({path.name}: {{}}): copy them again."
    with refusing(problem, SafetensorError, ValueError):
        if path.suffix == ".bin":
            return _unpickled(path), {"format": "pt"}
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {"format": "pt"}


def map_model(name: str, revision: str | None = None) -> dict[str, Tensor]:
    """All tensors of a model's files by their names there, mapped as `map_tensors` does."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(name, revision)[1]:
        tensors |= map_tensors(path)[0]
    return tensors


def name_in_files(parameter: str, names: Container[str]) -> str | None:
    """What files with these names call a parameter; those of a base model leave out a prefix."""
    candidates = (parameter, parameter.partition(".")[2])
    return next((name for name in candidates if name in names), None)


def holds(old: torch.dtype, new: torch.dtype) -> bool:
    """Whether a dtype has every value of another."""
    return torch.promote_types(old, new) == old


def refuse_damaged_files(name: str) -> None:
    """Refuse a local folder without weights, or with files of them that cannot be opened.

    While the weights load at ZeRO stage 3 the ranks wait for each other, so a file that is damaged
    on one node only has to be found before.
    """
    if Path(name).is_dir() and not any(Path(name, file).is_file() for file in _NAMES):
        raise ValueError(
            f"--model_name_or_path {name} holds no weights ({' or '.join(_NAMES)}): pass a "
            "complete model."
        )
    _dtypes(name)


def refuse_float8(name: str) -> None:
    """Refuse weights of eight bits where the dtype of the files is that of the computation."""
    if any(dtype.is_floating_point and dtype.itemsize == 1 for dtype in _dtypes(name)):
        raise ValueError(
            f"The weights of {name} are float8, in which no model computes: pass --dtype bfloat16."
        )


def _dtypes(name: str) -> set[torch.dtype]:
    """Of the tensors in the files of a local folder."""
    folder = Path(name)
    paths = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    return {tensor.dtype for path in paths for tensor in map_tensors(path)[0].values()}


def _unpickled(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of torch's, which stay on the disk where its format allows that."""
    try:
        mapped = zipfile.is_zipfile(path)  # not the format of before torch 1.6
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # of bytes that are no pickle it raises nearly anything
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{type(error).__name__} {reason}".strip()) from error
    if not isinstance(found, dict) or not all(map(torch.is_tensor, found.values())):
        raise ValueError("it holds no tensors by name")
    return found
