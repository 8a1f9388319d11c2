"""The kernels that torch alone can express; :mod:`gem_ds.sddmm` tells what they compute.

Beside its result a kernel makes what its docstring names, and drops it when it returns. What lasts
from step to step is the :class:`Pattern`: the flat indices, which the caller holds anyway, and the
bounds of the rows among them; on a GPU that takes ``triton`` the strips too, at most 8 bytes an
entry. Elsewhere column indices are ``flat_index % columns`` and are made anew by each call: 0.1 ms
for 84,000 entries (two CPU cores), a hundredth of the product over 1,000 tokens; kept, they would
double what the indices cost.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gem_ds.sddmm.choice import WHOLE, choose_kernel
from gem_ds.sddmm.strips import Strips

#: What a tile of the dense product may take. On a CPU about a cache, with enough rows for an
#: efficient product; on a GPU the whole of 4096 x 4096 entries, in three launches.
CPU_TILE_BYTES, GPU_TILE_BYTES = 8 << 20, 64 << 20
#: Tokens at once where copies in fp32 are made. On a CPU such a block of 4,096 columns (2 MiB)
#: stays in a core's cache while the entries read it in any order.
CPU_LIBRARY_TOKENS, GPU_LIBRARY_TOKENS = 128, 2048
DENSE_TOKENS = 512
#: Entries and tokens at once whose factors are gathered: two times 4 MiB in fp32.
GATHER_ENTRIES, GATHER_TOKENS = 4096, 256


@dataclass(frozen=True, eq=False)
class Pattern:
    """Some entries of a matrix, in the order of their flat indices.

    The entries of row i are those from ``row_bounds[i]`` to ``row_bounds[i + 1]``.
    """

    flat_index: Tensor  # int [k], ascending, each ``row * columns + column``; shared, not copied
    shape: tuple[int, int]  # [rows, columns]
    row_bounds: Tensor  # [rows + 1] on the CPU, of the same dtype

    @classmethod
    def of(cls, flat_index: Tensor, shape: tuple[int, ...]) -> Pattern:
        """Find the rows' bounds; several matrices of one shape are one, below each other."""
        rows, columns = math.prod(shape[:-1]), shape[-1]
        starts = torch.arange(rows, device=flat_index.device) * columns
        bounds = torch.searchsorted(flat_index, starts.to(flat_index.dtype))
        row_bounds = torch.empty(rows + 1, dtype=flat_index.dtype)
        row_bounds[:-1], row_bounds[-1] = bounds, flat_index.numel()
        return cls(flat_index, (rows, columns), row_bounds)

    def part(self, row: int, num_rows: int) -> tuple[slice, Pattern]:
        """Which entries lie in so many rows from ``row``, and the pattern of these rows alone."""
        bounds = self.row_bounds[row : row + num_rows + 1]
        entries = slice(int(bounds[0]), int(bounds[-1]))
        columns = self.shape[1]
        index = self.flat_index[entries] - row * columns
        return entries, Pattern(index, (num_rows, columns), bounds - bounds[0])

    @property
    def num_entries(self) -> int:
        """The number k."""
        return self.flat_index.numel()

    @property
    def is_whole(self) -> bool:
        """Whether these are all entries of the matrix."""
        return self.num_entries == math.prod(self.shape)

    @functools.cached_property
    def strips(self) -> Strips:
        """Where the entries lie among blocks of rows, found when the first kernel asks for it."""
        return Strips.of(self.flat_index, self.shape[1])


