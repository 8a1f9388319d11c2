"""The folder that a run writes to: whether it may, keeping others out, and clearing it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gem_ds.checkpoint import list_checkpoints, remove_leftovers
from gem_ds.files import make_folder
from gem_ds.reporting import TENSORBOARD_FOLDER

#: Files that make a folder the output of a run; ``--overwrite_output_dir`` deletes these.
RUN_FILES = (
    "mask.safetensors",
    "delta.safetensors",
    "metrics.jsonl",
    "trainer_state.json",
    "all_results.json",
    "predictions.jsonl",
)

#: The same for folders.
RUN_FOLDERS = ("model", "adapter")


def refuse_run(output_dir: Path) -> None:
    """Refuse a folder that holds a run.

    Raises:
        ValueError: it does; says how to go on.
    """
    checkpoints = list_checkpoints(output_dir)
    if checkpoints or any((output_dir / name).exists() for name in (*RUN_FILES, *RUN_FOLDERS)):
        go_on = "--resume_from_checkpoint last to go on with it, " if checkpoints else ""
        raise ValueError(
            f"--output_dir {output_dir} holds a run: pass {go_on}--overwrite_output_dir to delete "
            "it, or another folder."
        )


@contextmanager
def output_dir_of_one_run(output_dir: Path) -> Iterator[None]:
    """Make the folder, and hold it against a second run for the length of the block. Rank 0 only.

    Raises:
        ValueError: another run holds it.
        OSError: it cannot be made or written to.
    """
    make_folder(output_dir)
    descriptor = os.open(output_dir, os.O_RDONLY)
    try:
        _lock(descriptor, output_dir)
        yield
    finally:
        os.close(descriptor)  # which also unlocks


def _lock(descriptor: int, output_dir: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"Another run writes to --output_dir {output_dir}: wait for its end, or name another "
            "folder."
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.EINVAL, errno.EBADF):
            raise
        # A network file system without locks: nobody can be kept out.


def clear_output_dir(output_dir: Path, *, overwrite: bool) -> None:
    """Delete what a killed run left half written; files that are no run's stay. Rank 0 only.

    Args:
        output_dir: is there, and this run's.
        overwrite: delete the run that it holds, too.

    Raises:
        OSError: something cannot be deleted.
    """
    remove_leftovers(output_dir)
    if not overwrite:
        return
    if (output_dir / "all_results.json").exists():
        (output_dir / "README.md").unlink(missing_ok=True)  # the model card, which comes with it
    for name in RUN_FILES:
        (output_dir / name).unlink(missing_ok=True)
    folders = [output_dir / name for name in (*RUN_FOLDERS, TENSORBOARD_FOLDER)]
    for folder in (*list_checkpoints(output_dir).values(), *folders):
        if folder.exists():
            shutil.rmtree(folder)
