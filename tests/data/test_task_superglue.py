"""SuperGLUE: the published examples read as they should, from files and from the Hub alike."""

import json
from collections import Counter

import datasets
import pytest

from gem_ds.data.tasks import TaskData, load_task
from gem_ds.train.config import DataArguments
from gem_ds.train.examples import load_examples
from tests.tiny_tasks import choice

FOLDERS = {
    "boolq": "BoolQ",
    "cb": "CB",
    "copa": "COPA",
    "multirc": "MultiRC",
    "record": "ReCoRD",
    "rte": "RTE",
    "wic": "WiC",
    "wsc": "WSC",
}
#: Counted in the files with grep.
ANSWERS = {
    "boolq": {0: 14, 1: 18},
    "cb": {0: 19, 1: 10, 2: 3},
    "copa": {0: 14, 1: 18},
    "multirc": {0: 86, 1: 68},
    "rte": {0: 13, 1: 19},
    "wic": {0: 15, 1: 17},
    "wsc": {1: 32},
}
LABELS = {
    "boolq": ("False", "True"),
    "cb": ("entailment", "contradiction", "neutral"),
    "multirc": ("False", "True"),
    "rte": ("entailment", "not_entailment"),
    "wic": ("False", "True"),
    "wsc": ("False", "True"),
}

OKALOOSA = (
    "Northwest Florida State College -- The school voted to change its name to Okaloosa-Walton "
    "Community College in 1988, and gained four-year status in 2003, thus changing its name to "
    "Okaloosa-Walton College."
)
JED = (
    "Jed wondered. He 'd scarcely set eyes on him since the night they 'd had dinner together at "
    "the house in Westwood. Nobody had mentioned him either and Jed didn't feel he should ask."
)
KERRY = "Kerry hit Bush hard on his conduct on the war in Iraq."
MARKED = "*John* hired Bill to take care of *him* ."
NO_YES = {"candidates": (" no", " yes")}

#: By task the number of an example in the file, and the example.
EXAMPLES = {
    "boolq": (
        11,
        choice(
            prompt=(
                f"{OKALOOSA}\nQuestion: is northwest florida state college a 4 year college?\n"
                "Answer:"
            ),
            answer=1,
            pairs=(("is northwest florida state college a 4 year college", OKALOOSA),),
            **NO_YES,
        ),
    ),
    "cb": (
        23,
        choice(
            prompt=f"{JED}\nQuestion: Jed should ask. True, False or Neither?\nAnswer:",
            candidates=(" True", " False", " Neither"),
            answer=1,
            pairs=((JED, "Jed should ask"),),
        ),
    ),
    "copa": (
        0,
        choice(
            prompt="The chandelier shattered on the floor because",
            candidates=(
                " the chandelier dropped from the ceiling.",
                " the chandelier's lights flickered on and off.",
            ),
            answer=0,
            pairs=(
                (
                    "The chandelier shattered on the floor because",
                    "the chandelier dropped from the ceiling.",
                ),
                (
                    "The chandelier shattered on the floor because",
                    "the chandelier's lights flickered on and off.",
                ),
            ),
        ),
    ),
    "rte": (
        21,
        choice(
            prompt=f"{KERRY}\nQuestion: Kerry shot Bush. True or False?\nAnswer:",
            candidates=(" True", " False"),
            answer=1,
            pairs=((KERRY, "Kerry shot Bush."),),
        ),
    ),
    "wic": (
        11,
        choice(
            prompt=(
                "Sentence 1: Catch fire.\nSentence 2: Catch the mood.\n"
                'Question: Does the word "catch" have the same meaning in both sentences?\nAnswer:'
            ),
            answer=1,
            pairs=(("catch: Catch fire.", "Catch the mood."),),
            **NO_YES,
        ),
    ),
    "wsc": (
        25,
        choice(
            prompt=(
                f'Passage: {MARKED}\nQuestion: Does the pronoun "*him*" refer to "*John*"?\nAnswer:'
            ),
            answer=1,
            pairs=((MARKED, "him refers to John."),),
            **NO_YES,
        ),
    ),
}


