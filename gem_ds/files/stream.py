"""A safetensors file of tensors that are made one at a time, so that one alone is in memory.

    8 bytes     length of the header, little-endian
    header      JSON: per tensor its dtype, shape and place, and the metadata; padded to 8 bytes
    tensors     row-major, in the order of the header

It is to the byte what safetensors' own writer makes of the same tensors, which wants all of them at
once and copies them twice; here it is asked for the header of empty ones. (It writes metadata of
several keys in any order, here they keep theirs.) The format:
https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from gem_ds.files.digests import bytes_of


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is known but for its numbers, which `make` gives."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        """One that is made."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def num_bytes(self) -> int:
        """Of the numbers."""
        return prod(self.shape) * self.dtype.itemsize


def stream_tensors(
    path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]
) -> int:
    """Write a file; returns the bytes of its tensors."""
    empty = {name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()}
    header = json.loads(save(empty)[8:])
    order = list(header)
    end = 0
    for name in order:
        start, end = end, end + tensors[name].num_bytes
        header[name] |= {"shape": list(tensors[name].shape), "data_offsets": [start, end]}
    if metadata:
        header = {"__metadata__": dict(metadata)} | header
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            made = tensors[name].make()
            assert (made.dtype, tuple(made.shape)) == (tensors[name].dtype, tensors[name].shape)
            file.write(bytes_of(made))
            del made  # before the next is made
    return end
