r"""MBPP as it is asked and answered: the prompts, the stops, and the program of a completion.

    three shots     tasks 2, 3 and 4 with solution and `\n[DONE]`, each with a blank line after it
    zero shots      the task alone, for a model that was fine-tuned on the train split
    a template      the user's own, for models that know another form

Shots and stop are those of the dataset's README and, to the byte, of the community harness
(lm-evaluation-harness, task mbpp). The harness runs a completion as it stands; here the program is
looked for first (`gem_ds.evaluate.extraction`), as chat models wrap it in words and fences.

A template with `{header}` makes a completion task of it: the prompt ends inside the program, which
begins at the header and goes on until a line stands at the margin again. HumanEval asks like that,
with the text as the function's docstring.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from functools import cache

from gem_ds.data.tasks.mbpp import Dataset, Problem, prompt_of, target_of
from gem_ds.evaluate.extraction import extract_program, parse

SHOT_IDS = (2, 3, 4)
STOP_STRINGS = ("[DONE]",)
#: Where a completion has left the function that it continues.
MARGIN_STOP_STRINGS = ("\ndef ", "\nclass ", "\nprint", "\nassert ", "\nif ", "\n#", "\n@", "\n```")

_PLACEHOLDER = re.compile(r"\{(text|tests|header)\}")
#: A closing bracket at the margin ends an expression, not the function.
_MARGIN = re.compile(r"\n(?=[^\s)\]}])")


def problems_of(dataset: Dataset, split: str, limit: int | None = None) -> dict[str, Problem]:
    """The problems of a split, or the first `limit` of them, by the ids that samples bear."""
    return {f"mbpp/{p.task_id}": p for p in dataset.split(split)[:limit]}


def prompts_of(
    problems: Mapping[str, Problem], dataset: Dataset, *, num_fewshot: int, template: str | None
) -> dict[str, str]:
    """The prompt of every problem, by task id.

    Args:
        problems: By task id.
        dataset: Where the shots come from.
        num_fewshot: 0 or 3; 0 with a template.
        template: The user's own form of prompt.

    Raises:
        ValueError: The dataset lacks a shot, or the template cannot be filled.
    """
    if template is not None:
        assert num_fewshot == 0, "a template says nothing about shots"
        check_template(template)
        return {name: template_prompt(problem, template) for name, problem in problems.items()}
    ids = SHOT_IDS[:num_fewshot]
    for task_id in ids:
        if task_id not in dataset.problems:
            raise ValueError(
                f"{dataset.source} lacks problem {task_id}, which the prompt of {num_fewshot} "
                "shots shows: pass the whole file, or --num_fewshot 0."
            )
    shots = [dataset.problems[task_id] for task_id in ids]
    return {name: few_shot_prompt(problem, shots) for name, problem in problems.items()}


def few_shot_prompt(problem: Problem, shots: list[Problem]) -> str:
    """The prompt of the protocol; `shots` are worked problems that go before, none for zero."""
    worked = [prompt_of(shot.text, shot.tests) + target_of(shot.code) for shot in shots]
    return "\n\n".join([*worked, prompt_of(problem.text, problem.tests)])


def check_template(template: str) -> None:
    """Raise ValueError if a template would ask the same of every problem."""
    if _PLACEHOLDER.search(template) is None:
        raise ValueError(
            "--prompt_template names none of {text}, {tests} and {header}, so that every problem "
            "would get the same prompt: put one of them in."
        )


def template_prompt(problem: Problem, template: str) -> str:
    """A template with `{text}`, `{tests}` and `{header}` replaced; other braces stand.

    Raises:
        ValueError: The template wants the header of a problem that has no single entry point.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] == "header":
            return header_of(problem)
        return problem.text if match[1] == "text" else "\n".join(problem.tests)

    return _PLACEHOLDER.sub(value, template)


def stop_strings(template: str | None) -> tuple[str, ...]:
    """What ends a completion: the protocol's mark, or leaving the function that a header began."""
    return MARGIN_STOP_STRINGS if _is_continued(template) else STOP_STRINGS


def program_of(completion: str, problem: Problem, template: str | None = None) -> str:
    """The program that a completion of a problem's prompt stands for; no completion fails."""
    if template is not None and _is_continued(template):
        begun = template_prompt(problem, template[template.index("{header}") :])
        return begun + _MARGIN.split(completion, maxsplit=1)[0]
    return extract_program(completion, entry_point_of(problem))


@cache
def entry_point_of(problem: Problem) -> str | None:
    """The function of the reference solution that the tests call, None unless there is just one."""
    solution, tests = parse(problem.code), parse("\n".join(problem.tests))
    if solution is None or tests is None:
        return None
    calls = [node.func for node in ast.walk(tests) if isinstance(node, ast.Call)]
    called = {function.id for function in calls if isinstance(function, ast.Name)}
    found = called & {node.name for node in solution.body if isinstance(node, ast.FunctionDef)}
    return found.pop() if len(found) == 1 else None


def header_of(problem: Problem) -> str:
    """`def name(arguments):` of the entry point, without annotations.

    Raises:
        ValueError: The problem has no single entry point.
    """
    name, solution = entry_point_of(problem), parse(problem.code)
    if name is None or solution is None:
        raise ValueError(
            f"The tests of problem {problem.task_id} do not call one function of its solution, so "
            "there is no {header} to prompt with: leave it out of --prompt_template."
        )
    functions = [node for node in solution.body if isinstance(node, ast.FunctionDef)]
    arguments = [node.args for node in functions if node.name == name][-1]
    for node in ast.walk(arguments):
        if isinstance(node, ast.arg):
            node.annotation = None
    return f"def {name}({ast.unparse(arguments)}):"


def _is_continued(template: str | None) -> bool:
    return template is not None and "{header}" in template
