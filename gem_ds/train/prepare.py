"""What is decided before any weight is loaded, and everything that can be refused by then.

Each rank prepares for itself, from the same files, and meets the others only afterwards; nothing
here communicates.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from gem_ds.data.tasks import TaskData
from gem_ds.distributed.zero_config import RunShape, read_config, resolve_config, zero_stage
from gem_ds.distributed.zero_keys import told_ignored
from gem_ds.files.checkpoint import Checkpoint, RunIdentity
from gem_ds.files.dense_checkpoint import DenseCheckpoint
from gem_ds.files.mask import Mask
from gem_ds.models.encoders import is_encoder, set_head
from gem_ds.models.load import trainable_config
from gem_ds.models.objective import Objective, objective_of
from gem_ds.models.tokenizer import load_tokenizer, pad_token_id
from gem_ds.models.weight_files import refuse_damaged_files
from gem_ds.sddmm import check_kernel
from gem_ds.train.best import refuse_unmeasured
from gem_ds.train.config import Arguments, TrainArguments
from gem_ds.train.examples import RunData, encode_examples, fingerprint, load_examples
from gem_ds.train.optimizer import adam_of_bitsandbytes
from gem_ds.train.reporting import find_trackers
from gem_ds.train.resume import dense_settings, entries_of, identity_of, load_checkpoint
from gem_ds.train.targets import Targets, settle_targets


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run that nothing stands against any more: all that it needs but weights."""

    args: Arguments
    output_dir: Path  # exists or will
    config: PretrainedConfig
    pad_token_id: int
    task: TaskData  # the examples as text
    data: RunData  # the same as the model reads them
    objective: Objective
    targets: Targets
    deepspeed: dict[str, Any]  # resolved
    mask: Mask | None  # the entries, where they are not to be calibrated
    checkpoint: Checkpoint | DenseCheckpoint | None  # what to go on from
    identity: RunIdentity  # the checkpoint's; what a later resume must agree with
    dense_settings: dict[str, str | int | float]  # likewise, where whole parameters are trained
    notes: list[str]  # how what the user gave was read, a line each

    def digest(self) -> str:
        """A fingerprint of what all ranks must agree on before they meet in a collective."""
        parts = (
            self.identity,
            self.data.fingerprint(),
            self.targets,
            self.deepspeed,
            None if self.mask is None else entries_of(self.mask),
            None if self.checkpoint is None else self.checkpoint.digest(),
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def prepare(args: Arguments, world_size: int) -> PreparedRun:
    """Decide and check everything that needs no weights; a ValueError says what to change."""
    output_dir = Path(str(args.train.output_dir))
    _refuse_unavailable(args)
    checkpoint = load_checkpoint(args, output_dir)
    mask = checkpoint.mask if isinstance(checkpoint, Checkpoint) else None
    if mask is None and args.method.mask:
        mask = Mask.load(args.method.mask)
    name, trust_remote_code = str(args.model.model_name_or_path), args.model.trust_remote_code
    config = trainable_config(name, args.model.revision, trust_remote_code=trust_remote_code)
    refuse_damaged_files(name)
    task = load_examples(args.data)
    set_head(config, name, task)
    objective = objective_of(
        task.kind, is_encoder=is_encoder(config), classification_loss=args.data.classification_loss
    )
    if args.data.long_prompts == "truncate_left" and is_encoder(config):
        raise ValueError(
            "--long_prompts is for prompts of causal models, and the pairs that an encoder reads "
            "are cut at the end of the longer text: leave it out."
        )
    if args.method.calibration_head_steps and not is_encoder(config):
        raise ValueError(
            f"--calibration_head_steps trains an encoder's head, and {config.model_type} has none: "
            "leave it out."
        )
    targets = settle_targets(args, config, mask)
    written = read_config(args.train.deepspeed) if args.train.deepspeed else {}
    deepspeed = resolve_deepspeed(written, args.train, config, targets, world_size)
    settings = dense_settings(args, targets, zero_stage(deepspeed), world_size)
    if isinstance(checkpoint, DenseCheckpoint):
        checkpoint.refuse_other(settings)
    if args.method.method == "shira" and zero_stage(deepspeed) == 3:
        raise ValueError(
            "--method shira adds to whole weights, and ZeRO stage 3 cuts them: use "
            "ds_configs/zero2.json."
        )
    tokenizer = load_tokenizer(name, args.model.revision, trust_remote_code=trust_remote_code)
    data = encode_examples(args.data, task, objective, tokenizer, config)
    refuse_unmeasured(args.train, str(args.data.task), objective, len(data.test))
    return PreparedRun(
        args=args,
        output_dir=output_dir,
        config=config,
        pad_token_id=pad_token_id(tokenizer, config.get_text_config().vocab_size),
        task=task,
        data=data,
        objective=objective,
        targets=targets,
        deepspeed=deepspeed,
        mask=mask,
        checkpoint=checkpoint,
        identity=identity_of(args, fingerprint(args.data, data.train), checkpoint, world_size),
        dense_settings=settings,
        notes=[*args.notes, *_notes(args.train, written)],
    )


def resolve_deepspeed(
    written: dict[str, Any],
    train: TrainArguments,
    config: PretrainedConfig,
    targets: Targets,
    world_size: int,
) -> dict[str, Any]:
    """The engine's configuration: the DeepSpeed JSON ``written`` with what the flags say."""
    shape = RunShape(
        world_size=world_size,
        micro_batch_size=train.per_device_train_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        max_grad_norm=train.max_grad_norm,
        dtype=train.dtype,
        hidden_size=config.get_text_config().hidden_size,
        num_selected=targets.budget,
        blocks=targets.blocks,
        optimizer={
            "lr": (train.learning_rate, "--learning_rate"),
            "betas": ([train.adam_beta1, train.adam_beta2], "--adam_beta1 and --adam_beta2"),
            "eps": (train.adam_epsilon, "--adam_epsilon"),
            "weight_decay": (train.weight_decay, "--weight_decay"),
        },
        scheduler={
            "warmup_min_lr": (0, "a warmup"),
            "warmup_max_lr": (train.learning_rate, "--learning_rate"),
            "warmup_num_steps": (train.warmup_steps, "--warmup_steps"),
            "total_num_steps": (train.max_steps, "--max_steps"),
        },
    )
    return resolve_config(written, shape)


def _notes(train: TrainArguments, deepspeed: dict[str, Any]) -> Iterator[str]:
    """How flags and the DeepSpeed JSON were read where they say more than is done."""
    if train.tf32 and not torch.cuda.is_available():
        yield "--tf32 has no effect without a GPU"
    if torch.cuda.is_available() and torch.backends.cuda.matmul.allow_tf32 and not train.tf32:
        yield "TF32, which is switched on here, is off in this run: --tf32 would use it"
    if passed_over := told_ignored(deepspeed):
        yield passed_over


def _refuse_unavailable(args: Arguments) -> None:
    """Refuse flags that need what this machine has not."""
    find_trackers(args.train.report_to)
    if args.train.optimizer == "adamw_8bit":
        adam_of_bitsandbytes()
    if args.train.fp16 and not torch.cuda.is_available():
        raise ValueError("--fp16 needs a GPU: pass --bf16, or neither for fp32.")
    check_kernel(args.method.sddmm_kernel, "cuda" if torch.cuda.is_available() else "cpu")
