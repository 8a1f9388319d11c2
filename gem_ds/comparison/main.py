"""Compare fine-tuning methods: runs of methods x tasks x seeds, tables, intervals, pictures.

    python launch/compare.py --config launch/recipes/compare_demo.yaml

    search (development split) -> learning rates -> final runs (test split) -> report

The same command goes on where it was stopped. The file is described in grid.py, what is written in
docs/comparing.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd

from gem_ds.comparison.bootstrap import compare_methods
from gem_ds.comparison.budget_plot import budget_figure
from gem_ds.comparison.cells import final_cells, folder_of, search_cells
from gem_ds.comparison.grid import Comparison, Task, read_comparison
from gem_ds.comparison.markdown import markdown
from gem_ds.comparison.plots import rate_figure, score_figure
from gem_ds.comparison.runner import Runner
from gem_ds.comparison.table import (
    cells_csv,
    choose_rates,
    finished,
    table_csv,
    tabulate,
    tabulate_cells,
)
from gem_ds.files.atomic import atomic_write
from gem_ds.files.mask import Mask
from gem_ds.flags import name_of
from gem_ds.train.output_dir import output_dir_of_one_run


def main(argv: Sequence[str] | None = None) -> int:
    """Run a comparison; returns 0, or 1 if a run failed."""
    about = "Compare fine-tuning methods over tasks, seeds and learning rates."
    parser = argparse.ArgumentParser(name_of("compare"), description=about, allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the comparison.")
    parser.add_argument("--output_dir", type=Path, help="Where everything is written instead.")
    parser.add_argument("--data_dir", type=Path, help="Folder that holds the tasks' data_dirs.")
    parser.add_argument(
        "--model_name_or_path",
        help="Instead of the one in the file's common; a task's or a method's own stays.",
    )
    parser.add_argument(
        "--tasks", nargs="+", help="Only these tasks of the file; the tables are of them alone."
    )
    args = parser.parse_args(argv)
    comparison = read_comparison(args.config)
    own = {} if args.model_name_or_path is None else {"model_name_or_path": args.model_name_or_path}
    comparison = replace(
        comparison,
        output_dir=args.output_dir or comparison.output_dir,
        common=comparison.common | own,
        tasks=chosen_tasks(comparison.tasks, args.tasks, args.data_dir),
    )
    with output_dir_of_one_run(comparison.output_dir):
        num_failed = compare(comparison)
    print(f"Wrote table.md, table.csv, cells.csv and pictures to {comparison.output_dir}")
    return 1 if num_failed else 0


def chosen_tasks(
    tasks: Mapping[str, Task], names: Sequence[str] | None, data_dir: Path | None
) -> dict[str, Task]:
    """Those of these names, or all, with their folders, which must be there, below ``data_dir``."""
    for name in names or ():
        if name not in tasks:
            raise ValueError(
                f"--tasks: the file has no task {name!r}; pass some of {', '.join(sorted(tasks))}."
            )
    chosen = {name: task for name, task in tasks.items() if names is None or name in names}
    if data_dir and not any(task.data_dir for task in chosen.values()):
        raise ValueError(
            "--data_dir replaces where the tasks' folders lie, and none of the tasks has one: give "
            "them data_dir in the file, or leave --data_dir out."
        )
    for name, task in chosen.items():
        folder = task.data_dir and str((data_dir or Path()) / task.data_dir)
        if folder and not Path(folder).is_dir():
            raise ValueError(
                f"There is no folder {folder} for tasks.{name}: pass --data_dir, the folder that "
                f"holds {task.data_dir}."
            )
        chosen[name] = replace(task, data_dir=folder)
    return chosen


def compare(comparison: Comparison) -> int:
    """Run what is missing and write the report; returns how many runs failed."""
    runner, search = Runner(comparison), search_cells(comparison)
    if search:
        print("Searching the learning rates, on the development split", flush=True)
    failures = runner.run(search)
    rates = choose_rates(comparison, tabulate_cells(comparison, search))
    final = final_cells(comparison, rates)
    print("Training with the chosen learning rates; scored on the test split", flush=True)
    failures |= runner.run(final)
    cells = tabulate_cells(comparison, [*search, *final])
    findings = {
        task: compare_methods(comparison, finished(cells, task, "test"))
        for task in comparison.tasks
    }
    table = tabulate(comparison, cells, rates, findings)
    for name, text in (
        ("table.md", markdown(comparison, table, cells, findings, failures)),
        ("table.csv", table_csv(table)),
        ("cells.csv", cells_csv(comparison, cells)),
    ):
        write = partial(Path.write_text, data=text, encoding="utf-8")
        atomic_write(comparison.output_dir / name, write)
    write_plots(comparison, table, cells)
    return len(failures)


def write_plots(comparison: Comparison, table: pd.DataFrame, cells: pd.DataFrame) -> None:
    """Write the pictures that there is something to show in.

    score_vs_parameters.png    test score against trained parameters
    learning_rates.png         development score against learning rate
    budget_<task>.png          which layers and modules the sparse methods' entries lie in
    """
    figures = {}
    if any(table.num_seeds > 0):
        figures["score_vs_parameters"] = score_figure(table)
    if any(cells.score[cells.split == "dev"].notna()):
        figures["learning_rates"] = rate_figure(comparison, table, cells)
    for task in comparison.tasks:
        runs = finished(cells, task, "test").drop_duplicates("method")
        paths = {c.method: folder_of(comparison, c) / "mask.safetensors" for c in runs.cell}
        masks = {method: Mask.load(path) for method, path in paths.items() if path.exists()}
        if masks:
            figures[f"budget_{task}"] = budget_figure(task, masks)
    for name, figure in figures.items():
        write = partial(figure.savefig, format="png", dpi=160)
        atomic_write(comparison.output_dir / f"{name}.png", write)
