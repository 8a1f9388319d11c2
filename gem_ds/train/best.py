"""The best model of a run, by what was measured on held-out examples; flags are transformers'.

Nothing is kept of it but the log history, which every checkpoint holds: a resumed run knows the
best step of all its sessions. A checkpoint is written at each new best one, whatever else asks for
checkpoints, and stays.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from gem_ds.data.metrics import METRICS
from gem_ds.models.objective import Objective
from gem_ds.train.config import TrainArguments

_LOSS = "eval_loss"


@dataclass(frozen=True, kw_only=True)
class BestModel:
    """What makes a model better than another."""

    metric: str  # as the log names it
    greater_is_better: bool

    @classmethod
    def of_flags(cls, train: TrainArguments) -> Self | None:
        """What the flags say; None where the last model is wanted."""
        if not train.load_best_model_at_end:
            return None
        metric = f"eval_{(train.metric_for_best_model or _LOSS).removeprefix('eval_')}"
        is_greater = train.greater_is_better
        return cls(
            metric=metric,
            greater_is_better=not metric.endswith("loss") if is_greater is None else is_greater,
        )

    @property
    def is_metric(self) -> bool:
        """Whether it is a task's metric, which takes predictions."""
        return self.metric != _LOSS

    def step(
        self, log_history: Sequence[Mapping[str, Any]], steps: Collection[int] | None = None
    ) -> int | None:
        """The step of the best value, the first of several; of these steps where they are given.

        What was measured before training, or is not finite, does not count.
        """
        sign = 1 if self.greater_is_better else -1
        values = {
            int(entry["step"]): sign * entry[self.metric]
            for entry in log_history
            if self.metric in entry and entry["step"] and math.isfinite(entry[self.metric])
        }
        steps = values.keys() if steps is None else values.keys() & set(steps)
        return max(sorted(steps), key=values.__getitem__, default=None)


def refuse_unmeasured(
    train: TrainArguments, task: str, objective: Objective, num_held_out: int
) -> None:
    """Refuse a best model by what this run does not measure."""
    if (best := BestModel.of_flags(train)) is None:
        return
    if not num_held_out:
        raise ValueError(
            "--load_best_model_at_end needs held-out examples, and the data have none: pass a "
            "test file or --dev_examples, or leave it out."
        )
    names = METRICS.get(task, {}) if objective.predictor is not None else {}
    if best.is_metric and best.metric.removeprefix("eval_") not in names:
        known = ", ".join([_LOSS, *(f"eval_{name}" for name in names)])
        raise ValueError(
            f"--metric_for_best_model {train.metric_for_best_model} is not measured in training "
            f"on {task}: pass one of {known}."
        )
