"""The gradient of a weight at selected entries: a sampled dense-dense matrix product (SDDMM).

For a linear layer ``y = x W^T`` the gradient is ``G = dy^T x``, shape [out, in]. GEM needs it

* whole, once per layer and micro-batch, while it calibrates: :func:`product`,
  :func:`add_product_`;
* at the k selected entries, while it trains: ``G[i, j] = sum_t dy[t, i] x[t, j]``,
  :func:`sampled_product`.

Results are fp32 whatever the inputs are, so that sums over micro-batches do not round to bf16. On a
GPU the sampled entries are picked from the dense product, layer by layer; which way is faster there
has not been measured yet.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor


def product(dy: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """``dy^T x`` in fp32.

    Args:
        dy: [tokens, rows].
        x: [tokens, columns], of dy's dtype and device.
        out: fp32 [rows, columns] to overwrite, if given.

    Returns:
        fp32 [rows, columns].
    """
    if dy.dtype != torch.float32 and dy.is_cuda:
        return torch.mm(dy.t(), x, out_dtype=torch.float32, out=out)  # accumulated and kept in fp32
    return torch.mm(dy.float().t(), x.float(), out=out)


def add_product_(sums: Tensor, dy: Tensor, x: Tensor, *, scale: float = 1.0) -> Tensor:
    """Add ``scale * dy^T x`` to ``sums``, fp32 [rows, columns], and return it.

    Besides, a GPU holds a whole product where dy is not fp32.
    """
    if dy.dtype != torch.float32 and dy.is_cuda:
        return sums.add_(product(dy, x), alpha=scale)
    return sums.addmm_(dy.float().t(), x.float(), alpha=scale)


@functools.cache
def _swallow_csr_notice() -> None:
    """Take torch's once-per-process notice that CSR tensors are in beta, so that users do not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        torch.zeros(1, 1).to_sparse_csr()


def sampled_product(dy: Tensor, x: Tensor, flat_index: Tensor) -> Tensor:
    """``(dy^T x)`` at the flat entries ``flat_index``, in fp32.

    Args:
        dy: [tokens, rows].
        x: [tokens, columns], of dy's dtype and device.
        flat_index: int [k], sorted, each ``row * columns + column``.

    Returns:
        fp32 [k].
    """
    if flat_index.numel() == 0:
        return torch.zeros(0, dtype=torch.float32, device=dy.device)
    if dy.is_cuda:
        return product(dy, x).view(-1)[flat_index]
    _swallow_csr_notice()
    rows, columns = dy.shape[1], x.shape[1]
    row_bounds = torch.arange(rows + 1, dtype=flat_index.dtype) * columns
    pattern = torch.sparse_csr_tensor(
        torch.searchsorted(flat_index, row_bounds),  # sorted flat indices are CSR order
        (flat_index % columns).long(),
        torch.zeros(flat_index.numel()),
        size=(rows, columns),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(pattern, dy.float().t(), x.float(), beta=0.0).values()
