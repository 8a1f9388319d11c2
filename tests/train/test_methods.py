"""Each kind of method from flags to files: at any ZeRO stage, again, or resumed elsewhere."""

import errno
import os
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from gem_ds.errors import PeerError
from gem_ds.files.checkpoint import Checkpoint, find_checkpoint, load_delta
from gem_ds.files.mask import Mask
from gem_ds.select.rules import SPARSE_METHODS
from gem_ds.train import main as train
from tests.ranks import run_ranks, told_as
from tests.runs import assert_same_delta, delta_of, rows_of
from tests.tiny_model import REPOSITORY, Tiny, joined, one_rank
from tests.tiny_tasks import make_bert, task_of

pytestmark = pytest.mark.slow  # starts engines or programs

NUM_STEPS = 4
MODEL, BERT = "model", "bert"
SOBER = "sober_bert"  # without dropout, which is noise of the cut among ranks

#: The pooler, from the model's files, and the classifier.
HEAD = [f"{o}.{p}" for o in ("bert.pooler.dense", "classifier") for p in ("weight", "bias")]
HEAD_SIZE = 24 * 25 + 25 * 2

#: Of each kind by what its run does before it trains: it sums gradients, magnitudes or squares, or
#: none; gathers a matrix; takes matrices whole, at rates of their own. Which entries each of them
#: chooses is test_one_mask.py's.
SPARSE = ("gem", "random", "lift", "gem_abs", "fish", "surgical", "auto_rgn")

#: Name of a run, its method, its model, its ZeRO stage; of the other sparse methods than GEM one
#: step is enough.
RUNS: list[tuple[str, str, str, int]] = [
    *((f"{m}_bert", m, BERT, 3) for m in SPARSE),
    ("again", "gem", BERT, 3),
    ("bitfit3", "bitfit", BERT, 3),
    *((f"lora_bert{stage}", "lora", BERT, stage) for stage in (0, 3)),
    ("ia3_bert", "ia3", BERT, 3),
    ("shira_bert", "shira", BERT, 2),
    ("gem_bf16", "gem", BERT, 3),
    *((name, "full", MODEL, 3) for name in ("full3", "full_again")),
    ("sober", "gem", SOBER, 3),
]


#: Those of whole parameters that are gone on with, too: a model, an adapter, biases and a head.
DENSE_RESUMED = ("full3", "lora_bert0", "lora_bert3", "bitfit3")


def _num_steps(method: str) -> int:
    return 1 if method in SPARSE and method != "gem" else NUM_STEPS


def _flags(tiny: Tiny, name: str, method: str, model: str, stage: int, **more: object) -> list[str]:
    return tiny.flags(
        tiny.folder / name,
        **{
            "method": method,
            "model_name_or_path": tiny.folder / model,
            "task": "gsm8k" if model == MODEL else "rte",
            "deepspeed": REPOSITORY / "ds_configs" / f"zero{stage}.json",
            "max_length": 128 if model == MODEL else 40,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": _num_steps(method),
            "logging_steps": 1,
            "save_steps": 2,
            "calibration_head_steps": 3 if "bert" in model and "mask" not in more else None,
            "head_learning_rate": 0.02,
            "weight_decay": 0.01,
            "max_grad_norm": 0.5,
            "adam_epsilon": 1e-3,
            "density": "0.02" if name == "shira_bert" else "0.01",
            "bf16": "bf16" in name,
            "calibration_buffer_gb": "auto" if name == "gem_bf16" else None,
        }
        | more,
    )


def _mains(commands: list[list[str]]) -> tuple[list[dict[str, Any]], str]:
    """Run command lines on a rank; what each returns, and all that is printed."""
    results: list[dict[str, Any]] = []
    with joined(), redirect_stdout(StringIO()) as out:
        for command in commands:
            with task_of("labels") if "rte" in command else nullcontext():
                results.append(train.main(command).results)
    return results, out.getvalue()


def _full_disk(flags: list[str]) -> str:
    """A run during which the second rank cannot write a byte of torch's; what it says."""
    error = OSError(errno.ENOSPC, "No space left on device")
    is_full = os.environ["RANK"] == "1"
    with mock.patch("torch.save", side_effect=error) if is_full else nullcontext():
        try:
            _mains([flags])
        except (OSError, ValueError, PeerError) as caught:
            return str(caught)
    return "it went well"


@pytest.fixture(scope="module")
def tiny(tiny: Tiny) -> Tiny:
    make_bert(tiny.folder / BERT, dropout=0.1)
    make_bert(tiny.folder / SOBER)
    return tiny


