"""Trained entries at work: which slice of the flat vector is whose, and writing them back.

``values`` [K] is the parameters' trained entries one after another, each parameter's in the order
of their flat indices:

    values = cat(weight_1.flatten()[flat_index_1], weight_2.flatten()[flat_index_2], ...)

The selected entries of the target layers are one such vector; a task head, which is trained whole,
is another.

Every rank holds all K indices (4 bytes each), since each computes the gradient of all of them over
its own tokens; it writes those that lie in its own part of the weights (8 bytes more for each, but
none where that part is trained as a whole). Layers that keep a part of their input only have
another 4 for each of theirs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from gem_ds.distributed.engine import Engine
from gem_ds.distributed.weights import numel, within
from gem_ds.sddmm import Pattern, add_product, add_sampled_product, choose_kernel
from gem_ds.select.shards import index_dtype
from gem_ds.sparse.flat_values import FlatValues
from gem_ds.sparse.kinds import ExpertsLayer
from gem_ds.sparse.layers import NoGradient, Sink, TargetLayer
from gem_ds.sparse.target_layers import TargetLayers
from gem_ds.sparse.used_inputs import among, used_inputs


@dataclass(frozen=True)
class SampledSink:
    """Adds the gradient at one layer's selected entries to its slice of the vector's buffer."""

    vector: FlatValues
    start: int  # of this layer's slice
    pattern: Pattern
    kernel: str = "auto"
    inputs: Tensor | None = None  # int64, those of the layer that the pattern is of, if not all

    def __call__(self, a: Tensor, b: Tensor, ends: Tensor | None = None) -> None:
        """Add the gradient of one backward."""
        out = self.vector.gradient(self.start, self.pattern.num_entries, a.device)
        add_sampled_product(out, a, b, self.pattern, self.kernel, ends=ends)


@dataclass(frozen=True)
class WholeSink:
    """Adds the whole gradient of a linear layer, and of its bias, to the vector's buffer."""

    layer: TargetLayer
    vector: FlatValues
    start: int  # of the weight's slice
    bias_start: int | None

    def __call__(self, dy: Tensor, x: Tensor) -> None:
        """Add the gradient of one backward."""
        out = self.vector.gradient(self.start, self.layer.numel, dy.device)
        add_product(out.view(self.layer.shape), dy, x)
        if self.bias_start is not None:
            bias = self.vector.gradient(self.bias_start, dy.shape[1], dy.device)
            bias += dy.sum(dim=0, dtype=torch.float32)


class TrainedEntries(ABC):
    """Entries of some parameters that are trained as one flat vector, that of ``layers``.

    ``flat_indices`` are per parameter all trained flat indices, int [k_l], ascending; they are kept
    on the engine's device, in the smallest dtype that fits.
    """

    def __init__(
        self,
        engine: Engine,
        layers: TargetLayers,
        parameters: Mapping[str, nn.Parameter],
        flat_indices: Sequence[Tensor],
    ) -> None:
        self.engine = engine
        self.layers = layers
        self.vector = layers.vector
        self.parameters = dict(parameters)
        self.names = list(parameters)
        self.flat_indices = [
            index.to(engine.device, index_dtype(numel(parameter)))
            for parameter, index in zip(parameters.values(), flat_indices, strict=True)
        ]
        # Where each parameter's slice of the flat vector begins, and K.
        bounds = list(accumulate((i.numel() for i in flat_indices), initial=0))
        *self.starts, self.num_entries = bounds
        assert self.num_entries == self.vector.num_entries, "the vector was made for another K"
        self._entries = [
            engine.weights.entries(parameter, index)
            for parameter, index in zip(parameters.values(), self.flat_indices, strict=True)
        ]
        # Of each parameter: from where to where its matrices' entries lie, and their rate's factor.
        pairs = zip(self.names, pairwise(bounds), strict=True)
        self._pieces = {name: [(*slice_of, 1.0)] for name, slice_of in pairs}

    @abstractmethod
    def sinks(self) -> Sequence[Sink]:
        """Per layer, what collects the gradient of its entries."""

    def training(self, drawn: Sequence[bool] | None = None) -> AbstractContextManager[None]:
        """While the block lasts, backward passes collect the entries' gradient.

        Only that of the layers that are drawn, if it is said which are.
        """
        sinks = self.sinks()
        if drawn is not None:
            none, pairs = NoGradient(self.vector), zip(sinks, drawn, strict=True)
            sinks = [sink if is_drawn else none for sink, is_drawn in pairs]
        return self.layers.sinks(sinks)

    def split(self, numbers: Tensor) -> dict[str, Tensor]:
        """Cut a flat vector [K] into the parameters' slices, by name."""
        sizes = [index.numel() for index in self.flat_indices]
        return dict(zip(self.names, numbers.split(sizes), strict=True))

    def read(self) -> Tensor:
        """The parameters' values at the entries: [K] in the model's dtype, on every rank."""
        entries = zip(self.parameters.values(), self.flat_indices, strict=True)
        return torch.cat(self.engine.weights.read_entries(list(entries)))

    def write_back(self) -> None:
        """Bring the parameters up to date with ``values``; call it after every applied step."""
        self.write(self.values())

    def write(self, values: Tensor) -> None:
        """Set the entries in the parameters to ``values`` [K] in the model's dtype."""
        self.engine.weights.write_entries(self._entries, values)

    def scale_rates(self, factors: Mapping[str, Sequence[float]]) -> None:
        """Multiply the learning rate of each matrix' entries by a number, by parameter."""
        self._pieces = {}
        for (name, parameter), start, index in zip(
            self.parameters.items(), self.starts, self.flat_indices, strict=True
        ):
            size = numel(parameter) // len(factors[name])
            parts = [within(index, (i * size, (i + 1) * size)) for i in range(len(factors[name]))]
            self._pieces[name] = [
                (start + part.start, start + part.stop, factor)
                for part, factor in zip(parts, factors[name], strict=True)
            ]
        self.update_layers([None] * len(self.names))

    def update_layers(self, numbers: Sequence[int | None], drawn: Sequence[bool] = ()) -> None:
        """Let updates change the entries of the layers that are drawn (default: all).

        ``numbers`` are per parameter that of its own next update; None: that of the vector's.
        """
        pieces = [
            (*piece, number)
            for name, number, is_drawn in zip(
                self.names, numbers, drawn or [True] * len(numbers), strict=True
            )
            if is_drawn
            for piece in self._pieces[name]
        ]
        self.engine.update_pieces(pieces, self.vector)

    def values(self) -> Tensor:
        """The flat vector [K] in the model's dtype, whole, on every rank."""
        return self.engine.gather_values(self.vector)

    def start_from_weights(self) -> Tensor:
        """Set the masters to the entries as they are, with fresh moments; returns ``read()``."""
        values = self.read()
        self.start_from(values)
        return values

    def start_from(self, values: Tensor) -> None:
        """Set the masters to ``values`` [K], with fresh moments; the weights are as they were."""
        zeros = values.new_zeros(1).expand(self.num_entries)
        state = {"master": values, "exp_avg": zeros, "exp_avg_sq": zeros}
        self.engine.set_state(state, num_updates=0, vector=self.vector)


