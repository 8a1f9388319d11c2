"""What a person sees of a run: progress, metrics.jsonl, trackers. Rank 0 only."""

import json
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from tqdm import tqdm

from gem_ds.files.atomic import atomic_write
from gem_ds.files.checkpoint import TrainerState
from gem_ds.files.manifest import claim, list_files
from gem_ds.progress import Progress
from gem_ds.train.config import Arguments

TENSORBOARD_FOLDER = "tensorboard"  # in the output folder


class Reporter:
    """Shows and records a training run; on other ranks than 0 it does nothing.

    ``metrics.jsonl`` gets one line per log entry, flushed at once. On a resume it is rewritten to
    what the checkpoint knew, so that no step stands in it twice.
    """

    def __init__(
        self, output_dir: Path, state: TrainerState, args: Arguments, *, is_main: bool
    ) -> None:
        self._state, self._is_main = state, is_main
        self._is_shown = is_main and not args.train.disable_tqdm
        self._path = output_dir / "metrics.jsonl"
        self._stack = ExitStack()
        self._trackers: list[Any] = []
        self._progress: Progress | None = None
        self._num_tokens, self._seconds = 0, 0.0
        if not is_main:
            return
        lines = "".join(json.dumps(entry) + "\n" for entry in state.log_history)
        claim(output_dir, self._path.name)
        atomic_write(self._path, lambda path: path.write_text(lines))
        with ExitStack() as stack:  # those that have begun end if the next one cannot
            if trackers := find_trackers(args.train.report_to):
                stack.enter_context(_one_process())
            for name in trackers:
                tracker = _start_tracker(name, output_dir, state.global_step + 1, args.values())
                stack.callback(tracker.finish)
                self._trackers.append(tracker)
            self._stack = stack.pop_all()

    def progress(self, what: str, total: int, unit: str) -> Progress:
        """Of a loop beside the training itself."""
        return Progress(what, total, unit, is_shown=self._is_shown)

    def start(self) -> None:
        """Training begins."""
        total, done = self._state.max_steps, self._state.global_step
        self._progress = Progress(
            "Training", total, "step", initial=done, is_shown=self._is_shown, interval=None
        )

    def advance(self, loss: float, num_tokens: int, seconds: float) -> None:
        """Count a finished step; tokens are those that all ranks read."""
        self._state.unlogged_losses.append(loss)
        self._num_tokens += num_tokens
        self._seconds += seconds
        if self._progress is not None:
            self._progress.advance()

    def averages(self) -> dict[str, float]:
        """Mean loss and tokens per second of the steps since the last call, over a resume too."""
        losses = self._state.unlogged_losses
        averages = {
            "loss": sum(losses) / len(losses),
            "tokens_per_second": self._num_tokens / self._seconds,
        }
        losses.clear()
        self._num_tokens, self._seconds = 0, 0.0
        return averages

    def log(self, entry: dict[str, Any]) -> None:
        """Record numbers that belong to the present step."""
        numbers = entry
        entry = {"step": self._state.global_step, "epoch": round(self._state.epoch, 4), **numbers}
        self._state.log_history.append(entry)
        if not self._is_main:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        for tracker in self._trackers:
            tracker.log(numbers, step=entry["step"])
        if "loss" in entry and self._progress is not None:
            self._progress.tell(
                f"loss {entry['loss']:.4f}, lr {entry['learning_rate']:.2e}, "
                f"{entry['tokens_per_second']:.0f} tok/s"
            )
        if "eval_loss" in entry:
            self.say(f"step {entry['step']}: held-out loss {entry['eval_loss']:.4f}")

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """End the bar and what the trackers write."""
        if self._progress is not None:
            self._progress.close()
        self._stack.close()


def find_trackers(names: Sequence[str]) -> list[str]:
    """The trackers of accelerate that ``--report_to`` asks for, which must be installed."""
    installed = [str(tracker) for tracker in get_available_trackers()]
    if list(names) in (["none"], ["all"]):
        return installed if "all" in names else []
    known = [str(name) for name in LOGGER_TYPE_TO_CLASS]
    for name in names:
        if name not in known:
            raise ValueError(
                f"--report_to takes none, all, or some of {', '.join(known)}, not {name}."
            )
        if name not in installed:
            raise ValueError(
                f"--report_to {name} needs {name}: pip install {name.replace('_', '-')}."
            )
    return list(dict.fromkeys(names))


@contextmanager
def _one_process() -> Iterator[None]:
    """While the block lasts, accelerate takes this process, which alone has trackers, for all."""
    if PartialState._shared_state:
        yield
        return
    names = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        PartialState(cpu=True)
    finally:
        os.environ.update(hidden)
    try:
        yield
    finally:
        PartialState._reset_state()


def _start_tracker(name: str, output_dir: Path, first_step: int, flags: dict[str, Any]) -> Any:
    tracker_class: Any = LOGGER_TYPE_TO_CLASS[name]
    folder = output_dir / TENSORBOARD_FOLDER
    before = {*folder.glob("events.*")}
    if name == "tensorboard":
        # What an earlier session wrote of later steps is taken back, as in metrics.jsonl.
        tracker = tracker_class(TENSORBOARD_FOLDER, output_dir, purge_step=first_step)
    elif tracker_class.requires_logging_directory:
        tracker = tracker_class("gem_ds", output_dir)
    else:
        tracker = tracker_class("gem_ds")
    tracker.main_process_only = False  # this is the main process
    tracker.start()
    if name == "tensorboard":
        list_files(folder, sorted(path.name for path in {*folder.glob("events.*")} - before))
    else:  # tensorboard would show the flags as a run of its own
        tracker.store_init_configuration(flags)
    return tracker


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process has held so far: on a GPU, or on a CPU as its resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
