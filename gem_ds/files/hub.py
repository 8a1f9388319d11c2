"""Files of the Hugging Face Hub: masks and deltas by name, and the licence of a model."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from gem_ds.errors import refusing

CARD = "README.md"


def fetch(
    name: str | Path, file: str, revision: str | None = None, token: str | None = None
) -> Path:
    """The path of `file`: `name`, in the folder `name`, or in that repository of the Hub."""
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        return path / file
    problem = (
        f"{name} is no file or folder here, and {file} of that repository of the Hub cannot be "
        "fetched: {}"
    )
    with refusing(problem, OSError, ValueError, EntryNotFoundError):
        return Path(hf_hub_download(str(name), file, revision=revision, token=token))


def license_of(model: str, token: str | None = None) -> str | None:
    """The licence that the card of a model names, a folder or of the Hub; None where none does."""
    source = Path(model, CARD) if Path(model).is_dir() else model
    try:
        license = ModelCard.load(source, token=token).data.to_dict().get("license")
    except (OSError, ValueError, EntryNotFoundError):  # no card, no such model, no network
        return None
    return license if isinstance(license, str) else None
