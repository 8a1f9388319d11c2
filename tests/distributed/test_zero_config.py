"""The DeepSpeed JSON: what is read, completed, contradicted and refused."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from gem_ds.distributed.zero_config import (
    RunShape,
    inference_config,
    read_config,
    resolve_config,
    zero_stage,
)
from tests.tiny import DS_CONFIGS
from tests.tiny_evaluation import refusal

CASES = yaml.safe_load(Path(__file__).with_name("zero_config.yaml").read_text())
SHAPE = RunShape(
    world_size=4,
    micro_batch_size=8,
    gradient_accumulation_steps=3,
    max_grad_norm=1.0,
    dtype="bf16",
    hidden_size=64,
    num_selected=321,
)


def _zero(**section: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3} | section}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("zero0", "fp32"),
        ("zero0", "bf16"),
        ("zero1", "fp16"),
        ("zero2", "fp16"),
        ("zero3", "fp32"),
        ("zero3_offload", "bf16"),
    ],
)
def test_the_bundled_files_resolve(name, dtype):
    resolved = resolve_config(read_config(DS_CONFIGS / f"{name}.json"), replace(SHAPE, dtype=dtype))
    assert '"auto"' not in json.dumps(resolved)
    assert zero_stage(resolved) == int(name[4])
    enabled = {key for key in ("bf16", "fp16") if resolved[key]["enabled"]}
    assert enabled == {dtype} - {"fp32"}


@pytest.mark.parametrize("config", [CASES["auto"], _zero(), CASES["explicit"]])
def test_auto_is_what_the_flags_and_the_model_say(config):
    before = copy.deepcopy(config)
    assert resolve_config(config, SHAPE) == CASES["resolved"]
    assert config == before


def test_what_only_the_file_knows_is_kept():
    kept = CASES["kept"]
    resolved = resolve_config(kept, replace(SHAPE, dtype="fp16"))
    assert resolved.items() >= (kept | {"fp16": kept["fp16"] | {"enabled": True}}).items()


def test_what_asks_for_nothing_is_not_handed_on():
    resolved = resolve_config(CASES["asks_for_nothing"], SHAPE)
    assert resolved == resolve_config({"zero_optimization": {"stage": 2}}, SHAPE)


def test_gradients_of_whole_parameters_are_sent_as_deepspeed_does():
    resolved = resolve_config({}, replace(SHAPE, num_selected=0))
    assert "communication_data_type" not in resolved
    assert resolved["zero_optimization"]["reduce_bucket_size"] == SHAPE.hidden_size**2


@pytest.mark.parametrize("stage", [None, 0, 1, 2])
def test_below_stage_3_no_size_of_stage_3_is_added(stage):
    config = {} if stage is None else _zero(stage=stage)
    zero = resolve_config(config, SHAPE)["zero_optimization"]
    assert zero == {"stage": stage or 0, "reduce_bucket_size": 321}


@pytest.mark.parametrize(("path", "value", "words"), CASES["refused"])
def test_what_is_refused_gets_one_sentence(path, value, words):
    config = _zero()
    *outer, last = path.split(".")
    inner = config
    for key in outer:
        inner = inner.setdefault(key, {})
    inner[last] = value
    sentence = refusal(resolve_config, config, SHAPE)
    assert words in sentence
    assert sentence.endswith(".")
    assert ". " not in sentence


@pytest.mark.parametrize(("key", "least_stage"), [("offload_param", 3), ("offload_optimizer", 1)])
def test_offload_and_fp16_begin_at_a_stage(key, least_stage):
    for stage in range(4):
        config = _zero(**{key: {"device": "cpu"}, "stage": stage})
        if stage >= least_stage:
            resolve_config(config, SHAPE)
        else:
            assert f"{key} has no effect below stage" in refusal(resolve_config, config, SHAPE)
    half = replace(SHAPE, dtype="fp16")
    assert "fp16 needs ZeRO stage 1" in refusal(resolve_config, _zero(stage=0), half)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{not json", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b"[1, 2]", "must hold one JSON object"),
        (None, "cannot be read: No such file"),
        (b"[" * 100_000 + b"]" * 100_000, "is not valid JSON"),
        (b'{"a":' * 50 + b"1" + b"}" * 50, "is nested deeper than any"),
        (b'{"steps_per_print": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b'{"bf16": {}, "bf16": {}}', "is not valid JSON: bf16 stands in it twice"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, content, words):
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_bytes(content)
    assert refusal(read_config, path).startswith(f"--deepspeed {path} {words}")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_harms_nothing(tmp_path, encoding):
    path = tmp_path / "ds.json"
    path.write_text('{"_why": "größer", "_why": "", "bf16": {}}', encoding=encoding)
    assert read_config(path).keys() == {"_why", "bf16"}


# Inference


@pytest.mark.parametrize("name", ["zero3", "zero3_offload"])
def test_what_a_forward_pass_needs_of_a_bundled_file(name):
    """The file of a training run serves for evaluation: what speaks of training is left out."""
    config = read_config(DS_CONFIGS / f"{name}.json") | {"optimizer": {"type": "AdamW"}}
    before = copy.deepcopy(config)
    inference = inference_config(config, dtype="bfloat16", hidden_size=64, blocks={})
    assert config == before
    zero = inference.pop("zero_optimization")
    assert inference == {
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 2**31 - 1,
        "timers": {"throughput": {"enabled": False}},
    }
    assert zero["stage"] == 3
    assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 64**2)
    assert zero["stage3_param_persistence_threshold"] == 640
    assert ("offload_param" in zero) == (name == "zero3_offload")
    assert "offload_optimizer" not in zero
    assert "auto" not in json.dumps(zero)


def test_sizes_of_the_file_win_over_those_that_follow_from_the_model():
    config = _zero(stage3_param_persistence_threshold=7)
    zero = inference_config(config, dtype="float32", hidden_size=64, blocks={})["zero_optimization"]
    assert zero["stage3_param_persistence_threshold"] == 7


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "leaves the model whole on each rank"),
        (_zero(stage=2), "leaves the model whole on each rank"),
        (_zero(stage3_max_live_parameters="auto"), "stage3_max_live_parameters is"),
    ],
)
def test_what_a_forward_pass_cannot_take(config, words):
    assert words in refusal(inference_config, config, dtype="float32", hidden_size=64, blocks={})
