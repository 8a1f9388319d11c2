"""From gradients and weights to scores: which entries matter, and how much each layer does.

For the weight matrix of layer l, with g the calibration gradient and w the weight, both in fp32::

    r   = |g| / (|w| + 1e-8)                           gradient-to-weight ratio, one per entry
    p   = r / sum(r)
    H_l = max(0, -sum p log(p + 1e-8))                 entropy of the ratios, natural logarithm
    s_l = ||r||_2 * H_l                                layer score

(GEM, arXiv 2508.16191.) A rank holds one contiguous range of each matrix, and three sums run over
all ranks. Floating-point sums depend on how a matrix is cut; these do not. The largest term of a
layer is found first (a maximum is exact in any order), each term is rounded to an integer,
``round(term / top * 2^b)``, with ``top`` a power of two that no term exceeds and ``b`` at most 35
and 62 - ceil(log2 n_l), and the integers are summed: those of a chunk in fp64, which is exact below
2^53, the chunks in int64. What the rounding leaves is scaled by another 2^b and summed the same
way: in a heavy tail most terms, squares above all, are far below ``top * 2^-b``. So the statistics
are the same bits for any number of ranks and any cut, and the error of a sum is that of its terms.

The other scores that sparse fine-tuning knows, the gradient's or the weight's magnitude or chance,
go through the same sums. Nothing here decides what to select: rules.py, budget.py and topk.py do.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

#: Added to |w| and to p, as in the paper.
EPSILON = 1e-8

#: Entries worked on at a time: the fp64 temporaries (1 MB each) stay in a core's cache.
CHUNK = 2**17

#: b of the module docstring is at most this, so that 2^18 terms sum exactly in fp64.
_CHUNK_BITS = 35


class Group(Protocol):
    """The ranks that share the matrices."""

    rank: int
    world_size: int

    def all_reduce(self, tensor: Tensor, op: Literal["sum", "max"]) -> Tensor:
        """Reduce ``tensor`` over the ranks in place and return it."""
        ...


class Solo:
    """The group of one process: every reduction is the identity."""

    rank = 0
    world_size = 1

    def all_reduce(self, tensor: Tensor, op: Literal["sum", "max"]) -> Tensor:
        """Return ``tensor`` as it is."""
        return tensor


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """What the budget needs to know of each layer; one number per layer, the same on every rank.

    Attributes:
        ratio_sum: sum of r over the layer's entries.
        ratio_norm: Euclidean norm of r.
        entropy: H_l in nats, at least 0.
        score: ``ratio_norm * entropy``; 0 for a layer without gradient.
    """

    ratio_sum: list[float]
    ratio_norm: list[float]
    entropy: list[float]
    score: list[float]


def chunks(shard: Tensor) -> Sequence[Tensor]:
    """Views of at most :data:`CHUNK` entries that cover ``shard`` [n]; none for an empty shard."""
    return shard.split(CHUNK) if shard.numel() else ()


@torch.no_grad()
def gradient_to_weight_ratio_(gradient: Tensor, weight: Tensor, damping: float = EPSILON) -> Tensor:
    """Overwrite ``gradient`` with ``|gradient| / (|weight| + damping)``, computed in fp32.

    Args:
        gradient: fp32 [n].
        weight: [n], any floating dtype; may lie on another device. Only one chunk of it exists in
            fp32 at a time.
        damping: keeps the ratio finite where the weight is 0.

    Returns:
        ``gradient``.
    """
    assert gradient.dtype == torch.float32, "ratios are computed in fp32"
    assert gradient.shape == weight.shape, "a gradient has its weight's shape"
    for numerator, part in zip(chunks(gradient), chunks(weight), strict=True):
        magnitude = part.to(device=gradient.device, dtype=torch.float32).abs()
        numerator.abs_().div_(magnitude.add_(damping))
    return gradient


@torch.no_grad()
def gradient_magnitude_(gradient: Tensor) -> Tensor:
    """Overwrite ``gradient``, fp32 [n], with ``|gradient|``; returns it."""
    return gradient.abs_()


@torch.no_grad()
def weight_magnitude(weight: Tensor, device: torch.device) -> Tensor:
    """``|weight|`` in fp32 [n], on ``device``."""
    return weight.to(device=device, dtype=torch.float32, copy=True).abs_()


def random_scores(start: int, stop: int, name: str, seed: int, device: torch.device) -> Tensor:
    """Scores by chance for the flat indices [start, stop) of a weight, the same however it is cut.

    Each is a hash (splitmix64) of the flat index, keyed by seed and name, read as the bits of a
    finite non-negative number: their order is uniform, their values mean nothing.

    Returns:
        fp32 [stop - start].
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
    scores = torch.empty(stop - start, dtype=torch.float32, device=device)
    for part, first in zip(chunks(scores), range(start, stop, CHUNK), strict=True):
        flat_index = torch.arange(first, first + part.numel(), device=device)
        bits = _splitmix64(flat_index, key).bitwise_and_(_SIGNLESS).remainder_(_INFINITY_BITS)
        part.copy_(bits.int().view(torch.float32))
    return scores


