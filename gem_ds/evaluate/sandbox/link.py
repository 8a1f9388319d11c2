"""What judge and candidate have in common: one end of their conversation, the same at both.

A message is a tuple of plain data. With it go the changes of containers that an earlier message
held, so that a list which both sides know is one list, as if they shared their memory: an argument
that the program keeps and the tests change, a row that a generator yields again and again. Each
side remembers what the containers held when it last spoke or heard of them.

    bytes 0 to 3    how many containers the sender has numbered already
    the rest        (*message, changes), where changes are pairs of a number and its contents

The judge forgets them all from time to time, since to look for changes takes time. What was sent
before that is a copy from then on.
"""

from __future__ import annotations

import _operator as operator
import os
from _collections_abc import Callable

from gem_ds.evaluate.sandbox.values import MAX_BYTES, Any, WireError, contents, refill
from gem_ds.evaluate.sandbox.wire import Decoder, Encoder, Refer, Resolve

_MAX_SHARED = 500  # items in all containers that are remembered from one request to the next


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


class Link:
    """One end. `refer` and `resolve` as in `wire`."""

    def __init__(self, channel: Channel, refer: Refer, resolve: Resolve) -> None:
        self.channel = channel
        self.lent: list[Any] = []  # to the other side, which knows it by its place here
        self._numbers: dict[int, int] = {}  # of what is lent, by id
        self._refer = refer
        self._resolve = resolve
        self._shared: list[Any] = []
        self._held: list[Any] = []  # what each of them held

    def send(self, *message: Any) -> None:
        """Sends a message; where it cannot be said, nothing is sent and nothing has happened."""
        known = self._shared
        held = map(contents, known)
        changes = [(i, now) for i, now in enumerate(held) if not _same(now, self._held[i])]
        encoder = Encoder(self._refer, known, tells_heirs=True)
        data = encoder.encode((*message, tuple(changes)))
        self._remember(encoder.objects)
        self.channel.send(len(known).to_bytes(4, "little") + data)

    def receive(self) -> tuple[tuple[Any, ...], list[tuple[str, Any]]]:
        """The next message, and what in it could pose as a method (`wire.Decoder`).

        Raises `WireError` if it is none, and as the channel.
        """
        data = self.channel.receive()
        known = int.from_bytes(data[:4], "little")
        if known > len(self._shared):
            raise WireError("the message speaks of what was never sent")
        decoder = Decoder(self._resolve, self._shared[:known])
        message = decoder.decode(data[4:])
        try:
            *content, changes = message
            for number, items in changes:
                refill(decoder.objects[number], items)
        except (TypeError, ValueError, LookupError) as error:
            raise WireError(f"the bytes are not a message: {error}") from error
        self._remember(decoder.objects)
        return tuple(content), decoder.methods

    def number_of(self, value: Any) -> int:
        """The number by which the other side speaks of a value, which is held from now on."""
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.lent)
            self.lent.append(value)
        return self._numbers[id(value)]

    def forget_many(self) -> None:
        """Forgets the shared containers where they hold much."""
        if sum(map(len, self._held)) + len(self._held) > _MAX_SHARED:
            self._remember([])

    def _remember(self, shared: list[Any]) -> None:
        self._shared = shared
        self._held = [contents(container) for container in shared]


def _same(a: Any, b: Any) -> bool:
    """Whether contents are the same, without asking the objects in them."""
    if isinstance(a, bytes):
        return bool(a == b)
    return len(a) == len(b) and all(map(operator.is_, a, b))
