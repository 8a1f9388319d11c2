"""What reads a model's output does work in proportion to its length, and none makes it fail.

The work is counted and not timed: calls of functions, of Python and of C, and the characters that
are handed to Python's parser. It must not much more than double where a text is doubled.
"""

import ast
import json
import sys
import tomllib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gem_ds.data.metrics import read_number, score
from gem_ds.data.tasks import AnswerExample
from gem_ds.evaluate import humaneval
from gem_ds.evaluate.extraction import extract_program
from gem_ds.evaluate.gsm8k import compare
from gem_ds.evaluate.samples import SampleLog, read_samples
from gem_ds.evaluate.sandbox.program import Program, assign_roles
from gem_ds.evaluate.syntax import tree_of
from tests.evaluate.test_extraction import PARTS
from tests.tiny_evaluation import make_sample

UNITS = tomllib.loads(Path(__file__).with_name("growth.toml").read_text("utf-8"))
SQUAD = AnswerExample(prompt="p", target=" a b", answers=("a b",), passage="")
ADD = humaneval.Problem(prompt="def add(a):\n", before="", entry_point="add", test="")
HUMANEVAL = humaneval.HumanEval(problems={"0": ADD}, data_sha256={})

MOST_CALLS = 10**6  # of one reading

TEXT_READERS: list[Callable[[str], Any]] = [
    lambda text: compare(text, "#### 18"),
    read_number,
    lambda text: score("squad", [SQUAD], [text]),
]
CODE_READERS: list[Callable[[str], Any]] = [
    lambda text: HUMANEVAL.program("0", f"{text}\n"),
    lambda text: extract_program(text, "add"),
    lambda text: assign_roles(Program(text, ("assert add(1)",))),
]


def num_steps(monkeypatch: pytest.MonkeyPatch, read: Callable[[str], Any], text: str) -> int:
    """How many functions are called, and characters parsed, while a text is read."""
    num_calls, num_parsed = 0, 0
    parse = ast.parse

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal num_calls
        num_calls += event in ("call", "c_call")
        assert num_calls < MOST_CALLS

    def counting_parse(source: str) -> ast.Module:
        nonlocal num_parsed
        num_parsed += len(source)
        return parse(source)

    with monkeypatch.context() as patch:
        patch.setattr(ast, "parse", counting_parse)
        before = sys.getprofile()
        sys.setprofile(count)
        try:
            read(text)
        finally:
            sys.setprofile(before)
    return num_calls + num_parsed


@pytest.mark.parametrize(
    ("readers", "units"),
    [
        (TEXT_READERS, [("", unit, "") for unit in UNITS["text"]]),
        (CODE_READERS, UNITS["code"]),
    ],
    ids=["text", "code"],
)
def test_twice_the_text_is_twice_the_work(monkeypatch, readers, units):
    for start, unit, end in units:
        n = 2 * (300 // len(unit))  # even, or a quotation mark more would open a string
        for number, read in enumerate(readers):
            once = num_steps(monkeypatch, read, start + unit * n + end * n)
            twice = num_steps(monkeypatch, read, start + unit * 2 * n + end * 2 * n)
            assert twice < 2.5 * once + 500, (start, unit, number)


@pytest.mark.parametrize(
    "name",
    ["a" + ".a" * 400, "a" + ".\\\n\tbb" * 400, f"é . {'é' * 500}" * 400, "a" + " . a" * 400],
    ids=range(4),
)
def test_a_name_of_endless_parts_is_not_handed_to_the_parser(monkeypatch, name):
    """Of an import it makes as many strings as there are parts, each longer than the last."""
    text, handed = f"b = 1\nimport {name}\n", []
    with monkeypatch.context() as patch:
        patch.setattr(ast, "parse", handed.append)
        assert tree_of(text) is None
        extract_program(text, "add")
        assign_roles(Program(text, ()))
    assert not any("import" in str(source) for source in handed)
    assert tree_of("import a" + ".a" * 40) is not None


@settings(max_examples=150)
@given(
    parts=st.lists(
        st.sampled_from([*PARTS, *UNITS["text"], *(unit for _, unit, _ in UNITS["code"])])
        | st.text(max_size=5),
        max_size=12,
    )
)
def test_no_output_makes_a_reader_fail(parts):
    for read in (*TEXT_READERS, *CODE_READERS):
        read("".join(parts))


LINES = [json.dumps(asdict(make_sample("a", i, "x"))).encode() for i in range(2)]
VALUES = st.none() | st.integers(-1, 10**20) | st.floats() | st.text(max_size=3) | st.just([[]])


@settings(max_examples=200)
@given(
    field=st.sampled_from(["task_id", "sample", "prompt", "completion", "num_tokens", "settings"]),
    value=VALUES | st.dictionaries(st.text(max_size=2), VALUES, max_size=2),
    junk=st.binary(max_size=4) | st.sampled_from([b"[" * 10**5, b"1" * 5000, b'{"a":', b"\n", b""]),
    place=st.integers(0, 400),
    replaced=st.integers(0, 3),
)
def test_a_file_of_samples_is_read_or_refused(
    tmp_path_factory, field, value, junk, place, replaced
):
    """Whatever stands in it: the sentence names the file, and nothing else is raised."""
    changed = json.dumps(json.loads(LINES[1]) | {field: value}).encode()
    content = b"\n".join([LINES[0], changed, b""])
    path = tmp_path_factory.getbasetemp() / "samples.jsonl"
    path.write_bytes(content[:place] + junk + content[place + replaced :])
    for read in (
        lambda: read_samples(path, ["a"], allow_missing=True),
        lambda: SampleLog(path, {"a": "p"}, 2, {"seed": 0}),
    ):
        told = "samples.jsonl"
        try:
            read()
        except ValueError as error:
            told = str(error)
        assert "samples.jsonl" in told
