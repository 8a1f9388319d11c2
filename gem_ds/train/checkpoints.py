"""The checkpoints of a run: when one is the best, which stay, which one the run goes back to."""

from collections.abc import Callable
from typing import Any

from gem_ds.distributed.comm import Comm
from gem_ds.files.checkpoint import (
    Checkpoint,
    TrainerState,
    delete_old_checkpoints,
    list_checkpoints,
)
from gem_ds.files.dense_checkpoint import DenseCheckpoint
from gem_ds.train.best import BestModel
from gem_ds.train.dense_tuning import DenseTuning
from gem_ds.train.prepare import PreparedRun
from gem_ds.train.sparse_tuning import SparseTuning


class Checkpoints:
    """Those of what is trained, in the run's folder; ``state`` is the run's, which goes on."""

    def __init__(
        self,
        prepared: PreparedRun,
        tuning: SparseTuning | DenseTuning,
        state: TrainerState,
        comm: Comm,
    ) -> None:
        self.folder, self.tuning, self.state, self.comm = prepared.output_dir, tuning, state, comm
        self.limit = prepared.args.train.save_total_limit
        self.best = BestModel.of_flags(prepared.args.train)
        self.has_unproven = prepared.checkpoint is not None  # a kill may have left more

    def save(self) -> None:
        """Write that of the present step."""
        self.tuning.save_checkpoint(self.state)
        self.has_unproven = True

    def delete_old(self) -> None:
        """Keep to ``--save_total_limit``, once the newest checkpoint's weights have borne a step.

        Until its loss and gradient were finite, the one before may be the last good one.
        """
        if self.limit is None or not self.has_unproven:
            return
        with self.comm.agreement():
            if self.comm.is_main:
                best = None if self.best is None else self.best.step(self.state.log_history)
                delete_old_checkpoints(self.folder, self.limit, best)
        self.has_unproven = False

    def is_best(self) -> bool:
        """Whether the model of this step is the best so far, where the best one is wanted."""
        history, step = self.state.log_history, self.state.global_step
        return self.best is not None and self.best.step(history) == step

    def load_best(self, say: Callable[[str], None]) -> int:
        """Go back to the best model, if it is wanted; returns the step of the model at hand."""
        last = self.state.global_step
        if self.best is None:
            return last
        folders = self.comm.broadcast_object(list_checkpoints(self.folder))
        step = self.best.step(self.state.log_history, folders)
        if step is None or step == last:
            return last
        checkpoint: Any  # of the kind that is trained
        is_sparse = isinstance(self.tuning, SparseTuning)
        with self.comm.agreement():
            checkpoint = (Checkpoint if is_sparse else DenseCheckpoint).load(folders[step])
        self.tuning.restore(checkpoint)
        say(f"The best model is that of step {step}, by {self.best.metric}")
        return step
