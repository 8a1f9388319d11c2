"""launch/compare.py with a stand-in for training: what runs, what is chosen, what is written."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from gem_ds.comparison import main as compare
from gem_ds.errors import Interrupted
from tests.deltas import mask_of
from tests.tiny_evaluation import refusal

pytestmark = pytest.mark.slow  # starts engines or programs

REPOSITORY = Path(__file__).resolve().parents[2]
FAKE = str(Path(__file__).with_name("fake_train.py"))
GRID = Path(__file__).with_name("grid.yaml").read_text(encoding="utf-8")
PNG = b"\x89PNG\r\n\x1a\n"

#: A stand-in for an evaluator: 3 of 4 problems right; it notes what it was told.
FAKE_EVAL = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[-1])
folder.mkdir(exist_ok=True)
(folder / "argv.json").write_text(json.dumps(sys.argv[1:]))
rows = [{"task_id": f"t/{i}", "status": "passed" if i else "failed"} for i in range(4)]
(folder / "verdicts.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(folder / "results.json").write_text(json.dumps({"scores": {"pass@1": {"score": 0.75}}}))
"""


class Setting:
    """A comparison in a folder of its own, and what its runs noted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        (folder / "data" / "rte").mkdir(parents=True)
        self.common: dict[str, Any] = {}
        self.content: dict[str, Any] = yaml.safe_load(GRID)["stand_in"]
        self.content |= {"output_dir": str(self.out), "program": FAKE, "common": self.common}

    @property
    def flags(self) -> list[str]:
        path = self.folder / "compare.yaml"
        path.write_text(yaml.safe_dump(self.content, sort_keys=False))
        return ["--config", str(path), "--data_dir", str(self.folder / "data")]

    def run(self) -> int:
        return compare.main(self.flags)

    def calls(self) -> list[str]:
        """The runs that were started since the last look."""
        path = self.folder / "calls.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def text(self, folder: str = "out") -> str:
        return (self.folder / folder / "table.md").read_text()

    def table(self) -> pd.DataFrame:
        return pd.read_csv(self.out / "table.csv").set_index(["task", "method"])


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls.txt"))
    monkeypatch.setenv("FAKE_HANG", str(tmp_path / "hang"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return Setting(tmp_path)


def test_the_rate_is_chosen_on_the_development_split_alone_and_a_later_start_runs_what_is_missing(
    setting,
):
    # The stand-in's test scores are better at every other rate: looking there would choose those.
    mask = mask_of([f"encoder.layer.{i}.attention.self.{m}.weight" for i in (0, 1) for m in "qv"])
    mask.save(setting.folder / "mask.safetensors")
    setting.common["mask_file"] = str(setting.folder / "mask.safetensors")
    assert setting.run() == 0
    assert setting.calls() == [
        *(f"rte gem {rate} 42 dev" for rate in ("0.001", "0.01", "0.1")),
        *(f"rte full {rate} 42 dev" for rate in ("0.0001", "0.001", "0.01")),
        *(f"rte gem 0.01 {seed} test" for seed in (42, 43, 44)),
        *(f"rte full 0.001 {seed} test" for seed in (42, 43, 44)),
    ]
    commands = json.loads((setting.out / "rte/gem/test/lr1e-02_seed43/cell.json").read_text())
    assert commands["train"].startswith(f"python {FAKE} --mask_file ")
    assert f"{setting.folder}/data/rte --seed 43 --learning_rate 1e-02 " in commands["train"]
    assert "--dev_examples 7 --evaluate_on test --output_dir" in commands["train"]
    for name in ("score_vs_parameters", "learning_rates", "budget_rte"):
        content = (setting.out / f"{name}.png").read_bytes()
        assert content.startswith(PNG)
        assert all(300 < int.from_bytes(content[i : i + 4]) < 3000 for i in (16, 20))  # pixels
    assert not list(setting.out.glob("rte/*/*/*/checkpoint-*"))
    kept = {path.parts[-3] for path in setting.out.glob("rte/*/*/*/delta.safetensors")}
    assert kept == {"test"}  # a search needs no weights
    before = setting.text()
    setting.run()
    assert setting.calls() == []
    assert setting.text() == before
    setting.content["seeds"] = [42, 43, 44, 45]
    path = setting.out / "rte/gem/test/lr1e-02_seed43/all_results.json"
    path.write_text(path.read_text()[:40])
    setting.run()
    assert setting.calls() == [
        *("rte gem 0.01 43 test", "rte gem 0.01 45 test", "rte full 0.001 45 test")
    ]
    setting.common["model_name_or_path"] = "other"
    assert "rte/gem/dev/lr1e-03_seed42 holds a run of another" in refusal(setting.run)
    del setting.common["model_name_or_path"]
    setting.content["dev_examples"] = 8
    assert "--dev_examples: 7, now 8): delete that folder, or ch" in refusal(setting.run)
    assert setting.calls() == []


def test_tables_hold_the_means_by_hand(setting):
    setting.content["methods"]["random"] = {"learning_rates": ["1e-2"]}
    setting.content["tasks"]["cola"] = {"flags": {"metric": "accuracy"}}
    setting.content |= {"num_parallel": 2, "devices": ["3", "5"]}
    assert setting.run() == 0
    table = setting.table()
    row = table.loc["rte", "gem"]
    assert (row["mean"], row["std"]) == pytest.approx((0.81, 0.01))  # 80, 81 and 82 of 100
    assert (row.metric, row.num_seeds, row.learning_rate) == ("accuracy", 3, 0.01)
    assert (row.dev_metric, row.dev_score) == ("accuracy", 0.9)
    assert table.dev_score.isna()["cola", "random"]  # a single rate is not searched
    for line in (
        "| gem | 81.0 ± 1.0 | 1e-02 | 1,000 | 0.1 % | 12 KiB | 3.0 GiB | 0.25 | 2.0 |",
        "| full | 81.0 ± 1.0 | 1e-03 | 1,000,000 | 100 % | 11 MiB | 3.0 GiB | 0.25 | 0.0 |",
        "| gem | 1e-03: 80.0 | **1e-02: 90.0** | 1e-01: 80.0 |",
        "| full | 0.0 | 0.0 to 0.0 |  |",  # right on the same examples
        "## Average over the tasks",
        "| random | 51.0 ± 1.0 | 0.1 % |",
    ):
        assert f"{line}\n" in setting.text()
    assert re.search(r"^\| random \| -30\.0 \| .* \| real \|$", setting.text(), re.MULTILINE)
    cells = pd.read_csv(setting.out / "cells.csv")
    assert list(cells.status) == ["finished"] * 2 * (6 + 9)
    # Runs at once share the machine.
    logs = [path.read_text().split() for path in setting.out.glob("*/*/*/*/log.txt")]
    assert {log[1] for log in logs} == {str(max(1, len(os.sched_getaffinity(0)) // 2))}
    assert {log[2] for log in logs} == {"3", "5"}


def test_a_failed_run_is_reported_and_the_others_go_on(setting, capsys):
    setting.common["fail"] = "gem 0.01 43 test"
    assert setting.run() == 1
    assert len(setting.calls()) == 12
    assert "FAILED: Error: the loss is not finite. (exit status 1)" in capsys.readouterr().out
    assert "| gem | 81.0 ± 1.4 (1 of 3 seeds failed) |" in setting.text()  # 80 and 82
    assert "| full | 0.0 | 0.0 to 0.0 |  |" in setting.text()  # on the two seeds that both have
    assert "rte gem at 1e-02, seed 43, test: Error: the loss is not finite." in setting.text()
    setting.run()
    assert setting.calls() == ["rte gem 0.01 43 test"]  # once more, and no other


def test_a_method_or_a_rate_that_fails_says_so(setting):
    setting.content["seeds"] = [42]
    setting.content["methods"]["random"] = {"learning_rates": ["1e-2"]}
    setting.common["fail"] = "random 0.01 42 test"
    assert setting.run() == 1
    line = "\n| random | failed | 1e-02 |  |  |  |  |  |  |\n"  # as many fields as others
    assert line in setting.text()
    assert "| full | 80.0 | 1e-03 |" in setting.text()  # a single seed has no deviation
    setting.content["output_dir"] = str(setting.folder / "other")
    del setting.content["methods"]["full"]
    setting.common["fail"] = "gem 0.01 42 dev"
    assert setting.run() == 1
    text = setting.text("other")
    assert "| gem | **1e-03: 80.0** | 1e-02: failed | 1e-01: 80.0 |" in text  # the smaller of two
    assert "The learning rate of gem lies at the edge of its grid" in text
    # The stand-in tells no loss on this task.
    setting.content |= {"output_dir": str(setting.folder / "lossless"), "choose_by": "loss"}
    assert setting.run() == 1
    assert " None (no whole results)" in setting.text("lossless")


def test_a_folder_of_something_else_is_left_alone(setting):
    folder = setting.out / "rte/gem/dev/lr1e-03_seed42"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    assert "holds files of something else" in refusal(setting.run)
    assert (folder / "thesis.tex").exists()


def test_flags_replace_what_the_file_says(setting):
    setting.content["tasks"] = {
        "rte": {"data_dir": "rte"},
        "wic": {"data_dir": "nowhere"},  # not asked for, so not missed
        "cola": {"flags": {"model_name_or_path": "of-the-task"}},
    }
    setting.common |= {"model_name_or_path": "of-the-file", "metric": "accuracy"}
    setting.content |= {"methods": {"gem": {"learning_rates": ["1e-2"]}}, "seeds": [42]}
    flags = [*setting.flags, "--tasks", "cola", "rte"]
    other = setting.folder / "other"
    told = ["--output_dir", str(other), "--model_name_or_path", "/a folder"]
    assert compare.main([*flags, *told]) == 0
    assert not setting.out.exists()
    assert setting.calls() == ["rte gem 0.01 42 test", "cola gem 0.01 42 test"]
    for task, model in (("rte", "'/a folder'"), ("cola", "of-the-task")):
        commands = json.loads((other / task / "gem/test/lr1e-02_seed42/cell.json").read_text())
        assert f" --model_name_or_path {model} --metric accuracy " in commands["train"]
    setting.out = other
    assert list(setting.table().index) == [("rte", "gem"), ("cola", "gem")]
    words = refusal(compare.main, [*flags, "mnli"])
    assert words.endswith("has no task 'mnli'; pass some of cola, rte, wic.")
    assert "There is no folder rte for tasks.rte: pass --d" in refusal(compare.main, flags[:2])
    setting.content["tasks"] = {"cola": {}}
    assert refusal(setting.run).startswith("--data_dir replaces where the tasks' folders lie")
    assert setting.calls() == []


def test_generated_answers_are_chosen_by_their_loss_and_scored_by_the_second_command(setting):
    program = setting.folder / "fake_eval.py"
    program.write_text(FAKE_EVAL)
    words = "{model} {weights} '{header}' {output_dir}/eval"  # {header} is not ours to fill
    evaluate = {"command": f"python {program} {words}", "score": "scores.pass@1.score"}
    evaluate |= {"metric": "pass@1", "correct": "status"}
    setting.common["model_name_or_path"] = "base"
    setting.content["seeds"] = [42]
    setting.content["tasks"] = {"mbpp": {"data_dir": "rte", "evaluate": evaluate}, "gsm8k": None}
    assert setting.run() == 0
    folder = setting.out / "mbpp/gem/test/lr1e-02_seed42"
    told = json.loads((folder / "eval/argv.json").read_text())
    assert told == ["base", "--delta", f"{folder}/delta.safetensors", "{header}", f"{folder}/eval"]
    assert not list(setting.out.glob("mbpp/*/dev/*/eval"))  # it looks at the test split
    for line in (
        "### Learning rates: eval loss on the development split",
        "| gem | 1e-03: 0.200 | **1e-02: 0.100** | 1e-01: 0.200 |",
        "| gem | 75.0 | 1e-02 |",  # of mbpp
        "| gem | 0.200 | 1e-02 |",  # of gsm8k, which has no second command
        "| full | 0.200 | 1e-03 |",
    ):
        assert line in setting.text()
    setting.calls()
    (folder / "eval/results.json").unlink()
    assert setting.run() == 0
    assert setting.calls() == []  # trained already: only the evaluation ran again
    assert (folder / "eval/results.json").exists()


def wait_for(path: Path) -> str:
    """What is written to a file, once it is."""
    deadline = time.monotonic() + 60
    while not (text := path.read_text()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return text


@pytest.fixture
def hang(setting: Setting) -> Path:
    """The second final run does not end while this file is there, in which its process id is."""
    path = setting.folder / "hang"
    path.touch()
    setting.common["hang"] = "gem 0.01 43 test"
    return path


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_the_children_and_the_next_start_runs_what_is_missing(setting, hang, number):
    def stop() -> None:
        wait_for(hang)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop).start()
    with pytest.raises(Interrupted):
        setting.run()
    with pytest.raises(ProcessLookupError):
        os.kill(int(hang.read_text()), 0)
    assert len(setting.calls()) == 8  # six of the search, one that ended, one that was stopped
    hang.unlink()
    folder = setting.out / "rte/gem/test/lr1e-02_seed43"
    for name in ("notes.txt", "checkpoint-2024/photo.jpg", "eval/notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    assert setting.run() == 0
    assert setting.calls() == [
        *(f"rte gem 0.01 {seed} test" for seed in (43, 44)),
        *(f"rte full 0.001 {seed} test" for seed in (42, 43, 44)),
    ]
    assert not (folder / "half.txt").exists()
    for name in ("notes.txt", "checkpoint-2024/photo.jpg", "eval/notes.txt"):
        assert (folder / name).read_text() == "mine", "what is no run's stays"


def test_a_child_that_outlives_a_killed_comparison_is_noticed(setting, hang):
    # Two programs writing into one folder would mix their results.
    command = [sys.executable, "launch/compare.py", *setting.flags]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment)
    child = int(wait_for(hang))
    process.kill()
    process.wait()
    setting.calls()
    try:
        assert re.search("still at work in .*seed43: wait for its", refusal(setting.run))
        assert setting.calls() == []
    finally:
        os.kill(child, signal.SIGKILL)
    hang.unlink()
    assert setting.run() == 0
    assert len(setting.calls()) == 5


def test_the_real_programs_fill_the_table(tmp_path, monkeypatch):
    """On the embedded model."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    content = yaml.safe_load(Path("launch/recipes/compare_demo.yaml").read_text(encoding="utf-8"))
    content |= {"output_dir": str(tmp_path), "seeds": [42], "choose_by": "loss"}
    content["methods"] = {"gem": {"learning_rates": ["1e-2"]}}
    content["common"] |= {"max_steps": 2, "calibration_examples": 8, "train_examples": 64}
    content["common"]["max_eval_samples"] = 8
    content["tasks"]["gsm8k"]["evaluate"]["command"] += " --limit 8"
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    status = compare.main(["--config", str(tmp_path / "compare.yaml")])
    text = (tmp_path / "table.md").read_text()
    assert status == 0, text
    assert "| method | strict-match (%) | 95 % interval | eval loss |" in text
    scores = r"\d+\.\d \| \d+\.\d to \d+\.\d \| \d\.\d{3} \|  "  # one seed: none of the loss
    trained = r"1e-02 \| [\d,]+ \| [\d.]+ %"
    costs = r"\d+ [KM]iB \| [\d.]+ [MG]iB \| [\d.]+ \| [\d.]+"
    assert re.search(rf"^\| gem \| {scores}\| {trained} \| {costs} \|$", text, re.MULTILINE), text
