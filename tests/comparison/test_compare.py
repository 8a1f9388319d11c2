"""launch/compare.py with a stand-in for training: what runs, what is chosen, what is written."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gem_ds.comparison import main as compare
from gem_ds.files.mask import Mask, WeightInfo

pytestmark = pytest.mark.slow  # starts engines or programs

REPOSITORY = Path(__file__).resolve().parents[2]
FAKE = str(Path(__file__).with_name("fake_train.py"))
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
        self.content: dict[str, Any] = {
            "output_dir": str(self.out),
            "program": FAKE,
            "seeds": [42, 43, 44],
            "dev_examples": 7,
            "methods": {
                "gem": {"learning_rates": ["1e-3", "1e-2", "1e-1"]},
                "full": {"learning_rates": ["1e-4", "1e-3", "1e-2"]},
            },
            "tasks": {"rte": {"data_dir": "rte"}},
            "common": {},
        }

    @property
    def flags(self) -> list[str]:
        path = self.folder / "compare.yaml"
        path.write_text(yaml.safe_dump(self.content, sort_keys=False))
        return ["--config", str(path), "--data_dir", str(self.folder / "data")]

    def run(self) -> int:
        return compare.main(self.flags)

    def start(self) -> subprocess.Popen[str]:
        """The same as a program."""
        return subprocess.Popen(
            [sys.executable, "launch/compare.py", *self.flags],
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def calls(self) -> list[str]:
        """The runs that were started since the last look."""
        path = self.folder / "calls.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def table(self) -> dict[tuple[str, str], dict[str, str]]:
        with open(self.out / "table.csv") as file:
            return {(row["task"], row["method"]): row for row in csv.DictReader(file)}


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls.txt"))
    monkeypatch.setenv("FAKE_HANG", str(tmp_path / "hang"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return Setting(tmp_path)


def save_mask(path: Path) -> None:
    """Two layers with a query and a value projection."""
    names = [f"encoder.layer.{i}.attention.self.{m}.weight" for i in (0, 1) for m in "qv"]
    Mask(
        indices={n: torch.arange(i + 1, dtype=torch.int32) for i, n in enumerate(names)},
        weights={n: WeightInfo(shape=(4, 4), dtype="float32", checksum="0" * 64) for n in names},
        base_model="tiny",
        settings={},
    ).save(path)


def test_the_rate_is_chosen_on_the_development_split_alone_and_a_later_start_runs_what_is_missing(
    setting: Setting,
) -> None:
    # The stand-in's test scores are better at every other rate: looking there would choose those.
    save_mask(setting.folder / "mask.safetensors")
    setting.content["common"] = {"mask_file": str(setting.folder / "mask.safetensors")}
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
        sizes = [int.from_bytes(content[i : i + 4]) for i in (16, 20)]
        assert all(300 < size < 3000 for size in sizes)
    assert not list(setting.out.glob("rte/*/*/*/checkpoint-*"))
    kept = {path.parts[-3] for path in setting.out.glob("rte/*/*/*/delta.safetensors")}
    assert kept == {"test"}  # a search needs no weights
    before = (setting.out / "table.md").read_text()
    setting.run()
    assert setting.calls() == []
    assert (setting.out / "table.md").read_text() == before
    setting.content["seeds"] = [42, 43, 44, 45]
    path = setting.out / "rte/gem/test/lr1e-02_seed43/all_results.json"
    path.write_text(path.read_text()[:40])
    setting.run()
    assert setting.calls() == [
        "rte gem 0.01 43 test",
        "rte gem 0.01 45 test",
        "rte full 0.001 45 test",
    ]
    setting.content["common"]["model_name_or_path"] = "other"
    with pytest.raises(ValueError, match=r"rte/gem/dev/lr1e-03_seed42 holds a run of another"):
        setting.run()
    del setting.content["common"]["model_name_or_path"]
    setting.content["dev_examples"] = 8
    with pytest.raises(ValueError, match=r"--dev_examples: 7, now 8\): delete that folder, or ch"):
        setting.run()
    assert setting.calls() == []


def test_tables_hold_the_means_by_hand(setting: Setting) -> None:
    setting.content["methods"]["random"] = {"learning_rates": ["1e-2"]}
    setting.content["tasks"]["cola"] = {"flags": {"metric": "accuracy"}}
    assert setting.run() == 0
    row = setting.table()["rte", "gem"]
    assert float(row["mean"]) == pytest.approx(0.81)  # 80, 81 and 82 of 100
    assert float(row["std"]) == pytest.approx(0.01)
    assert (row["metric"], row["num_seeds"], row["learning_rate"]) == ("accuracy", "3", "0.01")
    assert (row["dev_metric"], float(row["dev_score"])) == (row["metric"], 0.9)
    assert setting.table()["cola", "random"]["dev_score"] == ""  # a single rate is not searched
    text = (setting.out / "table.md").read_text()
    assert "| gem | 81.0 ± 1.0 | 1e-02 | 1,000 | 0.1 % | 12 KiB | 3.0 GiB | 0.25 | 2.0 |" in text
    assert (
        "| full | 81.0 ± 1.0 | 1e-03 | 1,000,000 | 100 % | 11 MiB | 3.0 GiB | 0.25 | 0.0 |" in text
    )
    assert "| gem | 1e-03: 80.0 | **1e-02: 90.0** | 1e-01: 80.0 |" in text
    assert "| full | 0.0 | 0.0 to 0.0 |  |" in text  # right on the same examples
    assert "| random | -30.0 |" in text
    assert text.split("| random | -30.0 |")[1].splitlines()[0].endswith("| real |")
    assert "## Average over the tasks" in text
    assert "| random | 51.0 ± 1.0 | 0.1 % |" in text
    with open(setting.out / "cells.csv") as file:
        cells = list(csv.DictReader(file))
    assert len(cells) == 2 * (6 + 9)
    assert {cell["status"] for cell in cells} == {"finished"}


def test_a_failed_run_is_reported_and_the_others_go_on(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    setting.content["common"] = {"fail": "gem 0.01 43 test"}
    assert setting.run() == 1
    assert len(setting.calls()) == 12
    assert "FAILED: Error: the loss is not finite. (exit status 1)" in capsys.readouterr().out
    text = (setting.out / "table.md").read_text()
    assert "| gem | 81.0 ± 1.4 (1 of 3 seeds failed) |" in text  # 80 and 82
    assert "| full | 0.0 | 0.0 to 0.0 |  |" in text  # compared on the two seeds that both have
    assert "rte gem at 1e-02, seed 43, test: Error: the loss is not finite." in text
    setting.run()
    assert setting.calls() == ["rte gem 0.01 43 test"]  # once more, and no other


def test_a_method_or_a_rate_that_fails_says_so(setting: Setting) -> None:
    setting.content["seeds"] = [42]
    setting.content["methods"]["random"] = {"learning_rates": ["1e-2"]}
    setting.content["common"] = {"fail": "random 0.01 42 test"}
    assert setting.run() == 1
    text = (setting.out / "table.md").read_text()
    assert "\n| random | failed | 1e-02 |  |  |  |  |  |  |\n" in text  # as many fields as others
    assert "| full | 80.0 | 1e-03 |" in text  # a single seed has no deviation
    setting.content["output_dir"] = str(setting.folder / "other")
    del setting.content["methods"]["full"]
    setting.content["common"] = {"fail": "gem 0.01 42 dev"}
    assert setting.run() == 1
    text = (setting.folder / "other" / "table.md").read_text()
    assert "| gem | **1e-03: 80.0** | 1e-02: failed | 1e-01: 80.0 |" in text  # the smaller of two
    assert "The learning rate of gem lies at the edge of its grid" in text


def test_a_folder_of_something_else_is_left_alone(setting: Setting) -> None:
    folder = setting.out / "rte/gem/dev/lr1e-03_seed42"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds files of something else"):
        setting.run()
    assert (folder / "thesis.tex").exists()


def test_flags_replace_what_the_file_says(setting: Setting) -> None:
    setting.content["tasks"] = {
        "rte": {"data_dir": "rte"},
        "wic": {"data_dir": "nowhere"},  # not asked for, so not missed
        "cola": {"flags": {"model_name_or_path": "of-the-task"}},
    }
    setting.content["common"] = {"model_name_or_path": "of-the-file", "metric": "accuracy"}
    setting.content["methods"] = {"gem": {"learning_rates": ["1e-2"]}}
    setting.content["seeds"] = [42]
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
    assert list(setting.table()) == [("rte", "gem"), ("cola", "gem")]
    with pytest.raises(ValueError, match=r"has no task 'mnli'; pass some of cola, rte, wic\.$"):
        compare.main([*flags, "mnli"])
    with pytest.raises(ValueError, match=r"There is no folder rte for tasks\.rte: pass --d"):
        compare.main(flags[:2])
    setting.content["tasks"] = {"cola": {}}
    with pytest.raises(ValueError, match=r"^--data_dir replaces .* and none of the tasks has one"):
        compare.main(setting.flags)
    assert setting.calls() == []


def test_runs_at_once_share_the_machine(setting: Setting) -> None:
    setting.content |= {"num_parallel": 2, "devices": ["3", "5"]}
    assert setting.run() == 0
    logs = [path.read_text().split() for path in setting.out.glob("rte/*/*/*/log.txt")]
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert len(logs) == 12
    assert {log[1] for log in logs} == {threads}
    assert {log[2] for log in logs} == {"3", "5"}


def test_an_evaluation_is_the_second_command_of_final_runs(setting: Setting) -> None:
    program = setting.folder / "fake_eval.py"
    program.write_text(FAKE_EVAL)
    words = "{model} {weights} '{header}' {output_dir}/eval"  # {header} is not ours to fill
    setting.content["common"] = {"model_name_or_path": "base"}
    setting.content["tasks"] = {
        "mbpp": {
            "data_dir": "rte",
            "evaluate": {
                "command": f"python {program} {words}",
                "score": "scores.pass@1.score",
                "metric": "pass@1",
                "correct": "status",
            },
        }
    }
    assert setting.run() == 0
    folder = setting.out / "mbpp/gem/test/lr1e-02_seed42"
    told = json.loads((folder / "eval/argv.json").read_text())
    assert told == ["base", "--delta", f"{folder}/delta.safetensors", "{header}", f"{folder}/eval"]
    assert not list(setting.out.glob("mbpp/*/dev/*/eval"))  # it looks at the test split
    assert "| gem | 75.0 ± 0.0 | 1e-02 |" in (setting.out / "table.md").read_text()
    setting.calls()
    (folder / "eval/results.json").unlink()
    assert setting.run() == 0
    assert setting.calls() == []  # trained already: only the evaluation ran again
    assert (folder / "eval/results.json").exists()


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def start_and_hang(setting: Setting) -> tuple[subprocess.Popen[str], int]:
    """A comparison whose second final run does not end, and the process id of that run."""
    hang = setting.folder / "hang"
    hang.touch()
    setting.content["common"] = {"hang": "gem 0.01 43 test"}
    process = setting.start()
    wait_for(hang.read_text)
    return process, int(hang.read_text())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_the_children_and_the_next_start_runs_what_is_missing(
    setting: Setting, number: signal.Signals
) -> None:
    process, child = start_and_hang(setting)
    process.send_signal(number)
    assert process.wait(60) == 130
    assert "Stopped; the same command goes on from here." in process.communicate()[0]
    assert not is_alive(child)
    assert len(setting.calls()) == 8  # six of the search, one that ended, one that was stopped
    (setting.folder / "hang").unlink()
    assert setting.run() == 0
    assert setting.calls() == [
        "rte gem 0.01 43 test",
        "rte gem 0.01 44 test",
        *(f"rte full 0.001 {seed} test" for seed in (42, 43, 44)),
    ]
    assert not (setting.out / "rte/gem/test/lr1e-02_seed43/half.txt").exists()


def test_a_child_that_outlives_a_killed_comparison_is_noticed(setting: Setting) -> None:
    # Two programs writing into one folder would mix their results.
    process, child = start_and_hang(setting)
    process.kill()
    process.communicate()
    setting.calls()
    try:
        with pytest.raises(ValueError, match=r"still at work in .*seed43: wait for its"):
            setting.run()
        assert setting.calls() == []
    finally:
        os.kill(child, signal.SIGKILL)
    (setting.folder / "hang").unlink()
    assert setting.run() == 0
    assert len(setting.calls()) == 5
