"""A channel between judge and candidate: messages of bytes over a stream socket."""

from __future__ import annotations

import os

from gem_ds.evaluate.sandbox.values import MAX_BYTES, WireError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Channel:
    """Messages over an open stream socket, each after its length.

    Where the socket has timeouts, `while_waiting` is called at each.
    """

    def __init__(self, descriptor: int, while_waiting: Callable[[], None] = lambda: None) -> None:
        self._descriptor = descriptor
        self._while_waiting = while_waiting

    def send(self, message: bytes) -> None:
        """Sends one message; raises `OSError` where nobody receives."""
        data = memoryview(len(message).to_bytes(4, "little") + message)
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:
                self._while_waiting()

    def receive(self) -> bytes:
        """The next message; raises `EOFError` where none is to come, `WireError` for a huge one."""
        size = int.from_bytes(self._receive(4), "little")
        if size > MAX_BYTES + (1 << 20):
            raise WireError(f"a message takes more than {MAX_BYTES >> 20} MiB")
        return self._receive(size)

    def _receive(self, size: int) -> bytes:
        parts = []
        while size:
            try:
                part = os.read(self._descriptor, min(size, 1 << 20))
            except BlockingIOError:
                self._while_waiting()
                continue
            except ConnectionError:
                part = b""
            if not part:
                raise EOFError("the other side has closed")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)
