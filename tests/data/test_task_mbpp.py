"""MBPP from its two files: every problem, the splits, and each bad file refused by place."""

import hashlib
import json

import datasets
import pytest

from gem_ds.data.tasks import Example, load_task
from gem_ds.data.tasks.mbpp import SPLITS, Problem, load_problems, prompt_of, target_of

FULL_ROW = {
    "text": "Add.",
    "code": "def f(x):\r\n  return x",
    "task_id": 601,
    "test_setup_code": "y = 1",
    "test_list": ["assert f(1) == 1", "assert f(2) == 2 "],
    "challenge_test_list": [],
}
SANITIZED_ROW = {
    "source_file": "x.ipynb",
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


def full(tmp_path, *rows) -> str:
    (tmp_path / "mbpp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path)


def sanitized(tmp_path, content) -> str:
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "sanitized-mbpp.json").write_text(text)
    return str(tmp_path)


def test_every_problem_is_there_as_written_and_in_one_split(gem_data_dir):
    for is_sanitized, file, sizes in (
        (False, "mbpp.jsonl", [10, 500, 90, 374]),
        (True, "sanitized-mbpp.json", [7, 257, 43, 120]),
    ):
        dataset = load_problems(gem_data_dir / "mbpp", sanitized=is_sanitized)
        names = ("prompt", "test", "validation", "train")
        assert [len(dataset.split(name)) for name in names] == sizes
        assert len(dataset.problems) == sum(sizes)
        for name, ids in SPLITS.items():
            assert all(problem.task_id in ids for problem in dataset.split(name))
        content = (gem_data_dir / "mbpp" / file).read_bytes()
        assert dataset.source == file
        assert dataset.sha256 == hashlib.sha256(content).hexdigest()
    rows = (gem_data_dir / "mbpp" / "mbpp.jsonl").read_text(encoding="utf-8").splitlines()
    assert list(load_problems(gem_data_dir / "mbpp").problems.values()) == [
        Problem(
            task_id=row["task_id"],
            text=row["text"],
            code=row["code"],
            tests=tuple(row["test_list"]),
            setup=row["test_setup_code"],
        )
        for row in map(json.loads, rows)
    ]


def test_the_train_split_is_trained_on_and_the_test_split_is_not_shown(gem_data_dir):
    data = load_task("mbpp", data_dir=str(gem_data_dir / "mbpp"))
    assert (len(data.train), len(data.test)) == (374, 90)
    problems = load_problems(gem_data_dir / "mbpp").problems
    for examples, first in ((data.train, 601), (data.test, 511)):
        for task_id, example in enumerate(examples, start=first):
            assert example.prompt == prompt_of(problems[task_id].text, problems[task_id].tests)
            assert "\r" not in example.target
            assert example.target.split() == target_of(problems[task_id].code).split()
    target = "def reverse_words(s):\n        return ' '.join(reversed(s.split()))\n[DONE]"
    assert data.train[3].target == target  # as published


def test_prompt_and_target_have_the_published_form(tmp_path):
    data = load_task("mbpp", data_dir=full(tmp_path, FULL_ROW, FULL_ROW | {"task_id": 511}))
    assert data.train == [Example(prompt=PROMPT, target="def f(x):\n  return x\n[DONE]")]
    assert data.test == data.train


@pytest.mark.parametrize(
    ("is_sanitized", "name", "row"), [(False, "full", FULL_ROW), (True, "sanitized", SANITIZED_ROW)]
)
def test_without_a_folder_the_hub_is_asked(monkeypatch, tmp_path, is_sanitized, name, row):
    def load_dataset(*names):
        assert names == ("google-research-datasets/mbpp", name)
        return {"train": [row], "test": [row | {"task_id": 12}]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    dataset = load_problems(None, sanitized=is_sanitized)
    assert list(dataset.problems) == [row["task_id"], 12]
    assert dataset.source == f"google-research-datasets/mbpp ({name})"
    assert dataset.sha256 == load_problems(None, sanitized=is_sanitized).sha256
    if is_sanitized:
        problem = dataset.problems[11]
        assert (problem.text, problem.setup) == ("Add.", "import math\nimport re")
    write = sanitized if is_sanitized else lambda folder, rows: full(folder, *rows)
    folder = write(tmp_path, [row, row | {"task_id": 12}])
    assert load_problems(folder, sanitized=is_sanitized).problems == dataset.problems


def without(row, field):
    return {name: value for name, value in row.items() if name != field}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (without(FULL_ROW, "task_id"), "'task_id' must be a whole number from 1 to 974, not None"),
        (FULL_ROW | {"task_id": True}, "'task_id' must be .* not True"),
        (FULL_ROW | {"task_id": 975}, "'task_id' must be .* not 975"),
        (FULL_ROW | {"task_id": 602}, "another problem with task_id 602"),
        (without(FULL_ROW, "text"), "no field 'text'"),
        (without(FULL_ROW, "test_setup_code"), "no field 'test_setup_code'"),
        (without(FULL_ROW, "test_list"), "'test_list' must be a list of strings; it is missing"),
        (FULL_ROW | {"test_list": ["a", 1]}, "entry 2 of 'test_list' must be a string"),
        (FULL_ROW | {"test_list": []}, "problem 601 has no tests"),
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, message):
    folder = full(tmp_path, FULL_ROW | {"task_id": 602}, bad)
    with pytest.raises(ValueError, match=rf"mbpp\.jsonl, line 2: .*{message}"):
        load_problems(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([SANITIZED_ROW, without(SANITIZED_ROW, "prompt")], r"entry 2: .*another problem"),
        ([SANITIZED_ROW | {"test_imports": "import math"}], r"entry 1: .*'test_imports' must be"),
        ('[{"task_id": 1}', r"sanitized-mbpp\.json, line 1: this is not JSON"),
        ([1], "must be one JSON list of objects"),
    ],
)
def test_a_bad_sanitized_file_is_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load_problems(sanitized(tmp_path, content), sanitized=True)


def test_missing_files_splits_and_foreign_options_are_named(tmp_path):
    for is_sanitized, name in ((False, r"mbpp\.jsonl"), (True, r"sanitized-mbpp\.json")):
        with pytest.raises(ValueError, match=f"There is no file .*{name}"):
            load_problems(tmp_path, sanitized=is_sanitized)
    with pytest.raises(ValueError, match=r"no problem of the validation split \(ids 511 to 600\)"):
        load_task("mbpp", data_dir=full(tmp_path, FULL_ROW))
    with pytest.raises(ValueError, match="--prompt_field has no meaning for --task mbpp"):
        load_task("mbpp", data_dir=str(tmp_path), prompt_field="x")
