"""The command line, end to end: what a run leaves, and that it is what the flags asked for."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

import gem_ds
from gem_ds import cli
from gem_ds.distributed.comm import free_port
from gem_ds.errors import PeerError
from gem_ds.files.apply import apply_delta
from gem_ds.files.checkpoint import Checkpoint, list_checkpoints
from gem_ds.files.delta import Delta
from gem_ds.files.mask import Mask
from gem_ds.report.main import write_report
from gem_ds.train import main as train
from gem_ds.train import results, run
from gem_ds.train.reporting import TENSORBOARD_FOLDER, Reporter
from tests import oracle
from tests.ranks import CPU_ONLY, VARIABLES, run_ranks
from tests.runs import assert_same_delta, delta_of, logged, rows_of
from tests.tiny import bits, naive_loss
from tests.tiny_model import REPOSITORY, Tiny, joined

pytestmark = pytest.mark.slow  # starts engines or programs

ZERO3 = REPOSITORY / "ds_configs" / "zero3.json"


@pytest.fixture(scope="module")
def whole(tiny: Tiny) -> Path:
    """A run of three epochs that saves and evaluates at the end of each."""
    train.main(tiny.flags(tiny.folder / "whole", num_train_epochs=3, logging_steps=4))
    return tiny.folder / "whole"


def metrics(folder: Path, key: str) -> list[float]:
    """The values of ``key`` in metrics.jsonl, in order."""
    return [value for _, value in logged(folder, key)]


def mean_loss(model: PreTrainedModel, tiny: Tiny, count: int | None = None) -> float:
    """Per answer token of the first held-out examples, one example at a time."""
    examples = tiny.encoded("test.jsonl")[:count]
    with torch.no_grad():
        total = sum(float(naive_loss(model, example)) for example in examples)
    return total / sum(len(tokens) - prompt_length for tokens, prompt_length in examples)


# What a run leaves


def test_a_run_leaves_everything(whole):
    """Mask, delta, checkpoints, metrics, state, results and a model card."""
    num_steps = 18  # 22 examples by 4, the last step of an epoch with 2
    names = "README.md all_results.json delta.safetensors mask.safetensors metrics.jsonl"
    names += " .gem_ds.json trainer_state.json checkpoint-6 checkpoint-12 checkpoint-18 report.html"
    assert {path.name for path in whole.iterdir()} == set(names.split())
    results = json.loads((whole / "all_results.json").read_text())
    state = json.loads((whole / "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"], state["epoch"]) == (num_steps, num_steps, 3.0)
    assert state["log_history"] == rows_of(whole / "metrics.jsonl")
    assert [step for step, _ in logged(whole, "loss")] == [4, 8, 12, 16, 18]
    assert [step for step, _ in logged(whole, "eval_loss")] == [0, 6, 12, 18]
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


def test_the_page_is_the_one_that_the_files_make(whole):
    """The run knows the base's values, the program reads them from the base's files."""
    page = (whole / "report.html").read_text()
    assert "How far values moved" in page
    write_report(whole)
    assert (whole / "report.html").read_text() == page


def test_the_model_card_says_what_was_done(whole, tiny):
    card = (whole / "README.md").read_text()
    results = json.loads((whole / "all_results.json").read_text())
    assert "475 of its 23,776 parameters (1.9978%)" in card
    assert f"| held-out loss | {results['first_eval_loss']:.4g} | " in card
    assert f"| {results['last_eval_loss']:.4g} |" in card
    for name, value in (("density", "0.02"), ("steps", 18), ("examples per step", 4), ("seed", 42)):
        assert f"| {name} | {value} |" in card


def test_the_logged_losses_are_those_of_base_and_delta(whole, tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    first, *_, last = metrics(whole, "eval_loss")
    assert mean_loss(model, tiny) == pytest.approx(first, rel=1e-5)
    with apply_delta(model, delta_of(whole)):
        assert mean_loss(model, tiny) == pytest.approx(last, rel=1e-5)


# What the flags ask for


def test_a_mask_serves_later_runs_in_another_dtype_and_names_its_method(tiny, tmp_path, capsys):
    """The mask's and the checkpoint's method, whatever --method would choose now."""
    train.main(tiny.flags(tmp_path / "mask", method="magnitude", max_steps=0))
    assert "Wrote the mask to" in capsys.readouterr().out
    files = {path.name for path in (tmp_path / "mask").iterdir()}
    assert files == {".gem_ds.json", "mask.safetensors", "metrics.jsonl"}
    flags = {"max_steps": 1, "density": None, "method": "gem", "bf16": True}
    mask = tmp_path / "mask" / "mask.safetensors"
    train.main(tiny.flags(tmp_path / "masked", mask=mask, **flags))
    assert "made in float32 and this run is in bfloat16, so it" in capsys.readouterr().out
    checkpoint = tmp_path / "masked" / "checkpoint-1"
    train.main(tiny.flags(tmp_path / "resumed", resume_from_checkpoint=checkpoint, **flags))
    for name in ("masked", "resumed"):
        card = (tmp_path / name / "README.md").read_text()
        assert "| method | magnitude |" in card
        assert "with `magnitude`" in card
        assert "GEM, gradient-to-weight" not in card
        assert Mask.load(tmp_path / name / "mask.safetensors").method == "magnitude"
        apply_delta(
            AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.bfloat16),
            delta_of(tmp_path / name),
        )


def test_zeros_of_a_pruned_model_stay_and_with_them_its_2_4_pattern(tiny, tmp_path, capsys):
    """To the bit, after training; only where nobody asks for it they are selected, and first."""
    folder = tiny.variant("pruned")
    base = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, weight in base.named_parameters():
            if "proj" in name:
                fours = weight.view(-1, 4)
                fours.scatter_(1, fours.abs().argsort(dim=1)[:, :2], 0.0)
    base.save_pretrained(folder)
    flags = {"model_name_or_path": folder, "density": "0.03", "method": "ratio"}
    train.main(tiny.flags(tmp_path / "kept", **flags, max_steps=4))
    told = "of a matrix 50.00% to 50.00%) are exactly 0 and stay so; --keep_zeros false would train"
    assert told in capsys.readouterr().out
    trained = AutoModelForCausalLM.from_pretrained(folder)
    apply_delta(trained, delta_of(tmp_path / "kept"))
    num_changed = 0
    for before, after in zip(base.parameters(), trained.parameters(), strict=True):
        num_changed += int((before != after).sum())
        assert torch.equal(bits(before)[before == 0], bits(after)[before == 0])
    assert num_changed > 500
    assert delta_of(tmp_path / "kept").mask.settings["keep_zeros"]
    train.main(tiny.flags(tmp_path / "lost", **flags, max_steps=0, keep_zeros=False))
    lost = Mask.load(tmp_path / "lost" / "mask.safetensors")
    chosen = [base.get_parameter(n).flatten()[i.long()] for n, i in lost.indices.items()]
    assert (torch.cat(chosen) == 0).double().mean() > 0.9


def test_auto_rgn_scales_the_rates_by_relative_norms_over_a_resume_too(tiny, tmp_path):
    """Those of dense gradients; a first step of Adam is as large as the rate."""
    flags = {"method": "auto_rgn", "density": None, "max_steps": 3}
    train.main(tiny.flags(tmp_path / "whole", **flags, save_steps=1))
    start = tmp_path / "whole" / "checkpoint-2"
    train.main(tiny.flags(tmp_path / "resumed", **flags, resume_from_checkpoint=start))
    assert_same_delta(tmp_path / "resumed", tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(tiny.model).eval()
    first = Checkpoint.load(tmp_path / "whole" / "checkpoint-1")
    names = list(first.mask.indices)
    gradients = oracle.summed_gradients(model, tiny.encoded("train.jsonl"), naive_loss, names)
    weights = [model.get_parameter(name).detach() for name in names]
    norms = [float(gradients[n].norm() / w.norm()) for n, w in zip(names, weights, strict=True)]
    masters = first.vectors["master"].split([weight.numel() for weight in weights])
    assert min(norms) < 0.8 * max(norms), "the premise"
    for name, weight, norm, master in zip(names, weights, norms, masters, strict=True):
        (factor,) = first.mask.settings["rate_factors"][name]
        assert factor == pytest.approx(norm / max(norms), rel=1e-4)
        moves = (master - weight.flatten()).abs()
        assert moves.median().item() == pytest.approx(0.01 * factor, rel=1e-2)


def test_surgical_trains_what_is_named_whole(tiny, tmp_path):
    flags = {"method": "surgical", "density": None, "max_steps": 1}
    flags["target_modules"] = r"model\.layers\.1\..*_proj"
    train.main(tiny.flags(tmp_path / "run", **flags))
    mask = delta_of(tmp_path / "run").mask
    assert len(mask.indices) == 7
    for name, index in mask.indices.items():
        rows, columns = mask.weights[name].shape
        assert torch.equal(index, torch.arange(rows * columns, dtype=torch.int32))
    assert "density" not in mask.settings


def _finetune(calls: list[dict[str, Any]]) -> list[gem_ds.RunResult]:
    """One call after another, each joining and leaving by itself, as in a notebook."""
    for name in VARIABLES:
        os.environ.pop(name)
    verbosity = logging.get_verbosity()
    results = [gem_ds.finetune(**call) for call in calls]
    assert logging.get_verbosity() == verbosity
    assert "RANK" not in os.environ
    return results


def test_python_runs_what_the_command_line_does(tiny, whole, tmp_path):
    """With numbers as numbers, on top of a recipe, with a mask in memory, again in a process."""
    recipe = {"task": "gsm8k", "data_dir": str(tiny.data), "logging_steps": 4, "max_steps": 1}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    values = {"density": 0.02, "learning_rate": 0.01, "per_device_train_batch_size": 4}
    common = {"config": tmp_path / "recipe.yaml", "model_name_or_path": tiny.model} | values
    mask = gem_ds.Mask.load(whole / "mask.safetensors")
    calls = [
        common | {"output_dir": tmp_path / "run", "max_steps": -1},
        common | {"output_dir": tmp_path / "again", "max_steps": -1, "density": None, "mask": mask},
        common | {"output_dir": tmp_path / "lora", "density": None, "method": "lora"},
    ]
    ((result, masked, lora),) = run_ranks(1, _finetune, calls)
    for found in (result, masked):
        assert_same_delta(found.output_dir, whole)
        assert found.results == json.loads((found.output_dir / "all_results.json").read_text())
        assert found.log_history[-1]["step"] == 18
        assert Mask.load(found.mask).num_selected == Delta.load(found.delta).mask.num_selected
        assert (found.adapter, found.model, found.metrics, found.stopped) == (None, None, {}, False)
    assert masked.results["calibration_seconds"] == 0
    assert Mask.load(masked.mask).settings == mask.settings
    assert "| density | 0.02 |" in (tmp_path / "again" / "README.md").read_text(), "the mask's own"
    adapter = tmp_path / "lora" / "adapter"
    assert (lora.adapter, lora.mask, lora.delta) == (adapter, None, None)
    for wrong, sentence in (
        ({"densty": 0.1}, r"^There is no flag --densty \(meaning --density\?\): leave out what"),
        ({"max_steps": 1.5}, r"invalid int value: '1\.5'"),
        ({"mask": mask, "method": "lora"}, "selects no entries: leave --mask out"),
    ):
        with pytest.raises(ValueError, match=sentence):
            gem_ds.finetune(**common | {"output_dir": tmp_path / "new"} | wrong)


def test_the_held_out_loss_comes_when_it_is_asked_for_and_of_so_many_examples(
    tiny, tmp_path, monkeypatch, capsys
):
    """Also that --tf32 holds for the run alone, and what flags and files say in vain is told."""
    seen = []
    make_run = train.Run.__init__

    def look(*args: Any) -> None:
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        make_run(*args)

    monkeypatch.setattr(train.Run, "__init__", look)
    (tmp_path / "ds.json").write_text('{"scheduler": {"type": "WarmupLR"}}')
    values = {"max_steps": 4, "max_eval_samples": 2, "logging_steps": 3, "eval_strategy": "steps"}
    values |= {"dataloader_num_workers": 4, "deepspeed": tmp_path / "ds.json"}
    train.main(tiny.flags(tmp_path / "run", "--tf32", **values))
    assert [*seen, torch.backends.cuda.matmul.allow_tf32] == [True, False]
    torch.backends.cuda.matmul.allow_tf32 = True  # as images may have it
    try:
        train.main(tiny.flags(tmp_path / "mask", **values | {"max_steps": 0}))
        assert [*seen, torch.backends.cuda.matmul.allow_tf32] == [True, False, True]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    told = capsys.readouterr().out.splitlines()[:3]
    assert "--dataloader_num_workers (examples are read once" in told[0]
    assert told[1].startswith("--tf32 has no effect") == (not torch.cuda.is_available())
    assert "scheduler (--lr_scheduler_type and --warmup_steps decide)" in "".join(told)
    assert [step for step, _ in logged(tmp_path / "run", "eval_loss")] == [0, 3, 4]
    loss = mean_loss(AutoModelForCausalLM.from_pretrained(tiny.model), tiny, 2)
    assert metrics(tmp_path / "run", "eval_loss")[0] == pytest.approx(loss, rel=1e-5)


def test_packing_reads_the_same_examples_in_fewer_rows(tiny, tmp_path):
    """One step over all examples is the same step, packed or not."""
    values = {"max_steps": 1, "per_device_train_batch_size": 22, "deepspeed": ZERO3}
    train.main(tiny.flags(tmp_path / "rows", **values))
    train.main(tiny.flags(tmp_path / "packed", "--packing", **values | {"max_length": 128}))
    assert_same_delta(tmp_path / "packed", tmp_path / "rows", rtol=1e-5, atol=1e-7)
    assert metrics(tmp_path / "packed", "eval_loss") == pytest.approx(
        metrics(tmp_path / "rows", "eval_loss"), rel=1e-5
    )


def test_a_run_without_held_out_examples_keeps_few_checkpoints(tiny, tmp_path, capsys):
    """And one whose page fails comes to its end."""
    flags = {"max_steps": 5, "save_steps": 1, "save_total_limit": 2}
    own = {"task": "jsonl", "data_dir": None, "train_file": tiny.data / "train.jsonl"}
    own |= {"prompt_field": "question", "target_field": "answer", "report_to": "tensorboard"}
    with mock.patch.object(results, "write_report", side_effect=KeyError("a fault")):
        train.main(tiny.flags(tmp_path, **flags, **own))
    assert "report.html was not written: 'a fault'" in capsys.readouterr().out
    assert delta_of(tmp_path)
    assert list(list_checkpoints(tmp_path)) == [4, 5]
    assert list((tmp_path / TENSORBOARD_FOLDER).iterdir())
    assert metrics(tmp_path, "eval_loss") == []


def test_a_finished_run_can_be_made_longer_otherwise_or_overwritten(tiny, tmp_path, capsys):
    """A constant rate, since others depend on the number of steps."""
    values = {"lr_scheduler_type": "constant", "max_steps": 6}
    train.main(tiny.flags(tmp_path / "long", **values))
    train.main(tiny.flags(tmp_path / "run", **values | {"max_steps": 4}))
    resume = values | {"resume_from_checkpoint": "last"}
    train.main(tiny.flags(tmp_path / "run", **resume))
    assert_same_delta(tmp_path / "run", tmp_path / "long")
    assert "Going on" not in capsys.readouterr().out
    train.main(tiny.flags(tmp_path / "run", **resume | {"max_steps": 7, "weight_decay": 0.1}))
    assert "Going on with --weight_decay 0.1 instead of 0.0\n" in capsys.readouterr().out
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
    loss = mean_loss(AutoModelForCausalLM.from_pretrained(model), tiny)
    assert metrics(tmp_path / "run", "eval_loss")[0] == pytest.approx(loss, rel=1e-5)


def test_what_a_person_sees(tiny, tmp_path, capsys):
    """What begins, before the model loads; the table, what trains, the losses, where it lies."""
    load, told = run.load_for_training, []

    def watched(*args: Any, **options: Any) -> Any:
        told.append(capsys.readouterr())
        return load(*args, **options)

    with mock.patch.object(run, "load_for_training", watched):
        train.main(tiny.flags(tmp_path / "run", max_steps=4, eval_steps=2))
    reach = (
        "The 4 target layers hold 12.9% of the parameters, those of --target_modules all-linear "
        "64.6%; no target reaches 35.4% (embeddings and output layer 34.7%, norms and biases "
        "0.7%), which --method full trains"
    )
    assert told == [(f"Loading {tiny.model} to train on 22 examples of gsm8k\n{reach}\n", "")]
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


# Two ranks


def test_two_ranks_under_the_launcher_stop_and_one_without_goes_on(tiny, tmp_path, capsys):
    """A scheduler signals the whole group; then the run goes on to the end."""
    launcher = Path(sys.executable).with_name("deepspeed")
    if not launcher.is_file():
        pytest.skip("the deepspeed command is not beside this python")
    launch = [launcher, "--quiet", "--num_accelerators=2", f"--master_port={free_port()}"]
    values = {"max_steps": 400, "save_steps": 1000, "lr_scheduler_type": "constant"}
    values |= {"logging_steps": 1, "per_device_train_batch_size": 2, "deepspeed": ZERO3}
    process = subprocess.Popen(
        [*launch, "launch/train.py", *tiny.flags(tmp_path, **values)],
        cwd=REPOSITORY,
        env={k: v for k, v in os.environ.items() if k not in VARIABLES} | CPU_ONLY,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    log, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 240
    while not (log.is_file() and log.read_text().count('"loss"') >= 3):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=240)
    (step,) = list_checkpoints(tmp_path)
    assert process.returncode != 0, "the launcher itself was told to end"
    assert "Warning" not in out
    assert "Traceback" not in out
    assert out.count(f"Stopped by a signal after step {step}; go on with") == 1
    assert out.count("Training 475 of 23,776 parameters") == 1
    values |= {"max_steps": step + 3, "resume_from_checkpoint": "last"}
    train.main(tiny.flags(tmp_path, **values))
    assert f"Wrote the delta and the results to {tmp_path}" in capsys.readouterr().out


def _two_ranks(
    plain: list[str], others: list[list[str]], stopped: list[str], undisturbed: list[str]
) -> tuple[list[str], int, str]:
    """On each rank: what ends runs whose flags are other ones on rank 1; how a bad flag does.

    Before, one run is stopped by a Ctrl-C on rank 1, and goes on; and one is left alone.
    """
    rank = int(os.environ["RANK"])

    def terminate(reporter: Reporter, *_: float) -> None:
        if rank == 1 and reporter._state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with joined():
        with mock.patch.object(Reporter, "advance", terminate):
            result = train.main(stopped)
        assert (result.results, result.delta, result.stopped) == ({}, None, True)
        assert list(list_checkpoints(result.output_dir)) == [3], "when all ranks knew of it"
        train.main([*stopped, "--resume_from_checkpoint", "last"])
        train.main(undisturbed)
        errors = []
        for other in others:
            with pytest.raises((ValueError, PeerError)) as caught:
                train.main(other if rank else plain)
            errors.append(str(caught.value))
        with redirect_stderr(StringIO()) as told:
            status = cli.run("train", [*plain, "--density", "2"])
    return errors, status, told.getvalue()


def test_two_ranks_end_together(tiny, tmp_path):
    """If they differ, where they would wait for each other; by a signal to one; by a bad flag."""
    plain = tiny.flags(tmp_path / "new")
    others = [[*plain, "--calibration_examples", "3"], [*plain, "--seed", "5"]]
    flags = {"max_steps": 6, "save_steps": 6, "deepspeed": ZERO3}
    runs = [tiny.flags(tmp_path / name, **flags) for name in ("stopped", "undisturbed")]
    (told, *ending), (followed, *other_ending) = run_ranks(2, _two_ranks, plain, others, *runs)
    for error in told + followed:
        assert error.startswith("The ranks do not see the same run")
    assert_same_delta(tmp_path / "stopped", tmp_path / "undisturbed")
    sentence = (
        "Error: The density is 2: give the share of the parameters to train, a number above 0 and "
        "at most 1, such as 0.001.\n"
    )
    assert (ending, other_ending) == ([1, sentence], [1, ""]), "rank 0 alone tells"
