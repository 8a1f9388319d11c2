"""The best model is delivered, not the last; signals end a run after its step."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from gem_ds.files.checkpoint import list_checkpoints
from gem_ds.train import main as train
from gem_ds.train import signals
from gem_ds.train.best import BestModel, refuse_unmeasured
from gem_ds.train.config import TrainArguments
from gem_ds.train.signals import stop_signals
from tests.ranks import run_ranks
from tests.runs import assert_same_delta, delta_of, logged
from tests.tiny_model import REPOSITORY, Tiny, mains, one_rank
from tests.tiny_tasks import NAMES, task_of


def _entries(metric: str, values: list[float]) -> list[dict[str, Any]]:
    return [{"step": step, metric: value} for step, value in enumerate(values)] + [{"step": 9}]


@pytest.mark.parametrize(
    ("flags", "values", "expected"),
    [
        ({}, [0.1, 3.0, 2.0, 2.0, 4.0], 2),  # the first of equals; step 0 was before training
        ({"greater_is_better": True}, [0.1, 3.0, 2.0, 4.0], 3),
        ({"metric_for_best_model": "loss"}, [9.0, 5.0, float("nan"), 4.0], 3),
        ({"metric_for_best_model": "accuracy"}, [1.0, 0.5, 0.75, 0.75], 2),
        ({"metric_for_best_model": "eval_f1", "greater_is_better": False}, [0.0, 0.5, 0.2], 2),
        ({}, [1.0], None),
        ({}, [1.0, float("inf")], None),
    ],
)
def test_the_best_step_by_hand(flags, values, expected):
    best = BestModel.of_flags(TrainArguments(load_best_model_at_end=True, **flags))
    assert best is not None
    assert best.step(_entries(best.metric, values)) == expected
    assert best.step(_entries(best.metric, values), [1, 7]) in (None, 1)
    assert BestModel.of_flags(TrainArguments(**flags)) is None


def test_a_best_model_needs_held_out_examples():
    objective: Any = mock.Mock(predictor=None)
    for flags in (TrainArguments(), TrainArguments(metric_for_best_model="f1")):
        refuse_unmeasured(flags, "rte", objective, 0)
    with pytest.raises(ValueError, match="needs held-out examples"):
        refuse_unmeasured(TrainArguments(load_best_model_at_end=True), "rte", objective, 0)


ZERO = REPOSITORY / "ds_configs"
STEPS = {"learning_rate": 1.0, "lr_scheduler_type": "constant", "max_steps": 6, "eval_steps": 1}


def _evaluated(folder: Path, key: str = "eval_loss") -> dict[int, float]:
    """By step, but what was before training."""
    return {step: value for step, value in logged(folder, key) if step}


#: Methods that train whole parameters, by the ranks: method, ZeRO stage.
DENSE = {1: [("lora", 0), ("full", 1)], 2: [("full", 3), ("lora", 2)]}


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "stage", "dtype"), [(1, 0, "bf16"), (2, 3, "fp32")])
def test_the_delta_is_that_of_the_best_step(tiny, tmp_path, world_size, stage, dtype):
    """A run to that step alone leaves the same delta, to the bit, and so does one stopped later.

    The losses fall, so the worst is asked for, which comes early.
    """
    flags = STEPS | {"deepspeed": ZERO / f"zero{stage}.json", "save_steps": 100}
    flags |= {"per_device_train_batch_size": 4 // world_size}
    switches = ["--bf16"] if dtype == "bf16" else []
    best = [*switches, "--load_best_model_at_end", "--greater_is_better=true"]
    run, resumed, last = (tmp_path / name for name in ("run", "resumed", "last"))
    resume = {"resume_from_checkpoint": "last"}
    run_ranks(
        world_size,
        mains,
        tiny.flags(run, *best, **flags),
        tiny.flags(resumed, *best, **flags | {"max_steps": 4, "save_total_limit": 1}),
        tiny.flags(resumed, *best, **flags | resume | {"save_total_limit": 1}),
        tiny.flags(last, *switches, **flags),
        *_dense(tiny, tmp_path, world_size, flags, best, switches),
    )
    for method, _ in DENSE[world_size]:
        _check_dense(tmp_path / method, tmp_path / f"{method}_at")
    losses = _evaluated(run)
    step = max(losses, key=losses.__getitem__)
    assert step != 6, "the last must not be the best here"
    assert losses == _evaluated(last), "what is delivered changes no step"
    run_ranks(
        world_size, mains, tiny.flags(tmp_path / "to", *switches, **flags | {"max_steps": step})
    )
    for folder in (run, resumed):
        assert_same_delta(folder, tmp_path / "to")
    of_last, to = (delta_of(folder).values for folder in (last, tmp_path / "to"))
    assert of_last.keys() == to.keys()
    assert any(bool((of_last[name] != values).any()) for name, values in to.items())
    results = json.loads((run / "all_results.json").read_text())
    assert results["best_global_step"] == step
    assert results["last_eval_loss"] == losses[step], "that of the model that is delivered"
    assert results["global_step"] == 6
    new_bests = [i for i in losses if all(losses[j] < losses[i] for j in range(1, i))]
    assert set(list_checkpoints(run)) == {*new_bests, 6}
    assert set(list_checkpoints(resumed)) == {step, 6}, "the best stays, whatever the limit"


def _dense(
    tiny: Tiny,
    folder: Path,
    world_size: int,
    flags: dict[str, Any],
    best: list[str],
    switches: list[str],
) -> Iterator[list[str]]:
    """Runs whose best model is that of the first step, and runs that stop at its checkpoint."""
    for method, stage in DENSE[world_size]:
        own = flags | {"method": method, "deepspeed": ZERO / f"zero{stage}.json", "max_steps": 3}
        own["learning_rate"] = 0.01
        yield tiny.flags(folder / method, *best, **own)
        at = {"max_steps": 1, "resume_from_checkpoint": folder / method / "checkpoint-1"}
        yield tiny.flags(folder / f"{method}_at", *switches, **own | at)


def _check_dense(run: Path, at: Path) -> None:
    """The same bits, whichever way there: the files of the product, and the loss that is told."""
    losses = _evaluated(run)
    assert max(losses, key=losses.__getitem__) == 1, "the losses fall"
    results = json.loads((run / "all_results.json").read_text())
    assert (results["best_global_step"], results["last_eval_loss"]) == (1, losses[1])
    files = [*run.glob("model/*.safetensors"), *run.glob("adapter/*.safetensors")]
    assert files
    for path in files:
        assert (at / path.relative_to(run)).read_bytes() == path.read_bytes(), path


@pytest.mark.slow
def test_the_best_by_a_metric_of_the_task(tiny, tmp_path):
    """It is measured with each held-out loss, and on the delivered model again in the end."""
    flags = STEPS | {"task": NAMES["labels"], "metric_for_best_model": "accuracy"}
    flags |= {"learning_rate": 0.1, "save_total_limit": 2}
    with task_of("labels"), one_rank():
        result = train.main(tiny.flags(tmp_path, "--load_best_model_at_end", **flags))
    accuracies = _evaluated(tmp_path, "eval_accuracy")
    assert list(accuracies) == [1, 2, 3, 4, 5, 6]
    step = max(accuracies, key=accuracies.__getitem__)
    assert result.results["best_global_step"] == step
    assert result.metrics["accuracy"] == accuracies[step]
    assert step in list_checkpoints(tmp_path)


# Signals


def test_ctrl_c_once_waits_for_the_step_and_twice_does_not(capfd):
    before = signal.getsignal(signal.SIGINT)
    with stop_signals() as received:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):  # as torchrun passes it on
            os.kill(os.getpid(), number)
        assert received == [signal.SIGINT, signal.SIGINT, signal.SIGTERM]
        with mock.patch.object(signals, "_SAME_KEYSTROKE", 0.0), pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert capfd.readouterr().err.count("Ctrl-C again ends now") == 1
