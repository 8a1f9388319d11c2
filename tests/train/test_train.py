"""The command line, end to end: what a run leaves, and that it is what the flags asked for."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

import gem_ds
from gem_ds.distributed.comm import free_port
from gem_ds.errors import PeerError
from gem_ds.files.checkpoint import list_checkpoints
from gem_ds.files.delta import Delta, apply_delta
from gem_ds.files.mask import Mask
from gem_ds.models import export
from gem_ds.train import main as train
from gem_ds.train.reporting import TENSORBOARD_FOLDER, Reporter
from tests.ranks import CPU_ONLY, run_ranks
from tests.tiny_model import (
    REPOSITORY,
    Tiny,
    joined,
    mains,
    make_tiny,
    one_rank,
    write_jsonl,
)

pytestmark = [
    pytest.mark.slow,  # starts engines or programs
    pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

ZERO3 = REPOSITORY / "ds_configs" / "zero3.json"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    with one_rank():
        yield make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def whole(tiny: Tiny) -> Path:
    """A run of three epochs that saves and evaluates at the end of each."""
    train.main(tiny.flags(tiny.folder / "whole", num_train_epochs=3, logging_steps=4))
    return tiny.folder / "whole"


def delta_of(folder: Path) -> Delta:
    return Delta.load(folder / "delta.safetensors")


def metrics(folder: Path, key: str) -> list[float]:
    """The values of ``key`` in metrics.jsonl, in order."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


def assert_same_delta(folder: Path, other: Path) -> None:
    found, expected = delta_of(folder), delta_of(other)
    assert found.values.keys() == expected.values.keys()
    for name, values in expected.values.items():
        assert torch.equal(found.mask.indices[name], expected.mask.indices[name]), name
        assert torch.equal(found.values[name], values), name


def assert_close_deltas(folder: Path, other: Path) -> None:
    found, expected = delta_of(folder), delta_of(other)
    for name, values in expected.values.items():
        assert torch.equal(found.mask.indices[name], expected.mask.indices[name]), name
        torch.testing.assert_close(found.values[name], values, rtol=1e-5, atol=1e-7)


