"""The folder of a cell: whether it may be written to, what it holds, what can go.

Beside what its programs write there are

    cell.json   the commands, exactly
    log.txt     what they printed

A cell is finished when its results are whole.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import IO

from gem_ds.comparison.cells import (
    MODULE,
    PROGRAM,
    Cell,
    evaluation_command,
    folder_of,
    training_command,
)
from gem_ds.comparison.grid import Comparison
from gem_ds.comparison.results import read_result, read_training
from gem_ds.files.atomic import delete, try_lock

CELL_FILE, LOG_FILE = "cell.json", "log.txt"

#: What a cell of the search need not keep: its score is all that is wanted of it.
WEIGHTS = ("delta.safetensors", "adapter", "model")

#: Seconds that processes just killed have to go.
PATIENCE = 3.0


def is_finished(comparison: Comparison, cell: Cell, *, training_only: bool = False) -> bool:
    """Whether a cell's results, or those of its training alone, are whole."""
    with suppress(ValueError):
        folder = folder_of(comparison, cell)
        return bool(read_training(folder) if training_only else read_result(comparison, cell))
    return False


def commands_of(comparison: Comparison, cell: Cell) -> dict[str, str]:
    """What cell.json holds."""
    commands = {"train": training_command(comparison, cell)}
    if evaluate := evaluation_command(comparison, cell):
        commands["evaluate"] = evaluate
    return {name: shlex.join(words) for name, words in commands.items()}


def refuse_other_commands(comparison: Comparison, cell: Cell) -> None:
    """Refuse a folder whose run is not the one that the file now asks for."""
    folder = folder_of(comparison, cell)
    path, wanted = folder / CELL_FILE, commands_of(comparison, cell)
    if not path.exists():
        if folder.is_dir() and set(os.listdir(folder)) - {LOG_FILE}:
            raise ValueError(
                f"{folder} holds files of something else: delete it, or choose another output_dir."
            )
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = {}
    if parting := _difference(found, wanted):
        raise ValueError(
            f"{folder} holds a run of another command ({parting}): delete that folder, or choose "
            "another output_dir."
        )


def lock(log: IO[bytes], folder: Path) -> None:
    """Hold the log for as long as anyone has it open, the child that inherits it above all.

    So a process that has outlived its comparison is noticed, and refused.
    """
    deadline = time.monotonic() + PATIENCE
    while not try_lock(log):
        if time.monotonic() > deadline:
            raise ValueError(
                f"A process of an earlier comparison is still at work in {folder}: wait for its "
                "end, or stop it."
            )
        time.sleep(0.05)


def clear(folder: Path) -> None:
    """Delete all but the log."""
    for entry in folder.iterdir():
        if entry.name != LOG_FILE:
            delete(entry)


def discard(folder: Path, *, is_search: bool) -> None:
    """Delete what a finished cell no longer needs: checkpoints, and the weights of a search."""
    for checkpoint in folder.glob("checkpoint-*"):
        delete(checkpoint)
    for name in WEIGHTS if is_search else ():
        delete(folder / name)


def last_line(log: Path) -> str:
    """The last line that says something; progress bars end theirs with a carriage return."""
    text = log.read_bytes()[-10_000:].decode(errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return lines[-1] if lines else ""


def _difference(found: dict[str, str], wanted: dict[str, str]) -> str:
    """In words, where commands part; empty where they do not."""
    if not isinstance(found, dict) or not found:
        return "its cell.json is damaged"
    for name in wanted | found:
        old, new = (_words(commands.get(name, "")) for commands in (found, wanted))
        for before, now, flag in zip_longest(old, new, ["", *old], fillvalue=""):
            if before != now:
                flag = flag if flag.startswith("--") else name
                return f"{flag}: {before or 'nothing'}, now {now or 'nothing'}"
    return ""


def _words(command: str) -> list[str]:
    """The words of a command, in which it does not matter by which name training was started."""
    return shlex.split(re.sub(rf" (-m|--module) {re.escape(MODULE)} ", f" {PROGRAM} ", command))
