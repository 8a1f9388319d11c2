"""Where the entries of a matrix lie if it is cut into blocks of a few neighbouring rows.

Of each block the *union* is the columns in which one of its rows has an entry; a strip is the
block's rows at one column of it. All unions, one block's after another's, are ``columns``, and an
entry is the number of its row in the strip of its column.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 16  # of a block: the fewest that tensor cores multiply
TILE = 64  # strips of a tile at most


@dataclass(frozen=True)
class Strips:
    """The strips of a pattern of k entries; a tile is :data:`TILE` of a block, or what is left."""

    columns: Tensor  # int32 [u], of the strips
    place: Tensor  # int32 or int64 [k]: the entry's strip * ROWS + row in its block
    block_of_tile: Tensor  # int32 [tiles]
    bounds_of_tile: Tensor  # int32 [tiles + 1]; tile t has the strips from bounds[t] to bounds[t+1]

    @classmethod
    def of(cls, flat_index: Tensor, num_columns: int) -> Strips:
        """Of entries at ascending flat indices of a matrix of so many columns."""
        index = flat_index.long()
        row, column = index // num_columns, index % num_columns
        strip = row // ROWS * num_columns + column
        found, which = strip.unique(return_inverse=True)
        block = found // num_columns
        blocks, counts = block.unique_consecutive(return_counts=True)
        tiles = (counts + TILE - 1) // TILE
        starts = counts.cumsum(0) - counts
        number = torch.arange(int(tiles.sum()), device=index.device)
        within = number - (tiles.cumsum(0) - tiles).repeat_interleave(tiles)
        bounds = starts.repeat_interleave(tiles) + within * TILE
        place = which * ROWS + row % ROWS
        fits = len(found) * ROWS < 2**31
        return cls(
            columns=(found % num_columns).int(),
            place=place.int() if fits else place,
            block_of_tile=blocks.repeat_interleave(tiles).int(),
            bounds_of_tile=torch.cat([bounds, bounds.new_tensor([len(found)])]).int(),
        )
