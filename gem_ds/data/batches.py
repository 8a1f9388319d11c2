"""A dataset as this rank's stream of micro-batches on its device."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from gem_ds.data.schedule import BatchSchedule, Dataset
from gem_ds.distributed.comm import Comm


class Batches:
    """What each rank reads at each step, and how much all ranks read together.

    Args:
        dataset: all rows, the same on every rank.
        comm: the ranks.
        global_batch_size: rows per step over all ranks; the last batch of an epoch may be smaller.
        micro_batch_size: rows per rank and forward pass.
        seed: of the shuffled order.
        pad_token_id: fills sequences up to the longest.
        group_by_length: whether rows of about the same length share a batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        comm: Comm,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        pad_token_id: int,
        group_by_length: bool = False,
    ) -> None:
        self.dataset = dataset
        self._device = comm.device
        self._pad_token_id = pad_token_id
        self.schedule = BatchSchedule(
            num_rows=len(dataset),
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            rank=comm.rank,
            world_size=comm.world_size,
            seed=seed,
            lengths=dataset.lengths if group_by_length else None,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every row has been read once."""
        return self.schedule.steps_per_epoch

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches per rank and step."""
        return self.schedule.num_micro_batches

    def micro_batches(self, step: int) -> Iterator[dict[str, Tensor]]:
        """This rank's micro-batches at ``step``, the same number on every rank."""
        for rows in self.schedule.micro_batches(step):
            batch = self.dataset.collate(rows, self._pad_token_id)
            yield {key: self._to_device(tensor) for key, tensor in batch.items()}

    def _to_device(self, tensor: Tensor) -> Tensor:
        """Move it; a GPU copies from pinned memory while the host goes on."""
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    def weights(self, step: int) -> list[int]:
        """The weight of each of this rank's micro-batches at ``step``; 0 where no row is left."""
        return [self.dataset.weight(rows) for rows in self.schedule.micro_batches(step)]

    def weight(self, step: int) -> int:
        """What divides the loss of ``step``, summed over all ranks and micro-batches."""
        return self.dataset.weight(self.schedule.global_batch(step))

    @property
    def total_weight(self) -> int:
        """The same over an epoch."""
        return self.dataset.weight(range(len(self.dataset)))

    def num_tokens(self, step: int) -> int:
        """Tokens read at ``step`` over all ranks and micro-batches, padding left out."""
        return int(self.dataset.lengths[self.schedule.global_batch(step)].sum())
