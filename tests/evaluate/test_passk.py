"""The whole of pass@k on the embedded model and the bundled tasks, and what is refused."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from gem_ds.data.tasks.mbpp import load_problems
from gem_ds.evaluate import passk, score
from gem_ds.evaluate.sandbox import Program, SandboxUnavailableError, Verdict
from launch.demo import programs
from tests.runs import rows_of
from tests.tiny_evaluation import REFUSED, make_sample, refusal
from tests.tiny_model import one_rank

DEMO = Path(programs.__file__).parent
HEADER = ("--prompt_template", "{header}")
WHOLE = ("--n", "3", "--k", "1", "3", "--limit", "22", *HEADER)
FILES = ("samples.jsonl", "results.json", "verdicts.jsonl")


def flags(output_dir: Path, *more: str) -> list[str]:
    return [
        *("--model_name_or_path", str(DEMO / "model")),
        *("--data_dir", str(DEMO / "programs")),
        *("--output_dir", str(output_dir)),
        *("--dtype", "float32", "--max_new_tokens", "32", "--disable_tqdm"),
        *more,
    ]


def by_hand(program: str, tests: tuple[str, ...]) -> str:
    """Whether a program passes, by running it in a Python of its own."""
    text = "\n".join([program, *tests])
    done = subprocess.run([sys.executable, "-I", "-c", text], capture_output=True, timeout=60)
    return "failed" if done.returncode else "passed"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More are no faster on so small a model, and wait for each other on a busy machine."""
    with one_rank():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, sandbox):
    """The folder of a run, and what its `main` returned."""
    folder = tmp_path_factory.mktemp("passk") / "out"
    return folder, passk.main(flags(folder, *WHOLE))


def test_programs_are_sampled_judged_and_scored(finished):
    folder, results = finished
    problems = load_problems(DEMO / "programs").problems
    samples, verdicts = rows_of(folder / "samples.jsonl"), rows_of(folder / "verdicts.jsonl")
    keys = [(f"mbpp/{i}", number) for i in range(11, 33) for number in range(3)]
    for rows in (samples, verdicts):
        assert [(row["task_id"], row["sample"]) for row in rows] == keys
    statuses = {}
    for sample, verdict in zip(samples, verdicts, strict=True):
        problem = problems[int(sample["task_id"].removeprefix("mbpp/"))]
        program = verdict["program"]
        assert program.startswith(sample["prompt"])
        if program not in statuses:
            statuses[program] = by_hand(program, problem.tests)
        assert verdict["status"] == statuses[program], program
    assert set(statuses.values()) == {"passed", "failed"}
    right = [sum(v["status"] == "passed" for v in verdicts[i : i + 3]) for i in range(0, 66, 3)]
    assert results["scores"]["pass@1"]["score"] == pytest.approx(sum(right) / 66)
    assert results["scores"]["pass@3"]["score"] == pytest.approx(sum(map(bool, right)) / 22)


def test_results_say_what_they_rest_on(finished):
    folder, results = finished
    assert json.loads((folder / "results.json").read_text()) == results
    expected = {"task": "mbpp", "n": 3, "k": [1, 3], "num_problems": 22, "without_samples": []}
    assert {name: results[name] for name in expected} == expected
    assert results["isolation"]
    protocol = {"prompt_template": "{header}", "split": "test", "num_fewshot": 0}
    assert {name: results["protocol"][name] for name in protocol} == protocol
    assert results["sampling"]["temperature"] == 0.8
    assert results["data_sha256"] == {"mbpp.jsonl": load_problems(DEMO / "programs").sha256}


def test_scoring_again_gives_the_same_files(finished, tmp_path):
    """Byte for byte: else results would depend on which program wrote them."""
    folder, results = finished
    again = [
        *("--task", "mbpp", "--data_dir", str(DEMO / "programs"), "--limit", "22"),
        *("--k", "1", "3", "--output_dir", str(tmp_path), "--disable_tqdm", *HEADER),
    ]
    assert score.main([*again, str(folder / "samples.jsonl")]) == results
    for name in FILES[1:]:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_equal_programs_of_one_problem_are_run_once():
    def judge(programs):
        for job in programs:
            jobs.append(job)
            yield Verdict(job.program, "box", f"by {job.tests[0]}", job.program == "timeout")

    jobs = []
    texts = [("a", 0, "passed"), ("a", 1, "timeout"), ("a", 2, "passed"), ("b", 0, "passed")]
    benchmark = SimpleNamespace(program=lambda task_id, text: Program(text, (task_id,)))
    limits = {"timeout": 1.5, "memory_mb": 64}
    judging = passk.JudgingArguments(**limits)
    samples = [make_sample(*text) for text in texts]
    entries = passk.verdicts_of(samples, benchmark, SimpleNamespace(check_all=judge), judging)
    distinct = [("passed", "a"), ("timeout", "a"), ("passed", "b")]
    assert jobs == [Program(text, (task_id,), **limits) for text, task_id in distinct]
    assert [(e["task_id"], e["sample"], e["status"]) for e in entries] == texts
    told = {"status": "timeout", "detail": "by a", "in_jail": True, "program": "timeout"}
    assert entries[1] == {"task_id": "a", "sample": 1, **told}


