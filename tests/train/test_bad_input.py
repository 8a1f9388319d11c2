"""What is wrong is refused in one sentence, before any weight is loaded, and by all ranks together.

``bad_input.toml`` is a table of command lines, each with what its sentence must say. One process
runs them line by line; then two ranks run some together, those that only the weights show with
weights that are cut, and both have to come back from every line.
"""

import errno
import json
import os
import re
import shutil
import tomllib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from gem_ds.errors import PeerError
from gem_ds.files.checkpoint import Checkpoint, list_checkpoints
from gem_ds.files.manifest import MANIFEST
from gem_ds.files.mask import Mask
from gem_ds.train import main as train
from gem_ds.train import run
from tests.ranks import run_ranks
from tests.runs import rows_of
from tests.tiny_model import REPOSITORY, Tiny, joined, write_jsonl

pytestmark = pytest.mark.slow  # starts engines or programs

ZERO3 = ["--deepspeed", str(REPOSITORY / "ds_configs" / "zero3.json")]

#: Folders of models, by what is done to a good one's configuration, files and weights.
CONFIGS: dict[str, dict[str, object]] = {
    "few_tokens": {"vocab_size": 90},
    "quantized": {"quantization_config": {"quant_method": "fp8"}},
    "mxfp4": {"quantization_config": {"quant_method": "mxfp4"}},
    # a Llama by the names of its weights, for which peft has no table
    "granite": {"model_type": "granite", "architectures": ["GraniteForCausalLM"]},
}
FILES: dict[str, Callable[[Path], object]] = {
    "no_config": lambda folder: (folder / "config.json").unlink(),
    "no_json": lambda folder: (folder / "config.json").write_text("{"),
    "no_weights": lambda folder: (folder / "model.safetensors").unlink(),
    "torn": lambda folder: os.truncate(folder / "model.safetensors", 999),
    "no_tokenizer": lambda folder: [path.unlink() for path in folder.glob("*token*")],
    "no_template": lambda folder: (folder / "chat_template.jinja").unlink(),
}
WEIGHTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "w0": lambda t: t["model.layers.0.self_attn.v_proj.weight"].mul_(2),
    "w1": lambda t: t.pop("model.layers.0.self_attn.v_proj.weight"),
    "w2": lambda t: t.update({"model.norm.weight": torch.ones(31)}),
    "w3": lambda t: t["model.layers.0.mlp.up_proj.weight"][0, 0].fill_(float("inf")),
    "w5": lambda t: t["model.embed_tokens.weight"].mul_(1.5),
    "w4": lambda t: t["model.layers.1.self_attn.o_proj.weight"].zero_(),
    "w6": lambda t: [w[:, 1:].zero_() for name, w in t.items() if "_proj" in name],
}

#: Folders of data, by the rows of their training file.
DATA: dict[str, list[dict[str, Any]]] = {
    "long": [{"question": "Why? " * 40, "answer": "So."}],
    "longer": [{"question": "?", "answer": "So. " * 50}],
    "chat": [{"messages": [{"role": role, "content": "a"} for role in ("user", "assistant")]}],
}

Table = dict[str, tuple[list[str], str]]
"""By name a command line, and a regular expression that its sentence matches."""


