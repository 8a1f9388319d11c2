"""A trainer's values on their way to a model that generates: K numbers a step, and indices once.

    mask      message 0: mask.safetensors; 4 bytes an entry, once
    values    messages 1, 2, ...: the values of all entries in the mask's order; 2 bytes in 16 bits

A message is a header and its payload. The header has the kind, the number, the length, and a
SHA-256 of all three and the payload. A receiver takes a message wholly or not at all, and answers
with None or a sentence: a message that was lost or came twice has another number than the next,
one that was damaged another digest, and values that are not finite are none. This finds accidents;
it keeps no stranger out, so listen on a network of your own.

The answer to a mask is what the process has of the base's values at its entries. Under tensor
parallelism that is some entries of a weight, or a copy of those of another process: whoever gathers
the parts (:func:`check_parts`) knows then that every entry has a place and the base is the mask's.
"""

from __future__ import annotations

import hashlib
import socket
import struct
import tempfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from enum import IntEnum
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from gem_ds.files.apply import Swap
from gem_ds.files.delta import Delta
from gem_ds.files.mask import Mask
from gem_ds.serving.delta_set import DeltaSet

Buffer = bytes | bytearray

_HEADER = struct.Struct("!4sBQQ32s")  # magic, kind, number, bytes of the payload, SHA-256
_CHECK = struct.Struct("!I")  # CRC-32 of the header, without which a length means nothing
_MAGIC = b"GEM1"


class Kind(IntEnum):
    """What a message brings."""

    MASK = 0
    VALUES = 1
    DONE = 2  # the answer; of a mask with the base's values there
    REFUSED = 3  # the answer; with a sentence


def send(connection: socket.socket, kind: Kind, number: int, payload: Buffer) -> None:
    """Send one message."""
    connection.sendall(header(kind, number, payload))
    connection.sendall(payload)


def header(kind: Kind, number: int, payload: Buffer) -> bytes:
    """What goes before a payload."""
    digest = _digest(kind, number, payload)
    packed = _HEADER.pack(_MAGIC, kind, number, memoryview(payload).nbytes, digest)
    return packed + _CHECK.pack(zlib.crc32(packed))


def receive(connection: socket.socket) -> tuple[Kind, int, bytearray]:
    """Take one message.

    Raises:
        ValueError: It is damaged; the next one can be taken.
        ConnectionError: The other side is gone, or what it sends is no message.
    """
    packed = _read(connection, _HEADER.size)
    (check,) = _CHECK.unpack(_read(connection, _CHECK.size))
    magic, kind, number, length, digest = _HEADER.unpack(packed)
    if magic != _MAGIC or check != zlib.crc32(packed):
        connection.close()  # nobody knows where the next message starts
        raise ConnectionError("what came is no message of gem_ds: check host and port, and connect")
    payload = _read(connection, length)
    if digest != _digest(kind, number, payload):
        raise ValueError(f"message {number} is damaged, by its checksum")
    return Kind(kind), number, payload


def pack_values(mask: Mask, values: Mapping[str, Tensor]) -> bytearray:
    """The values [k_l] of all weights, one after the other; a ValueError where one misfits."""
    delta = Delta(mask=mask, values={name: values[name].detach().cpu() for name in mask.weights})
    packed = [delta.values[name].contiguous().view(torch.uint8) for name in mask.weights]
    return bytearray(torch.cat(packed).numpy().data)


def unpack_values(mask: Mask, payload: bytearray) -> dict[str, Tensor]:
    """The inverse of `pack_values`."""
    values, read = _zeros(mask), memoryview(payload)
    expected = sum(value.nbytes for value in values.values())
    if len(payload) != expected:
        raise ValueError(f"{len(payload)} bytes are not the values of this mask ({expected} bytes)")
    start = 0
    for value in values.values():
        value.view(torch.uint8).numpy().data[:] = read[start : start + value.nbytes]
        start += value.nbytes
    return values


def _zeros(mask: Mask) -> dict[str, Tensor]:
    """Values [k_l] of all weights that mean nothing yet, in the weights' dtypes."""
    return {
        name: torch.zeros(mask.indices[name].numel(), dtype=getattr(torch, info.dtype))
        for name, info in mask.weights.items()
    }


