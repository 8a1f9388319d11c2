"""The base of a delta, and the two as an ordinary Hugging Face folder.

Where the base's files hold its parameters under their names, which they mostly do, the delta is
laid over them one weight at a time, and no model is made. Else (a task head; experts that
transformers holds together; files of fewer bits than the delta) the model is loaded in the delta's
dtype, and must fit into this machine's memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

from gem_ds.files.apply import apply_delta
from gem_ds.files.delta import Delta
from gem_ds.files.fingerprint import differing, fingerprints, read_whole
from gem_ds.models.adapters import refuse_own_adapter
from gem_ds.models.encoders import auto_class, is_encoder, set_labels
from gem_ds.models.folder import base_folder, write_changed, write_folder
from gem_ds.models.load import complete_model, model_config
from gem_ds.models.weight_files import holds, map_model, name_in_files


def prepare_folder(
    delta: Delta, base: str, *, trust_remote_code: bool = False
) -> Callable[[Path], list[str]]:
    """What fills a folder with the base, a folder or Hub name, and the delta on it."""
    revision = delta.mask.revision_of(base)
    found, files = entries_in_files(delta, base), base_folder(base, revision)
    if found is not None and (files / "config.json").is_file():
        laid = {name: partial(_laid_over, delta, each) for each, (name, _) in found.items()}
        return lambda folder: write_changed(folder, files, laid, delta.dtype)
    model = load_base(base, delta, trust_remote_code=trust_remote_code)
    apply_delta(model, delta)
    files = base_folder(base, getattr(model.config, "_commit_hash", None) or revision)
    trained = dict(model.named_parameters())
    return lambda folder: write_folder(folder, files, model, trained, delta.head)


def entries_in_files(delta: Delta, base: str) -> dict[str, tuple[str, Tensor]] | None:
    """The delta's weights in the base's files, by their names in the model; checked to be its base.

    To the name in the files and the mapped tensor, in the files' dtype. None where the files alone
    do not tell: they have no parameters of those names and numbers (so of another base, or where
    transformers converts what it loads), or none are known; a task head; or a dtype that does not
    hold the delta's. A ValueError where the files are damaged.
    """
    mask = delta.mask
    revision = mask.revision_of(base)
    refuse_own_adapter(base, revision)
    tensors = map_model(base, revision)
    names = {each: name_in_files(each, tensors) for each in [*mask.fingerprints, *mask.weights]}
    found = {each: (name, tensors[name]) for each, name in names.items() if name is not None}
    is_whole = bool(mask.fingerprints) and found.keys() >= mask.fingerprints.keys()
    if delta.head or not is_whole or not found.keys() >= mask.weights.keys():
        return None
    weights = {name: found[name] for name in mask.weights}
    for name, (_, tensor) in weights.items():
        if not holds(tensor.dtype, delta.dtype) or tensor.shape != mask.weights[name].shape:
            return None
    at = [(tensor, mask.indices[name]) for name, (_, tensor) in weights.items()]
    values = dict(zip(weights, (v.to(delta.dtype) for v in read_whole(at)), strict=True))
    rest = {name: found[name][1] for name in mask.fingerprints}
    dtypes = [getattr(torch, text.partition(" ")[0]) for text in mask.fingerprints.values()]
    read = lambda entries: map(Tensor.to, read_whole(entries), dtypes)  # noqa: E731
    if mask.differing_weights(values) or differing(mask.fingerprints, fingerprints(rest, read)):
        return None
    return weights


def base_weights(delta: Delta, base: str, *, trust_remote_code: bool = False) -> dict[str, Tensor]:
    """The base's weights that the delta has entries of; mapped from its files where they tell.

    In the files' dtype, which holds the delta's, or in the delta's. Refuses another base.
    """
    if (found := entries_in_files(delta, base)) is not None:
        return {name: tensor for name, (_, tensor) in found.items()}
    model = load_base(base, delta, trust_remote_code=trust_remote_code)
    apply_delta(model, delta).revert()  # it checks
    return {name: model.get_parameter(name).detach() for name in delta.values}


def _laid_over(delta: Delta, name: str, base: Tensor) -> Tensor:
    """The trained weight `name`, in the delta's dtype, from its base's."""
    trained = base.to(delta.dtype, copy=True, memory_format=torch.contiguous_format)
    trained.view(-1)[delta.mask.indices[name].long()] = delta.values[name]
    return trained


def load_base(
    base: str, delta: Delta, *, trust_remote_code: bool = False, **options: Any
) -> PreTrainedModel:
    """The base model in the delta's dtype, complete; ``options`` are of ``from_pretrained``."""
    revision = delta.mask.revision_of(base)
    refuse_own_adapter(base, revision)
    config = model_config(base, revision, trust_remote_code=trust_remote_code)
    if delta.head:
        labels = delta.mask.settings.get("labels")
        if not isinstance(labels, list) or not labels:
            raise ValueError(
                "the delta has a task head and does not say for which labels: make it again with "
                "launch/train.py"
            )
        set_labels(config, labels)
    return complete_model(
        base,
        config,
        delta.head,
        model_class=_class_of(config, base, has_head=bool(delta.head)),
        revision=revision,
        dtype=delta.dtype,
        trust_remote_code=trust_remote_code,
        **options,
    )


def _class_of(config: PretrainedConfig, base: str, *, has_head: bool) -> Any:
    """What loads the base as it was trained; a delta made in Python may be of any model."""
    is_causal = not is_encoder(config) and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    has_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if has_head or is_causal or has_code:
        return auto_class(config)
    names = config.architectures or [""]
    if not hasattr(transformers, names[0]):
        raise ValueError(
            f"the config.json of {base} names no class of transformers under 'architectures' "
            f"(found {names}): name there the class that the model was trained as"
        )
    return getattr(transformers, names[0])
