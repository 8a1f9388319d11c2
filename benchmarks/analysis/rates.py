"""Learning-rate curves: loss and score on the development split by method and rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from steps.table import markdown

from gem_ds.comparison.bootstrap import is_loss
from gem_ds.comparison.cells import rate_text

from .figures import look, panels, set_scale
from .runs import FinishedRun, by_method


def rate_table(runs: Sequence[FinishedRun]) -> str:
    """Of a task's development runs: a line per method, the least loss in bold, then the score."""
    tried = by_method(runs)
    rates = sorted({run.learning_rate for own in tried.values() for run in own})
    rows = []
    for method, own in tried.items():
        losses = {run.learning_rate: run.result["loss"] for run in own}
        row = {"method": method} | dict.fromkeys(map(rate_text, rates), "")
        for run in own:
            score = f" ({run.result['score']:.3f})" if _has_score(run) else ""
            text = f"{run.result['loss']:.3f}{score}"
            is_best = run.result["loss"] == min(losses.values())
            row[rate_text(run.learning_rate)] = f"**{text}**" if is_best else text
        rows.append(row)
    return markdown(rows) if rows else ""


def rate_figure(tried: Mapping[str, Sequence[FinishedRun]]) -> Figure:
    """Of runs on the development split: loss above, score below where there is one, by task."""
    every = [run for runs in tried.values() for run in runs]
    kinds = ["loss", "score"] if any(_has_score(run) for run in every) else ["loss"]
    figure, axes = panels(kinds, list(tried), [run.method for run in every])
    for kind in kinds:
        for task, runs in tried.items():
            here = axes[kind, task]
            if kind == "score" and not any(map(_has_score, runs)):
                here.set_visible(False)
                continue
            for method, own in by_method(runs).items():
                rates = [run.learning_rate for run in own]
                here.plot(rates, [run.result[kind] for run in own], **look(method))
            metric = runs[0].result["metric"].replace("_", " ") if kind == "score" else "loss"
            here.set(
                xscale="log", title=task, xlabel="learning rate", ylabel=f"development {metric}"
            )
            if kind == "loss":
                set_scale(here)
    return figure


def _has_score(run: FinishedRun) -> bool:
    return not is_loss(run.result["metric"])
