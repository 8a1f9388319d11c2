"""pass@k: the chance that at least one of k samples solves a problem, estimated from n >= k.

    pass@k of a problem = 1 - C(n - c, k) / C(n, k)      n samples, c of them right

This is the unbiased estimator of Chen et al. (arXiv 2107.03374, section 2.1). It is undefined for
n < k, and that is an error here, never a zero. The score is its mean over *all* problems: one
without samples counts as zero and is named, so that the denominator never shrinks.

The interval is a percentile bootstrap over problems: how far the score would move had other ones
been drawn, not other samples. Where all problems agree it has no width, and says nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import comb
from typing import Any

import numpy as np

STATUSES = ("passed", "failed", "timeout", "crashed")
CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000


def results_of(
    verdicts: Sequence[Mapping[str, Any]],
    task_ids: Sequence[str],
    ks: Sequence[int],
    *,
    isolation: str,
) -> dict[str, Any]:
    """The scores of all problems and what they were counted on, as results.json has them."""
    tried = Counter(verdict["task_id"] for verdict in verdicts)
    right = Counter(v["task_id"] for v in verdicts if v["status"] == "passed")
    counts = {name: (tried[name], right[name]) for name in task_ids}
    statuses = Counter(verdict["status"] for verdict in verdicts)
    in_jail = [verdict["status"] for verdict in verdicts if verdict["in_jail"]]
    scores = {}
    for k in ks:
        score, interval = mean_pass_at_k(counts, k)
        scores[f"pass@{k}"] = {"score": score, "confidence_interval": list(interval)}
    return {
        "n": max(tried.values(), default=0),
        "k": list(ks),
        "scores": scores,
        "confidence": CONFIDENCE,
        "num_problems": len(task_ids),
        "without_samples": [name for name in task_ids if not tried[name]],
        "verdicts": {status: statuses[status] for status in STATUSES},
        "tested_in_jail": {"samples": len(in_jail), "passed": in_jail.count("passed")},
        "isolation": isolation,
    }


def summary(results: Mapping[str, Any]) -> str:
    """The result lines, from `results_of`."""
    parts = []
    for name, score in results["scores"].items():
        value, low, high = (100 * x for x in (score["score"], *score["confidence_interval"]))
        parts.append(f"{name} = {value:.1f} % ({low:.1f} to {high:.1f})")
    verdicts = ", ".join(f"{count} {status}" for status, count in results["verdicts"].items())
    lines = [
        f"{', '.join(parts)} on {results['num_problems']} problems, n = {results['n']}",
        f"programs: {verdicts}; isolation: {results['isolation']}",
    ]
    if passed := results["tested_in_jail"]["passed"]:
        lines.append(f"of those that passed, {passed} had a say in their tests (tested_in_jail)")
    if missing := results["without_samples"]:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        lines.append(f"without samples, counted as zero: {', '.join(missing[:5])}{more}")
    return "\n".join(lines)


def pass_at_k(n: int, c: int, k: int) -> Fraction:
    """The exact estimate for one problem: `c` of `n` samples are right, and a user tries `k`."""
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}.")
    if n < k:
        raise ValueError(f"pass@{k} needs at least {k} samples, not {n}: draw more or lower k.")
    if not 0 <= c <= n:
        raise ValueError(f"{c} right samples of {n} cannot be: the count must lie in 0 to {n}.")
    return 1 - Fraction(comb(n - c, k), comb(n, k))


def mean_pass_at_k(
    counts: Mapping[str, tuple[int, int]], k: int
) -> tuple[float, tuple[float, float]]:
    """pass@k over all problems, by the samples and the right ones of each, and its interval."""
    if not counts:
        raise ValueError("There are no problems, so there is no score.")
    values = []
    for name, (n, c) in counts.items():
        if 0 < n < k:
            raise ValueError(
                f"{name} has {n} samples and pass@{k} needs at least {k}: lower k or draw more "
                "samples."
            )
        values.append(pass_at_k(n, c, k) if n else Fraction(0))
    interval = bootstrap_interval([float(value) for value in values])
    return float(sum(values, Fraction(0)) / len(values)), interval


def bootstrap_interval(
    values: Sequence[float], *, seed: int = 0, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """A percentile interval for the mean of `values`, one of each problem, drawn with replacement.

    How often a resample holds each distinct value is multinomial: one draw instead of many.
    """
    if not values:
        raise ValueError("There are no values, so there is no interval.")
    distinct = Counter(values)
    levels = np.array(sorted(distinct))
    shares = np.array([distinct[level] for level in levels.tolist()]) / len(values)
    draws = np.random.default_rng(seed).multinomial(len(values), shares, size=NUM_RESAMPLES)
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws @ levels / len(values), [tail, 1 - tail])
    return float(low), float(high)
