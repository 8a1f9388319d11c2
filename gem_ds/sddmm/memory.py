"""What the kernels make beside their results, from shapes alone: for forecasts."""

from __future__ import annotations

from gem_ds.sddmm import kernels

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
    """The most that a kernel holds at once.

    Args:
        kernel: its name.
        tokens: of dy and x.
        shape: of the weight, [rows, columns].
        num_entries: k of this weight.
        itemsize: bytes of a number of dy and x.
        on_cpu: where they lie.
    """
    rows, columns = shape
    # On a CPU a product of low precision copies its factors, some tokens at a time.
    copied = min(tokens, kernels.DENSE_TOKENS) * _FP32 if on_cpu and itemsize < _FP32 else 0
    if kernel == "dense":
        return _FP32 * rows * columns + copied * (rows + columns)
    if kernel == "tiled":
        tile_bytes = kernels.CPU_TILE_BYTES if on_cpu else kernels.GPU_TILE_BYTES
        tile_rows = min(rows, max(1, tile_bytes // (_FP32 * columns)))
        return _FP32 * tile_rows * columns + copied * (tile_rows + columns)
    if kernel == "gather":
        entries = min(num_entries, kernels.GATHER_ENTRIES)
        return 2 * _FP32 * entries * min(tokens, kernels.GATHER_TOKENS)
    if kernel == "library":
        length = kernels.CPU_LIBRARY_TOKENS if on_cpu else kernels.GPU_LIBRARY_TOKENS
        return _FP32 * (min(tokens, length) * (rows + columns) + num_entries)
    assert kernel == "triton", f"there is no kernel {kernel}"
    return itemsize * tokens * (rows + columns)
