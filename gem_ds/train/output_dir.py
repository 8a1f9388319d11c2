"""The folder that a run writes to: whether it may, keeping others out, and clearing it.

What is a run's is what manifests list (`gem_ds.files.manifest`): that of the folder for the files
in it, one in each folder below. Everything else is somebody else's and stays.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from gem_ds.files.atomic import locked, make_folder
from gem_ds.files.checkpoint import list_checkpoints, remove_leftovers
from gem_ds.files.manifest import (
    MANIFEST,
    clear_leftovers,
    delete_folder,
    delete_listed,
    is_ours,
    listed_files,
    refuse_foreign,
)
from gem_ds.report.main import REPORT
from gem_ds.train.old_runs import adopt, is_old_checkpoint, old_files
from gem_ds.train.reporting import TENSORBOARD_FOLDER

#: What a run writes into its folder, beside checkpoints.
RUN_FILES = (
    *("mask.safetensors", "delta.safetensors", "metrics.jsonl", "trainer_state.json"),
    *("all_results.json", "predictions.jsonl"),
)
RUN_FOLDERS = ("model", "adapter", TENSORBOARD_FOLDER)
MODEL_CARD = "README.md"  # as the report not written where somebody else's stands


def refuse_run(output_dir: Path) -> None:
    """Refuse a folder that holds a run; the sentence says how to go on."""
    if _files_of_run(output_dir):
        is_resumable = bool(list_checkpoints(output_dir))
        go_on = "--resume_from_checkpoint last to go on with it, " if is_resumable else ""
        raise ValueError(
            f"--output_dir {output_dir} holds a run: pass {go_on}--overwrite_output_dir to delete "
            "it, or another folder."
        )


def refuse_losses(
    output_dir: Path, inputs: Mapping[str, str | None], product: str, *, overwrite: bool
) -> None:
    """Refuse a run that would delete its inputs, by flag, or replace what is no run's."""
    own = _files_of_run(output_dir)
    doomed = [path.resolve() for path in own] if overwrite else []
    for flag, name in inputs.items():
        source = Path(name or "").resolve()
        if name is None or source == output_dir.resolve():  # beside what is deleted
            continue
        if any(path.is_relative_to(source) for path in doomed):
            raise ValueError(
                f"Clearing --output_dir {output_dir} would delete {flag} {name}: name another "
                "folder."
            )
    there = (output_dir / name for name in RUN_FILES)
    if foreign := [path.name for path in there if os.path.lexists(path) and path not in own]:
        raise ValueError(
            f"--output_dir {output_dir} holds {', '.join(foreign)} of no run, and this run would "
            "write there: name another folder, or move that."
        )
    if product in RUN_FOLDERS:
        refuse_foreign(output_dir / product)


def refuse_taken_checkpoints(output_dir: Path, steps: range) -> None:
    """Refuse a folder where something else has the name of a checkpoint that may be written."""
    for folder in sorted(output_dir.glob("checkpoint-*")):
        number = folder.name.removeprefix("checkpoint-")
        if number.isdecimal() and int(number) in steps:
            refuse_foreign(folder)


@contextmanager
def output_dir_of_one_run(output_dir: Path) -> Iterator[None]:
    """Make the folder, and hold it against a second run while the block lasts. Rank 0 only."""
    make_folder(output_dir)
    with locked(output_dir) as is_free:
        if not is_free:
            raise ValueError(
                f"Another run writes to --output_dir {output_dir}: wait for its end, or name "
                "another folder."
            )
        yield


def clear_output_dir(output_dir: Path, *, overwrite: bool) -> None:
    """Delete what a killed run left half written, or all of a run; the rest stays. Rank 0 only."""
    remove_leftovers(output_dir)
    for name in (*RUN_FILES, *RUN_FOLDERS, MODEL_CARD, REPORT, MANIFEST):
        clear_leftovers(output_dir / name)
    adopt(output_dir)
    if overwrite:  # the run is known by its files if this is cut short
        for folder in _folders_of_run(output_dir):
            delete_folder(folder)
        delete_listed(output_dir)


def _files_of_run(output_dir: Path) -> list[Path]:
    """All files that a run left, in the folder and below."""
    found = [*listed_files(output_dir), *(output_dir / name for name in old_files(output_dir))]
    for folder in _folders_of_run(output_dir):
        found += listed_files(folder) if is_ours(folder) else folder.iterdir()
    return found


def _folders_of_run(output_dir: Path) -> list[Path]:
    folders = [output_dir / name for name in RUN_FOLDERS]
    checkpoints = list_checkpoints(output_dir).values()
    return [
        *(folder for folder in folders if is_ours(folder)),
        *(folder for folder in checkpoints if is_ours(folder) or is_old_checkpoint(folder)),
    ]
