"""The target layers of a model together; its other layers meanwhile keep less.

:mod:`gem_ds.sparse.frozen` says what.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from gem_ds.sparse.flat_values import FlatValues
from gem_ds.sparse.frozen import give_back, keep_less
from gem_ds.sparse.kinds import kind_of
from gem_ds.sparse.layers import Sink, TargetLayer


class TargetLayers(Sequence[TargetLayer]):
    """The target layers of a model, in ``named_parameters`` order, and the flat vector they train.

    ``targets`` are the modules by the names of their weights. Making it adds the vector to the
    model, as a submodule ``vector_name`` (None keeps a vector that is never stepped out of it), and
    swaps the forward of linear layers and norms; :meth:`detach` undoes both. Every parameter of the
    model but those of flat vectors is frozen.
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
        self._frozen = keep_less(model)
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
        give_back(self._frozen)
        if self.vector_name is not None:
            delattr(self.model, self.vector_name)
