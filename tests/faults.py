"""Whether the tests see mistakes: one-line faults, each put into a copy of the tree by itself.

    python tests/faults.py [NAME ...] [-j 2]   these faults of tests/faults.toml (default: all)
    python tests/faults.py --check             only whether all can be put in, and their tests exist
    python tests/faults.py --clean [NAME ...]  only whether their tests pass on the tree as it is

A fault is caught if one of its tests fails (pytest exits with 1) and missed if all pass. Any other
exit, or none in time, says nothing of the tests: then the fault is broken.
"""

import sys

sys.path.pop(0)  # this script's folder: its `select` is not Python's

import argparse
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 900  # seconds for the tests of one fault


@dataclass(frozen=True, kw_only=True)
class Fault:
    """In ``file`` the text ``find``, which stands there once, becomes ``replace``."""

    name: str
    file: str
    find: str
    replace: str
    tests: list[str]

    def text(self) -> str:
        """The file with the fault in it; a ValueError or SyntaxError where it cannot be put in."""
        path = ROOT / self.file
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if (count := text.count(self.find)) != 1:
            raise ValueError(f"{self.file} has {self.find!r} {count} times")
        changed = text.replace(self.find, self.replace)
        compile(changed, self.file, "exec", dont_inherit=True)  # else any test would fail on it
        return changed


def read_faults(names: Sequence[str]) -> list[Fault]:
    """The faults of faults.toml by these names, or all."""
    table = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    faults = {entry["name"]: Fault(**entry) for entry in table["fault"]}
    assert len(faults) == len(table["fault"]), "two faults have one name"
    if unknown := set(names) - faults.keys():
        raise SystemExit(f"There is no fault {min(unknown)!r}: see tests/faults.toml.")
    return [fault for fault in faults.values() if not names or fault.name in names]


def copy_tree(target: Path) -> None:
    """Copy what git knows or would add, as it is in the working tree."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def run_pytest(tree: Path, *arguments: str, timeout: float | None = None) -> tuple[int, str]:
    """The exit status of pytest in a tree (-1: not in time), and what it printed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)},  # for what the tests start, too
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        return -1, f"not done after {timeout} s"
    finally:
        with suppress(ProcessLookupError):  # what a test has left behind
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(fault: Fault) -> tuple[str, str]:
    """What became of a fault, and the line that tells of it."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fault-", ignore_cleanup_errors=True) as folder:
        tree = Path(folder)
        copy_tree(tree)
        try:
            (tree / fault.file).write_text(fault.text(), encoding="utf-8")
            status, output = run_pytest(tree, "-rfE", *fault.tests, timeout=TIMEOUT)
        except (ValueError, SyntaxError) as error:
            status, output = -1, str(error)
    verdict = {0: "missed", 1: "caught"}.get(status, "broken")
    failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", output, re.MULTILINE)
    told = failed[1] if failed else output.strip().rpartition("\n")[2]
    return verdict, f"{verdict}  {time.perf_counter() - started:5.1f} s  {fault.name}: {told}"


def check(faults: Sequence[Fault], options: Sequence[str]) -> int:
    """Print what cannot be put in, and what pytest says of all tests; returns the exit status."""
    status, output = run_pytest(ROOT, *options, *sorted({t for f in faults for t in f.tests}))
    print(output if status else f"The tests of {len(faults)} faults are as they should be.")
    for fault in faults:
        try:
            fault.text()
        except (ValueError, SyntaxError) as error:
            status = 1
            print(f"{fault.name}: {error}")
    return int(status != 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if all is as it should be."""
    parser = argparse.ArgumentParser(prog="tests/faults.py", allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("-j", type=int, default=1, metavar="N", help="faults at a time")
    for name, option in (("--check", "--collect-only --keep-duplicates"), ("--clean", "-rfE")):
        parser.add_argument(name, dest="options", action="store_const", const=option.split())
    arguments = parser.parse_args(argv)
    faults = read_faults(arguments.names)
    if arguments.options:
        return check(faults, arguments.options)
    started, verdicts = time.perf_counter(), []
    with ThreadPoolExecutor(arguments.j) as executor:
        for verdict, line in executor.map(run, faults):
            verdicts.append(verdict)
            print(line, flush=True)
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("caught", "missed", "broken"))
    print(f"{counts}; {time.perf_counter() - started:.0f} s")
    return int(set(verdicts) != {"caught"})


if __name__ == "__main__":
    sys.exit(main())
