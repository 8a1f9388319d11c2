"""Scoring a file of samples without a model: what it gives, and the files that it refuses."""

import json
from pathlib import Path

import pytest

from gem_ds.data.tasks.mbpp import load_problems
from gem_ds.evaluate import gsm8k, score
from gem_ds.evaluate.mbpp import few_shot_prompt
from launch.demo import task

DEMO = Path(task.__file__).parent

SETTINGS = {"model": "m", "temperature": 0.8}


def row(task_id: int, text="Add.", test_list=("assert f(1) == 2",)) -> dict:
    return {
        "text": text,
        "code": "def f(x):\n    return x + 1",
        "task_id": task_id,
        "test_setup_code": "",
        "test_list": list(test_list),
        "challenge_test_list": [],
    }


def sample(folder: Path, task_id: int, number: int, **changes) -> dict:
    """A right sample of a problem, asked without shots."""
    problem = load_problems(folder).problems[task_id]
    return {
        "task_id": f"mbpp/{task_id}",
        "sample": number,
        "prompt": few_shot_prompt(problem, []),
        "completion": "def f(x):\n    return x + 1\n",
        "finish_reason": "stop",
        "num_tokens": 9,
        "settings": SETTINGS,
    } | changes


@pytest.fixture
def folder(tmp_path):
    """Three problems, and the three that prompts show."""
    rows = [row(i, text=f"Task {i}.") for i in (2, 3, 4, 11, 12, 13)]
    (tmp_path / "mbpp.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def write(folder: Path, *lines: dict | str) -> Path:
    path = folder / "samples.jsonl"
    texts = (line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    path.write_text("".join(texts))
    return path


def run(folder: Path, *more: str):
    data = ("--task", "mbpp", "--data_dir", str(folder), "--disable_tqdm")
    return score.main([*data, *more, str(folder / "samples.jsonl")])


def test_each_problem_counts_with_its_own_samples(folder, sandbox):
    wrong = {"completion": "def f(x):\n    return x"}
    write(
        folder,
        *(sample(folder, 13, i) for i in (1, 0)),
        *(sample(folder, 11, i, **(wrong if i else {})) for i in (0, 1)),
        *(sample(folder, 12, i, **wrong) for i in (0, 1)),
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
    prompts = {i: few_shot_prompt(problems[i], shots) for i in (11, 12, 13)}
    write(folder, *(sample(folder, i, 0, prompt=prompts[i]) for i in prompts))
    assert run(folder)["protocol"]["num_fewshot"] == 3
    write(
        folder,
        sample(folder, 11, 0),
        *(sample(folder, i, 0, prompt=prompts[i]) for i in (12, 13)),
    )
    with pytest.raises(ValueError, match="prompt of mbpp/12 is not what these data and 0 worked"):
        run(folder)


def test_missing_problems_count_as_zero_only_when_that_is_asked_for(folder, capsys, sandbox):
    write(folder, sample(folder, 11, 0), sample(folder, 13, 0))
    with pytest.raises(ValueError, match=r"lacks 1 of 3 samples, for example .*mbpp/12"):
        run(folder)
    results = run(folder, "--allow_missing")
    assert results["scores"]["pass@1"]["score"] == pytest.approx(2 / 3)
    assert results["without_samples"] == ["mbpp/12"]
    assert "without samples, counted as zero: mbpp/12" in capsys.readouterr().out
    write(folder, sample(folder, 11, 0), sample(folder, 12, 0))
    assert run(folder, "--limit", "2")["num_problems"] == 2


def test_a_file_of_one_sample_a_problem_has_no_pass_at_10(folder, sandbox):
    write(folder, *(sample(folder, i, 0) for i in (11, 12, 13)))
    assert list(run(folder)["scores"]) == ["pass@1"]
    with pytest.raises(ValueError, match=r"pass@10 needs at least 10 samples .* has 1: draw"):
        run(folder, "--k", "10")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_id": "mbpp/14"}, "holds samples of 'mbpp/14', which is no problem of"),
        ({"task_id": "mbpp/12"}, r"line 3: .*'mbpp/12'"),
        ({"settings": SETTINGS | {"temperature": 0.2}}, "mixes runs: sample 0 of 'mbpp/13' was"),
        (
            {"prompt": "Do."},
            "The prompt of mbpp/13 is not what these data and 0 worked problems give",
        ),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(folder, changes, message):
    """What a line may be at all is told in test_samples.py."""
    write(folder, *(sample(folder, i, 0) for i in (11, 12)), sample(folder, 13, 0) | changes)
    with pytest.raises(ValueError, match=message) as caught:
        run(folder)
    assert "\n" not in str(caught.value)
    assert not (folder / "results.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [(("--limit", "0"), "--limit must be"), (("--timeout", "-1"), "timeout must be")],
)
def test_bad_flags_are_refused(folder, more, message):
    write(folder, *(sample(folder, i, 0) for i in (11, 12, 13)))
    with pytest.raises(ValueError, match=message):
        run(folder, *more)


def test_a_missing_file_is_named(folder):
    with pytest.raises(ValueError, match=r"There is no file .*samples\.jsonl"):
        run(folder)


def test_gsm8k_scores_are_those_of_the_evaluator(tmp_path):
    model, data = ("--model_name_or_path", str(DEMO / "model")), ("--data_dir", str(DEMO / "task"))
    out = ("--output_dir", str(tmp_path / "out"), "--max_new_tokens", "8")
    shared = (*data, "--limit", "3", "--disable_tqdm")
    results = gsm8k.main([*model, *out, *shared])
    path = tmp_path / "out" / "samples.jsonl"
    again = score.main(["--task", "gsm8k", "--output_dir", str(tmp_path), *shared, str(path)])
    del results["seconds"]  # of sampling
    assert again == results
    verdicts = (tmp_path / "verdicts.jsonl").read_bytes()
    assert verdicts == (tmp_path / "out" / "verdicts.jsonl").read_bytes()


def right_answers() -> list[dict]:
    """What a perfect model would write on the first problems of the bundled task."""
    problems = gsm8k.load(str(DEMO / "task"), limit=3).test
    return [
        {
            "task_id": name,
            "sample": 0,
            "prompt": problem.prompt,
            "completion": problem.target,
            "finish_reason": "eos",
            "num_tokens": 9,
            "settings": SETTINGS,
        }
        for name, problem in problems.items()
    ]


def score_gsm8k(folder: Path, *more: str):
    data = ("--task", "gsm8k", "--data_dir", str(DEMO / "task"), "--limit", "3", "--disable_tqdm")
    return score.main([*data, *more, str(folder / "samples.jsonl")])


def test_gsm8k_counts_what_is_missing_as_wrong_when_that_is_asked_for(tmp_path):
    rows = right_answers()
    write(tmp_path, *rows)
    exact_match = score_gsm8k(tmp_path)["exact_match"]
    assert [rule["correct"] for rule in exact_match.values()] == [3, 3, 3]
    write(tmp_path, rows[2], rows[0])
    with pytest.raises(ValueError, match="lacks 1 of 3 samples"):
        score_gsm8k(tmp_path)
    results = score_gsm8k(tmp_path, "--allow_missing")
    assert [rule["accuracy"] for rule in results["exact_match"].values()] == [2 / 3] * 3
    assert results["without_samples"] == ["gsm8k/test/1"]


@pytest.mark.parametrize("more", [("--k", "1"), ("--sanitized",), ("--timeout", "9")])
def test_flags_of_the_other_task_are_refused(tmp_path, more):
    write(tmp_path, *right_answers())
    with pytest.raises(ValueError, match=f"{more[0]} has no meaning for --task gsm8k"):
        score_gsm8k(tmp_path, *more)
