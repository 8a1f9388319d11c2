"""The DeepSpeed JSON: what is read, completed, contradicted and refused."""

from __future__ import annotations

import copy
import json
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

SHAPE = RunShape(
    world_size=4,
    micro_batch_size=8,
    gradient_accumulation_steps=3,
    max_grad_norm=1.0,
    dtype="bf16",
    hidden_size=64,
    num_selected=321,
)
DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"


def _shape(**changes: Any) -> RunShape:
    return RunShape(**(vars(SHAPE) | changes))


def _zero(**section: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3} | section}


def _refusal(config: dict[str, Any], shape: RunShape = SHAPE) -> str:
    """The sentence with which a configuration is refused."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers look at the sentence)
        resolve_config(config, shape)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert ". " not in sentence, "one sentence"
    assert "\n" not in sentence
    return sentence


def _autos(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_autos(part) for part in value.values())
    return value == "auto"


# What is completed


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "zero3_offload"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_bundled_files_resolve(name: str, dtype: str) -> None:
    config = read_config(DS_CONFIGS / f"{name}.json")
    if (name, dtype) == ("zero0", "fp16"):
        assert "fp16 needs ZeRO stage 1" in _refusal(config, _shape(dtype=dtype))
        return
    resolved = resolve_config(config, _shape(dtype=dtype))
    assert not _autos(resolved)
    assert zero_stage(resolved) == int(name[4])
    assert resolved["bf16"]["enabled"] is (dtype == "bf16")
    assert resolved["fp16"]["enabled"] is (dtype == "fp16")


AUTOS: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
}
RESOLVED: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 8,
    "train_batch_size": 32,  # accumulation happens before the engine
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "fp16": {"enabled": False},
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": 321,
        "stage3_prefetch_bucket_size": 3686,
        "stage3_param_persistence_threshold": 640,
    },
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "communication_data_type": "fp32",
    "timers": {"throughput": {"enabled": False}},
}


def test_auto_is_what_the_flags_and_the_model_say() -> None:
    assert resolve_config(AUTOS, SHAPE) == RESOLVED


def test_what_is_left_out_is_auto() -> None:
    assert resolve_config(_zero(), SHAPE) == RESOLVED


def test_explicit_values_that_agree_are_kept() -> None:
    config = copy.deepcopy(AUTOS)
    config |= {"train_micro_batch_size_per_gpu": 8, "train_batch_size": 96}
    config |= {"gradient_accumulation_steps": 3, "gradient_clipping": 1}
    config |= {"bf16": {"enabled": True}, "fp16": {"enabled": False}}
    assert resolve_config(config, SHAPE) == RESOLVED


def test_sizes_that_only_the_file_knows_are_kept() -> None:
    section = {
        "reduce_bucket_size": 5e8,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 12345,
        "overlap_comm": True,
        "offload_param": {"device": "cpu", "pin_memory": True},
        "offload_optimizer": {"device": "none"},
    }
    config = _zero(**section) | {"steps_per_print": 10, "fp16": {"loss_scale_window": 7}}
    resolved = resolve_config(config, _shape(dtype="fp16"))
    assert resolved["zero_optimization"] == {"stage": 3} | section
    assert resolved["steps_per_print"] == 10
    assert resolved["fp16"] == {"loss_scale_window": 7, "enabled": True}


def test_gradients_of_whole_parameters_are_sent_as_deepspeed_does() -> None:
    resolved = resolve_config({}, _shape(num_selected=0))
    assert "communication_data_type" not in resolved
    assert resolved["zero_optimization"]["reduce_bucket_size"] == SHAPE.hidden_size**2


def test_the_file_may_have_gradients_sent_otherwise() -> None:
    asked = {"communication_data_type": "bf16"}
    assert resolve_config(asked, SHAPE)["communication_data_type"] == "bf16"


def test_deepspeed_times_nothing_unless_the_file_says_so() -> None:
    """Its timer would wait for the device in every forward pass."""
    assert resolve_config({}, SHAPE)["timers"] == {"throughput": {"enabled": False}}
    asked = {"timers": {"throughput": {"enabled": True}}}
    assert resolve_config(asked, SHAPE)["timers"] == asked["timers"]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_below_stage_3_no_size_of_stage_3_is_added(stage: int) -> None:
    resolved = resolve_config({"zero_optimization": {"stage": stage}}, SHAPE)
    assert resolved["zero_optimization"] == {"stage": stage, "reduce_bucket_size": 321}


def test_no_section_is_stage_0() -> None:
    assert zero_stage({}) == 0
    assert resolve_config({}, SHAPE)["zero_optimization"]["stage"] == 0


@pytest.mark.parametrize("config", [AUTOS, {}, _zero(), {"bf16": {}}])
def test_the_input_is_not_modified(config: dict[str, Any]) -> None:
    before = copy.deepcopy(config)
    resolve_config(config, SHAPE)
    assert config == before


# What contradicts a flag


@pytest.mark.parametrize(
    ("config", "flag", "values"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, "--per_device_train_batch_size", ("4", "8")),
        ({"gradient_accumulation_steps": 1}, "--gradient_accumulation_steps", ("1", "3")),
        ({"train_batch_size": 32}, "--per_device_train_batch_size x ranks x", ("32", "96")),
        ({"gradient_clipping": 0.5}, "--max_grad_norm", ("0.5", "1.0")),
        ({"gradient_clipping": 0}, "--max_grad_norm", ("0", "1.0")),
        ({"bf16": {"enabled": False}}, "--bf16", ("false", "true")),
        ({"fp16": {"enabled": True}}, "--fp16", ("true", "false")),
    ],
)
def test_a_contradiction_names_key_flag_and_values(
    config: dict[str, Any], flag: str, values: tuple[str, str]
) -> None:
    (key,) = config
    sentence = _refusal(_zero() | config)
    assert key in sentence
    assert flag in sentence
    for value in values:
        assert f" {value}" in sentence
    assert '"auto"' in sentence


# What is refused


@pytest.mark.parametrize(
    "key",
    [
        "optimizer",
        "scheduler",
        "bfloat16",
        "data_types",
        "torch_autocast",
        "amp",
        "tensor_parallel",
        "autotp_size",
        "sequence_parallel_size",
        "expert_parallel",
        "pipeline",
        "compression_training",
        "curriculum_learning",
        "data_efficiency",
        "progressive_layer_drop",
        "elasticity",
        "compile",
        "zero_force_ds_cpu_optimizer",
        "zero_allow_untested_optimizer",
    ],
)
def test_sections_that_are_not_the_files_business(key: str) -> None:
    assert f"Remove {key} from the DeepSpeed JSON: " in _refusal(_zero() | {key: {"enabled": True}})
    resolve_config(_zero() | {key: None}, SHAPE)  # an empty one asks for nothing


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("zero_hpz_partition_size", 2),
        ("mics_shard_size", 2),
        ("zero_quantized_weights", True),
        ("zero_quantized_nontrainable_weights", True),
        ("zenflow", {"topk_ratio": 0.1}),
    ],
)
def test_what_write_back_does_not_reach(key: str, value: Any) -> None:
    sentence = _refusal(_zero(**{key: value}))
    assert f"Remove zero_optimization.{key} from the DeepSpeed JSON: " in sentence


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("zero_hpz_partition_size", 1),
        ("mics_shard_size", -1),
        ("zero_quantized_weights", False),
    ],
)
def test_defaults_that_are_written_out_pass(key: str, value: Any) -> None:
    assert resolve_config(_zero(**{key: value}), SHAPE)["zero_optimization"][key] == value


@pytest.mark.parametrize("key", ["offload_param", "offload_optimizer"])
def test_offload(key: str) -> None:
    assert f"zero_optimization.{key}.device is nvme" in _refusal(_zero(**{key: {"device": "nvme"}}))
    for setting in ({"super_offload": True}, {"ratio": 0.5}):
        sentence = _refusal(_zero(**{key: {"device": "cpu"} | setting}))
        assert f"super_offload and ratio from zero_optimization.{key}" in sentence
    for stage in range(4):
        config = _zero(**{key: {"device": "cpu"}, "stage": stage})
        if stage >= (1 if key == "offload_optimizer" else 3):
            resolve_config(config, SHAPE)
        else:
            assert f"{key} has no effect below stage" in _refusal(config)


@pytest.mark.parametrize(
    ("dtype", "key"),
    [
        ("bf16", "bf16_master_weights_and_grads"),
        ("bf16", "bf16_optimizer_states"),
        ("fp16", "fp16_master_weights_and_grads"),
    ],
)
def test_masters_of_low_precision(dtype: str, key: str) -> None:
    assert f"Remove {dtype}.{key}: " in _refusal(_zero() | {dtype: {key: True}})


@pytest.mark.parametrize("stage", [4, -1, "3", "auto", None, True, 2.5, [3]])
def test_stages_that_do_not_exist(stage: Any) -> None:
    sentence = _refusal({"zero_optimization": {"stage": stage}})
    assert "zero_optimization.stage must be 0, 1, 2 or 3" in sentence


@pytest.mark.parametrize("name", ["zero_optimization", "bf16", "fp16"])
@pytest.mark.parametrize("value", [3, True, "auto", [1]])
def test_sections_that_are_no_objects(name: str, value: Any) -> None:
    assert f"{name} in the DeepSpeed JSON must be an object" in _refusal({name: value})


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ({"steps_per_print": "auto"}, "steps_per_print"),
        (_zero(sub_group_size="auto"), "zero_optimization.sub_group_size"),
        (_zero(offload_param={"device": "cpu", "buffer_count": "auto"}),
         "zero_optimization.offload_param.buffer_count"),
        ({"zero_optimization": {"stage": 2, "stage3_prefetch_bucket_size": "auto"}},
         "zero_optimization.stage3_prefetch_bucket_size"),
    ],
)  # fmt: skip
def test_auto_where_no_flag_gives_the_value(config: dict[str, Any], path: str) -> None:
    assert _refusal(config).startswith(f'{path} is "auto" in the DeepSpeed JSON')


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
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"--deepspeed {path} ")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.json cannot be read: No such file"):
        read_config(tmp_path / "absent.json")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_config(tmp_path)


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
    config = _zero()
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 7
    zero = inference_config(config, dtype="float32", hidden_size=64)["zero_optimization"]
    assert zero["stage3_param_persistence_threshold"] == 7


@pytest.mark.parametrize("config", [{}, {"zero_optimization": {"stage": 2}}])
def test_a_stage_that_partitions_nothing_is_refused_for_inference(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="leaves the model whole on each rank"):
        inference_config(config, dtype="float32", hidden_size=64)


def test_an_auto_that_nothing_settles_is_refused_for_inference() -> None:
    config = _zero()
    config["zero_optimization"]["stage3_max_live_parameters"] = "auto"
    with pytest.raises(ValueError, match="stage3_max_live_parameters is"):
        inference_config(config, dtype="float32", hidden_size=64)
