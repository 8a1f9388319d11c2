"""A layer of which an adapter's entries are trained: their values are leaves of their own.

A linear layer, or a module of experts with a weight for each of their projections. The values stand
in the weight itself while a product runs (:mod:`gem_ds.tuner.entries`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from gem_ds.sparse.experts import ExpertsForward, projections_of
from gem_ds.sparse.quantized import computed_in
from gem_ds.tuner.entries import BaseWeight, GemEntries


class GemLayer(nn.Module, BaseTunerLayer):
    """A layer, in the place of which it stands, with any number of adapters' entries."""

    adapter_layer_names = ("gem_entries",)

    def __init__(self, base_layer: nn.Module, get_apply_tensor_subclass: Any = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        #: Adapter to GemEntries; of experts to a ModuleDict of them, by projection.
        self.gem_entries: Any = nn.ModuleDict()
        self.quantization_backend = resolve_quantization_backend(
            base_layer, get_apply_tensor_subclass=get_apply_tensor_subclass
        )
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._replaced: dict[str, dict[str, Tensor]] = {}  # of merged adapters, the base's values
        self.weights = {
            name: BaseWeight(base_layer, name, self.quantization_backend)
            for name in projections_of(base_layer) or ["weight"]
        }

    def update_layer(self, adapter_name: str, entries: Mapping[str, GemEntries]) -> None:
        """Add an adapter: entries by the names of the layer's weights, not of all perhaps."""
        self.gem_entries[adapter_name] = entries.get("weight") or nn.ModuleDict(entries)

    def entries_of(self, adapter_name: str) -> dict[str, GemEntries]:
        """An adapter's entries by the names of the layer's weights; none where it has none."""
        if adapter_name not in self.gem_entries:
            return {}
        entries = self.gem_entries[adapter_name]
        return {"weight": entries} if isinstance(entries, GemEntries) else dict(entries.items())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the base layer computes, with the active adapter's values."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.gem_entries]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        if len(active) > 1:
            raise ValueError(
                f"The adapters {' and '.join(active)} give the same weights values of their own: "
                "activate one of them."
            )
        base, forward = self.base_layer, self._forward_with(self.entries_of(active[0]))
        if not _has_hooks(base):
            return forward(x, *args, **kwargs)
        # What gathers or moves the weight hangs on the layer's call, so it is called.
        name = "_old_forward" if hasattr(base, "_hf_hook") else "forward"
        before = vars(base).get(name)
        vars(base)[name] = forward
        try:
            return base(x, *args, **kwargs)  # type: ignore[no-any-return]
        finally:
            if before is None:
                del vars(base)[name]
            else:
                vars(base)[name] = before

    def _forward_with(self, entries: dict[str, GemEntries]) -> Callable[..., Tensor]:
        """The base layer's own forward, but for the products of weights that have entries."""
        base: Any = self.base_layer
        if "weight" not in entries:
            return ExpertsForward(base, entries)
        product = entries["weight"]
        if self.quantization_backend is None:
            return lambda x: product(x, base.bias)
        dtype = getattr(base, "compute_dtype", None)
        return lambda x: computed_in(dtype or x.dtype, product, x, base.bias)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write an adapter's values into the weights; what they replace is kept.

        Raises:
            ValueError: Another is merged, the weight is quantized or, with `safe_merge`, a value is
                not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if not (entries := self.entries_of(name)):
                continue
            if self.merged:
                raise ValueError(
                    f"The adapter {self.merged_adapters[0]} is merged: unmerge it before {name}."
                )
            if self.quantization_backend is not None:
                raise ValueError(
                    "The base is quantized, and its weights cannot hold the values: write them "
                    "into an unquantized one with gem-ds export."
                )
            if safe_merge and not all(own.values.isfinite().all() for own in entries.values()):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                )
            self._replaced[name] = {
                weight: self.weights[weight].values(own.indices) for weight, own in entries.items()
            }
            self._write(name, {weight: own.values for weight, own in entries.items()})
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Give the weights the values back that a merged adapter replaced."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            self._write(name, self._replaced.pop(name))

    def _write(self, adapter_name: str, values: Mapping[str, Tensor]) -> None:
        for weight, entries in self.entries_of(adapter_name).items():
            self.weights[weight].write(entries.indices, values[weight])

    def __repr__(self) -> str:
        return "gem." + super().__repr__()


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    return hasattr(module, "_hf_hook") or any(getattr(module, f"_{kind}_hooks") for kind in kinds)
