"""The target layers of a model together, and what becomes of its other linear layers meanwhile.

Those keep even less of a forward pass than targets: their weight *parameter*, of which ZeRO-3 may
hold a part in between, and nothing of their input, which only a gradient of theirs would need.
(DeepSpeed's own linear function keeps the input; torch's keeps what ZeRO-3 has gathered.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gem_ds.sparse.flat_values import FlatValues
from gem_ds.sparse.layers import Sink, TargetLayer, kind_of


class _FrozenLinear(torch.autograd.Function):
    """A linear layer's function that saves its weight alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return dy @ weight.to(dy.dtype), None, None


def _frozen_forward(module: nn.Module, x: Tensor) -> Tensor:
    """What a linear layer computes while nothing of it is trained: the same as ever."""
    y: Tensor = _FrozenLinear.apply(x, module.weight, module.bias)
    return y


def _frozen_linears(model: nn.Module) -> list[Any]:
    """Plain linear layers of a model, but for its output layer, whose loss is computed in it."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return [
        module
        for module in model.modules()
        if kind_of(module) is TargetLayer and module is not output and "forward" not in vars(module)
    ]


class TargetLayers(Sequence[TargetLayer]):
    """The target layers of a model, in ``named_parameters`` order, and the flat vector they train.

    ``targets`` are the modules by the names of their weights. Making it adds the vector to the
    model, as a submodule ``vector_name`` (None keeps a vector that is never stepped out of it), and
    swaps the forward of the linear layers; :meth:`detach` undoes both. Every parameter of the model
    but those of flat vectors is frozen.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: dict[str, nn.Module],
        num_entries: int,
        vector_name: str | None = "gem_entries",
    ) -> None:
        self.model = model
        self.vector_name = vector_name
        self.layers = []
        for name, module in targets.items():
            kind = kind_of(module)
            assert kind is not None, f"{name} belongs to a {type(module).__name__}, no target"
            self.layers.append(kind(name, module))
        for module in model.modules():
            if not isinstance(module, FlatValues):
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(False)
        dtypes = {layer.dtype for layer in self.layers}
        if len(dtypes) > 1:
            raise ValueError(
                f"The target layers have several dtypes ({', '.join(sorted(map(str, dtypes)))}): "
                "pass --target_modules of one dtype."
            )
        self.vector = FlatValues(num_entries, dtypes.pop())
        if vector_name is not None:
            model.add_module(vector_name, self.vector)
        self._hook = model.register_forward_pre_hook(self.renew_anchor)
        self._frozen = _frozen_linears(model)
        for module in self._frozen:
            module.forward = partial(_frozen_forward, module)
        for layer in self.layers:
            layer.attach()

    def __getitem__(self, index: Any) -> Any:
        return self.layers[index]

    def __len__(self) -> int:
        return len(self.layers)

    def renew_anchor(self, *_: Any) -> None:
        """Give the layers the anchor of a new forward pass; the model's own call does it too."""
        anchor = self.vector()
        for layer in self.layers:
            layer.anchor = anchor

    @contextmanager
    def sinks(self, sinks: Sequence[Sink]) -> Iterator[None]:
        """Give each layer its sink for the length of the block."""
        for layer, sink in zip(self.layers, sinks, strict=True):
            layer.sink = sink
        try:
            yield
        finally:
            for layer in self.layers:
                layer.sink = None

    def detach(self) -> None:
        """Give the model its own forward back and take the flat vector away."""
        self._hook.remove()
        for layer in self.layers:
            layer.detach()
        for module in self._frozen:
            vars(module).pop("forward", None)
        if self.vector_name is not None:
            delattr(self.model, self.vector_name)