def naive_loss(model: PreTrainedModel, tiny: Tiny, data: Path) -> float:
    """Mean loss per answer token, one example at a time."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    total, count = 0.0, 0
    for line in data.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
        answer = tokenizer(f" {row['answer']}")["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total += F.cross_entropy(logits.float(), torch.tensor(answer), reduction="sum").item()
        count += len(answer)
    return total / count


# What a run leaves


def test_a_run_leaves_everything(whole):
    """DESIGN 5: mask, delta, checkpoints, metrics, state, results and a model card."""
    steps_per_epoch, num_steps = 6, 18  # 22 examples by 4, the last step of an epoch with 2
    assert sorted(path.name for path in whole.iterdir()) == [
        "README.md",
        "all_results.json",
        *sorted(f"checkpoint-{epoch * steps_per_epoch}" for epoch in (1, 2, 3)),
        "delta.safetensors",
        "mask.safetensors",
        "metrics.jsonl",
        "trainer_state.json",
    ]
    results = json.loads((whole / "all_results.json").read_text())
    state = json.loads((whole / "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"], state["epoch"]) == (num_steps, num_steps, 3.0)
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert state["log_history"] == lines
    assert [line["step"] for line in lines if "loss" in line] == [4, 8, 12, 16, 18]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 6, 12, 18]
    assert results["global_step"] == num_steps
    assert results["num_trainable"] == delta_of(whole).mask.num_selected == 475
    assert results["num_parameters"] == 23_776
    assert 0 < results["changed_share"] <= 1
    assert results["last_loss"] == metrics(whole, "loss")[-1]
    assert results["first_eval_loss"] == metrics(whole, "eval_loss")[0]
    for key in ("learning_rate", "tokens_per_second", "changed_share"):
        assert len(metrics(whole, key)) == 5, key
    for key in ("effective_layers", "selected_near_zero"):
        assert len(metrics(whole, key)) == 1, key
    for key in ("loss", "eval_loss"):
        assert metrics(whole, key)[-1] < metrics(whole, key)[0], key


def test_the_model_card_says_what_was_done(whole, tiny):
    card = (whole / "README.md").read_text()
    results = json.loads((whole / "all_results.json").read_text())
    assert "475 of its 23,776 parameters (1.9978%)" in card
    assert f"| held-out loss | {results['first_eval_loss']:.4g} | " in card
    assert f"| {results['last_eval_loss']:.4g} |" in card
    for name, value in (("density", "0.02"), ("steps", 18), ("examples per step", 4), ("seed", 42)):
        assert f"| {name} | {value} |" in card


@pytest.mark.parametrize(
    "switches",
    [[], ["--bf16", "--deepspeed", str(ZERO3)]],
)
def test_the_exported_model_is_base_plus_delta_and_has_the_loss_of_the_run(
    tiny, tmp_path, switches
):
    """Every entry that was not selected keeps its bits, and reverting gives all of them back."""
    folder, exported = tmp_path / "run", tmp_path / "exported"
    train.main(tiny.flags(folder, *switches, max_steps=5))
    arguments = {
        "model_name_or_path": tiny.model,
        "delta": folder / "delta.safetensors",
        "output_dir": exported,
    }
    export.main([t for k, v in arguments.items() for t in (f"--{k}", str(v))])
    delta = delta_of(folder)
    base, model, applied = (
        AutoModelForCausalLM.from_pretrained(path, dtype=delta.dtype)
        for path in (tiny.model, exported, tiny.model)
    )
    handle = apply_delta(applied, delta)
    for (name, before), after, patched in zip(
        base.named_parameters(), model.parameters(), applied.parameters(), strict=True
    ):
        expected = before.detach().clone()
        if name in delta.values:
            index = delta.mask.indices[name].long()
            assert not torch.equal(expected.view(-1)[index], delta.values[name]), "it was trained"
            expected.view(-1)[index] = delta.values[name]
        assert torch.equal(after, expected), name
        assert torch.equal(patched, expected), name
    handle.revert()
    assert all(map(torch.equal, applied.parameters(), base.parameters()))
    tolerance = 2e-3 if "--bf16" in switches else 1e-5
    first, *_, last = metrics(folder, "eval_loss")
    held_out = tiny.data / "test.jsonl"
    assert naive_loss(base, tiny, held_out) == pytest.approx(first, rel=tolerance)
    assert naive_loss(model, tiny, held_out) == pytest.approx(last, rel=tolerance)


# What the flags ask for


def test_a_mask_made_first_gives_the_same_delta(tiny, whole, tmp_path, capsys):
    flags = {"num_train_epochs": 3, "logging_steps": 4}
    train.main(tiny.flags(tmp_path / "mask", **flags | {"max_steps": 0}))
    assert "Wrote the mask to" in capsys.readouterr().out
    assert not (tmp_path / "mask" / "delta.safetensors").exists()
    assert not list_checkpoints(tmp_path / "mask")
    mask = tmp_path / "mask" / "mask.safetensors"
    train.main(tiny.flags(tmp_path / "run", **flags | {"mask": mask, "density": None}))
    assert_same_delta(tmp_path / "run", whole)
    assert Mask.load(tmp_path / "run" / "mask.safetensors").settings == Mask.load(mask).settings
    assert "| density | 0.02 |" in (tmp_path / "run" / "README.md").read_text(), "the mask's own"


def test_the_model_card_names_the_method_of_the_entries(tiny, tmp_path):
    """The mask's and the checkpoint's, whatever --method would choose now."""
    train.main(tiny.flags(tmp_path / "mask", method="magnitude", max_steps=0))
    flags = {"max_steps": 1, "density": None, "method": "gem"}
    mask = tmp_path / "mask" / "mask.safetensors"
    train.main(tiny.flags(tmp_path / "masked", mask=mask, **flags))
    checkpoint = tmp_path / "masked" / "checkpoint-1"
    train.main(tiny.flags(tmp_path / "resumed", resume_from_checkpoint=checkpoint, **flags))
    for name in ("masked", "resumed"):
        card = (tmp_path / name / "README.md").read_text()
        assert "| method | magnitude |" in card
        assert "with `magnitude`" in card
        assert "GEM, gradient-to-weight" not in card
        assert Mask.load(tmp_path / name / "mask.safetensors").method == "magnitude"


def test_a_mask_serves_another_dtype(tiny, whole, tmp_path):
    mask = whole / "mask.safetensors"
    train.main(tiny.flags(tmp_path / "run", "--bf16", mask=mask, max_steps=2))
    delta = delta_of(tmp_path / "run")
    assert delta.dtype == torch.bfloat16
    apply_delta(AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.bfloat16), delta)


def _finetune(calls: list[dict[str, Any]]) -> list[gem_ds.RunResult]:
    """One call after another, each joining and leaving by itself, as in a notebook."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)
    verbosity = logging.get_verbosity()
    results = [gem_ds.finetune(**call) for call in calls]
    assert logging.get_verbosity() == verbosity
    assert "RANK" not in os.environ
    return results


