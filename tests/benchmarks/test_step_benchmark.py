"""The benchmark of a step: it runs as documented, and what it counts keeps its promises."""

import json
from importlib import import_module
from unittest import mock

import pytest
import torch

from benchmarks.steps.host_tensors import HostTensors
from benchmarks.steps.operations import count_operations
from benchmarks.steps.shapes import SHAPES, adapter_size
from gem_ds.distributed.comm import Comm
from gem_ds.distributed.zero_config import read_config
from gem_ds.planning.forecast import forecast
from gem_ds.planning.subject import Setting
from gem_ds.train.arguments import parse_arguments
from tests.tiny import DS_CONFIGS
from tests.tiny_model import REPOSITORY

pytestmark = pytest.mark.slow  # starts engines or programs


def test_gem_keeps_twelve_bytes_an_entry_and_sends_at_most_twenty(tmp_path, monkeypatch, capsys):
    """The gathers of the frozen weights, on two ranks at stage 3, are those of the forecast.

    A stand-in takes the turns that are timed; what a step needs is found in real processes.
    """
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    step = import_module("step")
    timed = mock.Mock(**{"ask.return_value": [0.5], "start_seconds": 0.1})
    monkeypatch.setattr(step, "Ranks", mock.Mock(**{"start.return_value": timed}))
    command = "--shape tiny --world_size 2 --stage 3 --tokens 16 --rounds 2 --steps 1"
    command += f" --contenders gem --density 0.01 --output_dir {tmp_path}"
    step.main(command.split())
    table = (tmp_path / "table.md").read_text()
    assert capsys.readouterr().out.endswith(table)
    assert [line.split("|")[1].strip() for line in table.splitlines()[4:]] == ["gem"]
    found = json.loads((tmp_path / "numbers.json").read_text())["gem"]
    assert found["seconds"] == [0.5] * 2
    assert found["peak_bytes"] > 0
    k = found["num_trainable"]
    padding = 2 * 12  # one entry more on one rank
    assert 12 * k <= found["state_bytes"] <= 12 * k + padding
    assert 4 * k <= found["others"] <= 20 * k
    flags = "--model_name_or_path m --density 0.01 --max_length 16 --per_device_train_batch_size 4"
    told = forecast(
        Setting(
            args=parse_arguments(flags.split(), needed=[]),
            config=SHAPES["tiny"](None),
            deepspeed=read_config(DS_CONFIGS / "zero3.json"),
            world_size=2,
        )
    )
    assert k == told.num_trained
    assert told.weight_gathers == pytest.approx(found["weights"], rel=0.05)
    assert told.step_messages == pytest.approx(found["others"], rel=0.05)
    assert told.state == pytest.approx(found["state_bytes"], rel=0.05)
    dense = 12 * told.num_parameters  # what a checkpoint of full fine-tuning needs at least
    assert 12 * k < found["checkpoint_bytes"] < 0.05 * dense


def test_adapters_train_at_least_as_much_with_the_smallest_rank_that_does():
    config = SHAPES["tiny"](None)
    for density in (0.001, 0.01, 0.2):
        rank, reached = adapter_size(config, density)
        assert reached - reached / rank < density <= reached


class Reads(torch.autograd.Function):
    """The identity, whose backward reads a number of a tensor that it is given."""

    @staticmethod
    def forward(ctx, x, number):
        ctx.number = number
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        assert int(ctx.number[0] + 1) == 2
        return dy.clone(), None


def test_reads_of_the_hosts_own_tensors_are_no_waits():
    """In a backward pass either; what is computed from a weight, or sent to it, is the device's."""
    weight = torch.ones(3, requires_grad=True)  # made before, as all that a run has loaded
    device = weight.device
    with HostTensors():
        made, placed = torch.arange(1, 4), torch.arange(1, 4, device=device)
        for own, num_waits in ((made, 0), (placed, 1), (made.to(device), 1), (weight.detach(), 1)):
            for read in (own.tolist, own[:1].item, own.nonzero, lambda t=own: bool(t[0] == 1)):
                assert count_operations(read)["host_waits"] == num_waits
            found = count_operations(Reads.apply(weight, own).sum().backward)
            assert found["host_waits"] == num_waits
        assert count_operations(lambda: made + placed)["launches"] == 1
        assert count_operations(lambda: made + made)["launches"] == 0


def test_selection_is_timed_over_shards_and_over_gathered_matrices(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    problem = import_module("selection").Problem(Comm(torch.device("cpu")), 16, 2)
    assert problem.sharded() > 0
    assert problem.gathered() > 0


def test_a_block_of_gem_launches_hardly_more_than_a_frozen_one_and_lora_does(monkeypatch):
    """At the sizes of Llama-3-8B, forward and backward."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    block_of = import_module("launches").block_of
    for checkpointing in (False, True):
        launches = {
            name: block_of(name, 16, checkpointing=checkpointing, stage=3)[0]
            for name in ("floor", "gem", "lora")
        }
        assert launches["gem"] <= launches["floor"] + 2
        assert launches["lora"] >= launches["floor"] + 20
