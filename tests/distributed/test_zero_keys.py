"""The table of DeepSpeed's keys: published files, and DeepSpeed's own reading as the oracle."""

import copy
import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from gem_ds.distributed.weights import load_deepspeed
from gem_ds.distributed.zero_config import resolve_config
from gem_ds.distributed.zero_keys import told_ignored
from gem_ds.distributed.zero_table import TABLE, Taken
from tests.distributed import test_zero_config
from tests.tiny_evaluation import refusal

PUBLISHED = yaml.safe_load(Path(__file__).with_name("published_configs.yaml").read_text())
SHAPE = replace(
    test_zero_config.SHAPE,
    world_size=1,
    optimizer={
        "lr": (0.001, "--learning_rate"),
        "betas": ([0.9, 0.999], "--adam_beta1 and --adam_beta2"),
        "eps": (1e-8, "--adam_epsilon"),
        "weight_decay": (0.0, "--weight_decay"),
    },
    scheduler={
        "warmup_min_lr": (0, "a warmup"),
        "warmup_max_lr": (0.001, "--learning_rate"),
        "warmup_num_steps": (100, "--warmup_steps"),
    },
)

#: Values that a key may be given by mistake.
ODD = (
    True,
    False,
    0,
    1,
    -1,
    0.5,
    -1.5,
    5e8,
    math.inf,
    math.nan,
    "",
    "x",
    "cpu",
    "auto",
    [],
    [3],
    {},
)


@pytest.fixture(scope="module")
def deepspeed_reads() -> Any:
    """DeepSpeed's own reading of a configuration, which raises where it does not like it."""
    config_class = load_deepspeed().runtime.config.DeepSpeedConfig
    return lambda resolved: config_class(copy.deepcopy(resolved))


@pytest.mark.parametrize("name", PUBLISHED["taken"])
def test_a_published_file_is_taken_and_what_decides_nothing_is_told(name, deepspeed_reads):
    config, passed_over = PUBLISHED["taken"][name]
    before = copy.deepcopy(config)
    resolved = resolve_config(config, SHAPE)
    assert config == before
    read = deepspeed_reads(resolved)
    assert read.zero_config.stage == config["zero_optimization"]["stage"]
    assert (read.optimizer_name, read.scheduler_name, read.bfloat16_config.enabled) == (
        *(None, None),
        True,
    )
    zero = config["zero_optimization"]
    of_2021 = {"offload_optimizer": "cpu_offload", "offload_param": "cpu_offload_param"}
    for key, old in of_2021.items():
        given = getattr(read.zero_config, key)
        asked = "cpu" if zero.get(old) else zero.get(key, {}).get("device", "none")
        assert (given.device if given else "none") == asked
    sentence = told_ignored(config)
    assert (sentence is None) == (not passed_over)
    for path in passed_over:
        assert f" {path} " in str(sentence)


@pytest.mark.parametrize("name", PUBLISHED["refused"])
def test_a_published_file_is_refused_in_one_true_sentence(name):
    config, sentence = PUBLISHED["refused"][name]
    assert refusal(resolve_config, config, SHAPE) == sentence


class Recording(dict[str, Any]):
    """A configuration that knows what it was asked for, copies included."""

    asked: ClassVar[set[str]] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


def test_the_table_has_every_key_of_deepspeed(deepspeed_reads):
    """So that a new one of DeepSpeed's is decided on before a user's file is refused for it."""
    runtime = load_deepspeed().runtime
    deepspeed_reads(Recording(train_batch_size=1))
    assert len(Recording.asked) > 30
    zero, offload = runtime.zero.config, runtime.zero.offload_config
    found = {
        "": Recording.asked,
        "bf16": runtime.precision_config.DeepSpeedBF16Config.model_fields,
        "fp16": runtime.precision_config.DeepSpeedFP16Config.model_fields,
        "zero_optimization.offload_param": offload.DeepSpeedZeroOffloadParamConfig.model_fields,
        "zero_optimization.offload_optimizer": (
            offload.DeepSpeedZeroOffloadOptimizerConfig.model_fields
        ),
        "zero_optimization": {
            field.alias or name for name, field in zero.DeepSpeedZeroConfig.model_fields.items()
        },
    }
    missing = {section: set(keys) - TABLE[section].keys() for section, keys in found.items()}
    assert not any(missing.values()), missing


def test_what_the_table_takes_deepspeed_takes_and_the_rest_is_one_sentence(deepspeed_reads):
    """Every key with every odd value, at the stages where it matters."""
    sentences, taken = [], 0
    for section, keys in TABLE.items():
        for (key, treatment), value in product(keys.items(), ODD):
            if not isinstance(treatment, Taken):
                continue
            config: dict[str, Any] = {"zero_optimization": {"stage": 3}}
            inner = config
            for name in filter(None, section.split(".")):
                inner = inner.setdefault(name, {})
            inner[key] = value
            try:
                resolved = resolve_config(config, SHAPE)
            except ValueError as error:
                sentences.append(str(error))
            else:
                deepspeed_reads(resolved)
                taken += 1
    assert min(taken, len(sentences)) > 100
    assert all(sentence.endswith(".") and "\n" not in sentence for sentence in sentences)
