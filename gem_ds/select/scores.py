"""Scores of entries and of layers: which entries matter, and how much each layer does.

For the weight matrix of layer l, with g the calibration gradient and w the weight, both in fp32::

    r   = |g| / (|w| + 1e-8)                           gradient-to-weight ratio, one per entry
    p   = r / sum(r)
    H_l = max(0, -sum p log(p + 1e-8))                 entropy of the ratios, natural logarithm
    s_l = ||r||_2 * H_l                                layer score

(GEM, arXiv 2508.16191.) The other scores that sparse fine-tuning knows, magnitudes of the gradient,
the weight or its principal part, and chance, go through the same statistics. Which score decides on
what is :mod:`gem_ds.select.rules`' business; how sums run over ranks, :mod:`gem_ds.select.sums`'.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gem_ds.select.shards import Group, Shards, TargetShard, chunks
from gem_ds.select.sums import exact_sums, largest_magnitudes

#: Added to |w| and to p, as in the paper.
EPSILON = 1e-8

# Of entries: fp32 [m] for each shard, non-negative


def ratio(shard: TargetShard, damping: float = EPSILON) -> Tensor:
    """``|g| / (|w| + damping)``, in the place of g; a chunk of w exists in fp32 at a time."""
    r = gradient_magnitude(shard)
    for numerator, part in zip(chunks(r), chunks(shard.weight, r.device), strict=True):
        magnitude = part.to(device=r.device, dtype=torch.float32).abs()
        numerator.div_(magnitude.add_(damping))
    return r


def gradient_magnitude(shard: TargetShard) -> Tensor:
    """``|g|``, in the place of g."""
    assert shard.gradient is not None, "the rule needs a gradient"
    assert shard.gradient.dtype == torch.float32, "scores are computed in fp32"
    return shard.gradient.abs_()


def weight_magnitude(shard: TargetShard) -> Tensor:
    """``|w|`` in fp32."""
    return shard.weight.to(device=shard.device, dtype=torch.float32, copy=True).abs_()


def chance(shard: TargetShard, seed: int) -> Tensor:
    """Scores by chance, the same however the matrix is cut.

    Each is a hash of its place (see :func:`_words`) read as the bits of a finite non-negative
    number: their order is uniform, their values mean nothing.
    """
    scores = torch.empty(shard.weight.numel(), dtype=torch.float32, device=shard.device)
    for part, words in zip(chunks(scores), _words(shard, seed), strict=True):
        part.copy_(words.remainder_(_INFINITY_BITS).int().view(torch.float32))
    return scores


def drawn_by_gradient(shard: TargetShard, seed: int) -> Tensor:
    """``|g| / u``, each u uniform in (0, 1], the same however the matrix is cut; in g's place.

    The k largest are a draw without replacement in which entries come in proportion to their |g|,
    as nearly as k of them can: sequential Poisson sampling (Ohlsson, J. Official Stat. 14, 1998).
    """
    scores = gradient_magnitude(shard)
    for part, words in zip(chunks(scores), _words(shard, seed), strict=True):
        part.div_(_shift_right(words, 7).add_(1).float().mul_(2.0**-24))  # all of them exact
    return scores


def _words(shard: TargetShard, seed: int) -> Iterator[Tensor]:
    """Per chunk of a shard, for each entry 31 bits by chance, int64 [c].

    They are a hash (splitmix64) of the flat index, keyed by seed and name.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}/{shard.name}".encode()).digest()[:8], "little")
    first = shard.start
    for part in chunks(shard.weight, shard.device):
        flat_index = torch.arange(first, first + part.numel(), device=shard.device)
        yield _splitmix64(flat_index, key).bitwise_and_(2**31 - 1)
        first += part.numel()


_INFINITY_BITS = 0x7F80_0000  # of fp32; all below are finite


