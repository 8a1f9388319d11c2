"""The mask: which entries of which weights are fine-tuned, and the file that keeps it.

    mask.safetensors    <weight name>.indices    flat (row-major) indices, strictly ascending;
                                                 int32, or int64 from 2^31 entries of the weight on
                        metadata                 base model and revision, method and settings, per
                                                 weight its shape, dtype and base checksum, and the
                                                 fingerprints of the base model's parameters

The checksums of the base model's values at the indices, and the fingerprints of all its parameters,
decide whether a mask or a delta meets the weights that it was made for. A `Mask` that exists is
valid, as it checks itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from gem_ds.files.digests import checksum
from gem_ds.files.fingerprint import differing, fingerprints, read_whole
from gem_ds.files.hub import fetch
from gem_ds.files.tensors import metadata_field, save_tensors, taking_tensors
from gem_ds.select.shards import index_dtype

MASK_KIND = "gem_mask"

#: What a trained weight can have; 8 bits and fewer need scales, which no entry has.
_DTYPES = ("float64", "float32", "bfloat16", "float16")

#: Fields of a mask that stand in its metadata as they are.
_FIELDS: dict[str, Any] = {
    "base_model": str,
    "revision": (str, NoneType),
    "method": str,
    "settings": dict,
}


@dataclass(frozen=True, kw_only=True)
class WeightInfo:
    """What a mask knows about a weight matrix of the base model."""

    shape: tuple[int, ...]  # the full one, whatever the ranks hold of it
    dtype: str  # as torch names it: bfloat16
    checksum: str  # of the base values at the mask's indices, in that dtype

    @classmethod
    def of(cls, shape: Sequence[int], base: Tensor) -> WeightInfo:
        """Of a weight of full `shape` whose base values at the indices are `base` (k_l,)."""
        return cls(shape=tuple(shape), dtype=dtype_name(base.dtype), checksum=checksum(base))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Mask:
    """The selected entries of a model.

    Attributes:
        indices: Weight name to flat indices (k_l,), strictly ascending, of dtype `index_dtype`.
        weights: Weight name to what is known about it; the same names.
        base_model: Name or folder of the base model, for the reader.
        revision: Its revision, where it has one.
        method: How the entries were chosen; ``gem``.
        settings: Settings of the method as JSON values (density, seed, targets, task, ...).
        fingerprints: Parameter name to its fingerprint, as `files.fingerprint` makes it; of the
            whole base model but for a task head, or none where they are not known.

    Raises:
        ValueError: Indices and weights disagree, or indices are invalid; the weight is named.
    """

    indices: dict[str, Tensor]
    weights: dict[str, WeightInfo]
    base_model: str
    revision: str | None = None
    method: str = "gem"
    settings: dict[str, Any]
    fingerprints: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("the mask has no weights")
        if unmatched := self.weights.keys() ^ self.indices.keys():
            name = min(unmatched)
            if name in self.weights:
                raise ValueError(f"weight {name!r} is described but has no indices")
            raise ValueError(f"weight {name!r} has indices but is not described")
        for name, info in self.weights.items():
            if not info.shape or not all(type(size) is int and size > 0 for size in info.shape):
                raise ValueError(f"weight {name!r} has the impossible shape {info.shape}")
            if info.dtype not in _DTYPES:
                raise ValueError(
                    f"weight {name!r} has the dtype {info.dtype!r}, which no weight can have"
                )
            _check_indices(name, self.indices[name], info.shape)

    def __repr__(self) -> str:
        count, total = self.num_selected, self.num_entries
        share = f"{count:,} of {total:,} entries ({count / total:.4%})"
        return f"Mask({self.method}: {share} in {len(self.weights)} weights of {self.base_model})"

    @property
    def num_selected(self) -> int:
        """Selected entries of all weights together (K)."""
        return sum(indices.numel() for indices in self.indices.values())

    @property
    def num_entries(self) -> int:
        """Entries of all weights together, selected or not."""
        return sum(prod(info.shape) for info in self.weights.values())

    @property
    def dtype(self) -> str:
        """The torch name of the dtype of all weights; a ValueError if they have more than one."""
        dtypes = {info.dtype for info in self.weights.values()}
        if len(dtypes) > 1:
            raise ValueError(f"the weights have several dtypes ({', '.join(sorted(dtypes))})")
        return dtypes.pop()

    def revision_of(self, base: str) -> str:
        """The revision of a base model; the recorded one means nothing in another repository."""
        return (self.revision if base == self.base_model else None) or "main"

    def save(self, path: str | Path) -> None:
        """Writes the mask file, atomically; raises OSError as `files.atomic.atomic_write`."""
        save_tensors(path, *pack_mask(self), kind=MASK_KIND)

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """Reads a mask file; a ValueError says what of it, or of which weight, is invalid."""
        remedy = "make the mask again with launch/train.py --max_steps 0"
        with taking_tensors(path, MASK_KIND, remedy) as content:
            return unpack_mask(*content)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, revision: str | None = None, token: str | None = None
    ) -> Mask:
        """Reads a mask: its file, that of a folder, or that of a repository of the Hub."""
        return cls.load(fetch(name, "mask.safetensors", revision, token))

    def check_model(self, shapes: Mapping[str, tuple[int, ...]], model: str) -> None:
        """Refuses a `model` that lacks a weight of the mask or has it in another shape."""
        remedy = f"use the base model that it was made for, {self.base_model}"
        for name, info in self.weights.items():
            if name not in shapes:
                raise ValueError(
                    f"the mask selects entries of {name!r}, which {model} does not have: {remedy}"
                )
            if tuple(shapes[name]) != info.shape:
                raise ValueError(
                    f"the mask was made for {name!r} of shape {info.shape}, and {model} has it in "
                    f"shape {tuple(shapes[name])}: {remedy}"
                )

    def differing_weights(self, values: Mapping[str, Tensor]) -> list[str]:
        """Names of the weights that have not the recorded values [k_l] at the mask's indices.

        Weights in another dtype than the mask's cannot be compared and are left out.
        """
        return [
            name
            for name, info in self.weights.items()
            if dtype_name(values[name].dtype) == info.dtype
            and checksum(values[name]) != info.checksum
        ]

    def check_base(self, values: Mapping[str, Tensor], noun: str = "mask") -> None:
        """Refuses other base weights, by values as `differing_weights` takes them."""
        if names := self.differing_weights(values):
            self._refuse_base(f"{len(names)} of {len(self.weights)} weights differ", names, noun)

    def check_rest(self, found: Mapping[str, str], noun: str = "mask") -> None:
        """Refuses a base that differs beyond the entries, by its parameters' fingerprints.

        Parameters that one of the two lacks or has in another dtype or shape are left out.
        """
        if names := differing(self.fingerprints, found):
            count = f"{len(names)} of {len(self.fingerprints)} parameters"
            self._refuse_base(f"{count} differ beyond the selected entries", names, noun)

    def check_parameters(
        self, parameters: Mapping[str, Tensor], model: str, noun: str = "mask"
    ) -> None:
        """All three checks, of parameters that are whole in this process and nobody has changed."""
        self.check_model({name: tuple(p.shape) for name, p in parameters.items()}, model)
        values = read_whole([(parameters[name], index) for name, index in self.indices.items()])
        self.check_base(dict(zip(self.indices, values, strict=True)), noun)
        known = {name: p for name, p in parameters.items() if name in self.fingerprints}
        self.check_rest(fingerprints(known), noun)

    def _refuse_base(self, problem: str, names: list[str], noun: str) -> None:
        revision = f" at revision {self.revision}" if self.revision else ""
        raise ValueError(
            f"this {noun} was made for other base weights ({problem}, the first is {names[0]!r}): "
            f"use {self.base_model}{revision}"
        )


def dtype_name(dtype: torch.dtype) -> str:
    """The torch name of a dtype without the module: torch.bfloat16 -> ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def pack_mask(mask: Mask) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata of a mask, as they stand in its file."""
    tensors = {f"{name}.indices": indices for name, indices in mask.indices.items()}
    metadata = {field: getattr(mask, field) for field in _FIELDS}
    metadata["weights"] = {name: asdict(info) for name, info in mask.weights.items()}
    metadata["fingerprints"] = mask.fingerprints
    return tensors, metadata


def unpack_mask(tensors: dict[str, Tensor], metadata: Mapping[str, Any]) -> Mask:
    """The inverse of `pack_mask`; takes the mask's tensors out of those of the file."""
    described = metadata_field(metadata, "weights", dict)
    weights = {}
    for name in described:
        entry = metadata_field(described, name, dict)
        weights[name] = WeightInfo(
            shape=tuple(metadata_field(entry, "shape", list)),
            dtype=metadata_field(entry, "dtype", str),
            checksum=metadata_field(entry, "checksum", str),
        )
    fingerprints = metadata_field({"fingerprints": {}, **metadata}, "fingerprints", dict)
    return Mask(
        indices=take_tensors(tensors, weights, "indices"),
        weights=weights,
        fingerprints={name: str(text) for name, text in fingerprints.items()},
        **{field: metadata_field(metadata, field, types) for field, types in _FIELDS.items()},
    )


