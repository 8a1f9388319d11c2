"""The tuner: which layers of a model it takes, from which mask, and what a saved adapter holds.

    adapter_model.safetensors    <module>.gem_entries.values      fp32 [k]
                                 <module>.gem_entries.indices     int32 or int64 [k]
    adapter_config.json          the configuration, and digests of the base's values there

That is 8 bytes an entry. Of experts it is ``<module>.gem_entries.<projection>.values``.
Loading such a folder needs ``import gem_ds.tuner`` before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import get_quantization_kwargs, register_peft_method
from torch import Tensor, nn
from transformers import PreTrainedModel

from gem_ds.files.fingerprint import differing, fingerprints, read_whole
from gem_ds.files.mask import Mask, WeightInfo
from gem_ds.models.encoders import head_names
from gem_ds.sparse.quantized import quantization_of
from gem_ds.tuner.choice import all_linear, has_chosen, is_chosen, shapes_of
from gem_ds.tuner.config import GEM, WRAPPED, GemConfig, key_of, target_of
from gem_ds.tuner.entries import GemEntries, whole
from gem_ds.tuner.layer import GemLayer


class GemModel(BaseTuner):
    """A model some of whose linear layers and modules of experts are :class:`GemLayer`."""

    prefix = "gem_"
    tuner_layer_cls = GemLayer
    target_module_mapping = {}  # noqa: RUF012 as peft has it

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        mask = peft_config.mask
        if mask is None and not peft_config.base_weights:
            raise ValueError(
                "GemConfig has no entries to train: pass mask=, a Mask or the path of a "
                "mask.safetensors."
            )
        if peft_config.target_modules is None:
            peft_config.target_modules = {
                target_of(name) for name, index in mask.indices.items() if index.numel()
            }
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Refuse a model whose weights are not those of the mask, before any of them is touched.

        A new mask may be of the model before it was quantized; then the shapes must do.
        """
        for layer in model.modules():
            if isinstance(layer, GemLayer) and layer.merged:
                raise ValueError(
                    f"The adapter {layer.merged_adapters[0]} is merged: unmerge it before another "
                    "is added."
                )
        if str(peft_config.target_modules).lower() == "all-linear":  # peft's has no experts
            peft_config.target_modules = all_linear(model)
        mask, now, is_saved = peft_config.mask, quantization_of(model), peft_config.base_weights
        made_on = peft_config.base_quantization
        if is_saved and now != made_on:
            raise ValueError(
                f"The adapter was trained on a base quantized by {made_on or 'nothing'}, and this "
                f"one is by {now or 'nothing'}: load the base as it was."
            )
        if not is_saved:
            made_on = mask.settings.get("base_quantization") if mask is not None else None
        if mask is not None:
            self._check_mask(mask, model, reads_weights=now == made_on)
        found = _fingerprints(model, peft_config.modules_to_save or ())
        recorded = peft_config.fingerprints if mask is None else mask.fingerprints
        if now == made_on and (names := differing(recorded, found)):
            base_model = peft_config.base_model_name_or_path if mask is None else mask.base_model
            raise ValueError(
                f"The entries were made for {base_model}, and this model has other weights, those "
                f"of {names[0]} for one: load that one as the base."
            )
        peft_config.base_quantization, peft_config.fingerprints = now, found

    def _check_mask(self, mask: Mask, model: nn.Module, *, reads_weights: bool) -> None:
        if mask.settings.get("rate_factors"):
            raise ValueError(
                "The mask gives each matrix a learning rate of its own (auto_rgn), and an adapter "
                "has one: train it by launch/train.py, or select by another rule."
            )
        modules = dict(model.named_modules())
        shapes: dict[str, tuple[int, ...]] = {}
        for name, module in modules.items():
            shapes |= {f"{name}.{weight}": shape for weight, shape in shapes_of(module).items()}
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
        for name, info in mask.weights.items() if reads_weights else ():
            owner, _, own_name = name.rpartition(".")
            weight = self._layer(modules[owner]).weights[own_name]
            weight.check(mask.indices[name], info, mask.base_model)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        return has_chosen(peft_config, key)

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
        layer, mask, entries = self._layer(target), peft_config.mask, {}
        for parameter, weight in layer.weights.items():
            name = f"{current_key}.{parameter}"
            count, info = peft_config.count(name), None
            if not count or not is_chosen(peft_config, current_key, parameter):
                continue
            if mask is None:
                info = WeightInfo(**peft_config.base_weights[target_of(name)])
            own = GemEntries(weight, count, info)
            if mask is not None:
                own.select(mask.indices[name])
                peft_config.num_entries[target_of(name)] = count
                peft_config.base_weights[target_of(name)] = asdict(weight.info(mask.indices[name]))
            entries[parameter] = own
            # DDP would send the indices round with every forward pass.
            indices = f"{key_of(name, adapter_name)}.indices"
            left_out = vars(self.model).setdefault("_ddp_params_and_buffers_to_ignore", [])
            left_out += [indices, WRAPPED + indices]
        layer.update_layer(adapter_name, entries)
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

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse a batch of several adapters, which peft would otherwise give the active one's."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "A batch cannot be of several adapters (adapter_names), as the values stand in the "
                "weights: pass each adapter's examples by themselves, after set_adapter."
            )
        yield

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """As peft's, of which modules of experts have no ``weight`` to be handed back."""
        if isinstance(child, GemLayer):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """As peft's, which looks for the name right before the last part."""
        return key.replace(f".gem_entries.{adapter_name}.", ".gem_entries.", 1)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As peft's, after a check that it brings the entries that the adapter has.

        Entries that are none yet are transformers' own loader's, which passes no mask.
        """
        for name, entries in _entries_of(model, adapter_name):
            weight = name.removeprefix(WRAPPED)
            keys = (f"{prefix}{key_of(weight)}.indices" for prefix in (WRAPPED, ""))
            if (key := next((key for key in keys if key in state_dict), None)) is None:
                raise ValueError(f"The adapter has no entries of {weight}: it is incomplete.")
            indices = state_dict[key]
            if entries.base is None and not torch.equal(
                indices.to(entries.indices), entries.indices
            ):
                raise ValueError(
                    f"The entries of {weight} are others than those of the adapter "
                    f"{adapter_name}: load them under another name."
                )
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _entries_of(model: nn.Module, adapter_name: str) -> list[tuple[str, GemEntries]]:
    """An adapter's entries by their weights' names."""
    return [
        (f"{name}.{parameter}", entries)
        for name, module in model.named_modules()
        if isinstance(module, GemLayer)
        for parameter, entries in module.entries_of(adapter_name).items()
    ]


def _fingerprints(model: nn.Module, modules_to_save: Iterable[str]) -> dict[str, str]:
    """Those of the base's own parameters but quantized ones, a head's and `modules_to_save`."""
    head = head_names(model) if isinstance(model, PreTrainedModel) else set()
    parameters = {}
    for name, parameter in model.named_parameters():
        if ".gem_entries." in name or any(f".{m}." in f".{name}" for m in modules_to_save):
            continue
        plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        if plain not in head and parameter.is_floating_point() and not parameter.is_meta:
            parameters[plain] = parameter
    return fingerprints(parameters, _read_whole)


def _read_whole(entries: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[Tensor]:
    for parameter, index in entries:
        with whole(parameter):
            yield from read_whole([(parameter, index)])


register_peft_method(name=GEM.lower(), config_cls=GemConfig, model_cls=GemModel)
