"""Target layers: each tells a sink what its frozen weight's gradient is made of.

Equivalent code first. For a linear layer with frozen weight ``W`` [out, in] and inputs ``x``:

    y = x @ W.T + b            forward, as before
    dx = dy @ W                backward, as before
    sink(dy, x)                backward, instead of ``W.grad = dy.T @ x``

A *sink* is what a phase makes of the factors of the weight's gradient. Calibration multiplies them,
reduces the product and drops it (:mod:`gem_ds.calibration.gradients`); training adds it at the
selected entries to a slice of the flat vector's buffer (:mod:`gem_ds.sparse.entries`). Layers that
are no plain linear ones are :mod:`gem_ds.sparse.kinds`' subject.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gem_ds.distributed.weights import numel, shape_of
from gem_ds.sparse.flat_values import FlatValues
from gem_ds.sparse.norms import Recompute, origin_of

Sink = Callable[..., None]
"""Takes a, [tokens, rows], and b, [tokens, columns], whose ``a^T b`` is the weight's gradient.

Of experts a third tensor says where the tokens of each end (:mod:`gem_ds.sddmm.grouped`).
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


class AnchoredLinear(torch.autograd.Function):
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
        """The product."""
        ctx.recompute, saved = layer.saved_for(x)
        ctx.save_for_backward(weight, *saved)
        ctx.layer, ctx.dtype = layer, x.dtype
        return F.linear(x, layer.matrix(weight), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
        """The input's gradient alone."""
        weight, *saved = ctx.saved_tensors
        layer: TargetLayer = ctx.layer
        # Under autocast the product was one in dy's dtype.
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ layer.matrix(weight).to(dy.dtype)).to(ctx.dtype)
        x = saved[0] if ctx.recompute is None else ctx.recompute(*saved)
        tokens = x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(dy.dtype)  # perhaps of no features
        factors = layer.factors(dy.reshape(-1, dy.shape[-1]), tokens)
        if torch.compiler.is_compiling():
            return dx, None, None, _tell_sink(*factors, layer.number), None
        layer.give(*factors)
        return dx, None, None, None, None


class TargetLayer:
    """A linear layer (``nn.Linear``) whose weight is a target; ``name`` is the weight's."""

    input_dim: int | None = 1  # of the stored weight; None where tokens go to several matrices
    is_transposed = False  # whether a matrix is stored as [in, out]

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

    def saved_for(self, x: Tensor) -> tuple[Recompute | None, tuple[Tensor | None, ...]]:
        """What the backward has the input x from, and how; None: it is what the sink takes of x."""
        origin = origin_of(x)
        if origin is None or getattr(self.sink, "inputs", None) is not None:
            return None, (self.kept(x),)
        return origin.recompute, origin.kept

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
        y: Tensor = AnchoredLinear.apply(x, weight, bias, self.anchor, self)
        return y

    def numbers(self) -> Tensor:
        """The weight's entries, flat, where the weight is whole in this process."""
        return self.weight.detach().reshape(-1)

    @classmethod
    def matrix(cls, weight: Tensor) -> Tensor:
        """The weight as [out, in], or of experts [experts, out, in]."""
        return weight.mT if cls.is_transposed else weight

    @classmethod
    def factors(cls, dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """What a sink takes, of dy and x, [tokens, features] each."""
        return (x, dy) if cls.is_transposed else (dy, x)
