"""The gradient of a weight at selected entries: a sampled dense-dense matrix product (SDDMM).

For a linear layer ``y = x W^T`` the gradient is ``G = dy^T x``, shape [out, in]. GEM needs it

* whole, once per layer and micro-batch, while it calibrates: :func:`product`;
* at the k selected entries, while it trains: ``out_n += sum_t dy[t, i_n] x[t, j_n]``,
  :func:`add_sampled_product`.

Results are fp32 whatever the inputs are, so that sums over micro-batches do not round to bf16; but
one micro-batch's product of experts, in one launch on a GPU, is rounded to bf16 before it is added.
Several kernels compute the same (:mod:`gem_ds.sddmm.kernels`); which one is used when stands
in :mod:`gem_ds.sddmm.choice`, with the measurements behind it.

    whole     the product added as it is, where all entries are selected
    dense     the whole product, picked and dropped
    tiled     the same by tiles of rows; nothing larger than a tile is made
    gather    factors gathered entry by entry, in blocks of entries and tokens
    library   torch.sparse.sampled_addmm, in blocks of tokens
    triton    blocks of rows times the columns that they use, for CUDA, where triton is installed

Experts have a matrix each, and a token passes through some of them: their products are those of
groups of tokens (:mod:`gem_ds.sddmm.grouped`).
"""

from __future__ import annotations

from gem_ds.sddmm.choice import check_kernel, choose_kernel
from gem_ds.sddmm.grouped import add_product, add_sampled_product, grouped_linear, product
from gem_ds.sddmm.kernels import Pattern

__all__ = [
    "Pattern",
    "add_product",
    "add_sampled_product",
    "check_kernel",
    "choose_kernel",
    "grouped_linear",
    "product",
]
