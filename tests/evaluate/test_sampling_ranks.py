"""Sampling on two real ranks, whole models and ZeRO-3 partitions, against one process."""

import json
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM

from gem_ds.distributed import process_group
from gem_ds.errors import PeerError
from gem_ds.evaluate import model
from gem_ds.evaluate.decoding import Transformers
from tests.ranks import run_ranks, told_as
from tests.tiny import DS_CONFIGS
from tests.tiny_evaluation import DRAWN, draw, save_delta
from tests.tiny_model import make_tiny, one_rank

pytestmark = pytest.mark.slow  # starts engines or programs

#: Batches of 2, 2 (alone in their rounds, so that rank 1 is idle), 4, 4 and 4.
PROMPTS = {f"task/{i}": f"Say {'so ' * (i % 4)}{i}" for i in range(6)} | {
    # So near the end of the model's 128 positions that the completion is cut there.
    "task/long": "a" * 121,
    "task/longer": "b" * 124,
}
GREEDY = replace(DRAWN, temperature=0.0)
ZERO3 = str(DS_CONFIGS / "zero3.json")
OFFLOAD = str(DS_CONFIGS / "zero3_offload.json")
#: By what differs: what one process has written, and the flags of the ranks.
RUNS = {
    "whole models": ("drawn", {}),
    "whole models, a delta": ("delta", {"delta": "delta.safetensors"}),
    "partitions": ("drawn", {"deepspeed": ZERO3}),
    "partitions, greedy": ("greedy", {"deepspeed": ZERO3, "settings": GREEDY}),
    "partitions, a delta": ("delta", {"deepspeed": ZERO3, "delta": "delta.safetensors"}),
    "partitions, offloaded": ("drawn", {"deepspeed": OFFLOAD}),
    "partitions, bfloat16": ("half", {"deepspeed": ZERO3, "dtype": "bfloat16"}),
}


def run(folder: Path, output: str, **options) -> str:
    found = draw(folder / "model", folder / output, PROMPTS, 2, **options)
    assert (found is None) == (os.environ.get("RANK", "0") != "0")
    return content_of(folder, output)


def content_of(folder: Path, output: str) -> str:
    path = folder / output / "samples.jsonl"
    return path.read_text() if os.environ.get("RANK", "0") == "0" else ""


def save_deltas(folder: Path) -> None:
    """A delta of two layers that changes what is written, and two of other bases."""
    llama = AutoModelForCausalLM.from_pretrained(folder / "model")
    names = [f"model.layers.{layer}.self_attn.v_proj.weight" for layer in (0, 1)]
    index = torch.arange(0, llama.get_parameter(names[0]).numel(), 3)
    changes = {name: (index, torch.full(index.shape, 0.3)) for name in names}
    save_delta(folder / "delta.safetensors", llama, changes)
    llama.get_parameter("model.norm.weight").detach().mul_(1.5)
    save_delta(folder / "rest.safetensors", llama, changes)
    for name in names:
        llama.get_parameter(name).detach().add_(1)
    save_delta(folder / "other.safetensors", llama, changes)


def checks(folder: Path) -> None:
    os.chdir(folder)  # where the deltas are
    rank = int(os.environ["RANK"])
    # Joining takes longer than these runs.
    with mock.patch.object(process_group, "leave_distributed"):
        for name, (alone, options) in RUNS.items():
            with told_as(name):
                assert run(folder, name, **options) == content_of(folder, f"alone/{alone}")
        check_interruption(folder)
        other_seed = {"settings": replace(DRAWN, seed=2)}
        check_refusal(rank, "seed 1 and not 2", folder, "whole models", **other_seed)
        other_base = {"deepspeed": ZERO3, "delta": "other.safetensors"}
        check_refusal(rank, "base", folder, "other", **other_base)
        other_rest = {"deepspeed": ZERO3, "delta": "rest.safetensors"}
        check_refusal(rank, "the first is 'model.norm.weight'", folder, "other", **other_rest)
        check_error(folder, rank)
    process_group.leave_distributed()


def check_interruption(folder: Path) -> None:
    complete, interruptions = Transformers.complete, []

    def interrupted(self, requests):
        if len(requests) == 4 and not interruptions:
            interruptions.append(requests)
            raise KeyboardInterrupt
        return complete(self, requests)

    with mock.patch.object(Transformers, "complete", interrupted):
        with pytest.raises(KeyboardInterrupt):
            run(folder, "cut")
        assert content_of(folder, "cut").count("\n") == (4 if os.environ["RANK"] == "0" else 0)
        assert run(folder, "cut") == content_of(folder, "alone/drawn")


def check_refusal(rank: int, message: str, folder: Path, output: str, **options) -> None:
    with pytest.raises(ValueError if rank == 0 else PeerError) as caught:
        run(folder, output, **options)
    assert message in str(caught.value)


def check_error(folder: Path, rank: int) -> None:
    """What goes wrong on rank 1 is told on rank 0, and nobody waits for ever."""

    def refuse(self, requests):
        raise ValueError("The memory is full.")

    broken = mock.patch.object(Transformers, "complete", refuse) if rank == 1 else nullcontext()
    with broken:
        check_refusal(rank, "The memory is full.", folder, "broken")


def test_on_two_ranks(tmp_path):
    folder = make_tiny(tmp_path).folder
    save_deltas(folder)
    with one_rank():
        run(folder, "alone/drawn")
        lines = map(json.loads, run(folder, "alone/greedy", settings=GREEDY).splitlines())
        run(folder, "alone/delta", delta=str(folder / "delta.safetensors"))
        run(folder, "alone/half", dtype="bfloat16")
    numbers = {entry["task_id"]: entry["num_tokens"] for entry in lines}
    assert numbers["task/long"] <= 7, "these prompts reach the end of the positions"
    assert numbers["task/longer"] <= 4
    run_ranks(2, checks, folder)


def test_one_process_partitions_too_and_refuses_what_partitions_nothing(tmp_path, monkeypatch):
    folder = make_tiny(tmp_path).folder
    with one_rank():
        assert run(folder, "zero3", deepspeed=ZERO3) == run(folder, "alone")
        monkeypatch.setattr(model, "load_partitioned", None)
        with pytest.raises(ValueError, match="leaves the model whole on each rank"):
            run(folder, "out", deepspeed=str(DS_CONFIGS / "zero1.json"))
    assert not (folder / "out").exists()