def load_real(gem_data_dir, task):
    return load_task(task, data_dir=str(gem_data_dir / "superglue" / FOLDERS[task]))


@pytest.mark.parametrize("task", FOLDERS)
def test_every_published_example_is_read(gem_data_dir, task):
    data = load_real(gem_data_dir, task)
    assert data.test == []  # these folders have no val.jsonl
    assert data.labels == LABELS.get(task, ())
    assert data.kind == ("labels" if task in LABELS else "choices")
    if task in ANSWERS:
        assert Counter(example.answer for example in data.train) == ANSWERS[task]
    for example in data.train:
        assert example.target == example.candidates[example.answer]
        assert len(example.pairs) == (1 if task in LABELS else len(example.candidates))
        assert not example.prompt[-1].isspace()
        assert all(candidate[0] == " " != candidate[1] for candidate in example.candidates)


@pytest.mark.parametrize("task", EXAMPLES)
def test_an_example_reads_as_written_out_here(gem_data_dir, task):
    number, example = EXAMPLES[task]
    assert load_real(gem_data_dir, task).train[number] == example


def test_multirc_asks_once_for_each_answer(gem_data_dir):
    examples = load_real(gem_data_dir, "multirc").train
    assert len({example.group for example in examples}) == 32  # questions
    care = [e for e in examples if "Does Mary care about Max?" in e.prompt]
    assert [e.target for e in care] == [" yes", " no"]
    assert len({e.group for e in care}) == 1
    yes, unknown = care
    passage, question = yes.pairs[0]
    assert passage.startswith("Mary loved walking through the woods with her dog, Max. Max and ")
    assert passage.endswith("happily returned to Mary, wagging his tail as he went.")
    assert question == "Does Mary care about Max? Yes"
    assert yes.prompt == (
        f"{passage}\nQuestion: Does Mary care about Max?\nAnswer: Yes\nIs this answer correct?"
    )
    assert unknown.pairs == ((passage, "Does Mary care about Max? She doesn't know Max"),)


def test_record_asks_once_for_each_query(gem_data_dir):
    examples = load_real(gem_data_dir, "record").train
    assert len(examples) == len({example.group for example in examples}) == 32
    (example,) = (e for e in examples if "Peter Roberts, 46, from Northampton" in e.prompt)
    names = ("Leon Watson", "Peter Roberts", "Northampton", "Shane Reeves", "Roberts")
    assert example.candidates == tuple(f" {name}" for name in names)
    assert example.answers == ("Shane Reeves",)
    assert example.target == " Shane Reeves"
    passage, filled = example.pairs[example.answer]
    assert filled == (
        "After undergoing surgery, Mr Shane Reeves spent a month recovering from his injuries."
    )
    assert passage.startswith("By Leon Watson PUBLISHED: 12:24 EST, 15 October 2012 | UPDATED")
    assert passage.endswith(
        "jailed for eight years\n"
        "- Peter Roberts, from Northampton, jailed for attack on Shane Reeves\n"
        "- The pair, aged 46 and 22, were friends but fell out on July 5 this year"
    )
    assert example.prompt == (
        f"{passage}\n\nAfter undergoing surgery, Mr ____ spent a month recovering from his "
        "injuries.\nQuestion: Which name fills the blank?\nAnswer:"
    )


def write(tmp_path, *rows, name="train.jsonl"):
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path)


RECORD = {
    "passage": {
        "text": "Iranian TV quoted Ali.\n@highlight\nAli, of Iran, won",
        "entities": [
            {"start": 0, "end": 6},
            {"start": 18, "end": 20},
            {"start": 34, "end": 36},
            {"start": 42, "end": 45},
        ],
    },
    "qas": [
        {
            "query": "@placeholder cheers",
            "answers": [{"start": 42, "end": 45, "text": "Iran"}, {"text": "Iranian"}],
        },
        {"query": "The winner is @placeholder", "answers": [{"start": 18, "text": "Ali"}]},
    ],
    "idx": 5,
}
MULTIRC = {
    "passage": {
        "text": "P.",
        "questions": [
            {"question": "Q?", "answers": [{"text": "a", "label": 1}, {"text": "b", "label": 0}]},
            {"question": "R?", "answers": [{"text": "c", "label": 0}]},
        ],
    }
}
WSC = {
    "text": "Ann saw Eve; she waved.",
    "target": {"span1_index": 2, "span1_text": "Eve", "span2_index": 3, "span2_text": "she"},
    "label": False,
}


