"""The sampled product of few entries as a Triton kernel, for CUDA. Imported where it is used only.

A block is :data:`ROWS` neighbouring rows of the matrix; the columns in which any of these has an
entry are its *union*. The products of a block's rows with the columns of its union, and no others,
are made on tensor cores, and the entries are picked from them. The equivalent code:

    for block in blocks:
        strip = dyT[rows of block] @ xT[union of block].T           fp32 [ROWS, columns of union]
        out[entries of block] += strip[where they lie]

Where entries share columns, as they do in masks of trained models, a column is read once for all of
a block. Both factors are read from copies in [features, tokens] order, in the inputs' dtype: of
token-major ones a gathered column would be 2 useful bytes of each 32 fetched. The copies are padded
with zeros to whole steps of :data:`TOKENS`, so that rows begin at multiples of 16 numbers and no
load asks where the tokens end. No atomics: the same inputs give the same bits.

It was run under Triton's interpreter (``TRITON_INTERPRET=1``, set before triton is imported) and
compiled for GPUs (``tests/sparse/test_sddmm_triton.py``); its speed is unknown.
"""

from __future__ import annotations

import os
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gem_ds.sddmm.kernels import Pattern
from gem_ds.sddmm.strips import ROWS, TILE

TOKENS = 64  # that a program takes at a time


@triton.jit
def make_strips(
    strips,
    dy,
    x,
    columns,
    block_of_tile,
    bounds_of_tile,
    num_rows,
    stride,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDENS: tl.constexpr,
):
    """Products of one tile: a block's rows and so many columns of its union.

    ``dy`` is [num_rows, stride] and ``x`` [columns of the matrix, stride], both of tokens; the tile
    takes ``columns`` from its first bound to its second. ``strips`` is fp32 [columns, ROWS].
    """
    tile = tl.program_id(0)
    block = tl.load(block_of_tile + tile)
    place = tl.load(bounds_of_tile + tile) + tl.arange(0, TILE)
    is_column = place < tl.load(bounds_of_tile + tile + 1)
    column = tl.load(columns + place, mask=is_column, other=0)
    row = block * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    a_at = dy + row.to(tl.int64)[:, None] * stride + token[None, :]
    b_at = x + column.to(tl.int64)[None, :] * stride + token[:, None]
    sums = tl.zeros((ROWS, TILE), dtype=tl.float32)
    for _ in range(0, stride, TOKENS):
        a = tl.load(a_at, mask=(row < num_rows)[:, None], other=0.0)
        b = tl.load(b_at, mask=is_column[None, :], other=0.0)
        if WIDENS:
            a, b = a.to(tl.float32), b.to(tl.float32)
        sums = tl.dot(a, b, sums, input_precision="ieee")
        a_at += TOKENS
        b_at += TOKENS
    at = strips + place.to(tl.int64)[None, :] * ROWS + tl.arange(0, ROWS)[:, None]
    tl.store(at, sums, mask=is_column[None, :])


def add_strips(out: Tensor, dy: Tensor, x: Tensor, pattern: Pattern) -> None:
    """Makes transposed copies of dy and x, and the strips: 64 bytes for a column of a union."""
    strips = pattern.strips
    made = out.new_empty(len(strips.columns), ROWS)
    a, b = _tokens_last(dy), _tokens_last(x)
    kernel: Any = make_strips[(len(strips.block_of_tile),)]
    kernel(
        made,
        a,
        b,
        strips.columns,
        strips.block_of_tile,
        strips.bounds_of_tile,
        a.shape[0],
        a.shape[1],
        ROWS=ROWS,
        TILE=TILE,
        TOKENS=TOKENS,
        WIDENS=os.environ.get("TRITON_INTERPRET") == "1",  # whose numpy has no bf16
    )
    out += made.view(-1).index_select(0, strips.place)


def _tokens_last(part: Tensor) -> Tensor:
    """``part`` [tokens, features] as a copy [features, tokens], padded with zeros."""
    tokens, features = part.shape
    copy = part.new_empty(features, -(-tokens // TOKENS) * TOKENS)
    copy[:, :tokens], copy[:, tokens:] = part.t(), 0
    return copy
