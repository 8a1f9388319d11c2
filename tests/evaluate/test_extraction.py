"""The program in what a model wrote: a table of answers, every reference, and texts without end."""

import re
import time
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gem_ds.data.tasks.mbpp import load_problems
from gem_ds.evaluate.extraction import extract_program
from gem_ds.evaluate.mbpp import entry_point_of

ADD = "def add(a, b):\n    return a + b"
PI = "def area(r):\n    return math.pi * r * r"

TEXTS = {"{ADD}": ADD, "{WRONG}": "def add(a, b):\n    return a - b", "{USE}": "print(add(1, 2))"}
with Path(__file__).with_name("extracted.toml").open("rb") as file:
    TABLE = tomllib.load(file)
WRAPPERS, LONG = TABLE.pop("wrappers"), TABLE.pop("long")


@pytest.mark.parametrize("name", TABLE)
def test_the_program_on_a_table(name):
    completion, expected = TABLE[name]
    for placeholder, text in TEXTS.items():
        completion, expected = (t.replace(placeholder, text) for t in (completion, expected))
    expected = completion if expected == "same" else expected
    assert extract_program(completion, "add").rstrip("\n") == expected.rstrip("\n")


def test_a_block_brings_the_blocks_along_that_it_needs():
    text = f"```\nimport math\n```\nthen\n```\nimport os\n```\nand\n```\n{PI}\n```"
    assert extract_program(text, "area").split("\n\n") == ["import math", f"{PI}\n"]
    alone = f"```\nimport math\n```\n```\nimport math\n{PI}\n```"
    assert extract_program(alone, "area") == f"import math\n{PI}\n"


def test_without_an_entry_point_any_definition_will_do():
    assert extract_program(f"Sure!\n```\nx = 1\n```\n```\n{PI}\n```") == f"{PI}\n"
    assert extract_program("x = 1") == "x = 1"
    half_a_character = "def add():\n    return '\ud800'"
    assert extract_program(half_a_character, "add") == half_a_character


@pytest.mark.parametrize("sanitized", [False, True])
def test_every_reference_is_extracted_as_it_stands(gem_data_dir, sanitized):
    for problem in load_problems(gem_data_dir / "mbpp", sanitized=sanitized).problems.values():
        name = entry_point_of(problem)
        assert name is not None
        assert extract_program(problem.code, name) == problem.code
        assert extract_program(f"{problem.code}\n[DONE]\n[BEGIN]", name) == problem.code


@pytest.mark.parametrize("wrapper", WRAPPERS.values(), ids=WRAPPERS)
def test_references_are_found_in_every_wrapper(gem_data_dir, wrapper):
    """What is found must be the whole program: lines lost at its ends would fail right answers."""
    problems = load_problems(gem_data_dir / "mbpp").problems
    for problem in list(problems.values())[::18]:
        code = re.sub(r"\r\n?", "\n", problem.code).strip()
        program = extract_program(wrapper.format(code), entry_point_of(problem))
        assert program.strip() == code, problem.task_id


PARTS = [
    *("[BEGIN]", "[DONE]", "```", "```python\n", "</think>", "You are an expert", "Done", "@", ":"),
    *("def add(a):", "return a", "import os", "    ", "\n", "\r\n", "(", '"""', "\\d", "\0"),
    "\ud800",
]


@settings(max_examples=200)
@given(text=st.lists(st.sampled_from(PARTS) | st.text(max_size=8), max_size=14).map("".join))
def test_no_text_makes_it_fail_and_a_program_is_a_part_of_the_text(text):
    for entry_point in ("add", None):
        program = extract_program(text, entry_point)
        assert isinstance(program, str)
        for line in program.split("\n"):
            assert line.strip() in text


@pytest.mark.parametrize("line", ["x = (", "@a(", "x = f(1, 2,", "def f(:", "try:", "x = [y, '''z"])
def test_a_program_is_found_beside_a_line_that_is_repeated(line):
    repeated = f"{line}\n" * 320
    for text in (f"{ADD}\n{repeated}", f"{repeated}\n{ADD}\n", f"So:\n{repeated}```\n{ADD}\n```"):
        assert extract_program(text, "add").strip() == ADD


@pytest.mark.parametrize(("start", "unit", "times", "end"), LONG, ids=str)
def test_long_and_deep_texts_take_no_long_time(start, unit, times, end):
    begun = time.perf_counter()
    extract_program(start + unit * times + end, "add")
    assert time.perf_counter() - begun < 10
