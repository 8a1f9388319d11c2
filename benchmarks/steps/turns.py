"""Timing by turns: whatever else the machine does meets all alike."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch


def seconds(act: Callable[[], object]) -> float:
    """Of one call, until the device is done."""
    started = time.perf_counter()
    act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def take_turns(actions: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, np.ndarray]:
    """What the actions return, [rounds]; each round has an order of its own, by chance.

    A round before the first warms up and is not counted.
    """
    found: dict[str, list[float]] = {name: [] for name in actions}
    order, chance = list(actions), random.Random(0)
    for number in range(rounds + 1):
        chance.shuffle(order)
        for name in order:
            found[name].append(actions[name]())
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    return {name: np.array(values[1:]) for name, values in found.items()}


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """The median, and the ends of its 95 % bootstrap interval."""
    draws = np.random.default_rng(0).choice(values, size=(10_000, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(np.median(values)), float(low), float(high)
