"""Target layers whose weight is frozen for autograd and trained entry by entry.

Equivalent code first. For a target layer with frozen weight ``W`` [out, in] and inputs ``x``:

    y = x @ W.T + b            forward, as before
    dx = dy @ W                backward, as before
    sink(dy, x)                backward, instead of ``W.grad = dy.T @ x``

A *sink* is what a phase wants of the weight gradient: :class:`sparse.gradients.StatisticsSink`
forms it whole, reduces it and drops it; :class:`GradientSink` adds its selected entries to a flat
buffer.

The trained entries of all layers are one flat parameter, ``Gate.values`` [K]; a task head that is
trained whole is a second one, of all its entries. The gradient of such a parameter has to reach
autograd after the last sink has run, and exactly once. That order comes from the graph: the
gate's output, a scalar *anchor*, is an input of every target layer, so autograd runs the gate's
backward when every target layer's backward is done, and the gate returns the whole buffer as the
gradient of ``values``. The anchor also makes the first target layer run its backward although
nothing below it is trained, and nothing below it then computes gradients at all.

Does not work inside reentrant checkpointing, which runs a backward of its own for each block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from gem_ds.sparse.sddmm import Pattern, add_product, add_sampled_product

Sink = Callable[[Tensor, Tensor], None]
"""Takes (a [tokens, rows], b [tokens, columns]), where ``a^T b`` is the weight's gradient: (dy, x),
or (x, dy) for transformers' Conv1D, which stores its weight as [in, out]."""


def drop(dy: Tensor, x: Tensor) -> None:
    """The sink of layers whose gradient nobody wants: a head's, while others are calibrated."""


class _AnchoredLinear(torch.autograd.Function):
    """``y = x W^T + b`` that tells a sink (dy, x) and gives the weight no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        layer: TargetLayer,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return layer.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        x, weight = ctx.saved_tensors
        layer: TargetLayer = ctx.layer
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ (weight.t() if layer.is_transposed else weight)
        a, b = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        assert layer.sink is not None, f"{layer.name}: its sink left before the backward"
        layer.sink(*((b, a) if layer.is_transposed else (a, b)))
        return dx, None, None, None, None


class _Anchor(torch.autograd.Function):
    """A scalar that depends on ``values``; its backward returns the gate's buffer."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, gate: Gate) -> Tensor:
        ctx.set_materialize_grads(False)  # the target layers send nothing back through the anchor
        ctx.gate, ctx.dtype = gate, values.dtype
        return values.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor, None]:
        return ctx.gate.take_gradient().to(ctx.dtype), None


class Gate(nn.Module):
    """Holds the trained entries of the whole model and hands their gradient to autograd.

    Attributes:
        values: [K] in the model's dtype, all layers' entries one after another.
        open: while False, a forward pass gives an anchor that leads nowhere, and what the sinks
            collect stays in the buffer; while True the backward delivers the buffer. A global batch
            of several micro-batches opens the gate in the last one, so its gradient accumulates in
            fp32 and crosses the network once.
    """

    def __init__(self, num_entries: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(num_entries, dtype=dtype))
        self.num_entries = num_entries
        self.open = False
        self.buffer: Tensor | None = None  # fp32 [K], made when the first sink asks for its slice

    def forward(self) -> Tensor:
        """The anchor of one forward pass: a scalar that requires grad."""
        if self.open:
            return _Anchor.apply(self.values, self)
        return torch.zeros(
            (), dtype=self.values.dtype, device=self.values.device, requires_grad=True
        )

    def gradient(self, start: int, length: int, device: torch.device) -> Tensor:
        """The fp32 slice [length] from ``start`` of what is collected on ``device``, to add to."""
        if self.buffer is None:
            self.buffer = torch.zeros(self.num_entries, dtype=torch.float32, device=device)
        return self.buffer[start : start + length]

    def take_gradient(self) -> Tensor:
        """The collected fp32 gradient [K]; the next call starts from zero."""
        assert self.buffer is not None, "no target layer ran its backward"
        gradient, self.buffer = self.buffer, None
        return gradient


