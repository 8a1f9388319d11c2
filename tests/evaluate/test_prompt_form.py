"""Prompts as text and as messages: those of lm-evaluation-harness, recorded and by hand."""

import json
from pathlib import Path

import pytest

from gem_ds.data.chat import render_prompt
from gem_ds.data.tasks import Example
from gem_ds.data.tasks.mbpp import Dataset
from gem_ds.data.tasks.mbpp import Problem as MbppProblem
from gem_ds.evaluate import gsm8k, humaneval, mbpp, passk, score
from gem_ds.evaluate.prompt_form import DEFAULT_FORM, PromptForm, recorded_form
from tests.data.test_chat import CHATML, tokenizer_of
from tests.runs import rows_of
from tests.tiny_evaluation import refusal
from tests.tiny_model import make_tiny, write_jsonl

SYSTEM = "Be brief."
SHOT = MbppProblem(task_id=2, text="Add.", code="def f(): 1", tests=("assert f()",), setup="")
ASKED = MbppProblem(task_id=11, text="Sub.", code="def g(): 1", tests=("g()", "1"), setup="")
HUMANEVAL = humaneval.Problem(prompt="def h():\n", before="", entry_point="h", test="")

#: (question, worked problems with their answers, what stands between the two): by task.
TASKS = {
    "gsm8k": ("Question: b?\nAnswer:", [("Question: a?\nAnswer:", "1+1\n#### 2")], " "),
    "mbpp": (
        "You are an expert Python programmer, and here is your task: Sub. Your code should pass "
        "these tests:\n\ng()\n1\n[BEGIN]\n",
        [
            (
                "You are an expert Python programmer, and here is your task: Add. Your code "
                "should pass these tests:\n\nassert f()\n[BEGIN]\n",
                "def f(): 1\n[DONE]",
            )
        ],
        "",
    ),
    "humaneval": ("def h():\n", [], ""),
}
ASK = {
    "gsm8k": lambda form: gsm8k.prompts_of(
        gsm8k.Problems(
            test={"x": Example(prompt="Question: b?\nAnswer:", target=" #### 1")},
            train=[Example(prompt="Question: a?\nAnswer:", target=" 1+1\n#### 2")],
            sha256={},
        ),
        1,
        form,
    ),
    "mbpp": lambda form: {"x": mbpp.few_shot_prompt(ASKED, [SHOT], form)},
    "humaneval": lambda form: humaneval.HumanEval(
        problems={"x": HUMANEVAL}, data_sha256={}
    ).prompts(0, form),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("system", [None, SYSTEM])
def test_prompts_are_the_harness_s(task, system):
    question, shots, delimiter = TASKS[task]

    def asked(**flags):
        return ASK[task](PromptForm(system_instruction=system, **flags))["x"]

    def message(role, content):
        return {"role": role, "content": content}

    worked = "".join(q + delimiter + a + "\n\n" for q, a in shots)
    first = [message("system", system)] if system else []
    turns = [m for q, a in shots for m in (message("user", q), message("assistant", a))]
    assert asked() == (system or "") + worked + question
    single = asked(apply_chat_template=True, fewshot_as_multiturn=False)
    assert single == [*first, message("user", worked + question)]
    several = asked(apply_chat_template=True)
    assert several == [*first, *turns, message("user", question)]
    assert several == asked(apply_chat_template=True, fewshot_as_multiturn=True)


#: What the harness itself made of some rows; `about` says how.
RECORDED = json.loads(Path(__file__).with_name("harness_prompts.json").read_text("utf-8"))


def ask_recorded(folder, task, num_fewshot, form):
    """Our prompts on the recorded rows, in order."""
    splits = RECORDED["data"][task]
    if task == "gsm8k":
        for split, rows in splits.items():
            write_jsonl(folder / f"{split}.jsonl", rows)
        return [*gsm8k.prompts_of(gsm8k.load(str(folder)), num_fewshot, form).values()]
    name = {"mbpp": "mbpp.jsonl", "humaneval": "HumanEval.jsonl"}[task]
    write_jsonl(folder / name, [row for rows in splits.values() for row in rows])
    flags = [mbpp.MbppArguments()] if task == "mbpp" else []
    benchmark = passk.load(task, str(folder), None, flags)
    return [*benchmark.prompts(num_fewshot, form).values()]


@pytest.mark.parametrize("task", RECORDED["data"])
def test_prompts_are_those_that_the_harness_rendered(task, tmp_path):
    """To the byte: of several questions, with and without shots, a system's words, a template."""
    cases = [dict(case) for case in RECORDED["cases"] if case["task"] == task]
    assert len(cases) >= 6
    for case in cases:
        num_fewshot, expected = case.pop("num_fewshot"), case.pop("prompts")
        form = PromptForm(**{k: v for k, v in case.items() if k != "task"})
        asked = ask_recorded(tmp_path, task, num_fewshot, form)
        tokenizer = tokenizer_of(CHATML)
        rendered = [p if isinstance(p, str) else render_prompt(p, tokenizer, "") for p in asked]
        assert rendered == expected, case


def test_a_form_is_recorded_where_it_is_no_default():
    assert DEFAULT_FORM.recorded(3) == {}
    assert recorded_form({}, 5) == (DEFAULT_FORM, 5)
    form = PromptForm(apply_chat_template=True, system_instruction=SYSTEM)
    settings = json.loads(json.dumps(form.recorded(3)))
    assert recorded_form(settings, 5) == (form, 3)
    for changed in (3, {}, {"num_fewshot": "x"}, {"num_fewshot": 1, "odd": 1}):
        assert "no evaluation writes" in refusal(recorded_form, {"prompt_form": changed}, 5)
    assert "--apply_chat_template too" in refusal(PromptForm, fewshot_as_multiturn=True)


def test_what_is_no_message_is_refused_and_a_chat_s_answer_ends_by_itself():
    chat = PromptForm(apply_chat_template=True)
    flags = mbpp.MbppArguments(prompt_template="{text} {header}")
    dataset = Dataset(problems={11: ASKED}, source="s", sha256="")
    asked = mbpp.Mbpp(dataset=dataset, problems={"x": ASKED}, flags=flags)
    assert "no message of a chat" in refusal(asked.prompts, 0, chat)
    benchmark = humaneval.HumanEval(problems={"x": HUMANEVAL}, data_sha256={})
    assert benchmark.stop_strings(chat) == ()


def test_a_chat_model_is_asked_and_scored_again(tmp_path):
    rows = [{"question": f"{i}?", "answer": f"so\n#### {i}"} for i in range(3)]
    for split in ("train", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", rows)
    model = make_tiny(tmp_path / "tiny").model
    out, data = tmp_path / "out", ("--data_dir", str(tmp_path / "data"), "--disable_tqdm")
    asked = ("--num_fewshot", "1", "--apply_chat_template", "--system_prompt", SYSTEM)
    places = ("--model_name_or_path", str(model), "--output_dir", str(out))
    results = gsm8k.main([*places, *data, *asked, "--max_new_tokens", "2"])
    for sample in rows_of(out / "samples.jsonl"):
        roles = [message["role"] for message in sample["prompt"]]
        assert roles == ["system", "user", "assistant", "user"]
    told = {"apply_chat_template": True, "system_instruction": SYSTEM, "num_fewshot": 1}
    assert told.items() <= results["sampling"]["prompt_form"].items()
    del results["seconds"]
    assert score.main(["--task", "gsm8k", *data, str(out / "samples.jsonl")]) == results
