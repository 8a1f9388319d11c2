"""Writes an ordinary Hugging Face folder from a base model and a delta.

    python launch/export.py --model_name_or_path M --delta F --output_dir E

The base is loaded as it was trained, in the delta's dtype, and the delta is applied; what is
written is the base's folder with these weights (`gem_ds.models.folder`). It appears under its name
when it is whole, not before. One process, no accelerator: the model must fit into this machine's
memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)

from gem_ds.files.checkpoint import load_delta
from gem_ds.files.delta import Delta, apply_delta
from gem_ds.files.manifest import atomic_folder, clear_leftovers, refuse_foreign
from gem_ds.flags import name_of
from gem_ds.models.adapters import refuse_own_adapter
from gem_ds.models.encoders import auto_class, is_encoder, set_labels
from gem_ds.models.folder import base_folder, write_folder
from gem_ds.models.load import model_config
from gem_ds.progress import loading_bars


def main(argv: Sequence[str] | None = None) -> None:
    """The program; raises what `export` does."""
    parser = argparse.ArgumentParser(
        prog=name_of("export"),
        description="Write an ordinary Hugging Face folder from a base model and a delta.",
    )
    base_help = "base model of the delta: a folder or a name on the Hugging Face Hub"
    replace_help = "replace an earlier export in output_dir"
    parser.add_argument("--model_name_or_path", required=True, help=base_help)
    delta_help = "delta.safetensors of a run, or its weights at a step: a checkpoint-N folder"
    parser.add_argument("--delta", type=Path, required=True, help=delta_help)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to create")
    parser.add_argument("--overwrite_output_dir", action="store_true", help=replace_help)
    code_help = "run model code that comes with the weights"
    parser.add_argument("--trust_remote_code", action="store_true", help=code_help)
    args = parser.parse_args(argv)
    with loading_bars(is_shown=True):
        export(
            args.model_name_or_path,
            args.delta,
            args.output_dir,
            overwrite=args.overwrite_output_dir,
            trust_remote_code=args.trust_remote_code,
        )


def export(
    base: str,
    delta_path: Path,
    output_dir: Path,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Applies a delta to its base model, a folder or Hub name, and saves a Hugging Face folder."""
    output_dir = output_dir.resolve()
    clear_leftovers(output_dir)
    _check_output_dir(output_dir, base, delta_path, overwrite)
    delta = load_delta(delta_path)
    revision = delta.mask.revision_of(base)
    model = load_base(base, revision, delta, trust_remote_code=trust_remote_code)
    apply_delta(model, delta)
    files = base_folder(base, getattr(model.config, "_commit_hash", None) or revision)
    trained = dict(model.named_parameters())
    notes: list[str] = []

    def write(folder: Path) -> None:
        notes.extend(write_folder(folder, files, model, trained, delta.head))

    output_dir.parent.mkdir(parents=True, exist_ok=True)
    atomic_folder(output_dir, write)
    values = f"{delta.mask.num_selected:,} trained values in {len(delta.values)} weights"
    print("; ".join([f"{output_dir}: {base} with {values}", *notes]))


def _check_output_dir(output_dir: Path, base: str, delta_path: Path, overwrite: bool) -> None:
    """Refuses a folder whose writing would destroy something, before anything is loaded."""
    for source in (Path(base), delta_path):
        if source.exists() and source.resolve().is_relative_to(output_dir):
            raise ValueError(f"output_dir {output_dir} is or holds {source}: choose another folder")
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir {output_dir} is a file: choose another name")
    if output_dir.is_dir() and any(output_dir.iterdir()):
        refuse_foreign(output_dir)
        if not overwrite:
            raise ValueError(
                f"output_dir {output_dir} holds an export: pass --overwrite_output_dir to replace "
                "it, or choose another folder"
            )


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