def _splitmix64(x: Tensor, key: int) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014) of ``x`` + key, int64 [m]."""
    x = x * _signed(0x9E37_79B9_7F4A_7C15) + _signed(key)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58_476D_1CE4_E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D0_49BB_1331_11EB)
    return x ^ _shift_right(x, 31)


def _signed(word: int) -> int:
    """A 64-bit word as int64 has it; its products wrap around as those of uint64 do."""
    return (word + 2**63) % 2**64 - 2**63


def _shift_right(x: Tensor, count: int) -> Tensor:
    """A shift that fills with zeros, not with the sign."""
    return torch.bitwise_and(x >> count, 2 ** (64 - count) - 1)


#: Of the principal part; of a matrix with fewer than eight times as many rows or columns an eighth.
PRINCIPAL_RANK = 128


def principal_magnitudes(shards: Shards, group: Group, seed: int) -> list[Tensor]:
    """``|U U^T w|``, U the leading left singular vectors of w (LIFT, arXiv 2506.00772).

    Each rank gathers a matrix after the other, computes in fp64 and keeps its own range, so that
    ranks need not agree on the last bits. Scores are rounded to 2^-24 of the matrix' largest:
    entries that are equal, or 0, but for rounding tie.
    """
    largest_magnitudes([shard.weight for shard in shards], shards, group)  # refuses what is broken
    return [_principal_magnitude(shard, group) for shard in shards]


def _principal_magnitude(shard: TargetShard, group: Group) -> Tensor:
    """Of one matrix; three copies of it exist meanwhile, in fp64."""
    whole = torch.zeros(shard.numel, dtype=torch.float64, device=shard.device)
    own = slice(shard.start, shard.start + shard.weight.numel())
    whole[own] = shard.weight.to(whole)
    matrix = group.all_reduce(whole, "sum").view(shard.shape)
    wide = matrix if shard.shape[0] <= shard.shape[1] else matrix.T
    rank = max(1, min(PRINCIPAL_RANK, len(wide) // 8))
    leading = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -rank:]
    part: Tensor = (leading @ (leading.T @ wide)).abs_()
    part.div_(part.amax().clamp(min=torch.finfo(part.dtype).tiny)).mul_(2**24)
    flat = (part if wide is matrix else part.T).reshape(-1)
    return flat[own].round().float()


# Of layers: the same bits on every rank and for every way to cut the matrices


def root_mean_squares(shards: Shards, group: Group) -> list[float]:
    """``sqrt(sum(w^2) / n)`` of each layer, w cast to fp32."""
    return [
        math.ldexp(math.sqrt(total / shard.numel), shift)
        for (total, shift), shard in zip(_squared_norms(shards, group), shards, strict=True)
    ]


def weight_norms(shards: Shards, group: Group) -> list[float]:
    """``||w||_2`` of each layer, w cast to fp32."""
    return [math.ldexp(math.sqrt(total), shift) for total, shift in _squared_norms(shards, group)]


def _squared_norms(shards: Shards, group: Group) -> list[tuple[float, int]]:
    """``sum(w^2)`` of each layer as x 4^e: x and e."""
    weights = [shard.weight for shard in shards]
    shifts = [math.frexp(peak)[1] for peak in largest_magnitudes(weights, shards, group)]

    def square(layer: int, w: Tensor, spare: Tensor) -> tuple[Tensor]:
        return (w.mul_(2.0 ** -shifts[layer]).square_(),)

    (squares,) = exact_sums(square, 1, weights, shards, group)
    return list(zip(squares, shifts, strict=True))


class LayerStatistics(NamedTuple):
    """What entry scores r say of a layer."""

    total: float  # sum of r
    norm: float  # ||r||_2
    entropy: float  # H_l in nats, at least 0; 0 for a layer without scores


def layer_statistics(
    scores: Sequence[Tensor], shards: Shards, group: Group
) -> list[LayerStatistics]:
    """Of each layer, from this rank's entry scores, fp32 [m] and non-negative, and the others'.

    A score that is not finite is a ValueError on every rank alike, which names its layer.
    """
    largest = largest_magnitudes(scores, shards, group)
    shifts = [math.frexp(peak)[1] for peak in largest]

    def square_and_ratio(layer: int, r: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
        r.mul_(2.0 ** -shifts[layer])
        return torch.square(r, out=spare), r

    squares, sums = exact_sums(square_and_ratio, 2, scores, shards, group)
    totals = [math.ldexp(s, shift) for s, shift in zip(sums, shifts, strict=True)]
    norms = [math.ldexp(math.sqrt(s), shift) for s, shift in zip(squares, shifts, strict=True)]

    unit = [1 / total if total else 0.0 for total in totals]
    # |log(p + 1e-8)| is below 2^5 for every share p, so the largest share bounds the terms.
    shifts = [math.frexp(m * u)[1] + 5 for m, u in zip(largest, unit, strict=True)]

    def surprise(layer: int, r: Tensor, spare: Tensor) -> tuple[Tensor]:
        share = r.mul_(unit[layer])
        term = torch.add(share, EPSILON, out=spare).log_().mul_(share)
        return (term.mul_(-(2.0 ** -shifts[layer])),)  # below 0 where p + 1e-8 exceeds 1

    (sums,) = exact_sums(surprise, 1, scores, shards, group)
    entropies = [max(0.0, math.ldexp(s, shift)) for s, shift in zip(sums, shifts, strict=True)]
    return list(map(LayerStatistics, totals, norms, entropies))
