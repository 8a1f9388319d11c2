"""Selection over shards against ``torch.topk`` on gathered matrices: time, memory, bytes sent.

    PYTHONPATH=. python benchmarks/selection.py --ranks 1 2 4 --sizes 1024 2048 4096 --matrices 1 4

Each rank has its own micro-batch. *sharded* is the library: each matrix's gradient is formed and
reduced into the ranks' ranges (:class:`~gem_ds.calibration.gradients.GradientSink`, buffered on one
rank), and ``select_shards`` takes 1 % of the entries. *gathered* sums the whole gradients on every
rank and calls ``torch.topk`` on the ratios, with equal budgets and no layer scores, so it does
less. Rounds of the two are interleaved. *scores + selection* is ``select_shards`` alone and *topk*
``torch.topk`` alone on the same scores, whole, on every rank. Bytes are those that a rank hands to
collectives. Memory is what the peak of a process grows by over its inputs.

A cell holds the median and (smallest to largest) of the rounds.

Results: ``benchmarks/selection.md``.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Sequence

import torch
from steps.traffic import Collectives
from torch import nn

from gem_ds.calibration.gradients import GradientSink, ShardReducer
from gem_ds.distributed.comm import Comm
from gem_ds.distributed.process_group import init_distributed
from gem_ds.select.selection import select_shards
from gem_ds.select.shards import TargetShard
from gem_ds.sparse.layers import TargetLayer
from tests.ranks import run_ranks

TOKENS = 512
SHARE = 0.01
PHASES = ("sharded", "scores + selection", "gathered", "topk")

Times = dict[str, list[float]]


class Problem:
    """Matrices of one size, and one micro-batch of this rank for each."""

    def __init__(self, comm: Comm, size: int, num_matrices: int) -> None:
        self.comm, self.size, self.numel = comm, size, size * size
        generator = torch.Generator().manual_seed(0)
        self.layers = []
        for i in range(num_matrices):
            module = nn.Linear(size, size, bias=False)
            with torch.no_grad():
                module.weight.normal_(std=0.02, generator=generator)
            self.layers.append(TargetLayer(f"layers.{i}.weight", module))
        generator.manual_seed(comm.rank + 1)
        self.dy, self.x = (torch.randn(TOKENS, size, generator=generator) for _ in range(2))
        self.partition = -(-self.numel // comm.world_size)
        self.start = comm.rank * self.partition
        self.stop = min(self.start + self.partition, self.numel)

    def sharded(self) -> float:
        """Gradients into shards, and the selection; returns the seconds of the selection."""
        comm, reducer = self.comm, ShardReducer(self.comm)
        is_buffered = comm.world_size == 1
        sinks = [
            GradientSink(
                layer, reducer, self.partition, torch.zeros(self.stop - self.start), is_buffered
            )
            for layer in self.layers
        ]
        for sink in sinks:
            sink(self.dy, self.x)
        reducer.finish()
        shards = [
            TargetShard(
                name=layer.name,
                shape=(self.numel,),
                start=self.start,
                weight=layer.weight.detach().view(-1)[self.start : self.stop],
                gradient=sink.take(),
                device=comm.device,
            )
            for layer, sink in zip(self.layers, sinks, strict=True)
        ]
        started = time.perf_counter()
        select_shards(shards, int(SHARE * self.numel) * len(shards), comm)
        return time.perf_counter() - started

    def gathered(self) -> float:
        """Whole gradients on each rank, one matrix after another; the seconds of the top k."""
        seconds = 0.0
        for layer in self.layers:
            ratio = self.comm.all_reduce(self.dy.t() @ self.x, "sum").abs_()
            ratio.div_(layer.weight.detach().abs().add_(1e-8))
            started = time.perf_counter()
            torch.topk(ratio.view(-1), int(SHARE * self.numel))
            seconds += time.perf_counter() - started
        return seconds


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(size: int, num_matrices: int, rounds: int, threads: int) -> tuple[Times, int]:
    """Called on each rank: seconds by phase, and the bytes of one round of *sharded*."""
    torch.set_num_threads(threads)
    comm, collectives = init_distributed(), Collectives()
    problem = Problem(comm, size, num_matrices)
    times: Times = {phase: [] for phase in PHASES}
    with collectives.counted():
        problem.sharded()
    problem.gathered()
    for _ in range(rounds):
        for run, whole, part in (
            (problem.sharded, *PHASES[:2]),
            (problem.gathered, *PHASES[2:]),
        ):
            comm.any(False)  # the ranks start together
            started = time.perf_counter()
            times[part].append(run())
            times[whole].append(time.perf_counter() - started)
    return times, collectives.others


def peak(size: int, num_matrices: int, kind: str) -> int:
    """Called on each rank, in a process of its own: what ``kind`` adds to the peak."""
    problem = Problem(init_distributed(), size, num_matrices)
    before = _peak_bytes()
    getattr(problem, kind)()
    return _peak_bytes() - before


def main(argv: Sequence[str] | None = None) -> None:
    """Print a markdown table, a line per case."""
    parser = argparse.ArgumentParser(prog="benchmarks/selection.py", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--matrices", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=2, help="shared by the ranks")
    args = parser.parse_args(argv)
    titles = [f"{phase}, ms" for phase in PHASES]
    sides = ["sharded, MiB", "gathered, MiB", "sent per rank, MiB"]
    print(f"| ranks | size | matrices | {' | '.join([*titles, *sides])} |")
    print("|" + "---|" * (3 + len(titles) + len(sides)))
    for world_size in args.ranks:
        threads = max(1, args.cores // world_size)
        for size in args.sizes:
            for num in args.matrices:
                found = run_ranks(world_size, measure, size, num, args.rounds, threads)
                times, num_bytes = found[0]
                cells = [_spread(times[phase]) for phase in PHASES]
                for kind in ("sharded", "gathered"):
                    cells.append(f"{max(run_ranks(world_size, peak, size, num, kind)) / 2**20:.0f}")
                print(
                    f"| {world_size} | {size} | {num} | {' | '.join(cells)} "
                    f"| {num_bytes / 2**20:.2f} |",
                    flush=True,
                )


def _spread(seconds: list[float]) -> str:
    low, middle, high = (1000 * f for f in (min(seconds), statistics.median(seconds), max(seconds)))
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"


if __name__ == "__main__":
    main()
