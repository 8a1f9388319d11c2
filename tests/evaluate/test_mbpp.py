"""MBPP's prompts against the dataset's README and the community harness; templates; programs."""

import ast
import importlib.util
import json
from pathlib import Path

import jinja2
import pytest
import yaml

from gem_ds.data.tasks.mbpp import Dataset, Problem, load_problems
from gem_ds.evaluate.mbpp import (
    MARGIN_STOP_STRINGS,
    entry_point_of,
    few_shot_prompt,
    header_of,
    problems_of,
    program_of,
    prompts_of,
    stop_strings,
    template_prompt,
)

README_FORM = (  # the dataset's README, with its own names for what is filled in
    "You are an expert Python programmer, and here is your task: {prompt} Your code should pass "
    "these tests:\n\n{tests}\n[BEGIN]\n{code}\n[DONE]"
)


def problem(code="def f(x, y=2):\n    return x", tests=("assert f(1) == 1",), **more) -> Problem:
    fields = {"task_id": 11, "text": "Do it.", "setup": ""} | more
    return Problem(code=code, tests=tuple(tests), **fields)


@pytest.fixture(params=[False, True], ids=["full", "sanitized"], scope="module")
def dataset(request, gem_data_dir) -> Dataset:
    return load_problems(gem_data_dir / "mbpp", sanitized=request.param)


def test_prompts_have_the_form_of_the_readme(dataset):
    def form(task_id):
        p = dataset.problems[task_id]
        return README_FORM.format(prompt=p.text, tests="\n".join(p.tests), code=p.code)

    asked = problems_of(dataset, "test")
    three = prompts_of(asked, dataset, num_fewshot=3, template=None)
    zero = prompts_of(asked, dataset, num_fewshot=0, template=None)
    for name, p in asked.items():
        assert name == f"mbpp/{p.task_id}"
        own = form(p.task_id).removesuffix(f"{p.code}\n[DONE]")
        assert zero[name] == own
        assert three[name] == "\n\n".join([form(2), form(3), form(4), own])


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
    assert task["generation_kwargs"]["until"] == list(stop_strings(None))
    lines = (gem_data_dir / "mbpp" / "mbpp.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {row["task_id"]: row for row in map(json.loads, lines)}
    dataset = load_problems(gem_data_dir / "mbpp")
    asked = problems_of(dataset, "test")
    prompts = prompts_of(asked, dataset, num_fewshot=3, template=None)
    shots = [ask(**row) + task["target_delimiter"] + answer(**row) for row in listed]
    for name, p in asked.items():
        assert prompts[name] == "\n\n".join([*shots, ask(**rows[p.task_id])])


def test_limit_takes_the_first_problems(dataset):
    assert list(problems_of(dataset, "test", 2)) == list(problems_of(dataset, "test"))[:2]
    assert len(problems_of(dataset, "validation", 10**6)) == len(dataset.split("validation"))


def test_a_dataset_without_the_shots_is_refused():
    lacking = Dataset(problems={11: problem(), 2: problem(task_id=2)}, source="x", sha256="")
    asked = problems_of(lacking, "test")
    with pytest.raises(ValueError, match=r"x lacks problem 3, .* or --num_fewshot 0"):
        prompts_of(asked, lacking, num_fewshot=3, template=None)
    prompts = prompts_of(asked, lacking, num_fewshot=0, template=None)
    assert prompts == {"mbpp/11": few_shot_prompt(problem(), [])}


def test_every_problem_has_an_entry_point_that_its_tests_call(dataset):
    for p in dataset.problems.values():
        name = entry_point_of(p)
        assert f"{name}(" in p.tests[0].replace(" ", "")
        namespace: dict[str, object] = {}
        exec(f"{header_of(p)}\n    pass", namespace)  # a header is one that Python takes
        assert callable(namespace[str(name)])


@pytest.mark.parametrize(
    ("code", "tests", "expected"),
    [
        ("def f(): pass", ["assert f() == g()"], "f"),
        ("def g(): pass\ndef f(): g()", ["assert max(f(), 1)"], "f"),
        ("def f(): pass\ndef g(): pass", ["assert f() == g()"], None),
        ("class f: pass", ["assert f()"], None),
        ("f = 1", ["assert f"], None),
        ("def f(:", ["assert f()"], None),
        ("def f(): pass", ["assert f("], None),
    ],
)
def test_the_entry_point_is_the_one_function_called(code, tests, expected):
    assert entry_point_of(problem(code, tests)) == expected


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
    some = Dataset(problems={11: p}, source="x", sha256="")
    with pytest.raises(ValueError, match=r"names none of {text}, {tests} and {header}"):
        prompts_of(problems_of(some, "test"), some, num_fewshot=0, template="Write {code}.")


def test_a_header_makes_the_completion_a_continuation():
    p, template = problem(), '# {text}\n{header}\n    """{text}"""\n'
    begun = 'def f(x, y=2):\n    """Do it."""\n'
    cases = {
        "    return x": "    return x",
        "    return x\n\nprint(f(1))": "    return x\n",
        "    return max(\n        x,\n    )\n": "    return max(\n        x,\n    )\n",
        "    return [\nx\n": "    return [",
        "    return g(\n)\ndef g(): pass": "    return g(\n)",
        "": "",
        "\n\n": "\n\n",
        "    return x\r\n\r\nprint(1)": "    return x\r\n\r",
        "    return x\n```\nIt": "    return x",
    }
    for completion, kept in cases.items():
        assert program_of(completion, p, template) == begun + kept
    assert stop_strings(template) == MARGIN_STOP_STRINGS
    assert stop_strings("{text}") == stop_strings(None) == ("[DONE]",)
    assert program_of("\n    return x\nx", p, "{header}") == "def f(x, y=2):\n    return x"


def test_other_completions_are_searched_for_the_function_that_the_tests_call():
    text = (
        "```\ndef g(x):\n    return x\n```\nNo:\n```\ndef f(x):\n    return x\n```\n```\nf(1)\n```"
    )
    assert program_of(text, problem()) == "def f(x):\n    return x\n"
    assert program_of(text, problem(), "{text}") == "def f(x):\n    return x\n"
