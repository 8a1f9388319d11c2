"""GLUE and SuperGLUE: files and the Hub give the examples of catalog.toml, or are refused."""

import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from gem_ds.data.tasks import NumberExample, TaskData, load_task
from gem_ds.train.config import DataArguments
from gem_ds.train.examples import load_examples
from tests.tiny_tasks import choice, put_on_hub

WRITTEN = tomllib.loads(Path(__file__).with_name("catalog.toml").read_text(encoding="utf-8"))
PUBLISHED = WRITTEN.pop("published")
#: And what no file of UTF-8 can hold.
BAD = [*WRITTEN.pop("bad"), ("rte", "A dog", "a\udcff", "line 2: byte 4 of the line is not UTF-8")]
WRITTEN["mnli_mismatched"] = WRITTEN["mnli"] | {"configuration": "mnli"}
JSONL = ("boolq", "cb", "copa", "multirc", "record", "wsc")


def example_of(written):
    fields = {key: tuple(v) if isinstance(v, list) else v for key, v in written.items()}
    fields["pairs"] = tuple((*pair, None)[:2] for pair in written["pairs"])
    return NumberExample(**fields) if "value" in fields else choice(**fields)


def text_of(task):
    return "\n".join(WRITTEN[task]["lines"])


def write(folder, task, text, name=None):
    """A file of the task, its training file if none is named; "|" stands for a tab in tables."""
    text = text if task in JSONL else text.replace("|", "\t")
    name = name or ("train.jsonl" if task in JSONL else "train.tsv")
    (folder / name).write_bytes(f"{text}\n".encode("utf-8", "surrogateescape"))


def train_of(folder, task, text):
    write(folder, task, text)
    return load_task(task, data_dir=str(folder)).train


@pytest.mark.parametrize("task", WRITTEN)
def test_files_and_the_hub_give_the_same_examples(tmp_path, monkeypatch, task):
    case = WRITTEN[task]
    examples = [example_of(written) for written in case["examples"]]
    facts = {"kind": case.get("kind", "labels"), "labels": tuple(case.get("labels", ()))}
    write(tmp_path, task, text_of(task))
    assert load_task(task, data_dir=str(tmp_path)) == TaskData(examples, [], **facts)
    of_two = {"mnli": "_matched", "mnli_mismatched": "_mismatched"}.get(task, "")
    write(tmp_path, task, text_of(task), "val.jsonl" if task in JSONL else f"dev{of_two}.tsv")
    assert load_task(task, data_dir=str(tmp_path)) == TaskData(examples, examples, **facts)

    address = "aps/super_glue" if task in JSONL else "nyu-mll/glue"
    splits = {"train": case["hub"] * 2, f"validation{of_two}": case["hub"]}
    put_on_hub(monkeypatch, address, case.get("configuration", task), **splits)
    assert load_task(task) == TaskData(examples * 2, examples, **facts)


@pytest.mark.parametrize(("task", "old", "new", "message"), BAD)
def test_a_bad_line_is_named(tmp_path, task, old, new, message):
    text = text_of(task).replace(old, new) if old else new
    with pytest.raises(ValueError, match=rf"train\.(tsv|jsonl)[ ,].*{message}"):
        train_of(tmp_path, task, text)


def test_a_missing_file_and_a_secret_label_of_the_hub_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no file .*train\.tsv or .*train\.jsonl: check the path"):
        load_task("rte", data_dir=str(tmp_path))
    row = WRITTEN["rte"]["hub"][0] | {"label": -1}
    put_on_hub(monkeypatch, "nyu-mll/glue", "rte", train=[row])
    with pytest.raises(ValueError, match=r"glue/rte/train, row 1: the label is -1; .* of 0, 1"):
        load_task("rte")


