r"""How two deltas of one base differ, by layer and module.

    gem-ds delta diff a.safetensors b.safetensors [--model_name_or_path M] [--plot overlap.png]

The overlap of two masks is the share of their union that both have (Jaccard). With the base model
it is told, too, at how many of the shared entries both move the weight to the same side, and the
cosine of the two differences from the base.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from operator import add
from pathlib import Path

import torch
from torch import nn

from gem_ds.files.delta import Delta
from gem_ds.flags import name_of
from gem_ds.models.export import load_base
from gem_ds.report.places import plot, table_of


@dataclass(frozen=True)
class Overlap:
    """What two deltas have in common in a weight; sums over weights are those of their parts."""

    both: int  # entries that both have
    either: int  # entries that one of them has
    same_side: int = 0  # of both, entries moved to the same side
    moved: int = 0  # of both, entries that both have moved
    product: float = 0.0  # of the differences, at both
    first_square: float = 0.0  # of the first delta's differences
    second_square: float = 0.0

    @property
    def jaccard(self) -> float:
        """Share of the union that both have; 0 of none."""
        return self.both / self.either if self.either else 0.0

    @property
    def agreement(self) -> float:
        """Share of the entries that both have moved, that went to the same side."""
        return self.same_side / self.moved if self.moved else 0.0

    @property
    def cosine(self) -> float:
        """Of the two differences from the base."""
        norms = (self.first_square * self.second_square) ** 0.5
        return self.product / norms if norms else 0.0

    def __add__(self, other: Overlap) -> Overlap:
        return Overlap(*map(add, astuple(self), astuple(other)))


def overlaps(first: Delta, second: Delta, base: nn.Module | None = None) -> dict[str, Overlap]:
    """What two deltas of one base have in common, by weight; a ValueError for another base."""
    found = {}
    for name in dict.fromkeys([*first.values, *second.values]):
        indices = [d.mask.indices.get(name, torch.empty(0)).long() for d in (first, second)]
        shared = indices[0][torch.isin(indices[0], indices[1])]
        found[name] = Overlap(both=len(shared), either=sum(map(len, indices)) - len(shared))
        if base is None:
            continue
        weight = base.get_parameter(name).detach().reshape(-1).cpu()
        moves = []
        for delta, index in zip((first, second), indices, strict=True):
            there = weight[index]
            moves.append(delta.values.get(name, there).double() - there.double())
        a, b = (move[torch.isin(i, shared)] for move, i in zip(moves, indices, strict=True))
        moved = (a != 0) & (b != 0)
        found[name] = replace(
            found[name],
            same_side=int(((a.sign() == b.sign()) & moved).sum()),
            moved=int(moved.sum()),
            product=float(a @ b),
            first_square=float(moves[0].square().sum()),
            second_square=float(moves[1].square().sum()),
        )
    return found


def total(parts: Mapping[str, Overlap]) -> Overlap:
    """Of all weights together."""
    return sum(parts.values(), Overlap(0, 0))


def main(argv: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(
        prog=name_of("delta diff"), description="Compare two deltas of one base model."
    )
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--model_name_or_path", help="the base model of both, for their signs")
    parser.add_argument("--plot", type=Path, help="picture of the overlap to write, such as a.png")
    args = parser.parse_args(argv)
    deltas = [Delta.load(path) for path in (args.first, args.second)]
    base = None
    if args.model_name_or_path is not None:
        base = load_base(args.model_name_or_path, deltas[0])
        parameters = dict(base.named_parameters(remove_duplicate=False))
        for delta in deltas:
            delta.mask.check_parameters(parameters, type(base).__name__, "delta")
    parts = overlaps(deltas[0], deltas[1], base)
    whole = total(parts)
    for path, delta in zip((args.first, args.second), deltas, strict=True):
        print(f"{path}: {delta.mask.num_selected:,} entries, method {delta.mask.method}")
    print(f"both      {whole.both:,} of {whole.either:,} entries ({whole.jaccard:.2%})")
    if base is not None:
        print(f"signs     {whole.agreement:.2%} of the shared entries move to the same side")
        print(f"cosine    {whole.cosine:.4f} of the differences from the base")
    table = table_of({name: part.jaccard for name, part in parts.items()})
    print("\noverlap by layer and module\n" + table.to_string(float_format="{:.2%}".format))
    if args.plot is not None:
        plot(table, "overlap of the entries", args.plot)
        print(f"wrote {args.plot}")
