"""Killed and resumed: the delta is that of a run that nobody disturbed, to the bit, with dropout.

On another number of ranks, and with a head, it is test_methods that resumes.
"""

import os
import random
import signal
import threading
import time
from pathlib import Path
from unittest import mock

import pytest

from gem_ds.files.checkpoint import Checkpoint, list_checkpoints
from gem_ds.train import fit
from gem_ds.train import main as train
from gem_ds.train.reporting import Reporter
from tests.ranks import RankError, run_ranks
from tests.runs import assert_same_delta, logged
from tests.tiny_model import REPOSITORY, mains, make_tiny, one_rank

pytestmark = pytest.mark.slow  # starts engines or programs

NUM_STEPS = 10


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


def _killed(flags: list[str]) -> Path:
    """Two ranks, until one is killed at a random moment; its folder."""
    rng = random.Random(int.from_bytes(os.urandom(8), "little"))
    step, delay = rng.randint(3, 6), rng.uniform(0, 0.01)
    print(f"killing rank 1 {delay:.4f} s into step {step + 1}")
    with pytest.raises(RankError, match=f"rank 1 of .*exit code -{int(signal.SIGKILL)}"):
        run_ranks(2, _main_until_killed, flags, step, delay, 1)
    folder = Path(flags[flags.index("--output_dir") + 1])
    steps = list_checkpoints(folder)
    assert steps, "a checkpoint stands"
    for checkpoint in steps.values():
        Checkpoint.load(checkpoint)  # and each that stands is whole
    assert not (folder / "delta.safetensors").exists()
    return folder


def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path):
    """With dropout, whose noise must be drawn as it was in both passes of SAM, as must layers.

    And of a mixture, its experts, its routers' loss.
    """
    tiny = make_tiny(tmp_path)
    settings = {"max_steps": NUM_STEPS, "save_steps": 2, "logging_steps": 1, "warmup_steps": 3}
    settings |= {"per_device_train_batch_size": 2, "weight_decay": 0.01}
    settings |= {"deepspeed": REPOSITORY / "ds_configs" / "zero3.json"}
    settings |= {"sam_rho": 0.05, "sam_layers": 0.5}
    runs = {
        "llama": settings | {"model_name_or_path": tiny.variant("dropout", attention_dropout=0.2)},
        "mixture": settings | {"model_name_or_path": tiny.mixture(), "target_modules": "experts"},
    }
    aside = {"model_name_or_path": tiny.mixture("aside", output_router_logits=False)}
    commands = [tiny.flags(tmp_path / "sober", **settings)]
    commands.append(tiny.flags(tmp_path / "without", **runs["mixture"] | aside))
    for name, run in runs.items():
        killed = _killed(tiny.flags(tmp_path / name, **run))
        commands.append(tiny.flags(killed, **run, resume_from_checkpoint="last"))
        commands.append(tiny.flags(tmp_path / f"whole {name}", **run))
    run_ranks(2, mains, *commands)
    for name in runs:
        killed, whole = tmp_path / name, tmp_path / f"whole {name}"
        assert_same_delta(killed, whole)
        assert logged(killed, "loss") == logged(whole, "loss"), "every step stands there once"
        assert [step for step, _ in logged(killed, "loss")] == list(range(1, NUM_STEPS + 1))
    for other, name in (("sober", "llama"), ("without", "mixture")):
        different = logged(tmp_path / other, "loss") != logged(tmp_path / name, "loss")
        assert different, "dropout was at work, and the routers' loss"


def test_an_evaluation_that_a_signal_came_before_is_made_when_the_run_goes_on(tmp_path):
    """Its numbers are those of a run that nothing stopped."""
    tiny, own = make_tiny(tmp_path), fit.seed_noise

    def signalled(seed: int, step: int, rank: int) -> None:
        own(seed, step, rank)
        if step == 1:
            signal.raise_signal(signal.SIGTERM)

    flags = {"max_steps": 4, "eval_steps": 2}
    with one_rank():
        train.main(tiny.flags(tmp_path / "whole", **flags))
        with mock.patch.object(fit, "seed_noise", signalled):
            train.main(tiny.flags(tmp_path / "stopped", **flags))
        stopped = logged(tmp_path / "stopped", "eval_loss")
        train.main(tiny.flags(tmp_path / "stopped", resume_from_checkpoint="last", **flags))
    assert [step for step, _ in logged(tmp_path / "whole", "eval_loss")] == [0, 2, 4]
    assert stopped == logged(tmp_path / "whole", "eval_loss")[:1]
    assert logged(tmp_path / "stopped", "eval_loss") == logged(tmp_path / "whole", "eval_loss")
