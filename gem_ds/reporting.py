"""What a person sees of a run: the progress bar, metrics.jsonl, TensorBoard. Rank 0 only."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gem_ds.checkpoint import TrainerState
from gem_ds.files import atomic_write

#: Within the output folder; the name that TensorBoard's own writer has by default.
TENSORBOARD_FOLDER = "runs"


class Reporter:
    """Shows and records a training run; on other ranks than 0 it does nothing.

    ``metrics.jsonl`` gets one line per log entry, flushed at once. On a resume it is rewritten to
    what the checkpoint knew, so that no step stands in it twice.

    Args:
        output_dir: where ``metrics.jsonl`` and the TensorBoard folder ``runs`` lie.
        state: progress so far; entries are added to its ``log_history`` on every rank.
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
        self._since = 0.0
        self._num_tokens = 0

    def start(self) -> None:
        """Show the bar and start the clock: the next step begins now."""
        self._bar = tqdm(
            total=self._state.max_steps,
            initial=self._state.global_step,
            desc="Training",
            unit="step",
            disable=not self._show_bar,
            dynamic_ncols=True,
        )
        self._since = time.perf_counter()

    def advance(self, num_tokens: int) -> None:
        """Count a finished step that read ``num_tokens``, over all ranks."""
        self._num_tokens += num_tokens
        self._bar.update()

    def tokens_per_second(self) -> float:
        """Rate since the last call, over all ranks."""
        now = time.perf_counter()
        rate = self._num_tokens / max(now - self._since, 1e-9)
        self._since, self._num_tokens = now, 0
        return rate

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


def budget_table(rows: Iterable[tuple[str, int, int, float]]) -> str:
    """Where the budget went, a line per layer.

    Args:
        rows: per layer its weight's name, entries, selected entries and layer score.
    """
    rows = list(rows)
    total = sum(budget for _, _, budget, _ in rows)
    width = max(len(name) for name, *_ in rows)
    lines = [
        f"{'weight':<{width}}  {'entries':>12}  {'selected':>10}  {'density':>8}"
        f"  {'of budget':>9}  score"
    ]
    for name, numel, budget, score in rows:
        lines.append(
            f"{name:<{width}}  {numel:>12,}  {budget:>10,}  {budget / numel:>8.3%}"
            f"  {budget / total:>9.2%}  {score:.3e}"
        )
    numels = sum(numel for _, numel, _, _ in rows)
    lines.append(
        f"{'all targets':<{width}}  {numels:>12,}  {total:>10,}  {total / numels:>8.3%}  {1:>9.2%}"
    )
    return "\n".join(lines)


def effective_layers(budgets: Iterable[int]) -> float:
    """Over how many layers a budget is spread: the exponential of the entropy of its shares.

    Equal shares of L layers give L, everything in one layer gives 1.
    """
    positive = [budget for budget in budgets if budget]
    total = sum(positive)
    return math.exp(-sum(b / total * math.log(b / total) for b in positive))


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
