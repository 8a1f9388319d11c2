"""Which bytes live when, while a program runs on the meta device, where nothing is computed."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make, from the operator to the last reference.

    What stood before is not counted: tell of it with :meth:`know`. What is no tensor of the program
    (a gathered weight, a message) is told by :meth:`add`.
    """

    OWN = "activations, gradients"  # the kind of the program's own tensors

    def __init__(self) -> None:
        super().__init__()
        self.now: Counter[str] = Counter()  # bytes by kind
        self.at_peak: Mapping[str, int] = {}  # the same when their sum was largest
        self.peak = 0
        self._known: set[int] = set()

    def know(self, module: nn.Module) -> None:
        """Leave the parameters and buffers of a module out of the count."""
        tensors = [*module.parameters(), *module.buffers()]
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def add(self, kind: str, num_bytes: int) -> None:
        """Count bytes (or, if negative, count them no longer)."""
        self.now[kind] += num_bytes
        total = sum(self.now.values())
        if total > self.peak:
            self.peak, self.at_peak = total, dict(self.now)

    @contextmanager
    def held(self, kind: str, num_bytes: int) -> Iterator[None]:
        """Count bytes for the length of the block."""
        self.add(kind, num_bytes)
        yield
        self.add(kind, -num_bytes)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.add(self.OWN, storage.nbytes())
            weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.add(self.OWN, -num_bytes)


class _FlashAttention(torch.autograd.Function):
    """The tensors that a fused attention makes and keeps: its output, and a number for each row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, tokens, _ = query.shape
        output = query.new_empty(batch, tokens, heads, value.shape[-1])
        sums = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def flash_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """An attention function of transformers: query, key and value are [batch, heads, tokens, d]."""
    return _FlashAttention.apply(query, key, value), None