@pytest.fixture(scope="module")
def results(tiny: Tiny) -> dict[str, dict[str, Any]]:
    """What every run returns on two ranks; its files lie in the folder of its name."""
    commands = {run[0]: _flags(tiny, *run) for run in RUNS}
    first = tiny.folder / "gem_bert"
    more = {"mask": first / "mask.safetensors"}
    commands["masked"] = _flags(tiny, "masked", "gem", BERT, 3, **more)
    more = {"resume_from_checkpoint": first / "checkpoint-2"}
    commands["resumed"] = _flags(tiny, "resumed", "gem", BERT, 3, **more)
    for name, run in {name: run for name, *run in RUNS if name in DENSE_RESUMED}.items():
        more = {"resume_from_checkpoint": tiny.folder / name / "checkpoint-2"}
        commands[f"{name}_resumed"] = _flags(tiny, f"{name}_resumed", *run, **more)
    (found, told), (_, silence) = run_ranks(2, _mains, list(commands.values()), timeout=600)
    assert not silence, "rank 0 alone speaks"
    assert "4 of 4 target layers were buffered in calibration (--calibration_buffer_gb auto" in told
    return dict(zip(commands, found, strict=True))


def _log(folder: Path) -> list[dict[str, Any]]:
    """The log without what the machine's speed makes of it."""
    return [
        {key: value for key, value in row.items() if "second" not in key and key != "time"}
        for row in rows_of(folder / "metrics.jsonl")
    ]


KEPT = {"full": "model", "lora": "adapter", "ia3": "adapter", "shira": "adapter"}


def test_every_kind_of_method_trains(tiny, results):
    """A sparse one exactly K entries, of its own choice, and the head."""
    chosen = {}
    for name, method, *_ in RUNS:
        found, files = results[name], {path.name for path in (tiny.folder / name).iterdir()}
        assert found["global_step"] == _num_steps(method), name
        assert found["last_eval_loss"] != found["first_eval_loss"], name
        assert found["num_trainable"] > 0, name
        assert KEPT.get(method, "delta.safetensors") in files, name
        assert ("mask.safetensors" in files) == (method in SPARSE), name
        steps = {f"checkpoint-{step}" for step in {min(2, _num_steps(method)), _num_steps(method)}}
        assert {f for f in files if f.startswith("checkpoint-")} == steps, name
        if method in SPARSE:
            delta = delta_of(tiny.folder / name)
            head = sum(values.numel() for values in delta.head.values())
            assert (delta.mask.method, head) == (method, HEAD_SIZE)
            assert delta.mask.num_selected == int(0.01 * found["num_parameters"])
            assert found["num_trainable"] == delta.mask.num_selected + head
            chosen[method] = str([index.tolist() for index in delta.mask.indices.values()])
    del chosen["auto_rgn"]  # surgical at other rates
    assert len(set(chosen.values())) == len(chosen)


def test_every_other_rule_selects_by_its_name(tiny, tmp_path):
    """A mask of K entries on one rank, each rule another."""
    chosen = {}
    with one_rank():
        for method in sorted(set(SPARSE_METHODS) - set(SPARSE)):
            with told_as(method):
                train.main(tiny.flags(tmp_path / method, method=method, max_steps=0))
                mask = Mask.load(tmp_path / method / "mask.safetensors")
                assert mask.method == method
            chosen[method] = mask
    assert len({mask.num_selected for mask in chosen.values()}) == 1
    indices = {str([i.tolist() for i in mask.indices.values()]) for mask in chosen.values()}
    assert len(indices) == len(chosen)


def test_a_checkpoint_is_the_delta_of_its_step(tiny, results):
    """To the bit, the head included: the last one is what the run then wrote."""
    for name, method, *_ in RUNS:
        if method in SPARSE:
            folder = tiny.folder / name
            delta, found = delta_of(folder), load_delta(find_checkpoint(folder, "last"))
            for old, new in ((delta.values, found.values), (delta.head, found.head)):
                assert list(old) == list(new)
                assert all(torch.equal(old[key], new[key]) for key in old), name
            assert found.mask.settings == delta.mask.settings


def test_adapters_of_an_encoder_come_with_its_trained_head(tiny, results):
    """A head that is frozen, or left out of the file, would make the adapter useless."""
    before = load_file(tiny.folder / BERT / "model.safetensors")["pooler.dense.weight"]
    for name, size in (("ia3_bert", 2 * (24 + 24 + 24 + 32)), ("shira_bert", 2 * 2 * (24 + 24))):
        assert results[name]["num_trainable"] == size + HEAD_SIZE
        adapter = load_file(tiny.folder / name / "adapter" / "adapter_model.safetensors")
        head = {key for key in adapter if "ia3" not in key and "shira" not in key}
        assert head == {f"base_model.model.{parameter}" for parameter in HEAD}
        after = adapter["base_model.model.bert.pooler.dense.weight"]
        assert 0 < (after - before).abs().max() < 1


