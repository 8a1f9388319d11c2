"""Packing: several examples in one sequence, for models that keep them apart.

`Dataset.collate` tells the model by position ids where an example begins.
"""

from bisect import bisect_left, insort
from dataclasses import replace

import torch
from torch import Tensor, nn

from gem_ds.data.dataset import Dataset, offsets_of


def pack(examples: Dataset, max_length: int) -> Dataset:
    """Examples of one sequence each, as rows of at most `max_length` tokens (`pack_rows`)."""
    rows = pack_rows(examples.lengths, max_length)
    ordered = examples.select([i for row in rows for i in row])
    return replace(ordered, groups=offsets_of([len(row) for row in rows]), is_packed=True)


def pack_rows(lengths: Tensor, max_length: int) -> list[list[int]]:
    """Group examples of `lengths` [n] into rows of at most `max_length`: best fit, longest first.

    Each example goes into the fullest row that still has room for it, or opens a new row; the
    result depends on the lengths alone. That needs at most 11/9 of the fewest possible rows (plus
    a constant) and takes O(n log max_length).
    """
    rows: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = {}  # room -> open rows that have exactly this room left
    rooms: list[int] = []  # the keys of rows_by_room, sorted
    for i in lengths.argsort(descending=True, stable=True).tolist():
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
        room -= length
        if room not in rows_by_room:
            insort(rooms, room)
        rows_by_room.setdefault(room, []).append(row)
    return rows


@torch.no_grad()
def refuse_leaking_rows(
    model: nn.Module, device: torch.device, vocab_size: int, micro_batch_size: int
) -> None:
    """Refuse packing for a model that lets the examples of a row see each other.

    Two sequences share each row of a micro-batch, laid out as `Dataset.collate` does it; the first
    one's tokens are changed, and the logits of the second must not move. (Flash attention reads the
    borders in a micro-batch of one row only, so the size matters.) All ranks call this together.
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
