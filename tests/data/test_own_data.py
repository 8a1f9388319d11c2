"""The user's own data in the forms that lie around: read, and told how, or refused truly.

``cases/`` holds files as users have them, a fault or a habit in each.
"""

import bz2
import gzip
import json
import lzma
import re
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from gem_ds.data.encode import encode_texts
from gem_ds.data.tasks import ChatExample, ChoiceExample, Example, PlainText, load_task
from tests.data.test_chat import CHATML, tokenizer_of

CASES = Path(__file__).with_name("cases")
FIELDS = {"prompt_field": "question", "target_field": "answer"}
ROWS = [Example(prompt=f"Q{i}", target=f" {i}") for i in range(6)]
ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "Add\n\n### Input:\n1 2\n\n### Response:\n"
)


def load(path, **said):
    return load_task("jsonl", data_dir=str(path), **said)


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


#: By file: the flags, the last example (None: not looked at), how many, what the log says.
READ = {
    "alpaca.jsonl": ({}, Example(prompt=ALPACA, target="3"), 1, "Alpaca's form"),
    "array.json": (FIELDS, ROWS[-1], 6, r"\(a JSON array\)"),
    "array_pretty.json": (FIELDS, ROWS[-1], 6, r"\(a JSON array\)"),
    "bom_crlf.jsonl": (FIELDS, ROWS[-1], 6, "'question' is the prompt and 'answer' what is lea"),
    "double_bos.jsonl": ({}, None, 12, "prompts and completions"),
    "emoji_pair.jsonl": (FIELDS, Example(prompt="\U0001f600", target=" y"), 1, "JSON Lines"),
    "empty_answer.jsonl": (FIELDS, Example(prompt="Q5", target=""), 6, "JSON Lines"),
    "ends_user.jsonl": ({}, None, 1, "chat messages$"),
    "ls.jsonl": (FIELDS, None, 1, "JSON Lines"),
    "nan.jsonl": (FIELDS, Example(prompt="x", target=" y"), 1, "not used: 'score'"),
    "packed.jsonl.gz": (FIELDS, ROWS[-1], 6, r"\(JSON Lines, gzip\)"),
    "prompt_completion.jsonl": ({}, None, 1, "prompts and completions"),
    "roles.jsonl": ({}, None, 1, "chat messages"),
    "rows.parquet": (FIELDS, ROWS[-1], 6, r"\(Parquet\)"),
    "sharegpt.jsonl": ({}, None, 1, "ShareGPT's form"),
    "text.jsonl": ({}, PlainText(target="### Q: Hi\n### A: Yo"), 1, "the loss on all of each"),
    "utf16.jsonl": (FIELDS, ROWS[-1], 6, r"\(JSON Lines, UTF-16\)"),
    **{f"chat_{name}.jsonl": ({}, None, 1, "chat messages") for name in "abcde"},
}
REFUSED = {
    "cut.jsonl": (FIELDS, r"line 2: this is not JSON"),
    "hugeint.jsonl": (FIELDS, "line 1: this JSON has a number too long"),
    "nested.jsonl": ({}, "each one of 'data', and text, unlike the objects in 'data'"),
    "nul.jsonl": (FIELDS, "line 2: there are zero bytes in it"),
    "null.jsonl": (FIELDS, "line 4: the field 'answer' must be a string, not null"),
    "number.jsonl": (FIELDS, "line 1: the field 'answer' must be a string, not a number"),
    "surrogate.jsonl": (FIELDS, "line 1: the field 'question' holds half of a surrogate pair"),
}


def test_there_is_a_verdict_on_each_file():
    assert READ.keys() | REFUSED.keys() == {path.name for path in CASES.iterdir()}


@pytest.mark.parametrize("name", READ)
def test_a_file_trains_and_one_line_says_how_it_was_read(name):
    flags, last, count, words = READ[name]
    task = load(CASES / name, **flags)
    assert len(task.train) == count
    assert last is None or task.train[-1] == last
    assert re.search(words, task.notes[0])
    assert task.notes[0].startswith(f"Read {count} training examples from {CASES / name} (")
    assert not any("\n" in note for note in task.notes)
    dataset = encode_texts(task.train, tokenizer_of(CHATML), 4096)
    assert dataset.num_items(range(len(dataset))) >= len(dataset) == count


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_at_fault_is_refused_in_a_sentence_that_is_true_of_it(name):
    flags, words = REFUSED[name]
    with pytest.raises(ValueError, match=rf"{name}.*{words}") as error:
        load(CASES / name, **flags)
    assert "\n" not in str(error.value)


