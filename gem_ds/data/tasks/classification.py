"""Benchmark tasks whose answer is a label, a choice or a number: from a row to an example.

A task is data (`data.tasks.catalog` is the table). Whatever its source, a row has the Hub's field
names when a template sees it; a source that differs says how in its `Files`. Then

    row  --unfold-->  rows of the Hub's shape  --derive-->  fields of the templates  -->  example

Texts lose the white space around them, which some data sets have by accident.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from gem_ds.data.tasks import ChoiceExample, Example, Kind, NumberExample, Pair, Source, TaskData
from gem_ds.data.tasks.lines import Fields, Line, read_jsonl
from gem_ds.data.tasks.published import read_hub, read_tsv

#: The ends of the scale on which numbers are.
SCALE = (0.0, 5.0)


@dataclass(frozen=True, kw_only=True)
class Files:
    """How a benchmark's own files differ from the Hub's rows; a suffix says if TSV or JSONL."""

    train: str
    test: str
    header: tuple[str, ...] = ()  # names of the columns, for a TSV that has none
    names: Mapping[str, str] = field(default_factory=dict)  # the Hub's of a field -> the file's
    labels: tuple[object, ...] | None = None  # what is written for each; None: their names
    unfold: Callable[[Line], list[Fields]] | None = None  # a nested row -> rows of the Hub's shape
    skip_short: bool = False  # whether rows of a TSV that lack cells are left out, as by the Hub

    def read(self, path: Path, label_names: Sequence[str]) -> Iterator[Line]:
        """The rows of a file in the Hub's shape."""
        if path.suffix == ".tsv":
            lines = read_tsv(path, self.header, skip_short=self.skip_short)
        else:
            lines = read_jsonl(path)
        for line in lines:
            for fields in self.unfold(line) if self.unfold else [self._renamed(line)]:
                row = replace(line, fields=fields)
                yield _numbered(row, label_names if self.labels is None else self.labels)

    def _renamed(self, line: Line) -> Fields:
        fields = dict(line.fields)
        for name, own in self.names.items():
            fields[name] = line.value(own)
            del fields[own]
        return fields


@dataclass(frozen=True, kw_only=True)
class ClassificationTask:
    """One task as data; the templates name fields of a row in braces.

    Attributes:
        files: The forms in which a folder may hold it.
        prompt: Template of what a causal model reads.
        answers: What it writes for each label, by the labels' names in the Hub's order.
        choice: Of choices, the template of what it writes for each of the row's `options`, whose
            fields it may name.
        num_choices: Of choices, how many there are, unless `derive` gives the label.
        pair: Templates of what an encoder reads; of choices likewise, once for each.
    """

    hub: tuple[str, str]  # address and configuration
    files: tuple[Files, ...]
    kind: Kind = "labels"
    prompt: str
    answers: Mapping[str, str] = field(default_factory=dict)
    choice: str = ""
    num_choices: int = 0
    pair: Pair
    test_split: str = "validation"  # the Hub's name of the validation set
    group: tuple[str, ...] = ()  # the parts of a row's `idx` that say what is judged together
    derive: Callable[[Line], Fields] | None = None  # further fields for the templates


def load(task: ClassificationTask, source: Source) -> TaskData:
    """Load the training and validation sets; the benchmarks publish no labels of the test sets.

    `data_dir` holds the benchmark's own files, perhaps without the validation file.
    """
    labels = tuple(task.answers)
    parts: list[Iterable[Line]]
    if source.data_dir is None:
        written = range(len(task.answers) or task.num_choices)
        parts = [
            [_numbered(row, written) for row in read_hub(task.hub, split)]
            for split in ("train", task.test_split)
        ]
    else:
        folder = Path(source.data_dir)
        files = next((form for form in task.files if (folder / form.train).is_file()), None)
        if files is None:
            wanted = " or ".join(str(folder / form.train) for form in task.files)
            raise ValueError(f"There is no file {wanted}: check the path.")
        paths = (folder / files.train, folder / files.test)
        parts = [files.read(path, labels) if path.is_file() else [] for path in paths]
    train, test = ([_example(task, row) for row in rows] for rows in parts)
    return TaskData(train=train, test=test, kind=task.kind, labels=labels, has_passages=True)


def _numbered(row: Line, written: Sequence[object]) -> Line:
    """The row with its label as a number from 0, where `written` says what stands for each."""
    if not written:
        return row
    spellings = [json.dumps(label) for label in written]
    label = json.dumps(row.value("label"))
    if label not in spellings:
        raise row.error(f"the label is {label}; it must be one of {', '.join(spellings)}.")
    return replace(row, fields={**row.fields, "label": spellings.index(label)})


def _example(task: ClassificationTask, row: Line) -> Example:
    if task.derive:
        row = replace(row, fields={**row.fields, **task.derive(row)})
    prompt = _fill(task.prompt, row)
    if task.kind == "number":
        return NumberExample(
            prompt=prompt,
            target=f" {(value := _number(row)):.1f}",
            pairs=(_fill_pair(task.pair, row),),
            value=value,
            place=row.place,
        )
    if task.kind == "choices":
        options = [
            replace(row, fields={**row.fields, **o.fields}) for o in row.nested_list("options")
        ]
        candidates = tuple(_fill(task.choice, option) for option in options)
        pairs = tuple(_fill_pair(task.pair, option) for option in options)
    else:
        candidates, pairs = tuple(task.answers.values()), (_fill_pair(task.pair, row),)
    answer = row.whole_number("label")
    return ChoiceExample(
        prompt=prompt,
        target=candidates[answer],
        candidates=candidates,
        answer=answer,
        pairs=pairs,
        place=row.place,
        group=".".join(str(row.nested("idx").whole_number(part)) for part in task.group),
        answers=row.texts("answers") if "answers" in row.fields else (),
    )


def _number(row: Line) -> float:
    label = row.fields.get("label")
    try:
        value = float(label) if isinstance(label, (str, float)) else None
    except ValueError:
        value = None
    low, high = SCALE
    if value is None or not low <= value <= high:
        raise row.error(f"the label is {label!r}; it must be a number from {low} to {high}.")
    return value


def _fill(template: str, row: Line) -> str:
    return re.sub(r"\{(\w+)\}", lambda name: row.text(name[1]).strip(), template)


def _fill_pair(pair: Pair, row: Line) -> Pair:
    first, second = pair
    return _fill(first, row), None if second is None else _fill(second, row)
