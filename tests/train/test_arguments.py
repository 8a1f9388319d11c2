"""The command line: a recipe gives any flag, flags win, and mistakes are named."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gem_ds.train.arguments import as_flags, parse_arguments
from gem_ds.train.config import (
    DEFAULT_DENSITY,
    DataArguments,
    MethodArguments,
    ModelArguments,
    TrainArguments,
)

PARTS = (ModelArguments, DataArguments, MethodArguments, TrainArguments)
NEEDED = ["--model_name_or_path", "m", "--task", "gsm8k", "--output_dir", "o"]

#: For every flag a value that is not its default and stands with all the others.
OTHER = {
    "model_name_or_path": "organisation/model",
    "revision": "v1",
    "trust_remote_code": True,
    "attn_implementation": "sdpa",
    "task": "jsonl",
    "data_dir": "d",
    "train_file": "a.jsonl",
    "test_file": "b.jsonl",
    "prompt_field": "q",
    "target_field": "a",
    "max_length": 77,
    "packing": True,
    "train_sampling_strategy": "group_by_length",
    "classification_loss": "candidates",
    "dev_examples": 11,
    "train_examples": 12,
    "max_eval_samples": 13,
    "evaluate_on": "test",  # the other needs dev_examples
    "method": "ratio",
    "lora_r": 4,
    "lora_alpha": 3.5,
    "lora_dropout": 0.25,
    "density": "0.25",
    "target_modules": ["q_proj", "k_proj"],
    "calibration_examples": 3,
    "calibration_head_steps": 7,
    "calibration_buffer_gb": 0.5,
    "sddmm_kernel": "tiled",
    "mask": None,  # contradicts calibration_examples
    "output_dir": "out",
    "overwrite_output_dir": True,
    "resume_from_checkpoint": "last",
    "deepspeed": "z.json",
    "local_rank": 1,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 3,
    "gradient_accumulation_steps": 4,
    "num_train_epochs": 1.5,
    "max_steps": 9,
    "optimizer": "adamw",  # the other goes with full fine-tuning, which has no checkpoints
    "learning_rate": 3e-05,
    "head_learning_rate": 2e-04,
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-06,
    "max_grad_norm": 0.5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "seed": 7,
    "bf16": True,
    "fp16": False,  # contradicts bf16
    "gradient_checkpointing": True,
    "logging_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 5,
    "save_steps": 6,
    "save_total_limit": 2,
    "report_to": ["tensorboard", "wandb"],
    "disable_tqdm": True,
}

#: Flags that take no number at all.
CHOICES = (
    *("lr_scheduler_type", "train_sampling_strategy", "classification_loss"),
    *("sddmm_kernel", "eval_strategy"),
)


def recipe(tmp_path: Path, content: object) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def test_every_flag_arrives():
    assert OTHER.keys() == {field.name for part in PARTS for field in fields(part)}
    assert parse_arguments(as_flags(OTHER)).values() == OTHER


def test_a_recipe_gives_every_flag(tmp_path):
    assert parse_arguments(["--config", recipe(tmp_path, OTHER)]).values() == OTHER


@given(
    in_recipe=st.sets(st.sampled_from(sorted(OTHER))),
    in_flags=st.sets(st.sampled_from(sorted(OTHER))),
)
@settings(max_examples=25, deadline=None)
def test_flags_win_over_the_recipe_and_the_recipe_over_the_defaults(
    tmp_path_factory, in_recipe, in_flags
):
    base = parse_arguments(NEEDED).values()
    needed = {name: base[name] for name in ("model_name_or_path", "task", "output_dir")}
    wrong = dict.fromkeys(
        in_flags - {"mask", "fp16", "evaluate_on", "optimizer"}, "1"
    )  # what the flags then put right
    content = needed | {name: OTHER[name] for name in in_recipe}
    content |= {n: v for n, v in wrong.items() if n not in CHOICES}
    flags = as_flags({name: OTHER[name] for name in in_flags})
    path = recipe(tmp_path_factory.mktemp("recipe"), content)
    expected = base | {name: OTHER[name] for name in in_recipe | in_flags}
    assert parse_arguments(["--config", path, *flags]).values() == expected


def test_yaml_numbers_are_read_as_the_flags_read_them(tmp_path):
    text = "learning_rate: 1e-3\ndensity: 1e-4\nseed: '3'\nbf16: yes\ntarget_modules: all-linear\n"
    arguments = parse_arguments([*NEEDED, f"--config={recipe(tmp_path, text)}"])
    assert arguments.train.learning_rate == 1e-3
    assert arguments.method.density == "1e-4"
    assert arguments.train.seed == 3
    assert arguments.train.bf16
    assert arguments.method.target_modules == ["all-linear"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("densty: 0.1", "there is no flag --densty"),
        ("config: other.yaml", "there is no flag --config"),
        ("help: true", "there is no flag --help"),
        ("3: 4", "there is no flag --3"),
        ("max_steps: ten", "max_steps cannot be 'ten'"),
        ("max_steps: 1.5", "max_steps cannot be 1.5"),
        ("max_steps: [1]", r"max_steps cannot be \[1\]"),
        ("max_steps: null", "max_steps cannot be None"),
        ("bf16: perhaps", "bf16 cannot be 'perhaps'"),
        ("density: {a: 1}", "density cannot be"),
        (
            "train_sampling_strategy: group-by-length",
            "cannot be 'group-by-length': pass one of random, group_by_length",
        ),
        ("train_sampling_strategy: null", "train_sampling_strategy cannot be None"),
        ("evaluate_on: validation", "evaluate_on cannot be 'validation': pass one of test, dev"),
        ("classification_loss: candidate", "'candidate': pass one of tokens, candidates"),
        ("sddmm_kernel: dence", "sddmm_kernel cannot be 'dence': pass one of auto, dense, tiled"),
        ("- density", "must map flag names to values"),
        ("", "must map flag names to values"),
        ("a: [1", "is not valid YAML"),
        ("a: b: c", "is not valid YAML"),
        ("max_length: 0", "--max_length must be at least 1, not 0"),
    ],
)
def test_a_bad_recipe_is_refused_in_one_sentence(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_arguments([*NEEDED, "--config", recipe(tmp_path, content)])
    assert "\n" not in str(caught.value)


def test_a_recipe_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none\.yaml cannot be read: No such file"):
        parse_arguments([*NEEDED, "--config", str(tmp_path / "none.yaml")])
    (tmp_path / "latin.yaml").write_bytes(b"task: caf\xe9")
    with pytest.raises(ValueError, match="is not valid YAML"):
        parse_arguments([*NEEDED, "--config", str(tmp_path / "latin.yaml")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--densty", "0.1"], "There is no flag --densty"),
        (["--max_step", "1"], "There is no flag --max_step"),  # no abbreviations
        (["stray"], "There is no flag stray"),
        (["--max_steps", "ten"], "--max_steps.* invalid int value: 'ten'"),
        (["--max_steps"], "--max_steps.* expected one argument"),
        (["--config"], "--config: expected one argument"),
        (["--bf16", "perhaps"], "--bf16.* perhaps"),
    ],
)
def test_a_bad_flag_is_refused_in_one_sentence(flags, message, capsys):
    with pytest.raises(ValueError, match=message) as caught:
        parse_arguments([*NEEDED, *flags])
    assert "\n" not in str(caught.value)
    assert capsys.readouterr() == ("", ""), "argparse prints nothing of its own"


@pytest.mark.parametrize(
    ("method", "rate"),
    [("full", 5e-5), *((name, 1e-3) for name in ("gem", "random", "bitfit", "lora", "ia3"))],
)
def test_the_learning_rate_of_a_run_that_gives_none_is_the_methods(tmp_path, method, rate):
    flags = [*NEEDED, "--method", method]
    assert parse_arguments(flags).train.learning_rate == rate
    path = recipe(tmp_path, "learning_rate: null")
    assert parse_arguments([*flags, "--config", path]).train.learning_rate == rate
    assert parse_arguments([*flags, "--learning_rate", "0"]).train.learning_rate == 0


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in [*OTHER, "config"])


def test_help_tells_a_default_once_and_none_at_all(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: None)" not in text
    assert f"(default: {DEFAULT_DENSITY})" in text
    assert "(default: gem)" in text


@pytest.mark.parametrize("value", [{"a": 1}, object()])
def test_a_value_that_no_flag_takes_is_refused_by_its_kind(value):
    with pytest.raises(ValueError, match=r"^mask cannot be a \w+: save it"):
        as_flags({"mask": value})
