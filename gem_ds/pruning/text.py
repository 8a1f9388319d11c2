"""Calibration text: a file of plain text in rows of equally many tokens, which need no padding."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from gem_ds.models.encoders import num_positions
from gem_ds.models.tokenizer import refuse_foreign_tokens


def add_text_flags(parser: argparse.ArgumentParser, *, use: str, is_needed: bool) -> None:
    """Add the flags of which text is read, and how much at once; ``use`` says what it is for."""
    parser.add_argument("--text", type=Path, required=is_needed, help=f"UTF-8 file: {use}")
    rows_help = "rows of --max_length tokens to take, evenly spread over the text"
    parser.add_argument("--rows", type=int, default=256, help=rows_help)
    parser.add_argument("--max_length", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--batch_size", type=int, default=8, help="rows that are read at once")


def text_batches(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> list[dict[str, Tensor]]:
    """The text that these flags name as batches of ``input_ids`` [rows, tokens], int64.

    Raises:
        ValueError: There is less than a row, or what the model cannot read.
    """
    limit = num_positions(config)
    if min(args.rows, args.max_length, args.batch_size) < 1:
        raise ValueError("--rows, --max_length and --batch_size must be at least 1.")
    if limit is not None and args.max_length > limit:
        raise ValueError(f"The model reads {limit} tokens at most: lower --max_length to that.")
    text = args.text.read_text(encoding="utf-8")
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor(encoded, dtype=torch.int64)
    available = len(tokens) // args.max_length
    if not available:
        raise ValueError(
            f"{args.text} holds {len(tokens)} tokens, less than a row of {args.max_length}: "
            "lower --max_length, or pass a longer text."
        )
    refuse_foreign_tokens(int(tokens.max()), config.get_text_config().vocab_size)
    rows = tokens[: available * args.max_length].view(available, args.max_length)
    count = min(args.rows, available)
    spread = torch.arange(count) * available // count
    return [{"input_ids": part} for part in rows[spread].split(args.batch_size)]