def pack_base(swaps: Iterable[Swap]) -> bytes:
    """What one process has of the base: a safetensors file, its tensors in pairs, numbered."""
    tensors = {}
    for number, swap in enumerate(swaps):
        chosen = torch.arange(swap.base.numel()) if swap.chosen is None else swap.chosen
        tensors[f"{number}.chosen.{swap.weight}"] = chosen.cpu()
        tensors[f"{number}.base.{swap.weight}"] = swap.base.cpu().contiguous()
    return save(tensors)


def check_parts(mask: Mask, parts: Sequence[bytes]) -> None:
    """Refuse parts of which an entry of the mask is missing, or that are another base's."""
    base = _zeros(mask)
    found = {name: torch.zeros(len(values), dtype=torch.bool) for name, values in base.items()}
    for tensors in map(load, parts):
        for key, chosen in tensors.items():
            number, kind, name = key.split(".", 2)
            if kind == "chosen":
                base[name][chosen] = tensors[f"{number}.base.{name}"]
                found[name][chosen] = True
    for name, has in found.items():
        if missing := int((~has).sum()):
            raise ValueError(
                f"the engine has no place for {missing} of {len(has)} entries of {name!r}: it "
                "cannot serve this delta; export the model instead (gem-ds export)"
            )
    mask.check_base(base, "delta")


class DeltaReceiver:
    """Keeps the delta ``policy`` of a `DeltaSet` as a trainer sends it.

    receiver = DeltaReceiver(gem_ds.DeltaSet(model), socket.create_connection((host, port)))
    receiver.receive()  # once for every message
    """

    NAME = "policy"

    def __init__(self, deltas: DeltaSet, connection: socket.socket) -> None:
        self._deltas, self._connection = deltas, connection
        self._delta: Delta | None = None
        self._next = 0

    def receive(self) -> None:
        """Take one message and answer it.

        Raises:
            ValueError: In one sentence, why it was refused; the sender is told the same, and the
                model is as it was; after a mask that is refused, it is the base.
            ConnectionError: The trainer is gone.
        """
        number = self._next
        try:
            kind, number, payload = receive(self._connection)
            answer = self._take(kind, number, payload)
        except ValueError as error:
            send(self._connection, Kind.REFUSED, number, str(error).encode())
            raise
        send(self._connection, Kind.DONE, number, answer)

    def close(self) -> None:
        """End the connection and put the base back."""
        self._connection.close()
        if self.NAME in self._deltas.names:
            self._deltas.remove(self.NAME)

    def _take(self, kind: Kind, number: int, payload: bytearray) -> bytes:
        if kind == Kind.MASK:
            return self._start(payload)
        if kind != Kind.VALUES:
            raise ValueError(f"message {number} is an answer, and no trainer's")
        if self._delta is None:
            raise ValueError(f"message {number} came before any mask: start the transfer")
        if number != self._next:
            problem = "came twice" if number < self._next else f"came, and {self._next} is missing"
            raise ValueError(f"message {number} {problem}: start the transfer again")
        delta = replace(self._delta, values=unpack_values(self._delta.mask, payload))
        self._deltas.update(self.NAME, delta)
        self._deltas.use(self.NAME)
        self._next += 1
        return b""

    def _start(self, payload: bytearray) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "mask.safetensors")
            path.write_bytes(payload)
            mask = Mask.load(path)
        delta = Delta(mask=mask, values=_zeros(mask))
        if self.NAME in self._deltas.names:
            self._deltas.remove(self.NAME)
        self._delta = None
        swaps = self._deltas.add(self.NAME, delta)
        self._delta, self._next = delta, 1
        return pack_base(swaps)


def _read(connection: socket.socket, length: int) -> bytearray:
    buffer = bytearray(length)
    view = memoryview(buffer)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise ConnectionError("the other side ended the connection within a message")
        view = view[count:]
    return buffer


def _digest(kind: int, number: int, payload: Buffer) -> bytes:
    digest = hashlib.sha256(struct.pack("!BQQ", kind, number, memoryview(payload).nbytes))
    digest.update(payload)
    return digest.digest()
