"""Kills: what is killed, at any moment, comes to the result of an undisturbed run, to the bit.

    python -m tests.kills [--kills 100] [--seed 0] [--launchers fork deepspeed torchrun]

Each kill takes a case of :data:`CASES` (a training, an export, an evaluation) and a signal of it,
lets one of its ranks send that signal to itself at a random moment, and then goes on as a user
would: with ``--resume_from_checkpoint last`` where a checkpoint stands, else with the same command.
Every third is killed twice. What stands in between must be whole. Ranks are forked from one server
(`tests.ranks`), which has imported everything already, or started by a launcher.

What torch has compiled is copied for them: one that is killed while it loads an op leaves a lock,
for which every later process waits ten minutes. The suite deletes it, as that process tells.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from torch.utils.cpp_extension import get_default_build_root

from gem_ds import cli
from gem_ds.distributed.comm import free_port
from gem_ds.files.checkpoint import Checkpoint, list_checkpoints
from tests.ranks import CPU_ONLY, RankError, run_ranks
from tests.runs import delta_of, rows_of
from tests.tiny_model import REPOSITORY, Tiny, make_tiny, one_rank

TIMEOUT = 240  # seconds of a run
PATIENCE = 30  # beyond a run's usual seconds: of one that waits for a rank that stopped in joining
LAUNCHERS = ("fork", "deepspeed", "torchrun")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A program, on how many ranks, and the signals that end it."""

    program: str = "train"
    world_size: int = 1
    stage: int = 0
    dtype: str = "fp32"
    is_mixture: bool = False  # of which experts are trained
    signals: tuple[str, ...] = ("SIGKILL", "SIGTERM", "SIGINT")

    def __str__(self) -> str:
        ranks = f"{self.world_size} rank{'s' * (self.world_size > 1)}"
        of = " of a mixture" * self.is_mixture
        return f"{self.program}{of}, {ranks}, stage {self.stage}, {self.dtype}"

    def command(self, tiny: Tiny, folder: Path, delta: Path) -> list[str]:
        """The flags of the run that writes to ``folder``."""
        if self.program == "train":
            values = {"max_steps": 8, "save_steps": 2, "logging_steps": 1, "save_total_limit": 2}
            values |= {"per_device_train_batch_size": 4 // self.world_size, "eval_steps": 2}
            values["deepspeed"] = REPOSITORY / "ds_configs" / f"zero{self.stage}.json"
            if self.is_mixture:
                model = tiny.folder / "mixture"
                values["model_name_or_path"] = model if model.exists() else tiny.mixture()
                values["target_modules"] = "experts"
            switches = [f"--{self.dtype}"] if self.dtype != "fp32" else []
            return tiny.flags(folder, *switches, **values, watchdog_seconds=3)
        subject = ["--model_name_or_path", tiny.model, "--delta", delta, "--output_dir", folder]
        if self.program != "export":
            subject += ["--data_dir", tiny.data, "--batch_size", 1, "--max_new_tokens", 12]
            subject += ["--watchdog_seconds", 3, "--disable_tqdm"]
        return list(map(str, subject))


ANY = ("SIGKILL", "SIGSTOP", "SIGTERM", "SIGINT")
CASES = [
    Case(),
    Case(dtype="bf16", stage=3),
    Case(world_size=2, stage=3, signals=ANY),
    Case(world_size=2, stage=1, dtype="bf16", signals=ANY),
    Case(world_size=2, stage=3, is_mixture=True, signals=ANY),
    Case(program="export", signals=("SIGKILL",)),
    Case(program="eval gsm8k", signals=("SIGKILL", "SIGTERM")),
    Case(program="eval gsm8k", world_size=2, signals=("SIGKILL", "SIGSTOP")),
]


@dataclass(frozen=True)
class Disturbance:
    """A signal that a rank sends to itself, so many seconds after its program has begun."""

    rank: int
    seconds: float
    signal: str


NOBODY = Disturbance(-1, 0.0, "SIGKILL")


def run_program(
    program: str, argv: list[str], extensions: str, disturbance: Disturbance | None
) -> float:
    """On each rank: the program, disturbed or not; returns how many seconds it took."""
    os.environ["TORCH_EXTENSIONS_DIR"] = extensions
    started = time.monotonic()
    if disturbance is not None and int(os.environ.get("RANK", 0)) == disturbance.rank:
        number = signal.Signals[disturbance.signal]
        timer = threading.Timer(disturbance.seconds, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()
    status = cli.run(program, argv)
    if status:
        raise SystemExit(status)
    return time.monotonic() - started


def launch(
    case: Case,
    launcher: str,
    argv: list[str],
    extensions: Path,
    disturbance: Disturbance | None,
    timeout: float = TIMEOUT,
) -> float:
    """Run a case; returns the seconds of its first rank, or 0 where it did not end well."""
    for lock in extensions.glob("**/lock"):
        lock.unlink()
    if launcher == "fork":
        try:
            rank = (run_program, case.program, argv, str(extensions), disturbance)
            results = run_ranks(case.world_size, *rank, timeout=timeout)
        except RankError:
            return 0.0
        return float(results[0])
    told = json.dumps([case.program, argv, str(extensions), asdict(disturbance or NOBODY)])
    command = {
        "deepspeed": ["deepspeed", f"--num_accelerators={case.world_size}", "--module"],
        "torchrun": ["torchrun", f"--nproc_per_node={case.world_size}", "-m"],
    }[launcher]
    command.insert(1, f"--master_port={free_port()}")
    process = subprocess.Popen(
        [Path(sys.executable).with_name(command[0]), *command[1:], "tests.kills", f"--rank={told}"],
        env=os.environ | CPU_ONLY | {"PYTHONPATH": str(REPOSITORY)},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        out, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return 0.0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for rank in psutil.process_iter(["cmdline"]):  # a launcher's sessions, the stopped included
            if f"--rank={told}" in (rank.info["cmdline"] or []):
                rank.kill()
    seconds = [float(line.split()[1]) for line in out.splitlines() if line.startswith("seconds ")]
    if not seconds or process.returncode:
        print(out if disturbance is None else "", end="")  # nobody has asked for this end
        return 0.0
    return seconds[0]


def result_of(case: Case, folder: Path) -> dict[str, str]:
    """Digests of what a finished run leaves, but for times."""
    if case.program == "train":
        found = {
            name: hashlib.sha256(values.view(-1).float().numpy().tobytes()).hexdigest()
            for name, values in delta_of(folder).values.items()
        }
        lines = rows_of(folder / "metrics.jsonl")
        kept = ("step", "loss", "eval_loss", "learning_rate")
        return found | {"losses": str([[line.get(key) for key in kept] for line in lines])}
    if case.program == "export":
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    samples = sorted((folder / "samples.jsonl").read_text().splitlines())
    results = json.loads((folder / "results.json").read_text())
    return {"samples": str(samples), "results": str(results | {"seconds": 0})}


def refuse_half_files(folder: Path) -> None:
    """What bears a name is whole, whenever its writer was killed."""
    for checkpoint in list_checkpoints(folder).values():
        Checkpoint.load(checkpoint)
    if (folder / "delta.safetensors").exists():
        delta_of(folder)


def next_command(case: Case, command: list[str], folder: Path) -> list[str]:
    """How a user goes on after a kill."""
    if case.program == "export" and folder.exists():  # the kill came when it was done
        return [*command, "--overwrite_output_dir"]
    if case.program != "train":
        return command
    if list_checkpoints(folder):
        return [*command, "--resume_from_checkpoint", "last"]
    return [*command, "--overwrite_output_dir"] if folder.exists() else command


class Suite:
    """The cases' undisturbed results, made when they are first needed, and kills of them."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        self.tiny = make_tiny(folder)
        self.extensions = folder / "extensions"
        compiled = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
        if compiled.is_dir():
            shutil.copytree(compiled, self.extensions, ignore=shutil.ignore_patterns("lock"))
        self.undisturbed: dict[tuple[Case, str], tuple[dict[str, str], float]] = {}
        self.number = 0

    def delta(self) -> Path:
        """A delta to export and to evaluate."""
        self.whole(CASES[0], "fork")
        return self.folder / f"whole fork {CASES[0]}" / "delta.safetensors"

    def whole(self, case: Case, launcher: str) -> tuple[dict[str, str], float]:
        """The result of a run that nobody disturbs, and its seconds."""
        if (case, launcher) not in self.undisturbed:
            delta = Path() if case == CASES[0] and launcher == "fork" else self.delta()
            folder = self.folder / f"whole {launcher} {case}"
            command = case.command(self.tiny, folder, delta)
            seconds = launch(case, launcher, command, self.extensions, None)
            assert seconds, f"{case} under {launcher} did not end well, undisturbed"
            self.undisturbed[case, launcher] = result_of(case, folder), seconds
        return self.undisturbed[case, launcher]

    def kill(self, case: Case, launcher: str, name: str | None = None) -> str:
        """Kill a run at a random moment, once or twice, and go on; how it differs, if it does."""
        expected, seconds = self.whole(case, launcher)
        self.number += 1
        folder = self.folder / f"killed {self.number}"
        command = argv = case.command(self.tiny, folder, self.delta())
        for _ in range(1 + (self.number % 3 == 0)):
            disturbance = Disturbance(
                self.rng.randrange(case.world_size),
                self.rng.uniform(0, seconds),
                name or self.rng.choice(case.signals),
            )
            print(f"{self.number} {launcher}: {case}; {disturbance}", flush=True)
            timeout = 2 * seconds + PATIENCE
            launch(case, launcher, argv, self.extensions, disturbance, timeout)
            if case.program == "train":
                refuse_half_files(folder)
            argv = next_command(case, command, folder)
        if not launch(case, launcher, argv, self.extensions, None):
            return "it does not go on"
        found = result_of(case, folder)
        wrong = sorted(key for key, _ in expected.items() ^ found.items())
        return f"another result: {', '.join(wrong)}" if wrong else ""


def main(argv: Sequence[str] | None = None) -> int:
    """The long form; returns 1 where a kill has left another result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=LAUNCHERS)
    parser.add_argument("--rank", help="set by the suite: what a launcher's rank runs")
    args, _ = parser.parse_known_args(argv)
    if args.rank is not None:
        *program, disturbance = json.loads(args.rank)
        seconds = run_program(*program, Disturbance(**disturbance))
        if os.environ.get("RANK") == "0":  # two at once would write into each other's lines
            print("seconds", seconds, flush=True)
        return 0
    with tempfile.TemporaryDirectory() as folder, one_rank():
        suite = Suite(Path(folder), random.Random(args.seed))
        wrong = []
        for i in range(args.kills):
            case, launcher = CASES[i % len(CASES)], args.launchers[i % len(args.launchers)]
            if case.world_size == 1:
                launcher = args.launchers[0]
            if difference := suite.kill(case, launcher):
                wrong.append(f"{suite.number}: {difference}")
                print(wrong[-1], flush=True)
    print(f"{args.kills - len(wrong)} of {args.kills} came to the undisturbed result")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
