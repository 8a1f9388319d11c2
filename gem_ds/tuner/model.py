"""The tuner: which layers of a model it takes, from which mask, and what a saved adapter holds.

    adapter_model.safetensors    <module>.gem_entries.values      fp32 [k]
                                 <module>.gem_entries.indices     int32 or int64 [k]
    adapter_config.json          the configuration, and digests of the base's values there

That is 8 bytes an entry. Loading such a folder needs ``import gem_ds.tuner`` before.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import (
    get_quantization_kwargs,
    register_peft_method,
    resolve_quantization_backend,
)
from torch import Tensor, nn

from gem_ds.distributed.weights import shape_of
from gem_ds.files.mask import WeightInfo
from gem_ds.sparse.experts import projections_of
from gem_ds.sparse.layers import kind_of
from gem_ds.tuner.config import GEM, GemConfig
from gem_ds.tuner.layer import GemLayer

_WRAPPED = "base_model.model."  # what a PeftModel puts before the names of modules


class GemModel(BaseTuner):
    """A model some of whose linear layers are :class:`GemLayer`."""

    prefix = "gem_"
    tuner_layer_cls = GemLayer
    target_module_mapping = {}  # noqa: RUF012 as peft has it

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        if peft_config.target_modules is None:
            if peft_config.mask is None:
                raise ValueError(
                    "GemConfig has no entries to train: pass mask=, a Mask or the path of a "
                    "mask.safetensors."
                )
            names = (n for n, index in peft_config.mask.indices.items() if index.numel())
            peft_config.target_modules = {name.removesuffix(".weight") for name in names}
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Refuse a model whose weights are not those of the mask, before any of them is touched.

        A mask may be of the model before it was quantized; then the shapes must do.
        """
        for layer in model.modules():
            if isinstance(layer, GemLayer) and layer.merged:
                raise ValueError(
                    f"The adapter {layer.merged_adapters[0]} is merged: unmerge it before another "
                    "is added."
                )
        now, before = _quantization(model), peft_config.base_quantization
        if peft_config.base_weights and now != before:
            raise ValueError(
                f"The adapter was trained on a base quantized by {before or 'nothing'}, and this "
                f"one is by {now or 'nothing'}: load the base as it was."
            )
        peft_config.base_quantization = now
        if (mask := peft_config.mask) is None:
            return
        if experts := [name for name in mask.weights if not name.endswith(".weight")]:
            raise ValueError(
                f"The mask selects entries of {experts[0]}, a parameter of no linear layer, as an "
                "adapter needs: train it by launch/train.py, or leave experts out of its "
                "--target_modules."
            )
        modules = {f"{name}.weight": module for name, module in model.named_modules()}
        shapes = {name: shape for name, module in modules.items() if (shape := _shape(module))}
        mask.check_model(shapes, type(model).__name__)
        owners: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            other = owners.setdefault(id(parameter), name)
            for tied in {name, other} & mask.weights.keys():
                if other != name:
                    raise ValueError(
                        f"The weight {tied} is tied, {other} and {name} are one: leave it out of "
                        "the mask's --target_modules."
                    )
        for name, info in mask.weights.items() if now is None else ():
            self._layer(modules[name]).check_base(mask.indices[name], info, mask.base_model)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        found = check_target_module_exists(peft_config, key)
        if not found or peft_config.mask is None:
            return found
        indices = peft_config.mask.indices.get(f"{key}.weight")
        return indices is not None and indices.numel() > 0

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if _shape(target) is None:
            raise ValueError(
                f"{current_key} is a {type(target).__name__}, no linear layer: leave it out of "
                "target_modules."
            )
        layer = self._layer(target)
        mask, info, count = peft_config.mask, None, peft_config.num_entries.get(current_key, 0)
        if mask is not None:
            indices = mask.indices[f"{current_key}.weight"]
            count = peft_config.num_entries[current_key] = indices.numel()
        elif (described := peft_config.base_weights.get(current_key)) is not None:
            info = WeightInfo(**described)
        layer.update_layer(adapter_name, count, self._dtype_of_values(layer), info)
        if mask is not None:
            layer.gem_entries[adapter_name].select(indices)
            peft_config.base_weights[current_key] = asdict(layer.weight_info(indices))
        # DDP would send the indices round with every forward pass.
        name = f"{current_key}.gem_entries.{adapter_name}.indices"
        left_out = vars(self.model).setdefault("_ddp_params_and_buffers_to_ignore", [])
        left_out += [name, _WRAPPED + name]
        if adapter_name not in self.active_adapters:
            layer.gem_entries[adapter_name].requires_grad_(False)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _layer(self, module: nn.Module) -> GemLayer:
        """A module as a layer of ours."""
        if isinstance(module, GemLayer):
            return module
        return GemLayer(module, **get_quantization_kwargs(self.model))

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Values are made in the dtype that they keep."""

    @staticmethod
    def _dtype_of_values(layer: GemLayer) -> torch.dtype:
        """fp32; under ZeRO-3, which takes one dtype, that of the weights."""
        weight = layer.get_base_layer().get_parameter("weight")
        return weight.dtype if hasattr(weight, "ds_id") else torch.float32

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As peft's, after a check that the adapter is whole and its base this one."""
        for name, layer in _layers_with(model, adapter_name):
            module = name.removeprefix(_WRAPPED)
            keys = (f"{prefix}{module}.gem_entries.indices" for prefix in (_WRAPPED, ""))
            if (key := next((key for key in keys if key in state_dict), None)) is None:
                raise ValueError(f"The adapter has no entries of {module}: it is incomplete.")
            entries = layer.gem_entries[adapter_name]
            if entries.base is not None:
                base_model = config.base_model_name_or_path
                layer.check_base(state_dict[key], entries.base, base_model)
                entries.base = None
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _layers_with(model: nn.Module, adapter_name: str) -> list[tuple[str, GemLayer]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, GemLayer) and adapter_name in module.gem_entries
    ]


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """The whole shape of a module's weight, if it can be a target."""
    if isinstance(module, GemLayer):
        return module.shape
    if kind_of(module) is not None and not projections_of(module):
        rows, columns = shape_of(module.get_parameter("weight"))
        return rows, columns
    if resolve_quantization_backend(module) is not None:
        return module.out_features, module.in_features  # type: ignore[return-value]
    return None


def _quantization(model: nn.Module) -> dict[str, Any] | None:
    """What decides the bits of a quantized base; None where it is none."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return None
    given = config if isinstance(config, dict) else config.to_dict()
    names = ("quant_method", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "load_in_8bit")
    return {n: str(getattr(given[n], "value", given[n])) for n in names if n in given}


register_peft_method(name=GEM.lower(), config_cls=GemConfig, model_cls=GemModel)
