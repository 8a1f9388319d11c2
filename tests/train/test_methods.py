"""Each method from flags to files: at any ZeRO stage, again, resumed elsewhere, or refused."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import ExitStack, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from gem_ds.files.checkpoint import Checkpoint
from gem_ds.files.delta import Delta, apply_delta
from gem_ds.models.encoders import head_names, set_head
from gem_ds.select.rules import SPARSE_METHODS
from gem_ds.train import main as train
from gem_ds.train.methods import METHODS
from tests.ranks import run_ranks
from tests.tiny_model import REPOSITORY, Tiny, joined, make_tiny, one_rank
from tests.tiny_tasks import make_bert, make_task, task_of

pytestmark = [
    pytest.mark.slow,  # starts engines or programs
    pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

NUM_STEPS = 4
MODEL, BERT = "model", "bert"

#: A Llama by the names of its weights, for which peft has no table.
UNMAPPED = "granite"

#: Name of a run, its method, its model, its ZeRO stage.
RUNS: list[tuple[str, str, str, int]] = [
    *((f"{m}_bert", m, BERT, 3) for m in SPARSE_METHODS),
    ("again", "gem", BERT, 3),
    ("supertuning_whole", "supertuning", BERT, 0),
    ("full3", "full", MODEL, 3),
    *((f"bitfit{stage}", "bitfit", BERT, stage) for stage in (0, 3)),
    *((f"lora_bert{stage}", "lora", BERT, stage) for stage in (0, 3)),
    ("ia3_bert", "ia3", BERT, 3),
    ("shira_bert", "shira", BERT, 2),
    *((f"full_bert{stage}", "full", BERT, stage) for stage in (0, 3)),
    *((f"{method}_bf16", method, BERT, 3) for method in ("gem", "lora", "full")),
    ("full_again", "full", MODEL, 3),
]


def _flags(tiny: Tiny, name: str, method: str, model: str, stage: int, **more: object) -> list[str]:
    return tiny.flags(
        tiny.folder / name,
        **{
            "method": method,
            "model_name_or_path": tiny.folder / model,
            "task": "rte" if model == BERT else "gsm8k",
            "deepspeed": REPOSITORY / "ds_configs" / f"zero{stage}.json",
            "max_length": 40 if model == BERT else 128,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": NUM_STEPS,
            "logging_steps": 1,
            "save_steps": 2 if method in SPARSE_METHODS else None,
            "calibration_head_steps": 3 if model == BERT and "mask" not in more else None,
            "head_learning_rate": 0.02,
            "weight_decay": 0.01,
            "max_grad_norm": 0.5,
            "adam_epsilon": 1e-3,
            "density": "0.02" if name == "shira_bert" else "0.01",
            "bf16": "bf16" in name,
        }
        | more,
    )


def _mains(commands: list[list[str]]) -> list[dict[str, Any]]:
    """Run command lines on a rank; what each returns."""
    results = []
    with joined(), redirect_stdout(StringIO()):
        for command in commands:
            with ExitStack() as stack:
                if command[command.index("--task") + 1] == "rte":
                    stack.enter_context(task_of("labels"))
                results.append(train.main(command).results)
    return results


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    tiny = make_tiny(tmp_path_factory.mktemp("tiny"))
    make_bert(tiny.folder / BERT, dropout=0.1)
    tiny.variant(UNMAPPED, model_type="granite", architectures=["GraniteForCausalLM"])
    return tiny


@pytest.fixture(scope="module")
def results(tiny: Tiny) -> dict[str, dict[str, Any]]:
    """What every run returns on two ranks; its files lie in the folder of its name."""
    commands = [_flags(tiny, *run) for run in RUNS]
    masked = _flags(tiny, "masked", "gem", BERT, 3, mask=tiny.folder / "gem_bert/mask.safetensors")
    found = run_ranks(2, _mains, [*commands, masked])[0]
    return dict(zip([*(run[0] for run in RUNS), "masked"], found, strict=True))


def _delta(folder: Path) -> Delta:
    return Delta.load(folder / "delta.safetensors")


def _losses(results: dict[str, Any]) -> list[float]:
    return [
        results[f"{which}_{key}"] for which in ("first", "last") for key in ("loss", "eval_loss")
    ]


def _log(folder: Path) -> list[dict[str, Any]]:
    """The log without what the machine's speed makes of it."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in line.items() if "second" not in key and key != "time"}
        for line in lines
    ]


@pytest.mark.parametrize("name", [run[0] for run in RUNS])
def test_every_method_trains(tiny: Tiny, results, name: str) -> None:
    found = results[name]
    assert found["global_step"] == NUM_STEPS
    assert found["last_eval_loss"] != found["first_eval_loss"]
    assert found["num_trainable"] > 0
    files = {path.name for path in (tiny.folder / name).iterdir()}
    method = next(method for run, method, *_ in RUNS if run == name)
    kept = {"full": "model", "lora": "adapter", "ia3": "adapter", "shira": "adapter"}
    assert kept.get(method, "delta.safetensors") in files
    assert ("mask.safetensors" in files) == (method in SPARSE_METHODS)
    assert any(file.startswith("checkpoint-") for file in files) == (method in SPARSE_METHODS)


