"""What a training will need of each GPU and of the network, from the model's configuration alone.

    python launch/plan.py --model_name_or_path M --deepspeed ds_configs/zero3.json \
        --world_size 64 --gpu_memory_gb 80

Takes the flags of launch/train.py beside its own; the task, its data and --output_dir may be left
out. No weights are read: the model is laid out on the meta device, and a micro-batch runs there.
Every sequence is taken to be --max_length long and to carry loss everywhere, so shorter data needs
less. A GB is 10^9 bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import transformers

from gem_ds.distributed.zero_config import read_config, zero_stage
from gem_ds.flags import name_of
from gem_ds.models.load import trainable_config
from gem_ds.planning.advice import HEADROOM, fits, least_change, lower_stage
from gem_ds.planning.forecast import Forecast, forecast
from gem_ds.planning.subject import Setting
from gem_ds.train.arguments import parse_arguments
from gem_ds.train.config import Arguments

GB = 1e9


def read_setting(
    args: Arguments, world_size: int, memory_gb: float | None = None, *, on_cpu: bool = False
) -> Setting:
    """The setting that the flags describe; a ``ValueError`` says what cannot be planned."""
    if args.method.fixed_buffer_gb is None and memory_gb is None:
        raise ValueError(
            "What --calibration_buffer_gb auto takes depends on the GPU: pass --gpu_memory_gb."
        )
    if args.method.mask:
        raise ValueError("A plan needs no mask: leave --mask out and pass its --density.")
    for flag, value, given in (
        ("method", "shira", args.method.method),
        ("optimizer", "adamw_8bit", args.train.optimizer),
        ("classification_loss", "candidates", args.data.classification_loss),
        ("attn_implementation", "eager", args.model.attn_implementation),
    ):
        if value == given:
            raise ValueError(f"--{flag} {value} cannot be planned: leave it out.")
    model, path = args.model, args.train.deepspeed
    return Setting(
        args=args,
        config=trainable_config(
            str(model.model_name_or_path),
            model.revision,
            trust_remote_code=model.trust_remote_code,
        ),
        deepspeed=read_config(path) if path else {"zero_optimization": {"stage": 0}},
        world_size=world_size,
        on_cpu=on_cpu,
        usable_bytes=(1 - HEADROOM) * (memory_gb or 0.0) * GB,
    )


def describe(setting: Setting, found: Forecast) -> str:
    """What is planned, and what a rank and the network will bear."""
    train, method = setting.args.train, setting.args.method.method
    ranks = "1 rank" if setting.world_size == 1 else f"{setting.world_size} ranks"
    lines = [
        f"{method} on {setting.args.model.model_name_or_path}: {found.num_trained:,} of "
        f"{found.num_parameters:,} parameters",
        f"{ranks}, ZeRO stage {zero_stage(setting.deepspeed)}, {train.dtype}; each rank runs "
        f"{train.per_device_train_batch_size} x {found.num_tokens:,} tokens at once"
        + (", activations recomputed" if train.gradient_checkpointing else ""),
        "",
        *_memory_lines(found),
        "",
        "Messages of all ranks, each counted once     GB",
    ]
    messages = {
        "weights gathered in a micro-batch": found.weight_gathers,
        "all else of a step": found.step_messages,
    }
    if found.calibration:
        messages["statistics, in a micro-batch"] = found.calibration_messages
    lines += [f"  {what:<36}{num_bytes / GB:>10.3f}" for what, num_bytes in messages.items()]
    if found.num_gathers:
        lines.append(f"Gathers of weights in a micro-batch   {found.num_gathers:>10,}")
    if found.calibration and setting.args.method.fixed_buffer_gb is None:
        lines.append(f"--calibration_buffer_gb auto is       {found.buffer_gb:>10.3f} GB")
    lines.append(f"Masters and moments of all ranks      {found.state / GB:>10.3f} GB")
    return "\n".join(lines)


def _memory_lines(found: Forecast) -> list[str]:
    """A table of what one rank holds; columns for the phases that there are."""
    names = ("training", "calibration", "evaluation")
    phases = {phase: held for phase in names if (held := getattr(found, phase))}
    kinds = dict.fromkeys(kind for held in phases.values() for kind in held)
    rows = {kind: [held.get(kind, 0) for held in phases.values()] for kind in kinds}
    rows = {kind: sizes for kind, sizes in rows.items() if any(sizes)}
    rows["in all"] = [sum(held.values()) for held in phases.values()]
    heads = "".join(f"{phase:>13}" for phase in phases)
    return [f"At the peak of one rank, GB  {heads}"] + [
        f"  {kind:<27}" + "".join(f"{size / GB:>13.3f}" for size in sizes)
        for kind, sizes in rows.items()
    ]


def advise(setting: Setting, found: Forecast, memory_gb: float) -> str:
    """Whether it fits, and what makes it fit."""
    usable = f"{(1 - HEADROOM) * memory_gb:g} GB (a tenth of {memory_gb:g} GB is left to libraries)"
    if fits(found, memory_gb * GB):
        told = f"It fits: {found.peak / GB:.3g} of {usable}."
        lower = lower_stage(setting, memory_gb * GB)
        if lower is None:
            return told
        file, needed = lower
        sent = [_gb_of_a_step(setting, of) for of in (needed, found)]
        return (
            f"{told} So does --deepspeed {file}: {needed.peak / GB:.3g} GB, and {sent[0]:.3g} GB "
            f"cross the network in a step instead of {sent[1]:.3g}."
        )
    change = least_change(setting, memory_gb * GB)
    told = f"It does not fit: {found.peak / GB:.3g} of {usable}."
    if change is None:
        return f"{told} Nothing that this program knows makes it fit: a smaller model would."
    words, after = change
    return f"{told} It does with {', '.join(words)}: {after.peak / GB:.3g} GB."


def _gb_of_a_step(setting: Setting, found: Forecast) -> float:
    num_micro_batches = setting.args.train.gradient_accumulation_steps
    return (num_micro_batches * found.weight_gathers + found.step_messages) / GB


def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan; a ``ValueError`` says what is wrong with the flags."""
    parser = argparse.ArgumentParser(
        prog=name_of("plan"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--world_size", type=int, default=1, help="ranks, one GPU each")
    parser.add_argument("--gpu_memory_gb", type=float, help="of one GPU: is it enough?")
    own, flags = parser.parse_known_args(argv)
    if own.world_size < 1:
        raise ValueError(f"--world_size must be at least 1, not {own.world_size}.")
    if own.gpu_memory_gb is not None and not 0 < own.gpu_memory_gb < float("inf"):
        raise ValueError(f"--gpu_memory_gb must be above 0, not {own.gpu_memory_gb}.")
    transformers.utils.logging.set_verbosity_error()
    args = parse_arguments(flags, needed=["model_name_or_path"])
    setting = read_setting(args, own.world_size, own.gpu_memory_gb)
    found = forecast(setting)
    print(describe(setting, found))
    if own.gpu_memory_gb is not None:
        print(f"\n{advise(setting, found, own.gpu_memory_gb)}")
