"""Sharpness-aware minimization over what is trained (SAM, Foret et al., arXiv 2010.01412).

    e = rho g / ||g||_2           g the gradient of the global batch's loss at w     (eq. 2, p = 2)
    the step's gradient is that of the same loss at w + e, applied to w              (eq. 3)

w are the trained entries alone, those of a head among them, so e is K numbers and not as large as
the model. g is that of the whole global batch, summed over micro-batches and ranks before anything
is perturbed: an e of each micro-batch's or rank's own would make the result depend on how the batch
is cut (the authors' variant on several accelerators, m-sharpness in section 4.1, does). Where a
step trains some layers only, e is 0 elsewhere, as g is (:mod:`gem_ds.sparse.layer_draws`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from gem_ds.sparse.entries import TrainedEntries
from gem_ds.sparse.layer_draws import LayerDraws


@dataclass(frozen=True)
class Sam:
    """How far a step looks, and what draws the layers that it trains; None: all are."""

    rho: float
    draws: LayerDraws | None = None


@contextmanager
def perturbed(parts: Sequence[TrainedEntries], rho: float) -> Iterator[Tensor]:
    """While the block lasts, the weights are w + e; then they are w again, to the bit.

    It is given the norms of g in the layers of the first part, fp64 [layers].

    g is what backward passes that delivered nothing have collected on the ranks, which enter
    together; it is taken. Where it is 0 or not finite nothing is perturbed. w + e is rounded to the
    model's dtype: in bf16 the entries whose e is below half a last place stay.
    """
    values = [part.values() for part in parts]
    comm = parts[0].engine.comm
    gradients = [comm.all_reduce(part.vector.take_gradient(), "sum") for part in parts]
    norms = [
        torch.stack([_norm(slice_) for slice_ in part.split(summed).values()])
        for part, summed in zip(parts, gradients, strict=True)
    ]
    # A rank's loss is multiplied by the number of ranks, since engines take means over them.
    of_layers = norms[0] / (parts[0].engine.loss_scale * comm.world_size)
    norm = _norm(torch.cat(norms))
    for part, before in zip(parts, values, strict=True):
        part.write(_perturbed_values(before, gradients.pop(0), rho, norm))
    try:
        yield of_layers
    finally:
        for part, before in zip(parts, values, strict=True):
            part.write(before)


def _norm(gradient: Tensor) -> Tensor:
    """In fp64, as the gradients of an fp16 engine are scaled up."""
    norm: Tensor = torch.linalg.vector_norm(gradient, dtype=torch.float64)
    return norm


def _perturbed_values(before: Tensor, gradient: Tensor, rho: float, norm: Tensor) -> Tensor:
    """The values w + e, [K]; the gradient is consumed."""
    there = gradient.mul_((rho / norm).float()).add_(before)
    return torch.where(norm.isfinite() & (norm > 0), there.to(before.dtype), before)
