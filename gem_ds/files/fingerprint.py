"""Fingerprints of a base model's parameters: digests of samples, cheap for any size.

A mask's checksums are of the base values at its own entries, and say nothing of the rest. Of each
parameter a sample is digested: 16 blocks of 64 adjacent entries, evenly spaced, the first and the
last entries among them; a parameter of no more than 1,024 entries is digested whole. So another
model or revision is found, and weights that were scaled, fine-tuned or merged, but not a single
entry that was changed elsewhere.

A fingerprint is a text, "<dtype> <shape> <digest>". Two of one dtype and shape can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gem_ds.distributed.weights import numel, shape_of
from gem_ds.files.digests import checksum

NUM_BLOCKS, BLOCK = 16, 64

Read = Callable[[Sequence[tuple[Any, Tensor]]], Iterable[Tensor]]
"""Takes parameters with flat indices, int64 [k]; gives the values there [k], in the same order."""


def read_whole(entries: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Reads parameters that are whole in this process, in any layout and on any device."""
    return [p.detach().reshape(-1)[index.to(p.device).long()] for p, index in entries]


@lru_cache
def sample(num_entries: int) -> Tensor:
    """The flat indices, ascending int64, that stand for a parameter of so many entries."""
    if num_entries <= NUM_BLOCKS * BLOCK:
        return torch.arange(num_entries)
    starts = [(num_entries - BLOCK) * i // (NUM_BLOCKS - 1) for i in range(NUM_BLOCKS)]
    return (torch.tensor(starts)[:, None] + torch.arange(BLOCK)).flatten()


def fingerprints(parameters: Mapping[str, Tensor], read: Read = read_whole) -> dict[str, str]:
    """By name the fingerprint of each parameter; with a collective ``read`` on all ranks."""
    values = read([(parameter, sample(numel(parameter))) for parameter in parameters.values()])
    return {
        name: fingerprint(shape_of(parameter), sampled)
        for (name, parameter), sampled in zip(parameters.items(), values, strict=True)
    }


def fingerprint(shape: Sequence[int], sampled: Tensor) -> str:
    """That of a parameter of this shape with these values at its :func:`sample`."""
    dtype = str(sampled.dtype).removeprefix("torch.")
    return f"{dtype} {'x'.join(map(str, shape)) or 'scalar'} {checksum(sampled)[:16]}"


def differing(recorded: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Names of the parameters that have another digest; others cannot be compared."""
    return [
        name
        for name, text in found.items()
        if name in recorded
        and recorded[name] != text
        and recorded[name].rpartition(" ")[0] == text.rpartition(" ")[0]
    ]
