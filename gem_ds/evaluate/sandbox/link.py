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

from gem_ds.evaluate.sandbox.values import TYPE_CHECKING, WireError, contents, refill
from gem_ds.evaluate.sandbox.wire import Decoder, Encoder

if TYPE_CHECKING:
    from typing import Any

    from gem_ds.evaluate.sandbox.channel import Channel
    from gem_ds.evaluate.sandbox.wire import Refer, Resolve

_MAX_SHARED = 500  # items in all containers that are remembered from one request to the next


class Link:
    """One end. `refer` and `resolve` as in `wire`."""

    def __init__(self, channel: Channel, refer: Refer, resolve: Resolve) -> None:
        self._channel = channel
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
        self._channel.send(len(known).to_bytes(4, "little") + data)

    def receive(self) -> tuple[Any, ...]:
        """The next message; raises `WireError` if it is none, `EOFError` where none is to come."""
        return self.read(self._channel.receive())[0]

    def read(self, data: bytes) -> tuple[tuple[Any, ...], list[tuple[str, Any]]]:
        """A message that was received, and what in it could pose as a method (`wire.Decoder`)."""
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