@pytest.mark.parametrize("method", SPARSE_METHODS)
def test_sparse_methods_train_exactly_k_and_the_head(tiny: Tiny, results, method: str) -> None:
    delta = _delta(tiny.folder / f"{method}_bert")
    assert delta.mask.method == method
    total = int(0.01 * results[f"{method}_bert"]["num_parameters"])
    assert delta.mask.num_selected == total
    head = sum(values.numel() for values in delta.head.values())
    assert head == 24 * 25 + 25 * 2, "the pooler, from the model's files, and the classifier"
    assert results[f"{method}_bert"]["num_trainable"] == total + head


def test_sparse_methods_choose_differently(tiny: Tiny, results) -> None:
    chosen = set()
    for method in SPARSE_METHODS:
        indices = _delta(tiny.folder / f"{method}_bert").mask.indices
        chosen.add(str({name: index.tolist() for name, index in indices.items()}))
    assert len(chosen) == len(SPARSE_METHODS)


@pytest.mark.parametrize(
    ("name", "size"), [("ia3_bert", 2 * (24 + 24 + 24 + 32)), ("shira_bert", 2 * 2 * (24 + 24))]
)
def test_adapters_of_an_encoder_come_with_its_trained_head(
    tiny: Tiny, results, name: str, size: int
) -> None:
    """A head that is frozen, or left out of the file, would make the adapter useless."""
    assert results[name]["num_trainable"] == size + 24 * 25 + 25 * 2
    adapter = load_file(tiny.folder / name / "adapter" / "adapter_model.safetensors")
    head = {key for key in adapter if "ia3" not in key and "shira" not in key}
    owners = ("bert.pooler.dense", "classifier")
    assert head == {f"base_model.model.{o}.{part}" for o in owners for part in ("weight", "bias")}
    before = load_file(tiny.folder / BERT / "model.safetensors")["pooler.dense.weight"]
    after = adapter["base_model.model.bert.pooler.dense.weight"]
    assert 0 < (after - before).abs().max() < 1


@pytest.mark.parametrize(
    ("whole", "partitioned", "file"),
    [
        ("full_bert0", "full_bert3", "model/model.safetensors"),
        ("lora_bert0", "lora_bert3", "adapter/adapter_model.safetensors"),
        ("supertuning_whole", "supertuning_bert", "delta.safetensors"),
        ("bitfit0", "bitfit3", "delta.safetensors"),
    ],
)
def test_stages_write_the_same(
    tiny: Tiny, results, whole: str, partitioned: str, file: str
) -> None:
    """A model that is partitioned while it loads trains as one that is whole."""
    assert _losses(results[partitioned]) == pytest.approx(_losses(results[whole]), rel=1e-4)
    expected = load_file(tiny.folder / whole / file)
    found = load_file(tiny.folder / partitioned / file)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("name", "again", "file"),
    [
        ("gem_bert", "again", "delta.safetensors"),
        ("full3", "full_again", "model/model.safetensors"),
    ],
)
def test_a_command_gives_the_same_numbers_again(
    tiny: Tiny, results, name: str, again: str, file: str
) -> None:
    """To the last digit, dropout included."""
    first, second = tiny.folder / name, tiny.folder / again
    assert (second / file).read_bytes() == (first / file).read_bytes()
    assert _log(second) == _log(first)
    differs = ("calibration_seconds", "seconds_per_step", "runtime_seconds", "peak_memory_bytes")
    kept = [{k: v for k, v in results[n].items() if k not in differs} for n in (name, again)]
    assert kept[0] == kept[1]


def test_a_mask_gives_the_run_that_made_it(tiny: Tiny, results) -> None:
    """With a head too, without calibration."""
    first, second = _delta(tiny.folder / "gem_bert"), _delta(tiny.folder / "masked")
    for part in ("values", "head"):
        expected, found = getattr(first, part), getattr(second, part)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert results["masked"]["calibration_seconds"] == 0


@pytest.mark.parametrize("name", ["gem_bert", "bitfit3"])
def test_the_delta_gives_the_trained_model(tiny: Tiny, results, name: str) -> None:
    """Base weights, entries and head; and back to the base."""
    delta = _delta(tiny.folder / name)
    config = AutoConfig.from_pretrained(tiny.folder / BERT)
    set_head(config, "bert", make_task("labels"))
    model = AutoModelForSequenceClassification.from_pretrained(tiny.folder / BERT, config=config)
    base = {key: p.detach().clone() for key, p in model.named_parameters()}
    expected = {key: p.clone() for key, p in base.items()}
    for key, values in delta.values.items():
        expected[key].view(-1)[delta.mask.indices[key].long()] = values
    expected |= delta.head
    assert delta.head.keys() == head_names(model)
    if name == "gem_bert":
        checkpoint = Checkpoint.load(tiny.folder / name / f"checkpoint-{NUM_STEPS}")
        owners = ("bert.pooler.dense", "classifier")
        heads = [delta.head[f"{owner}.{part}"] for owner in owners for part in ("weight", "bias")]
        flat = torch.cat([values.flatten() for values in heads])
        assert torch.equal(flat, checkpoint.head_vectors["master"])
        assert torch.equal(torch.cat(list(delta.values.values())), checkpoint.vectors["master"])
    with apply_delta(model, delta):
        for key, parameter in model.named_parameters():
            assert torch.equal(parameter, expected[key]), key
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, base[key]), key


