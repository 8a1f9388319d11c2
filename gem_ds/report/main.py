"""The report of a run: ``gem-ds report runs/x`` writes runs/x/report.html."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from gem_ds.files.atomic import save_text
from gem_ds.files.delta import Delta
from gem_ds.files.manifest import claim
from gem_ds.files.mask import Mask
from gem_ds.flags import name_of
from gem_ds.models.weight_files import map_model, name_in_files
from gem_ds.report.page import page
from gem_ds.report.spread import moves

REPORT = "report.html"


def main(argv: Sequence[str] | None = None) -> None:
    """The program; raises what `write_report` does."""
    parser = argparse.ArgumentParser(
        prog=name_of("report"), description="Show a run as a page: where its entries lie, curves."
    )
    parser.add_argument("run", type=Path, help="folder of a run of gem-ds train")
    base_help = "base model, for how far values moved (default: the run's, if it is on this disk)"
    parser.add_argument("--model_name_or_path", help=base_help)
    args = parser.parse_args(argv)
    if not args.run.is_dir():
        raise ValueError(f"{args.run} is no folder: pass that of a run.")
    print(f"wrote {write_report(args.run, args.model_name_or_path)}")


def write_report(
    folder: Path, base_model: str | None = None, base: Mapping[str, Tensor] | None = None
) -> Path:
    """Writes ``report.html`` into a run's folder, and returns its path.

    Args:
        folder: The run's; what it does not hold is not told.
        base_model: Folder or Hub name of the base; default: the one that the mask names, where it
            lies on this disk.
        base: By weight the base's values at the mask's entries, where they are known already.

    Raises:
        ValueError: The folder holds no run, one of its files is damaged, or the base is another.
    """
    delta, mask = _entries(folder)
    state, results = (_json(folder / name) for name in ("trainer_state.json", "all_results.json"))
    if mask is None and not state:
        raise ValueError(f"{folder} holds no run: there is no mask and no trainer_state.json.")
    found, no_moves = None, "There is no delta: nothing was trained."
    if delta is not None:
        if base is None:
            base, no_moves = _base_of(delta.mask, base_model)
        found = None if base is None else moves(delta.values, base)
    metrics = results.pop("eval_metrics", {})
    text = page(
        _title(folder, mask),
        _facts(mask, delta, metrics),
        mask=mask,
        moves=found,
        no_moves=no_moves,
        history=state.get("log_history", []),
        results=metrics | results,
        settings=({} if mask is None else mask.settings) | state.get("settings", {}),
    )
    path = claim(folder, REPORT)
    save_text(path, text)
    return path


def _entries(folder: Path) -> tuple[Delta | None, Mask | None]:
    if (folder / "delta.safetensors").is_file():
        delta = Delta.load(folder / "delta.safetensors")
        return delta, delta.mask
    path = folder / "mask.safetensors"
    return None, Mask.load(path) if path.is_file() else None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (no JSON object): copy it again.")
    return found


def _base_of(mask: Mask, given: str | None) -> tuple[dict[str, Tensor] | None, str]:
    """The base's values at the entries, or why there are none."""
    name = given or mask.base_model
    if given is None and not Path(name).is_dir():
        try:  # what lies here; nothing is fetched
            name = snapshot_download(name, revision=mask.revision, local_files_only=True)
        except (OSError, ValueError):
            return None, f"The base model {name} is not on this disk: pass --model_name_or_path."
    try:
        tensors = map_model(name, mask.revision if given == mask.base_model else None)
    except ValueError as error:
        if given is not None:
            raise
        return None, f"The base model cannot be read ({error}): pass --model_name_or_path."
    values = {}
    for weight, indices in mask.indices.items():
        if (found := name_in_files(weight, tensors)) is None:
            return None, f"The files of {name} have no {weight} by that name."
        if tuple(tensors[found].shape) != mask.weights[weight].shape:
            return None, f"The files of {name} have {weight} in another shape than the base had."
        dtype = getattr(torch, mask.weights[weight].dtype)
        values[weight] = tensors[found].reshape(-1)[indices.long()].to(dtype)
    if given is not None:
        mask.check_base(values, "delta")
    elif mask.differing_weights(values):
        return None, f"The files of {name} hold other numbers than the base had."
    return values, ""


def _title(folder: Path, mask: Mask | None) -> str:
    if mask is None:
        return folder.resolve().name
    task = mask.settings.get("task")
    return f"{Path(mask.base_model).name}{f' on {task}' if task else ''}: {mask.method}"


def _facts(mask: Mask | None, delta: Delta | None, metrics: Mapping[str, float]) -> dict[str, str]:
    facts = {f"held-out {name}": f"{value:.4g}" for name, value in metrics.items()}
    if mask is not None:
        total = mask.num_entries
        facts |= {
            "selected entries": f"{mask.num_selected:,}",
            f"of {total:,} in {len(mask.weights)} weights": f"{mask.num_selected / total:.3%}",
            "method": mask.method,
            "base model": mask.base_model + (f" at {mask.revision}" if mask.revision else ""),
        }
    if delta is not None and delta.head:
        size = sum(parameter.numel() for parameter in delta.head.values())
        facts["trained beside, in a head"] = f"{size:,}"
    return facts
