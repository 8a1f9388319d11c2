"""The products of tokens that are sorted into groups, each with a matrix of its own: of experts.

``ends``, int32 [groups], says where each group's tokens end; the first begins at 0, and a group may
be empty. The matrices are one tensor [groups, rows, columns], of which the gradient is needed as
that of a single matrix is (:mod:`gem_ds.sddmm`): whole, or at selected entries. Without
``ends`` everything here is what :mod:`gem_ds.sddmm.kernels` has.

Two routes compute the same. A GPU takes all groups in one launch (torch's ``grouped_mm``), in which
no group's length has to be known to the host: no wait for the device, no loop. It takes bf16 and
rows of whole 16 bytes; elsewhere each group that has tokens is a product of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from gem_ds.sddmm import kernels
from gem_ds.sddmm.kernels import Pattern

#: What the products of all groups may take at a time where selected entries are picked from them.
TILE_BYTES = 256 << 20


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each token by its group's matrix: x [tokens, in], weight [groups, in, out]; [tokens, out].

    Under autocast in its dtype, as a linear layer's product is.
    """
    if x.is_meta:
        return x.new_empty(x.shape[0], weight.shape[2])
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if takes_one_launch(x, weight):
        return F.grouped_mm(x, weight, offs=ends)
    y = x.new_empty(x.shape[0], weight.shape[2])
    for group, tokens in _groups(ends):
        torch.mm(x[tokens], weight[group], out=y[tokens])
    return y


def product(
    dy: Tensor, x: Tensor, out: Tensor | None = None, *, ends: Tensor | None = None
) -> Tensor:
    """``dy^T x`` in fp32 [rows, columns], or of each group [groups, rows, columns]."""
    if ends is None:
        return kernels.product(dy, x, out)
    if out is None:
        shape = len(ends), dy.shape[1], x.shape[1]
        out = torch.empty(shape, dtype=torch.float32, device=dy.device)
    add_product(out.zero_(), dy, x, ends=ends)
    return out


def add_product(
    out: Tensor, dy: Tensor, x: Tensor, *, scale: float = 1.0, ends: Tensor | None = None
) -> None:
    """Add ``scale`` times :func:`product` to ``out``, fp32."""
    if ends is None:
        kernels.add_product(out, dy, x, scale)
    elif takes_one_launch(dy, x):
        out.add_(F.grouped_mm(dy.t(), x, offs=ends), alpha=scale)
    else:
        for group, tokens in _groups(ends):
            kernels.add_product(out[group], dy[tokens], x[tokens], scale)


def add_sampled_product(
    out: Tensor,
    dy: Tensor,
    x: Tensor,
    pattern: Pattern,
    kernel: str = "auto",
    *,
    ends: Tensor | None = None,
) -> None:
    """Add :func:`product` at the k entries of ``pattern`` to ``out``, fp32 [k], contiguous.

    Of groups the pattern's rows are those of the first group's matrix, then the second's, and on.
    All entries of them are added as the product itself, if no kernel is named.
    """
    if ends is None:
        kernels.add_sampled_product(out, dy, x, pattern, kernel)
    elif pattern.num_entries == 0:
        return
    elif pattern.is_whole and kernel == "auto":
        add_product(out.view(len(ends), dy.shape[1], x.shape[1]), dy, x, ends=ends)
    elif takes_one_launch(dy, x):
        add_picked(out, dy, x, pattern, ends)
    else:
        if kernel == "auto" and dy.is_cuda:
            kernel = "tiled"  # another would look for each group's strips in every micro-batch
        for group, tokens in _groups(ends):
            entries, own = pattern.part(group * dy.shape[1], dy.shape[1])
            kernels.add_sampled_product(out[entries], dy[tokens], x[tokens], own, kernel)


def add_picked(out: Tensor, dy: Tensor, x: Tensor, pattern: Pattern, ends: Tensor) -> None:
    """Makes the products of a tile of rows of all groups, at most :data:`TILE_BYTES`.

    All entries are looked up in every tile, and those that lie elsewhere count 0, since how many
    lie in it is nothing that the host knows.
    """
    groups, rows, columns = len(ends), dy.shape[1], x.shape[1]
    fitting = TILE_BYTES // (groups * columns * dy.element_size())
    tile_rows = min(rows, max(8, fitting // 8 * 8))  # whole 16 bytes
    row = pattern.flat_index // columns
    group, row = row // rows, row % rows
    for start in range(0, rows, tile_rows):
        tile = F.grouped_mm(dy[:, start : start + tile_rows].t(), x, offs=ends)
        length = tile.shape[1]
        place = (group * length + row - start) * columns + pattern.flat_index % columns
        is_here = (row >= start) & (row < start + length)
        found = tile.view(-1)[place.clamp_(0, tile.numel() - 1)]
        out += torch.where(is_here, found, 0)


def takes_one_launch(a: Tensor, b: Tensor) -> bool:
    """Whether ``grouped_mm`` takes both, without a loop of its own over the groups."""
    is_aligned = a.shape[-1] % 8 == b.shape[-1] % 8 == 0
    return a.is_cuda and a.dtype == b.dtype == torch.bfloat16 and is_aligned


def _groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """The groups that have tokens, and which those are; waits for the device."""
    start = 0
    for group, end in enumerate(ends.tolist()):
        if start < end:
            yield group, slice(start, end)
        start = end
