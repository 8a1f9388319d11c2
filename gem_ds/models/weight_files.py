"""The files of a model's weights, opened before anything of them is loaded.

Headers and lengths of ``*.safetensors``; where there are none, the pickles of ``*.bin``, without
running code of theirs. Values are not read.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import utils

_NAMES = (
    *(utils.SAFE_WEIGHTS_NAME, utils.SAFE_WEIGHTS_INDEX_NAME),
    *(utils.WEIGHTS_NAME, utils.WEIGHTS_INDEX_NAME),
)


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
    for _ in _dtypes(name):
        pass


def refuse_float8(name: str) -> None:
    """Refuse weights of eight bits where the dtype of the files is that of the computation."""
    if any("F8" in dtype or "float8" in dtype for dtype in _dtypes(name)):
        raise ValueError(
            f"The weights of {name} are float8, in which no model computes: pass --dtype bfloat16."
        )


def _dtypes(name: str) -> Iterator[str]:
    """Of every tensor in the files of a local folder, as its file calls it."""
    folder = Path(name)
    paths = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    for path in paths:
        try:
            if path.suffix == ".bin":
                yield from (str(tensor.dtype) for tensor in _unpickled(path).values())
                continue
            with safe_open(path, framework="pt") as file:
                yield from (file.get_slice(key).get_dtype() for key in file.keys())  # noqa: SIM118
        except (SafetensorError, ValueError) as error:
            raise ValueError(
                f"The weights of {name} are damaged ({path.name}: {error}): copy them again."
            ) from error


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
