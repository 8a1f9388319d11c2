"""The file of a comparison: every mistake is one sentence, and commands are what it says."""

import copy
import itertools
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gem_ds.comparison.cells import (
    CELL_FILE,
    Cell,
    commands_of,
    evaluation_command,
    final_cells,
    folder_of,
    rate_text,
    refuse_other_commands,
    search_cells,
    training_command,
)
from gem_ds.comparison.grid import parse_comparison, read_comparison
from gem_ds.files.atomic import save_json
from tests.tiny_evaluation import refusal

REPOSITORY = Path(__file__).resolve().parents[2]
GRID = yaml.safe_load(Path(__file__).with_name("grid.yaml").read_text(encoding="utf-8"))


def changed(path: str, value: object) -> dict[str, Any]:
    """The content of the file with one key set."""
    content = copy.deepcopy(GRID["comparison"])
    *outer, last = path.split(".")
    inner = content
    for key in outer:
        inner = inner[key]
    inner[last] = value
    return content


@pytest.mark.parametrize(("path", "value", "sentence"), GRID["mistakes"])
def test_a_mistake_is_one_sentence(path, value, sentence):
    assert sentence in refusal(parse_comparison, {"num_parallel": 3} | changed(path, value))


def test_files_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "bad.yaml"
    assert "cannot be read: No such file" in refusal(read_comparison, path)
    path.write_text("seeds: [")
    assert "bad.yaml is not valid YAML" in refusal(read_comparison, path)


def cell_of(task: str, method: str, split: Literal["dev", "test"] = "test") -> Cell:
    return Cell(task=task, method=method, learning_rate=2e-4, seed=42, split=split)


def test_commands_are_what_the_file_says():
    comparison = parse_comparison(GRID["comparison"])
    cell = cell_of("rte", "lora")
    assert " ".join(training_command(comparison, cell)) == (
        "deepspeed --num_gpus 8 launch/train.py --density 1 --bf16 true --target_modules q v "
        "--max_length 128 --method lora --task rte --data_dir glue/RTE --seed 42 "
        "--learning_rate 2e-04 --dev_examples 100 --evaluate_on test "
        "--output_dir out/rte/lora/test/lr2e-04_seed42 --overwrite_output_dir true"
    )
    assert evaluation_command(comparison, cell) == []
    cell = cell_of("gsm8k", "lora")
    folder = folder_of(comparison, cell)
    assert " ".join(evaluation_command(comparison, cell)) == (
        f"python -m eval.gsm8k --model M --adapter {folder}/adapter --to {folder}/eval"
    )


def test_a_task_may_hold_out_fewer_examples_and_a_method_leave_a_flag_out():
    content = changed("tasks.rte.dev_examples", 50)
    content["methods"]["lora"]["flags"] = {"target_modules": None}
    comparison = parse_comparison(content)
    for task, method, held_out in (("rte", "gem", "50"), ("gsm8k", "lora", "100")):
        words = training_command(comparison, cell_of(task, method, "dev"))
        assert words[words.index("--dev_examples") + 1] == held_out
        assert ("--target_modules" in words) == (method == "gem")


def test_a_method_and_a_task_may_stand_under_names_of_their_own():
    content = changed("methods.low_rank", {"method": "lora", "flags": {"lora_r": 3}})
    content["tasks"]["maths"] = {"task": "gsm8k"} | content["tasks"]["gsm8k"]
    comparison, cell = parse_comparison(content), cell_of("maths", "low_rank")
    words = training_command(comparison, cell)
    value_of = dict(itertools.pairwise(words))
    assert (value_of["--method"], value_of["--task"]) == ("lora", "gsm8k")
    assert value_of["--output_dir"] == "out/maths/low_rank/test/lr2e-04_seed42"
    assert "--adapter out/maths/low_rank" in " ".join(evaluation_command(comparison, cell))
    assert len({cell.method for cell in search_cells(comparison)}) == 2  # lora has one rate


def test_cells_of_the_search_have_the_first_seed_and_the_development_split():
    comparison = parse_comparison(GRID["comparison"])
    search = search_cells(comparison)
    assert {(c.seed, c.split, c.method) for c in search} == {(42, "dev", "gem")}  # lora: one rate
    assert len(search) == 4
    final = final_cells(comparison, {("rte", "gem"): 0.01, ("rte", "lora"): None})
    assert [(c.method, c.seed, c.split) for c in final] == [
        ("gem", seed, "test") for seed in (42, 43)
    ]


@given(st.floats(1e-12, 1e6), st.floats(1e-12, 1e6))
def test_a_rate_is_its_text_and_no_two_share_a_folder(first, second):
    assert float(rate_text(first)) == first
    assert (rate_text(first) == rate_text(second)) == (first == second)
    texts = {0.01: "1e-02", 1.5e-3: "1.5e-03", 3.0: "3e+00", 20.0: "2e+01"}
    assert {rate: rate_text(rate) for rate in texts} == texts


@pytest.mark.parametrize(
    ("launcher", "option"), [("python", "-m"), ("deepspeed --num_gpus 8", "--module")]
)
def test_outside_of_a_checkout_the_module_runs_and_goes_on_with_what_was_begun(
    tmp_path, monkeypatch, launcher, option
):
    own = {"output_dir": str(tmp_path / "out"), "launcher": launcher.split()}
    content = GRID["comparison"] | own
    comparison, cell = parse_comparison(content), cell_of("rte", "lora")
    monkeypatch.chdir(REPOSITORY)
    folder = folder_of(comparison, cell)
    folder.mkdir(parents=True)
    save_json(folder / CELL_FILE, commands_of(comparison, cell))
    assert " launch/train.py --" in (folder / "cell.json").read_text()
    monkeypatch.chdir(tmp_path)
    command = " ".join(training_command(comparison, cell))
    assert command.startswith(f"{launcher} {option} gem_ds.train --")
    refuse_other_commands(comparison, cell)
    other = parse_comparison(content | {"program": "mine.py"})
    told = refusal(refuse_other_commands, other, cell)
    assert "(train: launch/train.py, now mine.py)" in told


@pytest.mark.parametrize("content", [b"", b"\xff\xff", b"{", b"[]", b"{}"])
def test_a_damaged_command_file_is_refused_in_one_sentence(tmp_path, content):
    comparison = parse_comparison(GRID["comparison"] | {"output_dir": str(tmp_path / "out")})
    folder = folder_of(comparison, cell_of("rte", "lora"))
    folder.mkdir(parents=True)
    (folder / CELL_FILE).write_bytes(content)
    told = refusal(refuse_other_commands, comparison, cell_of("rte", "lora"))
    assert "(its cell.json is damaged): delete that folder" in told
