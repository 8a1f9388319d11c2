"""The flags' own limits: what can be seen to be wrong without opening a file."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from gem_ds.train.config import (
    SCHEDULES,
    Arguments,
    DataArguments,
    MethodArguments,
    ModelArguments,
    TrainArguments,
    check_arguments,
)

PARTS: dict[str, Any] = {
    "model": ModelArguments,
    "data": DataArguments,
    "method": MethodArguments,
    "train": TrainArguments,
}
NEEDED = {"model_name_or_path": "m", "task": "gsm8k", "output_dir": "o"}


def check(**values: Any) -> None:
    """``check_arguments`` on the defaults, what is needed, and ``values``."""
    settings = NEEDED | values
    parts = {}
    for key, part in PARTS.items():
        names = {field.name for field in fields(part)} & settings.keys()
        parts[key] = part(**{name: settings[name] for name in names})
    check_arguments(Arguments(**parts))


def test_the_defaults_pass_and_every_flag_is_explained():
    check()
    for part in PARTS.values():
        for field in fields(part):
            assert field.metadata["help"].endswith((".", ").")), field.name


COUNTS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "calibration_examples",
    "max_length",
    "max_eval_samples",
    "train_examples",
    "lora_r",
)
RATES = (
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "warmup_steps",
    "calibration_head_steps",
    "calibration_buffer_gb",
    "head_learning_rate",
    "lora_alpha",
    "dev_examples",
)


@pytest.mark.parametrize("name", COUNTS)
def test_counts_start_at_1(name):
    check(**{name: 1})
    for value in (0, -3):
        with pytest.raises(ValueError, match=f"^--{name} must be at least 1, not {value}"):
            check(**{name: value})


@pytest.mark.parametrize("name", RATES)
def test_rates_are_finite_and_not_negative(name):
    check(**{name: 0.0})
    for value in (-1e-9, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"^--{name} must be a finite number"):
            check(**{name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bf16": True, "fp16": True}, "--bf16 or --fp16, not both"),
        ({"adam_beta1": 1.0}, "--adam_beta1 must be at least 0 and below 1"),
        ({"lora_dropout": 1.0}, "--lora_dropout must be at least 0 and below 1, not 1.0"),
        ({"adam_beta2": -0.1}, "--adam_beta2 must be at least 0 and below 1"),
        ({"adam_beta2": float("nan")}, "--adam_beta2"),
        ({"adam_epsilon": 0.0}, "--adam_epsilon must be above 0"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau"},
            "must be one of linear, cosine",
        ),
        ({"max_steps": -2}, r"--max_steps must be -1 \(use epochs\) or at least 0"),
        ({"num_train_epochs": 0.0}, "--num_train_epochs must be above 0"),
        ({"num_train_epochs": float("inf")}, "--num_train_epochs"),
        ({"eval_strategy": "no", "eval_steps": 2}, "no has no steps between: leave --eval_steps"),
        ({"eval_strategy": "epoch", "eval_steps": 2}, "leave --eval_steps out"),
        ({"mask": "m", "calibration_examples": 2}, "leave --calibration_examples out"),
        ({"mask": "m", "calibration_head_steps": 5}, "leave --calibration_head_steps out"),
        ({"mask": "m", "calibration_buffer_gb": 1.0}, "leave --calibration_buffer_gb out"),
        ({"method": "full", "target_modules": ["q"]}, "full has no target layers: leave --target_"),
        ({"method": "bitfit", "target_modules": ["q"]}, "bitfit has no target layers"),
    ],
)
def test_other_contradictions_are_refused(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        check(**values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["gem", "random", "lora", "ia3", "shira"])
def test_methods_that_have_target_layers_take_them(method):
    check(method=method, target_modules=["q_proj"])


def test_the_defaults_of_a_step_are_those_of_transformers():
    train = TrainArguments()
    assert (train.adam_beta1, train.adam_beta2, train.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (train.weight_decay, train.max_grad_norm) == (0.0, 1.0)
    assert (train.lr_scheduler_type, train.warmup_steps) == ("linear", 0)


def test_steps_make_epochs_irrelevant():
    check(max_steps=0, num_train_epochs=0.0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_a_function_of_the_step_alone(name):
    """A resumed run makes the schedule again from the number of updates."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=9)
    for step in range(9):
        assert schedule.get_last_lr() == [0.5 * schedule.lr_lambdas[0](step)]
        optimizer.step()
        schedule.step()


def test_the_dtype_follows_the_switches():
    train = TrainArguments()
    assert train.dtype == "fp32"
    assert replace(train, bf16=True).dtype == "bf16"
    assert replace(train, fp16=True).dtype == "fp16"
