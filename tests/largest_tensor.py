"""How large tensors are made while some code runs."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Within the block, records the largest tensor that an operation makes; views make none.

    And how many entries all of them have together.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_entries = 0
        self.total_entries = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and look at what it returns."""
        result = func(*args, **(kwargs or {}))
        given = {_place(tensor) for tensor in _tensors_in((args, kwargs))}
        made = [t.numel() for t in _tensors_in(result) if _place(t) not in given]
        self.num_entries = max([self.num_entries, *made])
        self.total_entries += sum(made)
        return result


def _tensors_in(tree: Any) -> list[Tensor]:
    """Dense ones: a sparse tensor has no storage of its own."""
    leaves = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return [leaf for leaf in leaves if leaf.layout == torch.strided]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
