"""Where a mask's entries lie in the rows and columns of its weights, and how far they moved.

Numbers of the weights of one module (q_proj of all layers) are means over its entries.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from gem_ds.files.mask import Mask
from gem_ds.report.places import place_of

NUM_SLICES = 32  # of the rows, and of the columns
NUM_SHARES = 50  # points of a curve of concentration

#: Decades of |v - w| / |w| that are told apart, from 1e-8 on to 1e4.
FIRST_DECADE, NUM_DECADES, BINS_A_DECADE = -8, 12, 20


def profile(counts: Tensor) -> Tensor:
    """Entries in slices of the lines, by what an even spread has there: fp64 [NUM_SLICES].

    Args:
        counts: Entries of each line, int64 [lines]; not all 0.
    """
    lines = len(counts)
    slices = torch.arange(lines) * NUM_SLICES // lines
    totals = torch.zeros(NUM_SLICES, dtype=torch.float64).index_add_(0, slices, counts.double())
    sizes = torch.bincount(slices, minlength=NUM_SLICES)
    return totals / sizes.clamp(min=1) * (lines / counts.sum())


def concentration(counts: Tensor) -> Tensor:
    """Which share of the entries the fullest lines have: fp64 [NUM_SHARES + 1].

    Of the fullest 0/50, 1/50, ... of the lines; a Lorenz curve, from the fullest on.
    """
    sums = counts.sort(descending=True).values.double().cumsum(0)
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), sums]) / sums[-1]
    at = torch.linspace(0, len(counts), NUM_SHARES + 1, dtype=torch.float64)
    low = at.long().clamp(max=len(counts) - 1)
    return sums[low] + (sums[low + 1] - sums[low]) * (at - low)


@dataclass
class Spread:
    """Of one module: sums over its weights, each times its number of entries."""

    num_entries: int = 0
    num_parameters: int = 0
    profiles: list[Tensor] = field(default_factory=lambda: [torch.zeros(NUM_SLICES)] * 2)
    curves: list[Tensor] = field(default_factory=lambda: [torch.zeros(NUM_SHARES + 1)] * 2)
    by_chance: list[Tensor] = field(default_factory=lambda: [torch.zeros(NUM_SHARES + 1)] * 2)

    def add(self, indices: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> None:
        """Count a weight's entries, by rows [0] and columns [1]; of experts, those of all."""
        rows, columns = shape[-2:] if len(shape) > 1 else (shape[0], 1)  # a bias is a column
        self.num_parameters += prod(shape)
        if not (k := indices.numel()):
            return
        self.num_entries += k
        flat = indices.long()
        for i, (places, lines) in enumerate(
            ((flat // columns % rows, rows), (flat % columns, columns))
        ):
            counts = torch.bincount(places, minlength=lines)
            chance = torch.randint(lines, (k,), generator=generator).bincount(minlength=lines)
            self.profiles[i] = self.profiles[i] + k * profile(counts)
            self.curves[i] = self.curves[i] + k * concentration(counts)
            self.by_chance[i] = self.by_chance[i] + k * concentration(chance)


def spreads(mask: Mask) -> dict[str, Spread]:
    """By module, those with the most entries first."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Spread] = defaultdict(Spread)
    for name, indices in mask.indices.items():
        layer, module = place_of(name)
        found[module or str(layer)].add(indices, mask.weights[name].shape, generator)
    return dict(sorted(found.items(), key=lambda item: -item[1].num_entries))


@dataclass
class Moves:
    """How far values moved, relative to what they were."""

    num_entries: int = 0
    num_unchanged: int = 0
    num_from_zero: int = 0
    histogram: Tensor = field(  # of the others, by log10(|v - w| / |w|)
        default_factory=lambda: torch.zeros(NUM_DECADES * BINS_A_DECADE, dtype=torch.int64)
    )

    def add(self, values: Tensor, base: Tensor) -> None:
        """Count a weight's values [k] against the base's at the same entries."""
        v, w = values.double(), base.double()
        self.num_entries += v.numel()
        self.num_unchanged += int((v == w).sum())
        self.num_from_zero += int(((w == 0) & (v != 0)).sum())
        moved = (v != w) & (w != 0)
        decades = ((v - w).abs() / w.abs())[moved].log10() - FIRST_DECADE
        bins = (decades * BINS_A_DECADE).long().clamp(0, len(self.histogram) - 1)
        self.histogram += bins.bincount(minlength=len(self.histogram))

    @property
    def median(self) -> float | None:
        """Of |v - w| / |w| over what moved, from a base that is not 0; to 6 %."""
        total = int(self.histogram.sum())
        if not total:
            return None
        place = int((self.histogram.cumsum(0) * 2 >= total).nonzero()[0])
        return float(10 ** (FIRST_DECADE + (place + 0.5) / BINS_A_DECADE))


def moves(values: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Moves]:
    """By module."""
    found: dict[str, Moves] = defaultdict(Moves)
    for name, trained in values.items():
        layer, module = place_of(name)
        found[module or str(layer)].add(trained, base[name])
    return dict(found)
