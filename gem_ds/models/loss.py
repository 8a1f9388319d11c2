"""The loss of answers that are text: cross-entropy summed over their tokens.

Everything in GEM uses the *sum*; whoever needs a mean divides by the number of items of the whole
global batch (here its answer tokens), so that no result depends on how a batch is cut into ranks
and micro-batches.

The same loss in two ways: :func:`summed_answer_loss` reads the logits of the answer tokens from any
model; :func:`chunked_answer_loss` lets the model's output layer compute the loss itself, in chunks,
so that not even those stand whole. Most models end in a plain linear layer and take the second;
:func:`answer_loss_of` tries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gem_ds.data.batches import SummedLoss
from gem_ds.distributed.comm import Comm
from gem_ds.models.cross_entropy import summed_cross_entropy

_OF_THE_LOSS = ("labels", "answer_positions")  # of a batch, what the model does not read


def summed_answer_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Sum of next-token losses at a batch's labelled positions: fp32 scalar.

    The model is a causal one of transformers, or an engine around one; the batch is laid out as
    :func:`gem_ds.data.dataset.Dataset.collate` does it.
    """
    logits = answer_logits(model, batch).float()
    return F.cross_entropy(logits, answer_labels(batch), reduction="sum")


def chunked_answer_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """:func:`summed_answer_loss` without logits, of models that :func:`answer_loss_of` accepts.

    While the model runs, its output layer returns the loss in the place of the logits. It is still
    the layer that is called, so what ZeRO-3 hangs on it gathers its weight as ever.
    """
    layer = plain_output_layer(model)
    assert layer is not None, "answer_loss_of chose this loss"
    labels = answer_labels(batch)

    def loss_of(hidden: Tensor) -> Tensor:
        answers = _at_answers(hidden, batch)
        return summed_cross_entropy(answers, layer.weight, layer.bias, labels).view(1, 1, 1)

    loss, own = _logits_through(loss_of, layer, model, batch)
    assert [loss.data_ptr()] == [o.data_ptr() for o in own], "the model changed its logits"
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

    Models that change their logits after the output layer (a softcap, a scale, a narrower
    vocabulary) need the logits of all answer tokens at once. Output layers that are more than one
    product (those of adapters, quantized ones, one whose own weights are selected from) and those
    that the model does not call need the logits of all tokens. A forward pass of a few tokens
    compares the model's logits with what the layer returned; it leaves the model in eval mode. All
    ranks call this together and find the same.
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
    is_changed = [output.shape for output in outputs] != [logits.shape] or bool(
        (outputs[0] != logits).any()
    )
    return summed_answer_loss if comm.any(is_changed) else chunked_answer_loss


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What the model returns for logits: [B, T, V]."""
    inputs = {key: value for key, value in batch.items() if key not in _OF_THE_LOSS}
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


def plain_output_layer(model: nn.Module) -> nn.Linear | None:
    """The output layer, if it is a linear layer with nothing about it.

    Subclasses may compute something else of the weight, so may a forward or a kind of weight of its
    own; peft wraps a layer in a module of another class.
    """
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


@torch.no_grad()
def refuse_leaking_rows(
    model: nn.Module, device: torch.device, vocab_size: int, micro_batch_size: int
) -> None:
    """Refuse packing for a model that lets the examples of a row see each other.

    Two sequences share each row of a micro-batch, laid out as `Dataset.collate` does it; the first
    one's tokens are changed, and the logits of the second must not move. (Flash attention reads the
    borders in a micro-batch of one row only, so the size matters.) All ranks call this together.
    """
    length = 4
    ids = torch.arange(2 * length, device=device) % vocab_size
    changed = torch.cat([ids[length:], ids[length:]])
    position_ids = torch.arange(length, device=device).repeat(micro_batch_size, 2)
    model.eval()
    plain, other = (
        model(
            input_ids=row.expand(micro_batch_size, -1), position_ids=position_ids, use_cache=False
        ).logits[:, length:]
        for row in (ids, changed)
    )
    if (plain - other).abs().max() > 1e-3 * plain.abs().max():
        raise ValueError(
            "This model lets packed examples see each other: leave --packing out, or with flash "
            "attention pass --per_device_train_batch_size 1 and --per_device_eval_batch_size 1."
        )
