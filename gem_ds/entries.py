"""The selected entries at work: which slice of the flat vector is whose, and writing them back.

``values`` [K] is the layers' selected entries one after another, each layer's in the order of their
flat indices:

    values = cat(weight_1.flatten()[flat_index_1], weight_2.flatten()[flat_index_2], ...)

Every rank holds all K indices (4 bytes each), since each computes the gradient of all of them over
its own tokens; it writes those that lie in its own part of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from gem_ds.comm import Comm
from gem_ds.mask import index_dtype
from gem_ds.sparse import GradientSink, TargetLayers
from gem_ds.zero import Engine


class SelectedEntries:
    """The entries that a run trains.

    Args:
        engine: holds the model.
        layers: the target layers.
        flat_indices: per layer all selected flat indices, int [k_l], ascending.

    Attributes:
        flat_indices: the same, on the engine's device, in the smallest dtype that fits.
        starts: per layer where its slice of the flat vector begins.
        total: K.
    """

    def __init__(
        self, engine: Engine, layers: TargetLayers, flat_indices: Sequence[Tensor]
    ) -> None:
        self.engine = engine
        self.layers = layers
        self.flat_indices = [
            index.to(engine.device, index_dtype(layer.numel))
            for layer, index in zip(layers, flat_indices, strict=True)
        ]
        *self.starts, self.total = accumulate((i.numel() for i in flat_indices), initial=0)
        assert self.total == layers.gate.num_selected, "the gate was made for another K"
        self._writable = [
            _part(index, engine.writable_range(layer.weight))
            for layer, index in zip(layers, self.flat_indices, strict=True)
        ]

    @property
    def names(self) -> list[str]:
        """The weights' names."""
        return [layer.name for layer in self.layers]

    def sinks(self) -> list[GradientSink]:
        """Per layer, what collects the gradient of its entries."""
        return [
            GradientSink(self.layers.gate, start, index)
            for start, index in zip(self.starts, self.flat_indices, strict=True)
        ]

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Cut a flat vector [K] into the layers' slices, by weight name."""
        sizes = [index.numel() for index in self.flat_indices]
        return dict(zip(self.names, vector.split(sizes), strict=True))

    def read(self) -> Tensor:
        """The weights' present values at the entries: [K] in the model's dtype, on every rank.

        Each rank contributes the bits of its own range; the others' are zero, so an integer sum
        over the ranks keeps every bit, the sign of zero included.
        """
        engine = self.engine
        values = torch.zeros(self.total, dtype=engine.dtype, device=engine.device)
        for layer, start, index in zip(self.layers, self.starts, self.flat_indices, strict=True):
            bounds = engine.shard_range(layer.weight)
            own = _part(index, bounds)
            shard = engine.read_shard(layer.weight)
            shard_index = (index[own] - bounds[0]).to(shard.device)
            values[start + own.start : start + own.stop] = shard[shard_index]
        bits = values.view(torch.int16 if values.element_size() == 2 else torch.int32)
        summed = engine.comm.all_reduce(bits.to(torch.int32), "sum")
        return summed.to(bits.dtype).view(engine.dtype)

    def write_back(self) -> None:
        """Bring the weights up to date with ``values``; call it after every applied step."""
        values = self.split(self.engine.gather_values())
        for layer, index, own in zip(self.layers, self.flat_indices, self._writable, strict=True):
            self.engine.write_entries(layer.weight, index, values[layer.name], own)

    def start_from_weights(self) -> Tensor:
        """Set the masters to the weights as they are, with fresh moments; returns ``read()``."""
        values = self.read()
        zeros = torch.zeros(self.total, dtype=torch.float32, device=values.device)
        state = {"master": values.float(), "exp_avg": zeros, "exp_avg_sq": zeros}
        self.engine.set_state(state, num_updates=0)
        return values


def _part(index: Tensor, bounds: tuple[int, int]) -> slice:
    """The positions of an ascending ``index`` whose values lie in [start, stop)."""
    low, high = torch.searchsorted(index, torch.tensor(bounds, device=index.device)).tolist()
    return slice(low, high)


def gather_indices(own: Sequence[Tensor], comm: Comm) -> list[Tensor]:
    """Put the ranks' parts of a selection together.

    Args:
        own: per layer this rank's flat indices, int64, ascending; the ranks' ranges ascend.
        comm: the ranks.

    Returns:
        Per layer all selected flat indices, int64, ascending, on every rank.
    """
    counts = torch.zeros(comm.world_size, len(own), dtype=torch.int64, device=own[0].device)
    counts[comm.rank] = torch.tensor([index.numel() for index in own])
    sizes = comm.all_reduce(counts, "sum").tolist()
    gathered = comm.all_gather(torch.cat(list(own)))
    parts = [part.split(size) for part, size in zip(gathered, sizes, strict=True)]
    return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
