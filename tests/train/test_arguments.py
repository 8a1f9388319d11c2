"""The command line: a recipe gives any flag, flags win, mistakes and contradictions are named."""

import math
import re
import shlex
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gem_ds.train.arguments import _said, as_flags, check_arguments, parse_arguments
from gem_ds.train.config import (
    DEFAULT_DENSITY,
    Arguments,
    DataArguments,
    MethodArguments,
    ModelArguments,
    TrainArguments,
)
from gem_ds.train.other_trainers import MEANINGS, RENAMED, WITHOUT_EFFECT

PARTS = (ModelArguments, DataArguments, MethodArguments, TrainArguments)
NEEDED = ["--model_name_or_path", "m", "--task", "gsm8k", "--output_dir", "o"]

#: A recipe that gives every flag a value other than its default.
EVERY_FLAG = Path(__file__).with_name("every_flag.yaml")
OTHER = yaml.safe_load(EVERY_FLAG.read_text())

#: What other trainers' documentation says to type.
COMMANDS = yaml.safe_load(Path(__file__).with_name("commands.yaml").read_text())

BAD = tomllib.loads(Path(__file__).with_name("bad_arguments.toml").read_text())

#: Flags that take no number at all, or whose other value contradicts another flag's.
CHOICES = {
    *("lr_scheduler_type", "train_sampling_strategy", "classification_loss", "sddmm_kernel"),
    *("eval_strategy", "save_strategy", "mask", "fp16", "evaluate_on", "optimizer"),
    *("long_prompts", "train_on"),
}


def recipe(tmp_path: Path, content: object) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def test_every_flag_arrives_from_the_command_line_and_from_a_recipe():
    assert OTHER.keys() == {field.name for part in PARTS for field in fields(part)}
    for flags in (as_flags(OTHER), ["--config", str(EVERY_FLAG)]):
        assert parse_arguments(flags).values() == OTHER


@given(
    in_recipe=st.sets(st.sampled_from(sorted(OTHER))),
    in_flags=st.sets(st.sampled_from(sorted(OTHER))),
)
@settings(max_examples=25, deadline=None)
def test_flags_win_over_the_recipe_and_the_recipe_over_the_defaults(
    tmp_path_factory, in_recipe, in_flags
):
    if "sam_layers" in in_recipe | in_flags:
        in_flags = in_flags | {"sam_rho"}  # which it goes with
    base = parse_arguments(NEEDED).values()
    content = {name: base[name] for name in ("model_name_or_path", "task", "output_dir")}
    content |= {name: OTHER[name] for name in in_recipe}
    content |= dict.fromkeys(in_flags - CHOICES, "1")  # what the flags then put right
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


def test_a_key_without_a_value_is_a_flag_that_is_not_given(tmp_path):
    """As other trainers' recipes list them; keys that are no flags here too."""
    path = recipe(
        tmp_path, {**dict.fromkeys(OTHER), "wandb_project": None, "flash_attention": None}
    )
    assert parse_arguments([*NEEDED, "--config", path]) == parse_arguments(NEEDED)