YO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
SEVERAL = "Conversations of which several answers are learnt (--train_on all): 1"
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("row", "turns", "note"),
    [
        (
            {"messages": [*YO, YO[0]]},
            [YO[1]],
            "Conversations that end without an answer, cut behind the last one: 1",
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
            [YO[1]],
            "Messages of the role 'gpt', read as assistant: 1",
        ),
        ({"conversations": YO}, [YO[1]], None),
        ({"prompt": YO[:1], "completion": YO[1:]}, [YO[1]], None),
        (
            {"messages": [YO[0], YO[1] | {"content": [{"type": "text", "text": "Yo"}]}]},
            YO[1:],
            None,
        ),
        ({"messages": [YO[0], CALLED]}, [CALLED], None),
        (
            {
                "messages": [
                    YO[0],
                    CALLED | {"tool_calls": [{"name": "f", "arguments": '{"a": 1}'}]},
                ]
            },
            [CALLED],
            None,
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
                ]
            },
            [CALLED],
            "Messages of the role 'function_call', read as assistant: 1",
        ),
        (
            {"messages": [*YO, *YO]},
            [YO[1], *YO],
            SEVERAL,
        ),
    ],
)
def test_conversations_of_all_kinds_become_messages_and_turns(tmp_path, row, turns, note):
    task = load(write(tmp_path, "x.jsonl", row))
    (example,) = task.train
    assert isinstance(example, ChatExample)
    assert example.turns == turns
    assert example.prompt == YO[:1]
    assert note is None or any(line.startswith(note) for line in task.notes)


def test_the_last_answer_alone_is_learnt_where_it_is_asked_for(tmp_path):
    file = write(tmp_path, "x.jsonl", {"messages": [*YO, *YO], "tools": json.dumps([CALL])})
    (last,) = load(file, train_on="last").train
    assert (last.prompt, last.turns, last.tools) == ([*YO, YO[0]], [YO[1]], [CALL])
    greeting = write(tmp_path, "y.jsonl", {"messages": [YO[1], *YO]})
    assert load(greeting).train[0].prompt == [YO[1], YO[0]], "nothing precedes the first answer"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [YO[0], YO[1] | {"content": [{"type": "image"}]}]}, r"no text \(image\)"),
        (
            {"messages": [YO[0], CALLED | {"tool_calls": [{"id": 3}]}]},
            "without the name of its fun",
        ),
        ({"messages": YO, "tools": "f(x)"}, "'tools' must be a list of objects"),
        ({"prompt": YO[:1], "completion": "Yo"}, "'completion' must be a list, not a string"),
        ({"conversations": [{"from": "gpt"}]}, "must be an object with 'role' and 'content'"),
        ({"instruction": "a", "output": None}, "'output' must be a string, not null"),
        ({"text": "a", "label": 0.5}, "must be a name or a whole number, not 0.5"),
        ({"text": "a", "label": "b"}, "all labels are 'b'"),
    ],
)
def test_a_bad_row_of_a_known_form_is_named(tmp_path, row, words):
    with pytest.raises(ValueError, match=rf"x\.jsonl, line 1: .*{words}"):
        load(write(tmp_path, "x.jsonl", row))


TEXTS = [{"text": "a"}, {"text": "b"}]
LINES = "\n".join(map(json.dumps, TEXTS))