def test_without_k_it_is_what_the_samples_allow(tmp_path, capsys, sandbox):
    once = ("--n", "1", "--temperature", "0", "--limit", "3", *HEADER)
    results = passk.main(flags(tmp_path, *once))
    assert results["scores"] == {"pass@1": {"score": 1.0, "confidence_interval": [1.0, 1.0]}}
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "pass@1 = 100.0 % (100.0 to 100.0) on 3 problems, n = 1"
    assert printed[1].startswith("programs: 3 passed, 0 failed, 0 timeout, 0 crashed; isolation: ")


def test_packages_that_programs_may_import_are_named_in_results_and_verdicts(
    finished, tmp_path, monkeypatch
):
    """The same samples, whose programs import numpy: wrong without it."""
    samples = (finished[0] / "samples.jsonl").read_bytes()
    (tmp_path / "samples.jsonl").write_bytes(samples)
    extracted = passk.mbpp.Mbpp.program

    def importing(self, task_id, completion):
        program = extracted(self, task_id, completion)
        return replace(program, program=f"import numpy\n{program.program}")

    monkeypatch.setattr(passk.mbpp.Mbpp, "program", importing)
    scored = [
        *("--task", "mbpp", "--data_dir", str(DEMO / "programs"), "--limit", "22", "--k", "1"),
        *("--disable_tqdm", *HEADER, str(tmp_path / "samples.jsonl")),
    ]
    without = score.main(scored)
    assert without["scores"]["pass@1"]["score"] == 0
    assert "sandbox_packages" not in without["protocol"]
    results = score.main([*scored[:-1], "--sandbox_packages", "numpy", scored[-1]])
    assert results["scores"]["pass@1"] == finished[1]["scores"]["pass@1"]
    named = {"numpy": metadata.version("numpy")}
    assert results["protocol"]["sandbox_packages"] == named
    assert all(row["sandbox_packages"] == named for row in rows_of(tmp_path / "verdicts.jsonl"))


@pytest.fixture
def no_model(monkeypatch):
    """Sampling, and so loading a model, is a failure."""

    def sample_all(*_, **__):
        raise AssertionError("refused too late")

    monkeypatch.setattr(passk, "sample_all", sample_all)


@pytest.mark.parametrize(("more", "message"), REFUSED["passk"])
def test_bad_flags_are_refused_in_one_sentence_before_a_model_is_loaded(
    no_model, tmp_path, more, message
):
    assert message in refusal(passk.main, flags(tmp_path / "out", *more.split()))
    assert not (tmp_path / "out").exists()


def test_a_host_without_a_sandbox_is_told_before_a_model_is_loaded(no_model, tmp_path, monkeypatch):
    asked = []

    def unavailable(allow_weak):
        asked.append(allow_weak)
        raise SandboxUnavailableError("This host has no namespaces: install bubblewrap.")

    monkeypatch.setattr(passk, "best_level", unavailable)
    for more in ((), ("--allow-weak-sandbox",)):
        with pytest.raises(SandboxUnavailableError):
            passk.main(flags(tmp_path, *HEADER, *more))
    assert asked == [False, True]


def test_ranks_other_than_the_first_sample_and_judge_nothing(tmp_path, monkeypatch):
    def unavailable(*_, **__):
        raise AssertionError("a sandbox per rank")

    for name in ("Sandbox", "best_level"):
        monkeypatch.setattr(passk, name, unavailable)
    monkeypatch.setattr(passk, "sample_all", lambda *_, **__: None)
    monkeypatch.setenv("RANK", "1")
    assert passk.main(flags(tmp_path, *HEADER)) == {}
    assert list(tmp_path.iterdir()) == []


def test_the_sandbox_is_what_the_flags_ask_for_and_fewer_workers_are_said(monkeypatch, capsys):
    monkeypatch.setattr(passk, "Sandbox", dict)
    monkeypatch.setattr(passk, "num_processors", lambda: 3)
    for num_workers in (2, 3, 8):
        judging = passk.JudgingArguments(num_workers=num_workers, allow_weak_sandbox=True)
        opened = {"num_workers": num_workers, "allow_weak": True, "packages": ()}
        assert judging.open_sandbox() == opened
    told = capsys.readouterr().err
    assert told.startswith("--num_workers 8 is lowered to 3, the number of processors: ")
    assert told.count("\n") == 1
