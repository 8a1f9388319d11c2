"""What is lost when examples' gradients are summed with their signs: |sum g| beside sum |g|.

    python benchmarks/example_gradients.py --model_name_or_path runs/smollm2-135m --task cola \
        --data_dir path/to/CoLA --calibration_examples 128 --output_dir runs/example_gradients

takes the flags of launch/train.py. Each calibration example runs by itself, and of its gradient g_e
three sums are kept: of g_e (as ``gem``), of |g_e| (``gem_abs``), of g_e^2, whose root is taken
(``fish``). The first table says how they are related over the entries of the targets

    kept          |sum g_e| / sum |g_e|, quantiles: 1 where all examples agree in sign
    correlation   of the logarithms, with those of |sum g_e|

and the second, for scores of each by themselves and relative to |w|,

    layers        as if how many layers shared the budget equally: exp(entropy of k / K)
    budgets, masks   what two disjoint halves of the examples have in common
    with sum      what the mask has in common with that of the signed sum

Writes ``examples.md``. One process, everything dense.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from calibration_examples import calibrating_run, overlap
from score_tails import BUDGETS, EPSILON, mask
from steps.table import markdown
from torch import Tensor

from gem_ds.calibration.gradients import GradientSink, ShardReducer, begin_micro_batch
from gem_ds.select.rules import Statistic
from gem_ds.train.arguments import parse_arguments
from gem_ds.train.run import Run
from gem_ds.train.sparse_tuning import SparseTuning
from gem_ds.train.summary import effective_layers

STATISTICS: tuple[Statistic, ...] = get_args(Statistic)
QUANTILES = (0.1, 0.5, 0.9)

#: Of a statistic's sums and |w|, per matrix fp64 [n].
SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "g": lambda g, w: g,
    "g / \\|w\\|": lambda g, w: g / (w + EPSILON),
}

Sums = dict[Statistic, list[Tensor]]
"""By statistic and matrix, fp64 [n], not negative once they are whole."""


def main(argv: Sequence[str] | None = None) -> None:
    """Write the tables."""
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    run, tuning, halves = calibrating_run(args)
    parts = [sums_of(run, tuning, half.tolist()) for half in halves]
    both: Sums = {
        s: [a + b for a, b in zip(*(p[s] for p in parts), strict=True)] for s in STATISTICS
    }
    weights = [
        tuning.engine.weights.read_shard(layer.weight).double().abs() for layer in tuning.layers
    ]
    total = run.prepared.targets.budget
    folder = Path(str(args.train.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    whole, *half_sums = (magnitudes(sums) for sums in (both, *parts))
    text = f"{relations(whole)}\n\n{selections(whole, half_sums, weights, total)}\n"
    (folder / "examples.md").write_text(text)
    print(text, end="")


def sums_of(run: Run, tuning: SparseTuning, examples: Sequence[int]) -> Sums:
    """Each statistic of the examples' gradients."""
    reducer = ShardReducer(run.comm)
    sinks = {
        s: [
            GradientSink(layer, reducer, layer.numel, torch.zeros(layer.numel), True, s)
            for layer in tuning.layers
        ]
        for s in STATISTICS
    }

    def tell_all(place: int) -> Callable[[Tensor, Tensor], None]:
        def tell(a: Tensor, b: Tensor) -> None:
            for own in sinks.values():
                own[place](a, b)

        return tell

    summed_loss = run.prepared.objective.summed_loss
    batches = run.batches(run.prepared.data.train.select(list(examples)), one_by_one=True)
    run.engine.model.eval()
    with tuning.layers.sinks([tell_all(place) for place in range(len(tuning.layers))]):
        for step in range(batches.steps_per_epoch):
            for batch in batches.micro_batches(step):
                for own in sinks.values():
                    begin_micro_batch(own, 1.0)
                summed_loss(run.engine.model, batch).backward()
    return {s: [sink.take().double() for sink in own] for s, own in sinks.items()}


def magnitudes(sums: Sums) -> Sums:
    """|sum g|, sum |g| and the root of sum g^2."""
    made: Sums = {"sum": [s.abs() for s in sums["sum"]], "magnitudes": sums["magnitudes"]}
    return made | {"squares": [s.sqrt() for s in sums["squares"]]}


def relations(sums: Sums) -> str:
    """The first table."""
    flat = {s: torch.cat(own).numpy() for s, own in sums.items()}
    moved = flat["magnitudes"] > 0
    kept = np.quantile((flat["sum"][moved] / flat["magnitudes"][moved])[::7], QUANTILES)
    rows, title = [], "kept: " + ", ".join(f"{q:.0%}" for q in QUANTILES)
    positive = moved & (flat["sum"] > 0)
    logs = {s: np.log(values[positive]) for s, values in flat.items()}
    for name in STATISTICS:
        correlation = np.corrcoef(logs["sum"], logs[name])[0, 1]
        shown = ", ".join(f"{share:.2f}" for share in kept) if name == "magnitudes" else ""
        rows.append({"statistic": name, "correlation": f"{correlation:.3f}", title: shown})
    return markdown(rows)


def selections(whole: Sums, halves: Sequence[Sums], weights: Sequence[Tensor], total: int) -> str:
    """The second table."""
    rows = []
    for score_name, score in SCORES.items():
        for name, allocate in BUDGETS.items():
            if name == "without the head":
                continue
            masks = {}
            for statistic in STATISTICS:
                scored = [
                    [score(g, w) for g, w in zip(sums[statistic], weights, strict=True)]
                    for sums in (whole, *halves)
                ]
                budgets = [allocate(scores, total) for scores in scored]
                own, *half_masks = (mask(*pair) for pair in zip(scored, budgets, strict=True))
                masks[statistic] = own
                rows.append(
                    {
                        "score": score_name,
                        "budgets": name,
                        "statistic": statistic,
                        "layers": f"{effective_layers(budgets[0]):.1f} of {len(budgets[0])}",
                        "budgets agree": f"{sum(map(min, *budgets[1:])) / total:.2f}",
                        "masks agree": f"{overlap(*half_masks):.2f}",
                        "with sum": f"{overlap(own, masks['sum']):.2f}",
                    }
                )
    return markdown(rows)


if __name__ == "__main__":
    main()
