"""What a step computes and keeps, counted as torch dispatches it: no machine's load is in that."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .host_tensors import is_on_host, mark

#: What reads a number, or how many there are, so that a host waits for its device.
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal")
#: What, beside views, starts nothing on a device.
_STARTS_NOTHING = (
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("_unsafe_view", "_reshape_alias", "detach", "lift_fresh", "set_", "resize_"),
    "_local_scalar_dense",
)


class _Counted(TorchDispatchMode):
    """Counts launches, the bytes of what they return, and waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.written = self.num_waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        if tensors and all(map(is_on_host, tensors)):
            mark(result)
            return result
        if not func.is_view and name not in _STARTS_NOTHING:
            self.launches += 1
            results = result if isinstance(result, (list, tuple)) else [result]
            self.written += sum(r.nbytes for r in results if isinstance(r, Tensor))
        self.num_waits += _is_wait(name, tensors)
        return result


def _is_wait(name: str, tensors: list[Tensor]) -> bool:
    if name == "index":  # of truth values nobody knows how many are true
        return any(tensor.dtype == torch.bool for tensor in tensors[1:])
    return name in _WAITS


def count_operations(step: Callable[[], object]) -> dict[str, int]:
    """Of one step: products' operations, launches, bytes that these return and that are kept.

    A launch is an operation that torch dispatches and that runs something on a device. Kept is what
    autograd saves for the backward pass, each storage once, parameters left out. A sparse product's
    operations are not among the products'. A wait is where the host asks for numbers of the device,
    or how many there are. On a CPU all tensors but :class:`~steps.host_tensors.HostTensors` are
    taken for a device's.
    """
    kept: dict[int, tuple[torch.UntypedStorage, int]] = {}  # which live until the end
    counted = _Counted()
    tolist = Tensor.tolist

    def pack(tensor: Tensor) -> Tensor:
        owner = tensor._base if tensor._base is not None else tensor
        if not isinstance(owner, torch.nn.Parameter) and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage, storage.nbytes()
        return tensor

    def listed(tensor: Tensor) -> Any:
        counted.num_waits += not is_on_host(tensor)
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
        "launches": counted.launches,
        "written_bytes": counted.written,
        "kept_bytes": sum(nbytes for _, nbytes in kept.values()),
        "host_waits": counted.num_waits,
    }


def peak_allocated(step: Callable[[], object]) -> int:
    """The most bytes of the CPU that torch holds at once in a step, above those at its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = record.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(nbytes for _, nbytes in changes), default=0)
