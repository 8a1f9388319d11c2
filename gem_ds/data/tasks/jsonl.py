"""The user's own data in the forms that lie around: files of a folder, or a data set by its name.

With `prompt_field` and `target_field`, those two strings are the prompt and the target exactly as
they stand: nothing is added between them, so a separating space or newline must be in the data.
Without them a row is of the first of the `FORMS` whose fields it has.

Of a folder `train.jsonl` is read, else all files whose names say train, else all that are not held
out; held out is `test.jsonl`, else what is named test, validation, valid, val, dev or eval.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gem_ds.data.tasks import Example, PlainText, Source, TaskData
from gem_ds.data.tasks.chats import Told, of_messages, of_pair
from gem_ds.data.tasks.columns import HELD_OUT, dataset_splits, parquet_rows, table_rows
from gem_ds.data.tasks.labelled import labelled_task
from gem_ds.data.tasks.lines import PARQUET, Line, json_rows, unpacked

_PACKED = r"(?:\.(?:gz|bz2|xz))?"
_DATA_FILE = re.compile(rf"(?s)[^.].*\.(?:jsonl|json|parquet|csv|tsv){_PACKED}")
_TABLE = re.compile(rf"(?s).*\.[ct]sv{_PACKED}")

#: That of Stanford's Alpaca, with a line's end behind it; some rows have no input.
_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
_PAIRED = ", paired with an input that provides further context"


@dataclass(frozen=True, kw_only=True)
class Form:
    """A way to write an example as the fields of a row."""

    needs: tuple[str, ...]
    takes: tuple[str, ...] = ()  # fields that are read where they are there
    words: str  # how the log calls it
    example: Callable[[Line, Source, Told], Example] | None  # None: labels, which hang together


@dataclass(frozen=True)
class _Part:
    """The rows of a file or of a split."""

    lines: list[Line]
    where: str
    how: str  # is it written


def load(source: Source) -> TaskData:
    """Load the training examples and, where there are any, those held out.

    `data_dir` is a folder, or is itself the training file. `train_file` and `test_file` name other
    files, within the folder if there is one. `dataset_name` is what `load_dataset` takes.
    """
    if (source.prompt_field is None) != (source.target_field is None):
        raise ValueError("Pass both --prompt_field and --target_field, or neither for chat files.")
    told: Told = Counter()
    parts = train, test = _parts(source)
    rows = [[(line, _form_of(line, source)) for part in p for line in part.lines] for p in parts]
    forms = {form.words: form for line, form in (*rows[0], *rows[1])}
    if any(form.example is None for form in forms.values()):
        task = labelled_task(*([line for line, _ in part] for part in rows))
    else:
        first, second = (
            [form.example(line, source, told) for line, form in part if form.example is not None]
            for part in rows
        )
        task = TaskData(train=first, test=second)
    note = f"Read {len(rows[0]):,} training examples from {_places(train)}"
    if test:
        note += f" and {len(rows[1]):,} held-out ones from {_places(test)}"
    note += f": {'; '.join(forms)}"
    known = {name for form in forms.values() for name in (*form.needs, *form.takes)}
    unused = [*dict.fromkeys(name for line, _ in rows[0] for name in line.fields)]
    unused = [repr(name) for name in unused if name not in known]
    if unused:
        note += f"; not used: {', '.join(unused[:9])}{', ...' * (len(unused) > 9)}"
    return replace(task, notes=(note, *(f"{what}: {count:,}" for what, count in told.items())))


def _parts(source: Source) -> tuple[list[_Part], list[_Part]]:
    """The rows to train on, and those held out."""
    if source.dataset_name is None:
        paths, held_out_paths = _files(source)
        return [_read(path) for path in paths], [_read(path) for path in held_out_paths]
    for option in ("data_dir", "train_file", "test_file"):
        if getattr(source, option) is not None:
            raise ValueError(f"Pass --dataset_name or --{option}, not both.")
    name = source.dataset_name
    rows, held_out, split = dataset_splits(name, source.dataset_config_name)
    if not rows:
        raise ValueError(f"--dataset_name {name} has an empty split 'train': name another.")
    test = [_Part(held_out, name, f"split {split}")] if held_out else []
    return [_Part(rows, name, "split train")], test


def _read(path: Path) -> _Part:
    """The rows of a file, at least one."""
    content, how = unpacked(path)
    if content.startswith(PARQUET):
        rows, form = parquet_rows(path, content), "Parquet"
    elif _TABLE.fullmatch(path.name):
        rows, form = table_rows(path, content), "a table"
    else:
        rows, form = json_rows(path, content)
    if not rows:
        raise ValueError(f"{path} is empty: it must hold at least one row.")
    return _Part(rows, str(path), f"{form}{how}")


def _places(parts: Sequence[_Part]) -> str:
    ways = ", ".join(dict.fromkeys(part.how for part in parts))
    if len(parts) == 1:
        return f"{parts[0].where} ({ways})"
    names = [Path(part.where).name for part in parts]
    listed = ", ".join(names[:5]) + ", ..." * (len(names) > 5)
    return f"{len(parts)} files in {Path(parts[0].where).parent} ({listed}; {ways})"


def _files(source: Source) -> tuple[list[Path], list[Path]]:
    """The training files, and those held out."""
    if source.data_dir is None and source.train_file is None:
        raise ValueError(
            "--task jsonl needs --data_dir: pass a folder with train.jsonl, or one file."
        )
    folder = Path(source.data_dir or "")
    if folder.is_file():
        if source.train_file is not None:
            raise ValueError(
                f"Both --data_dir {folder} and --train_file {source.train_file} name a training "
                f"file: pass one of them."
            )
        return [folder], [] if source.test_file is None else [Path(source.test_file)]
    train, held_out = _of_folder(folder) if source.data_dir is not None else ([], [])
    if source.train_file is not None:
        train = [folder / source.train_file]
    held_out = [path for path in held_out if path not in train]
    if source.test_file is not None:
        held_out = [folder / source.test_file]
    if not train:
        raise ValueError(
            f"There is no file {folder / 'train.jsonl'}: check the path, or name one of the "
            "folder's files by --train_file."
        )
    return train, held_out


def _of_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of a folder by what their names say."""
    files = [
        path
        for path in (sorted(folder.iterdir()) if folder.is_dir() else ())
        if path.is_file() and _DATA_FILE.fullmatch(path.name)
    ]
    words = {path: set(re.split(r"[^a-z]+", path.name.lower())) for path in files}
    groups = [[path for path in files if name in words[path]] for name in HELD_OUT]
    held_out = next(filter(None, groups), [])
    others = [path for path in files if not any(path in group for group in groups)]
    train = [path for path in files if words[path] & {"train", "training"}] or others
    plain = [[p for p in files if p.name == f"{name}.jsonl"] for name in ("train", "test")]
    return plain[0] or train, plain[1] or held_out


