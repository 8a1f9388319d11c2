"""What a person sees: every number once, on rank 0 only, on the disk at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gem_ds.files.checkpoint import TrainerState
from gem_ds.train.reporting import TENSORBOARD_FOLDER, Reporter

ENTRY = {"loss": 1.5, "learning_rate": 0.1, "tokens_per_second": 10.0}


def make_reporter(folder: Path, state: TrainerState, **options: bool) -> Reporter:
    defaults = {"is_main": True, "tensorboard": False, "show_bar": False}
    return Reporter(folder, state, **(defaults | options))


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_an_entry_is_on_the_disk_at_once_and_in_the_history(tmp_path):
    state = TrainerState(max_steps=9)
    reporter = make_reporter(tmp_path, state)
    for step in (1, 2):
        state.global_step, state.epoch = step, step / 3
        reporter.log({**ENTRY, "loss": step / 7})
        assert lines(tmp_path) == state.log_history
        assert len(state.log_history) == step
    assert lines(tmp_path)[0] == {**ENTRY, "step": 1, "epoch": 0.3333, "loss": 1 / 7}
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
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1.0), (2, 2.5)]


def test_other_ranks_are_silent_but_know_the_history(tmp_path, capsys):
    state = TrainerState(max_steps=3)
    options = {"is_main": False, "tensorboard": True, "show_bar": True}
    reporter = make_reporter(tmp_path / "absent", state, **options)
    reporter.start()
    reporter.advance(1.0, 5, 0.1)
    reporter.log({**ENTRY, "eval_loss": 2.0})
    reporter.say("nothing")
    reporter.close()
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "absent").exists()
    assert state.log_history[0]["loss"] == 1.5


def test_the_bar_shows_loss_rate_and_learning_rate(tmp_path, capsys):
    state = TrainerState(max_steps=3, global_step=1)
    reporter = make_reporter(tmp_path, state, show_bar=True)
    reporter.start()
    reporter.advance(1.0, 5, 0.1)
    state.global_step = 2
    reporter.log(ENTRY)
    reporter.log({"eval_loss": 2.0})
    reporter.say("a line")
    reporter.close()
    out, err = capsys.readouterr()
    assert out == "step 2: held-out loss 2.0000\na line\n"
    assert "2/3" in err
    assert "loss 1.5000, lr 1.00e-01, 10 tok/s" in err


def test_the_averages_are_of_the_steps_since_the_last_question(tmp_path):
    reporter = make_reporter(tmp_path, TrainerState(max_steps=9))
    reporter.start()
    reporter.advance(2.0, 30, 1.0)
    reporter.advance(4.0, 10, 3.0)
    assert reporter.averages() == {"loss": 3.0, "tokens_per_second": 10.0}
    reporter.advance(7.0, 6, 0.5)
    assert reporter.averages() == {"loss": 7.0, "tokens_per_second": 12.0}
    reporter.close()


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself would show."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = accumulator.EventAccumulator(str(folder / TENSORBOARD_FOLDER))
    board.Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_tensorboard_shows_the_same_numbers_after_a_resume_too(tmp_path):
    state = TrainerState()
    reporter = make_reporter(tmp_path, state, tensorboard=True)
    for step in (1, 2, 3):
        state.global_step = step
        reporter.log({"loss": step / 4})
    reporter.close()
    resumed = TrainerState(global_step=2, log_history=state.log_history[:2])
    reporter = make_reporter(tmp_path, resumed, tensorboard=True)
    resumed.global_step = 3
    reporter.log({"loss": 8.0})
    reporter.close()
    assert events(tmp_path) == {"loss": [(1, 0.25), (2, 0.5), (3, 8.0)]}
