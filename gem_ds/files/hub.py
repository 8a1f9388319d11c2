"""Masks and deltas on the Hugging Face Hub: fetched by name, pushed with a card."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from gem_ds.files.card import ModelCard as Card

if TYPE_CHECKING:
    from gem_ds.files.delta import Delta

CARD = "README.md"


def fetch(
    name: str | Path, file: str, revision: str | None = None, token: str | None = None
) -> Path:
    """The path of `file`: `name` itself, in the folder `name`, or in that repository of the Hub.

    Raises:
        ValueError: The repository, its revision or its file cannot be had; says why.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        return path / file
    try:
        return Path(hf_hub_download(str(name), file, revision=revision, token=token))
    except (OSError, ValueError, EntryNotFoundError) as error:
        raise ValueError(
            f"{name} is no file or folder here, and {file} of that repository of the Hub cannot be "
            f"fetched: {_reason(error)}"
        ) from error


def push_delta(
    delta: Delta,
    repo: str,
    *,
    scores: Mapping[str, float],
    license: str | None,
    private: bool | None,
    revision: str | None,
    token: str | None,
) -> str:
    """Makes the repository where it is none yet; one commit; returns its address.

    A card that stands there already stays.

    Raises:
        ValueError: The Hub refuses it; says why.
    """
    api = HfApi(token=token)
    with TemporaryDirectory() as folder:
        delta.save(Path(folder, "delta.safetensors"))
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            if not api.file_exists(repo, CARD, revision=revision):
                license = license or license_of(delta.mask.base_model, token)
                text = card_of(delta, repo, scores, license).text()
                Path(folder, CARD).write_text(text, encoding="utf-8")
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                revision=revision,
                commit_message=f"Delta of {Path(delta.mask.base_model).name}",
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The delta cannot be pushed to {repo}: {_reason(error)} (`hf auth login` says who "
                "you are)"
            ) from error
    return str(commit.commit_url)


def license_of(model: str, token: str | None = None) -> str | None:
    """The licence that the card of a model names, a folder or of the Hub; None where none does."""
    source = Path(model, CARD) if Path(model).is_dir() else model
    try:
        license = ModelCard.load(source, token=token).data.to_dict().get("license")
    except (OSError, ValueError, EntryNotFoundError):  # no card, no such model, no network
        return None
    return license if isinstance(license, str) else None


def card_of(delta: Delta, repo: str, scores: Mapping[str, float], license: str | None) -> Card:
    """The card of a delta that is on the Hub without its run."""
    mask = delta.mask
    shapes = [info.shape for info in mask.weights.values()]
    if mask.fingerprints:  # of all parameters: "<dtype> <shape> <digest>"
        texts = [text.split()[1] for text in mask.fingerprints.values()]
        shapes = [tuple(map(int, text.replace("scalar", "1").split("x"))) for text in texts]
    labels = mask.settings.get("labels")
    return Card(
        base_model=mask.base_model,
        revision=mask.revision,
        auto_class="AutoModelForSequenceClassification" if labels else "AutoModelForCausalLM",
        num_labels=len(labels) if labels else None,
        task=str(mask.settings.get("task", "its task")),
        method=mask.method,
        product="delta",
        has_mask=True,
        repo=repo,
        license=license,
        num_trainable=mask.num_selected + sum(each.numel() for each in delta.head.values()),
        num_parameters=sum(map(prod, shapes)),
        dtype=mask.dtype,
        settings={"method": mask.method, **mask.settings},
        results=scores,
    )


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)
