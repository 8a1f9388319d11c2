"""The file that joins sampling and scoring: one line per sample, read with errors that name it.

    samples.jsonl    {"task_id": "gsm8k/test/17", "sample": 0, "prompt": ..., "completion": ...,
                      "finish_reason": "stop", "num_tokens": 93, "settings": {...}}

`settings` is all that decides a sample beside its prompt and its number (model, delta, seed,
temperature, ...; `evaluate.sampling` writes it), so that a line tells by itself what it is, and a
run knows whether it may go on with a file that another left.

While a run is at work lines are appended as samples are finished; a killed run leaves whole lines
and perhaps a part of one. When all are there, the file is put into the order of tasks and sample
numbers, in one step, so that it does not tell how it came about.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gem_ds.data.tasks.lines import Line, parse_jsonl, read_jsonl
from gem_ds.evaluate.generation import Completion, Key, Prompt, Request
from gem_ds.files.atomic import atomic_write

SAMPLES_FILE = "samples.jsonl"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One line: a completion of a prompt, raw, up to the stop string or eos."""

    task_id: str
    sample: int
    prompt: Prompt
    completion: str
    finish_reason: str
    num_tokens: int
    settings: dict[str, Any]

    @property
    def key(self) -> Key:
        """The task id and the sample's number."""
        return self.task_id, self.sample

    def line(self) -> bytes:
        """As it stands in the file."""
        return (json.dumps(asdict(self)) + "\n").encode()


def read_samples(
    path: Path, task_ids: Collection[str], *, allow_missing: bool = False
) -> list[Sample]:
    """The samples of a file, in the order of `task_ids`, its problems, and of their numbers.

    `allow_missing` accepts a problem without samples, or with fewer than another one. Samples of
    several runs, whose score would be of no model, are refused.
    """
    samples = _unique([(line, _sample(line)) for line in read_jsonl(path)])
    place = {task_id: i for i, task_id in enumerate(task_ids)}
    for sample in samples:
        if sample.task_id not in place:
            raise ValueError(
                f"{path} holds samples of {sample.task_id!r}, which is no problem of this task: "
                "pass the samples of this task and split."
            )
    num_samples = 1 + max(sample.sample for sample in samples)
    total, there = len(place) * num_samples, {sample.key for sample in samples}
    wanted = ((task_id, i) for task_id in place for i in range(num_samples))
    if not allow_missing and (key := next((k for k in wanted if k not in there), None)):
        raise ValueError(
            f"{path} lacks {total - len(there)} of {total} samples, for example sample {key[1]} of "
            f"{key[0]!r}: sample again with the same flags to complete it, or pass --limit for the "
            "first problems alone or --allow_missing."
        )
    samples.sort(key=lambda sample: (place[sample.task_id], sample.sample))
    for sample in samples:
        if sample.settings != samples[0].settings:
            raise ValueError(
                f"{path} mixes runs: sample {sample.sample} of {sample.task_id!r} was drawn with "
                "other settings than the first one; keep those of one run."
            )
    return samples


class SampleLog:
    """The samples file of a run: what an earlier part of it left, and what is added now.

    The folder of `path` must exist before the first `append`; where it is None, a rank does not
    write, and knows the keys only. Prompts are by task id, in the order of the finished file. With
    `overwrite` the file is deleted with the first `append`.
    """

    def __init__(
        self,
        path: Path | None,
        prompts: Mapping[str, Prompt],
        num_samples: int,
        settings: Mapping[str, Any],
        *,
        overwrite: bool = False,
    ) -> None:
        self._path = path
        self._settings = json.loads(json.dumps(settings))  # as it comes back from the file
        self._prompts = prompts
        self.keys: list[Key] = [(task, i) for task in prompts for i in range(num_samples)]
        self.samples: dict[Key, Sample] = {}
        self._length = 0  # bytes of whole lines
        if path is not None and path.exists() and not overwrite:
            self._take_up(path, path.read_bytes())

    def append(self, answers: Iterable[tuple[Request, Completion]]) -> None:
        """Add finished samples, so that a kill loses none; those that are there are passed over."""
        assert self._path is not None, "this rank does not write"
        lines = []
        for request, completion in answers:
            if request.key not in self.samples:
                task_id, number = request.key
                self.samples[request.key] = sample = Sample(
                    task_id=task_id,
                    sample=number,
                    prompt=self._prompts[task_id],
                    completion=completion.text,
                    finish_reason=completion.finish_reason,
                    num_tokens=completion.num_tokens,
                    settings=self._settings,
                )
                lines.append(sample.line())
        with self._path.open("ab") as file:
            file.truncate(self._length)  # drops the part of a line that a killed run left
            file.write(b"".join(lines))
        self._length += sum(map(len, lines))

    def finish(self) -> list[Sample]:
        """Put the file into order; returns the samples in this order."""
        assert self._path is not None, "this rank does not write"
        assert len(self.samples) == len(self.keys), "samples are missing"
        samples = [self.samples[key] for key in self.keys]
        payload = b"".join(sample.line() for sample in samples)
        if not self._path.exists() or self._path.read_bytes() != payload:
            atomic_write(self._path, lambda path: path.write_bytes(payload))
        return samples

    def _take_up(self, path: Path, content: bytes) -> None:
        """Keep the samples that an earlier part of this run left."""
        self._length = content.rfind(b"\n") + 1
        read = [(line, _sample(line)) for line in parse_jsonl(path, content[: self._length])]
        wanted = set(self.keys)
        for line, sample in read:
            foreign = _differing(sample.settings, self._settings)
            if not foreign and sample.key not in wanted:
                foreign = f"sample {sample.sample} of {sample.task_id!r}"
            if not foreign and sample.prompt != self._prompts[sample.task_id]:
                foreign = f"another prompt for {sample.task_id!r}"
            if foreign:
                raise line.error(
                    f"the folder holds another run, with {foreign}: pass the flags of that run to "
                    "continue it, --overwrite_output_dir to delete it, or another --output_dir."
                )
        self.samples = {sample.key: sample for sample in _unique(read)}


def _sample(line: Line) -> Sample:
    """The sample in a line, with each field of its type."""
    prompt = line.fields.get("prompt")
    if not isinstance(prompt, list):
        prompt = line.text("prompt")
    settings = line.fields.get("settings")
    if not isinstance(settings, dict):
        raise line.error("the field 'settings' must be there and be an object.")
    return Sample(
        task_id=line.text("task_id"),
        sample=_count(line, "sample"),
        prompt=prompt,
        completion=line.text("completion"),
        finish_reason=line.text("finish_reason"),
        num_tokens=_count(line, "num_tokens"),
        settings=settings,
    )


def _count(line: Line, field: str) -> int:
    value = line.fields.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise line.error(f"the field {field!r} must be there and be a whole number from 0.")
    return value


def _unique(read: list[tuple[Line, Sample]]) -> list[Sample]:
    """The samples, of which no two may be the same one."""
    first: dict[Key, int] = {}
    for line, sample in read:
        if sample.key in first:
            raise line.error(
                f"sample {sample.sample} of {sample.task_id!r} stands in line "
                f"{first[sample.key]} already: remove one of the two lines."
            )
        first[sample.key] = line.number
    return [sample for _, sample in read]


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first setting that differs, for the reader; empty if none does."""
    for name in [*wanted, *found]:
        if found.get(name) != wanted.get(name):
            return f"{name} {json.dumps(found.get(name))} and not {json.dumps(wanted.get(name))}"
    return ""
