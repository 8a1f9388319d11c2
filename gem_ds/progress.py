"""How far a loop has come, on standard error: a bar on a terminal, lines in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import transformers
from tqdm import tqdm

#: At most so often, in seconds, a loop tells a log file how far it has come.
INTERVAL = 30.0

_LIBRARY: Any = transformers.utils.logging  # has no types


class Progress:
    """How far a loop has come, on standard error: a bar on a terminal, else lines for a log file.

    Args:
        what: name of the loop, for example ``Training``.
        total: rounds of the loop.
        unit: name of a round, for example ``step``.
        initial: rounds that were done before.
        is_shown: False hides it.
        interval: seconds between lines; None leaves them to :meth:`tell`.
    """

    def __init__(
        self,
        what: str,
        total: int,
        unit: str,
        *,
        initial: int = 0,
        is_shown: bool,
        interval: float | None = INTERVAL,
    ) -> None:
        self._what, self._total, self._unit, self._done = what, total, unit, initial
        self._initial, self._is_shown, self._interval = initial, is_shown, interval
        self._started = self._told = time.monotonic()
        self._bar: tqdm[Any] | None = None
        if is_shown and sys.stderr.isatty():
            self._bar = tqdm(
                total=total, initial=initial, desc=what, unit=unit, dynamic_ncols=True, leave=None
            )

    def advance(self, count: int = 1) -> None:
        """Count some rounds."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._interval is not None and time.monotonic() - self._told > self._interval:
            self.tell()

    def tell(self, text: str = "") -> None:
        """Show some numbers of the present round."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        elif self._is_shown:
            self._told = time.monotonic()
            pace = (self._told - self._started) / max(self._done - self._initial, 1)
            left = timedelta(seconds=round(pace * (self._total - self._done)))
            parts = [
                f"{self._what}: {self._unit} {self._done} of {self._total}",
                text,
                f"{left} left",
            ]
            print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing more comes."""
        if self._bar is not None:
            self._bar.close()


@contextmanager
def loading_bars(*, is_shown: bool) -> Iterator[None]:
    """While the block lasts, transformers and the Hub show bars on a terminal only, or never."""
    has_bar = _LIBRARY.is_progress_bar_enabled()
    if not (is_shown and sys.stderr.isatty()):
        _LIBRARY.disable_progress_bar()
    try:
        yield
    finally:
        if has_bar:
            _LIBRARY.enable_progress_bar()
