"""Packing: several examples in one sequence, for models that keep them apart.

Rows are formed here and laid out by :func:`data.texts.collate`, which tells the model by position
ids where an example begins.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from gem_ds.data.ragged import digest, offsets_of
from gem_ds.data.texts import EncodedDataset, collate


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedDataset:
    """A dataset whose rows are several examples each.

    Attributes:
        examples: What is packed.
        rows: The examples that share each sequence.
    """

    examples: EncodedDataset
    rows: Sequence[list[int]]

    @classmethod
    def pack(cls, examples: EncodedDataset, max_length: int) -> PackedDataset:
        """Pack examples into rows of at most `max_length` tokens, as `pack_rows` does."""
        return cls(examples=examples, rows=pack_rows(examples, max_length))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_truncated(self) -> int:
        """How many examples lost the end of their answer to max_length."""
        return self.examples.num_truncated

    @property
    def largest_token(self) -> int:
        """The largest token id; -1 if there are no examples."""
        return self.examples.largest_token

    @property
    def longest(self) -> int:
        """Tokens of the longest row; 0 if there are none."""
        return int(self.lengths.max()) if len(self) else 0

    def select(self, indices: Sequence[int]) -> PackedDataset:
        """The dataset of these rows, in their order."""
        return PackedDataset(examples=self.examples, rows=[self.rows[i] for i in indices])

    def fingerprint(self) -> str:
        """A hash of the examples, and of which of them share a row."""
        offsets = offsets_of([len(row) for row in self.rows])
        members = torch.tensor(self._examples_of(range(len(self))), dtype=torch.int64)
        return self.examples.fingerprint() + digest(offsets, members)

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each row: int64 [rows]."""
        sums = [int(self.examples.lengths[torch.tensor(row)].sum()) for row in self.rows]
        return torch.tensor(sums, dtype=torch.int64)

    def weight(self, indices: Sequence[int]) -> int:
        """Tokens of these rows that carry loss."""
        return self.examples.weight(self._examples_of(indices))

    def collate(self, indices: Sequence[int], pad_token_id: int) -> dict[str, Tensor]:
        """As `gem_ds.data.texts.collate`."""
        return collate(self.examples, [self.rows[i] for i in indices], pad_token_id, packed=True)

    def _examples_of(self, indices: Sequence[int]) -> list[int]:
        return [i for row in indices for i in self.rows[row]]


def pack_rows(dataset: EncodedDataset, max_length: int) -> list[list[int]]:
    """Group examples into rows of at most `max_length` tokens: best fit, longest first.

    Each example goes into the fullest row that still has room for it, or opens a new row. The
    result depends on the lengths alone. Best-fit-decreasing needs at most 11/9 of the fewest
    possible rows (plus a constant); here it takes O(n log max_length).

    Raises:
        ValueError: An example is longer than `max_length`.
    """
    lengths = dataset.offsets.diff()
    rows: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = {}  # room -> open rows that have exactly this room left
    rooms: list[int] = []  # the keys of rows_by_room, sorted
    for i in torch.argsort(lengths, descending=True, stable=True).tolist():
        length = int(lengths[i])
        if length > max_length:
            raise ValueError(
                f"Example {i + 1} has {length} tokens and a row holds {max_length}: encode the "
                f"examples with a max_length of at most {max_length}."
            )
        position = bisect_left(rooms, length)
        if position == len(rooms):
            room, row = max_length, len(rows)
            rows.append([])
        else:
            room = rooms[position]
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                del rows_by_room[room], rooms[position]
        rows[row].append(i)
        if room - length not in rows_by_room:
            rows_by_room[room - length] = []
            insort(rooms, room - length)
        rows_by_room[room - length].append(row)
    return rows


@torch.no_grad()
def refuse_leaking_rows(
    model: nn.Module, device: torch.device, vocab_size: int, micro_batch_size: int
) -> None:
    """Refuse packing for a model that lets the examples of a row see each other.

    Two sequences share each row of a micro-batch, laid out as :func:`collate` does it; the first
    one's tokens are changed, and the logits of the second must not move. (Flash attention reads the
    borders in a micro-batch of one row only, so the size matters.) All ranks call this together.

    Raises:
        ValueError: they moved.
    """
    length = 4
    ids = torch.arange(2 * length, device=device) % vocab_size
    changed = torch.cat([ids[length:], ids[length:]])
    position_ids = torch.arange(length, device=device).repeat(micro_batch_size, 2)
    model.eval()
    plain, other = (
        model(
            input_ids=row.expand(micro_batch_size, -1), position_ids=position_ids, use_cache=False
        ).logits[:, length:]
        for row in (ids, changed)
    )
    if (plain - other).abs().max() > 1e-3 * plain.abs().max():
        raise ValueError(
            "This model lets packed examples see each other: leave --packing out, or with flash "
            "attention pass --per_device_train_batch_size 1 and --per_device_eval_batch_size 1."
        )
