"""Sampling on two real ranks, whole models and ZeRO-3 partitions, against one process."""

import json
import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from gem_ds.distributed import process_group
from gem_ds.errors import PeerError
from gem_ds.evaluate import sampling
from gem_ds.evaluate.arguments import SamplingArguments
from gem_ds.evaluate.decoding import Transformers
from gem_ds.evaluate.generation import GenerationSettings
from gem_ds.evaluate.sampling import sample_all
from gem_ds.files.delta import Delta
from gem_ds.files.mask import Mask, WeightInfo, checksum
from tests.ranks import run_ranks, told_as
from tests.tiny import DS_CONFIGS
from tests.tiny_model import make_tiny, one_rank

pytestmark = [
    pytest.mark.slow,  # starts engines or programs
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

#: Batches of 2, 2 (alone in their rounds, so that rank 1 is idle), 4, 4 and 4.
PROMPTS = {f"task/{i}": f"Say {'so ' * (i % 4)}{i}" for i in range(6)} | {
    # So near the end of the model's 128 positions that the completion is cut there.
    "task/long": "a" * 121,
    "task/longer": "b" * 124,
}
DRAWN = GenerationSettings(
    max_new_tokens=9, stop_strings=("zz",), temperature=1.2, top_p=0.9, seed=1
)
GREEDY = replace(DRAWN, temperature=0.0)
ZERO3 = str(DS_CONFIGS / "zero3.json")
OFFLOAD = str(DS_CONFIGS / "zero3_offload.json")
#: By what differs: what one process has written, and the settings and flags of the ranks.
RUNS = {
    "whole models": ("drawn", DRAWN, {}),
    "whole models, a delta": ("delta", DRAWN, {"delta": "delta.safetensors"}),
    "partitions": ("drawn", DRAWN, {"deepspeed": ZERO3}),
    "partitions, greedy": ("greedy", GREEDY, {"deepspeed": ZERO3}),
    "partitions, a delta": ("delta", DRAWN, {"deepspeed": ZERO3, "delta": "delta.safetensors"}),
    "partitions, offloaded": ("drawn", DRAWN, {"deepspeed": OFFLOAD}),
    "partitions, bfloat16": ("half", DRAWN, {"deepspeed": ZERO3, "dtype": "bfloat16"}),
}


def arguments(folder: Path, output: str, /, **changes) -> SamplingArguments:
    options = {
        "model_name_or_path": str(folder / "model"),
        "output_dir": str(folder / output),
        "batch_size": 4,
        "dtype": "float32",
        "disable_tqdm": True,
    }
    return SamplingArguments(**options | changes)


def run(folder: Path, output: str, settings=DRAWN, **changes) -> str:
    """One run; returns what its file holds."""
    found = sample_all(arguments(folder, output, **changes), PROMPTS, settings, num_samples=2)
    assert (found is None) == (os.environ.get("RANK", "0") != "0")
    return content_of(folder, output)


def content_of(folder: Path, output: str) -> str:
    path = folder / output / "samples.jsonl"
    return path.read_text() if os.environ.get("RANK", "0") == "0" else ""


def expected(folder: Path, output: str) -> str:
    return content_of(folder, f"alone/{output}")


def save_delta(path: Path, model: Path, other_base: bool = False) -> None:
    """A delta of two layers that changes what is written."""
    from transformers import AutoModelForCausalLM

    weights = dict(AutoModelForCausalLM.from_pretrained(model).named_parameters())
    indices, infos, values = {}, {}, {}
    for layer in (0, 1):
        name = f"model.layers.{layer}.self_attn.v_proj.weight"
        weight = weights[name].detach().reshape(-1)
        indices[name] = torch.arange(0, weight.numel(), 3, dtype=torch.int32)
        base = weight[indices[name].long()]
        infos[name] = WeightInfo(
            shape=tuple(weights[name].shape),
            dtype="float32",
            checksum=checksum(base + other_base),
        )
        values[name] = base + 0.3
    mask = Mask(indices=indices, weights=infos, base_model="base", settings={})
    Delta(mask=mask, values=values).save(path)


def checks(folder: Path) -> None:
    os.chdir(folder)  # where the deltas are
    rank = int(os.environ["RANK"])
    with mock.patch.object(
        process_group, "leave_distributed"
    ):  # joining takes longer than these runs
        for name, (alone, settings, changes) in RUNS.items():
            with told_as(name):
                assert run(folder, name, settings, **changes) == expected(folder, alone)
        check_interruption(folder)
        check_refusal(rank, "seed 1 and not 2", folder, "whole models", replace(DRAWN, seed=2))
        other = {"deepspeed": ZERO3, "delta": "other.safetensors"}
        check_refusal(rank, "base", folder, "other", DRAWN, **other)
        check_error(folder, rank)
    process_group.leave_distributed()


def check_interruption(folder: Path) -> None:
    """Both ranks stop in their first full batch; started again they go on to the same file."""
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
        assert run(folder, "cut") == expected(folder, "drawn")


def check_refusal(rank: int, message: str, folder: Path, *args, **changes) -> None:
    with pytest.raises(ValueError if rank == 0 else PeerError) as caught:
        run(folder, *args, **changes)
    assert message in str(caught.value)


def check_error(folder: Path, rank: int) -> None:
    """What goes wrong on rank 1 is told on rank 0, and nobody waits for ever."""

    def refuse(self, requests):
        raise ValueError("The memory is full.")

    broken = mock.patch.object(Transformers, "complete", refuse)
    with (
        pytest.raises((ValueError, PeerError)) as caught,
        broken
        if rank == 1
        else mock.Mock(__enter__=mock.Mock(), __exit__=mock.Mock(return_value=False)),
    ):
        run(folder, "broken")
    assert "The memory is full." in str(caught.value)
    assert isinstance(caught.value, ValueError if rank == 0 else PeerError)


def test_on_two_ranks(tmp_path):
    folder = make_tiny(tmp_path).folder
    save_delta(folder / "delta.safetensors", folder / "model")
    save_delta(folder / "other.safetensors", folder / "model", other_base=True)
    delta = str(folder / "delta.safetensors")
    with one_rank():
        run(folder, "alone/drawn")
        run(folder, "alone/greedy", GREEDY)
        run(folder, "alone/delta", delta=delta)
        run(folder, "alone/half", dtype="bfloat16")
    run_ranks(2, checks, folder)


def test_one_process_partitions_too(tmp_path):
    folder = make_tiny(tmp_path).folder
    with one_rank():
        run(folder, "alone/drawn")
        assert run(folder, "zero3", deepspeed=ZERO3) == expected(folder, "drawn")


def test_a_configuration_that_partitions_nothing_is_refused(tmp_path, monkeypatch):
    folder = make_tiny(tmp_path).folder
    monkeypatch.setattr(sampling, "load_partitioned", None)
    with one_rank():
        with pytest.raises(ValueError, match="leaves the model whole on each rank"):
            run(folder, "out", deepspeed=str(DS_CONFIGS / "zero1.json"))
        with pytest.raises(ValueError, match="nowhere cannot be read"):
            run(folder, "out", deepspeed="nowhere")
    assert not (folder / "out").exists()


def test_the_prompts_reach_the_end_of_the_positions(tmp_path):
    """Otherwise the cases above would not show that ranks stop together there."""
    folder = make_tiny(tmp_path).folder
    with one_rank():
        lines = map(json.loads, run(folder, "alone", GREEDY).splitlines())
    numbers = {entry["task_id"]: entry["num_tokens"] for entry in lines}
    assert numbers["task/long"] <= 7
    assert numbers["task/longer"] <= 4
