"""What of a folder a version without manifests wrote, told by what is in the files.

A folder of peft's or TensorBoard's, or a model's, does not tell: those stay.
"""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from gem_ds.files.checkpoint import CHECKPOINT_KIND, OPTIMIZER_FILE
from gem_ds.files.delta import DELTA_KIND
from gem_ds.files.manifest import delete_folder, is_ours, list_files
from gem_ds.files.mask import MASK_KIND
from gem_ds.files.tensors import METADATA_KEY

_CHECKPOINT = re.compile(r"checkpoint-\d+")
_LEFTOVER = re.compile(r"\.checkpoint-\d+(\.old|\.[0-9a-f]{8}\.(tmp|old))")

_KINDS = {
    "mask.safetensors": MASK_KIND,
    "delta.safetensors": DELTA_KIND,
    OPTIMIZER_FILE: CHECKPOINT_KIND,
}
_STATE = {"global_step", "max_steps", "log_history", "unlogged_losses"}
_RESULTS = {"num_trainable", "calibration_seconds", "optimizer_state_bytes"}
_CARD = "| `metrics.jsonl`, `trainer_state.json` | the course of the run |"


def adopt(output_dir: Path) -> None:
    """List what is recognised in manifests, and delete what a killed run left of a checkpoint."""
    for folder in output_dir.glob("*checkpoint-*"):
        is_leftover = _LEFTOVER.fullmatch(folder.name)
        if (is_leftover or _CHECKPOINT.fullmatch(folder.name)) and is_old_checkpoint(folder):
            list_files(folder, [path.name for path in folder.iterdir()])
            if is_leftover:
                delete_folder(folder)
    if names := old_files(output_dir):
        list_files(output_dir, names)


def old_files(output_dir: Path) -> list[str]:
    """Names of the files in a folder that a run wrote."""
    if is_ours(output_dir):
        return []
    results = _object(_text(output_dir / "all_results.json")).keys()
    is_finished, predictions = results >= _RESULTS, output_dir / "predictions.jsonl"
    found = {
        "mask.safetensors": _is_ours(output_dir, "mask.safetensors"),
        "delta.safetensors": _is_ours(output_dir, "delta.safetensors"),
        "trainer_state.json": _is_state(output_dir / "trainer_state.json"),
        "metrics.jsonl": _is_log(output_dir / "metrics.jsonl"),
        "all_results.json": is_finished,
        "predictions.jsonl": is_finished and "eval_metrics" in results and predictions.is_file(),
        "README.md": is_finished and _CARD in _text(output_dir / "README.md"),
    }
    return [name for name, is_own in found.items() if is_own]


def is_old_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a checkpoint, or a part of one, and nothing else."""
    if is_ours(folder) or folder.is_symlink() or not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    state = "trainer_state.json"
    is_state = state not in names or _is_state(folder / state)
    return bool(names) and is_state and all(_is_ours(folder, name) for name in names - {state})


def _is_log(path: Path) -> bool:
    """Whether its first line is what a run says of itself; an empty one is nobody's loss."""
    line = _text(path).partition("\n")[0]
    if not line:
        return path.is_file() and not path.is_symlink() and path.stat().st_size == 0
    return {"step", "epoch", "num_trainable"} <= _object(line).keys()


def _is_ours(folder: Path, name: str) -> bool:
    """Whether a safetensors file of a run holds what its name says."""
    try:
        with safe_open(folder / name, framework="pt") as file:
            header = json.loads((file.metadata() or {})[METADATA_KEY])
        return (
            name in _KINDS and header["kind"] == _KINDS[name] and not (folder / name).is_symlink()
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _is_state(path: Path) -> bool:
    return _object(_text(path)).keys() >= _STATE


def _object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _text(path: Path) -> str:
    """What is in a file; nothing where there is none, or a link, or no text."""
    try:
        return "" if path.is_symlink() else path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