_SIGNLESS = 2**31 - 1
_INFINITY_BITS = 0x7F80_0000  # of fp32; all below are finite
_WORD = 2**64


def _splitmix64(x: Tensor, key: int) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014) of ``x`` + key, int64 [n]."""
    x = x * _signed(0x9E37_79B9_7F4A_7C15) + _signed(key)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58_476D_1CE4_E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D0_49BB_1331_11EB)
    return x ^ _shift_right(x, 31)


def _signed(word: int) -> int:
    """A 64-bit word as int64 has it; its products wrap around as those of uint64 do."""
    return (word + _WORD // 2) % _WORD - _WORD // 2


def _shift_right(x: Tensor, count: int) -> Tensor:
    """A shift that fills with zeros, not with the sign."""
    return torch.bitwise_and(x >> count, 2 ** (64 - count) - 1)


def refuse_not_finite(scores: Sequence[Tensor], names: Sequence[str], group: Group) -> None:
    """Refuse scores of which one, on any rank, is infinite or not a number.

    Raises:
        ValueError: on every rank alike; it names the layers.
    """
    _largest_scores(scores, names, group)


@torch.no_grad()
def root_mean_squares(
    weights: Sequence[Tensor],
    numels: Sequence[int],
    names: Sequence[str],
    device: torch.device,
    group: Group,
) -> list[float]:
    """``sqrt(sum(w^2) / n)`` of each layer, from every rank's range of its weight, cast to fp32.

    Args:
        weights: per layer this rank's range [m], any floating dtype; may lie on another device.
        numels: per layer the number of entries over all ranks.
        names: per layer its name, for the error.
        device: on which ``group`` reduces.
        group: the ranks that hold the other ranges.

    Returns:
        The same bits on every rank and for every way to cut the matrices.

    Raises:
        ValueError: on every rank alike, if a weight on any rank is infinite or not a number.
    """
    peaks = [_peak((part.float().abs() for part in chunks(w)), device) for w in weights]
    shifts = [math.frexp(peak)[1] for peak in _refuse(torch.stack(peaks), names, group)]

    def square(layer: int, chunk: Tensor, scratch: Sequence[Tensor]) -> Iterator[Tensor]:
        yield scratch[0].copy_(chunk.float()).mul_(2.0 ** -shifts[layer]).square_()

    bits = [_num_bits(numel) for numel in numels]
    (squares,) = _sums(square, 1, weights, bits, device, group)
    return [
        math.ldexp(math.sqrt(total / numel), shift)
        for total, numel, shift in zip(squares, numels, shifts, strict=True)
    ]


def layer_statistics(
    ratios: Sequence[Tensor], numels: Sequence[int], names: Sequence[str], group: Group
) -> LayerStatistics:
    """Sum, norm, entropy and score of each layer, from every rank's ratios.

    Args:
        ratios: per layer this rank's range of r, fp32 [m], non-negative; m may be 0. All on one
            device, the one on which ``group`` reduces.
        numels: per layer the number of entries over all ranks, n_l.
        names: per layer its name, for the error.
        group: the ranks that hold the other ranges.

    Returns:
        The statistics, the same bits on every rank and for every way to cut the matrices.

    Raises:
        ValueError: on every rank alike, if a ratio on any rank is infinite or not a number.
    """
    assert len(ratios) == len(numels) == len(names), "one shard, one size, one name per layer"
    largest = _largest_scores(ratios, names, group)
    shifts = [math.frexp(peak)[1] for peak in largest]

    def square_and_ratio(layer: int, chunk: Tensor, scratch: Sequence[Tensor]) -> Iterator[Tensor]:
        ratio = scratch[0].copy_(chunk).mul_(2.0 ** -shifts[layer])
        yield torch.square(ratio, out=scratch[1])
        yield ratio

    bits = [_num_bits(numel) for numel in numels]
    device = ratios[0].device
    squares, sums = _sums(square_and_ratio, 2, ratios, bits, device, group)
    ratio_sum = [math.ldexp(s, shift) for s, shift in zip(sums, shifts, strict=True)]
    ratio_norm = [math.ldexp(math.sqrt(s), shift) for s, shift in zip(squares, shifts, strict=True)]

    unit = [1 / s if s else 0.0 for s in ratio_sum]
    # |log(p + 1e-8)| is below 2^5 for every share p, so the largest share bounds the terms.
    shifts = [math.frexp(m * u)[1] + 5 for m, u in zip(largest, unit, strict=True)]

    def surprise(layer: int, chunk: Tensor, scratch: Sequence[Tensor]) -> Iterator[Tensor]:
        share = scratch[0].copy_(chunk).mul_(unit[layer])
        term = torch.add(share, EPSILON, out=scratch[1]).log_().mul_(share)
        yield term.mul_(-(2.0 ** -shifts[layer]))  # below 0 where p + 1e-8 exceeds 1

    (sums,) = _sums(surprise, 1, ratios, bits, device, group)
    entropy = [max(0.0, math.ldexp(s, shift)) for s, shift in zip(sums, shifts, strict=True)]

    score = [norm * h for norm, h in zip(ratio_norm, entropy, strict=True)]
    return LayerStatistics(ratio_sum=ratio_sum, ratio_norm=ratio_norm, entropy=entropy, score=score)


#: Maps a layer's number and a chunk [m] of its ratios to terms in [-1, 1], one kind after another,
#: each in one of two scratch tensors (fp64 [m]); what has been yielded may be overwritten.
_Terms = Callable[[int, Tensor, Sequence[Tensor]], Iterable[Tensor]]


def _largest_scores(scores: Sequence[Tensor], names: Sequence[str], group: Group) -> list[float]:
    """The largest score of each layer; refuses a layer that holds an infinity or a NaN."""
    device = scores[0].device
    return _refuse(torch.stack([_peak([score], device) for score in scores]), names, group)


def _peak(parts: Iterable[Tensor], device: torch.device) -> Tensor:
    """The largest of non-negative numbers; a NaN if there is one, 0 if there is nothing."""
    peak = torch.zeros((), dtype=torch.float32, device=device)
    for part in parts:
        if part.numel():
            peak = torch.maximum(peak, part.amax().to(device))
    return peak


def _refuse(maxima: Tensor, names: Sequence[str], group: Group) -> list[float]:
    """The ranks' largest of each layer's maxima; refuses a layer that has an infinity or a NaN."""
    broken = ~maxima.isfinite()  # amax hands a NaN on
    rows = torch.stack([maxima.masked_fill(broken, 0.0), broken.float()])
    largest, refused = group.all_reduce(rows, "max").tolist()
    if any(refused):
        culprits = ", ".join(name for name, bad in zip(names, refused, strict=True) if bad)
        raise ValueError(
            f"The scores of {culprits} are not finite: look for inf or NaN in the calibration loss "
            "and in these weights, or calibrate in bf16 or fp32."
        )
    peaks: list[float] = largest
    return peaks


def _num_bits(numel: int) -> int:
    """The module docstring's b."""
    return min(_CHUNK_BITS, 62 - (numel - 1).bit_length())