def _blocks(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


# The whole product


def product(dy: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """``dy^T x`` in fp32 [rows, columns], written to ``out`` if given.

    dy is [tokens, rows] and x [tokens, columns], of one dtype and device. On a CPU low precision is
    converted :data:`DENSE_TOKENS` at a time.
    """
    if dy.dtype == torch.float32:
        return torch.mm(dy.t(), x, out=out)
    if dy.is_cuda:
        return torch.mm(dy.t(), x, out_dtype=torch.float32, out=out)  # accumulated and kept in fp32
    if out is None:
        out = dy.new_empty(dy.shape[1], x.shape[1], dtype=torch.float32)
    add_product(out.zero_(), dy, x)
    return out


def add_product(out: Tensor, dy: Tensor, x: Tensor, scale: float = 1.0) -> None:
    """Add ``scale * dy^T x`` to ``out``, fp32 [rows, columns].

    A GPU holds a whole product besides where dy is of low precision and torch adds none of such to
    fp32 at once.
    """
    if dy.dtype == torch.float32:
        out.addmm_(dy.t(), x, alpha=scale)
    elif dy.is_cuda and _adds_to_fp32():
        torch.addmm(out, dy.t(), x, out_dtype=torch.float32, alpha=scale, out=out)
    elif dy.is_cuda:
        out.add_(product(dy, x), alpha=scale)
    else:
        for tokens in _blocks(dy.shape[0], DENSE_TOKENS):
            out.addmm_(dy[tokens].float().t(), x[tokens].float(), alpha=scale)


@functools.cache
def _adds_to_fp32() -> bool:
    """Whether this torch adds a product of 16 bits to a matrix of fp32: older ones refuse it."""
    factor = torch.ones(16, 16, dtype=torch.bfloat16, device="cuda")
    out = torch.zeros(16, 16, device="cuda")
    try:
        torch.addmm(out, factor, factor, out_dtype=torch.float32, out=out)
    except RuntimeError:
        return False
    return True


# The kernels


def add_whole(out: Tensor, dy: Tensor, x: Tensor, pattern: Pattern) -> None:
    """Makes nothing: adds the product itself, where all entries are selected."""
    add_product(out.view(pattern.shape), dy, x)


def add_dense(out: Tensor, dy: Tensor, x: Tensor, pattern: Pattern) -> None:
    """Makes the whole product: 4 bytes for each entry of the matrix."""
    out += product(dy, x).view(-1).index_select(0, pattern.flat_index)


def add_tiled(out: Tensor, dy: Tensor, x: Tensor, pattern: Pattern) -> None:
    """Makes one tile, of :data:`CPU_TILE_BYTES`; tiles without entries are left out."""
    rows, columns = pattern.shape
    tile_bytes = CPU_TILE_BYTES if dy.device.type == "cpu" else GPU_TILE_BYTES
    rows_per_tile = min(rows, max(1, tile_bytes // (4 * columns)))
    buffer = out.new_empty(rows_per_tile, columns)
    for tile in _blocks(rows, rows_per_tile):
        start, stop = pattern.row_bounds[tile.start].item(), pattern.row_bounds[tile.stop].item()
        if start < stop:
            dense = product(dy[:, tile], x, buffer[: tile.stop - tile.start])
            index = pattern.flat_index[start:stop]
            if tile.start:
                index = index - tile.start * columns
            out[start:stop].add_(dense.view(-1).index_select(0, index))


def add_gathered(out: Tensor, dy: Tensor, x: Tensor, pattern: Pattern) -> None:
    """Makes both factors of :data:`GATHER_ENTRIES` x :data:`GATHER_TOKENS`; reads nothing else."""
    columns = pattern.shape[1]
    for entries in _blocks(pattern.num_entries, GATHER_ENTRIES):
        flat_index = pattern.flat_index[entries]
        row, column = flat_index // columns, flat_index % columns
        for tokens in _blocks(dy.shape[0], GATHER_TOKENS):
            a = dy[tokens].t().index_select(0, row).float()  # [entries, tokens]
            b = x[tokens].t().index_select(0, column).float()
            out[entries].add_(torch.linalg.vecdot(a, b))


def add_library(out: Tensor, dy: Tensor, x: Tensor, pattern: Pattern) -> None:
    """Makes fp32 copies, transposed, of so many tokens of dy and x, and column indices.

    The library takes fp32 and fp64 only and reads both factors along the tokens. It transposes for
    itself too, but whole, which costs more than the product where few entries are selected.
    """
    _swallow_csr_notice()
    rows, columns = pattern.shape
    sampled = torch.sparse_csr_tensor(
        pattern.row_bounds.to(out.device),  # ascending flat indices are in CSR order
        pattern.flat_index % columns,
        out,
        size=pattern.shape,
        check_invariants=False,
    )
    assert sampled.values().data_ptr() == out.data_ptr(), "the library adds to a copy"
    on_cpu = dy.device.type == "cpu"
    length = min(dy.shape[0], CPU_LIBRARY_TOKENS if on_cpu else GPU_LIBRARY_TOKENS)
    buffers = out.new_empty(rows * length), out.new_empty(columns * length)
    for tokens in _blocks(dy.shape[0], length):
        a = _transpose(dy[tokens], buffers[0])
        b = _transpose(x[tokens], buffers[1])
        torch.sparse.sampled_addmm(sampled, a, b.t(), beta=1.0, out=sampled)


def _transpose(part: Tensor, buffer: Tensor) -> Tensor:
    """``part`` [tokens, features] as fp32 [features, tokens], at the front of ``buffer``."""
    tokens, features = part.shape
    out = buffer[: part.numel()].view(features, tokens)
    out[None].copy_(part.t()[None])  # of two dimensions it would be left to a single thread
    return out


@functools.cache
def _swallow_csr_notice() -> None:
    """Take torch's once-per-process notice that CSR tensors are in beta, so that users do not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        torch.zeros(1, 1).to_sparse_csr()


def _add_triton(out: Tensor, dy: Tensor, x: Tensor, pattern: Pattern) -> None:
    from gem_ds.sddmm.triton_kernel import add_strips  # the library works without triton

    add_strips(out, dy, x, pattern)


_KERNELS = {
    WHOLE: add_whole,
    "dense": add_dense,
    "tiled": add_tiled,
    "gather": add_gathered,
    "library": add_library,
    "triton": _add_triton,
}


def add_sampled_product(
    out: Tensor, dy: Tensor, x: Tensor, pattern: Pattern, kernel: str = "auto"
) -> None:
    """Add ``dy^T x`` at the k entries of ``pattern`` to ``out``, fp32 [k], contiguous.

    dy is [tokens, rows] and x [tokens, columns], of one dtype; all lie on one device.
    """
    assert (dy.shape[1], x.shape[1]) == pattern.shape, "the pattern is of another layer"
    if pattern.num_entries == 0 or dy.shape[0] == 0:
        return
    if kernel == "auto":
        kernel = choose_kernel(dy.device.type, dy.dtype, pattern.shape, pattern.num_entries)
    _KERNELS[kernel](out, dy, x, pattern)
