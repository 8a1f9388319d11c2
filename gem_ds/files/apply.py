"""A delta applied to a base model, in place, and taken back.

The values that are replaced are kept, so that the base comes back bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from gem_ds.files.delta import Delta
from gem_ds.files.fingerprint import fingerprints, read_whole, sample
from gem_ds.files.mask import dtype_name

#: Of a parameter what deltas that stand in it have replaced of its sample: where, and the base's
#: values. So a second delta sees the base, where the first has left its own entries alone.
_REPLACED: MutableMapping[Tensor, dict[object, tuple[Tensor, Tensor]]]
_REPLACED = WeakTensorKeyDictionary()


@dataclass(frozen=True, kw_only=True, eq=False)
class Swap:
    """Entries of one weight of a delta where the model has them."""

    weight: str  # its name in the delta
    tensor: Tensor  # a parameter, or what else holds the entries
    indices: Tensor | None  # flat (k,), into the tensor; None is the whole of it, of a head
    base: Tensor  # bits to put back, as many
    values: Tensor  # the delta's, as many
    chosen: Tensor | None = None  # which of the delta's k_l entries these are; None is all


class AppliedDelta:
    """A delta that stands in a model; as a context manager it reverts on leaving.

    with apply_delta(model, delta):
        ...  # the trained model
    ...  # the base model again, bit for bit
    """

    def __init__(self, swaps: list[Swap]) -> None:
        self._replaced = [(swap.tensor, swap.indices, swap.base) for swap in swaps]
        self._key = object()  # in _REPLACED, which must not keep the parameters alive
        for swap in swaps:
            if swap.indices is not None:
                at, found = _within(sample(swap.tensor.numel()), swap.indices)
                base = swap.base[found.to(swap.base.device)]
                _REPLACED.setdefault(swap.tensor, {})[self._key] = at, base

    def revert(self) -> None:
        """Puts the base values back, bit for bit; a second call does nothing.

        The model may have moved to another device since, but must have kept its dtype.
        """
        while self._replaced:
            tensor, indices, base = self._replaced[-1]
            write_entries(tensor, indices, base)
            self._replaced.pop()
            _REPLACED.get(tensor, {}).pop(self._key, None)

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
    swaps = find_swaps(model, delta)
    for swap in swaps:
        write_entries(swap.tensor, swap.indices, swap.values)
    return AppliedDelta(swaps)


def find_swaps(model: nn.Module, delta: Delta) -> list[Swap]:
    """What a delta would replace in `model`, unwritten; raises as `apply_delta`."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    delta.mask.check_model(shapes, type(model).__name__)
    _check_parameters(parameters, delta)
    entries = delta.mask.indices | dict.fromkeys(delta.head)
    base = {name: _read(parameters[name], index) for name, index in entries.items()}
    _check_base(delta, base, parameters)
    values = delta.values | delta.head
    return [
        Swap(weight=n, tensor=parameters[n], indices=index, base=base[n], values=values[n])
        for n, index in entries.items()
    ]


def _check_parameters(parameters: Mapping[str, nn.Parameter], delta: Delta) -> None:
    """Refuses a model without the head's parameters, or in another dtype, which is not exact."""
    for name, values in delta.head.items():
        if name not in parameters or parameters[name].shape != values.shape:
            raise ValueError(
                f"the delta has a task head with {name!r} of shape {tuple(values.shape)}, which "
                "the model does not have: load it with the class that was trained"
            )
    for name, expected in (delta.values | delta.head).items():
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
    whole = parameter.detach()
    if flat_indices is None:
        return whole.clone()
    return whole.take(flat_indices.to(whole.device, torch.int64))


@torch.no_grad()
def write_entries(parameter: Tensor, flat_indices: Tensor | None, values: Tensor) -> None:
    """Overwrites the entries of `parameter` at flat indices, in place, or all where it is None."""
    values = values.to(parameter.device)
    if flat_indices is None:
        parameter.copy_(values)
        return
    index = flat_indices.to(parameter.device, torch.int64)
    if parameter.is_contiguous():  # several times as fast
        parameter.view(-1).index_copy_(0, index, values)
    else:
        parameter[torch.unravel_index(index, parameter.shape)] = values
