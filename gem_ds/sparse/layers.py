"""Kinds of target layer: each tells a sink what its frozen weight's gradient is made of.

Equivalent code first. For a linear layer with frozen weight ``W`` [out, in] and inputs ``x``:

    y = x @ W.T + b            forward, as before
    dx = dy @ W                backward, as before
    sink(dy, x)                backward, instead of ``W.grad = dy.T @ x``

A *sink* is what a phase makes of the factors of the weight's gradient. Calibration multiplies them,
reduces the product and drops it (:mod:`gem_ds.sparse.gradients`); training adds it at the selected
entries to a slice of the flat vector's buffer (:mod:`gem_ds.sparse.entries`). A new kind of layer
is one class here, and a line of :data:`KINDS`. Its weight is one parameter, read and written by
flat index whatever its kind (:class:`gem_ds.distributed.weights.Weights`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from gem_ds.distributed.weights import numel, shape_of
from gem_ds.sparse.experts import ExpertsForward, project, projections_of
from gem_ds.sparse.flat_values import FlatValues
from gem_ds.sparse.quantized import computed_in, dequantized, is_quantized

Sink = Callable[..., None]
"""Takes a, [tokens, rows], and b, [tokens, columns], whose ``a^T b`` is the weight's gradient.

Of experts a third tensor says where the tokens of each end (:mod:`gem_ds.sparse.sddmm.grouped`).
A sink that has ``inputs``, int64 [c], takes these features of a layer's input only."""


class NoGradient:
    """The sink of layers whose gradient nobody wants now; they keep nothing of their input.

    Of a ``vector`` that is delivered all the same, the gradient of these layers is 0, and is there.
    """

    inputs: tuple[int, ...] = ()

    def __init__(self, vector: FlatValues | None = None) -> None:
        self.vector = vector

    def __call__(self, *factors: Tensor) -> None:
        """Take note of one backward."""
        if self.vector is not None:
            self.vector.gradient(0, 0, factors[0].device)


_numbered: WeakValueDictionary[int, TargetLayer] = WeakValueDictionary()
_numbers = itertools.count()


@torch.library.custom_op(
    "gem_ds::tell_sink", mutates_args=(), schema="(Tensor a, Tensor b, Tensor number) -> Tensor"
)
def _tell_sink(a: Tensor, b: Tensor, number: Tensor) -> Tensor:
    """Give a layer's sink its factors, in one operation that ``torch.compile`` does not look into.

    The layer's number is a tensor, so that blocks share what is compiled. The result is the
    gradient of the anchor, a zero: no compiler leaves the call out.
    """
    _numbered[int(number)].give(a, b)
    return a.new_zeros(())


@_tell_sink.register_fake
def _(a: Tensor, b: Tensor, number: Tensor) -> Tensor:
    return a.new_empty(())