@pytest.mark.parametrize(
    ("name", "content", "form"),
    [
        ("x.json", {"data": TEXTS}, "a JSON array, 'data'"),
        ("x.json", "\n".join(json.dumps(row, indent=1) for row in TEXTS), "JSON objects"),
        ("x.json", json.dumps(TEXTS, indent=2).encode("utf-16-le"), "a JSON array, UTF-16-LE"),
        ("x.jsonl", LINES.encode("utf-32"), "JSON Lines, UTF-32"),
        ("x.jsonl.bz2", bz2.compress(LINES.encode()), "JSON Lines, bzip2"),
        ("x.txt", lzma.compress(LINES.encode("utf-16")), "JSON Lines, UTF-16, xz"),
        ("x.csv", '\ufefftext,id\na,"1,5"\nb,2', "a table"),
        ("x.tsv", "id\ttext\n1\ta\n2\tb\n", "a table"),
        ("x.tsv.bz2", bz2.compress(b"text\tid\na\t1\nb\t2"), "a table, bzip2"),
        ("x.csv.xz", lzma.compress(b"text,id\na,1\nb,2"), "a table, xz"),
    ],
)
def test_texts_are_read_from_every_container(tmp_path, name, content, form):
    task = load(write(tmp_path, name, content))
    assert task.train == [PlainText(target="a"), PlainText(target="b")]
    assert f"({form}): plain texts" in task.notes[0]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.json", b"PK\x03\x04..", "is a zip archive or a spreadsheet"),
        ("x.parquet", b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        ("x.parquet", b"PAR1....", "is no whole Parquet file"),
        ("x.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-9], "is cut or damaged"),
        ("x.jsonl", "Once upon a time\n", "is no JSON, as it begins with 'Once upon a time'"),
        ("x.jsonl", LINES.encode("utf-16")[:-1], "is no whole UTF-16 text"),
        ("x.json", '[{"text": "a"},\n {"text" "b"}]', r"line 2: this is not JSON"),
        ("x.json", '[{"text": "a"}, 3]', "entry 2: it must be an object, not a number"),
        ("x.json", "[]", "is empty"),
        ("x.csv", "text,id\na\n", "row 1: it has not as many cells as the first line"),
        ("x.csv", 'text,id\na,"1\n', "is no whole table"),
        ("x.csv", b"text\n\xff\n", "line 2: byte 1 of the line is not UTF-8"),
        ("x.csv", "text\n", "is empty"),
        ("x.jsonl", "\ufeff \n", "is empty"),
    ],
)
def test_what_cannot_be_read_is_named_by_the_form_that_it_has(tmp_path, name, content, words):
    with pytest.raises(ValueError, match=rf"x\.[a-z.0-9]+,? {words}") as error:
        load(write(tmp_path, name, content))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "train", "test"),
    [
        (["a.jsonl", "b.json", "readme.md"], ["a.jsonl", "b.json"], []),
        (["train-2.jsonl", "train-1.jsonl", "other.jsonl"], ["train-1.jsonl", "train-2.jsonl"], []),
        (["train.jsonl", "train-1.jsonl", "test.jsonl"], ["train.jsonl"], ["test.jsonl"]),
        (["data.jsonl", "validation.jsonl", "dev.jsonl"], ["data.jsonl"], ["validation.jsonl"]),
        (["my_train.json", "my_test.json", "val.json"], ["my_train.json"], ["my_test.json"]),
    ],
)
def test_the_files_of_a_folder_go_by_their_names(tmp_path, names, train, test):
    for name in names:
        write(tmp_path, name, {"text": name})
    task = load(tmp_path)
    read = [[example.target for example in part] for part in (task.train, task.test)]
    assert read == [train, test]
    assert all(name in task.notes[0] for name in (*train, *test))


def test_labels_are_those_of_the_training_data_in_their_order(tmp_path):
    for name, label in (("train", 10), ("train", 9), ("train", 9), ("test", "10")):
        with (tmp_path / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps({"text": "t", "label": label, "text_pair": "u"}) + "\n")
    task = load(tmp_path)
    assert (task.kind, task.labels) == ("labels", ("9", "10"))
    first = ChoiceExample(
        prompt="t\nu\nLabel:",
        target=" 10",
        candidates=(" 9", " 10"),
        answer=1,
        pairs=(("t", "u"),),
    )
    assert task.train[0] == task.test[0] == first
    write(tmp_path, "test.jsonl", {"text": "t", "label": 8})
    with pytest.raises(ValueError, match="label '8' is none of the training data's: 9, 10"):
        load(tmp_path)


def test_a_data_set_is_read_by_its_name_in_the_same_forms(tmp_path, monkeypatch):
    """A folder that `datasets` loads is read as the Hub's are: splits, nulls of Arrow, labels."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    rows = [{"messages": YO}, {"messages": [YO[0], CALLED | {"content": "x"}]}]
    for name in ("train", "validation"):
        write(folder, f"{name}.jsonl", "\n".join(map(json.dumps, rows)))
    task = load_task("jsonl", dataset_name=str(folder))
    assert [example.turns for example in task.train] == [YO[1:], [CALLED | {"content": "x"}]]
    assert len(task.test) == 2
    assert f"{folder} (split train) and 2 held-out ones from {folder} (split v" in task.notes[0]
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    labelled = datasets.Dataset.from_dict(
        {"text": ["a", "b"], "label": [1, 0]}, features=datasets.Features(features)
    )
    labelled.to_parquet(tmp_path / "labelled.parquet")
    assert load(tmp_path / "labelled.parquet").labels == ("no", "yes")
    calls = [CALL | {"function": {"name": "f", "arguments": {name: 1}}} for name in "ab"]
    rows = [{"messages": [YO[0], CALLED | {"tool_calls": [call]}]} for call in calls]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "calls.parquet")
    turns = [example.turns for example in load(tmp_path / "calls.parquet").train]
    assert [turn["tool_calls"] for (turn,) in turns] == [[call] for call in calls]
    with pytest.raises(ValueError, match=r"--dataset_name .*none cannot be loaded: "):
        load_task("jsonl", dataset_name=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="Pass --dataset_name or --data_dir, not both"):
        load(tmp_path, dataset_name="x/y")
