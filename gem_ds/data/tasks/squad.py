r"""SQuAD 1.1: questions on Wikipedia passages, answered in the passage's words (Rajpurkar et al.).

    prompt = "Title: {title}\n\n{context}\n\nQuestion: {question}\nAnswer:"
    target = " " + the first accepted answer

Every question has an answer (arXiv 1606.05250); SQuAD 2, where some have none, is not read.
"""

from collections.abc import Iterable
from pathlib import Path

from gem_ds.data.tasks import AnswerExample, Example, Source, TaskData
from gem_ds.data.tasks.lines import Line, numbered
from gem_ds.data.tasks.published import read_hub, read_json

HUB_DATASET = "rajpurkar/squad"


def load(source: Source) -> TaskData:
    """Load train (87599 questions), and dev (10570) as held-out: the test set is not public.

    `data_dir` holds `train-v1.1.json` and perhaps `dev-v1.1.json`, the official files.
    """
    if source.data_dir is None:
        train, test = _from_hub("train"), _from_hub("validation")
        return TaskData(train=train, test=test, has_passages=True)
    first, second = (Path(source.data_dir) / f"{name}-v1.1.json" for name in ("train", "dev"))
    test = _from_file(second) if second.is_file() else []
    return TaskData(train=_from_file(first), test=test, has_passages=True)


def _from_hub(split: str) -> list[Example]:
    return [
        _example(row.text("title"), row.text("context"), row, row.nested("answers").texts("text"))
        for row in read_hub((HUB_DATASET,), split)
    ]


def _from_file(path: Path) -> list[Example]:
    return [
        _example(
            article.text("title"),
            paragraph.text("context"),
            question,
            [answer.text("text") for answer in question.nested_list("answers")],
        )
        for article in _articles(path)
        for paragraph in article.nested_list("paragraphs")
        for question in paragraph.nested_list("qas")
    ]


def _articles(path: Path) -> list[Line]:
    """The articles of an official file, which is one JSON object."""
    document = read_json(path)
    articles = document.get("data") if isinstance(document, dict) else None
    if not articles or not isinstance(articles, list):
        raise ValueError(f"{path} must hold an object with a list of articles, 'data'.")
    if wrong := [i for i, article in enumerate(articles, 1) if not isinstance(article, dict)]:
        raise ValueError(f"{path}, article {wrong[0]}: an article must be an object.")
    return numbered(path, articles, "article")


def _example(title: str, context: str, question: Line, answers: Iterable[str]) -> AnswerExample:
    asked, accepted = question.text("question"), tuple(dict.fromkeys(answers))
    if not accepted:
        raise question.error(f"the question {asked!r} has no answer: SQuAD 1.1 has one to each.")
    title = title.replace("_", " ")
    return AnswerExample(
        prompt=f"Title: {title}\n\n{context}\n\nQuestion: {asked}\nAnswer:",
        target=f" {accepted[0]}",
        answers=accepted,
        passage=context,
        place=question.place,
    )
