"""The exact k largest scores of matrices that no rank holds whole.

Non-negative fp32 numbers are ordered as their bits are when read as integers. So the k-th largest
score of a layer is found digit by digit, from the top: all ranks count how many of their entries
have each value of the digit, the counts are summed, and the digit of the k-th score can be read
off. Three digits of 11, 10 and 10 bits settle it, for all layers at once. The scores are read
twice: to count their first digits, and to copy out the few entries whose first digit is that of the
k-th or higher, the *candidates*, which all else is about. What crosses the network is three
histograms and one small table of ties: four messages, 32 KiB for each layer whatever its size.

Equal scores go to the lowest flat index of the whole matrix, so that the choice is the same for
any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gem_ds.select.shards import Group, chunks, index_dtype

#: The digits of a 31-bit score, highest first: (how far to shift it down, bits in the digit).
_DIGITS = ((20, 11), (10, 10), (0, 10))

#: All bits but the sign: reads -0.0 as 0.
_MAGNITUDE = 0x7FFF_FFFF


def top_k_indices(
    scores: Sequence[Tensor], starts: Sequence[int], budgets: Sequence[int], group: Group
) -> list[Tensor]:
    """The entries of each layer with the k_l largest scores, ties to the lowest flat index.

    ``scores`` are this rank's ranges, fp32 [m] from the flat index ``starts``, non-negative and
    finite, on the device on which ``group`` reduces. Returns per layer the flat indices chosen in
    this rank's range, int32 [.] (int64 where the range ends beyond it), ascending; over the ranks
    they are k_l. On one rank this is ``sorted(range(n), key=lambda i: (-scores[i], i))[:k]``,
    sorted again.
    """
    assert all(shard.dtype == torch.float32 for shard in scores), "the digits are those of fp32"
    stops = [start + shard.numel() for start, shard in zip(starts, scores, strict=True)]
    left = torch.tensor(budgets, dtype=torch.int64, device=scores[0].device)
    shift, width = _DIGITS[0]
    histograms = _histograms([shard.view(torch.int32) for shard in scores], shift, width, group)
    is_whole = histograms.sum(dim=1) == left  # all entries are chosen: there are no candidates
    digit, left = _digit_of_kth(histograms, left.where(~is_whole, 0))
    lowest = (digit << shift).int().view(torch.float32)
    candidates = [_reaching(*layer) for layer in zip(scores, starts, lowest, strict=True)]
    thresholds, ties = _kth_largest(candidates, digit, left, group)
    return [
        torch.arange(start, stop, dtype=index_dtype(stop), device=shard.device)
        if takes_all
        else found.at_least(threshold, tie)
        for shard, start, stop, takes_all, found, threshold, tie in zip(
            scores, starts, stops, is_whole.tolist(), candidates, thresholds, ties, strict=True
        )
    ]


def count_among_largest(scores: Sequence[Tensor], budget: int, group: Group) -> list[int]:
    """How many entries of each layer are among the ``budget`` largest of all layers together.

    Equal scores go to the earlier layer. The counts are the same on every rank.
    """
    candidates: Sequence[Tensor] = [shard.view(torch.int32) for shard in scores]
    above = torch.zeros(len(scores), dtype=torch.int64, device=scores[0].device)
    left = above.new_tensor([budget])
    for shift, width in _DIGITS:
        histograms = _histograms(candidates, shift, width, group)
        digit, left = _digit_of_kth(histograms.sum(dim=0, keepdim=True), left)
        value = int(digit)
        above += histograms[:, value + 1 :].sum(dim=1)
        candidates = _with_digits(candidates, shift, width, digit.expand(len(candidates)))
        tied = histograms[:, value]
    before = tied.cumsum(0) - tied  # ties of earlier layers
    return (above + (left - before).clamp(min=0).minimum(tied)).tolist()


@dataclass(frozen=True)
class _Candidates:
    """Entries of one layer's shard."""

    positions: Tensor  # [c], ascending; of the flat whole matrix
    bits: Tensor  # int32 [c], of their scores, without the sign

    def at_least(self, threshold: int, ties: int) -> Tensor:
        """The positions of all bits above ``threshold`` and of the first ``ties`` equal to it."""
        tied = self.bits == threshold
        return self.positions[(self.bits > threshold) | tied & (tied.cumsum(0) <= ties)]


