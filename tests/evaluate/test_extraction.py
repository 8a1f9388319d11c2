"""The program in what a model wrote: a table of answers, every reference, and texts without end."""

import re
import textwrap
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gem_ds.data.tasks.mbpp import load_problems
from gem_ds.evaluate.extraction import extract_program
from gem_ds.evaluate.mbpp import entry_point_of

ADD = "def add(a, b):\n    return a + b"
WRONG = "def add(a, b):\n    return a - b"
USE = "print(add(1, 2))"
IMPORTED = "from operator import add"
PI = "def area(r):\n    return math.pi * r * r"

# what the model wrote, what the program is
TABLE = {
    "code alone": (ADD, ADD),
    "code and the mark": (f"{ADD}\n[DONE]", ADD),
    "what follows the mark": (f"{ADD}\n[DONE]\n\nYou are an expert\n[BEGIN]\n{WRONG}\n[DONE]", ADD),
    "both marks": (f"Sure!\n[BEGIN]\n{ADD}\n[DONE]\nIt adds.", ADD),
    "the first mark only": (f"Here you are:\n[BEGIN] \r\n{ADD}\n", f"{ADD}\n"),
    "a mark after it": (f"{ADD}\n[BEGIN]", ADD),
    "a mark after it and another": (f"{ADD}\n[BEGIN]\n\n[DONE]\n", ADD),
    "a mark and a use after it": (f"{ADD}\n[BEGIN]\n{USE}\n[DONE]", ADD),
    "a mark after a fence": (f"So:\n```\n{ADD}\n```\n[BEGIN]\nNow it is your turn.", ADD),
    "a mark after words only": ("I cannot do that.\n[BEGIN]\n", "I cannot do that."),
    "words between the marks": ("Sure!\n[BEGIN]\nIt adds.\n[DONE]", "It adds."),
    "a fence between the marks": (f"[BEGIN]\n```python\n{ADD}\n```\n[DONE]", f"{ADD}\n"),
    "a run-on without a mark": (
        f"{ADD}\n\nYou are an expert Python programmer, and here is your task: Sub.\n[BEGIN]\n",
        f"{ADD}\n\n",
    ),
    "a fence": (f"```python\n{ADD}\n```", f"{ADD}\n"),
    "a fence without a language": (f"```\n{ADD}\n```", f"{ADD}\n"),
    "a fence in conversation": (f"Sure! Here it is:\n\n```py\n{ADD}\n```\n\nIt adds.", f"{ADD}\n"),
    "a fence with Windows line ends": (f"```python\r\n{ADD}\r\n```\r\n", f"{ADD}\r\n"),
    "a fence on the lines of the code": (f"So: ```python {ADD}``` It adds.", ADD),
    "a fence never closed": (f"Sure!\n```python\n{ADD}\n", f"{ADD}\n"),
    "a fence that the prompt had opened": (f"{ADD}\n```\nThis function adds.", f"{ADD}\n"),
    "a fence inside a list": (
        f"1. Define it:\n\n   ```python\n{textwrap.indent(ADD, '   ')}\n   ```\n",
        f"{ADD}\n",
    ),
    "a use after it": (f"```python\n{ADD}\n```\nUse it:\n```python\n{USE}\n```", f"{ADD}\n"),
    "a use that imports it": (
        f"```python\n{ADD}\n```\nTest:\n```python\nfrom solution import add\n\n{USE}\n```",
        f"{ADD}\n",
    ),
    "a use that imports it by a dot": (
        f"```\n{ADD}\n```\n```\nfrom .operator import add\n{USE}\n```",
        f"{ADD}\n",
    ),
    "a use that imports its module": (
        f"```\n{ADD}\n```\n```\nimport solution as add\n{USE}\n```",
        f"{ADD}\n",
    ),
    "output after it": (f"```python\n{ADD}\n```\nOutput:\n```\n3\n```", f"{ADD}\n"),
    "a command before it": (f"```bash\npip install x\n```\n```python\n{ADD}\n```", f"{ADD}\n"),
    "a correction": (f"```\n{WRONG}\n```\nNo, sorry:\n```\n{ADD}\n```", f"{ADD}\n"),
    "a draft in its reasoning": (f"<think>\n```\n{WRONG}\n```\n</think>\n{ADD}", f"\n{ADD}"),
    "conversation without a fence": (f"Sure, this adds:\n\n{ADD}\n\nIt adds.", f"{ADD}\n"),
    "words that begin like code": (
        f"from the tests we see that\nimport is not needed.\n{ADD}\nThat is all.",
        ADD,
    ),
    "an unfinished second function": (f"{ADD}\n\ndef sub(a, b):\n    return (a -", f"{ADD}\n"),
    "a space before it": (f" {ADD}", "def add(a, b):\n   return a + b"),
    "a margin throughout": (textwrap.indent(ADD, "    "), ADD),
    "a closing word": (f"{ADD}\n\nDone", f"{ADD}\n"),
    "another closing mark": (f"{ADD}\n[END]", ADD),
    "a helper and then the function": (f"{ADD}\n\n\n{USE}\n", f"{ADD}\n\n\n{USE}\n"),
    "fences in a docstring": ('def add():\n    """```\n    x\n    ```"""', None),
    "a name bound by a lambda": ("add = lambda a, b: a + b", None),
    "a mark that is Python": (f"{ADD}\nadd", None),
    "a star import": ("from math import *\nadd = fsum\npi", None),
    "its name as an argument elsewhere": (
        f"```\n{ADD}\n```\nUse:\n```\ndef g(add):\n    add = add or max\n    return add(1, 1)\n```",
        f"{ADD}\n",
    ),
    "a definition under a condition": ("if True:\n    def add(a, b):\n        return a", None),
    "an imported function": ("from operator import add", None),
    "an imported function in a fence": ("Use:\n```\nfrom operator import add\n```", IMPORTED),
    "another function": ("def sub(a, b):\n    return a - b", None),
    "words only": ("I cannot do that.", None),
    "a syntax error": ("def add(a, b)\n    return a + b", None),
    "a null byte": ("def add():\n    return '\0'", None),
    "half a character": ("def add():\n    return '\ud800'", None),
    "nothing": ("", None),
    "a mark alone": ("[DONE]", ""),
    "a fence alone": ("```", None),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_program_on_a_table(name):
    completion, expected = TABLE[name]
    expected = completion if expected is None else expected
    program = extract_program(completion, "add")
    assert program.rstrip("\n") == expected.rstrip("\n")


def test_a_block_brings_the_blocks_along_that_it_needs():
    text = f"```\nimport math\n```\nthen\n```\nimport os\n```\nand\n```\n{PI}\n```"
    assert extract_program(text, "area").split("\n\n") == ["import math", f"{PI}\n"]
    alone = f"```\nimport math\n```\n```\nimport math\n{PI}\n```"
    assert extract_program(alone, "area") == f"import math\n{PI}\n"


def test_without_an_entry_point_any_definition_will_do():
    assert extract_program(f"Sure!\n```\nx = 1\n```\n```\n{PI}\n```") == f"{PI}\n"
    assert extract_program("x = 1") == "x = 1"


WRAPPERS = {
    "as it is": "{}",
    "marks": "Of course.\n[BEGIN]\n{}\n[DONE]\nI hope this helps!",
    "fence": "Here is the function:\n\n```python\n{}\n```\n\nIt passes the tests.",
    "fence between marks": "[BEGIN]\n```\n{}\n```\n[DONE]",
    "open fence": "```python\n{}\n",
    "conversation": "Here is the function.\n\n{}\n\nThis passes the tests.",
    "use": "```python\n{}\n```\nFor example:\n```python\nprint('some use of it')\n```",
}


@pytest.mark.parametrize("sanitized", [False, True])
def test_every_reference_is_extracted_as_it_stands(gem_data_dir, sanitized):
    dataset = load_problems(gem_data_dir / "mbpp", sanitized=sanitized)
    for problem in dataset.problems.values():
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
    *(
        "[BEGIN]",
        "[DONE]",
        "```",
        "```python\n",
        "\n",
        "    ",
        "def add(a):",
        "return a",
        "(",
        '"""',
    ),
    *(
        "import os",
        "</think>",
        "Done",
        "\r\n",
        "\\d",
        "\0",
        "\ud800",
        "You are an expert",
        "@",
        ":",
    ),
]


@settings(max_examples=200, deadline=None)
@given(text=st.lists(st.sampled_from(PARTS) | st.text(max_size=8), max_size=14).map("".join))
def test_no_text_makes_it_fail_and_a_program_is_a_part_of_the_text(text):
    for entry_point in ("add", None):
        program = extract_program(text, entry_point)
        assert isinstance(program, str)
        for line in program.split("\n"):
            assert line.strip() in text


@pytest.mark.parametrize(
    "text",
    [
        "(" * 100_000,
        "-" * 100_000 + "1",
        "1" + "+1" * 50_000,
        "x" + ".a" * 25_000,
        "9" * 100_000,
        "def f():\n    pass\n" * 1_500,
        "def f(:\n" * 5_000,
        "if a:\n" * 3_000,
        "```" * 20_000,
        "```\nx = 1\n" * 2_000,
        "[BEGIN]" * 20_000,
    ],
    ids=range(11),
)
def test_long_and_deep_texts_take_no_long_time(text):
    start = time.perf_counter()
    extract_program(text, "add")
    assert time.perf_counter() - start < 10