class SelectedEntries(TrainedEntries):
    """The selected entries of the target layers; as kernel, auto chooses one for each layer."""

    def __init__(
        self,
        engine: Engine,
        layers: TargetLayers,
        flat_indices: Sequence[Tensor],
        kernel: str = "auto",
    ) -> None:
        weights = {layer.name: layer.weight for layer in layers}
        super().__init__(engine, layers, weights, flat_indices)
        self.kernel = kernel
        self._inputs = used_inputs(layers, self.flat_indices)
        self._patterns = [
            Pattern.of(*among(inputs, layer, index))
            for inputs, layer, index in zip(self._inputs, layers, self.flat_indices, strict=True)
        ]

    def sinks(self) -> list[SampledSink]:
        """Per layer, what collects the gradient of its entries."""
        return [
            SampledSink(self.vector, start, pattern, self.kernel, inputs)
            for start, pattern, inputs in zip(
                self.starts, self._patterns, self._inputs, strict=True
            )
        ]

    def kernels(self) -> list[str]:
        """Per layer that has entries, the kernel that computes its sampled gradient."""
        device, dtype = self.engine.device.type, self.engine.dtype

        def kernel_of(layer: TargetLayer, pattern: Pattern) -> str:
            if self.kernel != "auto":
                return self.kernel
            if isinstance(layer, ExpertsLayer):
                return "grouped"
            return choose_kernel(device, dtype, pattern.shape, pattern.num_entries)

        pairs = zip(self.layers, self._patterns, strict=True)
        return [kernel_of(*pair) for pair in pairs if pair[1].num_entries]


class HeadEntries(TrainedEntries):
    """All entries of a task head: the weights and biases of some linear layers."""

    def __init__(self, engine: Engine, layers: TargetLayers) -> None:
        parameters = {}
        for layer in layers:
            parameters[layer.name] = layer.weight
            if layer.module.bias is not None:
                parameters[_bias_name(layer.name)] = layer.module.get_parameter("bias")
        indices = [torch.arange(numel(parameter)) for parameter in parameters.values()]
        super().__init__(engine, layers, parameters, indices)

    def sinks(self) -> list[WholeSink]:
        """Per layer, what collects the gradient of its weight and bias."""
        starts = dict(zip(self.names, self.starts, strict=True))
        return [
            WholeSink(layer, self.vector, starts[layer.name], starts.get(_bias_name(layer.name)))
            for layer in self.layers
        ]


def _bias_name(weight_name: str) -> str:
    return f"{weight_name.removesuffix('weight')}bias"
