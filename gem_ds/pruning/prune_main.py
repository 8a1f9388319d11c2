"""A pruned model's folder, made of a dense one: ``gem-ds prune --sparsity 2:4 --text FILE``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from gem_ds.files.manifest import atomic_folder
from gem_ds.flags import HelpFormatter, name_of
from gem_ds.models.folder import base_folder, write_folder
from gem_ds.models.load import load_weights, open_model
from gem_ds.models.targets import ALL_LINEAR
from gem_ds.progress import loading_bars
from gem_ds.pruning.prune import parse_sparsity, prune
from gem_ds.pruning.text import add_text_flags, text_batches


def main(argv: Sequence[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(
        prog=name_of("prune"),
        description="Set the least weights of a model's linear layers to 0.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--model_name_or_path", required=True, help="folder or Hub name")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to create")
    sparsity_help = "share of zeros, such as 0.5, or 2:4 and other n:m, for n of m that stay"
    parser.add_argument("--sparsity", required=True, help=sparsity_help)
    use = "its tokens weigh the inputs, by Wanda; without it weights go by their magnitude"
    add_text_flags(parser, use=use, is_needed=False)
    modules_help = (
        "as in training: suffixes of names, a regular expression, or all-linear; experts that are "
        "kept as one parameter stay as they are"
    )
    parser.add_argument("--target_modules", nargs="+", default=[ALL_LINEAR], help=modules_help)
    code_help = "run model code that comes with the weights"
    parser.add_argument("--trust_remote_code", action="store_true", help=code_help)
    args = parser.parse_args(argv)
    if args.output_dir.exists():
        raise ValueError(f"--output_dir {args.output_dir} is there already: name a new folder.")
    parse_sparsity(args.sparsity)  # refused before anything is loaded
    of_text = ("rows", "max_length", "batch_size")
    if args.text is None and any(getattr(args, f) != parser.get_default(f) for f in of_text):
        raise ValueError("--rows, --max_length and --batch_size cut --text: pass it too.")
    with loading_bars(is_shown=True):
        files = open_model(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
        batches = None
        if args.text is not None:
            batches = text_batches(args, files.tokenizer, files.config)
        model = load_weights(files, torch.device("cpu"))  # of which a block goes to the device
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prune(model, args.sparsity, batches, target_modules=args.target_modules, device=device)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    commit = getattr(model.config, "_commit_hash", None) or files.revision
    base = base_folder(files.name, commit)
    args.output_dir.resolve().parent.mkdir(parents=True, exist_ok=True)
    atomic_folder(args.output_dir, lambda folder: write_folder(folder, base, model, weights))
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    total = sum(weight.numel() for weight in weights.values())
    print(f"{args.output_dir}: {files.name} with {zeros:,} zeros among {total:,} parameters")
