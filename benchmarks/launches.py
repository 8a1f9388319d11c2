"""What a block of Llama-3-8B launches and keeps in a training step, counted on the meta device.

    python benchmarks/launches.py [--tokens 64]

The blocks have their true sizes and are bf16; nothing is computed, so no load of the machine is in
these numbers. Contenders are those of `benchmarks/step.py`, without an engine: its own launches,
the optimizer's and those that write entries back come once a step. Shown is what one block more
adds to a model, forward and backward: operations as torch dispatches them, views left out, and
what is kept for the backward pass, parameters left out. At ZeRO 3 DeepSpeed has put its own
function in the place of torch's linear one. Attention is a fused one's, and the sampled gradient
that of a GPU, by tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap  # noqa: TID251 - to run under it
from peft import LoraConfig, get_peft_model
from steps import flags_of
from steps.operations import count_operations
from steps.shapes import SHAPES, adapter_size
from steps.table import markdown
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

import gem_ds.planning.subject  # noqa: F401 - its attention makes and keeps what a fused one would
from gem_ds.models.blocks import enable_checkpointing
from gem_ds.models.targets import find_targets
from gem_ds.sddmm import Pattern, kernels
from gem_ds.sparse.entries import SampledSink
from gem_ds.sparse.target_layers import TargetLayers

SHAPE, DENSITY = "llama-3-8b", 0.001
CONTENDERS = ("floor", "gem", "lora", "lora_default", "full")


def one_launch(dy: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """Stands for a product of 16 bits into fp32, which a GPU alone computes at once."""
    return out.zero_()


def step_of(name: str, num_blocks: int, tokens: int, *, checkpointing: bool) -> Callable[[], None]:
    """Forward and backward of so many blocks, on a sequence of so many tokens."""
    config = SHAPES[SHAPE](num_blocks)
    config.vocab_size = 64
    with torch.device("meta"):
        model: Any = LlamaForCausalLM._from_config(config, attn_implementation="planned")
        ids = torch.zeros(1, tokens, dtype=torch.int64)
    model.to(torch.bfloat16).train()
    if checkpointing:
        enable_checkpointing(model)
    stack = ExitStack()
    if name == "gem":
        stack.enter_context(_selected(model))
    elif name == "floor":
        model.requires_grad_(False)
    elif name != "full":
        rank, _ = adapter_size(SHAPES[SHAPE](None), DENSITY)
        adapter = LoraConfig(r=rank, target_modules=["q_proj", "v_proj"])
        get_peft_model(model, adapter, autocast_adapter_dtype=False)
    if name == "floor" or (name == "lora_default" and checkpointing):
        model.enable_input_require_grads()

    def step() -> None:
        with stack:
            states = model.model(input_ids=ids, attention_mask=ids, use_cache=False)
            states.last_hidden_state.sum().backward()

    return step


def _selected(model: Any) -> ExitStack:
    """While it is entered, entries of the targets are trained, spread evenly over these."""
    targets, num_parameters = find_targets(model), sum(p.numel() for p in model.parameters())
    sizes = [module.get_parameter("weight").numel() for module in targets.values()]
    counts = [int(DENSITY * num_parameters * size / sum(sizes)) for size in sizes]
    layers, start, sinks = TargetLayers(model, targets, sum(counts)), 0, []
    layers.vector.to("meta").delivers = True
    for layer, count in zip(layers, counts, strict=True):
        index = torch.arange(count) * (layer.numel // count)
        pattern = replace(Pattern.of(index, layer.shape), flat_index=index.int().to("meta"))
        sinks.append(SampledSink(layers.vector, start, pattern, "tiled"))
        start += count
    layers.renew_anchor()
    stack = ExitStack()
    stack.enter_context(layers.sinks(sinks))
    stack.enter_context(mock.patch.object(kernels, "product", one_launch))
    return stack


def block_of(name: str, tokens: int, *, checkpointing: bool, stage: int) -> tuple[int, float]:
    """Launches of a block in the midst of others, and KiB that it keeps for each token."""
    linear = zero3_linear_wrap if stage == 3 else F.linear
    with mock.patch.object(F, "linear", linear):
        found = [
            count_operations(step_of(name, number, tokens, checkpointing=checkpointing))
            for number in (2, 3)
        ]
    launches, kept = (found[1][key] - found[0][key] for key in ("launches", "kept_bytes"))
    return launches, kept / tokens / 1024


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = flags_of("launches", __doc__)
    parser.add_argument("--tokens", type=int, default=64, help="of a sequence")
    tokens = parser.parse_args(argv).tokens
    rows = []
    for checkpointing in (False, True):
        for name in CONTENDERS:
            row = {"": name, "recomputed": "yes" if checkpointing else "no"}
            for stage in (0, 3):
                launches, kept = block_of(name, tokens, checkpointing=checkpointing, stage=stage)
                row[f"launches, ZeRO {stage}"] = f"{launches:,}"
                row[f"kept KiB a token, ZeRO {stage}"] = f"{kept:.1f}"
            rows.append(row)
    print(markdown(rows))


if __name__ == "__main__":
    main()
