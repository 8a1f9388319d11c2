"""A dataset as this rank's stream of micro-batches, in an order that depends on the step alone.

    Dataset -> BatchSchedule -> Dataset.collate -> a model's inputs, on its device

Nothing here holds a position in the data. Step s reads the global batch s, whatever the world size,
so a run resumes exactly on any number of ranks.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from gem_ds.data.dataset import Dataset
from gem_ds.distributed.comm import Comm

_WINDOW = 50  # batches that are sorted together, as the transformers Trainer does it

SummedLoss = Callable[[nn.Module, dict[str, Tensor]], Tensor]
"""Takes a model and a micro-batch; the loss summed over the micro-batch's items."""


class Batches:
    """What each rank reads at each step of `global_batch_size` rows, and how much all ranks read.

    The dataset is the same on every rank. With `group_by_length` rows of about the same length
    share a batch.
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
        self._ahead: tuple[int, dict[str, Tensor]] | None = None  # a step's first micro-batch
        self.schedule = BatchSchedule(
            num_rows=len(dataset),
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            rank=comm.rank,
            world_size=comm.world_size,
            seed=seed,
            lengths=dataset.lengths if group_by_length else None,
        )
        self.steps_per_epoch = self.schedule.steps_per_epoch
        self.num_micro_batches = self.schedule.num_micro_batches

    def micro_batches(self, step: int) -> Iterator[dict[str, Tensor]]:
        """This rank's micro-batches at ``step``, the same number on every rank."""
        ahead, self._ahead = self._ahead, None
        for i, rows in enumerate(self.schedule.micro_batches(step)):
            if i == 0 and ahead is not None and ahead[0] == step:
                yield ahead[1]
                continue
            batch = self.dataset.collate(rows, self._pad_token_id)
            if self._device.type == "cuda":  # which copies while the host goes on
                batch = {key: tensor.pin_memory() for key, tensor in batch.items()}
            yield {key: tensor.to(self._device, non_blocking=True) for key, tensor in batch.items()}

    def collate_ahead(self, step: int) -> None:
        """Make the first micro-batch of ``step`` now, while the device is busy with what it has."""
        self._ahead = step, next(self.micro_batches(step))

    def num_items(self, step: int) -> int:
        """What divides the loss of ``step``, summed over all ranks and micro-batches."""
        return self.dataset.num_items(self.schedule.global_batch(step))

    def num_items_by_micro_batch(self, step: int) -> list[int]:
        """The same of each of this rank's micro-batches alone; 0 where no row is left."""
        return [self.dataset.num_items(rows) for rows in self.schedule.micro_batches(step)]

    def num_tokens(self, step: int) -> int:
        """Tokens at ``step`` over all ranks and micro-batches, counted as `Dataset.lengths`."""
        return int(self.dataset.lengths[self.schedule.global_batch(step)].sum())


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


@lru_cache(maxsize=2)
def group_by_length(order: Tensor, lengths: Tensor, batches: Tensor, batch_size: int) -> Tensor:
    """Reorder rows, int64 [n], so that those of a batch are of about one length: saves padding.

    Rows are sorted by `lengths` within windows of 50 batches of the given order, so that the
    company of a row changes from epoch to epoch. The whole batches come in an order of their own,
    `batches` [n // batch_size]; a smaller one stays last. The result is not to be changed.
    """
    windows = torch.split(order, _WINDOW * batch_size)
    rows = torch.cat([window[lengths[window].argsort(stable=True)] for window in windows])
    whole = rows[: len(batches) * batch_size].view(-1, batch_size)
    return torch.cat([whole[batches].flatten(), rows[len(batches) * batch_size :]])
