"""Several deltas on one base model in one process, of which one at a time stands in it.

    deltas = gem_ds.DeltaSet(model)
    deltas.add("gsm8k", gem_ds.Delta.load("runs/gsm8k/delta.safetensors"))
    deltas.add("squad", gem_ds.Delta.load("runs/squad/delta.safetensors"))
    with deltas.using("gsm8k"):
        model.generate(...)  # no other thread swaps meanwhile
    deltas.use("squad")  # until the next call
    deltas.use(None)  # the base again, bit for bit

Beside the model are held, of each delta, what its file holds and the base's bits at its entries:
8 bytes an entry in 16 bits. A swap writes base bits at the entries of the one delta and values at
those of the other; nothing else of the model is read.

The caches of attention that a prompt left under one delta mean nothing under another: drop them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from gem_ds.files.apply import Swap, find_swaps, write_entries
from gem_ds.files.delta import Delta


class DeltaSet:
    """Deltas of one base model, by name.

    While deltas are added and used, nobody else may write into the model's weights; they may move
    to another device.

    Attributes:
        model: The base model, in which the delta in use stands.
        lock: Held by every method while it reads or writes weights. A generation that holds it
            (``with deltas.lock``, or `using`) sees one delta from its first to its last token; a
            thread may take it several times.
    """

    def __init__(
        self, model: nn.Module, find: Callable[[nn.Module, Delta], list[Swap]] = find_swaps
    ) -> None:
        """``find`` tells where a delta's entries are in the model, and refuses another base."""
        self.model = model
        self.lock = threading.RLock()
        self._find_swaps = find
        self._swaps: dict[str, list[Swap]] = {}
        self._standing: str | None = None  # whose entries may be other than the base's
        self._is_whole = True  # all of them are; not after a swap that failed

    @property
    def names(self) -> list[str]:
        """Of the deltas, in the order in which they came."""
        return list(self._swaps)

    @property
    def active(self) -> str | None:
        """The delta in use; None is the base."""
        return self._standing

    def add(self, name: str, delta: Delta) -> list[Swap]:
        """Take a delta up, without using it; returns where its entries are.

        Raises:
            ValueError: There is one of this name, or `apply_delta` would refuse it, as it was made
                for another base. The model and the other deltas are as they were.
        """
        if name in self._swaps:
            raise ValueError(f"there is a delta {name!r} already: remove it, or name this another")
        with self.using(None):  # so that the base is what is compared and kept
            self._swaps[name] = [_placed(s) for s in self._find_swaps(self.model, delta)]
            return self._swaps[name]

    def remove(self, name: str) -> None:
        """Forget a delta; if it is in use, the base is from now on."""
        with self.lock:
            self._find(name)
            if name == self._standing:
                self.use(None)
            del self._swaps[name]

    def update(self, name: str, delta: Delta) -> None:
        """Give a delta other values of the same mask; where it is in use, so are they at once.

        Raises:
            ValueError: There is no such delta. That the masks are one is the caller's word.
        """
        with self.lock:
            new = []
            for swap in self._find(name):
                values, chosen = (delta.values | delta.head)[swap.weight], swap.chosen
                values = values if chosen is None else values[chosen.to(values.device)]
                new.append(replace(swap, values=values.to(swap.base.device)))
            self._swaps[name] = new
            if name == self._standing:
                self._is_whole = False
                self._write(new)

    def use(self, name: str | None) -> None:
        """Put a delta into the model instead of the one that stands there, or the base with None.

        After an error or an interruption within it, the next call puts everything right.

        Raises:
            ValueError: There is no such delta, or the model has another dtype by now. The model is
                as it was.
        """
        with self.lock:
            old, new = self._find(self._standing), self._find(name)
            for swap in [*old, *new]:
                if swap.tensor.dtype != swap.base.dtype:
                    raise ValueError(
                        f"the model is {swap.tensor.dtype} now, and its deltas were added in "
                        f"{swap.base.dtype}: move it to another device only"
                    )
            if name == self._standing and self._is_whole:
                return
            self._is_whole = False
            for swap in old:
                write_entries(swap.tensor, swap.indices, swap.base)
            self._standing = name
            self._write(new)

    @contextmanager
    def using(self, name: str | None) -> Iterator[nn.Module]:
        """While the block lasts, this delta stands in the model and no other thread can swap it.

        Gives the model; afterwards what was in use before is again.
        """
        with self.lock:
            before = self._standing
            self.use(name)
            try:
                yield self.model
            finally:
                self.use(before)

    def _find(self, name: str | None) -> list[Swap]:
        if name is None:
            return []
        if name not in self._swaps:
            names = ", ".join(self._swaps) or "none"
            raise ValueError(f"there is no delta {name!r}: there are {names}")
        return self._swaps[name]

    def _write(self, swaps: list[Swap]) -> None:
        for swap in swaps:
            write_entries(swap.tensor, swap.indices, swap.values)
        self._is_whole = True


def _placed(swap: Swap) -> Swap:
    """The swap with all that is written on the model's device, so that nothing is copied there."""
    device = swap.tensor.device
    indices = None if swap.indices is None else swap.indices.to(device)
    return replace(swap, indices=indices, values=swap.values.to(device))
