"""A mask of a model in memory: one process, any batches, no DeepSpeed.

What ``launch/train.py --max_steps 0`` writes for the same examples, as a function. For each target
weight one fp32 matrix stands, the sum of its gradients; nothing else dense is kept, but of
quantized weights the dequantized ones while entries are chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gem_ds.calibration.calibrate import (
    NUM_TRIED_STEPS,
    checkpointing_in_eval_mode,
    refuse_unreached,
)
from gem_ds.calibration.gradients import (
    GradientSink,
    ShardReducer,
    begin_micro_batch,
    refuse_repeated,
)
from gem_ds.distributed.comm import Comm
from gem_ds.distributed.weights import num_parameters, numel
from gem_ds.files.fingerprint import fingerprints
from gem_ds.files.mask import Mask, WeightInfo
from gem_ds.models.encoders import head_names, without_head
from gem_ds.models.evaluation_mode import evaluation_mode
from gem_ds.models.targets import find_targets
from gem_ds.select.budget import total_budget
from gem_ds.select.rules import RULES, Statistic
from gem_ds.select.selection import select_shards
from gem_ds.select.shards import Solo, TargetShard
from gem_ds.select.zeros import find_candidates
from gem_ds.sparse.quantized import quantization_of
from gem_ds.sparse.target_layers import TargetLayers

#: What transformers calls the loss of a model -> the labels before those that it is the mean over.
_LABELS_BEFORE = {"ForCausalLM": 1, "ForMaskedLM": 0, "ForTokenClassification": 0}


def select_mask(
    model: nn.Module,
    batches: Iterable[Any] = (),
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    density: float | str | Decimal = "0.001",
    target_modules: Sequence[str] | str | None = None,
    rule: str = "gem",
    seed: int = 0,
    keep_zeros: bool | None = None,
    base_model: str | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Mask:
    """Select the entries of a model that a rule would train.

    Gradients are those at the weights as they are, in eval mode; gradient checkpointing stays on
    where the model has it on. The model is left exactly as it was.

    Args:
        model: of transformers or any other, whole in this process. The weights of one that
            bitsandbytes has quantized count as they are dequantized.
        batches: what ``loss`` takes, each once; a rule that looks at weights only reads none. For
            ``gem_abs``, ``gradient_abs`` and ``fish``, which judge by each example's own gradient,
            a batch counts as one example.
        loss: takes the model and a batch and returns the SUMMED loss of the batch, not a mean. None
            for models of transformers that return a loss of ``labels``: their mean over the label
            tokens is turned into a sum, and batches are mappings of tensors.
        density: the share of the model's parameters to select, in (0, 1].
        target_modules: as the flag: module names, one regular expression or ``"all-linear"``
            (default: the query and value projections).
        rule: one of :data:`gem_ds.select.rules.RULES`.
        seed: of rules that choose by chance.
        keep_zeros: select no entry that is exactly 0, so that the zeros of a pruned model survive
            training (default: where a target matrix has more than 5 % of them).
        base_model: the name of the model for the mask's reader (default: what its config says).
        reduce: sums a tensor over the processes, where each reads batches of its own and holds the
            same model: ``accelerator.reduce``. All of them then return the same mask.

    Returns:
        The mask; ``mask.save(path)`` makes a file that ``--mask`` takes.

    Raises:
        ValueError: in one sentence, what has to be changed.
    """
    if rule not in RULES:
        raise ValueError(f"There is no rule {rule!r}: pass one of {', '.join(RULES)}.")
    names = [target_modules] if isinstance(target_modules, str) else target_modules
    head = head_names(model) if isinstance(model, PreTrainedModel) else set()
    targets = _find_targets(model, names, head)
    budget = _budget(model, targets, density)
    if keep_zeros is None and quantization_of(model):
        keep_zeros = False  # a code of 4 bits is 0: nothing was pruned
    gradients: Sequence[Tensor | None] = [None] * len(targets)
    # Whatever the caller's mode is, as an evaluation's.
    with torch.inference_mode(False), torch.enable_grad(), evaluation_mode(model):
        layers = TargetLayers(model, targets, num_entries=1, vector_name=None)
        try:
            find_candidates(_shards(layers, gradients), budget, Solo(), keep_zeros)
            if statistic := RULES[rule].statistic:
                gradients = _sum_gradients(layers, batches, loss or _summed_loss, reduce, statistic)
        finally:
            layers.detach()
    selection = select_shards(
        _shards(layers, gradients), budget, Solo(), rule=rule, seed=seed, keep_zeros=keep_zeros
    )
    indices, weights = dict[str, Tensor](), dict[str, WeightInfo]()
    for layer, index in zip(layers, selection.indices, strict=True):
        values = layer.numbers()[index.to(layer.weight.device)]
        indices[layer.name] = index.to("cpu")
        weights[layer.name] = WeightInfo.of(layer.shape, values)
    name_or_path = getattr(getattr(model, "config", None), "_name_or_path", "")
    quantization = quantization_of(model)
    return Mask(
        indices=indices,
        weights=weights,
        base_model=base_model or str(name_or_path) or type(model).__name__,
        method=rule,
        settings={"density": str(density), "seed": seed}
        | selection.settings
        | ({"base_quantization": quantization} if quantization else {}),
        fingerprints=fingerprints(_comparable(model, head)),
    )


def _comparable(model: nn.Module, head: set[str]) -> dict[str, nn.Parameter]:
    """The parameters but a head's, and quantized ones, which lie otherwise on another device."""
    named = model.named_parameters()
    return {name: p for name, p in named if name not in head and p.is_floating_point()}