def test_records_names_stand_in_the_passages_order_once_each(tmp_path):
    data = load_task("record", data_dir=write(tmp_path, RECORD, RECORD))
    first, second, third, _ = data.train
    assert first.candidates == (" Iranian", " Ali", " Iran")
    assert first.answers == ("Iran", "Iranian")
    assert first.target == " Iranian"  # of the right ones the first in the passage
    assert first.pairs[0] == ("Iranian TV quoted Ali.\n- Ali, of Iran, won", "Iranian cheers")
    assert (second.target, second.answers) == (" Ali", ("Ali",))
    assert len({first.group, second.group, third.group}) == 3


def test_wsc_marks_both_spans_within_their_punctuation(tmp_path):
    (example,) = load_task("wsc", data_dir=write(tmp_path, WSC)).train
    assert example.pairs == (("Ann saw *Eve*; *she* waved.", "she refers to Eve."),)
    assert example.target == " no"


@pytest.mark.parametrize(
    ("question", "beginning", "candidates"),
    [
        ("cause", "The vase broke because", (" I dropped it.", " it was old.")),
        ("effect", "The vase broke so", (" I dropped it.", " it was old.")),
    ],
)
def test_copa_makes_one_sentence(tmp_path, question, beginning, candidates):
    row = {"premise": "The vase broke.", "choice1": "I dropped it.", "choice2": "It was old."}
    data = load_task("copa", data_dir=write(tmp_path, row | {"question": question, "label": 1}))
    (example,) = data.train
    assert (example.prompt, example.candidates, example.answer) == (beginning, candidates, 1)


HUB_ROWS = {
    "record": [
        {
            "passage": RECORD["passage"]["text"],
            "query": qa["query"],
            "entities": ["Ali", "Iran", "Iranian"],
            "entity_spans": {"text": ["Iranian", "Ali", "Ali", "Iran"], "start": [0, 18, 34, 42]},
            "answers": [answer["text"] for answer in qa["answers"]],
            "idx": {"passage": 1, "query": i},
        }
        for i, qa in enumerate(RECORD["qas"])
    ],
    "multirc": [
        {
            "paragraph": "P.",
            "question": question["question"],
            "answer": answer["text"],
            "label": answer["label"],
            "idx": {"paragraph": 1, "question": i, "answer": 7},
        }
        for i, question in enumerate(MULTIRC["passage"]["questions"])
        for answer in question["answers"]
    ],
    "wsc": [{"text": WSC["text"], **WSC["target"], "label": 0, "idx": 0}],
    "boolq": [{"question": "is it", "passage": "It is.", "label": 1, "idx": 0}],
}
FILE_ROWS = {
    "record": RECORD,
    "multirc": MULTIRC,
    "wsc": WSC,
    "boolq": {"question": "is it", "passage": "It is.", "label": True},
}


