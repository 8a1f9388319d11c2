"""What a pruned model loses, and what mends it: perplexity on held-out text, zeros counted.

    python benchmarks/pruned.py --model_name_or_path runs/smollm2-135m --data_dir DATA

The text is the premises of RTE, news (``DATA/glue/RTE`` with GLUE's ``train.tsv`` and ``dev.tsv``):
calibration from the training file, perplexity on the development file without the premises that
both have. Everything below sees the same calibration rows:

    magnitude, wanda     gem_ds.prune, 50 % and 2:4
    ebft                 gem_ds.fit_blocks of the model that Wanda pruned
    lora                 of that too, all linear layers, merged and then put under the mask
    sparse               a rule of gem_ds with keep_zeros, as many entries as LoRA has numbers

The last two learn the next token with AdamW and a rate that falls linearly. bf16, one process.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import gem_ds
from gem_ds.models.targets import find_targets

SPARSITIES = ("0.5", "2:4")

Batch = dict[str, Tensor]


def premises(path: Path) -> list[str]:
    """Those of a file of RTE, each once, in its order."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return list(dict.fromkeys(row["sentence1"] for row in rows))


def rows_of(texts: Sequence[str], tokenizer: Any, length: int, limit: int) -> Tensor:
    """The texts one after another in rows of tokens, so many at most, evenly spread."""
    tokens = tokenizer("\n\n".join(texts), verbose=False)["input_ids"]
    available = len(tokens) // length
    rows = torch.tensor(tokens[: available * length]).view(available, length)
    count = min(limit, available)
    return rows[torch.arange(count) * available // count]


@torch.no_grad()
def perplexity(model: Any, rows: Tensor) -> float:
    """Exp of the mean loss of all tokens but the first of each row."""
    model.eval()
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in rows.split(8)]
    return math.exp(sum(losses) / len(rows))


def linear_weights(model: Any) -> dict[str, Tensor]:
    """What is pruned, by name."""
    return {n: model.get_parameter(n).detach() for n in find_targets(model, ["all-linear"])}


def num_zeros(model: Any) -> int:
    """Among the weights that are pruned."""
    return sum(int((weight == 0).sum()) for weight in linear_weights(model).values())


def train(network: Any, batches: Sequence[Batch], rate: float, epochs: int) -> None:
    """Learn the next token with what requires gradients."""
    network.train()
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.0)
    num_steps = epochs * len(batches)
    for step in range(num_steps):
        batch = batches[step % len(batches)]
        optimizer.param_groups[0]["lr"] = rate * (1 - step / num_steps)
        optimizer.zero_grad()
        network(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()


def with_lora(model: Any, batches: Sequence[Batch], args: argparse.Namespace) -> Any:
    """The model with LoRA merged, and all that was 0 made 0 again."""
    zeros = {name: weight == 0 for name, weight in linear_weights(model).items()}
    torch.manual_seed(0)
    config = peft.LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear")
    network = peft.get_peft_model(model, config)
    train(network, batches, args.lora_rate, args.epochs)
    merged: Any = network.merge_and_unload()
    for name, weight in linear_weights(merged).items():
        weight.masked_fill_(zeros[name], 0.0)
    return merged


def with_entries(model: Any, batches: Sequence[Batch], args: argparse.Namespace) -> Any:
    """The model with entries trained that are not 0, as many as LoRA has numbers."""
    shapes = [weight.shape for weight in linear_weights(model).values()]
    size = args.rank * sum(rows + columns for rows, columns in shapes)
    mask = gem_ds.select_mask(
        model,
        [batch | {"labels": batch["input_ids"]} for batch in batches],
        density=str(size / sum(p.numel() for p in model.parameters())),
        target_modules="all-linear",
        rule=args.rule,
        keep_zeros=True,
    )
    network = peft.get_peft_model(model, gem_ds.GemConfig(mask=mask))
    train(network, batches, args.sparse_rate, args.epochs)
    merged: Any = network.merge_and_unload()
    return merged


def measured(
    base: Any, batches: Sequence[Batch], held_out: Tensor, args: argparse.Namespace
) -> Iterator[tuple[str, str, float, int, float]]:
    """Per row of the table: sparsity, what was done, perplexity, zeros, seconds."""
    yield "none", "dense", perplexity(base, held_out), num_zeros(base), 0.0
    for sparsity in args.sparsity:
        start = base  # replaced by what Wanda leaves
        jobs: dict[str, Callable[[Any], Any]] = {
            "magnitude": lambda model: gem_ds.prune(model, sparsity),  # noqa: B023
            "wanda": lambda model: gem_ds.prune(model, sparsity, batches),  # noqa: B023
            "ebft": lambda model: gem_ds.fit_blocks(
                model, base, batches, learning_rate=args.ebft_rate, epochs=args.ebft_epochs
            ),
            "lora": lambda model: with_lora(model, batches, args),
            f"sparse ({args.rule})": lambda model: with_entries(model, batches, args),
        }
        for what, job in jobs.items():
            model, started = copy.deepcopy(start), time.perf_counter()
            result = job(model)
            seconds = time.perf_counter() - started
            model = result if isinstance(result, torch.nn.Module) else model
            start = model if what == "wanda" else start
            yield sparsity, what, perplexity(model, held_out), num_zeros(model), seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, a row when it is known."""
    parser = argparse.ArgumentParser(prog="benchmarks/pruned.py", description=__doc__)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--sparsity", nargs="+", default=SPARSITIES, help="one or several")
    parser.add_argument("--rows", type=int, default=32, help="of the calibration text")
    parser.add_argument("--held_out_rows", type=int, default=128)
    parser.add_argument("--max_length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--batch_size", type=int, default=2, help="rows of a step")
    parser.add_argument("--ebft_rate", type=float, default=2e-4)
    parser.add_argument("--ebft_epochs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3, help="of lora and sparse")
    parser.add_argument("--rank", type=int, default=8, help="of lora")
    parser.add_argument("--lora_rate", type=float, default=1e-3)
    parser.add_argument("--sparse_rate", type=float, default=1e-3)
    parser.add_argument("--rule", default="ratio")
    args = parser.parse_args(argv)
    folder = args.data_dir / "glue" / "RTE"
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    known = premises(folder / "train.tsv")
    new = [text for text in premises(folder / "dev.tsv") if text not in known]
    rows = rows_of(known, tokenizer, args.max_length, args.rows)
    held_out = rows_of(new, tokenizer, args.max_length, args.held_out_rows)
    batches = [{"input_ids": part} for part in rows.split(args.batch_size)]
    base = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=torch.bfloat16)
    print(f"{rows.numel():,} tokens of calibration text, {held_out.numel():,} held out\n")
    print("| sparsity | what | perplexity | zeros | seconds |\n| --- | --- | --- | --- | --- |")
    for sparsity, what, value, zeros, seconds in measured(base.eval(), batches, held_out, args):
        line = f"| {sparsity} | {what} | {value:.2f} | {zeros:,} | {seconds:.0f} |"
        print(line, flush=True)


if __name__ == "__main__":
    main()
