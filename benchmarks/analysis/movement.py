"""How far trained entries have moved, relative to what they were and to their matrix.

LoRA changes a weight by the product of its factors. Of it and of full fine-tuning every 17th entry
is looked at, and of the latter those matrices alone that masks are for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from safetensors.torch import load_file
from steps.table import markdown
from torch import Tensor
from transformers import AutoConfig

from gem_ds.files.delta import Delta
from gem_ds.models.encoders import auto_class

from .figures import look, panels, set_scale
from .runs import FinishedRun

QUANTILES = (0.1, 0.5, 0.9)
STRIDE = 17

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Movement:
    """Of trained entries, fp64 [entries], in root mean squares of their matrix."""

    weight: np.ndarray  # before training
    change: np.ndarray  # by training

    @property
    def relative(self) -> np.ndarray:
        """|change| / |weight|: 0 where nothing changed, infinite where the weight was 0."""
        size, change = abs(self.weight), abs(self.change)
        ratio = np.divide(change, size, out=np.full_like(size, np.inf), where=size > 0)
        return np.where(change == 0, 0.0, ratio)

    @property
    def is_turned(self) -> np.ndarray:
        """Whether the sign is another one."""
        turned: np.ndarray = self.weight * (self.weight + self.change) < 0
        return turned


def parameters_of(model: str | Path) -> Parameters:
    """The weights of a model by name, in the dtype of its files."""
    config = AutoConfig.from_pretrained(model)
    loaded = auto_class(config).from_pretrained(model, dtype="auto")
    return {name: p.detach() for name, p in loaded.named_parameters(remove_duplicate=False)}


def movement_of(
    runs: Sequence[FinishedRun], base: Parameters, targets: Sequence[str]
) -> Movement | None:
    """Of one method's runs together; None where none has left its weights."""
    pairs = [pair for run in runs for pair in _changes(run.folder, base, targets)]
    if not pairs:
        return None
    weight, change = (np.concatenate(part) for part in zip(*pairs, strict=True))
    return Movement(weight=weight, change=change)


def _changes(
    folder: Path, base: Parameters, targets: Sequence[str]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """By matrix the weights of trained entries and their changes, in its root mean squares."""
    if (folder / "delta.safetensors").exists():
        delta = Delta.load(folder / "delta.safetensors")
        for name, values in delta.values.items():
            index = delta.mask.indices[name].long()
            old = base[name].to(values.dtype).flatten()[index].float()
            yield _in_rms(base[name], values.float() - old, index)
    elif (folder / "adapter").exists():
        for name, change in _products(folder / "adapter"):
            yield _in_rms(base[name], change.flatten()[::STRIDE])
    elif (folder / "model").exists():
        tuned = parameters_of(folder / "model")
        for name in targets:
            change = tuned[name].float() - base[name].to(tuned[name].dtype).float()
            yield _in_rms(base[name], change.flatten()[::STRIDE])


def _in_rms(
    whole: Tensor, change: Tensor, index: Tensor | slice = slice(None, None, STRIDE)
) -> tuple[np.ndarray, np.ndarray]:
    """Entries of a matrix and their changes [entries], in its root mean square."""
    whole = whole.double()
    rms = whole.square().mean().sqrt()
    return (whole.flatten()[index] / rms).numpy(), (change.double() / rms).numpy()


def _products(adapter: Path) -> Iterator[tuple[str, Tensor]]:
    """What LoRA adds to each weight."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    weights = load_file(adapter / "adapter_model.safetensors")
    end = ".lora_B.weight"
    for key, b in weights.items():
        if key.endswith(end):
            a = weights[key.replace("lora_B", "lora_A")].float()
            name = key.removeprefix("base_model.model.").removesuffix(end) + ".weight"
            yield name, b.float() @ a * (config["lora_alpha"] / config["r"])


def movement_table(movements: Mapping[str, Movement]) -> str:
    """Of one task: quantiles by method."""
    titles = ", ".join(f"{q:.0%}" for q in QUANTILES)
    rows = []
    for method, moved in movements.items():
        row = {"method": method, "changed": f"{(moved.change != 0).mean():.1%}"}
        for title, values in (
            ("\\|w\\| / rms", abs(moved.weight)),
            ("change / \\|w\\|", moved.relative),
            ("change / rms", abs(moved.change)),
        ):
            numbers = np.quantile(values, QUANTILES, method="inverted_cdf")  # of infinities too
            row[f"{title}: {titles}"] = ", ".join(f"{number:.2g}" for number in numbers)
        row["sign turned"] = f"{moved.is_turned.mean():.1%}"
        rows.append(row)
    return markdown(rows) if rows else ""


def movement_figure(tasks: Mapping[str, Mapping[str, Movement]]) -> Figure:
    """Quantile curves: relative to the weight itself above, to its matrix below."""
    kinds = ("change / |w|", "change / rms(w)")
    figure, axes = panels(kinds, list(tasks), [m for moved in tasks.values() for m in moved])
    shares = np.linspace(0.01, 0.99, 99)
    for task, movements in tasks.items():
        for method, moved in movements.items():
            for kind, values in zip(kinds, (moved.relative, abs(moved.change)), strict=True):
                curve = np.quantile(values, shares, method="inverted_cdf")
                curve[(curve == 0) | ~np.isfinite(curve)] = np.nan  # not on a logarithmic axis
                style = look(method) | {"markevery": 14, "ms": 5}
                axes[kind, task].plot(100 * shares, curve, **style)
        for kind in kinds:
            axes[kind, task].set(ylabel=kind, xlabel="entries (%), in order", title=task)
            set_scale(axes[kind, task])
    return figure