def test_python_runs_what_the_command_line_does(tiny, whole, tmp_path):
    """With numbers as numbers, on top of a recipe, and twice in a process."""
    recipe = {"task": "gsm8k", "data_dir": str(tiny.data), "logging_steps": 4, "max_steps": 1}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    values = {"density": 0.02, "learning_rate": 0.01, "per_device_train_batch_size": 4}
    common = {"config": tmp_path / "recipe.yaml", "model_name_or_path": tiny.model} | values
    more = {"method": "lora", "density": None, "eval_strategy": "no", "output_dir": tmp_path / "a"}
    calls = [common | {"output_dir": tmp_path / "run", "max_steps": -1}, common | more]
    ((result, lora),) = run_ranks(1, _finetune, calls)
    assert_same_delta(tmp_path / "run", whole)
    assert result.output_dir == tmp_path / "run"
    assert result.results == json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert result.log_history[-1]["step"] == 18
    assert Mask.load(result.mask).num_selected == Delta.load(result.delta).mask.num_selected == 475
    assert (result.adapter, result.model, result.metrics, result.stopped) == (None, None, {}, False)
    assert (lora.adapter, lora.mask, lora.delta) == (tmp_path / "a" / "adapter", None, None)
    assert "last_eval_loss" not in lora.results
    with pytest.raises(ValueError, match=r"^There is no flag --densty: see --help\.$"):
        gem_ds.finetune(**common, output_dir=tmp_path / "new", densty=0.1)
    with pytest.raises(ValueError, match=r"invalid int value: '1\.5'"):
        gem_ds.finetune(**common, output_dir=tmp_path / "new", max_steps=1.5)


def test_the_held_out_loss_comes_when_it_is_asked_for_and_of_so_many_examples(tiny, tmp_path):
    values = {"max_steps": 4, "max_eval_samples": 2, "logging_steps": 3, "eval_strategy": "steps"}
    train.main(tiny.flags(tmp_path / "run", **values))
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3, 4]
    two = tmp_path / "two.jsonl"
    two.write_text("".join((tiny.data / "test.jsonl").read_text().splitlines(keepends=True)[:2]))
    loss = naive_loss(AutoModelForCausalLM.from_pretrained(tiny.model), tiny, two)
    assert metrics(tmp_path / "run", "eval_loss")[0] == pytest.approx(loss, rel=1e-5)


def test_how_a_step_is_computed_changes_nothing(tiny, whole, tmp_path):
    """Recomputation and the cut into micro-batches; a step of 3 is another step, as a control."""
    values = {"max_steps": 7, "mask": whole / "mask.safetensors", "density": None}
    train.main(tiny.flags(tmp_path / "plain", **values))
    train.main(tiny.flags(tmp_path / "again", "--gradient_checkpointing", **values))
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    train.main(tiny.flags(tmp_path / "cut", **values | cut))
    train.main(tiny.flags(tmp_path / "other", **values | {"per_device_train_batch_size": 3}))
    assert_close_deltas(tmp_path / "again", tmp_path / "plain")
    assert_close_deltas(tmp_path / "cut", tmp_path / "plain")
    with pytest.raises(AssertionError):
        assert_close_deltas(tmp_path / "other", tmp_path / "plain")


