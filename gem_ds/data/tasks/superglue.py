"""The rows of SuperGLUE that are more than a few texts: multirc, record, wsc and copa.

`unfold_*` brings a line of the official JSONL files into the shape of the Hub's rows (one row per
answer of multirc and per query of record; no nesting in wsc). `derive_*` adds what the templates of
`gem_ds.data.tasks.catalog` name, to a row of that shape.
"""

import re
import string

from gem_ds.data.tasks.lines import Fields, Line

#: What joins a premise of copa to a choice.
CONNECTIVES = {"cause": "because", "effect": "so"}

PLACEHOLDER = "@placeholder"


def unfold_multirc(line: Line) -> list[Fields]:
    """A passage -> one row per answer of each question; `idx` counts within the file."""
    passage = line.nested("passage")
    return [
        {
            "paragraph": passage.text("text"),
            "question": question.text("question"),
            "answer": answer.text("text"),
            "label": answer.fields.get("label"),
            "idx": {"paragraph": line.number, "question": number},
        }
        for number, question in enumerate(passage.nested_list("questions"))
        for answer in question.nested_list("answers")
    ]


def unfold_record(line: Line) -> list[Fields]:
    """A passage -> one row per query; an entity's `end` is its last character."""
    passage = line.nested("passage")
    text = passage.text("text")
    spans = sorted(
        (entity.whole_number("start"), entity.whole_number("end") + 1)
        for entity in passage.nested_list("entities")
    )
    return [
        {
            "passage": text,
            "query": query.text("query"),
            "entity_spans": {"text": [text[start:end] for start, end in spans]},
            "answers": [answer.text("text") for answer in query.nested_list("answers")],
            "idx": {"passage": line.number, "query": number},
        }
        for number, query in enumerate(line.nested_list("qas"))
    ]


def unfold_wsc(line: Line) -> list[Fields]:
    """The two spans stand beside the text instead of within `target`."""
    return [{**line.fields, **line.nested("target").fields}]


def derive_record(row: Line) -> Fields:
    """The entities as they first come in the passage; the label is the first that is an answer."""
    query, answers = row.text("query"), row.texts("answers")
    entities = list(dict.fromkeys(row.nested("entity_spans").texts("text")))
    right = [number for number, entity in enumerate(entities) if entity in answers]
    if PLACEHOLDER not in query:
        raise row.error(f"there is no {PLACEHOLDER} in the query {query!r}.")
    if not right:
        raise row.error(f"none of the answers to {query!r} is an entity of the passage.")
    return {
        "passage": re.sub(r"\s*@highlight\s*", "\n- ", row.text("passage")),
        "blank": query.replace(PLACEHOLDER, "____"),
        "options": [
            {"entity": entity, "filled": query.replace(PLACEHOLDER, entity)} for entity in entities
        ],
        "answers": list(dict.fromkeys(answers)),
        "label": right[0],
    }


def derive_wsc(row: Line) -> Fields:
    """The text with a star on either side of both spans."""
    words = row.text("text").split()
    for span in ("span1", "span2"):
        first = row.whole_number(f"{span}_index")
        length = len(row.text(f"{span}_text").split()) or 1
        if not 0 <= first < len(words):
            raise row.error(f"{span}_index is {first} and the text has {len(words)} words.")
        last = min(first + length, len(words)) - 1  # not every span is spelled as in the text
        words[first] = f"*{words[first]}"
        bare = words[last].rstrip(string.punctuation)
        words[last] = f"{bare}*{words[last][len(bare) :]}"
    return {"marked": " ".join(words)}


def derive_copa(row: Line) -> Fields:
    """Premise and choices as the parts of one sentence."""
    question = row.text("question")
    if question not in CONNECTIVES:
        raise row.error(f"the question is {question!r}; it must be 'cause' or 'effect'.")
    return {
        "beginning": f"{row.text('premise').strip().removesuffix('.')} {CONNECTIVES[question]}",
        "options": [{"choice": _uncapitalised(row.text(name))} for name in ("choice1", "choice2")],
    }


def _uncapitalised(sentence: str) -> str:
    """A sentence as it goes on after another word; the word I stays."""
    if re.match(r"I\b", sentence):
        return sentence
    return sentence[:1].lower() + sentence[1:]