@pytest.mark.parametrize(("content", "message"), BAD["recipe"])
def test_a_bad_recipe_is_refused_in_one_sentence(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_arguments([*NEEDED, "--config", recipe(tmp_path, content)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"task: caf\xe9", "is not valid YAML"),
        (b"[" * 1000, "is nested too deeply"),
        (b"a: " + b"{b: " * 2000, "is nested too deeply"),
        (b"seed: " + b"9" * 5000, "is not valid YAML: Exceeds the limit"),
        (b"run_name: 2024-13-45", "is not valid YAML: month must be"),
        (b"seed: 1\nbf16: true\nseed: 2", "is not valid YAML: seed stands in it twice"),
        (b"seed: !!python/object:os.system 1", "is not valid YAML"),
        (b"target_modules: [[q_proj]]", r": target_modules cannot be \[\[\.\.\.\]\]"),
        (b"target_modules: [null]", r": target_modules cannot be \[None\]"),
        (b"output_dir: !!binary aGVsbG8=", r": output_dir cannot be b'hello'"),
    ],
    ids=lambda value: None if value is None else str(value[:20]),
)
def test_a_recipe_that_cannot_be_read_is_refused(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^--config .*recipe\.yaml:? ?{message}") as caught:
        parse_arguments([*NEEDED, "--config", str(path)])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("flag", ["target_modules", "density", "report_to", "optimizer"])
def test_a_bomb_of_aliases_is_refused_without_being_written_out(tmp_path, flag):
    """Nine aliases of nine aliases, nine deep: a billion values."""
    deeper = [f"  - &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    path = recipe(tmp_path, "\n".join([f"{flag}:", "  - &a0 [x, x]", *deeper]))
    with pytest.raises(ValueError, match=rf"{flag} cannot be \[") as caught:
        parse_arguments([*NEEDED, "--config", path])
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_harms_no_recipe(tmp_path, encoding):
    path = tmp_path / "recipe.yaml"
    path.write_text("task: größer\nrun_name: null\n", encoding=encoding)
    flags = ["--model_name_or_path", "m", "--output_dir", "o", "--config", str(path)]
    assert parse_arguments(flags).data.task == "größer"


@pytest.mark.parametrize("name", [*COMMANDS["taken"], *COMMANDS["recipes"]])
def test_what_other_trainers_say_to_type_is_taken(tmp_path, name):
    case = COMMANDS["taken"].get(name) or COMMANDS["recipes"][name]
    flags = shlex.split(case["command"]) if "command" in case else []
    if "recipe" in case:
        flags = ["--config", recipe(tmp_path, case["recipe"])]
    arguments = parse_arguments(flags)
    assert arguments.values().items() >= ({"model_name_or_path": "M"} | case["flags"]).items()
    assert len(arguments.notes) == bool(case["left_out"])
    named = re.findall(r"--(\w+)", "".join(arguments.notes).replace("--output_dir", ""))
    assert sorted(named) == sorted(case["left_out"])


@pytest.mark.parametrize("name", COMMANDS["unchanged"])
def test_what_others_publish_starts_or_the_first_sentence_names_all_that_must_go(name, tmp_path):
    case = COMMANDS["unchanged"][name]
    command = shlex.split(case.get("command", ""))
    content = yaml.safe_load(case.get("recipe", "{}"))
    started = [*command, "--config", recipe(tmp_path, case.get("recipe", "seed: 1"))]
    if named := case["named"]:
        with pytest.raises(ValueError, match=r"[Tt]here are no flags --") as caught:
            parse_arguments(started)
        told = re.sub(r" \(meaning [^)]*\)", "", str(caught.value)).partition("no flags ")[2]
        *first, last = told.partition(": leave out")[0].split(" and ")
        assert [*", ".join(first).split(", "), last] == [f"--{flag}" for flag in named]
        assert "\n" not in str(caught.value)
    kept = {key: value for key, value in content.items() if key not in named}
    kept |= case.get("instead", {}) if content else {}
    words = [word for flag, said in _said(command) if flag not in named for word in (flag, *said)]
    words = [f"--{word}" if word in dict(_said(command)) else word for word in words if word]
    more = [] if content else as_flags(case.get("instead", {}))
    args = parse_arguments([*words, *more, "--config", recipe(tmp_path, kept or "seed: 1")])
    assert args.model.model_name_or_path in ("M", "swift-robot")


@pytest.mark.parametrize(("flags", "sentence"), COMMANDS["refused"])
def test_what_has_no_meaning_here_is_named_all_at_once(flags, sentence):
    with pytest.raises(ValueError, match="^" + re.escape(sentence) + "$"):
        parse_arguments([*NEEDED, *shlex.split(flags)])


def test_the_unknown_keys_of_a_recipe_are_named_all_at_once(tmp_path):
    path = recipe(tmp_path, "dataset: a\ntemplate: llama3\nlora_ranc: 8\nwarmup_ratio: 0.1\n")
    words = "there are no flags --dataset, --template and --lora_ranc (meaning --lora_rank?): leave"
    with pytest.raises(ValueError, match=re.escape(f"{path}: {words}")):
        parse_arguments(["--config", path])


def test_other_words_for_values_are_taken():
    """An optimizer of 8 bits where there is little state is the usual one, and that is said."""
    taken = parse_arguments([*NEEDED, "--bf16", "auto", "--optimizer", "paged_adamw_8bit"])
    assert taken.train.bf16
    assert taken.train.optimizer == "adamw"
    assert [note.partition(":")[0] for note in taken.notes] == [
        "--optimizer adamw_8bit is for --method full"
    ]
    full = parse_arguments([*NEEDED, "--method=full", "--optimizer=adamw_bnb_8bit", "--bf16=false"])
    assert (full.train.optimizer, full.train.bf16, full.notes) == ("adamw_8bit", False, [])


def test_no_other_name_hides_a_flag():
    """A name is a flag of this trainer's or another's word for one, and each leads to one."""
    own = {field.name for part in PARTS for field in fields(part)}
    others = [*RENAMED, *MEANINGS, *WITHOUT_EFFECT]
    assert len(set(others)) == len(others)
    assert own.isdisjoint(others)
    assert own.issuperset(RENAMED.values())


@pytest.mark.parametrize(("flags", "message"), BAD["flags"])
def test_a_bad_flag_is_refused_in_one_sentence(flags, message, capsys):
    with pytest.raises(ValueError, match=message) as caught:
        parse_arguments([*NEEDED, *flags.split()])
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


@pytest.mark.parametrize("asked", ["--help", "-h"])
def test_help_names_every_flag_and_tells_a_default_once_and_none_at_all(capsys, asked):
    with pytest.raises(SystemExit) as caught:
        parse_arguments([asked])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"--{name} " in text for name in [*OTHER, "config"])
    assert "(default: None)" not in text
    assert f"(default: {DEFAULT_DENSITY})" in text
    assert "(default: gem)" in text


@pytest.mark.parametrize("value", [{"a": 1}, object()])
def test_a_value_that_no_flag_takes_is_refused_by_its_kind(value):
    with pytest.raises(ValueError, match=r"^density cannot be a \w+: see --help\.$"):
        as_flags({"density": value})


# What can be seen to be wrong without opening a file


def check(**values: Any) -> None:
    """``check_arguments`` on the defaults and ``values``."""
    parts = {
        key: replace(part, **{name: values[name] for name in values.keys() & vars(part).keys()})
        for key, part in vars(parse_arguments(NEEDED)).items()
        if key != "notes"
    }
    check_arguments(Arguments(**parts))


def test_the_defaults_pass_and_every_flag_is_explained():
    check()
    for part in PARTS:
        for field in fields(part):
            assert field.metadata["help"].endswith((".", ").")), field.name


COUNTS = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("logging_steps", "eval_steps", "save_steps", "save_total_limit", "calibration_examples"),
    *("max_length", "max_eval_samples", "train_examples", "lora_r"),
)
RATES = (
    *("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "calibration_head_steps"),
    *("calibration_buffer_gb", "head_learning_rate", "lora_alpha", "dev_examples"),
)


def test_counts_start_at_1_and_rates_are_finite_and_not_negative():
    counts = dict.fromkeys(COUNTS, (1, (0, -3), "at least 1, not"))
    rates = dict.fromkeys(RATES, (0.0, (-1e-9, math.inf, math.nan), "a finite number"))
    for name, (least, wrong, words) in (counts | rates).items():
        check(**{name: least})
        for value in wrong:
            with pytest.raises(ValueError, match=f"^--{name} must be {words}"):
                check(**{name: value})
    check(calibration_buffer_gb="auto")


@pytest.mark.parametrize(("values", "message"), BAD["values"])
def test_other_contradictions_are_refused(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        check(**values)
    assert "\n" not in str(caught.value)


def test_what_is_no_contradiction_passes():
    for method in ("gem", "random", "lora", "ia3", "shira"):
        check(method=method, target_modules=["q_proj"])
    check(max_steps=0, num_train_epochs=0.0)  # steps make epochs irrelevant


def test_the_defaults_of_a_step_are_those_of_transformers():
    train = TrainArguments()
    assert (train.adam_beta1, train.adam_beta2, train.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (train.weight_decay, train.max_grad_norm) == (0.0, 1.0)
    assert (train.lr_scheduler_type, train.warmup_steps) == ("linear", 0)
    dtypes = [replace(train, **switch).dtype for switch in ({}, {"bf16": True}, {"fp16": True})]
    assert dtypes == ["fp32", "bf16", "fp16"]
