"""What a dataset is, and the order in which its rows are read, which depends on the step alone.

    Dataset -> BatchSchedule -> Dataset.collate -> a model's inputs

Datasets are `data.texts` (a model learns to write the answer), `data.choices` (it finds one
candidate likelier than the others) and `data.pairs` (an encoder's head). Nothing here holds a
position in the data. Step s reads the global batch s, whatever the world size, so a run resumes
exactly on any number of ranks.

What this file does not do: tokenize (`data.encode`), move tensors to a device, compute a loss.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, Self

import torch
from torch import Tensor


class Dataset(Protocol):
    """Examples as tensors: what training and evaluation read, whatever an answer is.

    A *row* is what comes into a batch as one: an example, or with packing several.
    """

    def __len__(self) -> int:
        """The number of rows."""

    @property
    def num_truncated(self) -> int:
        """How many examples lost a part of their text to the limit on the length."""

    @property
    def largest_token(self) -> int:
        """The largest token id; -1 if there are no examples."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence; 0 if there are no examples."""

    def select(self, indices: Sequence[int]) -> Self:
        """The dataset of these rows, in their order."""

    def fingerprint(self) -> str:
        """A hash of all that a model reads and learns, so that a resume can refuse other data."""

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, padding left out: int64 [rows]."""

    def weight(self, indices: Sequence[int]) -> int:
        """What the loss summed over these rows is divided by to make it a mean."""

    def collate(self, indices: Sequence[int], pad_token_id: int) -> dict[str, Tensor]:
        """These rows as a batch of CPU tensors, padded on the right.

        No rows give a batch of weight zero: the model runs on padding, and the summed loss is 0.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchSchedule:
    """Which rows each rank reads at each step: a pure function of the step.

    An epoch is a permutation of the rows drawn from (seed, epoch), cut into global batches; the
    last batch of an epoch may be smaller. `rank` and `world_size` decide only which part of a
    global batch is read here, never what is in it. With `lengths` (int64 [num_rows]) the rows of a
    global batch are of about one length (`group_by_length`).
    """

    num_rows: int
    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int
    seed: int
    lengths: Tensor | None = None

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise ValueError("There are no training examples: check the training file.")
        for name in ("global_batch_size", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1.")
        assert 0 <= self.rank < self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch, the uneven last one included."""
        return -(-self.num_rows // self.global_batch_size)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches per step and rank: the same number everywhere, some perhaps empty."""
        return -(-self.global_batch_size // (self.micro_batch_size * self.world_size))

    def global_batch(self, step: int) -> list[int]:
        """The row ids that all ranks together read at the optimizer step `step`, from 0."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        start = batch * self.global_batch_size
        order = permutation(self.num_rows, self.seed, epoch)
        if self.lengths is not None:
            batches = permutation(self.num_rows // self.global_batch_size, self.seed, epoch)
            order = group_by_length(order, self.lengths, batches, self.global_batch_size)
        return order[start : start + self.global_batch_size].tolist()

    def micro_batches(self, step: int) -> list[list[int]]:
        """This rank's row ids at `step`: `num_micro_batches` lists, [] where no row is left.

        Over all ranks each row of the global batch comes exactly once. Rows are dealt out in turn,
        so that ranks differ by at most one row in an uneven batch too.
        """
        mine = self.global_batch(step)[self.rank :: self.world_size]
        size = self.micro_batch_size
        return [mine[k * size : (k + 1) * size] for k in range(self.num_micro_batches)]


@lru_cache(maxsize=8)
def permutation(num_rows: int, seed: int, epoch: int) -> Tensor:
    """The order in which `epoch` (from 0) reads rows: int64 [num_rows], not to be changed."""
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    return torch.randperm(num_rows, generator=generator)


_WINDOW = 50  # batches that are sorted together, as the transformers Trainer does it


@lru_cache(maxsize=2)
def group_by_length(order: Tensor, lengths: Tensor, batches: Tensor, batch_size: int) -> Tensor:
    """Reorder rows so that those of a batch are of about one length, which saves padding.

    Rows are sorted within windows of 50 batches of the given order, so that the company of a row
    changes from epoch to epoch, and the batches come in an order of their own.

    Args:
        order: int64 [n], the shuffled rows.
        lengths: int64 [n] of all rows.
        batches: int64 [n // batch_size], the order of the whole batches; a smaller one stays last.
        batch_size: rows of a batch.

    Returns:
        int64 [n], not to be changed.
    """
    windows = order.split(_WINDOW * batch_size)
    rows = torch.cat([window[lengths[window].argsort(stable=True)] for window in windows])
    whole = rows[: len(batches) * batch_size].view(-1, batch_size)
    return torch.cat([whole[batches].flatten(), rows[len(batches) * batch_size :]])
