"""What a rule's scores hang on: how few entries decide, and what two halves of the data agree on.

    python benchmarks/score_tails.py --model_name_or_path runs/smollm2-135m --task cola \
        --data_dir path/to/CoLA --calibration_examples 512 --output_dir runs/score_tails

takes the flags of launch/train.py. Entries are scored by |g| / (|w| + c rms(w)), rms over their
matrix, for several c: c = 0 (and the paper's 1e-8) is ``gem``, c = 0.1 is ``damped``, and as c
grows the order becomes that of |g|. The first table says of each c

    head      the share of ||r||^2 that the 1, 10 and 100 largest entries of a matrix hold, median

and the second, for budgets by norm times entropy (as ``gem``), by norm times entropy of what is
left when the 100 largest entries of each matrix are cut, equal ones (as ``ratio``) and one
threshold for all layers (as ``ratio_global``),

    layers    as if how many layers shared the budget equally: exp(entropy of k / K)
    log ||g|| the correlation of log k with log ||g|| over the layers
    budgets   sum of min(k, k') / K for budgets from two disjoint halves of the examples
    masks     the share of the K entries that the masks of the two halves have in common
    |w|       median of the selected |w|, in rms of its matrix

Writes ``tails.md`` and ``tails.png``. One process, everything dense.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from calibration_examples import calibrating_run, overlap, sums_up_to
from matplotlib import pyplot as plt
from steps.table import markdown
from torch import Tensor

from gem_ds.select.budget import allocate_budget
from gem_ds.train.arguments import parse_arguments
from gem_ds.train.config import Arguments
from gem_ds.train.summary import effective_layers

DAMPINGS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, math.inf)
HEADS = (1, 10, 100)
EPSILON = 1e-8

Scores = Sequence[Tensor]
Budgets = Callable[[Scores, int], list[int]]


def layer_score(scores: Tensor) -> float:
    """``||r||_2`` times the entropy of r / sum(r), in fp64."""
    share = scores / scores.sum()
    return float(scores.norm() * -(share * (share + EPSILON).log()).sum().clamp(max=0))


def by_norm_times_entropy(scores: Scores, total: int) -> list[int]:
    """As ``gem``."""
    return allocate_budget([layer_score(s) for s in scores], [s.numel() for s in scores], total)


def without_the_head(scores: Scores, total: int) -> list[int]:
    """As ``gem``, each matrix without its 100 largest entries."""
    rest = [layer_score(s.sort().values[: -HEADS[-1]]) for s in scores]
    return allocate_budget(rest, [s.numel() for s in scores], total)


def equal(scores: Scores, total: int) -> list[int]:
    """As ``ratio``."""
    return allocate_budget([1.0] * len(scores), [s.numel() for s in scores], total)


def one_threshold(scores: Scores, total: int) -> list[int]:
    """As ``ratio_global``."""
    threshold = torch.cat(list(scores)).topk(total).values[-1]
    return [int((s >= threshold).sum()) for s in scores]


BUDGETS: dict[str, Budgets] = {
    "norm x entropy": by_norm_times_entropy,
    "without the head": without_the_head,
    "equal": equal,
    "one threshold": one_threshold,
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Per matrix fp64 [n]: gradients of all examples and of two halves, |w|; and K."""

    gradients: list[Tensor]
    halves: tuple[list[Tensor], list[Tensor]]
    weights: list[Tensor]
    total: int

    def scores(self, gradients: Sequence[Tensor], damping: float) -> list[Tensor]:
        """``|g| / (|w| + c rms(w) + 1e-8)``, or |g| for an infinite c."""
        if damping == math.inf:
            return [g.abs() for g in gradients]
        pairs = zip(gradients, self.weights, strict=True)
        return [g.abs() / (w + damping * rms(w) + EPSILON) for g, w in pairs]


def main(argv: Sequence[str] | None = None) -> None:
    """Write the table and the picture."""
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    folder = Path(str(args.train.output_dir))
    problem = read(args)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tails.md").write_text(f"{heads(problem)}\n\n{budgets(problem)}\n")
    draw(folder / "tails.png", problem)
    print((folder / "tails.md").read_text(), end="")


