"""SQuAD: the official form and the Hub's become the same examples; bad files are refused."""

import json

import datasets
import pytest

from gem_ds.data.tasks import AnswerExample, TaskData, load_task

ANSWERS = ["Denver Broncos", "The Broncos", "Denver Broncos"]
CONTEXT = "The Denver Broncos won."


def document(answers):
    question = {"id": "a1", "question": "Who won?", "answers": answers}
    paragraph = {"context": CONTEXT, "qas": [question]}
    return {"data": [{"title": "Super_Bowl_50", "paragraphs": [paragraph]}], "version": "1.1"}


DOCUMENT = document([{"answer_start": 4, "text": text} for text in ANSWERS])
EXAMPLE = AnswerExample(
    prompt="Title: Super Bowl 50\n\nThe Denver Broncos won.\n\nQuestion: Who won?\nAnswer:",
    target=" Denver Broncos",
    answers=("Denver Broncos", "The Broncos"),
    passage=CONTEXT,
)


def test_files_and_the_hub_give_the_same_examples(tmp_path, monkeypatch):
    (tmp_path / "train-v1.1.json").write_text(json.dumps(DOCUMENT))
    assert load_task("squad", data_dir=str(tmp_path)) == TaskData(train=[EXAMPLE], test=[])
    (tmp_path / "dev-v1.1.json").write_text(json.dumps(DOCUMENT))
    data = load_task("squad", data_dir=str(tmp_path))
    assert (data.test, data.kind) == ([EXAMPLE], "text")

    row = {"id": "a1", "title": "Super_Bowl_50", "context": CONTEXT, "question": "Who won?"}
    row["answers"] = {"text": ANSWERS, "answer_start": [4, 0, 4]}

    def load_dataset(*names):
        assert names == ("rajpurkar/squad",)
        return {"train": [row], "validation": [row, row]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_task("squad") == TaskData(train=[EXAMPLE], test=[EXAMPLE, EXAMPLE])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"data": [\n}', r"line 2: this is not JSON \(.*column 1\)"),
        (b"\xff\xfe\xfa", r"is not UTF-8"),
        ("[]", r"must hold an object with a list of articles, 'data'"),
        ('{"data": [{}, 3]}', r"article 2: an article must be an object"),
        (json.dumps(DOCUMENT).replace("title", "name"), r"article 1: there is no field 'title'"),
        ('{"data": [{"title": "t"}]}', r"article 1: the field 'paragraphs' must be a list of obj"),
        (json.dumps(document([])), r"article 1: the question 'Who won\?' has no answer"),
        (json.dumps(document([{"text": 3}])), r"article 1: the field 'text' must be a string"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "train-v1.1.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"train-v1\.1\.json.*{message}"):
        load_task("squad", data_dir=str(tmp_path))


def test_a_folder_without_the_training_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"There is no file .*train-v1\.1\.json: check the path"):
        load_task("squad", data_dir=str(tmp_path))