def test_packing_reads_the_same_examples_in_fewer_rows(tiny, tmp_path):
    """One step over all examples is the same step, packed or not."""
    values = {"max_steps": 1, "per_device_train_batch_size": 22, "deepspeed": ZERO3}
    train.main(tiny.flags(tmp_path / "rows", **values))
    train.main(tiny.flags(tmp_path / "packed", "--packing", **values | {"max_length": 128}))
    assert_close_deltas(tmp_path / "packed", tmp_path / "rows")
    assert metrics(tmp_path / "packed", "eval_loss") == pytest.approx(
        metrics(tmp_path / "rows", "eval_loss"), rel=1e-5
    )


def test_own_fields_and_chat_messages_are_trained_on(tiny, tmp_path):
    """The same text three ways is the same run."""
    rows = [json.loads(line) for line in (tiny.data / "train.jsonl").read_text().splitlines()]
    pairs = [{"p": f"Question: {r['question']}\nAnswer:", "t": f" {r['answer']}"} for r in rows]
    chats = [
        {
            "messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ]
        }
        for row in rows
    ]
    # as the chat template does it
    rendered = [{"p": f"<user>{row['question']}<assistant>", "t": row["answer"]} for row in rows]
    runs: dict[str, dict[str, object]] = {
        "gsm8k": {},
        "fields": {"task": "jsonl", "train_file": write_jsonl(tmp_path / "a.jsonl", pairs)},
        "chat": {"task": "jsonl", "train_file": write_jsonl(tmp_path / "b.jsonl", chats)},
        "template": {"task": "jsonl", "train_file": write_jsonl(tmp_path / "c.jsonl", rendered)},
    }
    for name, values in runs.items():
        if name != "gsm8k":
            values |= {"data_dir": None}
        if name in ("fields", "template"):
            values |= {"prompt_field": "p", "target_field": "t"}
        train.main(tiny.flags(tmp_path / name, **{"max_steps": 3} | values))
    assert_same_delta(tmp_path / "fields", tmp_path / "gsm8k")
    assert_same_delta(tmp_path / "chat", tmp_path / "template")
    assert not metrics(tmp_path / "fields", "eval_loss"), "there is no held-out file"
    assert metrics(tmp_path / "gsm8k", "eval_loss")


def test_only_so_many_checkpoints_are_kept_and_tensorboard_gets_the_metrics(tiny, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = {"max_steps": 5, "save_steps": 1, "save_total_limit": 2, "logging_steps": 1}
    train.main(tiny.flags(tmp_path, **flags, report_to="tensorboard"))
    assert list(list_checkpoints(tmp_path)) == [4, 5]
    board = accumulator.EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER)).Reload()
    shown = [event.value for event in board.Scalars("loss")]
    assert shown == pytest.approx(metrics(tmp_path, "loss"), rel=1e-6)


def test_a_finished_run_can_be_made_longer_or_overwritten(tiny, tmp_path):
    """A constant rate, since others depend on the number of steps."""
    values = {"lr_scheduler_type": "constant", "max_steps": 6}
    train.main(tiny.flags(tmp_path / "long", **values))
    train.main(tiny.flags(tmp_path / "run", **values | {"max_steps": 4}))
    train.main(tiny.flags(tmp_path / "run", **values, resume_from_checkpoint="last"))
    assert_same_delta(tmp_path / "run", tmp_path / "long")
    mask = tmp_path / "long" / "mask.safetensors"  # its own it would delete
    train.main(tiny.flags(tmp_path / "run", "--overwrite_output_dir", mask=mask, max_steps=2))
    assert list(list_checkpoints(tmp_path / "run")) == [2]


