"""What a person sees: every number once, on rank 0 only, on the disk at once."""

import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from accelerate import PartialState

from gem_ds.files.checkpoint import TrainerState
from gem_ds.train import reporting
from gem_ds.train.config import Arguments, TrainArguments
from gem_ds.train.reporting import TENSORBOARD_FOLDER, Progress, Reporter, find_trackers
from tests.runs import rows_of

ENTRY = {"loss": 1.5, "learning_rate": 0.1, "tokens_per_second": 10.0}


def make_reporter(
    folder: Path, state: TrainerState, *, is_main: bool = True, **train: Any
) -> Reporter:
    args = Arguments(train=TrainArguments(**{"disable_tqdm": True} | train))
    return Reporter(folder, state, args, is_main=is_main)


def lines(folder: Path) -> list[dict[str, Any]]:
    return rows_of(folder / "metrics.jsonl")


def test_an_entry_is_on_the_disk_at_once_and_in_the_history(tmp_path):
    state = TrainerState(max_steps=9)
    reporter = make_reporter(tmp_path, state)
    for step in (1, 2):
        state.global_step, state.epoch = step, step / 3
        reporter.log({**ENTRY, "loss": step / 7})
        assert lines(tmp_path) == state.log_history
        assert len(state.log_history) == step
    assert lines(tmp_path)[0] == {
        **ENTRY,
        "step": 1,
        "epoch": 0.3333,
        "loss": 1 / 7,
    }
    reporter.close()


def test_a_resumed_run_takes_back_what_the_checkpoint_did_not_know(tmp_path):
    """A killed run has logged steps after its last checkpoint; they are run and logged again."""
    state = TrainerState(global_step=1)
    reporter = make_reporter(tmp_path, state)
    reporter.log({"loss": 1.0})
    known = list(state.log_history)
    state.global_step = 2
    reporter.log({"loss": 2.0})
    resumed = TrainerState(global_step=1, log_history=known)
    reporter = make_reporter(tmp_path, resumed)
    assert [line["step"] for line in lines(tmp_path)] == [1]
    resumed.global_step = 2
    reporter.log({"loss": 2.5})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        (1, 1.0),
        (2, 2.5),
    ]