class Workshop:
    """Makes the files that the bad command lines name; one run has gone well before."""

    def __init__(self, tiny: Tiny) -> None:
        self.tiny, self.folder, self.run = tiny, tiny.folder, tiny.folder / "run"
        train.main(tiny.flags(self.run, max_steps=4, save_steps=2))
        shutil.copy(ZERO3[1], self.folder)
        (self.folder / "three.json").write_text('{"train_micro_batch_size_per_gpu": 3}')
        for name, content in (DATA | {"fewer": rows_of(tiny.data / "train.jsonl")[1:]}).items():
            write_jsonl(self.folder / name / "train.jsonl", content)
            shutil.copy(tiny.data / "test.jsonl", self.folder / name)
        half = shutil.copytree(self.run / "checkpoint-2", self.folder / "half" / "checkpoint-2")
        (half / "optimizer.safetensors").write_bytes(b"")
        self._make_models()
        self._make_far_mask()

    def _make_models(self) -> None:
        for name in (*CONFIGS, *FILES, *WEIGHTS):
            folder = self.tiny.variant(name, **CONFIGS.get(name, {}))
            FILES.get(name, str)(folder)
            if name in WEIGHTS:
                tensors = load_file(folder / "model.safetensors")
                WEIGHTS[name](tensors)
                save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        for model_type in ("xlnet", "cpmant", "t5", "vit"):
            content = json.dumps({"model_type": model_type, "vocab_size": 300})
            (self.tiny.variant(model_type) / "config.json").write_text(content)

    def _make_far_mask(self) -> None:
        """The run's mask, as if it were of a layer that the model does not have."""
        mask = Mask.load(self.run / "mask.safetensors")
        indices, weights = (
            {name.replace("layers.0", "layers.9"): item for name, item in part.items()}
            for part in (mask.indices, mask.weights)
        )
        replace(mask, indices=indices, weights=weights).save(self.folder / "far.safetensors")

    def flags(self, **values: object) -> list[str]:
        """A good command line but for ``values``; its output folder does not exist."""
        return self.tiny.flags(self.folder / "new", **{"max_steps": 3} | values)

    def table(self, new: str, resumed: str) -> Table:
        """Two sections of the file."""
        text = Path(__file__).with_name("bad_input.toml").read_text()
        told = tomllib.loads(text.replace("@", str(self.folder)))
        last = {"output_dir": self.run, "resume_from_checkpoint": "last", "max_steps": 6}
        lines = told[new] | {n: [last | flags, told] for n, (flags, told) in told[resumed].items()}
        return {name: (self.flags(**flags), message) for name, (flags, message) in lines.items()}


@pytest.fixture(scope="module")
def shop(tiny: Tiny) -> Workshop:
    return Workshop(tiny)


@pytest.fixture(scope="module")
def early(shop: Workshop) -> Table:
    """What is refused without the weights."""
    nothing = [], "Pass --model_name_or_path and --task and --output_dir"
    return shop.table("new", "resume") | {"nothing said": nothing}


@pytest.fixture(scope="module")
def late(shop: Workshop) -> Table:
    """What only the weights show."""
    return shop.table("weights", "weights_resume")


def _end(flags: list[str]) -> tuple[str, str]:
    """How a command line ended: the error's class and text."""
    try:
        train.main(flags)
    except (ValueError, OSError, PeerError) as error:
        return type(error).__name__, str(error)
    return "none", "it ended well"


def _assert_refused(table: Table, ends: dict[str, tuple[str, str]]) -> None:
    """Each in its one sentence."""
    assert {
        name: ends[name]
        for name, (_, message) in table.items()
        if "\n" in ends[name][1] or not re.search(message, ends[name][1])
    } == {}


def _snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_needs_no_weights_is_refused_before_they_are_loaded(shop, early, monkeypatch):
    monkeypatch.setattr(run, "load_for_training", lambda *_, **__: pytest.fail("loaded weights"))
    before = _snapshot(shop.run)
    _assert_refused(early, {name: _end(flags) for name, (flags, _) in early.items()})
    assert not (shop.folder / "new").exists()
    assert _snapshot(shop.run) == before


def test_what_the_weights_show_is_refused_and_checkpoints_stay(shop, late):
    ends = {}
    for name, (flags, _) in late.items():
        ends[name] = _end(flags)
        shutil.rmtree(shop.folder / "new", ignore_errors=True)
    _assert_refused(late, ends)
    _assert_diverged(shop.folder / "fast")


def _assert_diverged(folder: Path) -> None:
    """The run has kept the good checkpoint beside the bad one, and written no delta."""
    checkpoints = list_checkpoints(folder)
    good, bad = (
        float(Checkpoint.load(path).vectors["master"].abs().max()) for path in checkpoints.values()
    )
    assert list(checkpoints) == [1, 2]
    assert good < 1 < bad
    assert not (folder / "delta.safetensors").exists()


# Two ranks

