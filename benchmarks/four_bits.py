"""What a step holds on a base of 4 bits: peft's tuner of a mask beside LoRA, which is QLoRA then.

    python benchmarks/four_bits.py [--shape opt-125m] [--batch_size 4] [--tokens 256]

The base is in NF4 with double quantization and computes in bf16; both adapters are on the query and
value projections, and LoRA has the smallest rank that trains at least as many parameters. Counted
are bytes that torch allocates in a second step of AdamW, so no load of the machine is in them:

    weights    the base as it lies and what is trained
    state      moments
    step       the most that a step holds beside both: activations, gradients, temporaries
    kept       of that, what autograd keeps for the backward pass
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from steps.operations import count_operations, peak_allocated
from steps.shapes import SHAPES, adapter_size, write_model
from steps.table import markdown
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import gem_ds
from gem_ds.models.targets import find_targets

MIB = 2.0**20


def adapted(name: str, folder: Path, rank: int, density: float) -> Any:
    """The base in NF4 with a new adapter."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=nf4, dtype=torch.bfloat16
    )
    config: Any
    if name == "gem":
        mask = gem_ds.select_mask(model, density=density, rule="random")
        config = gem_ds.GemConfig(mask=mask)
    else:
        targets = [weight.removesuffix(".weight") for weight in find_targets(model)]
        config = LoraConfig(r=rank, target_modules=targets)
    return get_peft_model(model, config).train()


def measure(name: str, folder: Path, args: argparse.Namespace) -> dict[str, str]:
    """A row of the table."""
    rank, _ = adapter_size(SHAPES[args.shape](None), args.density)
    model = adapted(name, folder, rank, args.density)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    tokens = torch.randint(5, 900, (args.batch_size, args.tokens))

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    state = sum(t.nbytes for kept in optimizer.state.values() for t in kept.values())
    peak, kept = peak_allocated(step), count_operations(step)["kept_bytes"]
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    total = weights + state + peak
    return {
        "": name,
        "trainable": f"{sum(p.numel() for p in trained):,}",
        "weights MiB": f"{weights / MIB:.2f}",
        "state MiB": f"{state / MIB:.2f}",
        "step MiB": f"{peak / MIB:.2f}",
        "kept MiB": f"{kept / MIB:.2f}",
        "together MiB": f"{total / MIB:.2f}",
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="opt-125m")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--density", type=float, default=0.001)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), SHAPES[args.shape](None), torch.bfloat16)
        print(markdown([measure(name, Path(folder), args) for name in ("gem", "lora")]))


if __name__ == "__main__":
    main()