def test_a_model_that_scales_its_logits_is_told_and_trained_all_the_same(tiny, tmp_path, capsys):
    """Such a one needs its logits whole; the tiny Llama's weights, read as a Granite's."""
    model = tiny.variant(
        "granite", model_type="granite", architectures=["GraniteForCausalLM"], logits_scaling=4.0
    )
    train.main(tiny.flags(tmp_path / "run", model_name_or_path=model, max_steps=1))
    assert "logits are more than a product of its output layer" in capsys.readouterr().out
    loss = naive_loss(AutoModelForCausalLM.from_pretrained(model), tiny, tiny.data / "test.jsonl")
    assert metrics(tmp_path / "run", "eval_loss")[0] == pytest.approx(loss, rel=1e-5)
    train.main(tiny.flags(tmp_path / "llama", max_steps=1))
    assert "output layer" not in capsys.readouterr().out


def test_what_a_person_sees(tiny, tmp_path, capsys):
    """The table, what trains, the losses, where it lies: nothing else, and nothing twice."""
    train.main(tiny.flags(tmp_path / "run", max_steps=4, eval_steps=2))
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == "Where the budget went:"
    assert [line.split()[0] for line in lines[1:7]] == [
        "weight",
        *(f"model.layers.{i}.self_attn.{kind}_proj.weight" for i in (0, 1) for kind in "qv"),
        "all",
    ]
    assert lines[7] == (
        "Training 475 of 23,776 parameters (density 1.9978%); optimizer state on this rank: "
        "5,700 bytes"
    )
    kernels = re.findall(r"(?:dense|tiled|gather|library) \((\d+)(?: layers?)?\)", lines[8])
    assert lines[8].startswith("Kernels of the sampled gradient: ")
    assert sum(map(int, kernels)) == 4
    assert re.fullmatch(
        r"The budget is as concentrated as if 2\.\d of the 4 layers shared it equally; "
        r"\d+ selected weights are nearly zero \(below 0\.0001\)",
        lines[9],
    )
    assert [re.sub(r"\d\.\d{4}", "x", line) for line in lines[10:]] == [
        "step 0: held-out loss x",
        "step 2: held-out loss x",
        "step 4: held-out loss x",
        f"Wrote the delta and the results to {tmp_path / 'run'}",
    ]


# Real processes