def _form_of(line: Line, source: Source) -> Form:
    """The form that a row's fields have."""
    prompt, target = source.prompt_field, source.target_field
    if prompt is not None and target is not None:
        words = f"{prompt!r} is the prompt and {target!r} what is learnt"
        return Form(needs=(prompt, target), words=words, example=_of_fields)
    has = {name for name, value in line.fields.items() if value is not None}
    for names in (has, line.fields.keys()):  # null may stand for absent, where another form fits
        if form := next((form for form in FORMS if names >= {*form.needs}), None):
            return form
    inner = [repr(name) for name, value in line.fields.items() if isinstance(value, dict)]
    raise line.error(
        "the fields are of no known form ("
        + "; ".join(" and ".join(map(repr, form.needs)) for form in FORMS)
        + "): pass --prompt_field and --target_field, each one of "
        + f"{line.field_names()}{', and text, unlike the objects in ' * bool(inner)}"
        + f"{', '.join(inner)}."
    )


def _of_fields(line: Line, source: Source, told: Told) -> Example:
    prompt, target = str(source.prompt_field), str(source.target_field)
    return Example(prompt=line.text(prompt), target=line.text(target), place=line.place)


def _of_instruction(line: Line, source: Source, told: Told) -> Example:
    given = line.text("input") if line.fields.get("input") else ""
    prompt = _ALPACA.format(
        paired=_PAIRED if given else "",
        instruction=line.text("instruction"),
        input=f"### Input:\n{given}\n\n" if given else "",
    )
    return Example(prompt=prompt, target=line.text("output"), place=line.place)


def _of_text(line: Line, source: Source, told: Told) -> Example:
    return PlainText(target=line.text("text"), place=line.place)


FORMS = (
    Form(needs=("messages",), takes=("tools",), words="chat messages", example=of_messages),
    Form(
        needs=("conversations",),
        takes=("system", "tools"),
        words="conversations in ShareGPT's form",
        example=of_messages,
    ),
    Form(
        needs=("prompt", "completion"),
        takes=("tools",),
        words="prompts and completions, of which the latter are learnt",
        example=of_pair,
    ),
    Form(
        needs=("instruction", "output"),
        takes=("input",),
        words="instructions in Alpaca's form and prompt",
        example=_of_instruction,
    ),
    Form(
        needs=("text", "label"),
        takes=("text_pair",),
        words="texts with labels, which are classified",
        example=None,
    ),
    Form(needs=("text",), words="plain texts, with the loss on all of each", example=_of_text),
)
