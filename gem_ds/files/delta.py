"""The delta: the trained values at a mask's entries; applied to a base model and taken back.

    delta.safetensors    <weight name>.indices    as in mask.safetensors
                         <weight name>.values     the weights themselves, in the model's dtype
                         head.<name>              a dense parameter trained beside the mask, if any
                         metadata                 that of the mask, and the names of the head

Values are absolute, not differences: base + delta is an overwrite, with no rounding. Applying works
on a whole model in one process, on any device; the values that are replaced are kept, so that
`AppliedDelta.revert` gives the base back bit for bit. ZeRO partitions are not written here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from gem_ds.files.fingerprint import fingerprints, read_whole, sample
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
            _check_values(name, values, self.mask)
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
        dtype: torch.dtype = getattr(torch, self.mask.dtype)
        return dtype

    def by_weight(self) -> Iterator[Delta]:
        """The delta in parts of one weight each, so that one weight at a time need be whole.

        Without the fingerprints of the rest, which whoever applies the parts compares.
        """
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


#: Of a parameter what deltas that stand in it have replaced of its sample: where, and the base's
#: values. So a second delta sees the base, where the first has left its own entries alone.
_REPLACED: MutableMapping[nn.Parameter, dict[AppliedDelta, tuple[Tensor, Tensor]]]
_REPLACED = WeakTensorKeyDictionary()


class AppliedDelta:
    """A delta that stands in a model; keeps the base values and can put them back.

    As a context manager it reverts on leaving:

        with apply_delta(model, delta):
            ...  # the trained model
        ...  # the base model again, bit for bit
    """

    def __init__(self, replaced: list[tuple[nn.Parameter, Tensor | None, Tensor]]) -> None:
        self._replaced = replaced
        for parameter, indices, base in replaced:
            if indices is not None:
                at, found = _within(sample(parameter.numel()), indices)
                _REPLACED.setdefault(parameter, {})[self] = at, base[found.to(base.device)]

    def revert(self) -> None:
        """Puts the base values back, bit for bit; a second call does nothing.

        The model may have moved to another device since, but must have kept its dtype.
        """
        while self._replaced:
            _write(*self._replaced[-1])
            parameter, *_ = self._replaced.pop()
            _REPLACED.get(parameter, {}).pop(self, None)

    def __enter__(self) -> AppliedDelta:
        return self

    def __exit__(self, *exception: object) -> None:
        self.revert()


def apply_delta(model: nn.Module, delta: Delta) -> AppliedDelta:
    """Overwrites the selected entries of `model`, in place, with the delta's values.

    Everything is checked before the first entry is written. Parameters stay the same objects, so
    tied weights remain tied and a wrapped or compiled model sees the new values.

    Args:
        model: The base model, whole in this process, on any device, in the delta's dtype.
        delta: What to apply.

    Returns:
        The handle that reverts it.

    Raises:
        ValueError: The model lacks a weight, has it in another shape or dtype, or holds other base
            values at the entries (another model, or the delta is applied already).
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    delta.mask.check_model(shapes, type(model).__name__)
    _check_parameters(parameters, delta)
    entries = delta.mask.indices | dict.fromkeys(delta.head)
    base = {name: _read(parameters[name], index) for name, index in entries.items()}
    _check_base(delta, base, parameters)
    for name, values in (delta.values | delta.head).items():
        _write(parameters[name], entries[name], values)
    return AppliedDelta([(parameters[name], entries[name], base[name]) for name in entries])


def _check_values(name: str, values: Tensor, mask: Mask) -> None:
    """Refuses values that do not fit the mask's weight `name` or are not finite."""
    info, count = mask.weights[name], mask.indices[name].numel()
    if values.shape != (count,):
        raise ValueError(
            f"the values of {name!r} have shape {tuple(values.shape)} for {count} indices"
        )
    if dtype_name(values.dtype) != info.dtype:
        raise ValueError(
            f"the values of {name!r} are {dtype_name(values.dtype)} for a {info.dtype} weight"
        )
    if not values.isfinite().all():
        raise ValueError(f"the values of {name!r} hold NaN or infinity")


def _check_parameters(parameters: Mapping[str, nn.Parameter], delta: Delta) -> None:
    """Refuses a model without the head's parameters, or in another dtype, which is not exact."""
    for name, values in delta.head.items():
        if name not in parameters or parameters[name].shape != values.shape:
            raise ValueError(
                f"the delta has a task head with {name!r} of shape {tuple(values.shape)}, which "
                "the model does not have: load it with the class that was trained"
            )

    for name, expected in {**delta.values, **delta.head}.items():
        if parameters[name].dtype != expected.dtype:
            raise ValueError(
                f"the delta is {dtype_name(expected.dtype)} and the model has {name!r} in "
                f"{dtype_name(parameters[name].dtype)}: load the model with dtype={expected.dtype}"
            )


def _check_base(
    delta: Delta, base: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
) -> None:
    """Refuses another base; `base` are the values of the model's `parameters` at the entries."""
    is_applied = all(torch.equal(base[n], v.to(base[n].device)) for n, v in delta.values.items())
    if is_applied and delta.mask.differing_weights(base):
        raise ValueError(
            "the delta seems to be applied already, the model holds its values: revert it first"
        )
    delta.mask.check_base(base, "delta")
    parameters = {n: p for n, p in parameters.items() if n in delta.mask.fingerprints}
    delta.mask.check_rest(fingerprints(parameters, _read_base), "delta")


def _read_base(entries: Sequence[tuple[nn.Parameter, Tensor]]) -> list[Tensor]:
    """Samples of parameters as they are in the base, without the deltas that stand in them."""
    values = read_whole(entries)
    for (parameter, _), sampled in zip(entries, values, strict=True):
        for at, base in _REPLACED.get(parameter, {}).values():
            sampled[at.to(sampled.device)] = base.to(sampled.device)
    return values


def _within(ascending: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Where the numbers that stand in both, each ascending, stand in the one and in the other."""
    indices = indices.to(ascending)
    places = torch.searchsorted(indices, ascending).clamp(max=max(indices.numel() - 1, 0))
    at = (indices[places] == ascending).nonzero().flatten() if indices.numel() else places[:0]
    return at, places[at]


def _read(parameter: nn.Parameter, flat_indices: Tensor | None) -> Tensor:
    """A copy of the entries of `parameter` at flat indices, or of all where these are None."""
    return parameter.detach()[_place(parameter, flat_indices)].clone()


@torch.no_grad()
def _write(parameter: nn.Parameter, flat_indices: Tensor | None, values: Tensor) -> None:
    parameter[_place(parameter, flat_indices)] = values.to(parameter.device)


def _place(parameter: nn.Parameter, flat_indices: Tensor | None) -> Any:
    """One index tensor per dimension; unlike a flat view these reach non-contiguous parameters."""
    if flat_indices is None:
        return ...
    return torch.unravel_index(flat_indices.to(parameter.device, torch.int64), parameter.shape)