def test_a_row_of_a_table_is_what_stands_between_newlines(tmp_path):
    """Rows that hold U+2028, U+0085 or a lone quotation mark stay one row each; qqp's broken go."""
    odd = 'a\u2028b\u0085c "d'
    text = text_of("rte").replace("\n", "\r\n").replace("A dog ran.", odd) + "\r"
    (example,) = train_of(tmp_path, "rte", text)
    assert example.pairs == ((odd, "It ran."),)
    text = text_of("qqp")
    assert len(train_of(tmp_path, "qqp", f"{text}\n5|11|12|How old\n{text.splitlines()[1]}")) == 2


def counts(examples):
    return Counter(example.target for example in examples)


def test_tables_are_read_whole(gem_data_dir):
    """454 rows of RTE hold quotation marks: one that is taken for a quote swallows its rows."""
    rte = load_task("rte", data_dir=str(gem_data_dir / "glue" / "RTE"))
    assert counts(rte.train) == {" True": 1249, " False": 1241}
    assert counts(rte.test) == {" True": 146, " False": 131}
    texts = [f"{w}eapons of Mass Destruction Found in Iraq" for w in ("No W", "W")]
    assert rte.train[0].pairs == ((f"{texts[0]} Yet.", f"{texts[1]}."),)
    cola = load_task("cola", data_dir=str(gem_data_dir / "glue" / "CoLA"))
    assert counts(cola.train) == {" no": 2162, " yes": 5088}
    assert counts(cola.test) == {" no": 322, " yes": 721}  # not those of val.tsv, nobody's split
    assert cola.test[0].pairs == (("The sailors rode the breeze clear of the rocks.", None),)


@pytest.mark.parametrize("task", PUBLISHED)
def test_every_published_example_is_read(gem_data_dir, task):
    """And, where the template is all there is to it, one reads as it is written out."""
    facts = PUBLISHED[task]
    data = load_task(task, data_dir=str(gem_data_dir / "superglue" / facts["folder"]))
    assert data.test == []  # these folders have no val.jsonl
    is_labelled = task not in ("copa", "record")
    assert data.kind == ("labels" if is_labelled else "choices")
    for example in data.train:
        assert example.target == example.candidates[example.answer]
        assert len(example.pairs) == (1 if is_labelled else len(example.candidates))
        assert not example.prompt[-1].isspace()
        assert all(candidate[0] == " " != candidate[1] for candidate in example.candidates)
    if "counts" in facts:
        answers = Counter(example.answer for example in data.train)
        assert answers == Counter(dict(enumerate(facts["counts"])))
    if "labels" in facts:
        assert data.labels == tuple(facts["labels"])
    if "num_groups" in facts:
        assert len({example.group for example in data.train}) == facts["num_groups"]
    if "example" in facts:
        assert data.train[facts["number"]] == example_of(facts["example"])


def load(task, folder, **more):
    return load_examples(DataArguments(task=task, data_dir=str(folder), **more))


def test_examples_of_a_text_stay_on_one_side_of_the_development_split(tmp_path):
    """A text that is trained on and judged by would count memory as skill."""
    row = text_of("boolq")
    asked = [row.replace("it", f"it {i}").replace("It is", f"It is {i % 4} now") for i in range(12)]
    waves = [text_of("wsc").replace("waved", f"waved {i} times") for i in range(8)]
    waves += [row.replace('1_index": 2', '1_index": 0').replace('Eve"', 'Ann"') for row in waves]
    for task, rows, dev_examples, sizes in (("boolq", asked, 4, [2, 2]), ("wsc", waves, 6, [5, 3])):
        write(tmp_path, task, "\n".join(rows))
        data = load(task, tmp_path, dev_examples=dev_examples, evaluate_on="dev")
        train, test = (
            {re.search("[0-9]", example.prompt)[0] for example in part}
            for part in (data.train, data.test)
        )
        assert (len(data.test), [len(train), len(test)]) == (6, sizes)
        assert not train & test


def test_a_missing_validation_file_is_told_before_training_where_it_is_needed(tmp_path):
    write(tmp_path, "boolq", text_of("boolq"))
    assert load("boolq", tmp_path).test == []
    with pytest.raises(ValueError, match=rf"test: {tmp_path} holds no held-out examples of --task"):
        load("boolq", tmp_path, evaluate_on="test")
