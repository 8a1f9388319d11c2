"""GSM8K, SQuAD and the user's own files: read as documented, every bad one refused by line."""

import dataclasses
import json
import re

import pytest

from gem_ds.data.tasks import (
    AnswerExample,
    ChatExample,
    Example,
    TaskData,
    hub_dataset,
    load_task,
    task_names,
)
from gem_ds.data.tasks.lines import read_jsonl
from gem_ds.train.config import DataArguments
from tests.tiny_tasks import put_on_hub


def write_lines(path, *lines):
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
    return path


def load_lines(tmp_path, *lines, **fields):
    return load_task("jsonl", data_dir=str(write_lines(tmp_path / "x.jsonl", *lines)), **fields)


def test_gsm8k_folder_has_every_example_in_the_published_form(gem_data_dir):
    data = load_task("gsm8k", data_dir=str(gem_data_dir / "gsm8k"))
    assert (len(data.train), len(data.test)) == (7473, 1319)
    asked, answered = data.train[0].prompt, data.train[0].target
    assert asked.startswith("Question: Natalia sold clips to 48 of her friends in April, and then ")
    assert asked.endswith(" How many clips did Natalia sell altogether in April and May?\nAnswer:")
    assert answered == (
        " Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
        "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72"
    )
    targets = [example.target for example in data.train + data.test]
    assert all("\n#### " in target and target[1] != " " for target in targets)


def test_gsm8k_without_a_folder_asks_the_hub_for_the_main_set(monkeypatch):
    rows = {part: [{"question": part, "answer": "a"}] for part in ("train", "test")}
    put_on_hub(monkeypatch, "openai/gsm8k", "main", **rows)
    data = load_task("gsm8k", data_dir=None)
    expected = [Example(prompt=f"Question: {part}\nAnswer:", target=" a") for part in rows]
    assert (data.train, data.test) == (expected[:1], expected[1:])


def test_tasks_that_cannot_be_loaded_are_refused(tmp_path):
    for option in ("train_file", "test_file", "prompt_field", "target_field"):
        for task in ("gsm8k", "mbpp", "rte", "squad"):
            with pytest.raises(ValueError, match=f"--{option} has no meaning for --task {task}"):
                load_task(task, data_dir="anywhere", **{option: "x"})
    write_lines(tmp_path / "train.jsonl", '{"question": "q", "answer": "a"}')
    with pytest.raises(ValueError, match=r"There is no file .*test\.jsonl"):
        load_task("gsm8k", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"no task 'gsm9k': pass one of boolq, .* gsm8k, jsonl, "):
        load_task("gsm9k", data_dir=None)


def test_every_task_stands_in_the_help_and_says_where_the_hub_has_it():
    (field,) = (f for f in dataclasses.fields(DataArguments) if f.name == "task")
    for name in task_names():
        assert f" {name}" in field.metadata["help"]
        assert name == "jsonl" or re.fullmatch(r"[a-z-]+/[a-z0-9_]+", hub_dataset(name))
    assert (hub_dataset("jsonl"), hub_dataset("rte")) == (None, "nyu-mll/glue")


ANSWERS = ["Denver Broncos", "The Broncos", "Denver Broncos"]
CONTEXT = "The Denver Broncos won."
EXAMPLE = AnswerExample(
    prompt="Title: Super Bowl 50\n\nThe Denver Broncos won.\n\nQuestion: Who won?\nAnswer:",
    target=" Denver Broncos",
    answers=("Denver Broncos", "The Broncos"),
    passage=CONTEXT,
)


def document(*answers):
    question = {"id": "a1", "question": "Who won?", "answers": [{"text": a} for a in answers]}
    paragraph = {"context": CONTEXT, "qas": [question]}
    return json.dumps({"data": [{"title": "Super_Bowl_50", "paragraphs": [paragraph]}]})


def test_squad_is_the_same_from_files_and_from_the_hub(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"There is no file .*train-v1\.1\.json: check the path"):
        load_task("squad", data_dir=str(tmp_path))
    (tmp_path / "train-v1.1.json").write_text(document(*ANSWERS))
    assert load_task("squad", data_dir=str(tmp_path)) == TaskData([EXAMPLE], [], "text")
    (tmp_path / "dev-v1.1.json").write_text(document(*ANSWERS))
    assert load_task("squad", data_dir=str(tmp_path)).test == [EXAMPLE]

    row = {"id": "a1", "title": "Super_Bowl_50", "context": CONTEXT, "question": "Who won?"}
    row["answers"] = {"text": ANSWERS, "answer_start": [4, 0, 4]}
    put_on_hub(monkeypatch, "rajpurkar/squad", train=[row], validation=[row, row])
    assert load_task("squad") == TaskData(train=[EXAMPLE], test=[EXAMPLE, EXAMPLE])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"data": [\n}', r"line 2: this is not JSON \(.*column 1\)"),
        (b"\xff\xfe\xfa", r"is not UTF-8"),
        ("[]", r"must hold an object with a list of articles, 'data'"),
        ('{"data": [{}, 3]}', r"article 2: an article must be an object"),
        (document(*ANSWERS).replace("title", "name"), r"article 1: there is no field 'title'"),
        ('{"data": [{"title": "t"}]}', r"article 1: the field 'paragraphs' must be a list of obj"),
        (document(), r"article 1: the question 'Who won\?' has no answer"),
        (document(3), r"article 1: the field 'text' must be a string"),
    ],
)
def test_a_bad_file_of_squad_is_named(tmp_path, content, message):
    write_lines(tmp_path / "train-v1.1.json", content)
    with pytest.raises(ValueError, match=rf"train-v1\.1\.json.*{message}"):
        load_task("squad", data_dir=str(tmp_path))