def _reaching(scores: Tensor, start: int, bound: Tensor) -> _Candidates:
    """The entries of ``scores`` that are at least ``bound`` (fp32 []; none where that is a NaN)."""
    dtype = index_dtype(start + scores.numel())
    positions, bits = [], []
    for chunk in chunks(scores):
        found = (chunk >= bound).nonzero().squeeze(1)
        bits.append(chunk[found].view(torch.int32) & _MAGNITUDE)
        positions.append(found.add_(start).to(dtype))
        start += chunk.numel()
    return _Candidates(torch.cat(positions), torch.cat(bits))


def _kth_largest(
    candidates: Sequence[_Candidates], digit: Tensor, left: Tensor, group: Group
) -> tuple[list[int], list[int]]:
    """Per layer the bits of the k-th largest score, and how many entries equal to it to take here.

    ``digit`` is the first digit of the k-th, ``left`` how many of the entries with that digit to
    take, both int64 [layers]. Entries above the k-th are all taken, wherever they are.
    """
    (shift, width), *lower_digits = _DIGITS
    threshold = digit << shift
    pools = _with_digits([layer.bits for layer in candidates], shift, width, digit)
    for shift, width in lower_digits:
        digit, left = _digit_of_kth(_histograms(pools, shift, width, group), left)
        pools = _with_digits(pools, shift, width, digit)
        threshold += digit << shift
    # What is left of the budget goes to the ties, the lower ranks' (lower indices) first.
    tied = left.new_zeros(group.world_size, len(pools))
    tied[group.rank] = left.new_tensor([bits.numel() for bits in pools])
    group.all_reduce(tied, "sum")
    before = tied[: group.rank].sum(dim=0)
    taken = (left - before).clamp(min=0).minimum(tied[group.rank])
    return threshold.tolist(), taken.tolist()


def _histograms(pools: Sequence[Tensor], shift: int, width: int, group: Group) -> Tensor:
    """How often each value of the digit occurs in the ranks' int32 [m]: int64 [layers, 2^width]."""
    counts = torch.zeros(len(pools), 2**width, dtype=torch.int64, device=pools[0].device)
    for row, bits in zip(counts, pools, strict=True):
        for chunk in chunks(bits):
            row += torch.bincount(_digit(chunk, shift, width), minlength=2**width)
    return group.all_reduce(counts, "sum")


def _with_digits(pools: Sequence[Tensor], shift: int, width: int, digits: Tensor) -> list[Tensor]:
    """Of each layer the entries whose digit is the layer's."""
    return [
        torch.cat([c.masked_select(_digit(c, shift, width) == digit) for c in chunks(bits)])
        for bits, digit in zip(pools, digits.tolist(), strict=True)
    ]


def _digit(bits: Tensor, shift: int, width: int) -> Tensor:
    return torch.bitwise_and(bits >> shift, 2**width - 1)


def _digit_of_kth(histograms: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The digit of each layer's k-th largest entry, and how many of its equals are in the top k.

    Of histograms [layers, bins] and k [layers], all int64. For k = 0 it is the highest digit, which
    no finite score has.
    """
    from_top = histograms.flip(1)
    reached = from_top.cumsum(dim=1)  # entries in the highest 1, 2, ... bins
    assert bool((reached[:, -1] >= k).all()), "no layer holds fewer entries than its budget"
    position = (reached < k[:, None]).sum(dim=1)
    above = (reached - from_top).gather(1, position[:, None]).squeeze(1)
    return histograms.shape[1] - 1 - position, k - above
