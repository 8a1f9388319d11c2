"""Encoded examples -> token batches, in an order that depends on the step alone.

    EncodedDataset -> rows -> BatchSchedule -> collate -> a model's inputs

A *row* is a list of examples that share one sequence: one example, or with packing as many as fit.
Labels stand on the answer tokens only and are not shifted: the loss compares `logits[:, :-1]` with
`labels[:, 1:]`. Nothing here holds a position in the data. Step s reads the global batch s,
whatever the world size, so a run resumes exactly on any number of ranks.

What this file does not do: tokenize (`gem_ds.encode`), move tensors to a device, compute a loss.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from gem_ds.encode import EncodedDataset

IGNORED_LABEL = -100  # what cross_entropy leaves out


def collate(
    dataset: EncodedDataset, rows: Sequence[Sequence[int]], pad_token_id: int, packed: bool
) -> dict[str, Tensor]:
    """Lay rows out as a batch of B sequences, padded on the right to the longest, T.

    Packed rows carry no attention mask. Their position ids start at 0 for each example, and again
    for the padding; transformers reads the borders from these restarts and keeps attention within
    an example (`masking_utils.find_packed_sequence_indices`). Flash attention looks for the borders
    only where B is 1, and mixes the examples of longer batches.

    No rows at all give one sequence of padding without labels: a batch of weight zero.

    Returns:
        CPU tensors, int64 [B, T]: `input_ids`, `labels` (-100 outside the answers), and
        `position_ids` if packed, else `attention_mask`.
    """
    assert packed or all(len(row) == 1 for row in rows), "without packing a row is one example"
    rows = rows or [[]]
    num_tokens = max(2, *(sum(dataset.length(i) for i in row) for row in rows))
    input_ids = torch.full((len(rows), num_tokens), pad_token_id)
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    position_ids = torch.zeros_like(input_ids)
    attention_mask = torch.zeros_like(input_ids)
    for b, row in enumerate(rows):
        start = 0
        for i in row:
            answer, end = start + dataset.prompt_length(i), start + dataset.length(i)
            input_ids[b, start:end] = dataset.input_ids(i)
            labels[b, answer:end] = input_ids[b, answer:end]
            position_ids[b, start:end] = torch.arange(end - start)
            start = end
        position_ids[b, start:] = torch.arange(num_tokens - start)
        attention_mask[b, : start or num_tokens] = 1  # attention over nothing is undefined
    batch = {"input_ids": input_ids, "labels": labels}
    if packed:
        return batch | {"position_ids": position_ids}
    return batch | {"attention_mask": attention_mask}


@dataclass(frozen=True, kw_only=True)
class BatchSchedule:
    """Which rows each rank reads at each step: a pure function of the step.

    An epoch is a permutation of the rows drawn from (seed, epoch), cut into global batches; the
    last batch of an epoch may be smaller. `rank` and `world_size` decide only which part of a
    global batch is read here, never what is in it.
    """

    num_rows: int
    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int
    seed: int

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
        return order[start : start + self.global_batch_size].tolist()

    def micro_batches(self, step: int) -> list[list[int]]:
        """This rank's row ids at `step`: `num_micro_batches` lists, [] where no row is left.

        Over all ranks each row of the global batch comes exactly once. Rows are dealt out in turn,
        so that ranks differ by at most one row in an uneven batch too.
        """
        mine = self.global_batch(step)[self.rank :: self.world_size]
        size = self.micro_batch_size
        return [mine[k * size : (k + 1) * size] for k in range(self.num_micro_batches)]


@lru_cache(maxsize=2)
def permutation(num_rows: int, seed: int, epoch: int) -> Tensor:
    """The order in which `epoch` (from 0) reads rows: int64 [num_rows], not to be changed."""
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    return torch.randperm(num_rows, generator=generator)
