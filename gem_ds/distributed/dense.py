"""An engine for what GEM is compared with: whole parameters, trained as DeepSpeed does it."""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import Tensor, nn

from gem_ds.distributed.engine import BaseEngine, bytes_of


class DenseEngine(BaseEngine):
    """An engine that trains parameters of the model themselves, as DeepSpeed does it.

    Args:
        model: with the parameters of ``optimizer`` among its own; the others are frozen.
        optimizer: of the trained parameters.
        config: a resolved DeepSpeed configuration.
        comm: the ranks.
    """

    def backward(self, compute_loss: Callable[[nn.Module], Tensor], *, deliver: bool) -> Tensor:
        """Run one micro-batch; the engine accumulates the gradients.

        Args:
            compute_loss: calls the model that it is given once, returns a scalar.
            deliver: True for the last micro-batch of a global batch only.

        Returns:
            The detached loss.
        """
        self._engine.set_gradient_accumulation_boundary(deliver)
        loss = compute_loss(self._engine)
        self._engine.backward(loss)
        return loss.detach()

    def optimizer_state_bytes(self) -> int:
        """Bytes of masters and moments that this rank holds, measured on the tensors.

        They exist from the first step on. An fp32 run at stage 0 has no masters beside the
        parameters; these are counted all the same.
        """
        return bytes_of(self.optimizer, list(self.optimizer.state))

    def whole_parameters(self, names: Collection[str]) -> dict[str, Tensor]:
        """Copies of parameters on the CPU, whole, on rank 0; on other ranks there are none."""
        named = dict(self.model.named_parameters())
        found = {}
        for name in names:
            whole = self.read_whole(named[name])
            if self.comm.is_main:
                found[name] = whole.cpu().clone()
        return found