#: Of what is refused before any weight, a few: all of it goes through the same agreement.
EARLY = ("density of nothing", "unknown flag", "no model", "resume other data")


def _unreadable(*_: object, **__: object) -> None:
    raise PermissionError(errno.EACCES, "no permission to read", "train.jsonl")


def _full_disk(self: Checkpoint, folder: Path) -> None:
    if self.state.global_step == 2:
        raise OSError(errno.ENOSPC, "the disk is full: free space")
    Checkpoint.write_whole(self, folder)  # type: ignore[attr-defined]


def _no_network(*_: object, **__: object) -> None:
    raise OSError("there is no network")


def _closed(*_: object) -> None:
    raise OSError(errno.ENOSPC, "metrics.jsonl: the disk is full")


#: What happens on one rank only: the rank, what is patched there, and how.
ACCIDENTS: dict[str, tuple[int, str, Callable[..., None]]] = {
    "unreadable on rank 1": (1, "gem_ds.train.examples.load_task", _unreadable),
    "unreadable on rank 0": (0, "gem_ds.train.examples.load_task", _unreadable),
    "weights lost on rank 1": (1, "transformers.AutoModelForCausalLM.from_pretrained", _no_network),
    "disk full at a checkpoint": (0, "gem_ds.files.checkpoint.Checkpoint._write", _full_disk),
    "disk full at a log entry": (0, "gem_ds.train.reporting.Reporter.log", _closed),
    "disk full at the mask": (0, "gem_ds.files.mask.Mask.save", _closed),
    "disk full at the delta": (0, "gem_ds.files.delta.Delta.save", _closed),
}


def _refuse_all(commands: dict[str, list[str]]) -> dict[str, tuple[str, str]]:
    """On each rank, how each command line ended."""
    Checkpoint.write_whole = Checkpoint._write  # type: ignore[attr-defined]
    rank, ends = int(os.environ["RANK"]), {}
    with joined():
        for name, flags in commands.items():
            victim, target, accident = ACCIDENTS.get(name, (None, "", _closed))
            with mock.patch(target, accident) if rank == victim else nullcontext():
                ends[name] = _end(flags)
    return ends


@pytest.fixture(scope="module")
def together(shop: Workshop, early: Table, late: Table) -> Table:
    """What two ranks refuse: a few lines, and what the weights show while they are cut."""
    table = {name: early[name] for name in EARLY}
    table |= {name: ([*flags, *ZERO3], message) for name, (flags, message) in late.items()}
    table["too fast"][0].extend(["--output_dir", str(shop.folder / "fast3")])
    return table


@pytest.fixture(scope="module")
def endings(shop: Workshop, together: Table) -> list[dict[str, tuple[str, str]]]:
    """Per rank of two, how every bad command line and every accident ended."""
    commands = {name: flags for name, (flags, _) in together.items()}
    for name in ACCIDENTS:
        folder = shop.folder / name.replace(" ", "_")
        commands[name] = shop.flags(output_dir=folder, save_steps=1, logging_steps=2)
    return run_ranks(2, _refuse_all, commands, timeout=300)


def test_both_ranks_refuse_everything(shop, together, endings):
    """Rank 0 with the sentence; rank 1 knows that it only follows."""
    _assert_refused(together, endings[0])
    assert {endings[1][name][0] for name in together} == {"PeerError"}
    _assert_diverged(shop.folder / "fast3")


@pytest.mark.parametrize("name", ACCIDENTS)
def test_an_accident_on_one_rank_stops_both(endings, name):
    (kind, text), (other_kind, _) = (ending[name] for ending in endings)
    rank, _, _ = ACCIDENTS[name]
    assert kind == ("ValueError" if rank else "PermissionError" if "unread" in name else "OSError")
    assert text.startswith("On rank 1:") == (rank == 1)
    assert other_kind == "PeerError"


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(shop, endings):
    folder = shop.folder / "disk_full_at_a_checkpoint"
    assert list(list_checkpoints(folder)) == [1]
    assert Checkpoint.load(folder / "checkpoint-1").state.global_step == 1
    assert {path.name for path in folder.glob(".*")} <= {MANIFEST}, "no temporary is left"
