"""What a run leaves for others in its output folder: the mask, and when it is done the results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gem_ds.data.tasks import hub_dataset
from gem_ds.files.atomic import atomic_write, save_json
from gem_ds.files.card import TRAINING_LOSS, ModelCard
from gem_ds.files.checkpoint import TrainerState
from gem_ds.files.mask import Mask, WeightInfo, dtype_name
from gem_ds.models.encoders import auto_class, is_encoder
from gem_ds.models.load import DTYPES
from gem_ds.select.rules import CALIBRATED_METHODS, SPARSE_METHODS
from gem_ds.sparse.entries import SelectedEntries
from gem_ds.train.config import DEFAULT_DENSITY, Arguments
from gem_ds.train.methods import product_of
from gem_ds.train.prepare import PreparedRun

#: How the model card calls ``eval_loss``.
HELD_OUT = "held-out loss"


def run_settings(args: Arguments, prepared: PreparedRun) -> dict[str, Any]:
    """What a later user of a mask or delta needs to know of the run that made it.

    How entries were chosen is the mask's to say, where a run takes one up.
    """
    task: dict[str, Any] = {"task": args.data.task}
    if is_encoder(prepared.config):
        task["labels"] = list((prepared.config.id2label or {}).values())
    if prepared.mask is not None:
        return prepared.mask.settings | task
    settings = task | {"max_length": args.data.max_length, "seed": args.train.seed}
    if prepared.budget:
        settings["density"] = args.method.density or DEFAULT_DENSITY
    if args.method.method in CALIBRATED_METHODS:
        settings["calibration_examples"] = args.method.calibration_examples or len(
            prepared.data.train
        )
        if is_encoder(prepared.config):
            settings["calibration_head_steps"] = args.method.head_steps
    return settings


def method_of(args: Arguments, prepared: PreparedRun) -> str:
    """The method that a run's files name: the mask's own, where the run takes one up."""
    return args.method.method if prepared.mask is None else prepared.mask.method


def make_mask(
    args: Arguments, prepared: PreparedRun, entries: SelectedEntries, base: Tensor
) -> Mask:
    """The mask of a run, with what a later user needs to know of it."""
    parts = entries.split(base)
    return Mask(
        indices={
            layer.name: index.cpu()
            for layer, index in zip(entries.layers, entries.flat_indices, strict=True)
        },
        weights={
            layer.name: WeightInfo.of(layer.shape, parts[layer.name]) for layer in entries.layers
        },
        base_model=str(args.model.model_name_or_path),
        revision=args.model.revision,
        method=method_of(args, prepared),
        settings=run_settings(args, prepared),
    )


def save_results(
    args: Arguments,
    prepared: PreparedRun,
    state: TrainerState,
    results: Mapping[str, Any],
) -> None:
    """Write trainer_state.json, all_results.json and the model card.

    Raises:
        OSError: a file cannot be written; those before it are whole.
    """
    folder = prepared.output_dir
    state.save(folder)
    save_json(folder / "all_results.json", dict(results))
    train = args.train
    dataset = None if args.data.data_dir else hub_dataset(str(args.data.task))
    card = ModelCard(
        base_model=str(args.model.model_name_or_path),
        revision=args.model.revision,
        task=str(args.data.task),
        dataset=dataset,
        method=method_of(args, prepared),
        product=product_of(args.method.method),
        has_mask=args.method.method in SPARSE_METHODS,
        num_trainable=int(results["num_trainable"]),
        num_parameters=prepared.num_parameters,
        dtype=dtype_name(DTYPES[args.train.dtype]),
        settings={
            "method": method_of(args, prepared),
            **_density(args, prepared),
            "learning rate": train.learning_rate,
            "schedule": train.lr_scheduler_type,
            "steps": state.max_steps,
            "examples per step": prepared.global_batch_size,
            "seed": train.seed,
        },
        results=results.get("eval_metrics", {})
        | {
            name: results[f"last_{key}"]
            for name, key in ((TRAINING_LOSS, "loss"), (HELD_OUT, "eval_loss"))
            if f"last_{key}" in results
        },
        base_results={HELD_OUT: results["first_eval_loss"]} if "first_eval_loss" in results else {},
        auto_class=auto_class(prepared.config).__name__,
        num_labels=prepared.config.num_labels if is_encoder(prepared.config) else None,
    )
    atomic_write(folder / "README.md", lambda path: path.write_text(card.text(), encoding="utf-8"))


def _density(args: Arguments, prepared: PreparedRun) -> dict[str, object]:
    """As the user wrote it, or the mask has it; nothing for methods without one."""
    settings = run_settings(args, prepared)
    return {"density": settings["density"]} if "density" in settings else {}
