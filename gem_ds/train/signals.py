"""Signals that end a run after its present step: a scheduler's notice, and Ctrl-C."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: Seconds. A launcher passes on the Ctrl-C that its processes have had from the terminal already.
_SAME_KEYSTROKE = 1.0

_TOLD = b"Stopping after this step, with a checkpoint where there are any; Ctrl-C again ends now\n"


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERMs and the first SIGINT until the loop reaches the end of its step.

    Only within the block; before and after it there is nothing to save, and signals do as ever. So
    does a second SIGINT: a KeyboardInterrupt. Signals come to the main thread alone: another one
    waits for none.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    first_interrupt: float | None = None

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal first_interrupt
        if number == signal.SIGINT:
            if first_interrupt is None:
                first_interrupt = time.monotonic()
                if os.environ.get("RANK", "0") == "0":
                    os.write(2, _TOLD)  # the interrupted code may hold the lock of sys.stderr
            elif time.monotonic() > first_interrupt + _SAME_KEYSTROKE:
                signal.default_int_handler(number, frame)
        received.append(number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
