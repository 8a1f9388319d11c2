"""Where the entries of a delta are in a model of another layout, as its own loader tells.

An inference engine merges weights (q, k and v; gate and up), cuts them over ranks, pads and
transposes them. Its model's ``load_weights`` knows how: it takes names and whole tensors as they
stand in checkpoints (where each expert has matrices of its own), and ends in copies into the
weights. Here it is given, weight by weight, a tensor on the CPU that holds i at the delta's entry i
and -1 elsewhere; a copy of such a tensor into the model's memory is not carried out, but says which
entries of the delta go where. So no layout is known here, and nothing is written meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from gem_ds.files.apply import Swap
from gem_ds.files.delta import Delta
from gem_ds.files.mask import dtype_name
from gem_ds.models.blocks import model_of


def swaps_through_loader(model: nn.Module, delta: Delta) -> list[Swap]:
    """Of a model that has ``load_weights``, the entries that are in this process, perhaps none.

    One for every tensor of the model that holds entries of a weight of the delta, whose names are
    those of checkpoints. A ValueError refuses a weight that the loader does not know or does more
    with than to copy it, or that the model holds in another dtype, or quantized.
    """
    if delta.head:
        raise ValueError("the delta has a task head, which a model that generates has no place for")
    swaps = []
    described = cache(lambda: model_of(cast(Any, model).config))
    for name, values in delta.values.items():
        info = delta.mask.weights[name]
        marks = _marks(delta.mask.indices[name], info.shape)
        found: dict[int, tuple[Tensor, list[Tensor], list[Tensor]]] = {}  # by the memory
        for target, marked in _copies(model, name, marks, described):
            if dtype_name(target.dtype) != info.dtype:
                raise ValueError(
                    f"the delta is {info.dtype} and the model has {name!r} in "
                    f"{dtype_name(target.dtype)}: load it with that dtype, and not quantized"
                )
            marked = marked.cpu()  # a loader may have moved it
            at = (marked >= 0).nonzero()  # [k, dimensions]
            chosen = marked[tuple(at.T)].long()
            is_copy = marked.dtype == marks.dtype and marked.shape == target.shape
            if not is_copy or not _are_distinct(chosen, len(values)):
                raise ValueError(f"the model's loader does more with {name!r} than to copy it")
            places = (at * torch.tensor(target.stride())).sum(dim=1) + int(target.storage_offset())
            memory = target.untyped_storage()
            flat = target.as_strided((memory.nbytes() // target.itemsize,), (1,), 0)
            _, all_places, all_chosen = found.setdefault(memory.data_ptr(), (flat, [], []))
            all_places.append(places)
            all_chosen.append(chosen)
        for flat, all_places, all_chosen in found.values():
            indices, chosen = torch.cat(all_places).to(flat.device), torch.cat(all_chosen)
            swaps.append(
                Swap(
                    weight=name,
                    tensor=flat,
                    indices=indices,
                    base=flat[indices],
                    values=values[chosen],
                    chosen=chosen,
                )
            )
    return swaps


def _are_distinct(chosen: Tensor, count: int) -> bool:
    return len(chosen.unique()) == len(chosen) and not (chosen >= count).any()


def _marks(indices: Tensor, shape: tuple[int, ...]) -> Tensor:
    """I at the flat index i, -1 elsewhere, as floats that hold every i exactly."""
    dtype = torch.float32 if len(indices) <= 2**24 else torch.float64
    marks = torch.full(shape, -1, dtype=dtype)
    marks.view(-1)[indices.long()] = torch.arange(len(indices), dtype=dtype)
    return marks


@torch.no_grad()
def _copies(
    model: nn.Module, name: str, marks: Tensor, described: Callable[[], PreTrainedModel]
) -> list[tuple[Tensor, Tensor]]:
    """What the loader would copy into the model: where, and what."""
    loader: Any = model
    recorder = _Recorder(model)
    try:
        parts = {name: marks}
        if marks.dim() > 2:  # experts, which transformers holds together and checkpoints apart
            parts = revert_weight_conversion(described(), parts)
        with recorder:
            loader.load_weights(list(parts.items()))
    except Exception as error:  # of a name or a shape that it does not know it raises anything
        raise ValueError(
            f"the loader of {type(model).__name__} does not take {name!r} "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}): export the model"
        ) from error
    return recorder.copies


class _Recorder(TorchDispatchMode):
    """While it lasts, copies into the model's memory are noted and not carried out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        own = chain(model.parameters(), model.buffers())
        self._memory = {tensor.untyped_storage().data_ptr() for tensor in own}
        self.copies: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for every operation."""
        if (
            func is torch.ops.aten.copy_.default
            and args[0].untyped_storage().data_ptr() in self._memory
        ):
            self.copies.append((args[0], args[1]))
            return args[0]
        return func(*args, **(kwargs or {}))
