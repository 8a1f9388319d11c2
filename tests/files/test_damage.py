"""Whatever byte of a file is another one, the file is refused by its name, or means the same.

And files without digests, as the first version wrote them, must make sense.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gem_ds.files.checkpoint import Checkpoint
from gem_ds.files.delta import Delta
from gem_ds.files.mask import Mask
from tests.deltas import bytes_of, make_delta
from tests.files.test_checkpoint import FILES, make_checkpoint


def _of_mask(mask: Mask) -> Any:
    fields = mask.base_model, mask.revision, mask.method, mask.settings, mask.weights
    return fields, {name: bytes_of(index) for name, index in mask.indices.items()}


def _of_delta(delta: Delta) -> Any:
    values, head = (
        {name: (t.dtype, t.shape, bytes_of(t)) for name, t in part.items()}
        for part in (delta.values, delta.head)
    )
    return _of_mask(delta.mask), values, head


def _of_checkpoint(checkpoint: Checkpoint) -> Any:
    vectors = checkpoint.vectors | {f"head.{n}": v for n, v in checkpoint.head_vectors.items()}
    numbers = checkpoint.num_updates, checkpoint.loss_scale, checkpoint.identity
    parts = {name: bytes_of(vector) for name, vector in vectors.items()}
    return _of_mask(checkpoint.mask), parts, numbers, asdict(checkpoint.state)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6).bfloat16(), nn.Linear(6, 2)


def _written(folder: Path) -> dict[str, tuple[Path, Callable[[], Any]]]:
    """By kind a file, and what reads it: the whole content, to be compared."""
    delta = make_delta(_Model(), {"a.weight": [0, 5, 23], "b.weight": [3]})
    delta = replace(delta, head={"score.weight": torch.randn(2, 3)})
    delta.save(folder / "delta.safetensors")
    delta.mask.save(folder / "mask.safetensors")
    checkpoint = make_checkpoint(7)
    checkpoint = replace(checkpoint, head_vectors={n: v[:2] for n, v in checkpoint.vectors.items()})
    saved = checkpoint.save(folder)
    return {
        "mask": (folder / FILES[0], lambda: _of_mask(Mask.load(folder / FILES[0]))),
        "delta": (
            folder / "delta.safetensors",
            lambda: _of_delta(Delta.load(folder / "delta.safetensors")),
        ),
        **{name: (saved / name, lambda: _of_checkpoint(Checkpoint.load(saved))) for name in FILES},
    }


@pytest.mark.parametrize("kind", ["mask", "delta", *FILES])
def test_every_byte_counts(tmp_path, kind):
    """One byte at a time, and then blocks: zeros, another place's bytes, a cut, a tail."""
    path, read = _written(tmp_path)[kind]
    good, content = path.read_bytes(), read()
    named = path if kind in ("mask", "delta") else path.parent
    rng = random.Random(kind)
    places = rng.choices(range(len(good)), k=250)
    damages = [(place, bytes([good[place] ^ rng.choice((1, 4, 32, 255))])) for place in places]
    for _ in range(30):
        start, size = rng.randrange(len(good)), rng.randrange(1, 80)
        block = good[start : start + size]
        damages.append((start, bytes(len(block))))
        damages.append((rng.randrange(len(good) - len(block) + 1), block))
    num_harmless = 0
    for place, block in damages:
        damaged = good[:place] + block + good[place + len(block) :]
        path.write_bytes(damaged)
        try:
            found, sentence = read(), None
        except ValueError as error:
            found, sentence = None, str(error)
        if sentence is None:
            assert found == content, f"{block!r} at {place} means something else"
            num_harmless += damaged != good
        else:
            assert str(named) in sentence
            assert "\n" not in sentence
    assert num_harmless < 0.05 * len(damages)  # such as the padding of a header
    for cut in (good[:-1], good + b"\0", b"", good * 2):
        path.write_bytes(cut)
        with pytest.raises(ValueError, match=str(named)):
            read()


def test_the_files_of_two_checkpoints_make_none(tmp_path):
    """Each file is whole, and they are of the same entries and the same step."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    saved = make_checkpoint(7).save(tmp_path / "a")
    other = make_checkpoint(7, seed=1)
    other.state.unlogged_losses.append(0.5)
    donor = other.save(tmp_path / "b")
    for name in FILES:
        copy = shutil.copytree(saved, tmp_path / name / saved.name)
        shutil.copy(donor / name, copy / name)
        with pytest.raises(ValueError, match=rf"{copy} is damaged \(.* resume an earlier one"):
            Checkpoint.load(copy)


# Without digests


def _edit(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    """Change a file's metadata and tensors, and leave out the digests."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["gem"])
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for name in ("digest", "digests", "file_digests"):
        header.pop(name, None)
    change(header, tensors)
    save_file(tensors, path, metadata={"gem": json.dumps(header)})


