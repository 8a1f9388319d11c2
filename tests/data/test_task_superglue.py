"""SuperGLUE: the published examples read as they should, from files and from the Hub alike."""

import json
import re
from collections import Counter

import datasets
import pytest

from gem_ds.data.tasks import TaskData, load_task
from gem_ds.train.config import DataArguments
from gem_ds.train.examples import load_examples
from tests.tiny_tasks import choice

FALSE_TRUE = ("False", "True")
#: By task its folder, its labels, and how often each answer is right (counted with grep).
TASKS = {
    "boolq": ("BoolQ", FALSE_TRUE, {0: 14, 1: 18}),
    "cb": ("CB", ("entailment", "contradiction", "neutral"), {0: 19, 1: 10, 2: 3}),
    "copa": ("COPA", (), {0: 14, 1: 18}),
    "multirc": ("MultiRC", FALSE_TRUE, {0: 86, 1: 68}),
    "record": ("ReCoRD", (), None),
    "rte": ("RTE", ("entailment", "not_entailment"), {0: 13, 1: 19}),
    "wic": ("WiC", FALSE_TRUE, {0: 15, 1: 17}),
    "wsc": ("WSC", FALSE_TRUE, {1: 32}),
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
NO_YES = (" no", " yes")
FLOOR = "The chandelier shattered on the floor because"
CHANDELIER = (
    "the chandelier dropped from the ceiling.",
    "the chandelier's lights flickered on and off.",
)

#: By task the number of an example in the file; its prompt, candidates, answer and pairs.
EXAMPLES = {
    "boolq": (
        11,
        f"{OKALOOSA}\nQuestion: is northwest florida state college a 4 year college?\nAnswer:",
        *(NO_YES, 1, (("is northwest florida state college a 4 year college", OKALOOSA),)),
    ),
    "cb": (
        23,
        f"{JED}\nQuestion: Jed should ask. True, False or Neither?\nAnswer:",
        *((" True", " False", " Neither"), 1, ((JED, "Jed should ask"),)),
    ),
    "copa": (
        *(0, FLOOR, tuple(f" {choice}" for choice in CHANDELIER), 0),
        tuple((FLOOR, choice) for choice in CHANDELIER),
    ),
    "rte": (
        21,
        f"{KERRY}\nQuestion: Kerry shot Bush. True or False?\nAnswer:",
        *((" True", " False"), 1, ((KERRY, "Kerry shot Bush."),)),
    ),
    "wic": (
        11,
        "Sentence 1: Catch fire.\nSentence 2: Catch the mood.\n"
        'Question: Does the word "catch" have the same meaning in both sentences?\nAnswer:',
        *(NO_YES, 1, (("catch: Catch fire.", "Catch the mood."),)),
    ),
    "wsc": (
        25,
        f'Passage: {MARKED}\nQuestion: Does the pronoun "*him*" refer to "*John*"?\nAnswer:',
        *(NO_YES, 1, ((MARKED, "him refers to John."),)),
    ),
}


def load_real(gem_data_dir, task):
    return load_task(task, data_dir=str(gem_data_dir / "superglue" / TASKS[task][0]))


@pytest.mark.parametrize("task", TASKS)
def test_every_published_example_is_read(gem_data_dir, task):
    """And, where the template is all there is to it, one reads as written out above."""
    data, (_, labels, counts) = load_real(gem_data_dir, task), TASKS[task]
    assert data.test == []  # these folders have no val.jsonl
    is_labelled = task not in ("copa", "record")
    assert (data.labels, data.kind) == (labels, "labels" if is_labelled else "choices")
    if counts:
        assert Counter(example.answer for example in data.train) == counts
    for example in data.train:
        assert example.target == example.candidates[example.answer]
        assert len(example.pairs) == (1 if is_labelled else len(example.candidates))
        assert not example.prompt[-1].isspace()
        assert all(candidate[0] == " " != candidate[1] for candidate in example.candidates)
    if task in EXAMPLES:
        number, *written = EXAMPLES[task]
        assert data.train[number] == choice(*written)


def test_multirc_asks_once_for_each_answer(gem_data_dir):
    examples = load_real(gem_data_dir, "multirc").train
    assert len({example.group for example in examples}) == 32  # questions
    yes, unknown = (e for e in examples if "Does Mary care about Max?" in e.prompt)
    assert (yes.target, unknown.target, yes.group) == (" yes", " no", unknown.group)
    passage, question = yes.pairs[0]
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
    assert (example.answers, example.target) == (("Shane Reeves",), " Shane Reeves")
    passage, filled = example.pairs[example.answer]
    query = "After undergoing surgery, Mr {} spent a month recovering from his injuries."
    assert filled == query.format("Shane Reeves")
    question = "Question: Which name fills the blank?\nAnswer:"
    assert example.prompt == f"{passage}\n\n{query.format('____')}\n{question}"


def write(tmp_path, *rows, name="train.jsonl"):
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path)


