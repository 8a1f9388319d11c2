"""What a selection looks like, for people: where the budget went, and what is trained."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable

import torch

from gem_ds.calibration.gradients import buffered_layers
from gem_ds.files.mask import dtype_name
from gem_ds.select.rules import CALIBRATED_METHODS
from gem_ds.select.selection import Selection
from gem_ds.select.shards import chunks
from gem_ds.train.dense_tuning import DenseTuning
from gem_ds.train.sparse_tuning import SparseTuning

#: A selected weight below this is reported as nearly zero (a pretrained weight is about 0.02).
NEARLY_ZERO = 1e-4

#: More layers than these are told together with their likes: 210 lines tell nobody anything.
MOST_ROWS = 40


def describe(tuning: SparseTuning | DenseTuning, say: Callable[[str], None]) -> dict[str, float]:
    """Say what will be trained; returns the numbers of it for the log."""
    targets, mask = tuning.prepared.targets, tuning.prepared.mask
    if isinstance(tuning, DenseTuning):
        with_head = " and with them the head" if tuning.head else ""
        size = f"the base model has {targets.num_parameters:,}"
        say(f"Training {tuning.num_trainable:,} parameters{with_head}; {size}")
        return {"num_trainable": tuning.num_trainable}
    if tuning.selection is not None:
        _describe_calibration(tuning, tuning.selection, say)
    dtype = dtype_name(tuning.engine.dtype)
    if mask is not None and mask.dtype != dtype:
        say(
            f"The mask was made in {mask.dtype} and this run is in {dtype}, so it could not be "
            "checked that the base values are the same"
        )
    say(
        f"Training {targets.budget:,} of {targets.num_parameters:,} parameters "
        f"(density {targets.budget / targets.num_parameters:.4%})"
        + (f" and a head of {tuning.head.num_entries:,}" if tuning.head is not None else "")
        + f"; optimizer state on this rank: {tuning.engine.optimizer_state_bytes():,} bytes"
    )
    say(f"Kernels of the sampled gradient: {kernel_counts(tuning.entries.kernels())}")
    num_layers = effective_layers(i.numel() for i in tuning.entries.flat_indices)
    near_zero = sum((part.float().abs() < NEARLY_ZERO).sum() for part in chunks(tuning.base))
    near_zero = torch.as_tensor(near_zero, device=tuning.engine.device)
    num_near_zero = int(tuning.comm.all_reduce(near_zero, "sum"))
    say(
        f"The budget is as concentrated as if {num_layers:.1f} of the {len(tuning.layers)} layers "
        f"shared it equally; {num_near_zero:,} selected weights are nearly zero (below "
        f"{NEARLY_ZERO:g})"
    )
    numbers = {"effective_layers": num_layers, "selected_near_zero": num_near_zero}
    return numbers | {"num_trainable": tuning.num_trainable}


def _describe_calibration(
    tuning: SparseTuning, selection: Selection, say: Callable[[str], None]
) -> None:
    method = tuning.args.method
    is_calibrated = method.method in CALIBRATED_METHODS
    if tuning.head is not None and is_calibrated and method.head_steps:
        say(
            f"Calibrated with a head that was trained for {method.head_steps} steps "
            "(--calibration_head_steps); training starts from its first values"
        )
    decided = zip(tuning.layers, selection.budgets, selection.layer_scores, strict=True)
    rows = ((layer.name, layer.numel, budget, score) for layer, budget, score in decided)
    each = f" (each layer's part: gem-ds report {tuning.args.train.output_dir})"
    is_long = len(tuning.layers) > MOST_ROWS
    say(f"Where the budget went{each if is_long else ''}:\n{budget_table(rows)}")
    if "keep_zeros" in selection.settings:
        numels, num_zeros = [layer.numel for layer in tuning.layers], selection.num_zeros
        shares = [zeros / numel for zeros, numel in zip(num_zeros, numels, strict=True)]
        say(
            f"{sum(num_zeros):,} target weights ({sum(num_zeros) / sum(numels):.2%}; of a matrix "
            f"{min(shares):.2%} to {max(shares):.2%}) are exactly 0 and stay so; --keep_zeros "
            "false would train them too"
        )
    if is_calibrated and method.fixed_buffer_gb != 0:
        sizes = [tuning.engine.weights.partition_size(layer.weight) for layer in tuning.layers]
        num_buffered = len(buffered_layers(sizes, tuning.comm.world_size, tuning.buffer_gb))
        found = f": {tuning.buffer_gb:.3g} GB" if method.fixed_buffer_gb is None else ""
        say(
            f"{num_buffered} of {len(sizes)} target layers were buffered in calibration "
            f"(--calibration_buffer_gb {method.calibration_buffer_gb}{found})"
        )


def budget_table(rows: Iterable[tuple[str, int, int, float]]) -> str:
    """Where the budget went, a line per layer; of many one per kind, with sums over its layers."""
    rows = list(rows)
    shown = rows if len(rows) <= MOST_ROWS else _by_kind(rows)
    names, numels, budgets, scores = zip(*shown, strict=True)
    total, width = sum(budgets), max(map(len, names))

    def line(name: str, numel: int, budget: int, score: str) -> str:
        shares = f"{budget / numel:>8.3%}  {budget / total:>9.2%}"
        return f"{name:<{width}}  {numel:>12,}  {budget:>10,}  {shares}{score}"

    return "\n".join(
        [
            f"{'weight':<{width}}       entries    selected   density  of budget  score",
            *map(line, names, numels, budgets, (f"  {score:.3e}" for score in scores)),
            line("all targets", sum(numels), total, ""),
        ]
    )


def _by_kind(rows: Iterable[tuple[str, int, int, float]]) -> list[tuple[str, int, int, float]]:
    """The sums over layers whose names differ in a number only."""
    kinds: dict[str, tuple[int, int, float]] = {}
    for name, numel, budget, score in rows:
        kind = re.sub(r"\.\d+\.", ".*.", name)
        numels, budgets, scores = kinds.get(kind, (0, 0, 0.0))
        kinds[kind] = numels + numel, budgets + budget, scores + score
    return [(kind, *sums) for kind, sums in kinds.items()]


def effective_layers(budgets: Iterable[int]) -> float:
    """Over how many layers a budget is spread: the exponential of the entropy of its shares.

    Equal shares of L layers give L, everything in one layer gives 1.
    """
    positive = [budget for budget in budgets if budget]
    total = sum(positive)
    return math.exp(-sum(b / total * math.log(b / total) for b in positive))


def kernel_counts(kernels: Iterable[str]) -> str:
    """Which kernels serve how many layers: ``library (30 layers), gather (2)``."""
    (first, count), *others = Counter(kernels).most_common()
    text = f"{first} ({count} layer{'s' * (count > 1)})"
    return ", ".join([text, *(f"{kernel} ({count})" for kernel, count in others)])
