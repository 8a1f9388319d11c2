"""The delta: the trained values at a mask's entries, and the file that keeps them.

    delta.safetensors    <weight name>.indices    as in mask.safetensors
                         <weight name>.values     the weights themselves, in the model's dtype
                         head.<name>              a dense parameter trained beside the mask, if any
                         metadata                 that of the mask, and the names of the head

Values are absolute, not differences: base + delta is an overwrite, with no rounding. How it is
applied to a model is in `gem_ds.files.apply`. ZeRO partitions are not written here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import HfApi
from torch import Tensor

from gem_ds.errors import refusing
from gem_ds.files.card import ModelCard
from gem_ds.files.hub import CARD, fetch, license_of
from gem_ds.files.mask import Mask, dtype_name, pack_mask, take_tensors, unpack_mask
from gem_ds.files.tensors import metadata_field, save_tensors, taking_tensors

DELTA_KIND = "gem_delta"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Delta:
    """The trained values at the entries of a mask.

    Attributes:
        mask: The entries, the weights that they belong to, and the base model.
        values: Weight name to trained values (k_l,), in the weight's dtype, finite.
        head: Parameter name to dense trained parameter, finite; for a task head that the base
            lacks.

    Raises:
        ValueError: Values and mask disagree, or a value is not finite; the weight is named.
    """

    mask: Mask
    values: dict[str, Tensor]
    head: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unmatched := self.mask.weights.keys() ^ self.values.keys():
            name = min(unmatched)
            if name in self.values:
                raise ValueError(f"weight {name!r} has values but no indices")
            raise ValueError(f"weight {name!r} has indices but no values")
        for name, values in self.values.items():
            dtype, count = self.mask.weights[name].dtype, self.mask.indices[name].numel()
            own = dtype_name(values.dtype)
            if values.shape != (count,):
                raise ValueError(
                    f"the values of {name!r} have shape {tuple(values.shape)} for {count} indices"
                )
            if own != dtype:
                raise ValueError(f"the values of {name!r} are {own} for a {dtype} weight")
            if not values.isfinite().all():
                raise ValueError(f"the values of {name!r} hold NaN or infinity")
        for name, parameter in self.head.items():
            if parameter.is_floating_point() and not parameter.isfinite().all():
                raise ValueError(f"the head's parameter {name!r} holds NaN or infinity")
        if both := self.head.keys() & self.values.keys():
            raise ValueError(f"weight {min(both)!r} is in the mask and in the head")

    def __repr__(self) -> str:
        size = sum(parameter.numel() for parameter in self.head.values())
        head = f", and a head of {size:,}" if self.head else ""
        return f"Delta(values of {self.mask!r}{head})"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all weights; a ValueError if they have more than one."""
        return getattr(torch, self.mask.dtype)  # type: ignore[no-any-return]

    def by_weight(self) -> Iterator[Delta]:
        """Parts of one weight each, without the fingerprints of the rest, which users compare."""
        for i, (name, values) in enumerate(self.values.items()):
            indices, weights = {name: self.mask.indices[name]}, {name: self.mask.weights[name]}
            mask = replace(self.mask, indices=indices, weights=weights, fingerprints={})
            yield Delta(mask=mask, values={name: values}, head={} if i else self.head)

    def save(self, path: str | Path) -> None:
        """Writes the delta file, atomically; raises OSError as `files.atomic.atomic_write`."""
        indices, metadata = pack_mask(self.mask)
        values = {f"{name}.values": values for name, values in self.values.items()}
        head = {f"head.{name}": parameter for name, parameter in self.head.items()}
        tensors = indices | values | head
        assert len(tensors) == len(indices) + len(values) + len(head), "names collide"
        save_tensors(path, tensors, {**metadata, "head": list(self.head)}, kind=DELTA_KIND)

    @classmethod
    def load(cls, path: str | Path) -> Delta:
        """Reads a delta file; a ValueError says what of it, or of which weight, is invalid."""
        remedy = "pass the delta.safetensors that launch/train.py wrote"
        with taking_tensors(path, DELTA_KIND, remedy) as (tensors, metadata):
            mask = unpack_mask(tensors, metadata)
            values = take_tensors(tensors, mask.weights, "values")
            names = dict.fromkeys(map(str, metadata_field(metadata, "head", list)))
            if missing := [name for name in names if f"head.{name}" not in tensors]:
                raise ValueError(f"the head's parameter {missing[0]!r} is missing")
            head = {name: tensors.pop(f"head.{name}") for name in names}
            return cls(mask=mask, values=values, head=head)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, revision: str | None = None, token: str | None = None
    ) -> Delta:
        """Reads a delta: its file, that of a folder, or that of a repository of the Hub.

        Args:
            name: ``runs/x/delta.safetensors``, ``runs/x`` or ``user/repo``.
            revision: A branch, tag or commit of the repository.
            token: Of the Hub; default: the one that is logged in.

        Raises:
            ValueError: It cannot be fetched, or is no valid delta.
        """
        return cls.load(fetch(name, "delta.safetensors", revision, token))

    def push_to_hub(
        self,
        repo: str,
        *,
        scores: Mapping[str, float] | None = None,
        license: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> str:
        """Puts the delta and a card into a repository of the Hub, which is made if need be.

        Args:
            repo: ``user/repo``.
            scores: What was measured of the fine-tuned model, by the metrics' names.
            license: As the Hub names it (``apache-2.0``); default: the one of the base's card.
            private: Whether a new repository is.
            revision: The branch; default: main.
            token: Of the Hub; default: the one that is logged in.

        Returns:
            The address of the commit. A card that is there already stays.

        Raises:
            ValueError: The Hub refuses it.
        """
        api = HfApi(token=token)
        problem = f"The delta cannot be pushed to {repo}: {{}} (`hf auth login` says who you are)"
        with TemporaryDirectory() as folder:
            self.save(Path(folder, "delta.safetensors"))
            with refusing(problem, OSError, ValueError):
                api.create_repo(repo, private=private, exist_ok=True)
                if not api.file_exists(repo, CARD, revision=revision):
                    license = license or license_of(self.mask.base_model, token)
                    text = card_of(self, repo, scores or {}, license).text()
                    Path(folder, CARD).write_text(text, encoding="utf-8")
                commit = api.upload_folder(
                    repo_id=repo,
                    folder_path=folder,
                    revision=revision,
                    commit_message=f"Delta of {Path(self.mask.base_model).name}",
                )
        return str(commit.commit_url)


def card_of(delta: Delta, repo: str, scores: Mapping[str, float], license: str | None) -> ModelCard:
    """The card of a delta that is on the Hub without its run."""
    mask = delta.mask
    num_parameters = mask.num_entries
    if mask.fingerprints:  # of all parameters: "<dtype> <shape> <digest>"
        texts = [text.split()[1].replace("scalar", "1") for text in mask.fingerprints.values()]
        num_parameters = sum(prod(map(int, text.split("x"))) for text in texts)
    labels = mask.settings.get("labels")
    return ModelCard(
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
        num_parameters=num_parameters,
        dtype=mask.dtype,
        settings={"method": mask.method, **mask.settings},
        results=scores,
    )