def _deep(levels: int = 100_000) -> str:
    return "[" * levels + "]" * levels


#: Of a checkpoint's metadata, its vectors and its trainer_state.json.
SENSELESS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any] | str]] = {
    "num_updates: .* less than": ({"num_updates": 10**30}, {}, {}),
    "counts 8 updates in 7 steps": ({"num_updates": 8}, {}, {}),
    "num_updates: .* greater than": ({"num_updates": -1}, {}, {}),
    "num_updates: .* valid integer": ({"num_updates": True}, {}, {}),
    "loss_scale: .* greater than 0": ({"loss_scale": 0.0}, {}, {}),
    "loss_scale: .* finite": ({"loss_scale": float("inf")}, {}, {}),
    "loss_scale: .* valid number": ({"loss_scale": "2"}, {}, {}),
    "identity: .* object": ({"identity": [1]}, {}, {}),
    "identity.global_batch_size: .* greater": ({"identity": {"global_batch_size": 0}}, {}, {}),
    "identity.global_batch_size: .* integer": ({"identity": {"global_batch_size": 0.5}}, {}, {}),
    "master holds NaN or infinity": ({}, {"master": float("nan")}, {}),
    "exp_avg holds NaN or infinity": ({}, {"exp_avg": float("-inf")}, {}),
    "exp_avg_sq holds NaN or negative": ({}, {"exp_avg_sq": -1.0}, {}),
    "trainer_state.json is of step 6": ({"num_updates": 0}, {}, {"global_step": 6}),
    "global_step: .* less than": ({}, {}, {"global_step": 10**30}),
    "epoch: .* finite": ({}, {}, {"epoch": float("nan")}),
    "log_history.0: .* object": ({}, {}, {"log_history": [3]}),
    "unlogged_losses.1: .* number": ({}, {}, {"unlogged_losses": [0.5, None]}),
    "global_steps: Unexpected": ({}, {}, {"global_steps": 7}),
    "Input should be an object": ({}, {}, "[7]"),
    "Invalid JSON: recursion limit": ({}, {}, _deep()),
    "Invalid JSON: number out of range": ({}, {}, '{"global_step": 1%s}' % ("0" * 5000)),
    "Invalid JSON": ({}, {}, "\xff"),
}


@pytest.mark.parametrize("message", SENSELESS)
def test_a_checkpoint_without_digests_must_make_sense(tmp_path, message):
    metadata, values, state = SENSELESS[message]
    folder = make_checkpoint(7).save(tmp_path)

    def change(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for name, value in metadata.items():
            is_part = isinstance(value, dict)
            header[name] = header[name] | value if is_part else value
        for name, value in values.items():
            tensors[name][-1] = value

    _edit(folder / "optimizer.safetensors", lambda *_: None)
    Checkpoint.load(folder)
    _edit(folder / "optimizer.safetensors", change)
    path = folder / "trainer_state.json"
    content = json.loads(path.read_text())
    path.write_bytes(
        state.encode("latin-1") if isinstance(state, str) else json.dumps(content | state).encode()
    )
    with pytest.raises(ValueError, match=message) as caught:
        Checkpoint.load(folder)
    assert str(caught.value).startswith(f"{folder} is damaged (")
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


WRONG = (None, True, -1, 2**70, float("nan"), "x", [], [[3]], {}, {"a": {"b": [1]}})


def _changes(value: Any) -> Iterator[Any]:
    """A JSON value with one thing in it replaced by a wrong one, or left out."""
    yield from WRONG
    if isinstance(value, dict):
        for key, item in value.items():
            yield {k: v for k, v in value.items() if k != key}
            yield from ({**value, key: changed} for changed in _changes(item))
    elif isinstance(value, list):
        yield value * 2
        for i, item in enumerate(value):
            yield from ([*value[:i], changed, *value[i + 1 :]] for changed in _changes(item))


@pytest.mark.parametrize("kind", ["mask", "delta", "optimizer.safetensors"])
def test_any_metadata_is_refused_in_a_sentence_or_taken(tmp_path, kind):
    path, read = _written(tmp_path)[kind]
    _edit(path, lambda *_: None)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["gem"])
    read()
    for changed in _changes(header):
        save_file(tensors, path, metadata={"gem": json.dumps(changed)})
        try:
            read()
        except ValueError as error:
            sentence = str(error)
        else:
            continue
        assert str(path if kind != FILES[1] else path.parent) in sentence, changed
        assert len(sentence) < 500
        assert "\n" not in sentence