FIELDS = {"prompt_field": "p", "target_field": "t"}


def test_fields_are_taken_exactly_as_they_stand(tmp_path):
    """Splitting at U+2028 or U+0085, which JSON strings may hold, would break a valid line."""
    example = Example(prompt=" a\u2028b\u2029c\u0085d\n", target="t ")
    fields = {"p": example.prompt, "t": example.target, "more": 1}
    line = json.dumps(fields, ensure_ascii=False)
    data = load_lines(tmp_path, f"\ufeff{line}\r", "\r", "  ", f"{line}\r", "", **FIELDS)
    assert (data.train, data.test) == ([example] * 2, [])
    assert [line.number for line in read_jsonl(tmp_path / "x.jsonl")] == [1, 4]


def test_a_chat_line_ends_in_its_target(tmp_path):
    turns = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b")]
    messages = [{"role": role, "content": content, "id": 3} for role, content in turns]
    data = load_lines(tmp_path, json.dumps({"messages": messages}), train_on="last")
    assert data.train == [ChatExample(prompt=messages[:-1], turns=messages[-1:])]
    data = load_lines(tmp_path, '{"messages": 3, "p": "x", "t": "y"}', **FIELDS)
    assert data.train == [Example(prompt="x", target="y")], "named fields win"


def test_a_folder_gives_train_and_test(tmp_path):
    write_lines(tmp_path / "train.jsonl", '{"p": "1", "t": ""}')
    assert load_task("jsonl", data_dir=str(tmp_path), **FIELDS).test == []
    for i, name in ((2, "test"), (3, "other")):
        write_lines(tmp_path / f"{name}.jsonl", json.dumps({"p": str(i), "t": ""}))

    def prompts(**places):
        data = load_task("jsonl", **{key: str(value) for key, value in places.items()}, **FIELDS)
        return [e.prompt for e in data.train], [e.prompt for e in data.test]

    other, test = tmp_path / "other.jsonl", tmp_path / "test.jsonl"
    assert prompts(data_dir=tmp_path) == (["1"], ["2"])
    assert prompts(data_dir=tmp_path, train_file="other.jsonl") == (["3"], ["2"])
    assert prompts(data_dir=tmp_path, test_file="other.jsonl") == (["1"], ["3"])
    assert prompts(data_dir=other) == prompts(train_file=other) == (["3"], [])
    assert prompts(data_dir=other, test_file=test) == (["3"], ["2"])
    assert prompts(train_file=other, test_file=test) == (["3"], ["2"])
    with pytest.raises(ValueError, match=r"There is no file .*none\.jsonl"):
        prompts(data_dir=tmp_path, test_file="none.jsonl")
    with pytest.raises(ValueError, match="pass one of them"):
        prompts(data_dir=other, train_file=other)


def chat(*messages):
    return json.dumps({"messages": messages})


ASKED, ANSWERED = ({"role": role, "content": "x"} for role in ("user", "assistant"))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"p": "x", "t": "y"', r"not JSON \(.*column 20"),
        ("[1]", "must be a JSON object, not a list"),
        ('{"p": "x", "q": "y"}', r"no field 't'; the line has 'p', 'q'"),
        ("{}", r"no field 'p'; the line has no fields"),
        ('{"p": null, "t": "y"}', "'p' must be a string, not null"),
        ('{"p": "x", "t": 1.5}', "'t' must be a string, not a number"),
        ('{"p": "x", "t": "ab\\ud83d"}', "'t' holds half of a surrogate pair at character 3"),
        (b'{"p": "\xff", "t": "y"}', "byte 8 of the line is not UTF-8"),
        ('{"a": "x", "b": "y"}', r"pass --prompt_field and --target_field, each one of 'a', 'b'"),
        ('{"messages": "x"}', "'messages' must be a list, not a string"),
        (chat(ANSWERED), "at least one message before it"),
        (chat(ASKED, ASKED), "must end with the assistant"),
        (chat(ASKED, 3), "message 2 must be an object"),
        (chat({"role": "user"}), "message 1 must be an object with 'role' and 'content'"),
        (chat({"role": "user", "content": None}), "'content' of message 1 .* not null"),
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, message):
    is_chat = any(word in message for word in ("message", "assistant", "--prompt_field"))
    good, fields = (chat(ASKED, ANSWERED), {}) if is_chat else ('{"p": "x", "t": "y"}', FIELDS)
    with pytest.raises(ValueError, match=rf"x\.jsonl, line 3: .*{message}"):
        load_lines(tmp_path, good, "", bad, good, **fields)


def test_a_file_with_examples_and_both_fields_must_be_given(tmp_path):
    for content in (b"", b"\n \r\n", b"\xef\xbb\xbf"):
        with pytest.raises(ValueError, match=r"x\.jsonl is empty"):
            load_lines(tmp_path, content)
    with pytest.raises(ValueError, match="needs --data_dir"):
        load_task("jsonl", data_dir=None)
    (tmp_path / "x.jsonl").unlink()
    with pytest.raises(ValueError, match="both --prompt_field and --target_field"):
        load_task("jsonl", data_dir=str(tmp_path), prompt_field="p")
    with pytest.raises(ValueError, match=r"There is no file .*train\.jsonl"):
        load_task("jsonl", data_dir=str(tmp_path))