def test_stages_write_the_same(tiny, results):
    """An adapter begins with the same values in a model that is partitioned while it loads."""
    file = "adapter/adapter_model.safetensors"
    whole, partitioned = (load_file(tiny.folder / f"lora_bert{n}" / file) for n in (0, 3))
    assert partitioned.keys() == whole.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(partitioned[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_a_model_trained_whole_lies_in_a_folder_as_its_base(tiny, results):
    """At stage 3, where transformers does not know which names it has read."""
    base, model = tiny.folder / MODEL, tiny.folder / "full3" / "model"
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            assert (model / path.name).read_bytes() == path.read_bytes(), path.name
            continue
        before, after = load_file(path), load_file(model / path.name)
        assert {name: (w.dtype, w.shape) for name, w in after.items()} == {
            name: (w.dtype, w.shape) for name, w in before.items()
        }


def test_a_command_gives_the_same_numbers_again(tiny, results):
    """To the last digit, dropout included."""
    differs = ("calibration_seconds", "seconds_per_step", "runtime_seconds", "peak_memory_bytes")
    for *names, file in (
        ("gem_bert", "again", "delta.safetensors"),
        ("full3", "full_again", "model/model.safetensors"),
    ):
        first, second = (tiny.folder / name for name in names)
        assert (second / file).read_bytes() == (first / file).read_bytes()
        assert _log(second) == _log(first)
        kept = [{k: v for k, v in results[n].items() if k not in differs} for n in names]
        assert kept[0] == kept[1]


def test_a_mask_or_a_checkpoint_gives_the_run_that_made_it(tiny, results):
    """To the bit on as many ranks, dropout included; with a head."""
    for name in ("masked", "resumed"):
        assert_same_delta(tiny.folder / "gem_bert", tiny.folder / name)
    assert results["masked"]["calibration_seconds"] == 0


def test_whole_parameters_go_on_from_a_checkpoint_as_if_nothing_had_been(tiny, results):
    """To the bit, dropout, schedule and moments included; the log too."""
    for name in DENSE_RESUMED:
        first, second = tiny.folder / name, tiny.folder / f"{name}_resumed"
        files = [p for kind in ("model", "adapter") for p in (first / kind).glob("*.safetensors")]
        for path in files:
            assert (second / path.relative_to(first)).read_bytes() == path.read_bytes(), name
        if not files:
            assert_same_delta(first, second)
        assert _log(second) == _log(first), name


def test_a_checkpoint_of_whole_parameters_is_whole_or_absent(tiny, results):
    """Also where a disk is full on one rank; what goes on from one must be as it was."""
    folder = tiny.folder / "full_disk"
    flags = _flags(tiny, "full_disk", "full", MODEL, 3, max_steps=3)
    for told in run_ranks(2, _full_disk, flags):
        assert "checkpoint-2 cannot be written (No space left on device)" in told
    assert [path.name for path in folder.glob("*checkpoint-*")] == []
    full, sparse = (tiny.folder / name / "checkpoint-2" for name in ("full3", "gem_bert"))
    for method, checkpoint, words in (
        ("full", full, "was written with ranks 2 and this run has 1: go on with the former"),
        ("gem", full, "was written with --method full: pass it again"),
        ("lora", full, "was written with --method full and this run has lora"),
        ("full", sparse, "pass the --method that wrote it"),
    ):
        flags = _flags(tiny, "other", method, MODEL, 3, resume_from_checkpoint=checkpoint)
        with one_rank(), pytest.raises(ValueError, match=words):
            train.main(flags)


def test_the_delta_holds_the_masters(tiny, results):
    """Of the entries and of the head."""
    delta = delta_of(tiny.folder / "gem_bert")
    checkpoint = Checkpoint.load(tiny.folder / "gem_bert" / f"checkpoint-{NUM_STEPS}")
    assert delta.head.keys() == set(HEAD)
    head = torch.cat([delta.head[name].flatten() for name in HEAD])
    assert torch.equal(head, checkpoint.head_vectors["master"])
    assert torch.equal(torch.cat(list(delta.values.values())), checkpoint.vectors["master"])


@pytest.mark.parametrize(("world_size", "stage"), [(1, 0), (3, 2)])
def test_a_run_goes_on_on_other_ranks_at_another_stage(tiny, results, world_size, stage):
    """In steps of the examples that the checkpoint had, whatever the flags make of them now."""
    name, sober = f"moved{world_size}_{stage}", tiny.folder / "sober"
    flags = _flags(tiny, name, "gem", SOBER, stage, resume_from_checkpoint=sober / "checkpoint-2")
    (_, told), *_ = run_ranks(world_size, _mains, [flags])
    assert f"8 examples per step, as before, not the {4 * world_size} of the flags" in told
    assert_same_delta(sober, tiny.folder / name, rtol=1e-5, atol=1e-6)
    for line, before in zip(_log(tiny.folder / name), _log(sober), strict=True):
        assert line["step"] == before["step"]
        assert line.get("loss", 0) == pytest.approx(before.get("loss", 0), rel=1e-5)
