"""How many bytes a rank hands to collectives.

The functions of torch.distributed are wrapped, through which DeepSpeed and the trainer both go.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist  # noqa: TID251 - to count what goes through it
from torch import Tensor

_COLLECTIVES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_to_all_single",
)
_WEIGHT_GATHERS = "partition_parameters"  # DeepSpeed's file that gathers weights for a forward pass


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """While the block lasts, count the bytes of this rank's own tensors in collectives.

    Yields:
        Bytes under ``weights`` (the gathers of ZeRO-3 before a layer runs) and ``others``. An
        all-gather counts what the rank gives, all others the tensor that they are called on.
    """
    found: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in _COLLECTIVES}
    for name, original in originals.items():
        setattr(dist, name, _counting(name, original, found))
    try:
        yield found
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _counting(name: str, original: Callable[..., Any], found: Counter[str]) -> Callable[..., Any]:
    def collective(*args: Any, **kwargs: Any) -> Any:
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        given = tensors[-1] if name.startswith(("all_gather", "reduce_scatter")) else tensors[0]
        found["weights" if _is_weight_gather() else "others"] += given.nbytes
        return original(*args, **kwargs)

    return collective


def _is_weight_gather() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        if _WEIGHT_GATHERS in frame.f_code.co_filename:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
