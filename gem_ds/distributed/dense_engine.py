"""DeepSpeed around a model whose own parameters are trained: for what GEM is compared with."""

from __future__ import annotations

import errno
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gem_ds.distributed.engine import BaseEngine

_TAG = "state"  # of DeepSpeed's checkpoints, of which a folder holds one


class DenseEngine(BaseEngine):
    """An engine that trains parameters of the model themselves, as DeepSpeed does it."""

    def module(self, *, deliver: bool) -> nn.Module:
        """As :meth:`Engine.module`; the engine accumulates the gradients."""
        self._engine.set_gradient_accumulation_boundary(deliver)
        return self._engine  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        """As :meth:`Engine.backward`."""
        self._engine.backward(loss)

    def whole_parameters(self, names: Collection[str]) -> dict[str, Tensor]:
        """Copies of parameters on the CPU, whole, on rank 0; on other ranks there are none."""
        named = dict(self.model.named_parameters())
        found = {}
        for name in names:
            whole = self.weights.read_whole(named[name])  # by all ranks together
            if self.comm.is_main:
                found[name] = whole.cpu().clone()
        return found

    @property
    def num_updates(self) -> int:
        """Optimizer updates applied so far, those of a loaded checkpoint included."""
        return int(self._engine.global_steps - self._engine.skipped_steps)

    def save(self, folder: Path) -> list[Path]:
        """Write DeepSpeed's checkpoint of what is trained; all ranks call it together.

        Returns the files that this rank has written. A rank that cannot write raises its OSError
        only after the others' collectives.
        """
        files = self._engine.checkpoint_engine
        save, written, errors = files.save, list[Path](), list[Exception]()

        def save_later_fail(state_dict: Any, path: str) -> None:
            try:
                save(state_dict, path)
                written.append(Path(path))
            except (OSError, RuntimeError) as error:  # torch says RuntimeError of a full disk
                errors.append(error)

        files.save = save_later_fail
        try:
            self._engine.save_checkpoint(
                str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=True
            )
        finally:
            files.save = save
        for error in errors:
            if isinstance(error, OSError):
                raise error
            raise OSError(errno.EIO, str(error).partition("\n")[0]) from error
        return written

    def load(self, folder: Path) -> None:
        """Go to where DeepSpeed's checkpoint stands; all ranks call it together.

        Rates and other numbers of the optimizer stay those that it was made with.
        """
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.param_groups
        ]
        self._engine.load_checkpoint(
            str(folder), tag=_TAG, load_module_strict=False, load_lr_scheduler_states=False
        )
        for group, kept in zip(self.optimizer.param_groups, groups, strict=True):
            group.pop("initial_lr", None)  # of the schedule, which begins anew
            group.update(kept)