def _shards(layers: TargetLayers, gradients: Sequence[Tensor | None]) -> list[TargetShard]:
    """The whole matrices, where the first of them lies."""
    device = layers[0].weight.device  # a model may lie on several
    return [
        TargetShard(
            name=layer.name,
            shape=layer.shape,
            weight=layer.numbers(),
            gradient=None if gradient is None else gradient.to(device),
            device=device,
        )
        for layer, gradient in zip(layers, gradients, strict=True)
    ]


def _find_targets(
    model: nn.Module, names: Sequence[str] | None, head: set[str]
) -> dict[str, nn.Module]:
    if any(p.is_meta or hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError(
            "The model is not whole in this process: load it without ZeRO-3 and device_map, or run "
            "launch/train.py --max_steps 0."
        )
    targets = {n: module for n, module in find_targets(model, names).items() if n not in head}
    for name, module in targets.items():
        if "forward" in vars(module):
            raise ValueError(
                f"{name} belongs to a layer whose forward was replaced, as accelerate's hooks do: "
                "load the model without device_map."
            )
    return targets


def _budget(
    model: nn.Module, targets: Mapping[str, nn.Module], density: float | str | Decimal
) -> int:
    counted = without_head(model) if isinstance(model, PreTrainedModel) else model
    num_entries = num_parameters(counted)
    budget = total_budget(density, num_entries)
    available = sum(numel(model.get_parameter(name)) for name in targets)
    if budget > available:
        raise ValueError(
            f"A density of {density} of {num_entries:,} parameters is {budget:,} entries, but the "
            f"{len(targets)} target layers hold {available:,}: lower it or widen target_modules."
        )
    return budget


def _sum_gradients(
    layers: TargetLayers,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    reduce: Callable[[Tensor], Tensor] | None,
    statistic: Statistic,
) -> list[Tensor]:
    """Per layer the statistic of the loss's gradients summed over the batches, fp32, flat."""
    sinks = []
    for layer in layers:
        device = layer.weight.device
        total = torch.zeros(layer.numel, dtype=torch.float32, device=device)
        reducer = ShardReducer(Comm(device))
        sinks.append(GradientSink(layer, reducer, layer.numel, total, True, statistic))
    number = 0
    with layers.sinks(sinks), checkpointing_in_eval_mode(layers.model):
        for number, batch in enumerate(batches, start=1):
            begin_micro_batch(sinks, 1.0)
            layers.renew_anchor()  # for a loss that does not call the model as a whole
            value = loss(layers.model, batch)
            if value.numel() != 1 or not value.requires_grad:
                raise ValueError(
                    "The loss must be one number that depends on the target layers: return the sum "
                    "of the batch's losses, not detached."
                )
            if not math.isfinite(value.item()):
                raise ValueError(
                    f"The loss of batch {number} is not finite: check the model and the data (is "
                    "there a label?), or use bfloat16 or float32."
                )
            value.backward()
            refuse_repeated(sinks)
            if number == 1:
                refuse_unreached(layers, [sink.is_reached for sink in sinks], is_first=True)
            elif number == NUM_TRIED_STEPS:
                reached = [bool(sink.sums.any()) for sink in sinks]
                refuse_unreached(layers, reached, is_first=True)
    if not number:
        raise ValueError("There are no batches: pass at least one, or a rule that needs none.")
    sums = [sink.sums.reshape(-1) for sink in sinks]  # of this process, in a group or not
    if reduce is not None:
        sums = [reduce(total) for total in sums]
    refuse_unreached(layers, [bool(total.any()) for total in sums])
    return sums


def _summed_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's own loss, a mean, times the number of labels that it is the mean over."""
    kind = getattr(model, "loss_type", "")
    if kind is None and hasattr(model, "generate"):  # transformers knows it by no name: GPT-2's
        kind = "ForCausalLM"
    if kind not in _LABELS_BEFORE or not isinstance(batch, Mapping) or "labels" not in batch:
        raise ValueError(
            "Pass loss, which takes the model and a batch and returns the summed loss: without it "
            "the model must be a language model and the batch have labels."
        )
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    num_items = (batch["labels"][..., _LABELS_BEFORE[kind] :] != -100).sum()
    summed: Tensor = model(**batch).loss * num_items
    return summed