def test_other_ranks_are_silent_but_know_the_history(tmp_path, capsys):
    state = TrainerState(max_steps=3)
    options = {"report_to": ["tensorboard"], "disable_tqdm": False}
    reporter = make_reporter(tmp_path / "absent", state, is_main=False, **options)
    reporter.start()
    reporter.advance(1.0, 5, 0.1)
    reporter.log({**ENTRY, "eval_loss": 2.0})
    reporter.say("nothing")
    reporter.close()
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "absent").exists()
    assert state.log_history[0]["loss"] == 1.5


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_terminal_gets_a_bar_and_a_log_file_a_line_for_each_entry(
    tmp_path, capsys, monkeypatch, is_terminal
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    state = TrainerState(max_steps=30, global_step=10)
    reporter = make_reporter(tmp_path, state, disable_tqdm=False)
    reporter.start()
    for step in (11, 12):
        reporter.advance(1.0, 5, 0.1)
        state.global_step = step
    reporter.log(ENTRY)
    reporter.log({"eval_loss": 2.0})
    reporter.say("a line")
    reporter.close()
    out, err = capsys.readouterr()
    assert out == "step 12: held-out loss 2.0000\na line\n"
    numbers = "loss 1.5000, lr 1.00e-01, 10 tok/s"
    if is_terminal:
        assert "12/30" in err
        assert numbers in err
    else:
        assert err == f"Training: step 12 of 30, {numbers}, 0:00:00 left\n"


def test_a_loop_tells_a_log_file_now_and_then(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    progress = Progress("Calibrating", 100, "batch", is_shown=True)
    hidden = Progress("Calibrating", 100, "batch", is_shown=False)
    for _ in range(100):
        now += 1.0
        progress.advance()
        hidden.advance()
    progress.close()
    assert capsys.readouterr().err.splitlines() == [
        "Calibrating: batch 31 of 100, 0:01:09 left",
        "Calibrating: batch 62 of 100, 0:00:38 left",
        "Calibrating: batch 93 of 100, 0:00:07 left",
    ]


def test_trackers_are_those_that_are_installed(monkeypatch):
    monkeypatch.setattr(reporting, "get_available_trackers", lambda: ["tensorboard"])
    assert find_trackers(["none"]) == []
    assert find_trackers(["all"]) == find_trackers(["tensorboard"] * 2) == ["tensorboard"]
    for names, sentence in (
        (["mlflow"], "--report_to mlflow needs mlflow: pip install mlflow."),
        (["comet_ml"], "pip install comet-ml."),
        (["tensorboard", "wand"], r"takes none, all, or some of .*wandb.*, not wand\.$"),
        (["none", "tensorboard"], r"not none\.$"),
    ):
        with pytest.raises(ValueError, match=sentence):
            find_trackers(names)


def test_a_tracker_gets_the_flags_and_the_numbers(tmp_path, monkeypatch):
    """Of any that accelerate knows; the numbers of a step without the step and epoch themselves."""
    monkeypatch.setattr(PartialState, "_shared_state", {})  # whatever has run before
    kinds = {name: mock.Mock(requires_logging_directory=False) for name in ("wandb", "mlflow")}
    for name, kind in kinds.items():
        monkeypatch.setitem(reporting.LOGGER_TYPE_TO_CLASS, name, kind)
    monkeypatch.setattr(reporting, "get_available_trackers", lambda: [*kinds])
    reporter = make_reporter(tmp_path, TrainerState(), report_to=["wandb"])
    reporter.log({"loss": 1.5})
    reporter.close()
    flags = Arguments(train=TrainArguments(disable_tqdm=True, report_to=["wandb"])).values()
    assert kinds["wandb"].mock_calls == [
        mock.call("gem_ds"),
        mock.call().start(),
        mock.call().store_init_configuration(flags),
        mock.call().log({"loss": 1.5}, step=0),
        mock.call().finish(),
    ]
    kinds["mlflow"].return_value.start.side_effect = OSError("no server")
    with pytest.raises(OSError, match="no server"):
        make_reporter(tmp_path, TrainerState(), report_to=["wandb", "mlflow"])
    assert kinds["wandb"].return_value.finish.call_count == 2, "it had begun"
    assert not PartialState._shared_state
    PartialState(cpu=True)  # of whoever calls
    make_reporter(tmp_path, TrainerState(), report_to=["wandb"]).close()
    assert PartialState._shared_state


def test_the_averages_are_of_the_steps_since_the_last_question(tmp_path):
    reporter = make_reporter(tmp_path, TrainerState(max_steps=9))
    reporter.start()
    reporter.advance(2.0, 30, 1.0)
    reporter.advance(4.0, 10, 3.0)
    assert reporter.averages() == {"loss": 3.0, "tokens_per_second": 10.0}
    reporter.advance(7.0, 6, 0.5)
    assert reporter.averages() == {"loss": 7.0, "tokens_per_second": 12.0}
    reporter.close()


def test_tensorboard_shows_the_same_numbers_after_a_resume_too(tmp_path):
    """What TensorBoard itself would show."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    state = TrainerState()
    reporter = make_reporter(tmp_path, state, report_to=["tensorboard"])
    for step in (1, 2, 3):
        state.global_step = step
        reporter.log({"loss": step / 4})
    reporter.close()
    resumed = TrainerState(global_step=2, log_history=state.log_history[:2])
    reporter = make_reporter(tmp_path, resumed, report_to=["tensorboard"])
    resumed.global_step = 3
    reporter.log({"loss": 8.0})
    reporter.close()
    board = accumulator.EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER)).Reload()
    assert board.Tags()["scalars"] == ["loss"]
    shown = [(event.step, event.value) for event in board.Scalars("loss")]
    assert shown == [(1, 0.25), (2, 0.5), (3, 8.0)]
