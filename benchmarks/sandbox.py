"""Programs per second of the sandbox, next to the cheapest thing that starts a process at all.

    python benchmarks/sandbox.py [--rounds 7] [--programs 60] [--num_workers 2]

In one run, in turns, so that whatever else the machine does meets all alike:

    floor     fork + exec + wait of `true` from a light parent, one after the other
    forked    the sandbox at full isolation: a server forks each candidate
    fresh     the same, with a fresh interpreter for each

The sandboxes are driven from a process that has torch loaded. Printed are the median over rounds,
the least and the greatest, and the ratios to the floor of the same round.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch
from steps.turns import take_turns

from gem_ds.evaluate.sandbox import Program, Sandbox

_FLOOR = """
import os, time
started = time.perf_counter()
for _ in range({number}):
    if (pid := os.fork()) == 0:
        os.execv("{program}", ["true"])
    os.waitpid(pid, 0)
print({number} / (time.perf_counter() - started))
"""
_PROGRAM = Program(
    "def similar(a, b):\n    return tuple(sorted(set(a) & set(b)))",
    (
        "assert similar((3, 4, 5, 6), (5, 7, 4, 10)) == (4, 5)",
        "assert similar((1, 2, 3, 4), (5, 4, 3, 7)) == (3, 4)",
        "assert similar((11, 12, 14, 13), (17, 15, 14, 13)) == (13, 14)",
    ),
    timeout=60.0,
)


def floor(number: int) -> float:
    """Processes per second, started by a light interpreter."""
    program = next(path for path in ("/bin/true", "/usr/bin/true") if os.path.exists(path))
    source = _FLOOR.format(number=number, program=program)
    command = [sys.executable, "-I", "-S", "-c", source]
    return float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def rate(sandbox: Sandbox, number: int) -> float:
    """Programs per second."""
    started = time.perf_counter()
    verdicts = list(sandbox.check_all([_PROGRAM] * number))
    elapsed = time.perf_counter() - started
    assert all(verdict.status == "passed" for verdict in verdicts), verdicts
    return number / elapsed


def measure(rounds: int, programs: int, num_workers: int) -> dict[str, np.ndarray]:
    """Rates by name, [rounds]."""
    with Sandbox(num_workers) as forked, Sandbox(num_workers, fresh=True) as fresh:
        print(f"isolation: {forked.isolation}, {num_workers} workers, torch {torch.__version__}")
        return take_turns(
            {
                "floor": lambda: floor(4 * programs),
                "forked": lambda: rate(forked, programs),
                "fresh": lambda: rate(fresh, programs),
            },
            rounds,
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--programs", type=int, default=60, help="per round")
    parser.add_argument("--num_workers", type=int, default=2)
    rates = measure(**vars(parser.parse_args(argv)))
    print(f"{'':8}{'median':>8}{'least':>8}{'most':>8}   ratio to the floor: median, least, most")
    for name, found in rates.items():
        numbers, ratios = (
            (np.median(values), values.min(), values.max())
            for values in (found, found / rates["floor"])
        )
        text = "".join(f"{number:8.0f}" for number in numbers)
        print(f"{name:8}{text}   " + ", ".join(f"{ratio:.2f}" for ratio in ratios))


if __name__ == "__main__":
    main()
