"""On which input columns the selected entries lie: how large their inputs are, and how constant.

    python benchmarks/selected_columns.py --model_name_or_path MODEL --task cola --data_dir DIR
        --masks runs/gem/mask.safetensors runs/random/mask.safetensors

An encoder with a head, a task of one pair for each example. For each mask, of all its entries:

    input size       root mean square of the entry's input over all tokens, of the median column's
    constant share   of that input's energy, what is the same for all tokens: mean^2 / mean square
    ten columns      share of a weight's entries that lie in its ten most selected columns, least
                     and most over the weights that hold at least a hundred
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from steps import flags_of
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from gem_ds.data.tasks import load_task
from gem_ds.files.mask import Mask


class Inputs:
    """Sums over tokens of what some linear layers read."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.is_token = torch.ones(0, dtype=torch.bool)  # [batch, tokens] of the next batch
        self.num_tokens = 0  # read so far
        self.totals: dict[str, Any] = defaultdict(float)  # by the name of a weight, [columns]
        self.squares: dict[str, Any] = defaultdict(float)  # likewise, of the squares
        for name in names:
            module = model.get_submodule(name.removesuffix(".weight"))
            module.register_forward_pre_hook(partial(self._add, name))

    def _add(self, name: str, _: nn.Module, inputs: tuple[Tensor]) -> None:
        tokens = inputs[0].double()[self.is_token]
        self.totals[name] += tokens.sum(0)
        self.squares[name] += tokens.square().sum(0)

    def read(self, model: Any, batch: Mapping[str, Tensor]) -> None:
        """Let the model run over a batch."""
        self.is_token = batch["attention_mask"].bool()
        self.num_tokens += int(self.is_token.sum())
        with torch.no_grad():
            model(**batch)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each mask."""
    parser = flags_of("selected_columns", __doc__)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--data_dir")
    parser.add_argument("--masks", nargs="+", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=256, help="of the training set")
    args = parser.parse_args(argv)
    masks = {path: Mask.load(path) for path in args.masks}
    names = sorted({name for mask in masks.values() for name in mask.weights})
    model = AutoModelForSequenceClassification.from_pretrained(args.model_name_or_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    inputs = Inputs(model, names)
    examples: Sequence[Any] = load_task(args.task, data_dir=args.data_dir).train[: args.examples]
    for start in range(0, len(examples), 32):
        firsts, seconds = zip(*(e.pairs[0] for e in examples[start : start + 32]), strict=True)
        texts = (list(firsts),) if seconds[0] is None else (list(firsts), list(seconds))
        inputs.read(model, tokenizer(*texts, padding=True, truncation=True, return_tensors="pt"))
    print("input size  constant share  ten columns    mask")
    for path, mask in masks.items():
        print(f"{_line(mask, inputs)}  {path}")


def _line(mask: Mask, inputs: Inputs) -> str:
    sizes, constant, shares = [], [], []
    for name, index in mask.indices.items():
        column = index.long() % mask.weights[name].shape[1]
        mean = inputs.totals[name] / inputs.num_tokens
        square = inputs.squares[name] / inputs.num_tokens
        sizes.append((square.sqrt() / square.sqrt().median())[column])
        constant.append((mean.square() / square)[column])
        if column.numel() >= 100:
            counts = column.bincount().sort(descending=True).values
            shares.append(float(counts[:10].sum() / counts.sum()))
    size, share = (float(torch.cat(found).mean()) for found in (sizes, constant))
    ten = f"{min(shares):.2f} to {max(shares):.2f}" if shares else ""
    return f"{size:10.2f}  {share:14.2f}  {ten:13}"


if __name__ == "__main__":
    main()
