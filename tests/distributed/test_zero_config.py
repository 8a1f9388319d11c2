"""The DeepSpeed JSON: what is read, completed, contradicted and refused."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from gem_ds.distributed.zero_config import (
    RunShape,
    inference_config,
    read_config,
    resolve_config,
    zero_stage,
)
from tests.tiny import DS_CONFIGS

SHAPE = RunShape(
    world_size=4,
    micro_batch_size=8,
    gradient_accumulation_steps=3,
    max_grad_norm=1.0,
    dtype="bf16",
    hidden_size=64,
    num_selected=321,
)


def _shape(**changes: Any) -> RunShape:
    return RunShape(**(vars(SHAPE) | changes))


def _zero(**section: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3} | section}


# What is completed


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "zero3_offload"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_bundled_files_resolve(name: str, dtype: str) -> None:
    config = read_config(DS_CONFIGS / f"{name}.json")
    if (name, dtype) == ("zero0", "fp16"):
        with pytest.raises(ValueError, match="fp16 needs ZeRO stage 1"):
            resolve_config(config, _shape(dtype=dtype))
        return
    resolved = resolve_config(config, _shape(dtype=dtype))
    assert '"auto"' not in json.dumps(resolved)
    assert zero_stage(resolved) == int(name[4])
    assert resolved["bf16"]["enabled"] is (dtype == "bf16")
    assert resolved["fp16"]["enabled"] is (dtype == "fp16")


SIZES = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
AUTOS: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    **_zero(**dict.fromkeys(SIZES, "auto")),
}
EXPLICIT: dict[str, Any] = AUTOS | {
    "train_micro_batch_size_per_gpu": 8,
    "train_batch_size": 96,
    "gradient_accumulation_steps": 3,
    "gradient_clipping": 1,
    "bf16": {"enabled": True},
    "fp16": {"enabled": False},
}
RESOLVED: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 8,
    "train_batch_size": 32,  # accumulation happens before the engine
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "fp16": {"enabled": False},
    **_zero(**dict(zip(SIZES, (321, 3686, 640), strict=True))),
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "communication_data_type": "fp32",
    "timers": {"throughput": {"enabled": False}},  # it would wait for the device in every forward
}


@pytest.mark.parametrize("config", [AUTOS, _zero(), EXPLICIT], ids=["auto", "absent", "explicit"])
def test_auto_is_what_the_flags_and_the_model_say(config: dict[str, Any]) -> None:
    before = copy.deepcopy(config)
    assert resolve_config(config, SHAPE) == RESOLVED
    assert config == before


def test_what_only_the_file_knows_is_kept() -> None:
    section = {
        **dict(zip(SIZES, (5e8, 0, 12345), strict=True)),
        "overlap_comm": True,
        "offload_param": {"device": "cpu", "pin_memory": True},
        "offload_optimizer": {"device": "none"},
        # defaults that are written out
        "zero_hpz_partition_size": 1,
        "mics_shard_size": -1,
        "zero_quantized_weights": False,
    }
    others = {
        "steps_per_print": 10,
        "communication_data_type": "bf16",
        "timers": {"throughput": {"enabled": True}},
        "amp": None,  # an empty section asks for nothing
    }
    config = _zero(**section) | others | {"fp16": {"loss_scale_window": 7}}
    resolved = resolve_config(config, _shape(dtype="fp16"))
    assert resolved["zero_optimization"] == {"stage": 3} | section
    assert resolved.items() >= others.items()
    assert resolved["fp16"] == {"loss_scale_window": 7, "enabled": True}


def test_gradients_of_whole_parameters_are_sent_as_deepspeed_does() -> None:
    resolved = resolve_config({}, _shape(num_selected=0))
    assert "communication_data_type" not in resolved
    assert resolved["zero_optimization"]["reduce_bucket_size"] == SHAPE.hidden_size**2


@pytest.mark.parametrize("stage", [None, 0, 1, 2])
def test_below_stage_3_no_size_of_stage_3_is_added(stage: int | None) -> None:
    config = {} if stage is None else {"zero_optimization": {"stage": stage}}
    zero = resolve_config(config, SHAPE)["zero_optimization"]
    assert zero == {"stage": stage or 0, "reduce_bucket_size": 321}
    assert zero_stage(config) == (stage or 0)


# What is refused

SECTIONS = (  # noqa: SIM905
    "optimizer scheduler bfloat16 data_types torch_autocast amp tensor_parallel autotp_size "
    "sequence_parallel_size expert_parallel pipeline compression_training curriculum_learning "
    "data_efficiency progressive_layer_drop elasticity hybrid_engine compile "
    "zero_force_ds_cpu_optimizer zero_allow_untested_optimizer"
).split()
UNREACHED = {  # by updates
    "zero_hpz_partition_size": 2,
    "mics_shard_size": 2,
    "zero_quantized_weights": True,
    "zero_quantized_nontrainable_weights": True,
    "zero_quantized_gradients": True,
    "zenflow": {"topk_ratio": 0.1},
}
REMOVED: dict[str, dict[str, Any]] = {
    **{key: {key: {"enabled": True}} for key in SECTIONS},
    **{f"zero_optimization.{key}": _zero(**{key: value}) for key, value in UNREACHED.items()},
    "bf16.bf16_master_weights_and_grads": {"bf16": {"bf16_master_weights_and_grads": True}},
    "bf16.bf16_optimizer_states": {"bf16": {"bf16_optimizer_states": True}},
    "fp16.fp16_master_weights_and_grads": {"fp16": {"fp16_master_weights_and_grads": True}},
    "managed_gradient_accumulation": {"managed_gradient_accumulation": False},
    "compute_grad_norm": _zero(compute_grad_norm=False),
    "check_grad_overflow": {"bf16": {"check_grad_overflow": False}},
}
CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"train_micro_batch_size_per_gpu": 4}, "is 4 in|--per_device_train_batch_size makes it 8:"),
    ({"gradient_accumulation_steps": 1}, "is 1 in|--gradient_accumulation_steps makes it 3:"),
    ({"train_batch_size": 32}, "is 32 in|ranks x --gradient_accumulation_steps makes it 96:"),
    ({"gradient_clipping": 0.5}, "is 0.5 in|--max_grad_norm makes it 1.0:"),
    ({"gradient_clipping": 0}, "is 0 in|--max_grad_norm makes it 1.0:"),
    ({"bf16": {"enabled": False}}, ".enabled is false in|--bf16 makes it true:"),
    ({"fp16": {"enabled": True}}, ".enabled is true in|--fp16 makes it false:"),
]
UNSETTLED: dict[str, dict[str, Any]] = {
    "steps_per_print": {"steps_per_print": "auto"},
    "zero_optimization.sub_group_size": _zero(sub_group_size="auto"),
    "zero_optimization.offload_param.buffer_count": _zero(
        offload_param={"device": "cpu", "buffer_count": "auto"}
    ),
    "zero_optimization.stage3_prefetch_bucket_size": _zero(
        stage=2, stage3_prefetch_bucket_size="auto"
    ),
}


def _refusal(config: dict[str, Any]) -> str:
    """The sentence with which a configuration is refused."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers look at the sentence)
        resolve_config(config, SHAPE)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert ". " not in sentence, "one sentence"
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("name", REMOVED)
def test_what_is_not_the_files_business_is_to_be_removed(name: str) -> None:
    sentence = _refusal(_zero() | REMOVED[name])
    assert re.match(rf"Remove {re.escape(name)}( from the DeepSpeed JSON)?: ", sentence)


