"""Which inputs of a layer its selected entries read, and when no others are kept for the backward.

The gradient of entry (i, j) is ``sum_t dy[t, i] x[t, j]``: a layer whose entries lie in few columns
needs few features of x. A copy of these takes their share of x, while x itself is there once for
all layers that read it: here those of one module with equally many inputs, as query, key and value.
*The rule*: they keep copies if these together take less than half of x. More would cost the time of
copying and save little. At a density of 0.1 % the columns of query and value projections have
dozens of entries each; this is for lower densities and for wide layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from gem_ds.sparse.layers import TargetLayer


def keep_copies(layers: Sequence[TargetLayer], num_used: Sequence[int]) -> list[bool]:
    """Whether each layer keeps a copy of its used inputs, by how many these are."""
    total: Counter[tuple[str, int]] = Counter()
    parents = [layer.name.rpartition(".")[0].rpartition(".")[0] for layer in layers]
    modules = [(name, layer.num_inputs) for name, layer in zip(parents, layers, strict=True)]
    for module, number in zip(modules, num_used, strict=True):
        total[module] += number
    return [2 * total[module] < module[1] for module in modules]


def used_inputs(
    layers: Sequence[TargetLayer], flat_indices: Sequence[Tensor]
) -> list[Tensor | None]:
    """Per layer the inputs that its entries read, int64, ascending; None where x is kept as it is.

    ``flat_indices`` are the layers' entries, int [k_l], ascending.
    """
    used = []
    for layer, index in zip(layers, flat_indices, strict=True):
        is_used = torch.zeros(layer.num_inputs, dtype=torch.bool, device=index.device)
        if layer.num_inputs:
            is_used[_input_of(layer, index)] = True
        used.append(is_used.nonzero().flatten())
    copied = keep_copies(layers, [inputs.numel() for inputs in used])
    return [inputs if is_copied else None for inputs, is_copied in zip(used, copied, strict=True)]


def among(
    inputs: Tensor | None, layer: TargetLayer, flat_index: Tensor
) -> tuple[Tensor, tuple[int, ...]]:
    """Flat indices, and the shape, in the matrix of a layer that has no inputs but these."""
    if inputs is None:
        return flat_index, layer.shape
    place = torch.searchsorted(inputs, _input_of(layer, flat_index)).to(flat_index.dtype)
    rows, columns = layer.shape
    if layer.input_dim == 1:
        return flat_index // columns * inputs.numel() + place, (rows, inputs.numel())
    return place * columns + flat_index % columns, (inputs.numel(), columns)


def _input_of(layer: TargetLayer, flat_index: Tensor) -> Tensor:
    """Of each entry the input that it reads, int64."""
    columns = layer.shape[-1]
    index = flat_index.long()
    return index % columns if layer.input_dim == 1 else index // columns
