"""Writes an ordinary Hugging Face folder from a base model and a delta.

    python launch/export.py --model_name_or_path M --delta F --output_dir E

The base is loaded by the class that its config.json names, or by the one for sequence
classification if the delta has a task head, in the delta's dtype; the delta is applied, and model
and tokenizer are saved. The folder appears under its name when it is whole, not
before. Processors of images or sound are not copied. One process, no accelerator: the model must
fit into this machine's memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from gem_ds.files.atomic import atomic_folder
from gem_ds.files.delta import Delta, apply_delta
from gem_ds.flags import name_of
from gem_ds.models.encoders import set_labels
from gem_ds.models.tokenizer import has_tokenizer, load_tokenizer
from gem_ds.progress import loading_bars


def main(argv: Sequence[str] | None = None) -> None:
    """The program; raises what `export` does."""
    parser = argparse.ArgumentParser(
        prog=name_of("export"),
        description="Write an ordinary Hugging Face folder from a base model and a delta.",
    )
    base_help = "base model of the delta: a folder or a name on the Hugging Face Hub"
    replace_help = "replace output_dir as a whole if a model is in it"
    parser.add_argument("--model_name_or_path", required=True, help=base_help)
    parser.add_argument("--delta", type=Path, required=True, help="delta.safetensors of a run")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to create")
    parser.add_argument("--overwrite_output_dir", action="store_true", help=replace_help)
    args = parser.parse_args(argv)
    overwrite = args.overwrite_output_dir
    with loading_bars(is_shown=True):
        export(args.model_name_or_path, args.delta, args.output_dir, overwrite=overwrite)


def export(base: str, delta_path: Path, output_dir: Path, *, overwrite: bool = False) -> None:
    """Applies a delta to its base model, a folder or Hub name, and saves a Hugging Face folder."""
    output_dir = output_dir.resolve()
    _check_output_dir(output_dir, base, delta_path, overwrite)
    delta = Delta.load(delta_path)
    revision = delta.mask.revision_of(base)
    model = _load_base(base, revision, delta)
    apply_delta(model, delta)
    tokenizer = load_tokenizer(base, revision) if has_tokenizer(base, revision) else None
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    parts = [part for part in (model, tokenizer) if part is not None]
    atomic_folder(output_dir, lambda folder: [part.save_pretrained(folder) for part in parts])
    print(
        f"{output_dir}: {base} with {delta.mask.num_selected:,} trained values in "
        f"{len(delta.values)} weights" + ("" if tokenizer else "; the base has no tokenizer")
    )


def _check_output_dir(output_dir: Path, base: str, delta_path: Path, overwrite: bool) -> None:
    """Refuses a folder whose writing would destroy something, before anything is loaded."""
    for source in (Path(base), delta_path):
        if source.exists() and source.resolve().is_relative_to(output_dir):
            raise ValueError(f"output_dir {output_dir} is or holds {source}: choose another folder")
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir {output_dir} is a file: choose another name")
    if output_dir.is_dir() and any(output_dir.iterdir()):
        problem = f"output_dir {output_dir} is not empty"
        if not overwrite:
            raise ValueError(f"{problem}: choose another folder or pass --overwrite_output_dir")
        if not (output_dir / "config.json").is_file():
            raise ValueError(
                f"{problem} and holds no model (no config.json), so it is not overwritten: choose "
                "another folder"
            )


def _load_base(base: str, revision: str, delta: Delta) -> PreTrainedModel:
    """The base model in the delta's dtype, with every weight read from its files."""
    config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=False)
    names = config.architectures or []
    model_class: Any = getattr(transformers, names[0], None) if names else None
    if delta.head:
        model_class, labels = AutoModelForSequenceClassification, delta.mask.settings.get("labels")
        if not isinstance(labels, list) or not labels:
            raise ValueError(
                "the delta has a task head and does not say for which labels: make it again with "
                "launch/train.py"
            )
        set_labels(config, labels)
    if model_class is None:
        raise ValueError(
            f"the config.json of {base} names no class of transformers under 'architectures' "
            f"(found {names}): name there the class that the model was trained as"
        )
    loaded: tuple[PreTrainedModel, dict[str, Any]] = model_class.from_pretrained(
        base, config=config, revision=revision, dtype=delta.dtype, output_loading_info=True
    )
    model, report = loaded
    if missing := set(report["missing_keys"]) - delta.head.keys():
        raise ValueError(
            f"{base} lacks {len(missing)} weights of {model_class.__name__}, for example "
            f"{min(missing)!r}: pass a complete model"
        )
    return model
