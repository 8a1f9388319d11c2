"""Seconds and peak memory of loss and backward: with logits of the answers, and in chunks.

Linux, on the CPU:

    OMP_NUM_THREADS=2 python benchmarks/answer_loss.py --trained inputs
    OMP_NUM_THREADS=2 python benchmarks/answer_loss.py --trained full

An OPT-125m of random weights, 4 sequences of 512 tokens. Either its weights are frozen and the
gradient goes down to the embeddings, as where entries of inner layers are trained, or all of them
are trained. The two losses take turns; memory is what the process holds at most beyond what it held
before the step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import OPTConfig, OPTForCausalLM

from gem_ds.data.dataset import IGNORED_LABEL, answer_positions
from gem_ds.models.loss import chunked_answer_loss, summed_answer_loss

LOSSES = {"logits": summed_answer_loss, "chunked": chunked_answer_loss}


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="benchmarks/answer_loss.py", description=__doc__)
    parser.add_argument("--trained", choices=["inputs", "full"], default="inputs")
    parser.add_argument("--answer_share", type=float, default=1.0, help="of the tokens")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig()).to(getattr(torch, args.dtype))
    if args.trained == "inputs":
        model.requires_grad_(False)
        model.enable_input_require_grads()
    tokens = torch.randint(0, model.config.vocab_size, (4, 512))
    labels = tokens.clone()
    labels[:, : round(512 * (1 - args.answer_share))] = IGNORED_LABEL
    batch = {
        "input_ids": tokens,
        "labels": labels,
        "answer_positions": answer_positions(labels),
    }

    seconds: dict[str, list[float]] = {name: [] for name in LOSSES}
    mebibytes: dict[str, list[float]] = {name: [] for name in LOSSES}
    for _ in range(args.repetitions):
        for name, loss_of in LOSSES.items():
            model.zero_grad()
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
            before, started = _kibibytes("VmRSS"), time.perf_counter()
            loss_of(model, batch).backward()
            seconds[name].append(time.perf_counter() - started)
            mebibytes[name].append((_kibibytes("VmHWM") - before) / 1024)
    print("loss     seconds (median)  peak MiB (most)")
    for name in LOSSES:
        print(f"{name:8} {statistics.median(seconds[name]):16.2f} {max(mebibytes[name]):16.0f}")


def _kibibytes(field: str) -> int:
    """A line of this process's status."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0])


if __name__ == "__main__":
    main()
