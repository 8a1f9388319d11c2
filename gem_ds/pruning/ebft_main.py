"""A pruned model mended block after block: ``gem-ds ebft --dense_model M --text FILE``.

It writes a delta of the pruned model, with which every program of deltas works; ``gem-ds export``
makes a folder of it. It is no method of ``gem-ds train``, as it has nothing that one is made of: no
loss of the whole model, no steps to resume, no engine and no ranks.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from gem_ds.files.manifest import claim
from gem_ds.files.mask import Mask
from gem_ds.flags import HelpFormatter, name_of
from gem_ds.models.load import load_weights, open_model
from gem_ds.models.targets import ALL_LINEAR
from gem_ds.progress import loading_bars
from gem_ds.pruning.ebft import fit_blocks
from gem_ds.pruning.text import add_text_flags, text_batches


def main(argv: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(
        prog=name_of("ebft"),
        description="Fit the blocks of a pruned model to those of the dense one (EBFT).",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--model_name_or_path", required=True, help="the pruned model")
    parser.add_argument("--dense_model", required=True, help="the model that was pruned")
    delta_help = "folder for delta.safetensors, a delta of the pruned model"
    parser.add_argument("--output_dir", type=Path, required=True, help=delta_help)
    add_text_flags(parser, use="what the blocks are fitted on", is_needed=True)
    rate_help = "of a block's first step; it falls linearly to 0"
    parser.add_argument("--learning_rate", type=float, default=2e-4, help=rate_help)
    epochs_help = "passes over the text for each block"
    parser.add_argument("--epochs", type=int, default=10, help=epochs_help)
    modules_help = "as in training: suffixes of names, a regular expression, or all-linear"
    parser.add_argument("--target_modules", nargs="+", default=[ALL_LINEAR], help=modules_help)
    mask_help = "a mask.safetensors of the pruned model: train its entries alone"
    parser.add_argument("--mask", type=Path, help=mask_help)
    code_help = "run model code that comes with the weights"
    parser.add_argument("--trust_remote_code", action="store_true", help=code_help)
    args = parser.parse_args(argv)
    if (args.output_dir / "delta.safetensors").exists():
        raise ValueError(f"--output_dir {args.output_dir} holds a delta: name another folder.")
    if args.epochs < 1:
        raise ValueError("--epochs must be at least 1.")
    mask = None if args.mask is None else Mask.load(args.mask)
    with loading_bars(is_shown=True):
        files, dense = (
            open_model(name, trust_remote_code=args.trust_remote_code)
            for name in (args.model_name_or_path, args.dense_model)
        )
        batches = text_batches(args, files.tokenizer, files.config)
        # In the host's memory: a block at a time goes to the device.
        model, teacher = (load_weights(each, torch.device("cpu")) for each in (files, dense))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = claim(args.output_dir, "delta.safetensors")
    delta = fit_blocks(
        model,
        teacher,
        batches,
        target_modules=args.target_modules,
        mask=mask,
        learning_rate=args.learning_rate,
        epochs=args.epochs,
        device="cuda" if torch.cuda.is_available() else "cpu",
        report=lambda name, first, last: print(
            f"{name}: mean squared error {first:.4g} in the first epoch, {last:.4g} in the last",
            flush=True,
        ),
    )
    delta.save(path)
    print(f"{path}: {delta.mask.num_selected:,} values of {args.model_name_or_path}")
