"""Cross-entropy over a large vocabulary, fused with the output layer and computed in chunks.

Equivalent code first, for hidden states ``h`` [n, H], weight ``W`` [V, H], bias ``b`` [V]:

    logits = h @ W.T + b                                            [n, V]
    loss   = F.cross_entropy(logits.float(), labels, reduction="sum")

With V in the hundreds of thousands the logits, their logarithms and their gradient are the largest
tensors of a training step. Here a few rows at a time have them: the gradient with respect to the
logits is ``softmax(logits) - onehot(label)``, which the forward pass knows, so it multiplies it out
at once, keeps the gradients of h, and of W and b where they are trained, and drops the chunk. The
backward pass multiplies them by the number that it is given.

The products with W are those of the equivalent code: one forward, one or two backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gem_ds.sparse.sddmm import add_product

#: Entries of a chunk's logits: 64 MiB in fp32. Two to three tensors of this size exist at a time.
CHUNK_SIZE = 2**24
#: With fewer rows a chunk's products would be bound by reading the weight (a GPU does some 300
#: operations in the time of a byte); so above 65,536 labels a chunk is larger.
MIN_ROWS = 256


def rows_of_chunk(num_labels: int) -> int:
    """Rows whose logits exist at a time."""
    return max(MIN_ROWS, CHUNK_SIZE // num_labels)


class _SummedCrossEntropy(torch.autograd.Function):
    """The loss; all gradients are made in the forward pass, up to one factor."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
    ) -> Tensor:
        inputs = (hidden, weight, bias)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        d_hidden, d_weight, d_bias = gradients = [
            torch.zeros_like(tensor, dtype=torch.float32) if tensor is not None and wanted else None
            for tensor, wanted in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
        loss = hidden.new_zeros((), dtype=torch.float32)
        num_rows = rows_of_chunk(weight.shape[0])
        for start in range(0, len(labels), num_rows):
            rows = slice(start, start + num_rows)
            d_rows = None if d_hidden is None else d_hidden[rows]
            loss += _add_gradients(
                (hidden[rows], weight, bias), labels[rows, None], (d_rows, d_weight, d_bias)
            )
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [  # in place: the weight's is as large as the weight
            None if gradient is None else gradient.mul_(d_loss).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None


def _add_gradients(
    inputs: tuple[Tensor, Tensor, Tensor | None],
    labels: Tensor,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Tensor:
    """The summed loss of a chunk, labels [rows, 1]; adds to the gradients that are given."""
    (hidden, weight, bias), (d_hidden, d_weight, d_bias) = inputs, gradients
    logits = F.linear(hidden, weight, bias)
    log_probs = torch.log_softmax(logits, dim=1, dtype=torch.float32)
    del logits
    loss = -log_probs.gather(1, labels).sum()
    if all(gradient is None for gradient in gradients):
        return loss
    d_logits = log_probs.exp_()
    d_logits.scatter_add_(1, labels, d_logits.new_full(labels.shape, -1.0))
    d_logits = d_logits.to(hidden.dtype)
    if d_hidden is not None:
        d_hidden += d_logits @ weight
    if d_weight is not None:
        add_product(d_weight, d_logits, hidden)
    if d_bias is not None:
        d_bias += d_logits.sum(dim=0, dtype=torch.float32)
    return loss


def summed_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
) -> Tensor:
    """Sum of the cross-entropies of ``hidden @ weight.T + bias`` against the labels: fp32 scalar.

    For `hidden` [n, H] (n may be 0), `weight` [V, H] and `bias` [V], of one dtype, and `labels`
    int64 [n]. Logits are rounded to that dtype and then taken to fp32, as where a model returns its
    logits and the loss is computed in fp32. Gradients are summed over chunks in fp32; a backward
    pass goes through once.
    """
    if not torch.is_grad_enabled():  # a trained weight asks for its gradient all the same
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    loss: Tensor = _SummedCrossEntropy.apply(hidden, weight, bias, labels)
    return loss
