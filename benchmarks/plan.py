"""Whether `launch/plan.py` foretells what is measured, and what it foretells of large models.

    python benchmarks/plan.py [--output plan.md]                # against measurements, here
    python benchmarks/plan.py --large [NAME ...] [--output plan_large.md]  # nothing is run

Measured is what `benchmarks/step.py` reports of a contender; ranks are processes of this machine.
Of two numbers the first is foretold, the second measured.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import transformers
from steps import flags_of
from steps.ranks import needs_of
from steps.shapes import SHAPES
from steps.table import markdown
from steps.training import Training

from gem_ds.distributed.zero_config import read_config
from gem_ds.planning.advice import fits, least_change
from gem_ds.planning.forecast import Forecast, forecast
from gem_ds.planning.main import read_setting
from gem_ds.planning.subject import Setting
from gem_ds.train.arguments import parse_arguments

GB = 1e9
METHODS = ("gem", "lora", "full")
CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"


#: What runs here.
CASES = tuple(
    Training(batch_size=2, batches=3, **case)  # ZeRO 3 gathers ahead once it knows the order
    for case in (
        {"world_size": 1, "stage": 0},
        {"world_size": 1, "stage": 0, "gradient_checkpointing": True},
        {"world_size": 1, "stage": 3, "dtype": "bf16"},
        {"world_size": 2, "stage": 0},
        {"world_size": 2, "stage": 1},
        {"world_size": 2, "stage": 2, "dtype": "bf16"},
        {"world_size": 2, "stage": 3},
        {"world_size": 2, "stage": 3, "dtype": "bf16", "gradient_checkpointing": True},
        {"world_size": 4, "stage": 0, "layers": 4},
        {"world_size": 4, "stage": 3, "layers": 4},
        {"world_size": 1, "stage": 0, "dtype": "bf16", "shape": "llama-7b", "layers": 2},
        {"world_size": 2, "stage": 3, "dtype": "bf16", "shape": "llama-7b", "layers": 2},
    )
)

#: By their names in the table.
LARGE = {"7B": "llama-7b", "13B": "llama-13b", "70B": "llama-70b", "405B": "llama-405b"}
#: Mixtures, whose experts are targets of `gem`; `lora` has no adapter for them.
MIXTURES = {
    "Qwen3-30B-A3B": "qwen3-30b-a3b",
    "gpt-oss-120b": "gpt-oss-120b",
    "DeepSeek-V3": "deepseek-v3",
}
WORLD_SIZES = (8, 64, 1024)


def measured_rows() -> Iterator[dict[str, str]]:
    """Run every case with every method; the foretold beside the measured."""
    for case in CASES:
        told = f"{case.world_size} x ZeRO {case.stage}, {case.dtype}"
        told += ", checkpointing" if case.gradient_checkpointing else ""
        told += f", {case.shape} of {case.layers} layers" if case.layers else ""
        with tempfile.TemporaryDirectory() as folder:
            for method, flags in case.flags(METHODS, Path(folder)).items():
                found = needs_of(method, flags, case.world_size)
                setting = read_setting(
                    parse_arguments([*flags, "--output_dir", folder]), case.world_size, on_cpu=True
                )
                yield {"": told, "method": method} | _compare(forecast(setting), found)


def _compare(told: Forecast, found: dict[str, Any]) -> dict[str, str]:
    def pair(foretold: int, measured: int, unit: float, digits: int) -> str:
        if not foretold and not measured:
            return ""
        texts = f"{foretold / unit:,.{digits}f}", f"{measured / unit:,.{digits}f}"
        error = f"{foretold / measured - 1:+.1%}" if measured else "measured none"
        return f"{texts[0]} / {texts[1]} ({error})"

    calibration = sum(told.calibration.values())
    return {
        "peak of a step, MB": pair(sum(told.training.values()), found["peak_bytes"], 1e6, 0),
        "of calibration, MB": pair(calibration, found["calibration_peak_bytes"], 1e6, 0)
        if calibration
        else "",
        "state, kB": pair(told.state, found["state_bytes"], 1e3, 0),
        "weight gathers, MB": pair(told.weight_gathers, found["weights"], 1e6, 1),
        "other messages, kB": pair(told.step_messages, found["others"], 1e3, 0),
    }


def large_rows(names: Sequence[str]) -> Iterator[dict[str, str]]:
    """What large models need on GPUs of 80 GB: ZeRO 3, bf16, activations recomputed."""
    for name in names:
        config = SHAPES[(LARGE | MIXTURES)[name]](None)
        for method in ("gem", "full") if name in MIXTURES else METHODS:
            flags = f"--model_name_or_path {name} --method {method} --lora_r 16 --max_length 2048"
            flags += " --per_device_train_batch_size 1 --per_device_eval_batch_size 1"
            flags += " --bf16 --gradient_checkpointing"
            if name in MIXTURES and method == "gem":
                flags += " --target_modules all-linear"
            args = parse_arguments(flags.split(), needed=[])
            for world_size in WORLD_SIZES:
                setting = Setting(
                    args=args,
                    config=config,
                    deepspeed=read_config(CONFIGS / "zero3.json"),
                    world_size=world_size,
                )
                print(name, method, world_size, file=sys.stderr, flush=True)
                yield _large_row(name, setting)


def _large_row(name: str, setting: Setting) -> dict[str, str]:
    told = forecast(setting)
    answer = "yes"
    if not fits(told, 80 * GB):
        change = least_change(setting, 80 * GB)
        answer = "no" if change is None else f"with {', '.join(change[0])}"
    return {
        "model": name,
        "method": setting.args.method.method,
        "GPUs": f"{setting.world_size:,}",
        "trained": f"{told.num_trained:,}",
        "peak of a step, GB": f"{sum(told.training.values()) / GB:.1f}",
        "of calibration": f"{sum(told.calibration.values()) / GB:.1f}" if told.calibration else "",
        "weights": f"{told.training['weights'] / GB:.2f}",
        "masters and moments": f"{told.training['masters and moments'] / GB:.3f}",
        "gathers of a micro-batch, GB": f"{told.weight_gathers / GB:,.0f}",
        "other messages of a step, GB": f"{told.step_messages / GB:.3f}",
        "fits 80 GB": answer,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table, and write it where --output says."""
    parser = flags_of("plan", __doc__)
    names = [*LARGE, *MIXTURES]
    parser.add_argument("--large", nargs="*", metavar="NAME", help=f"some of {', '.join(names)}")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    rows = []
    for row in measured_rows() if args.large is None else large_rows(args.large or names):
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    print(table := markdown(rows))
    if args.output:
        args.output.write_text(f"{table}\n")


if __name__ == "__main__":
    main()