def read(args: Arguments) -> Problem:
    """Sum the gradients of the two halves of what the run calibrates on."""
    run, tuning, halves = calibrating_run(args)
    first, second = (
        [g.double() for g in next(sums_up_to(run, tuning, half, [len(half)]))] for half in halves
    )
    weights = [
        tuning.engine.weights.read_shard(layer.weight).double().abs() for layer in tuning.layers
    ]
    return Problem(
        gradients=[a + b for a, b in zip(first, second, strict=True)],
        halves=(first, second),
        weights=weights,
        total=run.prepared.targets.budget,
    )


def rms(weight: Tensor) -> float:
    """Root mean square."""
    return float(weight.square().mean().sqrt())


def heads(problem: Problem) -> str:
    """The first table."""
    rows = []
    for damping in DAMPINGS:
        scores = problem.scores(problem.gradients, damping)
        squares = [s.square().sort(descending=True).values for s in scores]
        row = {"c": f"{damping:g}"}
        for head in HEADS:
            share = np.median([float(s[:head].sum() / s.sum()) for s in squares])
            row[f"head {head}"] = f"{share:.0%}"
        rows.append(row)
    return markdown(rows)


def budgets(problem: Problem) -> str:
    """The second table."""
    return markdown([row(problem, damping, name) for name in BUDGETS for damping in DAMPINGS])


def row(problem: Problem, damping: float, name: str) -> dict[str, str]:
    """One line of the second table."""
    allocate = BUDGETS[name]
    scores = problem.scores(problem.gradients, damping)
    shared = allocate(scores, problem.total)
    halves = [problem.scores(gradients, damping) for gradients in problem.halves]
    half_budgets = [allocate(half, problem.total) for half in halves]
    masks = [mask(*pair) for pair in zip(halves, half_budgets, strict=True)]
    relative = torch.cat([w / rms(w) for w in problem.weights])
    norms = [float(g.norm()) for g in problem.gradients]
    return {
        "budgets": name,
        "c": f"{damping:g}",
        "layers": f"{effective_layers(shared):.1f} of {len(shared)}",
        "log \\|\\|g\\|\\|": log_correlation(shared, norms),
        "budgets agree": f"{sum(map(min, *half_budgets)) / problem.total:.2f}",
        "masks agree": f"{overlap(*masks):.2f}",
        "\\|w\\| / rms": f"{float(relative[mask(scores, shared)].median()):.3f}",
    }


def log_correlation(budgets: Sequence[int], norms: Sequence[float]) -> str:
    """Of those layers that have a budget; a dash where all have the same."""
    if max(budgets) - min(budgets) <= 1:
        return "-"
    pairs = np.log([(k, norm) for k, norm in zip(budgets, norms, strict=True) if k])
    return f"{np.corrcoef(pairs.T)[0, 1]:.2f}"


def mask(scores: Scores, budgets: Sequence[int]) -> Tensor:
    """The entries of the largest scores, bool [entries of all matrices]."""
    masks = [torch.zeros(s.numel(), dtype=torch.bool) for s in scores]
    for one, score, budget in zip(masks, scores, budgets, strict=True):
        one[score.topk(budget).indices] = True
    return torch.cat(masks)


def draw(path: Path, problem: Problem) -> None:
    """Tails of the scores of the matrix in the middle, and the budgets of all."""
    matplotlib.use("Agg")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    kinds = {"c = 0 (gem)": 0.0, "c = 0.1 (damped)": 0.1, "|g|": math.inf}
    middle = len(problem.weights) // 2
    for name, damping in kinds.items():
        scores = problem.scores(problem.gradients, damping)
        tail = scores[middle].sort(descending=True).values
        left.plot(np.arange(1, len(tail) + 1), tail / rms(tail), label=name)
        right.plot(
            by_norm_times_entropy(scores, problem.total), marker=".", linewidth=0.8, label=name
        )
    left.set(xscale="log", yscale="log", xlabel="entry, by score", ylabel="score / rms of scores")
    right.set(yscale="log", xlabel="target matrix", ylabel="budget by norm times entropy")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