@dataclass(frozen=True)
class DenseGradientSink:
    """Adds the whole gradient of one layer's weight, and of its bias, to the gate's buffer."""

    gate: Gate
    start: int  # of the weight's slice in the flat parameter
    bias_start: int | None

    def __call__(self, dy: Tensor, x: Tensor) -> None:
        """Add the gradient of one backward."""
        rows, columns = dy.shape[1], x.shape[1]
        weight = self.gate.gradient(self.start, rows * columns, dy.device)
        add_product(weight.view(rows, columns), dy, x)
        if self.bias_start is not None:
            bias = self.gate.gradient(self.bias_start, rows, dy.device)
            bias += dy.sum(dim=0, dtype=torch.float32)


@dataclass(frozen=True)
class GradientSink:
    """Adds the gradient at one layer's selected entries to its slice of the gate's buffer."""

    gate: Gate
    start: int  # of this layer's slice in the flat parameter
    pattern: Pattern
    kernel: str = "auto"

    def __call__(self, dy: Tensor, x: Tensor) -> None:
        """Add the gradient of one backward."""
        gradient = self.gate.gradient(self.start, self.pattern.num_entries, dy.device)
        add_sampled_product(gradient, dy, x, self.pattern, self.kernel)


class TargetLayer:
    """One linear layer of the model whose weight GEM selects from.

    Attributes:
        name: the weight's name in ``model.named_parameters()``.
        weight: the parameter; its data may be partitioned by ZeRO-3.
        shape: of the whole weight, [rows, columns] as stored.
        is_transposed: the weight is stored as [in, out] (Conv1D).
        sink: takes what the layer's backward knows; see :data:`Sink`.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.weight = module.get_parameter("weight")
        self.shape: tuple[int, int] = tuple(getattr(self.weight, "ds_shape", self.weight.shape))
        self.is_transposed = isinstance(module, Conv1D)
        self.sink: Sink | None = None

    @property
    def numel(self) -> int:
        """Entries of the whole weight."""
        return self.shape[0] * self.shape[1]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's own function of x, weight and bias."""
        return F.linear(x, weight.t() if self.is_transposed else weight, bias)


class TargetLayers(Sequence[TargetLayer]):
    """Linear layers of a model, in ``named_parameters`` order, behind one gate.

    Making it installs the gate (as a submodule of the model) and swaps the layers' forward;
    :meth:`detach` undoes both. Every parameter of the model but those of gates is frozen.

    Args:
        model: that the layers belong to.
        targets: the layers, by the names of their weights.
        num_entries: entries of the gate's flat parameter.
        gate_name: of the submodule.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: dict[str, nn.Module],
        num_entries: int,
        gate_name: str = "gem_gate",
    ) -> None:
        self.model = model
        self.gate_name = gate_name
        self.layers = [TargetLayer(name, module) for name, module in targets.items()]
        for module in model.modules():
            if not isinstance(module, Gate):
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(False)
        dtypes = {layer.weight.dtype for layer in self.layers}
        if len(dtypes) > 1:
            raise ValueError(
                f"The target layers have several dtypes ({', '.join(sorted(map(str, dtypes)))}): "
                "pass --target_modules of one dtype."
            )
        self.gate = Gate(num_entries, dtypes.pop())
        model.add_module(gate_name, self.gate)
        self._anchor: Tensor | None = None
        self._hook = model.register_forward_pre_hook(self._renew_anchor)
        for layer in self.layers:
            layer.module.forward = self._forward_of(layer)  # type: ignore[method-assign]

    def __getitem__(self, index: Any) -> Any:
        return self.layers[index]

    def __len__(self) -> int:
        return len(self.layers)

    def modules(self) -> dict[str, nn.Module]:
        """The layers' modules, by the names of their weights."""
        return {layer.name: layer.module for layer in self.layers}

    def _renew_anchor(self, *_: Any) -> None:
        self._anchor = self.gate()

    def _forward_of(self, layer: TargetLayer) -> Callable[[Tensor], Tensor]:
        module: Any = layer.module

        def forward(x: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return layer.linear(x, module.weight, module.bias)
            return _AnchoredLinear.apply(x, module.weight, module.bias, self._anchor, layer)

        return forward

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
        """Give the model its own forward back and take the gate away."""
        self._hook.remove()
        for layer in self.layers:
            del layer.module.forward
        delattr(self.model, self.gate_name)
