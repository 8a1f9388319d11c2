"""What a step computes and keeps, counted as torch dispatches it: no machine's load is in that."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

#: What reads a number, or how many there are, so that a host waits for its device.
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal")
_ON_HOST = "/gem_ds/data/"  # where batches are made, before they go to the device


class _Counted(TorchDispatchMode):
    """Counts operations, but views, the bytes of what they return, and waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.number = self.written = self.num_waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.number += 1
            results = result if isinstance(result, (list, tuple)) else [result]
            self.written += sum(r.nbytes for r in results if isinstance(r, Tensor))
        if _is_wait(func.overloadpacket.__name__, tree_leaves(args)):
            self.num_waits += not _is_on_host()
        return result


def _is_wait(name: str, arguments: list[Any]) -> bool:
    if name == "index":  # of truth values nobody knows how many are true
        return any(isinstance(a, Tensor) and a.dtype == torch.bool for a in arguments[1:])
    return name in _WAITS


def _is_on_host() -> bool:
    frame: Any = sys._getframe(2)
    while frame is not None and _ON_HOST not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None


def count_operations(step: Callable[[], object]) -> dict[str, int]:
    """Of one step: products' operations, operations that torch runs, bytes they return and keep.

    Kept is what autograd saves for the backward pass, each storage once, parameters left out. A
    sparse product's operations are not among the products'. A wait is where the host asks for
    numbers of the device, or how many there are; on a CPU its own memory is taken for a device's.
    """
    kept: dict[int, int] = {}
    counted = _Counted()
    tolist = Tensor.tolist

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def listed(tensor: Tensor) -> Any:
        counted.num_waits += not _is_on_host()
        return tolist(tensor)

    flops = FlopCounterMode(display=False)
    with (
        flops,
        counted,
        saved_tensors_hooks(pack, lambda tensor: tensor),
        mock.patch.object(Tensor, "tolist", listed),
    ):
        step()
    return {
        "flops": flops.get_total_flops(),
        "operations": counted.number,
        "written_bytes": counted.written,
        "kept_bytes": sum(kept.values()),
        "host_waits": counted.num_waits,
    }