def take_tensors(
    tensors: dict[str, Tensor], weights: Mapping[str, WeightInfo], part: str
) -> dict[str, Tensor]:
    """Takes ``<name>.<part>`` of each weight out of `tensors`; a ValueError names a missing one."""
    for name in weights:
        if f"{name}.{part}" not in tensors:
            raise ValueError(f"weight {name!r} has no {part}")
    return {name: tensors.pop(f"{name}.{part}") for name in weights}


def _check_indices(name: str, indices: Tensor, shape: tuple[int, ...]) -> None:
    """Refuses indices that are not flat, strictly ascending and inside a weight of `shape`."""
    numel = prod(shape)
    if indices.dtype != index_dtype(numel) or indices.dim() != 1:
        raise ValueError(
            f"the indices of {name!r} are {indices.dim()}-dimensional {dtype_name(indices.dtype)} "
            f"instead of 1-dimensional {dtype_name(index_dtype(numel))}"
        )
    if not indices.numel():
        return
    if not (indices[1:] > indices[:-1]).all():
        raise ValueError(f"the indices of {name!r} hold duplicates or are not in ascending order")
    low, high = int(indices[0]), int(indices[-1])
    if low < 0 or high >= numel:
        raise ValueError(
            f"index {low if low < 0 else high} of {name!r} is out of range for its shape {shape}"
        )
