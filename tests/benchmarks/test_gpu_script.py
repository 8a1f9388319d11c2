"""What is worth measuring on a GPU, tried on a CPU: `benchmarks/gpu.sh`."""

import os
import stat
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

from gem_ds.train.arguments import parse_arguments
from tests.tiny_model import REPOSITORY

SCRIPT = ["bash", "benchmarks/gpu.sh"]
SECTIONS = ["kernels", "llama-3-1b", "llama-3-8b", "zero3", "demo", "calibration", "tests"]


def _stand_in(folder: Path, failing: str) -> Path:
    """An interpreter that notes down its arguments and fails where they name a program."""
    path = folder / "python"
    path.write_text(
        f'#!/bin/bash\nprintf "%s\\037" "$@" >>{folder}/calls\necho >>{folder}/calls\n'
        f'echo "a warning" >&2\n[[ $1 != *{failing}* ]]\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_section_that_fails_leaves_the_others_and_all_flags_exist(tmp_path, monkeypatch):
    found = subprocess.run(
        [*SCRIPT, str(tmp_path / "out")],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHON": str(_stand_in(tmp_path, "step.py"))},
        capture_output=True,
        text=True,
    )
    told = [line.split()[:2] for line in found.stdout.splitlines() if not line.startswith(" ")]
    failing = ("llama-3-1b", "llama-3-8b", "zero3")
    expected = [[name, "FAILED" if name in failing else "done"] for name in SECTIONS]
    assert [line for line in told if line[0] != "real"] == expected
    assert (found.returncode, found.stderr) == (1, "")
    calls = [line.split("\037")[:-1] for line in (tmp_path / "calls").read_text().splitlines()]
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    for program, *flags in calls:
        if program == "launch/train.py":
            parse_arguments(flags)
        elif program == "benchmarks/step.py":
            import_module("step").parsed(flags)
        elif program.startswith("benchmarks/"):
            name = program.removeprefix("benchmarks/").removesuffix(".py")
            import_module(name).parser().parse_args(flags)


@pytest.mark.slow
def test_a_dry_run(tmp_path):
    """Of a section of each program, in tiny sizes; but for the trainer, which others start so."""
    wanted = ["kernels", "zero3", "calibration"]
    found = subprocess.run(
        [*SCRIPT, str(tmp_path), *wanted],
        cwd=REPOSITORY,
        env=os.environ
        | {"DRY_RUN": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "LIMIT": "300"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert [line.split()[:2] for line in found.stdout.splitlines()] == [
        [name, "done"] for name in wanted
    ]
    assert "| gem |" in (tmp_path / "zero3" / "table.md").read_text()
    assert "tiled*" in (tmp_path / "kernels.txt").read_text()
    assert "calibration and selection" in (tmp_path / "calibration.txt").read_text()
