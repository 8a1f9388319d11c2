"""MBPP from its two files: every problem, the splits, and each bad file refused by place."""

import hashlib
import json

import pytest

from gem_ds.data.tasks import Example, load_task
from gem_ds.data.tasks.mbpp import SPLITS, Problem, load_problems, prompt_of, target_of
from tests.tiny_tasks import put_on_hub

FULL_ROW = {
    "text": "Add.",
    "code": "def f(x):\r\n  return x",
    "task_id": 601,
    "test_setup_code": "y = 1",
    "test_list": ["assert f(1) == 1", "assert f(2) == 2 "],
    "challenge_test_list": [],
}
SANITIZED_ROW = {
    "task_id": 11,
    "prompt": "Add.",
    "code": "def f(x):\n  return x",
    "test_imports": ["import math", "import re"],
    "test_list": ["assert f(1) == 1"],
}
PROMPT = (
    "You are an expert Python programmer, and here is your task: Add. Your code should pass these "
    "tests:\n\nassert f(1) == 1\nassert f(2) == 2 \n[BEGIN]\n"
)


def write(tmp_path, *rows, sanitized=False) -> str:
    if sanitized:
        (tmp_path / "sanitized-mbpp.json").write_text(json.dumps(rows))
    else:
        (tmp_path / "mbpp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("is_sanitized", "file", "sizes"),
    [
        (False, "mbpp.jsonl", {"prompt": 10, "test": 500, "validation": 90, "train": 374}),
        (True, "sanitized-mbpp.json", {"prompt": 7, "test": 257, "validation": 43, "train": 120}),
    ],
)
def test_every_problem_is_there_as_written_and_in_one_split(
    gem_data_dir, is_sanitized, file, sizes
):
    dataset = load_problems(gem_data_dir / "mbpp", sanitized=is_sanitized)
    assert {name: len(dataset.split(name)) for name in SPLITS} == sizes
    assert len(dataset.problems) == sum(sizes.values())
    for name, ids in SPLITS.items():
        assert all(problem.task_id in ids for problem in dataset.split(name))
    content = (gem_data_dir / "mbpp" / file).read_bytes()
    assert (dataset.source, dataset.sha256) == (file, hashlib.sha256(content).hexdigest())
    rows = json.loads(content) if is_sanitized else map(json.loads, content.splitlines())
    assert list(dataset.problems.values()) == [
        Problem(
            task_id=row["task_id"],
            text=row["prompt" if is_sanitized else "text"],
            code=row["code"],
            tests=tuple(row["test_list"]),
            setup="\n".join(row["test_imports"]) if is_sanitized else row["test_setup_code"],
        )
        for row in rows
    ]


def test_the_train_split_is_trained_on_and_the_test_split_is_not_shown(gem_data_dir):
    data = load_task("mbpp", data_dir=str(gem_data_dir / "mbpp"))
    assert (len(data.train), len(data.test)) == (374, 90)
    problems = load_problems(gem_data_dir / "mbpp").problems
    asked = [*range(601, 975), *range(511, 601)]
    for task_id, example in zip(asked, data.train + data.test, strict=True):
        assert example.prompt == prompt_of(problems[task_id].text, problems[task_id].tests)
        assert "\r" not in example.target
        assert example.target.split() == target_of(problems[task_id].code).split()
    target = "def reverse_words(s):\n        return ' '.join(reversed(s.split()))\n[DONE]"
    assert data.train[3].target == target  # as published


def test_prompt_and_target_have_the_published_form(tmp_path):
    data = load_task("mbpp", data_dir=write(tmp_path, FULL_ROW, FULL_ROW | {"task_id": 511}))
    assert data.train == [Example(prompt=PROMPT, target="def f(x):\n  return x\n[DONE]")]
    assert data.test == data.train


@pytest.mark.parametrize(("name", "row"), [("full", FULL_ROW), ("sanitized", SANITIZED_ROW)])
def test_without_a_folder_the_hub_is_asked(monkeypatch, tmp_path, name, row):
    rows = [row, row | {"task_id": 12}]
    put_on_hub(monkeypatch, "google-research-datasets/mbpp", name, train=rows[:1], test=rows[1:])
    is_sanitized = name == "sanitized"
    dataset = load_problems(None, sanitized=is_sanitized)
    assert list(dataset.problems) == [row["task_id"], 12]
    assert dataset.source == f"google-research-datasets/mbpp ({name})"
    assert dataset.sha256 == load_problems(None, sanitized=is_sanitized).sha256
    folder = write(tmp_path, *rows, sanitized=is_sanitized)
    assert load_problems(folder, sanitized=is_sanitized).problems == dataset.problems


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_id": None}, "'task_id' must be a whole number from 1 to 974, not None"),
        ({"task_id": True}, "'task_id' must be .* not True"),
        ({"task_id": 975}, "'task_id' must be .* not 975"),
        ({"task_id": 602}, "another problem with task_id 602"),
        ({"text": None}, "no field 'text'"),
        ({"test_setup_code": None}, "no field 'test_setup_code'"),
        ({"test_list": None}, "'test_list' must be a list of strings; it is missing"),
        ({"test_list": ["a", 1]}, "entry 2 of 'test_list' must be a string"),
        ({"test_list": []}, "problem 601 has no tests"),
    ],
)
def test_a_bad_line_is_named(tmp_path, changes, message):
    row = {name: value for name, value in (FULL_ROW | changes).items() if value is not None}
    with pytest.raises(ValueError, match=rf"mbpp\.jsonl, line 2: .*{message}"):
        load_problems(write(tmp_path, FULL_ROW | {"task_id": 602}, row))


def test_bad_and_missing_files_and_splits_are_named(tmp_path):
    for is_sanitized, name in ((False, r"mbpp\.jsonl"), (True, r"sanitized-mbpp\.json")):
        with pytest.raises(ValueError, match=f"There is no file .*{name}"):
            load_problems(tmp_path, sanitized=is_sanitized)
    for row, message in (
        (SANITIZED_ROW | {"task_id": 12}, "json, entry 2: there is another problem"),
        (SANITIZED_ROW | {"test_imports": "import math"}, "entry 2: .*'test_imports' must be"),
        (1, "json must be one JSON list of objects"),
    ):
        folder = write(tmp_path, SANITIZED_ROW | {"task_id": 12}, row, sanitized=True)
        with pytest.raises(ValueError, match=message):
            load_problems(folder, sanitized=True)
    with pytest.raises(ValueError, match=r"no problem of the validation split \(ids 511 to 600\)"):
        load_task("mbpp", data_dir=write(tmp_path, FULL_ROW))
