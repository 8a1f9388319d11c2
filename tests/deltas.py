"""Deltas of a model in memory, and a mask of none."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from gem_ds.files.delta import Delta
from gem_ds.files.fingerprint import fingerprints
from gem_ds.files.mask import Mask, WeightInfo
from gem_ds.select.shards import index_dtype


def make_delta(
    model: nn.Module,
    chosen: Mapping[str, Sequence[int]],
    base_model: str = "base",
    values: Sequence[float] | None = None,
) -> Delta:
    """A delta of the chosen flat indices, found with plain Python over a flat copy.

    The trained values are ``values`` in each weight, or depend on the base's and differ from them.
    """
    indices, weights, trained = {}, {}, {}
    for name, positions in chosen.items():
        weight = model.get_parameter(name).detach()
        base = weight.contiguous().flatten()[list(positions)]
        indices[name] = torch.tensor(positions, dtype=index_dtype(weight.numel()))
        weights[name] = WeightInfo.of(weight.shape, base)
        other = base.float().nan_to_num().clamp(-9, 9) * 1.5 + 1
        trained[name] = (other if values is None else torch.tensor(values)).to(weight.dtype)
    settings = {"density": 0.1}
    mask = Mask(
        indices=indices,
        weights=weights,
        base_model=base_model,
        settings=settings,
        fingerprints=fingerprints(dict(model.named_parameters())),
    )
    return Delta(mask=mask, values=trained)


def as_older(delta: Delta) -> Delta:
    """As gem_ds wrote deltas before it knew fingerprints; for one of them the model is loaded."""
    return replace(delta, mask=replace(delta.mask, fingerprints={}))


def mask_of(names: Sequence[str]) -> Mask:
    """One entry of the first weight, two of the second, and so on; of no model."""
    return Mask(
        indices={n: torch.arange(i, dtype=torch.int32) for i, n in enumerate(names, start=1)},
        weights={n: WeightInfo(shape=(40, 40), dtype="float32", checksum="0" * 64) for n in names},
        base_model="tiny",
        settings={},
    )


def bytes_of(tensor: Tensor) -> bytes:
    """Its numbers' bytes in row-major order, whatever its layout."""
    whole = tensor.detach().clone(memory_format=torch.contiguous_format)
    return whole.flatten().view(torch.uint8).numpy().tobytes()


def bits(model: nn.Module) -> dict[str, bytes]:
    """The bytes of every parameter; tied ones stand there under each of their names."""
    return {name: bytes_of(p) for name, p in model.named_parameters(remove_duplicate=False)}


def overwritten(model: nn.Module, delta: Delta | None) -> dict[str, bytes]:
    """The bits of a copy of the model that is overwritten entry by entry."""
    model = copy.deepcopy(model)
    for name, values in delta.values.items() if delta is not None else ():
        weight = model.get_parameter(name).data
        for index, value in zip(delta.mask.indices[name].tolist(), values, strict=True):
            weight[torch.unravel_index(torch.tensor(index), weight.shape)] = value
    return bits(model)
