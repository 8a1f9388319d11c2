"""Tasks: real GSM8K reads as its documentation says, and every bad file is refused by line."""

import dataclasses
import json
import re

import datasets
import pytest

from gem_ds.data.tasks import Example, hub_dataset, load_task, task_names
from gem_ds.data.tasks.lines import read_jsonl
from gem_ds.train.config import DataArguments


def write_lines(path, *lines):
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
    return path


def load_lines(tmp_path, *lines, **fields):
    return load_task("jsonl", data_dir=str(write_lines(tmp_path / "x.jsonl", *lines)), **fields)


FIELDS = {"prompt_field": "p", "target_field": "t"}


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
    for example in data.train + data.test:
        assert "\n#### " in example.target
        assert example.target[1] != " "


def test_gsm8k_without_a_folder_asks_the_hub_for_the_main_set(monkeypatch):
    def load_dataset(*names):
        assert names == ("openai/gsm8k", "main")
        return {part: [{"question": part, "answer": "a"}] for part in ("train", "test")}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_task("gsm8k", data_dir=None)
    for part in ("train", "test"):
        (example,) = getattr(data, part)
        assert example == Example(prompt=f"Question: {part}\nAnswer:", target=" a")


def test_tasks_that_cannot_be_loaded_are_refused(tmp_path):
    for option in ("train_file", "test_file", "prompt_field", "target_field"):
        with pytest.raises(ValueError, match=f"--{option} has no meaning for --task gsm8k"):
            load_task("gsm8k", data_dir="anywhere", **{option: "x"})
    write_lines(tmp_path / "train.jsonl", '{"question": "q", "answer": "a"}')
    with pytest.raises(ValueError, match=r"There is no file .*test\.jsonl"):
        load_task("gsm8k", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"no task 'gsm9k': pass one of boolq, .* gsm8k, jsonl, "):
        load_task("gsm9k", data_dir=None)


def test_every_task_of_the_help_is_known_and_says_where_the_hub_has_it():
    (field,) = (f for f in dataclasses.fields(DataArguments) if f.name == "task")
    words = re.findall(r"[a-z0-9_]+", field.metadata["help"])
    for name in task_names():
        assert name in words
        assert name == "jsonl" or re.fullmatch(r"[a-z-]+/[a-z0-9_]+", hub_dataset(name))
    assert hub_dataset("jsonl") is None
    assert hub_dataset("rte") == "nyu-mll/glue"


def test_fields_are_taken_exactly_as_they_stand(tmp_path):
    data = load_lines(tmp_path, '{"p": " a\\n", "t": "b ", "more": 1}', **FIELDS)
    assert data.train == [Example(prompt=" a\n", target="b ")]
    assert data.test == []


def test_line_separators_are_newlines_only(tmp_path):
    """Splitting at U+2028 or U+0085, which JSON strings may hold, would break a valid line."""
    text = "a\u2028b\u2029c\u0085d"
    line = json.dumps({"p": text, "t": "t"}, ensure_ascii=False)
    path = tmp_path / "x.jsonl"
    path.write_bytes(f"\ufeff{line}\r\n\r\n  \n{line}\r\n".encode())
    data = load_task("jsonl", data_dir=str(path), **FIELDS)
    assert data.train == [Example(prompt=text, target="t")] * 2
    assert [line.number for line in read_jsonl(path)] == [1, 4]


def test_a_chat_line_ends_in_its_target(tmp_path):
    turns = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b")]
    messages = [{"role": role, "content": content, "id": 3} for role, content in turns]
    data = load_lines(tmp_path, json.dumps({"messages": messages}))
    expected = [{"role": role, "content": content} for role, content in turns[:-1]]
    assert data.train == [Example(prompt=expected, target="b")]
    data = load_lines(tmp_path, '{"messages": 3, "p": "x", "t": "y"}', **FIELDS)
    assert data.train == [Example(prompt="x", target="y")], "named fields win"


def test_a_folder_gives_train_and_test(tmp_path):
    write_lines(tmp_path / "train.jsonl", '{"p": "1", "t": ""}')
    assert load_task("jsonl", data_dir=str(tmp_path), **FIELDS).test == []
    write_lines(tmp_path / "test.jsonl", '{"p": "2", "t": ""}')
    write_lines(tmp_path / "other.jsonl", '{"p": "3", "t": ""}')

    def prompts(**places):
        data = load_task("jsonl", **{key: str(value) for key, value in places.items()}, **FIELDS)
        return [e.prompt for e in data.train], [e.prompt for e in data.test]

    other = tmp_path / "other.jsonl"
    assert prompts(data_dir=tmp_path) == (["1"], ["2"])
    assert prompts(data_dir=tmp_path, train_file="other.jsonl") == (["3"], ["2"])
    assert prompts(data_dir=tmp_path, test_file="other.jsonl") == (["1"], ["3"])
    assert prompts(data_dir=other) == (["3"], [])
    assert prompts(data_dir=other, test_file=tmp_path / "test.jsonl") == (["3"], ["2"])
    assert prompts(train_file=other) == (["3"], [])
    assert prompts(train_file=other, test_file=tmp_path / "test.jsonl") == (["3"], ["2"])
    with pytest.raises(ValueError, match=r"There is no file .*none\.jsonl"):
        prompts(data_dir=tmp_path, test_file="none.jsonl")
    with pytest.raises(ValueError, match="pass one of them"):
        prompts(data_dir=other, train_file=other)


GOOD = '{"p": "x", "t": "y"}'


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
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, message):
    with pytest.raises(ValueError, match=rf"x\.jsonl, line 3: .*{message}"):
        load_lines(tmp_path, GOOD, "", bad, GOOD, **FIELDS)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"a": "x", "b": "y"}, r"pass --prompt_field and --target_field, each one of 'a', 'b'"),
        ({"messages": "x"}, "'messages' must be a list, not a string"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "at least one message before it"),
        ({"messages": [{"role": "user", "content": "x"}] * 2}, "must end with the assistant"),
        ({"messages": [{"role": "user", "content": "x"}, 3]}, "message 2 must be an object"),
        ({"messages": [{"role": "user"}]}, "message 1 must be an object with 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": None}]}, "'content' of message 1 .* not null"),
    ],
)
def test_a_bad_chat_line_is_named(tmp_path, bad, message):
    good = json.dumps({"messages": [{"role": r, "content": ""} for r in ("user", "assistant")]})
    with pytest.raises(ValueError, match=rf"x\.jsonl, line 2: .*{message}"):
        load_lines(tmp_path, good, json.dumps(bad))


def test_an_empty_file_is_refused(tmp_path):
    for content in (b"", b"\n \r\n", b"\xef\xbb\xbf"):
        (tmp_path / "x.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.jsonl is empty"):
            load_task("jsonl", data_dir=str(tmp_path / "x.jsonl"))


def test_the_place_and_both_fields_must_be_given(tmp_path):
    with pytest.raises(ValueError, match="needs --data_dir"):
        load_task("jsonl", data_dir=None)
    with pytest.raises(ValueError, match="both --prompt_field and --target_field"):
        load_task("jsonl", data_dir=str(tmp_path), prompt_field="p")
    with pytest.raises(ValueError, match=r"There is no file .*train\.jsonl"):
        load_task("jsonl", data_dir=str(tmp_path))
