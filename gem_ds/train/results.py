"""What a run leaves for others in its output folder: the mask, and when it is done the results."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gem_ds.data.metrics import score
from gem_ds.data.predictions import PREDICTIONS_FILE, judged
from gem_ds.data.tasks import hub_dataset
from gem_ds.distributed.comm import Comm
from gem_ds.errors import sentence_of
from gem_ds.files.atomic import atomic_write, save_json, save_jsonl
from gem_ds.files.card import TRAINING_LOSS, ModelCard
from gem_ds.files.checkpoint import TrainerState
from gem_ds.files.manifest import claim, listed_files
from gem_ds.files.mask import Mask, WeightInfo, dtype_name
from gem_ds.models.encoders import auto_class, is_encoder
from gem_ds.models.load import DTYPES
from gem_ds.models.objective import predict_all
from gem_ds.report.main import REPORT, write_report
from gem_ds.select.rules import CALIBRATED_METHODS, SPARSE_METHODS
from gem_ds.train.config import DataArguments
from gem_ds.train.methods import product_of
from gem_ds.train.output_dir import MODEL_CARD
from gem_ds.train.prepare import PreparedRun

#: How the model card calls ``eval_loss``.
HELD_OUT = "held-out loss"


def run_settings(prepared: PreparedRun) -> dict[str, Any]:
    """What a later user of a mask or delta needs to know of the run that made it.

    How entries were chosen is the mask's to say, where a run takes one up.
    """
    data, method = prepared.args.data, prepared.args.method
    task: dict[str, Any] = {"task": data.task}
    if is_encoder(prepared.config):
        task["labels"] = list((prepared.config.id2label or {}).values())
    if prepared.mask is not None:
        return prepared.mask.settings | task
    settings = task | {"max_length": data.max_length, "seed": prepared.args.train.seed}
    if prepared.targets.density is not None:
        settings["density"] = prepared.targets.density
    if method.method in CALIBRATED_METHODS:
        settings["calibration_examples"] = method.calibration_examples or len(prepared.data.train)
        if is_encoder(prepared.config):
            settings["calibration_head_steps"] = method.head_steps
    return settings


def _dataset_of(data: DataArguments) -> str | None:
    """The data set's id on the Hub, if the data came from there."""
    if data.dataset_name is not None:
        return None if Path(data.dataset_name).exists() else data.dataset_name
    return None if data.data_dir else hub_dataset(str(data.task))


def _method_of(prepared: PreparedRun) -> str:
    return prepared.args.method.method if prepared.mask is None else prepared.mask.method


def make_mask(
    prepared: PreparedRun,
    indices: dict[str, Tensor],
    weights: dict[str, WeightInfo],
    fingerprints: dict[str, str],
) -> Mask:
    """The mask of a run; ``fingerprints`` are those of the base model's parameters."""
    return Mask(
        indices=indices,
        weights=weights,
        base_model=str(prepared.args.model.model_name_or_path),
        revision=prepared.args.model.revision,
        method=_method_of(prepared),
        settings=run_settings(prepared),
        fingerprints=fingerprints,
    )


def measure(
    prepared: PreparedRun, model: nn.Module, comm: Comm, *, is_final: bool = True
) -> dict[str, float]:
    """The task's metrics of the model; none of written answers. Predictions of a final one stay."""
    args, data, predictor = prepared.args, prepared.data, prepared.objective.predictor
    if predictor is None or not data.questions:
        return {}
    predictions = predict_all(
        model,
        data.questions,
        predictor.predict,
        comm,
        batch_size=args.train.per_device_eval_batch_size,
        pad_token_id=prepared.pad_token_id,
    )
    with comm.agreement():
        if comm.is_main and is_final:
            path = claim(prepared.output_dir, PREDICTIONS_FILE)
            save_jsonl(path, judged(data.references, predictions))
        return score(str(args.data.task), data.references, predictions)


def save_results(prepared: PreparedRun, state: TrainerState, results: Mapping[str, Any]) -> None:
    """Write trainer_state.json, all_results.json and the model card."""
    args, folder = prepared.args, prepared.output_dir
    claim(folder, "trainer_state.json")
    state.save(folder)
    save_json(claim(folder, "all_results.json"), dict(results))
    train, settings = args.train, run_settings(prepared)
    losses = {
        name: results[f"last_{key}"]
        for name, key in ((TRAINING_LOSS, "loss"), (HELD_OUT, "eval_loss"))
        if f"last_{key}" in results
    }
    card = ModelCard(
        base_model=str(args.model.model_name_or_path),
        revision=args.model.revision,
        task=str(args.data.task),
        dataset=_dataset_of(args.data),
        method=_method_of(prepared),
        product=product_of(args.method.method),
        has_mask=args.method.method in SPARSE_METHODS,
        num_trainable=int(results["num_trainable"]),
        num_parameters=prepared.targets.num_parameters,
        dtype=dtype_name(DTYPES[train.dtype]),
        settings={
            "method": _method_of(prepared),
            **{key: value for key, value in settings.items() if key == "density"},
            "learning rate": train.learning_rate,
            "schedule": train.lr_scheduler_type,
            "steps": state.max_steps,
            "examples per step": prepared.identity.global_batch_size,
            "seed": train.seed,
        },
        results=results.get("eval_metrics", {}) | losses,
        base_results={HELD_OUT: results["first_eval_loss"]} if "first_eval_loss" in results else {},
        auto_class=auto_class(prepared.config).__name__,
        num_labels=prepared.config.num_labels if is_encoder(prepared.config) else None,
    )
    path = folder / MODEL_CARD
    if path.exists() and path not in listed_files(folder):
        print(f"{path} is no run's and stays, so there is no model card", flush=True)
        return
    claim(folder, MODEL_CARD)
    atomic_write(path, lambda temporary: temporary.write_text(card.text(), encoding="utf-8"))


def try_to_report(folder: Path, base: Mapping[str, Tensor] | None) -> None:
    """Show the run as a page; that it fails is told, and costs the run nothing.

    ``base`` are the base values at the selected entries, where entries are trained.
    """
    try:
        write_report(folder, base=base)
    except Exception as error:
        print(f"{folder / REPORT} was not written: {sentence_of(error)}", flush=True)
