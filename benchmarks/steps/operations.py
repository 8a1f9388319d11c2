"""What a step computes and keeps, counted as torch dispatches it: no machine's load is in that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


class _Counted(TorchDispatchMode):
    """Counts operations, but views, and the bytes of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.number = self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.number += 1
            results = result if isinstance(result, (list, tuple)) else [result]
            self.written += sum(r.nbytes for r in results if isinstance(r, Tensor))
        return result


def count_operations(step: Callable[[], object]) -> dict[str, int]:
    """Of one step: products' operations, operations that torch runs, bytes they return and keep.

    Kept is what autograd saves for the backward pass, each storage once, parameters left out. A
    sparse product's operations are not among the products'.
    """
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    flops = FlopCounterMode(display=False)
    with flops, _Counted() as counted, saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return {
        "flops": flops.get_total_flops(),
        "operations": counted.number,
        "written_bytes": counted.written,
        "kept_bytes": sum(kept.values()),
    }
