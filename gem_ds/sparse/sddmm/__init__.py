"""The gradient of a weight at selected entries: a sampled dense-dense matrix product (SDDMM).

For a linear layer ``y = x W^T`` the gradient is ``G = dy^T x``, shape [out, in]. GEM needs it

* whole, once per layer and micro-batch, while it calibrates: :func:`product`;
* at the k selected entries, while it trains: ``out_n += sum_t dy[t, i_n] x[t, j_n]``,
  :func:`add_sampled_product`.

Results are fp32 whatever the inputs are, so that sums over micro-batches do not round to bf16.
Several kernels compute the same; which one is used when stands in
:mod:`gem_ds.sparse.sddmm.choice`, with the measurements behind it.

    dense     the whole product, picked and dropped
    tiled     the same by tiles of rows; nothing larger than a tile is made
    gather    factors gathered entry by entry, in blocks of entries and tokens
    library   torch.sparse.sampled_addmm, in blocks of tokens
    triton    a kernel of our own for CUDA, where triton is installed
"""

from __future__ import annotations

from torch import Tensor

from gem_ds.sparse.sddmm.choice import check_kernel, choose_kernel
from gem_ds.sparse.sddmm.kernels import (
    Pattern,
    add_dense,
    add_gathered,
    add_library,
    add_product,
    add_tiled,
    product,
)

__all__ = [
    "Pattern",
    "add_product",
    "add_sampled_product",
    "check_kernel",
    "choose_kernel",
    "product",
]


def _add_triton(out: Tensor, dy: Tensor, x: Tensor, pattern: Pattern) -> None:
    from gem_ds.sparse.sddmm.triton_kernel import add_triton  # the library works without triton

    add_triton(out, dy, x, pattern)


_KERNELS = {
    "dense": add_dense,
    "tiled": add_tiled,
    "gather": add_gathered,
    "library": add_library,
    "triton": _add_triton,
}


def add_sampled_product(
    out: Tensor, dy: Tensor, x: Tensor, pattern: Pattern, kernel: str = "auto"
) -> None:
    """Add ``dy^T x`` at the entries of ``pattern`` to ``out``.

    Args:
        out: fp32 [k], contiguous.
        dy: [tokens, rows].
        x: [tokens, columns], of dy's dtype and device.
        pattern: k entries of [rows, columns], on the same device.
        kernel: auto, or the name of one.
    """
    assert (dy.shape[1], x.shape[1]) == pattern.shape, "the pattern is of another layer"
    if pattern.num_entries == 0 or dy.shape[0] == 0:
        return
    if kernel == "auto":
        kernel = choose_kernel(dy.device.type, dy.dtype, pattern.shape, pattern.num_entries)
    _KERNELS[kernel](out, dy, x, pattern)
