"""Contenders that are no methods of the trainer: what they cost is what others are measured by.

    floor         forward and input gradients of the frozen model; nothing is trained
    tuner         the entries of a random mask by peft's tuner, in DeepSpeed's engine as LoRA is
    lora_default  LoRA as peft and transformers have it by themselves: gradients down to the
                  embedding where blocks are recomputed
    lora_leaves   LoRA with blocks gathered whole at ZeRO 3, and gradients down to the embedding
    dense_masked  the way of the method's published code: a full trainable copy of each target
                  weight beside the frozen one, a mask, dense gradients, dense AdamW

All have what a run asks of a tuning (:class:`gem_ds.train.dense_tuning.DenseTuning`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from gem_ds.calibration.select_mask import select_mask
from gem_ds.distributed.comm import Comm
from gem_ds.distributed.dense_engine import DenseEngine
from gem_ds.distributed.engine import BaseEngine
from gem_ds.distributed.zero_gathers import fill_stage3
from gem_ds.models.blocks import block_sizes, model_of
from gem_ds.models.targets import targets_of
from gem_ds.train.config import DEFAULT_DENSITY
from gem_ds.train.dense_tuning import DenseTuning
from gem_ds.train.optimizer import make_dense_optimizer
from gem_ds.train.prepare import PreparedRun
from gem_ds.tuner import GemConfig


class Baseline:
    """A contender without calibration and without a product."""

    engine: BaseEngine
    num_trainable = 0


class _FrozenEngine(BaseEngine):
    """Runs backward passes to the output of the input embedding; a step changes nothing."""

    def module(self, *, deliver: bool) -> nn.Module:
        return self.model

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        if self.stage == 3:
            self._engine.optimizer.parameter_offload.release_backward_leftovers()

    def step(self) -> bool:
        return True

    def optimizer_state_bytes(self) -> int:
        return 0


class Floor(Baseline):
    """The frozen model: no method that adapts its layers can do without these two passes."""

    def __init__(self, prepared: PreparedRun, model: Any, head: list[str], comm: Comm) -> None:
        model.requires_grad_(False)
        embedding = model.get_input_embeddings()
        embedding.register_forward_hook(lambda _m, _i, output: output.requires_grad_())
        # DeepSpeed wants something to train.
        model.placeholder = nn.Parameter(torch.zeros(1, dtype=model.dtype))
        optimizer = make_dense_optimizer(prepared.args.train, [model.placeholder], [])
        self.engine = _FrozenEngine(model, optimizer, prepared.deepspeed, comm)


class Tuner(Baseline):
    """As many entries of the same layers as gem has; which ones makes no difference."""

    def __init__(self, prepared: PreparedRun, model: Any, head: list[str], comm: Comm) -> None:
        mask = select_mask(
            model,
            density=prepared.args.method.density or DEFAULT_DENSITY,
            target_modules=prepared.args.method.target_modules,
            rule="random",
        )
        adapted: Any = get_peft_model(model, GemConfig(mask=mask))
        values = [p for p in adapted.parameters() if p.requires_grad]
        self.num_trainable = mask.num_selected
        optimizer = make_dense_optimizer(prepared.args.train, values, [])
        self.engine = DenseEngine(adapted, optimizer, prepared.deepspeed, comm)


class LoraByDefault(DenseTuning):
    """LoRA, and gradients down to the embedding where blocks are recomputed, as peft lets them."""

    def __init__(self, prepared: PreparedRun, model: Any, head: list[str], comm: Comm) -> None:
        super().__init__(prepared, model, head, comm)
        if prepared.args.train.gradient_checkpointing:
            model.enable_input_require_grads()


class LoraOfLeaves(DenseTuning):
    """LoRA with its blocks gathered whole at stage 3.

    Which needs a gradient of each block's input: DeepSpeed 0.19 would send a block's gradients
    before there are any (:mod:`gem_ds.distributed.zero_gathers`).
    """

    def __init__(self, prepared: PreparedRun, model: Any, head: list[str], comm: Comm) -> None:
        zero = {
            key: value
            for key, value in prepared.deepspeed["zero_optimization"].items()
            if not key.startswith("stage3_")
        }
        if zero["stage"] == 3:
            blocks = block_sizes(model_of(prepared.config))
            fill_stage3(zero, prepared.config.hidden_size, blocks)
        deepspeed = prepared.deepspeed | {"zero_optimization": zero}
        super().__init__(replace(prepared, deepspeed=deepspeed), model, head, comm)
        model.enable_input_require_grads()


class DenseMasked(Baseline):
    """Dense masked training of the entries of a random mask; which ones makes no difference."""

    def __init__(self, prepared: PreparedRun, model: Any, head: list[str], comm: Comm) -> None:
        model.requires_grad_(False)
        targets = targets_of(model, prepared.targets.names)
        share = prepared.targets.budget / sum(
            module.get_parameter("weight").numel() for module in targets.values()
        )
        copies = [_masked(module, share) for module in targets.values()]
        self.num_trainable = sum(copy.numel() for copy in copies)
        optimizer = make_dense_optimizer(prepared.args.train, copies, [])
        self.engine = DenseEngine(model, optimizer, prepared.deepspeed, comm)


def _masked(module: Any, share: float) -> nn.Parameter:
    """Let a linear layer add a masked trainable copy to its weight; returns the copy."""
    weight = module.get_parameter("weight")
    module.register_buffer("mask", (torch.rand(weight.shape) < share).to(weight))
    module.trainable = nn.Parameter(torch.zeros_like(weight))
    module.forward = lambda x: F.linear(x, weight + module.trainable * module.mask, module.bias)
    trainable: nn.Parameter = module.trainable
    return trainable