ENTITIES = {"Iranian": 0, "Ali": 18, " Ali": 34, "Iran": 42}
IRAN, ALI = {"start": 42, "end": 45, "text": "Iran"}, {"start": 18, "text": "Ali"}
RECORD = {
    "passage": {
        "text": "Iranian TV quoted Ali.\n@highlight\nAli, of Iran, won",
        "entities": [
            {"start": start, "end": start + len(name.strip()) - 1}
            for name, start in ENTITIES.items()
        ],
    },
    "qas": [
        {"query": "@placeholder cheers", "answers": [IRAN, {"text": "Iranian"}]},
        {"query": "The winner is @placeholder", "answers": [ALI]},
    ],
    "idx": 5,
}
A_AND_B, C = [{"text": "a", "label": 1}, {"text": "b", "label": 0}], [{"text": "c", "label": 0}]
QUESTIONS = [{"question": "Q?", "answers": A_AND_B}, {"question": "R?", "answers": C}]
MULTIRC = {"passage": {"text": "P.", "questions": QUESTIONS}}
WSC = {
    "text": "Ann saw Eve; she waved.",
    "target": {"span1_index": 2, "span1_text": "Eve", "span2_index": 3, "span2_text": "she"},
    "label": False,
}
BOOLQ = {"question": "is it", "passage": "It is.", "label": True}
CB = {"premise": "p", "hypothesis": "h", "label": "no"}
COPA = {"premise": "The vase broke.", "choice1": "I dropped it.", "choice2": "It was old."}
COPA["label"] = 1


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


@pytest.mark.parametrize(("question", "word"), [("cause", "because"), ("effect", "so")])
def test_copa_makes_one_sentence(tmp_path, question, word):
    row = COPA | {"question": question}
    (example,) = load_task("copa", data_dir=write(tmp_path, row)).train
    assert example.prompt == f"The vase broke {word}"
    assert (example.candidates, example.answer) == ((" I dropped it.", " it was old."), 1)


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
            "idx": {"paragraph": 1, "question": i},
        }
        | {"answer": answer["text"], "label": answer["label"]}
        for i, question in enumerate(QUESTIONS)
        for answer in question["answers"]
    ],
    "wsc": [{"text": WSC["text"], **WSC["target"], "label": 0, "idx": 0}],
    "boolq": [BOOLQ | {"label": 1, "idx": 0}],
}
FILE_ROWS = {"record": RECORD, "multirc": MULTIRC, "wsc": WSC, "boolq": BOOLQ}


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


def record_of(query, answer):
    return RECORD | {"qas": [{"query": query, "answers": [{"text": answer}]}]}


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("boolq", BOOLQ | {"label": "yes"}, r'is "yes"; .* of false, true'),
        ("boolq", without(BOOLQ, "label"), r"no field 'label'; the line has 'question'"),
        ("boolq", BOOLQ | {"question": 1}, r"'question' must be a string"),
        ("cb", CB, r'one of "entailment", "contra'),
        ("copa", COPA | {"question": "why"}, r"must be 'cause' or 'effect'"),
        ("multirc", {"passage": "p"}, r"'passage' must be an object; it is a string"),
        ("multirc", {}, r"'passage' must be an object; it is missing"),
        ("multirc", {"passage": {"text": "", "questions": [3]}}, r"'questions' must be a list of"),
        ("record", without(RECORD, "qas"), r"'qas' must be a list of objects"),
        ("record", record_of("@placeholder", "Oslo"), r"none of the answers to '@placeholder' is"),
        ("record", record_of("q", "Ali"), r"no @placeholder in the query 'q'"),
        ("wsc", without(WSC, "target"), r"'target' must be an object; it is missing"),
        ("wsc", WSC | {"target": WSC["target"] | {"span2_index": 5}}, r"is 5 and the text has 5 w"),
        ("wsc", WSC | {"target": {"span1_index": "2"}}, r"'span1_index' must be a whole number"),
    ],
)
def test_a_bad_line_is_named(tmp_path, task, row, message):
    with pytest.raises(ValueError, match=rf"train\.jsonl, line 1: .*{message}"):
        load_task(task, data_dir=write(tmp_path, row))


def arguments(task, folder, **more):
    return DataArguments(task=task, data_dir=str(folder), **more)


def test_examples_of_a_text_stay_on_one_side_of_the_development_split(tmp_path):
    """A text that is trained on and judged by would count memory as skill."""
    asked = [
        {"question": f"is it {i}", "passage": f"Passage {i % 4}", "label": True} for i in range(12)
    ]
    waves = [WSC | {"text": f"Ann saw Eve; she waved {i} times."} for i in range(8)]
    other = WSC["target"] | {"span1_index": 0, "span1_text": "Ann"}
    waves += [row | {"target": other, "label": True} for row in waves]

    def sides(task, rows, dev_examples):
        write(tmp_path, *rows)
        split = {"dev_examples": dev_examples, "evaluate_on": "dev"}
        data = load_examples(arguments(task, tmp_path, **split))
        return len(data.test), [
            {re.search("[0-9]", example.prompt)[0] for example in part}
            for part in (data.train, data.test)
        ]

    for task, rows, dev_examples, sizes in (("boolq", asked, 4, [2, 2]), ("wsc", waves, 6, [5, 3])):
        num_held_out, texts = sides(task, rows, dev_examples)
        assert num_held_out == 6
        assert [len(part) for part in texts] == sizes
        assert not texts[0] & texts[1]


def test_a_missing_validation_file_is_told_before_training_where_it_is_needed(tmp_path):
    write(tmp_path, BOOLQ)
    assert load_examples(arguments("boolq", tmp_path)).test == []
    with pytest.raises(ValueError, match=rf"test: {tmp_path} holds no held-out examples of --task"):
        load_examples(arguments("boolq", tmp_path, evaluate_on="test"))