def _start(command: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | CPU_ONLY
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def _has_logged(folder: Path, num_entries: int) -> Callable[[], bool]:
    path = folder / "metrics.jsonl"
    return lambda: path.is_file() and path.read_text().count('"loss"') >= num_entries


SLOW = {"max_steps": 400, "logging_steps": 1, "save_steps": 1000, "lr_scheduler_type": "constant"}


def _shorten(flags: list[str], folder: Path) -> list[str]:
    """The same run until three steps after its last checkpoint."""
    step = max(list_checkpoints(folder)) + 3
    return [str(step) if text == str(SLOW["max_steps"]) else text for text in flags]


def _terminated_on_one_rank(flags: list[str], victim: int, step: int) -> bool:
    """On each rank: run; the victim gets a SIGTERM after a step. Whether it was stopped."""

    def watch(reporter: Reporter, *_: float) -> None:
        if int(os.environ["RANK"]) == victim and reporter._state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with joined(), mock.patch.object(Reporter, "advance", watch):
        result = train.main(flags)
    assert (result.results, result.delta) == ({}, None)
    return result.stopped


def test_sigterm_on_one_rank_stops_all(tiny, tmp_path):
    flags = tiny.flags(tmp_path, max_steps=9, save_steps=5, deepspeed=ZERO3)
    assert run_ranks(2, _terminated_on_one_rank, flags, 1, 2) == [True, True]
    assert list(list_checkpoints(tmp_path)) == [3], "the step after which all ranks knew of it"


def _errors(cases: list[tuple[list[list[str]], int]]) -> list[str]:
    """What ends this rank's runs: its flags in each, and which rank does not find the weights."""
    with joined():
        return [_error_of(flags[int(os.environ["RANK"])], rank) for flags, rank in cases]


def _error_of(flags: list[str], unreadable_on: int) -> str:
    rank = int(os.environ["RANK"])
    read = AutoModelForCausalLM.from_pretrained

    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        if rank == unreadable_on:
            raise OSError("there is no network")
        return read(*args, **kwargs)

    patched = mock.patch.object(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with patched, pytest.raises((ValueError, PeerError)) as caught:
        train.main(flags)
    return str(caught.value)


def test_ranks_that_differ_stop_together(tiny, tmp_path):
    """They would wait for each other in different collectives."""
    plain = tiny.flags(tmp_path)
    others: list[dict[str, object]] = [
        {"method": "ratio"},
        {"calibration_examples": 3},
        {"seed": 5},
    ]
    cases = [([plain, tiny.flags(tmp_path, **flag)], -1) for flag in others]
    (*told, unreadable), (*followed, stopped) = run_ranks(2, _errors, [*cases, ([plain] * 2, 1)])
    for error in told + followed:
        assert error.startswith("The ranks do not see the same run")
    assert re.fullmatch("On rank 1: .* cannot be loaded: there is no network", unreadable)
    assert re.fullmatch("Rank 1 stopped: .* cannot be loaded: there is no network", stopped)


def test_a_resumed_run_tells_which_flags_have_changed(tiny, tmp_path, capsys):
    train.main(tiny.flags(tmp_path, max_steps=2))
    capsys.readouterr()
    resume = {"resume_from_checkpoint": "last", "weight_decay": 0.1}
    train.main(tiny.flags(tmp_path, max_steps=3, **resume))
    assert "Going on with --weight_decay 0.1 instead of 0.0\n" in capsys.readouterr().out
    train.main(tiny.flags(tmp_path, max_steps=4, **resume))
    assert "Going on" not in capsys.readouterr().out


def _launch(flags: list[str]) -> subprocess.Popen[str]:
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    if not Path(launcher).is_file():
        pytest.skip("the deepspeed command is not beside this python")
    options = ["--quiet", "--num_accelerators", "2", "--master_port", str(free_port())]
    return _start([launcher, *options, "launch/train.py", *flags, "--deepspeed", str(ZERO3)])


def test_two_ranks_under_the_launcher_stop_and_go_on(tiny, tmp_path):
    """A scheduler signals the whole group; then the run goes on to the end."""
    flags = tiny.flags(tmp_path / "run", **SLOW | {"per_device_train_batch_size": 2})
    process = _launch(flags)
    _wait_for(_has_logged(tmp_path / "run", 3), process)
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=240)
    (step,) = list_checkpoints(tmp_path / "run")
    assert process.returncode != 0, "the launcher itself was told to end"
    assert "Warning" not in out
    assert f"Stopped by SIGTERM after step {step}; go on with" in out
    assert "Traceback" not in out
    flags = _shorten(flags, tmp_path / "run")
    process = _launch([*flags, "--resume_from_checkpoint", "last"])
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    assert "Traceback" not in out
    assert out.count("Wrote the delta and the results to") == 1
    assert out.count("Training 475 of 23,776 parameters") == 1
    flags[flags.index("--output_dir") + 1] = str(tmp_path / "undisturbed")
    run_ranks(2, mains, [*flags, "--deepspeed", str(ZERO3)])
    assert_same_delta(tmp_path / "run", tmp_path / "undisturbed")


def test_bad_input_under_the_launcher_ends_in_one_sentence(tiny, tmp_path):
    process = _launch(tiny.flags(tmp_path / "run", density="2"))
    out, _ = process.communicate(timeout=240)
    assert process.returncode not in (0, None)
    errors = [line for line in out.splitlines() if line.startswith("Error: ")]
    assert errors == [
        "Error: The density is 2: give the share of the parameters to train, a number above 0 and "
        "at most 1, such as 0.001."
    ]
    assert "Traceback" not in out
    assert not (tmp_path / "run").exists()
