"""The user's own texts with labels, for encoders and for causal models that choose.

    {"text": "Great film.", "label": "positive"}        perhaps a second text, "text_pair"

The labels are those of the training data, in the order of numbers or else of the alphabet.
"""

from collections.abc import Sequence

from gem_ds.data.tasks import ChoiceExample, Example, TaskData
from gem_ds.data.tasks.lines import Line


def labelled_task(train: Sequence[Line], test: Sequence[Line]) -> TaskData:
    """Rows with `text` and `label` as a task of kind "labels"."""
    names = [_name(line) for line in train]
    labels = tuple(sorted(set(names), key=lambda name: (not _is_number(name), _order(name))))
    if len(labels) < 2:
        raise train[0].error(f"all labels are {labels[0]!r}, so there is nothing to tell apart.")
    first, second = ([_example(line, labels) for line in lines] for lines in (train, test))
    return TaskData(train=first, test=second, kind="labels", labels=labels)


def _example(line: Line, labels: tuple[str, ...]) -> Example:
    if (name := _name(line)) not in labels:
        raise line.error(f"the label {name!r} is none of the training data's: {', '.join(labels)}.")
    text, second = line.text("text"), line.fields.get("text_pair")
    pair = None if second is None else line.text("text_pair")
    candidates = tuple(f" {label}" for label in labels)
    return ChoiceExample(
        prompt="\n".join(filter(None, (text, pair, "Label:"))),
        target=f" {name}",
        candidates=candidates,
        answer=labels.index(name),
        pairs=((text, pair),),
        place=line.place,
    )


def _name(line: Line) -> str:
    label = line.value("label")
    if not isinstance(label, (str, int)):
        raise line.error(f"the label must be a name or a whole number, not {label!r}.")
    return line.checked_text(str(label), "the label")


def _is_number(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def _order(name: str) -> tuple[int, str]:
    return (int(name), "") if _is_number(name) else (0, name)
