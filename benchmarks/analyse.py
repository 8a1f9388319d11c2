"""What a comparison's runs have done: rates, budgets, masks, movement. Tables and pictures.

    python benchmarks/analyse.py runs/compare_smollm2 --output_dir runs/analysis

reads what the finished cells of a comparison have left, which may still be at work, and writes
``analysis.md`` and a picture of each part:

    rates      loss and score on the development split by learning rate
    budgets    where the entries lie: by module and depth, over how many matrices
    overlap    how far masks agree between methods, seeds and tasks
    movement   how far trained entries moved, against themselves and their matrix

The last three are of the final runs. The base model is that of the masks, unless it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from analysis.budgets import budget_figure, budget_table
from analysis.movement import movement_figure, movement_of, movement_table, parameters_of
from analysis.overlap import overlap_figure, overlap_table
from analysis.rates import rate_figure, rate_table
from analysis.runs import FinishedRun, by_method, by_task, finished_runs
from matplotlib.figure import Figure
from steps import flags_of

from gem_ds.files.atomic import atomic_write, make_folder
from gem_ds.files.mask import Mask


def main(argv: Sequence[str] | None = None) -> None:
    """Write the tables and the pictures."""
    parser = flags_of("analyse", __doc__)
    parser.add_argument("root", type=Path, help="output folder of a comparison")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--model_name_or_path", help="the base model (default: that of the masks)")
    args = parser.parse_args(argv)
    runs = by_task(finished_runs(args.root))
    if not runs:
        raise ValueError(f"{args.root} holds no finished run of a comparison: check the path.")
    make_folder(args.output_dir)
    tables, figures = analyse(runs, args.model_name_or_path)
    atomic_write(args.output_dir / "analysis.md", lambda path: path.write_text(tables))
    for name, figure in figures.items():
        write = partial(figure.savefig, format="png", dpi=110)
        atomic_write(args.output_dir / f"{name}.png", write)
    print(tables, end="")


def analyse(runs: dict[str, list[FinishedRun]], model: str | None) -> tuple[str, dict[str, Figure]]:
    """The text of analysis.md and the pictures by name."""
    tried, final = (
        {task: [run for run in own if run.split == split] for task, own in runs.items()}
        for split in ("dev", "test")
    )
    masks = {task: _masks(own) for task, own in final.items()}
    lists = {task: {m: list(s.values()) for m, s in own.items()} for task, own in masks.items()}
    every = [mask for own in lists.values() for seeds in own.values() for mask in seeds]
    movements = {}
    if every:
        base = parameters_of(model or every[0].base_model)
        targets = sorted({name for mask in every for name in mask.indices})
        for task, own in final.items():
            moved = {m: movement_of(r, base, targets) for m, r in by_method(own).items()}
            movements[task] = {m: found for m, found in moved.items() if found is not None}
    parts = ["# Analysis"]
    for title, by in (
        (
            "Development loss (and score) by learning rate",
            {t: rate_table(r) for t, r in tried.items()},
        ),
        ("Where the budget went", {t: budget_table(m) for t, m in lists.items()}),
        ("How far entries moved", {t: movement_table(m) for t, m in movements.items()}),
    ):
        for task, table in by.items():
            parts += [f"## {title}: {task}", table] if table else []
    if table := overlap_table(masks):
        parts += ["## How far masks agree", table]
    pictures: dict[str, tuple[Callable[[Any], Figure], Mapping[str, Any]]] = {
        "rates": (rate_figure, tried),
        "budgets": (budget_figure, lists),
        "overlap": (overlap_figure, masks),
        "movement": (movement_figure, movements),
    }
    figures = {}
    for name, (draw, tasks) in pictures.items():
        if shown := {task: content for task, content in tasks.items() if content}:
            figures[name] = draw(shown)
    return "\n\n".join(parts) + "\n", figures


def _masks(runs: Sequence[FinishedRun]) -> dict[str, dict[int, Mask]]:
    """By method and seed, of those that have one."""
    found = {
        method: {
            run.seed: Mask.load(run.folder / "mask.safetensors")
            for run in own
            if (run.folder / "mask.safetensors").exists()
        }
        for method, own in by_method(runs).items()
    }
    return {method: masks for method, masks in found.items() if masks}


if __name__ == "__main__":
    main()
