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
from gem_ds.files import manifest
from gem_ds.files.checkpoint import (
    Checkpoint,
    RunIdentity,
    TrainerState,
    delete_old_checkpoints,
    find_checkpoint,
    list_checkpoints,
    load_delta,
    remove_leftovers,
)
from gem_ds.files.manifest import MANIFEST
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


def test_the_digest_is_of_all_that_a_run_starts_from():
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
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, MANIFEST])
    assert_equal(Checkpoint.load(folder), checkpoint)


def test_the_last_checkpoint_is_that_of_the_latest_step(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint to resume"):
        find_checkpoint(tmp_path / "absent", "last")
    for step in (10, 9, 100):
        make_checkpoint(step).save(tmp_path)
    for other in ("checkpoint-", "checkpoint-1000.tmp", "my-checkpoint-1000", ".checkpoint-1000"):
        (tmp_path / other).mkdir()
    (tmp_path / "checkpoint-2024").mkdir()
    (tmp_path / "checkpoint-2024" / "photo.jpg").touch()
    (tmp_path / "checkpoint-2025").touch()
    assert list(list_checkpoints(tmp_path)) == [9, 10, 100]
    assert find_checkpoint(tmp_path, "last") == tmp_path / "checkpoint-100"
    assert find_checkpoint(tmp_path, "elsewhere/checkpoint-3") == Path("elsewhere/checkpoint-3")


def test_the_limit_keeps_the_newest(tmp_path):
    for step in range(8, 13):
        make_checkpoint(step).save(tmp_path)
        delete_old_checkpoints(tmp_path, 2)
        assert list(list_checkpoints(tmp_path)) == list(range(max(8, step - 1), step + 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-11", "checkpoint-12"]


def test_the_limit_is_of_our_own_and_leaves_what_others_put_there(tmp_path):
    for step in (1, 2, 3, 4):
        make_checkpoint(step).save(tmp_path)
    (tmp_path / "checkpoint-2" / "thesis.txt").touch()
    (tmp_path / "checkpoint-3" / MANIFEST).unlink()  # as before there were manifests, or a copy
    (tmp_path / "checkpoint-2024").mkdir()
    (tmp_path / "checkpoint-2024" / "optimizer.safetensors").touch()
    delete_old_checkpoints(tmp_path, 1)
    kept = ["checkpoint-2", "checkpoint-2024", "checkpoint-3", "checkpoint-4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    assert [path.name for path in (tmp_path / "checkpoint-2").iterdir()] == ["thesis.txt"]
    assert len(list((tmp_path / "checkpoint-3").iterdir())) == len(FILES)


def test_a_kill_while_an_old_one_is_deleted_leaves_no_half_of_it(tmp_path, monkeypatch):
    make_checkpoint(1).save(tmp_path)
    make_checkpoint(2).save(tmp_path)
    unlink = Path.unlink

    def killed(path: Path) -> None:
        unlink(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", killed)
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
            assert {path.name for path in source.iterdir()} == {*FILES, MANIFEST}
            raise KeyboardInterrupt
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", until_killed)
    monkeypatch.setattr(
        manifest, "_delete_temporary", lambda folder: None
    )  # as of a killed process
    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(2).save(tmp_path)
    monkeypatch.undo()
    assert list(list_checkpoints(tmp_path)) == [1]
    assert_equal(Checkpoint.load(tmp_path / "checkpoint-1"), earlier)
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_checkpoint_gives_its_delta(tmp_path):
    checkpoint = make_checkpoint(5)
    vectors = {key: torch.arange(9.0) for key in STATE_KEYS}
    shapes = {"score.weight": (2, 3), "score.bias": (3,)}
    for head in ({"head_shapes": shapes}, {}):
        replace(checkpoint, head_vectors=vectors, **head).save(tmp_path)
        if not head:
            with pytest.raises(ValueError, match=r"checkpoint-5 gives no delta .*finished run"):
                load_delta(tmp_path / "checkpoint-5")
            break
        delta = load_delta(tmp_path / "checkpoint-5")
        assert torch.equal(torch.cat([*delta.values.values()]), checkpoint.vectors["master"])
        expected = {"score.weight": [[0, 1, 2], [3, 4, 5]], "score.bias": [6, 7, 8]}
        assert {name: values.tolist() for name, values in delta.head.items()} == expected


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
