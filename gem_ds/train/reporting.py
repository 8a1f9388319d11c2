"""What a person sees of a run: the progress bar, metrics.jsonl, TensorBoard. Rank 0 only."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gem_ds.files.atomic import atomic_write
from gem_ds.files.checkpoint import TrainerState

#: Within the output folder.
TENSORBOARD_FOLDER = "tensorboard"


class Reporter:
    """Shows and records a training run; on other ranks than 0 it does nothing.

    ``metrics.jsonl`` gets one line per log entry, flushed at once. On a resume it is rewritten to
    what the checkpoint knew, so that no step stands in it twice.

    Args:
        output_dir: where ``metrics.jsonl`` and the TensorBoard folder lie.
        state: progress so far; what is logged and what is yet to be is added on every rank.
        is_main: rank 0.
        tensorboard: write TensorBoard events too.
        show_bar: show a progress bar.

    Raises:
        ValueError: TensorBoard is asked for and not installed.
        OSError: ``metrics.jsonl`` cannot be written.
    """

    def __init__(
        self,
        output_dir: Path,
        state: TrainerState,
        *,
        is_main: bool,
        tensorboard: bool,
        show_bar: bool,
    ) -> None:
        self._state = state
        self._is_main = is_main
        self._path = output_dir / "metrics.jsonl"
        self._board: Any = None
        if is_main:
            lines = "".join(json.dumps(entry) + "\n" for entry in state.log_history)
            atomic_write(self._path, lambda path: path.write_text(lines))
        if is_main and tensorboard:
            # What an earlier session wrote of later steps is taken back, as in metrics.jsonl.
            self._board = summary_writer_class()(
                str(output_dir / TENSORBOARD_FOLDER), purge_step=state.global_step + 1
            )
        self._show_bar = show_bar and is_main
        self._bar: Any = None
        self._num_tokens = 0
        self._seconds = 0.0

    def start(self) -> None:
        """Show the bar."""
        self._bar = tqdm(
            total=self._state.max_steps,
            initial=self._state.global_step,
            desc="Training",
            unit="step",
            disable=not self._show_bar,
            dynamic_ncols=True,
        )

    def advance(self, loss: float, num_tokens: int, seconds: float) -> None:
        """Count a finished step; tokens are those that all ranks read."""
        self._state.unlogged_losses.append(loss)
        self._num_tokens += num_tokens
        self._seconds += seconds
        self._bar.update()

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
        entry = {"step": self._state.global_step, "epoch": round(self._state.epoch, 4), **entry}
        self._state.log_history.append(entry)
        if not self._is_main:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if self._board is not None:
            for key, value in entry.items():
                if key not in ("step", "epoch"):
                    self._board.add_scalar(key, value, entry["step"])
        if "loss" in entry and self._bar is not None:
            self._bar.set_postfix_str(
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
        """End the bar and the event file."""
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held so far: on the device, or of the machine's.

    On a CPU it is the resident set, libraries and the Python interpreter included.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def summary_writer_class() -> Any:
    """TensorBoard's ``SummaryWriter``.

    Raises:
        ValueError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "--report_to tensorboard needs TensorBoard: pip install tensorboard."
        ) from None
    return SummaryWriter
