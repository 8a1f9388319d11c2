"""The loss of answers that are text: cross-entropy summed over their tokens.

Everything in GEM uses the *sum*; whoever needs a mean divides by the number of items of the whole
global batch (here its answer tokens), so that no result depends on how a batch is cut into ranks
and micro-batches.

:func:`summed_answer_loss` reads the logits of the answer tokens from any model;
:func:`chunked_answer_loss` lets the model's output layer compute the same loss itself, in chunks,
for hidden states ``h`` [n, H], weight ``W`` [V, H] and bias ``b`` [V]:

    logits = h @ W.T + b                                            [n, V]
    loss   = F.cross_entropy(logits.float(), labels, reduction="sum")

With V in the hundreds of thousands the logits, their logarithms and their gradient are the largest
tensors of a training step. Here a few rows at a time have them: the gradient with respect to the
logits is ``softmax(logits) - onehot(label)``, which the forward pass knows, so it multiplies it out
at once, keeps the gradients of h, and of W and b where they are trained, and drops the chunk. The
products with W are those of the code above: one forward, one or two backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gem_ds.data.batches import SummedLoss
from gem_ds.distributed.comm import Comm
from gem_ds.distributed.weights import skip_gather_in_backward
from gem_ds.models.attention import padded_on_the_right
from gem_ds.sddmm import add_product

#: Entries of a chunk's logits: 64 MiB in fp32. Two to three tensors of this size exist at a time.
CHUNK_SIZE = 2**24
#: With fewer rows a chunk's products would be bound by reading the weight: a GPU does some 300
#: operations of 16 bits in the time of a byte, and twice reads 2 bytes for 4 operations a row.
MIN_ROWS, GPU_MIN_ROWS = 256, 1024

_OF_THE_LOSS = ("labels", "answer_positions")  # of a batch, what the model does not read


def summed_answer_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Sum of next-token losses at a batch's labelled positions: fp32 scalar.

    The model is a causal one of transformers, or an engine around one; the batch is one of
    :func:`gem_ds.data.dataset.Dataset.collate`.
    """
    logits = answer_logits(model, batch).float()
    return F.cross_entropy(logits, answer_labels(batch), reduction="sum")


def chunked_answer_loss(
    model: nn.Module, batch: Mapping[str, Tensor], *, device_type: str | None = None
) -> Tensor:
    """:func:`summed_answer_loss` without logits, of models that :func:`answer_loss_of` accepts.

    While the model runs, its output layer returns the loss in the place of the logits. It is still
    the layer that is called, so ZeRO-3 gathers its weight as ever; a frozen one for the forward
    pass only. ``device_type`` is the kind of device that the chunks suit, if not the model's.
    """
    layer = plain_output_layer(model)
    assert layer is not None, "answer_loss_of chose this loss"
    labels = answer_labels(batch)

    def loss_of(hidden: Tensor) -> Tensor:
        rows = _at_answers(hidden, batch)
        loss = summed_cross_entropy(rows, layer.weight, layer.bias, labels, device_type)
        return loss.view(1, 1, 1)

    loss, own = _logits_through(loss_of, layer, model, batch)
    assert [loss.data_ptr()] == [o.data_ptr() for o in own], "the model changed its logits"
    if not any(parameter.requires_grad for parameter in layer.parameters()):
        skip_gather_in_backward(layer)
    return loss.view(())


def answer_labels(batch: Mapping[str, Tensor]) -> Tensor:
    """The answers' tokens, int64 [n], in the order of ``answer_positions``."""
    return batch["labels"].flatten().index_select(0, batch["answer_positions"] + 1)


