"""When a run logs, evaluates and saves, by transformers' flags."""

from dataclasses import dataclass

from gem_ds.train.config import TrainArguments

#: Steps between checkpoints where the flags ask for them by steps and do not say how many.
SAVE_STEPS = 500


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When a run of ``max_steps`` logs, evaluates and saves; each comes after the last step too."""

    train: TrainArguments
    max_steps: int
    steps_per_epoch: int
    is_sparse: bool

    def logs_after(self, step: int) -> bool:
        """Whether averages are logged after a step."""
        return self._is_due(self.train.logging_steps, step)

    def evaluates_after(self, step: int) -> bool:
        """Whether the held-out loss is due after a step."""
        train = self.train
        default = train.logging_steps if train.eval_strategy == "steps" else self.steps_per_epoch
        return train.eval_strategy != "no" and self._is_due(train.eval_steps or default, step)

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is due after a step."""
        steps = self.train.save_steps
        strategy = self.train.save_strategy or ("steps" if steps else None)
        if strategy is None:  # of whole parameters a checkpoint may be large
            strategy = "epoch" if self.is_sparse else "no"
        default = SAVE_STEPS if strategy == "steps" else self.steps_per_epoch
        return strategy != "no" and self._is_due(steps or default, step)

    def _is_due(self, interval: int, step: int) -> bool:
        return step % interval == 0 or step == self.max_steps
