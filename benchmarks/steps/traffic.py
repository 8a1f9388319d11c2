"""What crosses the network: every collective, counted where torch hands it to the process group."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch.distributed as dist  # noqa: TID251 - to see what passes through it
from torch import Tensor

_WEIGHT_GATHERS = "partition_parameters.py"  # DeepSpeed's file that gathers weights to run a layer


@dataclass
class Collectives:
    """Payload of every collective of this rank: the bytes of the whole message, once."""

    weights: int = 0  # bytes in ZeRO-3's gathers of weights
    num_gathers: int = 0  # how many these were
    others: int = 0  # bytes in all else
    num_others: int = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Within the block, calls of the process group's methods are counted."""
        methods = {
            name: method
            for name, method in vars(dist.ProcessGroup).items()
            if callable(method) and not name.startswith("__") and not isinstance(method, type)
        }
        with ExitStack() as stack:
            for name, method in methods.items():
                counting = self._counting(name, method)
                stack.enter_context(mock.patch.object(dist.ProcessGroup, name, counting))
            yield

    def _counting(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sizes = [sum(t.nbytes for t in tensors_in(argument)) for argument in args]
            if any(sizes):  # an all-gather's output, a reduce-scatter's input: the larger one
                if _is_below(_WEIGHT_GATHERS):
                    self.weights += max(sizes)
                    self.num_gathers += 1
                else:
                    self.others += max(sizes)
                    self.num_others += 1
            return method(*args, **kwargs)

        return call


def _is_below(file: str) -> bool:
    """Whether a function of this file is on the stack."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.endswith(file):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def tensors_in(argument: Any) -> list[Tensor]:
    """The tensors of an argument, which may be a list of such."""
    if isinstance(argument, Tensor):
        return [argument]
    if isinstance(argument, (list, tuple)):
        return [tensor for item in argument for tensor in tensors_in(item)]
    return []
