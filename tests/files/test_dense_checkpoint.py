"""Checkpoints of whole parameters: what is read of them before DeepSpeed, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from gem_ds.files.checkpoint import RunIdentity, TrainerState
from gem_ds.files.dense_checkpoint import DenseCheckpoint, DenseNumbers
from gem_ds.files.digests import digest_of_file

SETTINGS = {"--method": "lora", "--lora_r": 8, "ranks": 2, "ZeRO stage": 3}
IDENTITY = RunIdentity(global_batch_size=4, seed=1, data="d")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint-5"
    names = [f"deepspeed/state/rank_{rank}.pt" for rank in range(3)]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    numbers = DenseNumbers(
        num_updates=4,
        identity=IDENTITY,
        settings=SETTINGS,
        file_digests={name: digest_of_file(folder / name) for name in names},
    )
    numbers.save(folder, TrainerState(global_step=5, max_steps=9))
    return folder


def check_all(folder: Path, world_size: int) -> None:
    checkpoint = DenseCheckpoint.load(folder)
    for rank in range(world_size):
        checkpoint.check_files(rank, world_size)


def test_what_was_written_is_read(folder):
    checkpoint = DenseCheckpoint.load(folder)
    assert (checkpoint.num_updates, checkpoint.identity) == (4, IDENTITY)
    assert checkpoint.state == TrainerState(global_step=5, max_steps=9)
    checkpoint.refuse_other(SETTINGS | {"new": 1})
    for world_size in (1, 2, 5):
        check_all(folder, world_size)


@pytest.mark.parametrize(
    ("name", "now", "words"),
    [
        ("--method", "full", "written with --method lora and this run has full: go on with the"),
        ("--lora_r", 4, "written with --lora_r 8 and this run has 4"),
        ("ZeRO stage", 0, "written with ZeRO stage 3 and this run has 0"),
    ],
)
def test_a_run_of_other_settings_is_refused(folder, name, now, words):
    with pytest.raises(ValueError, match=words):
        DenseCheckpoint.load(folder).refuse_other(SETTINGS | {name: now})


def edit(**changes: Any) -> Any:
    def change(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("dense.json", Path.unlink, "is no checkpoint of a method that trains whole parameters"),
        ("dense.json", lambda path: path.write_text("[" * 999), "is damaged"),
        ("dense.json", edit(num_updates=-1), "is damaged .num_updates: "),
        ("dense.json", edit(num_updates=10**30), "is damaged .num_updates: "),
        ("dense.json", edit(file_digests={}), "trainer_state.json is not the one that was saved"),
        ("trainer_state.json", edit(global_step=6), "trainer_state.json is not the one"),
        ("trainer_state.json", Path.unlink, "is damaged"),
        (
            "deepspeed/state/rank_2.pt",
            lambda path: path.write_text("x"),
            "rank_2.pt is not the one",
        ),
        ("deepspeed/state/rank_0.pt", Path.unlink, "is damaged"),
    ],
)
def test_what_is_not_as_it_was_written_is_refused_in_one_sentence(folder, name, change, words):
    change(folder / name)
    with pytest.raises(ValueError, match=words) as caught:
        check_all(folder, 2)
    assert "\n" not in str(caught.value)