def _sums(
    terms: _Terms,
    num_kinds: int,
    shards: Sequence[Tensor],
    bits: Sequence[int],
    device: torch.device,
    group: Group,
) -> list[list[float]]:
    """Over all ranks the sum of each kind of term and layer, each correctly rounded."""
    sums = torch.zeros(num_kinds, len(shards), 2, dtype=torch.int64, device=device)
    buffers = torch.empty(3, CHUNK, dtype=torch.float64, device=device)
    for layer, shard in enumerate(shards):
        parts: list[Tensor] = []
        for chunk in chunks(shard):
            *scratch, spare = buffers[:, : chunk.numel()]
            for term in terms(layer, chunk, scratch):
                parts += _fixed_point_sum_(term, bits[layer], spare)
        if parts:
            sums[:, layer] = torch.stack(parts).long().view(-1, num_kinds, 2).sum(dim=0)
    group.all_reduce(sums, "sum")
    return [
        [((high << b) + low) / (1 << 2 * b) for (high, low), b in zip(row, bits, strict=True)]
        for row in sums.tolist()
    ]


def _fixed_point_sum_(terms: Tensor, bits: int, spare: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of at most 2^18 terms in [-1, 1], fp64 [m]. Both tensors are overwritten.

    Returns:
        Two integers in fp64: the first counts units of 2^-b, the second, for what rounding to those
        leaves, units of 2^-2b. Sums of the integers stay below 2^53, so they are exact.
    """
    scale = 2.0**bits
    whole = torch.round(terms.mul_(scale), out=spare)
    rest = terms.sub_(whole).mul_(scale)  # exact
    return whole.sum(), rest.round_().sum()
