"""What a result rests on: fingerprints of the model and the data, and the versions at work."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch
from transformers import PretrainedConfig

from gem_ds.data.tasks import Example

_PACKAGES = ("gem_ds", "torch", "transformers", "tokenizers", "deepspeed", "peft", "vllm")
_MODEL_SUFFIXES = {".safetensors", ".bin", ".json", ".model", ".txt", ".jinja"}
_BLOCK = 1 << 20
_NUM_BLOCKS = 64


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_files(paths: Iterable[str | Path]) -> dict[str, str]:
    """SHA-256 of files, by their names."""
    return {Path(path).name: sha256_of(path) for path in paths}


def sha256_of_texts(texts: Iterable[str]) -> str:
    """SHA-256 of texts in their order, for data that do not lie in a file."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(json.dumps(text).encode() + b"\n")
    return digest.hexdigest()


def sha256_of_examples(task: str, examples: Iterable[Example]) -> dict[str, str]:
    """SHA-256 of the examples of a task that are asked, by its name."""
    return {f"{task} test": sha256_of_texts(json.dumps(asdict(e)) for e in examples)}


def model_fingerprint(name: str, config: PretrainedConfig) -> str:
    """What tells a model from another that bears its name.

    On the Hub that is the commit. In a folder it is a hash of its files: weights, configuration
    and tokenizer. Of a file above 64 MiB, 64 evenly spaced blocks of 1 MiB and the size are read,
    so that a model of any size takes a second; models that were trained differ in all of them.

    Args:
        name: Folder or Hub name.
        config: As transformers has loaded it.
    """
    folder = Path(name)
    if not folder.is_dir():
        return str(getattr(config, "_commit_hash", None))
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _MODEL_SUFFIXES and path.is_file():
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            _update(digest, path)
    return digest.hexdigest()[:16]


def model_facts(
    name: str, config: PretrainedConfig, delta: str | None, adapter: str | None
) -> dict[str, object]:
    """What is evaluated: the model, and the hash of what is put onto it."""
    parts = [] if adapter is None else sorted(Path(adapter).glob("adapter_*"))
    return {
        "model": name,
        "model_fingerprint": model_fingerprint(name, config),
        "delta_sha256": None if delta is None else sha256_of(delta),
        "adapter_sha256": None if adapter is None else sha256_of_files(parts),
    }


def versions() -> dict[str, str]:
    """Of Python and the packages that are installed, and the device that torch uses."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return found


def _update(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _BLOCK * _NUM_BLOCKS:
            digest.update(file.read())
            return
        for i in range(_NUM_BLOCKS):
            file.seek((size - _BLOCK) * i // (_NUM_BLOCKS - 1))
            digest.update(file.read(_BLOCK))
