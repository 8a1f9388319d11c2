"""What is decided before any weight is loaded, and everything that can be refused by then.

Each rank prepares for itself, from the same files, and meets the others only afterwards; nothing
here communicates.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from gem_ds.data.tasks import TaskData
from gem_ds.distributed.zero_config import RunShape, read_config, resolve_config, zero_stage
from gem_ds.files.checkpoint import Checkpoint, RunIdentity, find_checkpoint, list_checkpoints
from gem_ds.files.mask import Mask, checksum, dtype_name
from gem_ds.models.encoders import is_encoder, set_head
from gem_ds.models.load import DTYPES, refuse_damaged_files, trainable_config
from gem_ds.models.objective import Objective, objective_of
from gem_ds.models.tokenizer import load_tokenizer, pad_token_id
from gem_ds.sparse.sddmm import check_kernel
from gem_ds.train.config import Arguments, TrainArguments
from gem_ds.train.examples import RunData, encode_examples, fingerprint, load_examples
from gem_ds.train.methods import product_of
from gem_ds.train.optimizer import adam_of_bitsandbytes
from gem_ds.train.output_dir import refuse_losses, refuse_run
from gem_ds.train.reporting import find_trackers
from gem_ds.train.targets import Targets, settle_targets


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run that nothing stands against any more: all that it needs but weights."""

    args: Arguments
    output_dir: Path  # exists or will
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    pad_token_id: int
    task: TaskData  # the examples as text
    data: RunData  # the same as the model reads them
    objective: Objective
    targets: Targets
    deepspeed: dict[str, Any]  # resolved
    mask: Mask | None  # the entries, where they are not to be calibrated
    checkpoint: Checkpoint | None  # what to go on from
    identity: RunIdentity  # the checkpoint's; what a later resume must agree with

    def digest(self) -> str:
        """A fingerprint of what all ranks must agree on before they meet in a collective."""
        parts = (
            self.identity,
            self.data.fingerprint(),
            self.targets,
            self.deepspeed,
            None if self.mask is None else _entries(self.mask),
            None if self.checkpoint is None else self.checkpoint.digest(),
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def prepare(args: Arguments, world_size: int) -> PreparedRun:
    """Decide and check everything that needs no weights; a ValueError says what to change."""
    output_dir = Path(str(args.train.output_dir))
    _refuse_unavailable(args)
    checkpoint = _load_checkpoint(args, output_dir)
    mask = checkpoint.mask if checkpoint else None
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
    if args.method.calibration_head_steps and not is_encoder(config):
        raise ValueError(
            f"--calibration_head_steps trains an encoder's head, and {config.model_type} has none: "
            "leave it out."
        )
    targets = settle_targets(args, config, mask)
    written = read_config(args.train.deepspeed) if args.train.deepspeed else {}
    deepspeed = resolve_deepspeed(written, args.train, config, targets.budget, world_size)
    if args.method.method == "shira" and zero_stage(deepspeed) == 3:
        raise ValueError(
            "--method shira adds to whole weights, and ZeRO stage 3 cuts them: use "
            "ds_configs/zero2.json."
        )
    tokenizer = load_tokenizer(name, args.model.revision, trust_remote_code=trust_remote_code)
    data = encode_examples(args.data, task, objective, tokenizer, config)
    return PreparedRun(
        args=args,
        output_dir=output_dir,
        config=config,
        tokenizer=tokenizer,
        pad_token_id=pad_token_id(tokenizer, config.get_text_config().vocab_size),
        task=task,
        data=data,
        objective=objective,
        targets=targets,
        deepspeed=deepspeed,
        mask=mask,
        checkpoint=checkpoint,
        identity=_identity(args, data, checkpoint, world_size),
    )


def batch_size_of_flags(train: TrainArguments, world_size: int) -> int:
    """Examples per step of a run that resumes nothing."""
    return train.per_device_train_batch_size * train.gradient_accumulation_steps * world_size


def resolve_deepspeed(
    written: dict[str, Any],
    train: TrainArguments,
    config: PretrainedConfig,
    budget: int,
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
        num_selected=budget,
    )
    return resolve_config(written, shape)


def _refuse_unavailable(args: Arguments) -> None:
    """Refuse flags that need what this machine has not."""
    find_trackers(args.train.report_to)
    if args.train.optimizer == "adamw_8bit":
        adam_of_bitsandbytes()
    if args.train.fp16 and not torch.cuda.is_available():
        raise ValueError("--fp16 needs a GPU: pass --bf16, or neither for fp32.")
    check_kernel(args.method.sddmm_kernel, "cuda" if torch.cuda.is_available() else "cpu")


def _load_checkpoint(args: Arguments, output_dir: Path) -> Checkpoint | None:
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
    checkpoint = Checkpoint.load(folder)
    if args.method.mask and _entries(Mask.load(args.method.mask)) != _entries(checkpoint.mask):
        raise ValueError("The checkpoint trains other entries than --mask: leave --mask out.")
    if folder.resolve().parent != output_dir.resolve():
        refuse_run(output_dir)
    elif (newest := max(list_checkpoints(output_dir), default=0)) > checkpoint.state.global_step:
        raise ValueError(
            f"{output_dir} holds checkpoint-{newest}, which is later than {folder.name}: delete "
            "what is later, or name another --output_dir."
        )
    dtype = dtype_name(DTYPES[args.train.dtype])
    if (before := checkpoint.mask.dtype) != dtype:
        raise ValueError(
            f"The checkpoint was trained in {before} and the flags say {dtype}: pass --bf16, "
            "--fp16 or neither as before."
        )
    return checkpoint


def _entries(mask: Mask) -> dict[str, str]:
    """Fingerprints of the entries of each weight."""
    return {name: checksum(indices) for name, indices in mask.indices.items()}


def _identity(
    args: Arguments, data: RunData, checkpoint: Checkpoint | None, world_size: int
) -> RunIdentity:
    """That of the flags and the data; of a resumed run the checkpoint's, if these agree with it."""
    now = RunIdentity(
        global_batch_size=batch_size_of_flags(args.train, world_size),
        seed=args.train.seed,
        data=fingerprint(args.data, data.train),
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
