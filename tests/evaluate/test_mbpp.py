"""MBPP's prompts against the dataset's README and the community harness; templates; programs."""

import ast
import importlib.util
import json
import tomllib
from pathlib import Path

import jinja2
import pytest
import yaml

from gem_ds.data.tasks.mbpp import Dataset, Problem
from gem_ds.evaluate.mbpp import (
    MARGIN_STOP_STRINGS,
    STOP_STRINGS,
    Mbpp,
    MbppArguments,
    entry_point_of,
    header_of,
    load,
    template_prompt,
)

TABLES = tomllib.loads(Path(__file__).with_name("mbpp.toml").read_text())
README_FORM = (  # the dataset's README, with its own names for what is filled in
    "You are an expert Python programmer, and here is your task: {prompt} Your code should pass "
    "these tests:\n\n{tests}\n[BEGIN]\n{code}\n[DONE]"
)


def problem(code="def f(x, y=2):\n    return x", tests=("assert f(1) == 1",), **more) -> Problem:
    fields = {"task_id": 11, "text": "Do it.", "setup": ""} | more
    return Problem(code=code, tests=tuple(tests), **fields)


def benchmark(*problems: Problem, template: str | None = None) -> Mbpp:
    dataset = Dataset(problems={p.task_id: p for p in problems}, source="x", sha256="")
    asked = {f"mbpp/{p.task_id}": p for p in dataset.split("test")}
    return Mbpp(dataset=dataset, problems=asked, flags=MbppArguments(prompt_template=template))


@pytest.fixture(params=[False, True], ids=["full", "sanitized"], scope="module")
def whole(request, gem_data_dir) -> Mbpp:
    return load(gem_data_dir / "mbpp", None, MbppArguments(sanitized=request.param))


def test_prompts_have_the_form_of_the_readme(whole):
    def form(task_id):
        p = whole.dataset.problems[task_id]
        return README_FORM.format(prompt=p.text, tests="\n".join(p.tests), code=p.code)

    three, zero = whole.prompts(3), whole.prompts(0)
    assert (whole.num_fewshot(None), whole.num_fewshot(0)) == (3, 0)
    for name, p in whole.problems.items():
        assert name == f"mbpp/{p.task_id}"
        own = form(p.task_id).removesuffix(f"{p.code}\n[DONE]")
        assert zero[name] == own
        assert three[name] == "\n\n".join([form(2), form(3), form(4), own])
        assert (whole.num_shown(zero[name]), whole.num_shown(three[name])) == (0, 3)


def test_three_shot_prompts_are_the_harness_own(gem_data_dir):
    """Its task file and its list of shots, read and not imported: that would ask the network."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        pytest.skip("lm-eval is not installed")
    folder = Path(spec.origin).parent / "tasks" / "mbpp"
    text = (folder / "mbpp.yaml").read_text(encoding="utf-8").replace("!function", "")
    task = yaml.safe_load(text)
    tree = ast.parse((folder / "utils.py").read_text(encoding="utf-8"))
    (listed,) = (
        ast.literal_eval(node.body[0].value)
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "list_fewshot_samples"
    )
    environment = jinja2.Environment(keep_trailing_newline=True)
    ask, answer = (
        environment.from_string(task[key]).render for key in ("doc_to_text", "doc_to_target")
    )
    assert task["generation_kwargs"]["until"] == list(STOP_STRINGS)
    lines = (gem_data_dir / "mbpp" / "mbpp.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {row["task_id"]: row for row in map(json.loads, lines)}
    asked = load(gem_data_dir / "mbpp", None, MbppArguments())
    prompts = asked.prompts(3)
    shots = [ask(**row) + task["target_delimiter"] + answer(**row) for row in listed]
    for name, p in asked.problems.items():
        assert prompts[name] == "\n\n".join([*shots, ask(**rows[p.task_id])])


def test_every_problem_has_an_entry_point_that_its_tests_call(whole):
    for p in whole.dataset.problems.values():
        name = entry_point_of(p)
        assert f"{name}(" in p.tests[0].replace(" ", "")
        namespace: dict[str, object] = {}
        exec(f"{header_of(p)}\n    pass", namespace)  # a header is one that Python takes
        assert callable(namespace[str(name)])


@pytest.mark.parametrize(("code", "tests", "expected"), TABLES["entry_points"])
def test_the_entry_point_is_the_one_function_called(code, tests, expected):
    assert (entry_point_of(problem(code, tests)) or "none") == expected


def test_headers_keep_arguments_and_drop_annotations():
    code = "def f(a: List[int], *b, c=(1, 2), **d) -> Tree:\n    return a"
    assert header_of(problem(code)) == "def f(a, *b, c=(1, 2), **d):"
    with pytest.raises(ValueError, match=r"problem 11 do not call one function .*leave it out"):
        header_of(problem("x = 1"))


def test_templates_fill_their_three_names_and_leave_other_braces():
    p = problem("def f(x):\n    return {x}", ["assert f(1) == {1}", "assert f(2) == {2}"])
    assert template_prompt(p, "# {text}\n{tests}\n{x} {} {header}\n") == (
        "# Do it.\nassert f(1) == {1}\nassert f(2) == {2}\n{x} {} def f(x):\n"
    )
    text = problem(text=r"{tests} \1 {header}")
    assert template_prompt(text, "{text}") == r"{tests} \1 {header}"


def test_a_header_makes_the_completion_a_continuation():
    asked = benchmark(problem(), template='# {text}\n{header}\n    """{text}"""\n')
    kept = dict(TABLES["kept"])
    begun = 'def f(x, y=2):\n    """Do it."""\n'
    programs = {text: asked.program("mbpp/11", text).program for text in kept}
    assert programs == {text: begun + rest for text, rest in kept.items()}
    assert asked.stop_strings() == MARGIN_STOP_STRINGS


@pytest.mark.parametrize("template", ["{text}", None])
def test_other_completions_are_searched_for_the_function_that_the_tests_call(template):
    text = (
        "```\ndef g(x):\n    return x\n```\nNo:\n```\ndef f(x):\n    return x\n```\n```\nf(1)\n```"
    )
    asked = benchmark(problem(setup="import os"), template=template)
    job = asked.program("mbpp/11", text)
    assert job.program == "def f(x):\n    return x\n"
    assert (job.tests, job.setup, job.entry_point) == (problem().tests, "import os", "f")
    assert asked.stop_strings() == ("[DONE]",)
