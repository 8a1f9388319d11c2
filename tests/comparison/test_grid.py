"""The file of a comparison: every mistake is one sentence, and commands are what it says."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gem_ds.comparison.cell_folder import CELL_FILE, commands_of, refuse_other_commands
from gem_ds.comparison.cells import (
    Cell,
    evaluation_command,
    final_cells,
    folder_of,
    rate_text,
    search_cells,
    training_command,
)
from gem_ds.comparison.grid import parse_comparison, read_comparison
from gem_ds.files.atomic import save_json

REPOSITORY = Path(__file__).resolve().parents[2]

CONTENT: dict[str, Any] = {
    "output_dir": "out",
    "launcher": ["deepspeed", "--num_gpus", 8],
    "common": {"density": 0.001, "bf16": True, "target_modules": ["q", "v"], "revision": None},
    "seeds": [42, 43],
    "dev_examples": 100,
    "learning_rates": ["1e-3", 0.01],
    "methods": {"gem": None, "lora": {"learning_rates": [2e-4], "flags": {"density": 1}}},
    "tasks": {
        "rte": {"data_dir": "glue/RTE", "flags": {"density": 0.5, "max_length": 128}},
        "gsm8k": {
            "flags": {"model_name_or_path": "M"},
            "evaluate": {
                "command": "python -m eval.gsm8k --model {model} {weights} --to {output_dir}/eval",
                "score": "exact_match.strict-match.accuracy",
                "correct": "strict_match",
            },
        },
    },
}


def changed(path: str, value: object) -> dict[str, Any]:
    """The content with one key set."""
    content = copy.deepcopy(CONTENT)
    *outer, last = path.split(".")
    inner = content
    for key in outer:
        inner = inner[key]
    inner[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("methdos", {}, "the file has the unknown key 'methdos'; known: choose_by, common, dev_ex"),
        ("seeds", [], "seeds must be a list of at least one value."),
        ("seeds", [1, 2, 1], "seeds has 1 more than once."),
        ("seeds", [1.5], "each of seeds must be a whole number of at least 0, not 1.5."),
        ("seeds", 42, "seeds must be a list of at least one value."),
        ("dev_examples", 0, "dev_examples must be a whole number of at least 1, not 0."),
        ("tasks.rte.dev_examples", "9", "tasks.rte.dev_examples must be a whole number of at lea"),
        ("num_parallel", True, "num_parallel must be a whole number of at least 1, not True."),
        ("methods", {}, "methods must map at least one name to its settings."),
        ("methods", {"gme": None}, "methods has the unknown method 'gme'; known: bitfit, "),
        ("methods.gem", {"rates": [1]}, "methods.gem has the unknown key 'rates'; known: flags,"),
        ("methods.gem", {"learning_rates": [0.001, "1e-3"]}, "has 0.001 more than once."),
        ("learning_rates", [-1], "each of learning_rates must be a number above 0, not -1."),
        ("learning_rates", ["fast"], "must be a number above 0, not 'fast'."),
        ("learning_rates", None, "methods.gem has no learning_rates: give them there or at the"),
        ("tasks", [], "tasks must map at least one name to its settings."),
        ("tasks", {"rtee": {}}, "tasks has the unknown task 'rtee'; known: boolq, cb, cola, "),
        ("tasks", {None: {}}, "tasks has the unknown task None; known: boolq, cb, cola, "),
        ("tasks.rte.data_dir", 3, "tasks.rte.data_dir must be a text, not 3."),
        ("tasks.gsm8k.evaluate.score", None, "tasks.gsm8k.evaluate.score is missing."),
        ("tasks.gsm8k.evaluate", {}, "tasks.gsm8k.evaluate.command is missing."),
        ("tasks.gsm8k.evaluate.command", "a 'b", "cannot be split into words: No closing"),
        ("tasks.gsm8k.evaluate.command", "x --w={weights}", "{weights} must stand alone, not in"),
        ("tasks.gsm8k.evaluate.command", "x {output_dir}", "must write to {output_dir}/eval: that"),
        ("tasks.gsm8k.evaluate.results", "r", "evaluate has the unknown key 'results'; known: "),
        ("tasks.gsm8k.flags", {}, "give model_name_or_path in common: tasks.gsm8k.evaluate needs"),
        ("common.seed", 3, "leave seed out of common: it is the comparison's own to set."),
        ("common.resume_from_checkpoint", "last", "leave resume_from_checkpoint out of common: it"),
        ("common", {"--bf16": True}, "common: write flag names without dashes, not '--bf16'."),
        ("tasks.rte.flags", [], "tasks.rte.flags must map flag names to values."),
        ("common.density", {}, "common.density must be a value or a list of values."),
        ("launcher", "deepspeed", "launcher must be a list of at least one value."),
        ("output_dir", "", "output_dir must be a path, not ''."),
        ("choose_by", "f1", "choose_by must be score or loss, not 'f1'."),
    ],
)
def test_a_mistake_is_one_sentence(path: str, value: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        parse_comparison(changed(path, value))
    assert "\n" not in str(caught.value)


def test_missing_keys_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seeds is missing"):
        parse_comparison({key: value for key, value in CONTENT.items() if key != "seeds"})
    with pytest.raises(ValueError, match="each of the 2 runs that num_parallel starts at once"):
        parse_comparison(CONTENT | {"num_parallel": 2, "devices": [0]})
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_comparison(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("seeds: [")
    with pytest.raises(ValueError, match="is not valid YAML"):
        read_comparison(tmp_path / "bad.yaml")


def cell_of(task: str, method: str, split: Literal["dev", "test"] = "test") -> Cell:
    return Cell(task=task, method=method, learning_rate=2e-4, seed=42, split=split)


def test_commands_are_what_the_file_says() -> None:
    comparison = parse_comparison(CONTENT)
    cell = cell_of("rte", "lora")
    assert " ".join(training_command(comparison, cell)) == (
        "deepspeed --num_gpus 8 launch/train.py --density 1 --bf16 true --target_modules q v "
        "--max_length 128 --method lora --task rte --data_dir glue/RTE --seed 42 "
        "--learning_rate 2e-04 --dev_examples 100 --evaluate_on test "
        "--output_dir out/rte/lora/test/lr2e-04_seed42 --overwrite_output_dir true"
    )
    assert evaluation_command(comparison, cell) is None
    cell = cell_of("gsm8k", "lora")
    folder = folder_of(comparison, cell)
    assert " ".join(evaluation_command(comparison, cell) or []) == (
        f"python -m eval.gsm8k --model M --adapter {folder}/adapter --to {folder}/eval"
    )


def test_a_task_may_hold_out_fewer_examples_and_a_method_leave_a_flag_out() -> None:
    content = changed("tasks.rte.dev_examples", 50)
    content["methods"]["lora"]["flags"] = {"target_modules": None}
    comparison = parse_comparison(content)
    for task, method, held_out in (("rte", "gem", "50"), ("gsm8k", "lora", "100")):
        words = training_command(comparison, cell_of(task, method, "dev"))
        assert words[words.index("--dev_examples") + 1] == held_out
        assert ("--target_modules" in words) == (method == "gem")


def test_cells_of_the_search_have_the_first_seed_and_the_development_split() -> None:
    comparison = parse_comparison(CONTENT)
    search = search_cells(comparison)
    assert {(c.seed, c.split, c.method) for c in search} == {(42, "dev", "gem")}  # lora: one rate
    assert len(search) == 4
    final = final_cells(comparison, {("rte", "gem"): 0.01, ("rte", "lora"): None})
    assert [(c.method, c.seed, c.split) for c in final] == [
        ("gem", seed, "test") for seed in (42, 43)
    ]


@given(st.floats(1e-12, 1e6), st.floats(1e-12, 1e6))
def test_a_rate_is_its_text_and_no_two_share_a_folder(first: float, second: float) -> None:
    assert float(rate_text(first)) == first
    assert (rate_text(first) == rate_text(second)) == (first == second)


def test_rates_are_readable() -> None:
    texts = {0.01: "1e-02", 1.5e-3: "1.5e-03", 3.0: "3e+00", 20.0: "2e+01"}
    assert {rate: rate_text(rate) for rate in texts} == texts


@pytest.mark.parametrize(
    ("launcher", "start"),
    [
        (["python"], "python -m gem_ds.train --"),
        (["deepspeed", "--num_gpus", 8], "deepspeed --num_gpus 8 --module gem_ds.train --"),
    ],
)
def test_outside_of_a_checkout_the_module_runs_and_goes_on_with_what_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: list[object], start: str
) -> None:
    content = CONTENT | {"output_dir": str(tmp_path / "out"), "launcher": launcher}
    cell = cell_of("rte", "lora")
    monkeypatch.chdir(REPOSITORY)
    inside = parse_comparison(content)
    folder_of(inside, cell).mkdir(parents=True)
    save_json(folder_of(inside, cell) / CELL_FILE, commands_of(inside, cell))
    assert " launch/train.py --" in (folder_of(inside, cell) / "cell.json").read_text()
    monkeypatch.chdir(tmp_path)
    outside = parse_comparison(content)
    assert " ".join(training_command(outside, cell)).startswith(start)
    refuse_other_commands(outside, cell)
    other = parse_comparison(content | {"program": "mine.py"})
    with pytest.raises(ValueError, match=r"\(train: launch/train\.py, now mine\.py\)"):
        refuse_other_commands(other, cell)
