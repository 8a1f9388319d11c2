"""Killed and resumed: the delta is that of a run that nobody disturbed.

To the bit on as many ranks as before, dropout included; on another number of ranks and at another
ZeRO stage within rounding.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from gem_ds.files.checkpoint import Checkpoint, list_checkpoints
from gem_ds.files.delta import Delta
from gem_ds.train import main as train
from gem_ds.train.reporting import Reporter
from tests.ranks import RankError, run_ranks
from tests.tiny_model import REPOSITORY, Tiny, mains, make_tiny

pytestmark = pytest.mark.slow  # starts engines or programs

NUM_STEPS = 10


def _zero(stage: int) -> str:
    return str(REPOSITORY / "ds_configs" / f"zero{stage}.json")


def _main_until_killed(flags: list[str], step: int, delay: float, victim: int) -> None:
    """On each rank: run until the ``victim`` is killed, ``delay`` seconds after a step begins."""
    advance = Reporter.advance

    def kill() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    def watch(reporter: Reporter, *results: float) -> None:
        advance(reporter, *results)
        if reporter._state.global_step == step:
            threading.Thread(target=kill).start()

    with mock.patch.object(
        Reporter, "advance", watch if int(os.environ["RANK"]) == victim else advance
    ):
        train.main(flags)


def _kill(world_size: int, flags: list[str], victim: int = 0) -> Path:
    """Start a run, kill it somewhere after its first checkpoint; returns its folder."""
    folder = Path(flags[flags.index("--output_dir") + 1])
    rng = random.Random(int.from_bytes(os.urandom(8), "little"))
    step, delay = rng.randint(3, 6), rng.uniform(0, 0.01)
    print(f"killing rank {victim} of {world_size} {delay:.4f} s into step {step + 1}")
    with pytest.raises(RankError, match=f"rank {victim} of .*exit code -{int(signal.SIGKILL)}"):
        run_ranks(world_size, _main_until_killed, flags, step, delay, victim)
    steps = list_checkpoints(folder)
    assert steps, "a checkpoint stands"
    for checkpoint in steps.values():
        Checkpoint.load(checkpoint)  # and each that stands is whole
    assert not (folder / "delta.safetensors").exists()
    return folder


def _values(folder: Path) -> dict[str, torch.Tensor]:
    return Delta.load(folder / "delta.safetensors").values


def _losses(folder: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def _flags(tiny: Tiny, name: str, stage: int, **values: Any) -> list[str]:
    defaults = {
        "max_steps": NUM_STEPS,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "deepspeed": _zero(stage),
        "warmup_steps": 3,
        "weight_decay": 0.01,
    }
    return tiny.flags(tiny.folder / name, **defaults | values)


@pytest.mark.parametrize(("world_size", "stage"), [(2, 3)])
def test_a_killed_run_ends_as_if_it_had_not_been(tiny, world_size, stage):
    """With dropout, whose noise must be drawn again as it was."""
    model = tiny.variant(f"dropout{world_size}", attention_dropout=0.2)
    names = [f"{kind}{world_size}" for kind in ("whole", "killed", "sober")]
    whole, killed, sober = (_flags(tiny, n, stage, model_name_or_path=model) for n in names)
    folder = _kill(world_size, killed, victim=world_size - 1)
    resume = [*killed, "--resume_from_checkpoint", "last"]
    sober[sober.index("--model_name_or_path") + 1] = str(tiny.model)
    run_ranks(world_size, mains, resume, whole, sober)
    expected, found = _values(tiny.folder / names[0]), _values(folder)
    for name, values in expected.items():
        assert torch.equal(found[name], values), name
    assert _losses(folder) == _losses(tiny.folder / names[0]), "every step stands there once"
    assert [step for step, _ in _losses(folder)] == list(range(1, NUM_STEPS + 1))
    assert _losses(tiny.folder / names[2]) != _losses(folder), "dropout was at work"


@pytest.fixture(scope="module")
def interrupted(tiny: Tiny) -> Path:
    """A run of two ranks at stage 3, whole in one folder; the name of another one, killed."""
    run_ranks(2, mains, _flags(tiny, "undisturbed", 3))
    return _kill(2, _flags(tiny, "interrupted", 3))


@pytest.mark.parametrize(
    ("world_size", "stage", "micro_batch_size", "accumulation"),
    [(3, 2, 2, 1), (1, 0, 2, 2)],
)
def test_a_run_goes_on_on_other_ranks_at_another_stage(
    tiny, interrupted, world_size, stage, micro_batch_size, accumulation
):
    """In steps of the examples that the checkpoint had, whatever the flags make of them now."""
    name = f"moved_{world_size}_{stage}"
    shutil.copytree(interrupted, tiny.folder / name)
    values = {
        "per_device_train_batch_size": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "resume_from_checkpoint": "last",
    }
    out, *others = run_ranks(world_size, mains, _flags(tiny, name, stage, **values))
    assert not any(others), "rank 0 alone speaks"
    assert "with 4 examples per step, as before" in out
    now = micro_batch_size * accumulation * world_size
    assert (f"not the {now} of the flags" in out) == (now != 4)
    expected, found = _values(tiny.folder / "undisturbed"), _values(tiny.folder / name)
    base = Checkpoint.load(interrupted / "checkpoint-2").mask.indices
    assert found.keys() == expected.keys() == base.keys()
    for weight, values in expected.items():
        torch.testing.assert_close(found[weight], values, rtol=1e-5, atol=1e-7)
    for (step, loss), (step_before, loss_before) in zip(
        _losses(tiny.folder / name), _losses(tiny.folder / "undisturbed"), strict=True
    ):
        assert step == step_before
        assert loss == pytest.approx(loss_before, rel=1e-5)
