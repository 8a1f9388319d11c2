"""The samples file: what reading refuses, and what a run goes on with."""

import json
from dataclasses import asdict

import pytest

from gem_ds.evaluate.generation import Completion, Request
from gem_ds.evaluate.samples import SampleLog, read_samples
from tests.tiny_evaluation import REFUSED, make_sample, refusal

SETTINGS = {"model": "m", "seed": 0, "stop_strings": ["x"]}
TEXT = " é\n\u2028 1"


def line(task_id="a", sample=0, **fields) -> dict:
    return asdict(make_sample(task_id, sample, TEXT, settings=SETTINGS)) | fields


@pytest.fixture
def path(tmp_path):
    return tmp_path / "samples.jsonl"


def write(path, *lines) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines))


def test_samples_are_read_in_the_order_of_the_problems(path):
    write(path, line("b", 1), line("a", 1), line("b", 0), line("a", 0))
    found = read_samples(path, ["b", "a"])
    assert [sample.key for sample in found] == [("b", 0), ("b", 1), ("a", 0), ("a", 1)]
    assert (found[0].completion, found[0].settings) == (TEXT, SETTINGS)


def test_a_problem_without_samples_may_be_allowed(path):
    write(path, line("a"), line("a", 1), line("b"))
    found = read_samples(path, ["a", "b", "c"], allow_missing=True)
    assert [sample.key for sample in found] == [("a", 0), ("a", 1), ("b", 0)]


@pytest.mark.parametrize(("changes", "message"), REFUSED["samples"])
def test_a_file_that_cannot_be_scored_is_refused_in_one_sentence(path, changes, message):
    write(path, *(line() | change for change in changes))
    told = refusal(read_samples, path, ["a", "b"])
    assert message in told
    assert "samples.jsonl" in told


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"task_id": "a", "sam', "line 2: this is not JSON"),
        (b'{"task_id": "b"}', "line 2: there is no field 'prompt'"),
        (b"[1]", "line 2: each line must be a JSON object, not a list"),
        (b'{"task_id": "a", "sample": ' + b"1" * 5000 + b"}\n", "line 2: this JSON has a number"),
        (b"[" * 100_000 + b"\n", "line 2: this JSON has"),
    ],
    ids=range(5),
)
def test_a_line_that_is_cut_off_or_damaged_is_named_and_a_missing_file(path, content, message):
    assert "There is no file" in refusal(read_samples, path, ["a"])
    write(path, line("b"))
    path.write_bytes(path.read_bytes() + content)
    assert f"samples.jsonl, {message}" in refusal(read_samples, path, ["b"])


# A run's own file

PROMPTS = {"a": "prompt of a", "b": [{"role": "user", "content": "b?"}], "c": "prompt of c"}
KEYS = [(task, number) for task in PROMPTS for number in range(2)]


def open_log(path, *, overwrite=False, **changes) -> SampleLog:
    options = {"prompts": PROMPTS, "num_samples": 2, "settings": SETTINGS} | changes
    return SampleLog(path, *options.values(), overwrite=overwrite)


def fill(log: SampleLog, keys=KEYS) -> None:
    for key in keys:
        request = Request(key=key, prompt_ids=[1], limit=9)
        log.append([(request, Completion(text=f" {key}", num_tokens=2, finish_reason="eos"))])


@pytest.fixture
def whole(tmp_path) -> bytes:
    """The file of a run that nothing disturbed."""
    path = tmp_path / "whole.jsonl"
    log = open_log(path)
    fill(log)
    log.finish()
    return path.read_bytes()


def test_the_finished_file_does_not_tell_the_order_of_the_samples(path, whole):
    log = open_log(path)
    fill(log, [KEYS[i] for i in (4, 0, 5, 3, 1, 2)])
    assert path.read_bytes() != whole
    assert [sample.key for sample in log.finish()] == KEYS
    assert path.read_bytes() == whole
    assert [sample.key for sample in read_samples(path, list(PROMPTS))] == KEYS


def test_a_run_killed_at_any_byte_goes_on_to_the_same_file(path, whole):
    for length in range(0, len(whole) + 1, 29):
        path.write_bytes(whole[:length])
        log = open_log(path)
        assert len(log.samples) == whole[:length].count(b"\n")
        assert path.read_bytes() == whole[:length], "nothing is written before there is a sample"
        fill(log)  # passes over what is there
        log.finish()
        assert path.read_bytes() == whole


def test_a_run_that_is_begun_anew_leaves_the_old_file_until_it_has_a_sample(path, whole):
    path.write_bytes(whole)
    log = open_log(path, overwrite=True, settings=SETTINGS | {"seed": 1})
    assert log.samples == {}
    assert path.read_bytes() == whole
    fill(log, [("b", 1)])
    assert path.read_text().count("\n") == 1


@pytest.mark.parametrize(("changes", "message"), REFUSED["samples_of_another_run"])
def test_the_samples_of_another_run_are_refused_and_kept(path, whole, changes, message):
    path.write_bytes(whole)
    told = refusal(open_log, path, **changes)
    assert message in told
    assert "overwrite_output_dir" in told
    assert path.read_bytes() == whole


def test_damage_within_a_run_is_named(path, whole):
    first, second, third, *_ = whole.splitlines(keepends=True)
    path.write_bytes(first + second[:20] + b"\n" + third)
    assert "line 2: this is not JSON" in refusal(open_log, path)
    path.write_bytes(first + first)
    assert "line 2: sample 0 of 'a' stands in line 1 already" in refusal(open_log, path)


def test_a_rank_that_does_not_write_knows_the_keys_only():
    assert open_log(None).keys == KEYS
    assert open_log(None).samples == {}
