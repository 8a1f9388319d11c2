"""What the kernels make beside their results, from shapes alone: for forecasts."""

from __future__ import annotations

from gem_ds.sddmm import grouped, kernels, strips
from gem_ds.sddmm.choice import WHOLE

_FP32 = 4  # bytes


def temporary_bytes(
    kernel: str,
    *,
    tokens: int,
    shape: tuple[int, int],
    num_entries: int,
    itemsize: int,
    on_cpu: bool,
) -> int:
    """The most that a kernel holds at once; ``itemsize`` is the bytes of a number of dy and x."""
    if num_entries == 0:
        return 0
    rows, columns = shape
    # On a CPU a product of low precision copies its factors, some tokens at a time.
    copied = min(tokens, kernels.DENSE_TOKENS) * _FP32 if on_cpu and itemsize < _FP32 else 0
    if kernel == WHOLE:
        return copied * (rows + columns)
    if kernel == "dense":
        picked = _FP32 * num_entries
        return _FP32 * rows * columns + max(copied * (rows + columns), picked)
    if kernel == "tiled":
        tile_bytes = kernels.CPU_TILE_BYTES if on_cpu else kernels.GPU_TILE_BYTES
        tile_rows = min(rows, max(1, tile_bytes // (_FP32 * columns)))
        picked = _FP32 * num_entries * tile_rows // rows
        picked *= 2 if tile_rows < rows else 1  # and where they lie in a tile below others
        return _FP32 * tile_rows * columns + max(copied * (tile_rows + columns), picked)
    if kernel == "gather":
        entries = min(num_entries, kernels.GATHER_ENTRIES)
        length = min(tokens, kernels.GATHER_TOKENS)
        has_several = num_entries > entries or tokens > length
        factors = 3 * _FP32 + itemsize * (itemsize < _FP32 and has_several)  # and their product
        return factors * entries * length
    if kernel == "library":
        length = kernels.CPU_LIBRARY_TOKENS if on_cpu else kernels.GPU_LIBRARY_TOKENS
        return _FP32 * (min(tokens, length) * (rows + columns) + num_entries)
    assert kernel == "triton", f"there is no kernel {kernel}"
    copies = itemsize * (rows + columns) * tokens
    return copies + _FP32 * (strips.ROWS * _most_strips(shape, num_entries) + num_entries)


def strips_bytes(shape: tuple[int, int], num_entries: int) -> int:
    """The most that :class:`~gem_ds.sddmm.strips.Strips` keep of entries of a matrix."""
    num_strips, num_blocks = _most_strips(shape, num_entries), -(-shape[0] // strips.ROWS)
    num_tiles = min(num_blocks, num_strips) + num_strips // strips.TILE
    place = 4 if num_strips * strips.ROWS < 2**31 else 8
    return place * num_entries + 4 * (num_strips + 2 * num_tiles + 1)


def _most_strips(shape: tuple[int, int], num_entries: int) -> int:
    rows, columns = shape
    return min(num_entries, -(-rows // strips.ROWS) * columns)


def picking_bytes(numel: int, num_entries: int, itemsize: int) -> int:
    """What :func:`gem_ds.sddmm.grouped.add_picked` holds at once, about."""
    places = 4 * 8 + 2 + itemsize + _FP32  # of an entry: group, row, place and column; what it is
    return min(grouped.TILE_BYTES, itemsize * numel) + places * num_entries
