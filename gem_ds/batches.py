"""An encoded dataset as this rank's stream of micro-batches on its device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from gem_ds.comm import Comm
from gem_ds.data import BatchSchedule, collate
from gem_ds.encode import EncodedDataset
from gem_ds.packing import pack_rows


class Batches:
    """What each rank reads at each step, and how many tokens all ranks read together.

    Args:
        dataset: all examples, the same on every rank.
        comm: the ranks.
        global_batch_size: rows per step over all ranks; the last batch of an epoch may be smaller.
        micro_batch_size: rows per rank and forward pass.
        seed: of the shuffled order.
        pad_token_id: fills rows up to the longest.
        max_row_length: pack examples into rows of this many tokens; None for one row each.
    """

    def __init__(
        self,
        dataset: EncodedDataset,
        comm: Comm,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        pad_token_id: int,
        max_row_length: int | None = None,
    ) -> None:
        self.dataset = dataset
        self._packed = max_row_length is not None
        self._rows: Sequence[list[int]] = (
            pack_rows(dataset, max_row_length)
            if max_row_length is not None
            else [[i] for i in range(len(dataset))]
        )
        self._device = comm.device
        self._pad_token_id = pad_token_id
        self.schedule = BatchSchedule(
            num_rows=len(self._rows),
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            rank=comm.rank,
            world_size=comm.world_size,
            seed=seed,
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
            batch = collate(
                self.dataset, [self._rows[row] for row in rows], self._pad_token_id, self._packed
            )
            yield {key: tensor.to(self._device) for key, tensor in batch.items()}

    def num_answer_tokens(self, step: int) -> int:
        """Tokens that carry loss at ``step``, over all ranks and micro-batches."""
        return self.dataset.count_answer_tokens(self._examples(step))

    def num_tokens(self, step: int) -> int:
        """Tokens read at ``step`` over all ranks and micro-batches, padding left out."""
        return self.dataset.count_tokens(self._examples(step))

    def _examples(self, step: int) -> list[int]:
        return [i for row in self.schedule.global_batch(step) for i in self._rows[row]]
