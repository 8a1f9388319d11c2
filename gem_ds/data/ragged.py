"""Lists of different lengths, end to end in one tensor: pure functions on where each begins.

List i is `values[offsets[i] : offsets[i + 1]]`; `offsets` is int64 [n + 1], rising from 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def offsets_of(lengths: Sequence[int] | Tensor) -> Tensor:
    """Where each list begins, and the last ends: int64 [n + 1]."""
    lengths = torch.as_tensor(lengths, dtype=torch.int64)
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def positions(offsets: Tensor, index: Tensor) -> Tensor:
    """Where the entries of the lists `index` [k] lie in `values`, list after list: int64 [sum].

    Equivalent: `torch.cat([torch.arange(offsets[i], offsets[i + 1]) for i in index])`.
    """
    lengths = offsets.diff()[index]
    shifts = offsets[index] - offsets_of(lengths)[:-1]
    return torch.arange(int(lengths.sum())) + shifts.repeat_interleave(lengths)


def digest(*tensors: Tensor) -> str:
    """SHA-256 of tensors, their lengths and their dtypes' bytes, on any machine the same."""
    found = hashlib.sha256()
    for tensor in tensors:
        array = tensor.numpy()
        found.update(len(array).to_bytes(8, "little"))
        found.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return found.hexdigest()
