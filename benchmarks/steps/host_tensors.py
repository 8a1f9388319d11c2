"""Which tensors a GPU's host would hold, told apart on a machine that has no other memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_MARK = "_is_on_host"  # of a storage


class HostTensors(TorchFunctionMode):
    """While it is entered, remembers which tensors are made on the host.

    Such are those that torch makes of no tensor where no device is named, and what becomes of them
    alone until a call names one. All others are taken to be on the device: weights, what is
    computed from them, and whatever was there before.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch; mark what it returns."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = tree_leaves((args, kwargs))
        tensors = [value for value in given if isinstance(value, Tensor)]
        if not all(map(is_on_host, tensors)):
            return result
        if not (any(isinstance(v, torch.device) for v in given) or kwargs.get("device")):
            mark(result)
        elif any(result is tensor for tensor in tensors):
            return result.clone()  # the device's
        return result


def mark(result: Any) -> None:
    """Remember that the tensors of a result are on the host."""
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
            setattr(leaf.untyped_storage(), _MARK, True)


def is_on_host(tensor: Tensor) -> bool:
    """Whether reading a tensor waits for no device."""
    if tensor.is_cuda or tensor.layout != torch.strided:
        return False
    return torch.cuda.is_available() or hasattr(tensor.untyped_storage(), _MARK)
