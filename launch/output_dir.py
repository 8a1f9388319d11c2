"""The folder that a run writes to: whether it may, and making it ready."""

from __future__ import annotations

import shutil
from pathlib import Path

from gem_ds.checkpoint import list_checkpoints, remove_leftovers
from gem_ds.reporting import TENSORBOARD_FOLDER

#: Files that make a folder the output of a run; ``--overwrite_output_dir`` deletes these.
RUN_FILES = (
    "mask.safetensors",
    "delta.safetensors",
    "metrics.jsonl",
    "trainer_state.json",
    "all_results.json",
)


def refuse_run(output_dir: Path) -> None:
    """Refuse a folder that holds a run.

    Raises:
        ValueError: it does; says how to go on.
    """
    if any((output_dir / name).exists() for name in RUN_FILES) or list_checkpoints(output_dir):
        raise ValueError(
            f"--output_dir {output_dir} holds a run: pass --resume_from_checkpoint last to go on "
            "with it, --overwrite_output_dir to delete it, or another folder."
        )


def make_output_dir(output_dir: Path, *, overwrite: bool) -> None:
    """Make the folder ready to be written; other files than a run's stay in it. Rank 0 only.

    Args:
        output_dir: is created, with its parents.
        overwrite: delete the run that it holds.

    Raises:
        OSError: it cannot be written to.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output_dir)
    if not overwrite:
        return
    if (output_dir / "delta.safetensors").exists():
        (output_dir / "README.md").unlink(missing_ok=True)  # the model card, which comes with it
    for name in RUN_FILES:
        (output_dir / name).unlink(missing_ok=True)
    for folder in (*list_checkpoints(output_dir).values(), output_dir / TENSORBOARD_FOLDER):
        if folder.exists():
            shutil.rmtree(folder)
