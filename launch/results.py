"""What a finished run leaves in its output folder."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gem_ds.card import model_card
from gem_ds.checkpoint import TrainerState
from gem_ds.delta import Delta
from gem_ds.files import atomic_write, save_json
from gem_ds.mask import Mask
from launch.arguments import Arguments
from launch.prepare import Plan

#: Where a task's examples come from, for the model card's metadata.
HUB_DATASETS = {"gsm8k": "openai/gsm8k", "mbpp": "google-research-datasets/mbpp"}

#: How the model card calls ``eval_loss``.
HELD_OUT = "held-out loss"


def save_results(
    args: Arguments,
    plan: Plan,
    mask: Mask,
    values: Mapping[str, Tensor],
    state: TrainerState,
    results: Mapping[str, float],
) -> None:
    """Write delta.safetensors, trainer_state.json, all_results.json and the model card.

    Args:
        args: the flags.
        plan: of the run.
        mask: the trained entries.
        values: by weight name their values, in the model's dtype.
        state: where the run stopped.
        results: numbers by name.

    Raises:
        OSError: a file cannot be written; those before it are whole.
    """
    folder = plan.output_dir
    Delta(mask=mask, values=dict(values)).save(folder / "delta.safetensors")
    state.save(folder)
    save_json(folder / "all_results.json", dict(results))
    train = args.train
    dataset = None if args.data.data_dir else HUB_DATASETS.get(str(args.data.task))
    card = model_card(
        base_model=str(args.model.model_name_or_path),
        revision=args.model.revision,
        task=str(args.data.task),
        dataset=dataset,
        num_selected=plan.total,
        num_parameters=plan.num_parameters,
        dtype=next(iter(mask.weights.values())).dtype,
        settings={
            "density": mask.settings.get("density", plan.total / plan.num_parameters),
            "learning rate": train.learning_rate,
            "schedule": train.lr_scheduler_type,
            "steps": state.max_steps,
            "examples per step": plan.global_batch_size,
            "seed": train.seed,
        },
        results={
            name: results[f"last_{key}"]
            for name, key in (("training loss", "loss"), (HELD_OUT, "eval_loss"))
            if f"last_{key}" in results
        },
        base_results={HELD_OUT: results["first_eval_loss"]} if "first_eval_loss" in results else {},
    )
    atomic_write(folder / "README.md", lambda path: path.write_text(card, encoding="utf-8"))
