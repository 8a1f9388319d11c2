"""Checkpoints: they come back to the bit, and under their name they are whole or absent."""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gem_ds.distributed.optim import STATE_KEYS
from gem_ds.files.checkpoint import (
    Checkpoint,
    RunIdentity,
    TrainerState,
    delete_old_checkpoints,
    find_checkpoint,
    list_checkpoints,
    remove_leftovers,
)
from gem_ds.files.mask import Mask, WeightInfo

FILES = ("mask.safetensors", "optimizer.safetensors", "trainer_state.json")


def make_checkpoint(step: int, counts: tuple[int, ...] = (3, 2), seed: int = 0) -> Checkpoint:
    """A checkpoint of ``sum(counts)`` entries, with every field set."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(counts)
    indices = {
        f"layer.{i}.weight": torch.randperm(64, generator=generator)[:k].sort().values.int()
        for i, k in enumerate(counts)
    }
    infos = {name: WeightInfo.of((8, 8), index.float()) for name, index in indices.items()}
    vectors = {name: torch.randn(total, generator=generator) for name in STATE_KEYS}
    return Checkpoint(
        mask=Mask(indices=indices, weights=infos, base_model="m", settings={"density": "0.1"}),
        vectors=vectors | {"exp_avg_sq": vectors["exp_avg_sq"].square()},
        num_updates=step - 1,
        loss_scale=2.0**16,
        identity=RunIdentity(global_batch_size=6, seed=3, data="abc"),
        state=TrainerState(
            global_step=step, max_steps=99, epoch=0.1, log_history=[{"step": 1, "loss": 0.1 + 0.2}]
        ),
    )


def assert_equal(found: Checkpoint, expected: Checkpoint) -> None:
    for name in STATE_KEYS:
        assert torch.equal(
            found.vectors[name].view(torch.int32), expected.vectors[name].view(torch.int32)
        ), f"{name}, by its bits"
    assert found.mask.weights == expected.mask.weights
    assert found.mask.settings == expected.mask.settings
    for name, index in expected.mask.indices.items():
        assert torch.equal(found.mask.indices[name], index)
    rest = {"mask": None, "vectors": None}
    assert replace(found, **rest) == replace(expected, **rest)


def test_the_digest_is_of_all_that_a_run_starts_from() -> None:
    """Two nodes may hold checkpoints of the same step that are not of the same run."""
    whole = make_checkpoint(7)
    one_bit = torch.nextafter(whole.vectors["exp_avg"], torch.tensor(9.0))
    others = [
        replace(whole, vectors=whole.vectors | {"exp_avg": one_bit}),
        replace(whole, head_vectors=whole.vectors),
        replace(whole, num_updates=5),
        replace(whole, loss_scale=1.0),
        make_checkpoint(8),
    ]
    assert make_checkpoint(7).digest() == whole.digest()
    assert whole.digest() not in {other.digest() for other in others}


@given(
    counts=st.lists(st.integers(0, 64), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
    special=st.sampled_from([0.0, -0.0, 1e-45, 3.4e38]),
)
@settings(max_examples=25, deadline=None)
def test_a_checkpoint_comes_back_to_the_bit(tmp_path_factory, counts, seed, special):
    checkpoint = make_checkpoint(7, tuple(counts), seed)
    checkpoint.vectors["exp_avg"][:1] = special
    folder = checkpoint.save(tmp_path_factory.mktemp("run"))
    assert folder.name == "checkpoint-7"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert_equal(Checkpoint.load(folder), checkpoint)


def test_the_last_checkpoint_is_that_of_the_latest_step(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint to resume"):
        find_checkpoint(tmp_path / "absent", "last")
    for step in (10, 9, 100):
        make_checkpoint(step).save(tmp_path)
    for other in ("checkpoint-", "checkpoint-1000.tmp", "my-checkpoint-1000", ".checkpoint-1000"):
        (tmp_path / other).mkdir()
    assert list(list_checkpoints(tmp_path)) == [9, 10, 100]
    assert find_checkpoint(tmp_path, "last") == tmp_path / "checkpoint-100"
    assert find_checkpoint(tmp_path, "elsewhere/checkpoint-3") == Path("elsewhere/checkpoint-3")


def test_the_limit_keeps_the_newest(tmp_path):
    for step in range(8, 13):
        make_checkpoint(step).save(tmp_path)
        delete_old_checkpoints(tmp_path, 2)
        assert list(list_checkpoints(tmp_path)) == list(range(max(8, step - 1), step + 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-11", "checkpoint-12"]


def test_a_kill_while_an_old_one_is_deleted_leaves_no_half_of_it(tmp_path, monkeypatch):
    make_checkpoint(1).save(tmp_path)
    make_checkpoint(2).save(tmp_path)

    def killed(folder: Path) -> None:
        (folder / "optimizer.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        delete_old_checkpoints(tmp_path, 1)
    monkeypatch.undo()
    assert list(list_checkpoints(tmp_path)) == [2]
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    delete_old_checkpoints(tmp_path, 1)


def test_a_kill_while_saving_leaves_the_earlier_ones_whole(tmp_path, monkeypatch):
    """All files of the new one are written: it has no name yet."""
    earlier = make_checkpoint(1)
    earlier.save(tmp_path)
    replace_file = os.replace

    def until_killed(source: Path, target: Path) -> None:
        if source.is_dir():
            assert {path.name for path in source.iterdir()} == set(FILES)
            raise KeyboardInterrupt
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", until_killed)
    monkeypatch.setattr(shutil, "rmtree", lambda folder: None)  # a killed process tidies nothing up
    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(2).save(tmp_path)
    monkeypatch.undo()
    assert list(list_checkpoints(tmp_path)) == [1]
    assert_equal(Checkpoint.load(tmp_path / "checkpoint-1"), earlier)
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def _spoil_vectors(folder: Path, **vectors: torch.Tensor | None) -> None:
    checkpoint = Checkpoint.load(folder)
    kept = {name: v for name, v in (checkpoint.vectors | vectors).items() if v is not None}
    shutil.rmtree(folder)
    replace(checkpoint, vectors=kept).save(folder.parent)


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 5)


DAMAGES = {
    **{f"no {name}": lambda f, name=name: (f / name).unlink() for name in FILES},
    **{f"{name} truncated": lambda f, name=name: _truncate(f / name) for name in FILES},
    "other state": lambda f: (f / FILES[2]).write_text('{"a": 1}'),
    "mask for optimizer": lambda f: shutil.copy(f / FILES[0], f / FILES[1]),
    "mask of another size": lambda f: make_checkpoint(5, (4, 2)).mask.save(f / FILES[0]),
    "a moment missing": lambda f: _spoil_vectors(f, exp_avg_sq=None),
    "a vector too many": lambda f: _spoil_vectors(f, momentum=torch.zeros(5)),
    "half precision": lambda f: _spoil_vectors(f, master=torch.zeros(5, dtype=torch.bfloat16)),
    "another shape": lambda f: _spoil_vectors(f, master=torch.zeros(5, 1)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_one_sentence(tmp_path, damage):
    folder = make_checkpoint(5).save(tmp_path)
    Checkpoint.load(folder)
    DAMAGES[damage](folder)
    is_none = damage == "no optimizer.safetensors"
    message = "is not a checkpoint of gem_ds" if is_none else re.escape(str(folder))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        Checkpoint.load(folder)
    assert "\n" not in str(caught.value)
