"""The sampled product as one Triton kernel, for CUDA. Imported where it is asked for only.

The equivalent code, for one program of :data:`ENTRIES` neighbouring entries (i, j):

    sums = zeros(ENTRIES, TOKENS)                                   fp32
    for t in blocks of TOKENS tokens:
        sums += dyT[i, t] * xT[j, t]
    out[entries] += sums.sum(axis=1)

Entries ascend, so those of a program share few rows of ``dyT``, and neighbouring programs read the
same ones from the cache. Both factors are read from copies in [features, tokens] order: a load
takes :data:`TOKENS` neighbours, where token-major factors would give 2 useful bytes of each 32
fetched. Beside these copies, in the inputs' dtype, nothing is made; rows and columns are found from
the flat index in registers. No atomics: the same inputs give the same bits.

It was run under Triton's interpreter only so far (``TRITON_INTERPRET=1``, set before triton is
imported), so its speed is unknown.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gem_ds.sparse.sddmm.kernels import Pattern

ENTRIES, TOKENS = 16, 128  # 2,048 sums: 16 registers of each of 128 threads


@triton.jit
def _kernel(
    out,
    dy,
    x,
    flat_index,
    num_entries,
    num_tokens,
    columns,
    ENTRIES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    is_entry = entry < num_entries
    flat = tl.load(flat_index + entry, mask=is_entry, other=0)
    row_start = (flat // columns).to(tl.int64)[:, None] * num_tokens
    column_start = (flat % columns).to(tl.int64)[:, None] * num_tokens
    sums = tl.zeros((ENTRIES, TOKENS), dtype=tl.float32)
    for start in range(0, num_tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)[None, :]
        mask = is_entry[:, None] & (token < num_tokens)
        a = tl.load(dy + row_start + token, mask=mask, other=0.0)
        b = tl.load(x + column_start + token, mask=mask, other=0.0)
        sums += a.to(tl.float32) * b.to(tl.float32)
    before = tl.load(out + entry, mask=is_entry, other=0.0)
    tl.store(out + entry, before + tl.sum(sums, axis=1), mask=is_entry)


def add_triton(out: Tensor, dy: Tensor, x: Tensor, pattern: Pattern) -> None:
    """Makes transposed copies of dy and x, unless they lie so already."""
    tokens, columns = x.shape
    grid = (triton.cdiv(pattern.num_entries, ENTRIES),)
    kernel: Any = _kernel[grid]
    kernel(
        out,
        dy.t().contiguous(),
        x.t().contiguous(),
        pattern.flat_index,
        pattern.num_entries,
        tokens,
        columns,
        ENTRIES=ENTRIES,
        TOKENS=TOKENS,
    )