class _AnchoredLinear(torch.autograd.Function):
    """The layer's own function, which tells a sink its factors and gives the weight no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        anchor: Tensor,
        layer: TargetLayer,
    ) -> Tensor:
        ctx.save_for_backward(layer.kept(x), weight)
        ctx.layer = layer
        return F.linear(x, layer.matrix(weight), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        layer: TargetLayer = ctx.layer
        # Under autocast the product was one in dy's dtype.
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ layer.matrix(weight).to(dy.dtype)).to(x.dtype)
        tokens = x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(dy.dtype)  # perhaps of no features
        factors = layer.factors(dy.reshape(-1, dy.shape[-1]), tokens)
        if torch.compiler.is_compiling():
            return dx, None, None, _tell_sink(*factors, layer.number), None
        layer.give(*factors)
        return dx, None, None, None, None


class TargetLayer:
    """A linear layer (``nn.Linear``) whose weight is a target; ``name`` is the weight's."""

    input_dim: int | None = 1  # of the stored weight; None where tokens go to several matrices

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name  # of the weight, in ``model.named_parameters()``
        self.module: Any = module
        self.parameter_name = name.rpartition(".")[2]
        # Its data may be partitioned by ZeRO-3.
        self.weight = module.get_parameter(self.parameter_name)
        self.shape = shape_of(self.weight)  # of the whole weight, as stored
        self.dtype = self.weight.dtype
        self.numel = numel(self.weight)
        self.num_inputs = 0 if self.input_dim is None else self.shape[self.input_dim]
        self.sink: Sink | None = None
        self.anchor: Tensor | None = None  # of the present forward pass
        number = next(_numbers)
        self.number = torch.tensor(number, device="cpu")
        _numbered[number] = self

    def kept(self, x: Tensor) -> Tensor:
        """What the sink takes of an input [..., features], for the backward."""
        inputs: Any = getattr(self.sink, "inputs", None)
        if inputs is None:
            return x
        return x.index_select(-1, inputs) if len(inputs) else x.new_empty(*x.shape[:-1], 0)

    def give(self, *factors: Tensor) -> None:
        """Tell the sink the factors of one backward."""
        assert self.sink is not None, f"{self.name}: its sink left before the backward"
        self.sink(*factors)

    def attach(self) -> None:
        """Swap the module's forward."""
        self.module.forward = self.forward

    def detach(self) -> None:
        """Give the module its own forward back."""
        vars(self.module).pop("forward", None)  # of two targets of one module the first one does

    def forward(self, x: Tensor) -> Tensor:
        """What the module computes while it is a target: the same as ever."""
        weight, bias = self.module.weight, self.module.bias
        if not torch.is_grad_enabled():
            return F.linear(x, self.matrix(weight), bias)
        y: Tensor = _AnchoredLinear.apply(x, weight, bias, self.anchor, self)
        return y

    def numbers(self) -> Tensor:
        """The weight's entries, flat, where the weight is whole in this process."""
        return self.weight.detach().reshape(-1)

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        """The weight as [out, in]."""
        return weight

    @staticmethod
    def factors(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """What a sink takes, of dy and x, [tokens, features] each."""
        return dy, x


class Conv1DLayer(TargetLayer):
    """transformers' Conv1D, a linear layer that stores its weight as [in, out]."""

    input_dim = 0

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        """The weight as [out, in]."""
        return weight.t()

    @staticmethod
    def factors(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient is ``x^T dy``."""
        return x, dy


class ExpertsLayer(TargetLayer):
    """A projection of all experts of a block, [experts, rows, columns]; the module may have two."""

    input_dim = None

    def attach(self) -> None:
        """Let the module compute by groups of tokens, this projection as a target."""
        ExpertsForward.of(self.module).products[self.parameter_name] = self.product

    def product(self, x: Tensor, ends: Tensor) -> Tensor:
        """That of tokens sorted by expert, [tokens, in], which end at ``ends``, [experts]."""
        weight = getattr(self.module, self.parameter_name)
        return project(x, weight, ends, self.module.is_transposed, self)


class TransposedExpertsLayer(ExpertsLayer):
    """The same where a matrix is stored as [in, out]: of gpt-oss."""

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        """The weight as [experts, out, in]."""
        return weight.transpose(1, 2)

    @staticmethod
    def factors(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of an expert's matrix is ``x^T dy``."""
        return x, dy


class QuantizedLayer(TargetLayer):
    """bitsandbytes' linear layers of 4 and 8 bits: the product with the dequantized weight."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        self.dtype = dequantized(module).dtype

    def forward(self, x: Tensor) -> Tensor:
        """What the module computes, in the dtype in which it does."""
        return computed_in(self._compute_dtype(), self._product, x, self.module.bias)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not torch.is_grad_enabled():
            return F.linear(x, self.matrix(self.weight), bias)
        y: Tensor = _AnchoredLinear.apply(x, self.weight, bias, self.anchor, self)
        return y

    def _compute_dtype(self) -> torch.dtype:
        return getattr(self.module, "compute_dtype", None) or self.dtype

    def numbers(self) -> Tensor:
        """The dequantized weight's entries, flat."""
        return dequantized(self.module).reshape(-1)

    def matrix(self, weight: Tensor) -> Tensor:  # type: ignore[override]
        """The dequantized weight, [out, in], in the dtype in which the layer computes."""
        return dequantized(self.module).to(self._compute_dtype())


#: The forward of a module -> its kind. A subclass that computes something else is none.
KINDS: dict[Callable[..., Any], type[TargetLayer]] = {
    nn.Linear.forward: TargetLayer,
    Conv1D.forward: Conv1DLayer,
}


def kind_of(module: nn.Module) -> type[TargetLayer] | None:
    """What kind of target a module can be, if any."""
    if type(module).__name__ == "FalconLinear":  # the same product as nn.Linear's, written out
        return TargetLayer
    if is_quantized(module):
        return QuantizedLayer
    if projections_of(module):
        return TransposedExpertsLayer if module.is_transposed else ExpertsLayer
    return KINDS.get(type(module).forward)