# Resumed


@pytest.fixture(scope="module")
def sober(tiny: Tiny) -> Path:
    """A run of two ranks at stage 3 without dropout, which is noise of the cut."""
    make_bert(tiny.folder / "sober_bert")
    run_ranks(2, _mains, [_resumable(tiny, "sober", 3)])
    return tiny.folder / "sober"


def _resumable(tiny: Tiny, name: str, stage: int, **more: object) -> list[str]:
    return _flags(
        tiny, name, "gem", BERT, stage, model_name_or_path=tiny.folder / "sober_bert", **more
    )


def _half(tiny: Tiny, whole: Path, name: str) -> Path:
    """A copy of a run that stopped at its first checkpoint."""
    folder = tiny.folder / name
    folder.mkdir()
    shutil.copytree(whole / "checkpoint-2", folder / "checkpoint-2")
    return folder


def test_a_head_goes_on_where_it_was(tiny: Tiny, results) -> None:
    """To the bit on as many ranks, dropout included."""
    folder = _half(tiny, tiny.folder / "gem_bert", "resumed")
    run_ranks(2, _mains, [_flags(tiny, "resumed", "gem", BERT, 3, resume_from_checkpoint="last")])
    expected = (tiny.folder / "gem_bert" / "delta.safetensors").read_bytes()
    assert (folder / "delta.safetensors").read_bytes() == expected


@pytest.mark.parametrize(("world_size", "stage"), [(1, 0), (3, 2)])
def test_a_head_goes_on_on_other_ranks_at_another_stage(
    tiny: Tiny, sober: Path, world_size: int, stage: int
) -> None:
    name = f"moved{world_size}_{stage}"
    folder = _half(tiny, sober, name)
    run_ranks(world_size, _mains, [_resumable(tiny, name, stage, resume_from_checkpoint="last")])
    expected, found = _delta(sober), _delta(folder)
    for part in ("values", "head"):
        before, after = getattr(expected, part), getattr(found, part)
        assert after.keys() == before.keys()
        for key, values in before.items():
            torch.testing.assert_close(after[key], values, rtol=1e-5, atol=1e-6, msg=key)


# Refused

#: Method, model, further flags, and what the sentence says.
REFUSALS: list[tuple[str, str, dict[str, object], str]] = [
    ("gim", MODEL, {}, f"--method must be one of {', '.join(METHODS)}, not gim"),
    ("gem", MODEL, {"optimizer": "adamw_8bit"}, "adamw_8bit is for --method full"),
    ("full", MODEL, {"optimizer": "adam"}, "--optimizer must be one of adamw, adamw_8bit, not"),
    ("full", MODEL, {"optimizer": "adamw_8bit"}, "needs bitsandbytes: pip install bitsandb"),
    ("bitfit", MODEL, {}, "model has no biases, which is what --method bitfit trains"),
    ("shira", MODEL, {}, "whole weights, and ZeRO stage 3 cuts them"),
    ("full", MODEL, {"mask": "m"}, "selects no entries: leave --mask out"),
    ("full", MODEL, {"sddmm_kernel": "tiled"}, "no entries: leave --sddmm_kernel out"),
    ("full", MODEL, {"max_steps": 0}, "--max_steps 0 writes a mask"),
    ("full", MODEL, {"save_steps": 2}, "writes no checkpoints: leave --save_steps out"),
    ("lora", MODEL, {"lora_r": 999}, "--lora_r 999 is more than .* target layer, 16: lower it"),
    ("shira", MODEL, {"density": "1"}, "lower --density"),
    ("shira", MODEL, {"density": "0.014"}, "a multiple of 224 entries here, and"),
    ("ia3", UNMAPPED, {}, "where IA3 belongs in a granite model: name the layers"),
]


def test_what_cannot_be_done_is_one_sentence(tiny: Tiny) -> None:
    problems = []
    with one_rank(), mock.patch.dict("sys.modules", {"bitsandbytes.optim": None}):
        for method, model, more, sentence in REFUSALS:
            with pytest.raises(ValueError, match=r"\S") as refusal:
                train.main(_flags(tiny, "refused", method, model, 3, **more))
            told = str(refusal.value)
            if "\n" in told or not re.search(sentence, told):
                problems.append((sentence, told))
    assert problems == []
