"""Scoring a file of samples without a model: what it gives, and the files that it refuses."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from gem_ds.data.tasks.mbpp import load_problems
from gem_ds.evaluate import gsm8k, score
from gem_ds.evaluate.evaluator import folder_of_one_evaluation
from gem_ds.evaluate.mbpp import few_shot_prompt
from gem_ds.train.output_dir import output_dir_of_one_run
from launch.demo import task
from tests.tiny_evaluation import REFUSED, make_sample, refusal
from tests.tiny_model import write_jsonl

DEMO = Path(task.__file__).parent
SETTINGS = {"model": "m", "temperature": 0.8}
RIGHT, WRONG = "def f(x):\n    return x + 1\n", "def f(x):\n    return x"


@pytest.fixture
def folder(tmp_path):
    """Three problems, and the three that prompts show."""
    row = {"code": RIGHT, "test_setup_code": "", "test_list": ["assert f(1) == 2"]}
    rows = [row | {"task_id": i, "text": f"Task {i}."} for i in (2, 3, 4, 11, 12, 13)]
    write_jsonl(tmp_path / "mbpp.jsonl", rows)
    return tmp_path


def sample(folder: Path, task_id: int, number: int = 0, text: str = RIGHT, **changes) -> dict:
    """A sample of a problem, asked without shots."""
    prompt = few_shot_prompt(load_problems(folder).problems[task_id], [])
    fields = {"prompt": prompt, "settings": SETTINGS}
    return asdict(make_sample(f"mbpp/{task_id}", number, text, **fields)) | changes


def write(folder: Path, *lines: dict) -> None:
    write_jsonl(folder / "samples.jsonl", list(lines))


def run(folder: Path, *more: str):
    data = ("--task", "mbpp", "--data_dir", str(folder), "--disable_tqdm")
    return score.main([*data, *more, str(folder / "samples.jsonl")])


def test_each_problem_counts_with_its_own_samples(folder, sandbox):
    write(
        folder,
        *(sample(folder, 13, i) for i in (1, 0)),
        *(sample(folder, 11, i, WRONG if i else RIGHT) for i in (0, 1)),
        *(sample(folder, 12, i, WRONG) for i in (0, 1)),
    )
    results = run(folder, "--k", "1", "2")
    assert results["scores"]["pass@1"]["score"] == pytest.approx(0.5)
    assert results["scores"]["pass@2"]["score"] == pytest.approx(2 / 3)
    assert results["verdicts"]["passed"] == 3
    assert results["protocol"]["num_fewshot"] == 0
    assert results["sampling"] == SETTINGS
    assert json.loads((folder / "results.json").read_text()) == results
    assert len((folder / "verdicts.jsonl").read_text().splitlines()) == 6


def test_the_number_of_shots_is_seen_in_the_prompts(folder, sandbox):
    problems = load_problems(folder).problems
    shots = [problems[i] for i in (2, 3, 4)]
    shown = [sample(folder, i, prompt=few_shot_prompt(problems[i], shots)) for i in (11, 12, 13)]
    write(folder, *shown)
    assert run(folder)["protocol"]["num_fewshot"] == 3
    write(folder, sample(folder, 11), *shown[1:])
    assert "prompt of mbpp/12 is not what these data and 0 worked" in refusal(run, folder)


def test_missing_problems_count_as_zero_only_when_that_is_asked_for(folder, capsys, sandbox):
    """And a file of one sample a problem has no pass@10."""
    write(folder, sample(folder, 11), sample(folder, 13))
    assert "lacks 1 of 3 samples, for example sample 0 of 'mbpp/12'" in refusal(run, folder)
    results = run(folder, "--allow_missing")
    assert list(results["scores"]) == ["pass@1"]
    assert results["scores"]["pass@1"]["score"] == pytest.approx(2 / 3)
    assert results["without_samples"] == ["mbpp/12"]
    assert "without samples, counted as zero: mbpp/12" in capsys.readouterr().out
    write(folder, sample(folder, 11), sample(folder, 12))
    assert run(folder, "--limit", "2")["num_problems"] == 2
    told = refusal(run, folder, "--limit", "2", "--k", "10")
    assert told.startswith("pass@10 needs at least 10 samples of a problem and mbpp/11 has 1: draw")


def test_bad_flags_and_a_missing_file_are_refused(folder):
    assert "There is no file" in refusal(run, folder)
    write(folder, *(sample(folder, i) for i in (11, 12, 13)))
    assert refusal(run, folder, "--limit", "0").startswith("--limit must be")
    assert refusal(run, folder, "--timeout", "-1").startswith("timeout must be")


def score_gsm8k(folder: Path, *more: str):
    data = ("--task", "gsm8k", "--data_dir", str(DEMO / "task"), "--limit", "3", "--disable_tqdm")
    return score.main([*data, *more, str(folder / "samples.jsonl")])


def test_gsm8k_scores_are_those_of_the_evaluator(tmp_path):
    out, more = tmp_path / "out", ("--max_new_tokens", "8", "--limit", "3", "--disable_tqdm")
    places = ("--data_dir", str(DEMO / "task"), "--output_dir", str(out))
    results = gsm8k.main(["--model_name_or_path", str(DEMO / "model"), *places, *more])
    del results["seconds"]  # of sampling
    assert score_gsm8k(out, "--output_dir", str(tmp_path)) == results
    assert (tmp_path / "verdicts.jsonl").read_bytes() == (out / "verdicts.jsonl").read_bytes()


@pytest.fixture
def right(tmp_path) -> list[dict]:
    """What a perfect model would write on the first problems of the bundled task."""
    problems = gsm8k.load(str(DEMO / "task"), limit=3).test
    lines = [
        asdict(make_sample(name, 0, problem.target, prompt=problem.prompt))
        for name, problem in problems.items()
    ]
    write(tmp_path, *lines)
    return lines


def test_a_folder_is_held_against_a_second_writer(tmp_path, right):
    before = (tmp_path / "samples.jsonl").read_bytes()
    asked = ("--model_name_or_path", "none", "--data_dir", str(DEMO / "task"), "--output_dir")
    with folder_of_one_evaluation(tmp_path):
        for write_too in (
            lambda: score_gsm8k(tmp_path),
            lambda: gsm8k.main([*asked, str(tmp_path), "--overwrite_output_dir"]),
            lambda: output_dir_of_one_run(tmp_path).__enter__(),
        ):
            assert "Another run" in refusal(write_too)
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]
    assert (tmp_path / "samples.jsonl").read_bytes() == before
    score_gsm8k(tmp_path)
    refusal(gsm8k.main, [*asked, str(tmp_path / "new"), "--num_fewshot", "-1"])
    assert not (tmp_path / "new").exists()  # what is refused leaves nothing behind


def test_gsm8k_counts_what_is_missing_as_wrong_when_that_is_asked_for(tmp_path, right):
    exact_match = score_gsm8k(tmp_path)["exact_match"]
    assert [rule["correct"] for rule in exact_match.values()] == [3, 3, 3]
    write(tmp_path, right[2], right[0])
    assert "lacks 1 of 3 samples" in refusal(score_gsm8k, tmp_path)
    results = score_gsm8k(tmp_path, "--allow_missing")
    assert [rule["accuracy"] for rule in results["exact_match"].values()] == [2 / 3] * 3
    assert results["without_samples"] == ["gsm8k/test/1"]


@pytest.mark.parametrize(("more", "message"), REFUSED["score_gsm8k"])
def test_flags_of_the_other_task_are_refused(tmp_path, right, more, message):
    assert message in refusal(score_gsm8k, tmp_path, *more.split())
