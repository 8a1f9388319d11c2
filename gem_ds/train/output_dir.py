"""The folder that a run writes to: whether it may, keeping others out, and clearing it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from gem_ds.files.atomic import delete, leftovers, make_folder, try_lock
from gem_ds.files.checkpoint import list_checkpoints, remove_leftovers
from gem_ds.train.reporting import TENSORBOARD_FOLDER

#: Files that make a folder the output of a run; ``--overwrite_output_dir`` deletes these.
RUN_FILES = (
    *("mask.safetensors", "delta.safetensors", "metrics.jsonl", "trainer_state.json"),
    *("all_results.json", "predictions.jsonl"),
)

#: Folders that a run may write beside them, and after metrics.jsonl; alone they are nobody's.
RUN_FOLDERS = ("model", "adapter", TENSORBOARD_FOLDER)

_MODEL_CARD = "README.md"


def refuse_run(output_dir: Path) -> None:
    """Refuse a folder that holds a run; the sentence says how to go on."""
    if _entries_of_run(output_dir):
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
    doomed = [entry.resolve() for entry in _doomed(output_dir, overwrite)]
    for flag, source in inputs.items():
        if source is None or not Path(source).exists():
            continue
        if any(Path(source).resolve().is_relative_to(entry) for entry in doomed):
            raise ValueError(
                f"Clearing --output_dir {output_dir} would delete {flag} {source}: name another "
                "folder."
            )
    folder = output_dir / product
    if product in RUN_FOLDERS and folder.exists() and folder not in _entries_of_run(output_dir):
        raise ValueError(
            f"--output_dir {output_dir} holds a folder {product} that is no run's, and this run "
            "would replace it: name another folder."
        )


@contextmanager
def output_dir_of_one_run(output_dir: Path) -> Iterator[None]:
    """Make the folder, and hold it against a second run while the block lasts. Rank 0 only."""
    make_folder(output_dir)
    descriptor = os.open(output_dir, os.O_RDONLY)
    try:
        if not try_lock(descriptor):
            raise ValueError(
                f"Another run writes to --output_dir {output_dir}: wait for its end, or name "
                "another folder."
            )
        yield
    finally:
        os.close(descriptor)  # which also unlocks


def clear_output_dir(output_dir: Path, *, overwrite: bool) -> None:
    """Delete what a killed run left half written, or all of a run; the rest stays. Rank 0 only."""
    remove_leftovers(output_dir)
    for entry in _doomed(output_dir, overwrite):
        delete(entry)


def _doomed(output_dir: Path, overwrite: bool) -> list[Path]:
    """What :func:`clear_output_dir` deletes, beside leftovers of checkpoints."""
    names = (*RUN_FILES, *RUN_FOLDERS, _MODEL_CARD)
    found = [entry for name in names for entry in leftovers(output_dir / name)]
    return found + (_entries_of_run(output_dir) if overwrite else [])


def _entries_of_run(output_dir: Path) -> list[Path]:
    """All that a run left; its files are last, by which it is known if clearing is cut short."""
    files = _existing(output_dir, RUN_FILES)
    checkpoints = list(list_checkpoints(output_dir).values())
    if not files and not checkpoints:
        return []
    is_finished = output_dir / "all_results.json" in files
    card = _existing(output_dir, (_MODEL_CARD,)) if is_finished else []  # it comes with the results
    return [*card, *_existing(output_dir, RUN_FOLDERS), *checkpoints, *files]


def _existing(folder: Path, names: Sequence[str]) -> list[Path]:
    return [folder / name for name in names if (folder / name).exists()]