def _at_answers(states: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Rows [n, D] of states [B, T, D] that answer tokens are read from."""
    return states.flatten(0, 1).index_select(0, batch["answer_positions"])


def answer_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The logits that the n answer tokens are read from: [n, V] in the model's dtype.

    Where the output layer is plain no others are computed.
    """
    layer = plain_output_layer(model)
    if layer is None:
        return _at_answers(_logits(model, batch), batch)

    def shortened(hidden: Tensor) -> Tensor:
        return F.linear(_at_answers(hidden, batch)[None], layer.weight, layer.bias)

    logits, own = _logits_through(shortened, layer, model, batch)
    if not own:  # the model reads the layer's weight without calling it
        return _at_answers(logits, batch)
    assert logits.shape[:2] == (1, len(batch["answer_positions"])), "the model reshaped its logits"
    return logits[0]


@torch.no_grad()
def answer_loss_of(model: nn.Module, comm: Comm) -> SummedLoss:
    """The way to compute the answer loss of a model: in chunks where that gives the same.

    Not of models that change their logits after the output layer (a softcap, a scale), whose output
    layer is more than one product (of adapters, quantized, with targets), or that do not call it.
    A forward pass of a few tokens compares the model's logits with what the layer returned; it
    leaves the model in eval mode. All ranks call this together and find the same.
    """
    layer = plain_output_layer(model)
    if layer is None:
        return summed_answer_loss
    outputs: list[Tensor] = []
    hook = layer.register_forward_hook(lambda *call: outputs.append(call[-1].clone()))
    input_ids = torch.arange(6, device=comm.device).view(2, 3) % layer.out_features
    model.eval()
    try:
        logits = _logits(model, {"input_ids": input_ids})
    finally:
        hook.remove()
    is_changed = len(outputs) != 1 or not torch.equal(outputs[0], logits)
    return summed_answer_loss if comm.any(is_changed) else chunked_answer_loss


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What the model returns for logits: [B, T, V]."""
    inputs = {key: value for key, value in batch.items() if key not in _OF_THE_LOSS}
    with padded_on_the_right():
        return model(**inputs, use_cache=False).logits  # type: ignore[no-any-return]


def plain_output_layer(model: nn.Module) -> nn.Linear | None:
    """The output layer, if it is just a linear layer, with no forward or weight of its own kind."""
    layer: Any = getattr(model, "get_output_embeddings", lambda: None)()
    is_plain = (
        type(layer) is nn.Linear
        and "forward" not in vars(layer)
        and type(layer.weight) is nn.Parameter
        and layer.weight.is_floating_point()
    )
    return layer if is_plain else None


def _logits_through(
    forward: Callable[[Tensor], Tensor], layer: Any, model: nn.Module, batch: Mapping[str, Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The model's logits while its output layer computes `forward`, and what that returned."""
    own: list[Tensor] = []

    def recorded(hidden: Tensor) -> Tensor:
        own.append(forward(hidden))
        return own[-1]

    layer.forward = recorded  # its hooks stay
    try:
        return _logits(model, batch), own
    finally:
        del layer.forward


def rows_of_chunk(num_labels: int, device_type: str) -> int:
    """Rows whose logits exist at a time."""
    least = GPU_MIN_ROWS if device_type == "cuda" else MIN_ROWS
    return max(least, CHUNK_SIZE // num_labels)


class _SummedCrossEntropy(torch.autograd.Function):
    """The loss; all gradients are made in the forward pass, up to one factor."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, num_rows: int
    ) -> Tensor:
        inputs = (hidden, weight, bias)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        d_hidden, d_weight, d_bias = gradients = [
            torch.zeros_like(tensor, dtype=torch.float32) if tensor is not None and wanted else None
            for tensor, wanted in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
        loss = hidden.new_zeros((), dtype=torch.float32)
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
        return *scaled, None, None


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
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    device_type: str | None = None,
) -> Tensor:
    """Sum of the cross-entropies of ``hidden @ weight.T + bias`` against the labels: fp32 scalar.

    For `hidden` [n, H] (n may be 0), `weight` [V, H] and `bias` [V], of one dtype, and `labels`
    int64 [n]. Logits are rounded to that dtype and then taken to fp32, as those that a model
    returns. Gradients are summed over chunks in fp32; a backward pass goes through once.
    """
    if not torch.is_grad_enabled():  # a trained weight asks for its gradient all the same
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    num_rows = rows_of_chunk(weight.shape[0], device_type or hidden.device.type)
    loss: Tensor = _SummedCrossEntropy.apply(hidden, weight, bias, labels, num_rows)
    return loss
