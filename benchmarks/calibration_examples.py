"""How many calibration examples a mask needs: masks of few examples against that of many.

    python benchmarks/calibration_examples.py --model_name_or_path launch/demo/model --task gsm8k \
        --data_dir launch/demo/task --max_length 96 --density 0.02 \
        --per_device_train_batch_size 8 --output_dir runs/calibration_examples

takes the flags of launch/train.py. The shuffled training examples, or the first
``--calibration_examples`` of them, N, are cut into two halves. For n = 8, 16, 32, ... up to half of
them, three masks are made: of the first n of each half, and of all N. The overlap of two masks is
the share of the K entries that they have in common; chance alone would give K over the entries of
the targets. Writes ``overlap.md`` and ``overlap.png``. One process; gradients add up, so each
example is read once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt
from steps.table import markdown
from torch import Tensor

from gem_ds.calibration.calibrate import sum_gradients
from gem_ds.data.batches import permutation
from gem_ds.distributed.process_group import init_distributed
from gem_ds.select.selection import select_shards
from gem_ds.select.shards import Solo, TargetShard
from gem_ds.train.arguments import parse_arguments
from gem_ds.train.config import Arguments
from gem_ds.train.prepare import prepare
from gem_ds.train.run import Run
from gem_ds.train.sparse_tuning import SparseTuning

SMALLEST = 8


def main(argv: Sequence[str] | None = None) -> None:
    """Write the table and the picture."""
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    run, tuning, halves = calibrating_run(args)
    budget, half = run.prepared.targets.budget, halves.shape[1]
    ends = [SMALLEST << i for i in range(half.bit_length()) if SMALLEST << i < half] + [half]

    sums = [list(sums_up_to(run, tuning, part, ends)) for part in halves]
    everything = [a + b for a, b in zip(sums[0][-1], sums[1][-1], strict=True)]

    def mask(gradients: list[Tensor]) -> Tensor:
        return mask_of(tuning, gradients, budget, args.method.method)

    goal = mask(everything)
    rows = []
    for n, first, second in zip(ends, *sums, strict=True):
        masks = mask(first), mask(second)
        with_all = [overlap(one, goal) for one in masks]
        rows.append((n, sum(with_all) / 2, overlap(*masks)))
    chance = budget / sum(layer.numel for layer in tuning.layers)
    folder = Path(str(args.train.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / "overlap.md", rows, 2 * half, chance)
    draw(folder / "overlap.png", rows, 2 * half, chance)
    print((folder / "overlap.md").read_text(), end="")


def calibrating_run(args: Arguments) -> tuple[Run, SparseTuning, Tensor]:
    """A run of a calibrated method, and the examples that it calibrates on in halves [2, half]."""
    prepared = prepare(args, world_size=1)
    run = Run(prepared, init_distributed())
    assert isinstance(run.tuning, SparseTuning), "a calibrated method"
    order = permutation(len(prepared.data.train), args.train.seed, epoch=0)
    order = order[: args.method.calibration_examples]
    half = len(order) // 2
    return run, run.tuning, order[: 2 * half].view(2, half)


def sums_up_to(
    run: Run, tuning: SparseTuning, order: Tensor, ends: Sequence[int]
) -> Iterator[list[Tensor]]:
    """The gradient summed over the first n examples of ``order``, for each n of ``ends``."""
    sums = [torch.zeros(layer.numel) for layer in tuning.layers]
    summed_loss = run.prepared.objective.summed_loss
    with tuning.calibrating(run.calibration_batches(), summed_loss):
        for start, stop in zip([0, *ends[:-1]], ends, strict=True):
            examples = run.prepared.data.train.select(order[start:stop].tolist())
            batches = run.batches(examples)
            more = sum_gradients(tuning.engine, tuning.layers, batches, summed_loss)
            sums = [total + gradient for total, gradient in zip(sums, more, strict=True)]
            yield sums


def mask_of(tuning: SparseTuning, gradients: list[Tensor], total: int, method: str) -> Tensor:
    """The selected entries as bool [entries of all targets]."""
    shards = [
        TargetShard(
            name=layer.name,
            shape=layer.shape,
            start=0,
            weight=tuning.engine.weights.read_shard(layer.weight),
            gradient=gradient.clone(),
            device=gradient.device,
        )
        for layer, gradient in zip(tuning.layers, gradients, strict=True)
    ]
    masks = [torch.zeros(shard.numel, dtype=torch.bool) for shard in shards]
    for one, index in zip(
        masks, select_shards(shards, total, Solo(), rule=method).indices, strict=True
    ):
        one[index] = True
    return torch.cat(masks)


def overlap(one: Tensor, other: Tensor) -> float:
    """The share of the entries of a mask that are in another of the same size."""
    return float((one & other).sum() / one.sum())


def write_table(
    path: Path, rows: list[tuple[int, float, float]], total: int, chance: float
) -> None:
    """Markdown."""
    titles = ("examples n", f"in common with the mask of all {total}", "two disjoint sets of n")
    cells = [(str(n), f"{with_all:.1%}", f"{halves:.1%}") for n, with_all, halves in rows]
    table = markdown([dict(zip(titles, row, strict=True)) for row in cells])
    path.write_text(f"{table}\n\nBy chance: {chance:.1%}.\n")


def draw(path: Path, rows: list[tuple[int, float, float]], total: int, chance: float) -> None:
    """The same as a picture."""
    matplotlib.use("Agg")
    figure, axes = plt.subplots(figsize=(5, 3.2))
    numbers = [n for n, _, _ in rows]
    axes.plot(numbers, [row[1] for row in rows], marker="o", label=f"with the mask of all {total}")
    axes.plot(numbers, [row[2] for row in rows], marker="s", label="two disjoint sets of n")
    axes.axhline(chance, color="grey", linestyle=":", label="by chance")
    axes.set(xscale="log", xlabel="calibration examples n", ylabel="overlap", ylim=(0, 1))
    axes.set_xticks(numbers, [str(n) for n in numbers])
    axes.minorticks_off()
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