@pytest.mark.parametrize(("config", "words"), CONTRADICTIONS)
def test_a_contradiction_names_key_flag_and_values(config: dict[str, Any], words: str) -> None:
    sentence = _refusal(_zero() | config)
    for part in [*config, *words.split("|"), '"auto"']:
        assert part in sentence


@pytest.mark.parametrize("path", UNSETTLED)
def test_auto_where_no_flag_gives_the_value(path: str) -> None:
    assert _refusal(UNSETTLED[path]).startswith(f'{path} is "auto" in the DeepSpeed JSON')


@pytest.mark.parametrize("stage", [4, -1, "3", "auto", None, True, 2.5, [3]])
def test_stages_that_do_not_exist(stage: Any) -> None:
    assert "zero_optimization.stage must be 0, 1, 2 or 3" in _refusal(_zero(stage=stage))


@pytest.mark.parametrize("name", ["zero_optimization", "bf16", "fp16"])
@pytest.mark.parametrize("value", [3, True, "auto", [1]])
def test_sections_that_are_no_objects(name: str, value: Any) -> None:
    assert f"{name} in the DeepSpeed JSON must be an object" in _refusal({name: value})


@pytest.mark.parametrize(("key", "least_stage"), [("offload_param", 3), ("offload_optimizer", 1)])
def test_offload(key: str, least_stage: int) -> None:
    assert f"zero_optimization.{key}.device is nvme" in _refusal(_zero(**{key: {"device": "nvme"}}))
    for setting in ({"super_offload": True}, {"ratio": 0.5}):
        sentence = _refusal(_zero(**{key: {"device": "cpu"} | setting}))
        assert f"super_offload and ratio from zero_optimization.{key}" in sentence
    for stage in range(4):
        config = _zero(**{key: {"device": "cpu"}, "stage": stage})
        if stage >= least_stage:
            resolve_config(config, SHAPE)
        else:
            assert f"{key} has no effect below stage" in _refusal(config)


# Reading the file


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(AUTOS))
    assert read_config(path) == read_config(str(path)) == AUTOS


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{not json", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b"[1, 2]", "must hold one JSON object"),
        (b'"zero3"', "must hold one JSON object"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"--deepspeed {path} ")


# Inference


@pytest.mark.parametrize("name", ["zero3", "zero3_offload"])
def test_what_a_forward_pass_needs_of_a_bundled_file(name: str) -> None:
    """The file of a training run serves for evaluation: what speaks of training is left out."""
    config = read_config(DS_CONFIGS / f"{name}.json") | {"optimizer": {"type": "AdamW"}}
    before = copy.deepcopy(config)
    inference = inference_config(config, dtype="bfloat16", hidden_size=64)
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


def test_sizes_of_the_file_win_over_those_that_follow_from_the_model() -> None:
    config = _zero(stage3_param_persistence_threshold=7)
    zero = inference_config(config, dtype="float32", hidden_size=64)["zero_optimization"]
    assert zero["stage3_param_persistence_threshold"] == 7


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "leaves the model whole on each rank"),
        (_zero(stage=2), "leaves the model whole on each rank"),
        (_zero(stage3_max_live_parameters="auto"), "stage3_max_live_parameters is"),
    ],
)
def test_what_a_forward_pass_cannot_take(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        inference_config(config, dtype="float32", hidden_size=64)
