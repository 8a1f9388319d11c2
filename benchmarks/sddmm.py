"""Seconds of the sampled gradient's kernels, side by side, and what they make besides the result.

    python benchmarks/sddmm.py [--shapes 768x768 4096x4096 4096x11008 1024x4096] [--rounds 5]
        [--tokens 256 2048 8192] [--densities 0.001 0.01 0.05 0.3] [--dtypes fp32 bf16]

It runs on the GPU where there is one, else on the CPU. In each round every kernel runs once, so
that whatever else the machine does meets all alike. Printed are the median, the least and the
greatest seconds, the most bytes that were alive at once beside the inputs and the result, and the
largest error of a thousand entries against their sums in fp64, in units of the sum of magnitudes
(fp32 should stay below 1e-5); the kernel that `auto` takes is marked with *. The entries are spread
evenly over the matrix. `gather` is left out where it would take too long.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable, Sequence

import torch
from steps.operations import peak_allocated
from steps.turns import seconds
from torch import Tensor

from gem_ds.sddmm import Pattern, add_sampled_product, choose_kernel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GATHER_LIMIT = 1 << 28  # multiplications


def random_pattern(shape: tuple[int, int], density: float, device: torch.device) -> Pattern:
    """Distinct entries, anywhere; about ``density`` of them."""
    numel = shape[0] * shape[1]
    flat_index = torch.randint(numel, (int(numel * density),), device=device).unique()
    return Pattern.of(flat_index.int(), shape)


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """The most that torch's allocator held at once beyond what it held before."""
    if device.type == "cuda":
        run()  # the library's workspace comes with the first product, and stays
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    return peak_allocated(run)


def largest_error(dy: Tensor, x: Tensor, pattern: Pattern, kernel: str) -> float:
    """Of a kernel's sums at some entries, of the sums of their terms' magnitudes."""
    found = torch.zeros(pattern.num_entries, device=dy.device)
    add_sampled_product(found, dy, x, pattern, kernel)
    chosen = torch.randperm(pattern.num_entries, device=dy.device)[:1024]
    flat_index, columns = pattern.flat_index[chosen].long(), pattern.shape[1]
    terms = dy.double()[:, flat_index // columns] * x.double()[:, flat_index % columns]
    errors = (found[chosen] - terms.sum(0)).abs() / terms.abs().sum(0)
    return float(errors.max())


def measure(dy: Tensor, x: Tensor, pattern: Pattern, kernels: Sequence[str], rounds: int) -> None:
    """Print a line per kernel."""
    out = torch.zeros(pattern.num_entries, device=dy.device)
    runs = {
        name: lambda name=name: add_sampled_product(out, dy, x, pattern, name) for name in kernels
    }
    errors = {name: largest_error(dy, x, pattern, name) for name in kernels}  # this warms up too
    peaks = {name: peak_bytes(run, dy.device) for name, run in runs.items()}
    taken: dict[str, list[float]] = {name: [] for name in kernels}
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(seconds(run))
    chosen = choose_kernel(dy.device.type, dy.dtype, pattern.shape, pattern.num_entries)
    for name, found in taken.items():
        print(
            f"{name:>10}{'*' if name == chosen else ' '} {statistics.median(found):9.4f} "
            f"({min(found):.4f} to {max(found):.4f}) {peaks[name] / 2**20:9.1f} MiB "
            f"{errors[name]:8.1e}",
            flush=True,
        )


def kernels_for(device: torch.device, num_products: int) -> list[str]:
    """Those that can run, and in bearable time."""
    names = ["dense", "tiled", "library"]
    if num_products < GATHER_LIMIT:
        names.append("gather")
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        names.append("triton")
    return names


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(prog="benchmarks/sddmm.py", description=__doc__)
    shapes = ["768x768", "4096x4096", "4096x11008", "1024x4096"]
    made.add_argument("--shapes", nargs="+", default=shapes, help="rows x columns")
    made.add_argument("--tokens", nargs="+", type=int, default=[256, 2048, 8192])
    made.add_argument("--densities", nargs="+", type=float, default=[0.001, 0.01, 0.05, 0.3])
    made.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    made.add_argument("--rounds", type=int, default=5)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    args = parser().parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    torch.manual_seed(0)
    for text in args.shapes:
        rows, columns = map(int, text.split("x"))
        for dtype in args.dtypes:
            for tokens in args.tokens:
                dy = torch.randn(tokens, rows, device=device).to(DTYPES[dtype])
                x = torch.randn(tokens, columns, device=device).to(DTYPES[dtype])
                for density in args.densities:
                    pattern = random_pattern((rows, columns), density, device)
                    print(f"{text} {dtype} {tokens} tokens, density {density:g}", flush=True)
                    kernels = kernels_for(device, pattern.num_entries * tokens)
                    measure(dy, x, pattern, kernels, args.rounds)


if __name__ == "__main__":
    main()
