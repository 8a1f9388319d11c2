"""What a run goes on from, and whether it may: the output folder, the flags, the data agree."""

import math
from pathlib import Path

from gem_ds.files.checkpoint import (
    Checkpoint,
    RunIdentity,
    TrainerState,
    find_checkpoint,
    list_checkpoints,
)
from gem_ds.files.dense_checkpoint import DENSE_FILE, DenseCheckpoint
from gem_ds.files.digests import checksum, digest_of_json
from gem_ds.files.mask import Mask, dtype_name
from gem_ds.models.load import DTYPES
from gem_ds.select.rules import SPARSE_METHODS
from gem_ds.train.config import Arguments, TrainArguments
from gem_ds.train.methods import product_of
from gem_ds.train.output_dir import refuse_losses, refuse_run
from gem_ds.train.targets import Targets

#: Flags that say how a step is taken; a resumed run may change them, and says so.
STEP_SETTINGS = (
    *("learning_rate", "head_learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "sam_rho", "sam_layers"),
)


def batch_size_of_flags(train: TrainArguments, world_size: int) -> int:
    """Examples per step of a run that resumes nothing."""
    return train.per_device_train_batch_size * train.gradient_accumulation_steps * world_size


def load_checkpoint(args: Arguments, output_dir: Path) -> Checkpoint | DenseCheckpoint | None:
    """The checkpoint to go on from, after a check of what the output folder holds."""
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output_dir {output_dir} is a file: name a folder.")
    refuse_losses(
        output_dir,
        {"--model_name_or_path": args.model.model_name_or_path, "--mask": args.method.mask},
        product_of(args.method.method),
        overwrite=args.train.overwrite_output_dir,
    )
    if args.train.resume_from_checkpoint is None:
        if not args.train.overwrite_output_dir:
            refuse_run(output_dir)
        return None
    if args.train.overwrite_output_dir:
        raise ValueError("--overwrite_output_dir would delete what --resume_from_checkpoint needs.")
    folder = find_checkpoint(output_dir, args.train.resume_from_checkpoint)
    checkpoint: Checkpoint | DenseCheckpoint
    if args.method.method not in SPARSE_METHODS:
        checkpoint = DenseCheckpoint.load(folder)
    elif (folder / DENSE_FILE).is_file():
        method = DenseCheckpoint.load(folder).numbers.settings["--method"]
        raise ValueError(f"{folder} was written with --method {method}: pass it again.")
    else:
        checkpoint = Checkpoint.load(folder)
        _refuse_other_entries(args, checkpoint)
    if folder.resolve().parent != output_dir.resolve():
        refuse_run(output_dir)
    elif (newest := max(list_checkpoints(output_dir), default=0)) > checkpoint.state.global_step:
        raise ValueError(
            f"{output_dir} holds checkpoint-{newest}, which is later than {folder.name}: delete "
            "what is later, or name another --output_dir."
        )
    return checkpoint


def _refuse_other_entries(args: Arguments, checkpoint: Checkpoint) -> None:
    if args.method.mask and entries_of(Mask.load(args.method.mask)) != entries_of(checkpoint.mask):
        raise ValueError("The checkpoint trains other entries than --mask: leave --mask out.")
    dtype = dtype_name(DTYPES[args.train.dtype])
    if (before := checkpoint.mask.dtype) != dtype:
        raise ValueError(
            f"The checkpoint was trained in {before} and the flags say {dtype}: pass --bf16, "
            "--fp16 or neither as before."
        )


def dense_settings(
    args: Arguments, targets: Targets, zero_stage: int, world_size: int
) -> dict[str, str | int | float]:
    """What decides which numbers DeepSpeed's files of a checkpoint hold, and on which rank."""
    method = args.method
    settings: dict[str, str | int | float] = {
        "--method": method.method,
        "precision": args.train.dtype,
        "--optimizer": args.train.optimizer,
        "ranks": world_size,
        "ZeRO stage": zero_stage,
        "target layers": f"{len(targets.names)} ({digest_of_json(targets.names)[:8]})",
    }
    if method.method == "lora":
        settings |= {"--lora_r": method.lora_r, "--lora_alpha": method.lora_alpha}
    return settings | ({"rank of shira": targets.shira_rank} if targets.shira_rank else {})


def entries_of(mask: Mask) -> dict[str, str]:
    """Fingerprints of the entries of each weight."""
    return {name: checksum(indices) for name, indices in mask.indices.items()}


def identity_of(
    args: Arguments,
    data: str,
    checkpoint: Checkpoint | DenseCheckpoint | None,
    world_size: int,
) -> RunIdentity:
    """That of the flags and the data; of a resumed run the checkpoint's, if these agree with it."""
    now = RunIdentity(
        global_batch_size=batch_size_of_flags(args.train, world_size),
        seed=args.train.seed,
        data=data,
    )
    if checkpoint is None:
        return now
    before = checkpoint.identity
    if now.data != before.data:
        raise ValueError(
            "The checkpoint was trained on other examples or in another order: pass the same data, "
            "--max_length, --packing and --train_sampling_strategy as before."
        )
    if now.seed != before.seed:
        raise ValueError(f"The checkpoint was trained with --seed {before.seed}: pass it again.")
    return before


def initial_state(
    train: TrainArguments, checkpoint: Checkpoint | DenseCheckpoint | None, steps_per_epoch: int
) -> tuple[TrainerState, list[str]]:
    """Progress at the start, none or the checkpoint's, and which step settings are others now."""
    state = checkpoint.state if checkpoint else TrainerState()
    settings = {name: getattr(train, name) for name in STEP_SETTINGS}
    changes = [
        f"--{name} {value} instead of {state.settings[name]}"
        for name, value in settings.items()
        if state.settings.get(name, value) != value
    ]
    if state.settings.get("sam_layers") and not train.sam_layers:
        raise ValueError(
            "The checkpoint's layers have had different numbers of updates: go on with "
            f"--sam_layers {state.settings['sam_layers']}, or another share above 0."
        )
    state.settings = settings
    state.max_steps = train.max_steps
    if state.max_steps < 0:
        state.max_steps = math.ceil(train.num_train_epochs * steps_per_epoch)
    if state.global_step > state.max_steps:
        raise ValueError(
            f"The checkpoint stands at step {state.global_step} and the flags end the run at "
            f"step {state.max_steps}: raise --max_steps or --num_train_epochs."
        )
    return state, changes
