"""The trained numbers of a frozen model as one flat parameter, and how it gets its gradient.

What many layers collect for one parameter has to be handed over after the last of them has run its
backward, and exactly once. That order comes from the graph: the output of :class:`FlatValues`, a
scalar *anchor*, is an input of every target layer, so autograd runs the anchor's backward when
every target layer's is done, and it returns the whole buffer as the gradient of ``values``. The
anchor also makes the first target layer run its backward although nothing below it is trained, and
nothing below it then computes gradients at all.

Does not work inside reentrant checkpointing, which runs a backward of its own for each block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Anchor(torch.autograd.Function):
    """A scalar that depends on ``values``; its backward returns what has been collected."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, flat: FlatValues) -> Tensor:
        ctx.set_materialize_grads(False)  # the target layers send nothing back through the anchor
        ctx.flat, ctx.dtype = flat, values.dtype
        return values.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor, None]:
        return ctx.flat.take_gradient().to(ctx.dtype), None


class FlatValues(nn.Module):
    """The trained entries of all layers one after another, and the buffer of their gradient.

    While ``delivers`` is False, a forward pass gives an anchor that leads nowhere, and what is
    collected stays in the buffer; while True the backward delivers the buffer. Of a global batch of
    several micro-batches the last one delivers, so its gradient accumulates in fp32 and crosses the
    network once.
    """

    def __init__(self, num_entries: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(num_entries, dtype=dtype))
        self.num_entries = num_entries  # K
        self.delivers = False
        self.buffer: Tensor | None = None  # fp32 [K], made when the first layer asks for its slice

    def forward(self) -> Tensor:
        """The anchor of one forward pass: a scalar that requires grad."""
        if self.delivers:
            anchor: Tensor = _Anchor.apply(self.values, self)
            return anchor
        return self.values.new_zeros((), requires_grad=True)

    def gradient(self, start: int, length: int, device: torch.device) -> Tensor:
        """The fp32 slice [length] from ``start`` of what is collected on ``device``, to add to."""
        if self.buffer is None:
            self.buffer = torch.zeros(self.num_entries, dtype=torch.float32, device=device)
        return self.buffer[start : start + length]

    def take_gradient(self) -> Tensor:
        """The collected fp32 gradient [K]; the next call starts from zero."""
        assert self.buffer is not None, "no target layer ran its backward"
        gradient, self.buffer = self.buffer, None
        return gradient
