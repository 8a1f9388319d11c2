"""Maxima and sums over matrices that no rank holds whole: the same bits however they are cut.

Floating-point sums depend on how a matrix is cut; these do not. The largest term of a layer is
found first (a maximum is exact in any order), and the caller scales terms by a power of two, so
that none exceeds 1. Each is rounded to an integer, ``round(term * 2^b)`` with b at most 35 and
62 - ceil(log2 n_l), and the integers are summed: those of a small chunk in fp64, which is exact
below 2^53, all else in int64. What the rounding leaves is scaled by another 2^b and summed the same
way: in a heavy tail most terms, squares above all, are far below 2^-b. So the error of a sum is
that of its terms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gem_ds.select.shards import Group, Shards, chunk_length, chunks

#: b is at most this, so that so many terms sum exactly in fp64.
_MOST_BITS, _SMALL = 35, 2**18

Terms = Callable[[int, Tensor, Tensor], tuple[Tensor, ...]]
"""Takes a layer's number, a chunk in fp64 [m] and a spare tensor like it, both to be overwritten;
returns terms in [-1, 1], fp64 [m], each kind in a tensor of its own."""


def largest_magnitudes(parts: Sequence[Tensor], shards: Shards, group: Group) -> list[float]:
    """The largest magnitude in each layer, of this rank's parts [m] and the other ranks'.

    An infinity or a NaN anywhere is a ValueError on every rank alike, which names the layers.
    """
    peaks = torch.stack(
        [_peak(part).to(shard.device) for part, shard in zip(parts, shards, strict=True)]
    )
    broken = ~peaks.isfinite()
    rows = torch.stack([peaks.masked_fill(broken, 0.0), broken.float()])
    largest: list[float]
    largest, refused = group.all_reduce(rows, "max").tolist()
    if any(refused):
        names = ", ".join(shard.name for shard, bad in zip(shards, refused, strict=True) if bad)
        raise ValueError(
            f"The scores of {names} are not finite: look for inf or NaN in the calibration loss "
            "and in these weights, or calibrate in bf16 or fp32."
        )
    return largest


def _peak(part: Tensor) -> Tensor:
    """The largest magnitude, fp32; a NaN if there is one, 0 if there is nothing."""
    if not part.numel():
        return part.new_zeros((), dtype=torch.float32)
    low, high = part.aminmax()  # hands a NaN on
    return torch.maximum(high, -low).float()


def exact_sums(
    terms: Terms, num_kinds: int, parts: Sequence[Tensor], shards: Shards, group: Group
) -> list[list[float]]:
    """Over all ranks the sum of each kind of term and layer, each correctly rounded."""
    bits = [min(_MOST_BITS, 62 - (shard.numel - 1).bit_length()) for shard in shards]
    device = shards[0].device
    sums = torch.zeros(num_kinds, len(shards), 2, dtype=torch.int64, device=device)
    length = min(chunk_length(device), max(part.numel() for part in parts))
    buffers = torch.empty(3, length, dtype=torch.float64, device=device)
    for layer, part in enumerate(parts):
        pairs: list[Tensor] = []
        for chunk in chunks(part, device):
            values, spare, other = buffers[:, : chunk.numel()]
            for kind in terms(layer, values.copy_(chunk.float()), spare):
                pairs += _fixed_point_sum_(kind, bits[layer], other)
        sums[:, layer] = torch.stack(pairs).view(-1, num_kinds, 2).sum(dim=0)
    group.all_reduce(sums, "sum")
    return [
        [((high << b) + low) / (1 << 2 * b) for (high, low), b in zip(row, bits, strict=True)]
        for row in sums.tolist()
    ]


def _fixed_point_sum_(terms: Tensor, bits: int, spare: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of terms in [-1, 1], fp64 [m]. Both tensors are overwritten.

    Two integers, int64: the first counts units of 2^-b, the second, for what rounding to those
    leaves, units of 2^-2b.
    """
    scale = 2.0**bits
    whole = torch.round(terms.mul_(scale), out=spare)
    rest = terms.sub_(whole).mul_(scale)  # exact
    return _exact_sum(whole), _exact_sum(rest.round_())


def _exact_sum(integers: Tensor) -> Tensor:
    """Of integers of at most 2^35, fp64 [m]; int64, in which no sum of a layer's overflows."""
    if integers.numel() <= _SMALL:
        return integers.sum().long()
    return integers.sum(dtype=torch.int64)