@pytest.mark.parametrize("task", HUB_ROWS)
def test_the_hub_gives_the_same_examples(tmp_path, monkeypatch, task):
    def load_dataset(*names):
        assert names == ("aps/super_glue", "wsc.fixed" if task == "wsc" else task)
        return {"train": HUB_ROWS[task], "validation": HUB_ROWS[task][:1]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    write(tmp_path, FILE_ROWS[task])
    local = load_task(task, data_dir=str(tmp_path))
    assert load_task(task) == TaskData(
        train=local.train, test=local.train[:1], kind=local.kind, labels=local.labels
    )
    write(tmp_path, FILE_ROWS[task], name="val.jsonl")
    assert load_task(task, data_dir=str(tmp_path)).test == local.train


def without(row, key):
    return {name: value for name, value in row.items() if name != key}


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (
            "boolq",
            {"question": "q", "passage": "p", "label": "yes"},
            r'is "yes"; .* of false, true',
        ),
        ("boolq", {"question": "q", "passage": "p"}, r"no field 'label'; the line has 'question'"),
        ("boolq", {"passage": "p", "label": True}, r"no field 'question'; the line has 'passage'"),
        ("boolq", {"question": 1, "passage": "p", "label": True}, r"'question' must be a string"),
        ("cb", {"premise": "p", "hypothesis": "h", "label": "no"}, r'one of "entailment", "contra'),
        ("copa", {"premise": "p", "question": "why", "label": 0}, r"must be 'cause' or 'effect'"),
        ("multirc", {"passage": "p"}, r"the field 'passage' must be an object; it is a string"),
        ("multirc", {}, r"the field 'passage' must be an object; it is missing"),
        (
            "multirc",
            {"passage": {"text": "", "questions": [3]}},
            r"'questions' must be a list of o",
        ),
        ("record", without(RECORD, "qas"), r"'qas' must be a list of objects"),
        (
            "record",
            RECORD | {"qas": [{"query": "@placeholder", "answers": [{"text": "Oslo"}]}]},
            r"none of the answers to '@placeholder' is an entity",
        ),
        (
            "record",
            RECORD | {"qas": [{"query": "q", "answers": [{"text": "Ali"}]}]},
            r"no @placeholder in the query 'q'",
        ),
        ("wsc", without(WSC, "target"), r"'target' must be an object; it is missing"),
        (
            "wsc",
            WSC | {"target": WSC["target"] | {"span2_index": 5}},
            r"span2_index is 5 and the text has 5 words",
        ),
        ("wsc", WSC | {"target": {"span1_index": "2"}}, r"'span1_index' must be a whole number"),
    ],
)
def test_a_bad_line_is_named(tmp_path, task, row, message):
    with pytest.raises(ValueError, match=rf"train\.jsonl, line 1: .*{message}"):
        load_task(task, data_dir=write(tmp_path, row))


def boolq_arguments(folder, **more):
    """Twelve questions, three about each of four passages, without a validation file."""
    rows = [
        {"question": f"is it {i}", "passage": f"A long passage, number {i % 4}.", "label": True}
        for i in range(12)
    ]
    folder.joinpath("train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return DataArguments(task="boolq", data_dir=str(folder), **more)


def test_questions_about_a_passage_stay_on_one_side_of_the_development_split(tmp_path):
    data = load_examples(boolq_arguments(tmp_path, dev_examples=4, evaluate_on="dev"))
    assert len(data.test) == 6
    assert len(data.train) == 6
    passages = [{e.pairs[0][1] for e in part} for part in (data.train, data.test)]
    assert len(passages[0]) == len(passages[1]) == 2
    assert not passages[0] & passages[1]


def test_pronouns_of_a_text_stay_on_one_side_of_the_development_split(tmp_path):
    rows = []
    for i in range(8):
        row = WSC | {"text": f"Ann saw Eve; she waved {i} times."}
        other = row["target"] | {"span1_index": 0, "span1_text": "Ann"}
        rows += [row, row | {"target": other, "label": True}]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    tmp_path.joinpath("train.jsonl").write_text(text)
    arguments = DataArguments(task="wsc", data_dir=str(tmp_path), dev_examples=6, evaluate_on="dev")
    data = load_examples(arguments)
    assert len(data.test) == 6
    texts = [{e.prompt.split("waved ")[1][0] for e in part} for part in (data.train, data.test)]
    assert [len(part) for part in texts] == [5, 3]
    assert not texts[0] & texts[1]


def test_a_missing_validation_file_is_told_before_training_where_it_is_needed(tmp_path):
    assert load_examples(boolq_arguments(tmp_path)).test == []
    with pytest.raises(ValueError, match=rf"test: {tmp_path} holds no held-out examples of --task"):
        load_examples(boolq_arguments(tmp_path, evaluate_on="test"))
