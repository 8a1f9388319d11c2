"""When a run logs, evaluates and saves, by transformers' flags."""

from __future__ import annotations

from dataclasses import dataclass

from gem_ds.train.config import TrainArguments

#: Steps between checkpoints where the flags ask for them by steps and do not say how many.
SAVE_STEPS = 500


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How many steps lie between one and the next, which comes after the last step too.

    None where there is to be none.
    """

    max_steps: int
    logging: int
    evaluation: int | None
    saving: int | None

    @classmethod
    def of_flags(
        cls, train: TrainArguments, *, max_steps: int, steps_per_epoch: int, is_sparse: bool
    ) -> Schedule:
        """What the flags say of a run of so many steps."""
        evaluation = train.logging_steps if train.eval_strategy == "steps" else steps_per_epoch
        strategy = train.save_strategy or ("steps" if train.save_steps else None)
        if strategy is None:  # of whole parameters a checkpoint may be large
            strategy = "epoch" if is_sparse else "no"
        saving = train.save_steps or (SAVE_STEPS if strategy == "steps" else steps_per_epoch)
        return cls(
            max_steps=max_steps,
            logging=train.logging_steps,
            evaluation=None if train.eval_strategy == "no" else train.eval_steps or evaluation,
            saving=None if strategy == "no" else saving,
        )

    def logs_after(self, step: int) -> bool:
        """Whether averages are logged after a step."""
        return self._is_due(self.logging, step)

    def evaluates_after(self, step: int) -> bool:
        """Whether the held-out loss is due after a step."""
        return self._is_due(self.evaluation, step)

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is due after a step."""
        return self._is_due(self.saving, step)

    def _is_due(self, interval: int | None, step: int) -> bool:
        return interval is not None and (step % interval == 0 or step == self.max_steps)
