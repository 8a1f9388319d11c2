"""The base of a delta, and the two as an ordinary Hugging Face folder.

The base is loaded as it was trained, in the delta's dtype, and the delta is applied; what is
written is the base's folder with these weights (`gem_ds.models.folder`). The model must fit into
this machine's memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)

from gem_ds.files.apply import apply_delta
from gem_ds.files.delta import Delta
from gem_ds.models.adapters import refuse_own_adapter
from gem_ds.models.encoders import auto_class, is_encoder, set_labels
from gem_ds.models.folder import base_folder, write_folder
from gem_ds.models.load import model_config


def prepare_folder(
    delta: Delta, base: str, *, trust_remote_code: bool = False
) -> Callable[[Path], list[str]]:
    """What fills a folder with the base, a folder or Hub name, and the delta applied.

    It returns what `write_folder` does.

    Raises:
        ValueError: The delta is of another base, or the base is incomplete.
    """
    revision = delta.mask.revision_of(base)
    model = load_base(base, revision, delta, trust_remote_code=trust_remote_code)
    apply_delta(model, delta)
    files = base_folder(base, getattr(model.config, "_commit_hash", None) or revision)
    trained = dict(model.named_parameters())
    return lambda folder: write_folder(folder, files, model, trained, delta.head)


def load_base(
    base: str, revision: str, delta: Delta, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The base model in the delta's dtype, with every weight read from its files."""
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
    model_class = _class_of(config, base, has_head=bool(delta.head))
    loaded: tuple[PreTrainedModel, dict[str, Any]] = model_class.from_pretrained(
        base,
        config=config,
        revision=revision,
        dtype=delta.dtype,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    model, report = loaded
    if missing := set(report["missing_keys"]) - delta.head.keys():
        raise ValueError(
            f"{base} lacks {len(missing)} weights of {type(model).__name__}, for example "
            f"{min(missing)!r}: pass a complete model"
        )
    return model


def _class_of(config: PretrainedConfig, base: str, *, has_head: bool) -> Any:
    """What loads the base as it was trained; a delta made in Python may be of any model."""
    is_causal = not is_encoder(config) and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    has_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if has_head or is_causal or has_code:
        return auto_class(config)
    names = config.architectures or [""]
    if (model_class := getattr(transformers, names[0], None)) is None:
        raise ValueError(
            f"the config.json of {base} names no class of transformers under 'architectures' "
            f"(found {names}): name there the class that the model was trained as"
        )
    return model_class
