"""Gradients of a weight at selected entries, by every kernel, against the product in fp64.

The Triton kernel takes part where it can run: on CUDA, or under Triton's interpreter, which
`tests/sparse/test_sddmm_triton.py` starts.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from gem_ds.models.targets import find_targets
from gem_ds.sddmm import Pattern, add_product, add_sampled_product, kernels, product, strips
from gem_ds.sddmm.strips import ROWS, Strips
from gem_ds.select.selection import select_entries
from tests.largest_tensor import LargestTensor
from tests.operations import Operations
from tests.tiny_model import REPOSITORY

IS_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = ["auto", "dense", "tiled", "gather", "library"]
if HAS_TRITON and (IS_INTERPRETING or DEVICE == "cuda"):
    KERNELS.append("triton")
NUM_EXAMPLES = 15 if IS_INTERPRETING else 100

Problem = tuple[Tensor, Tensor, Tensor]
"""dy, x and flat indices."""


def _dense(dy: Tensor, x: Tensor) -> Tensor:
    """The whole product, in fp64."""
    return dy.double().t() @ x.double()


def _sampled(dy: Tensor, x: Tensor, flat_index: Tensor, kernel: str) -> Tensor:
    out = torch.zeros(flat_index.numel(), device=dy.device)
    pattern = Pattern.of(flat_index, (dy.shape[1], x.shape[1]))
    add_sampled_product(out, dy, x, pattern, kernel)
    return out


def _assert_right(dy: Tensor, x: Tensor, flat_index: Tensor, kernel: str) -> None:
    dy, x, flat_index = dy.to(DEVICE), x.to(DEVICE), flat_index.to(DEVICE)
    expected = _dense(dy, x).flatten()[flat_index.long()]
    scale = _dense(dy.abs(), x.abs()).flatten()[flat_index.long()]  # bounds every partial sum
    found = _sampled(dy, x, flat_index, kernel)
    assert ((found - expected).abs() <= 1e-5 * scale).all()


@contextmanager
def _small_blocks() -> Iterator[None]:
    """Within the block the kernels cut even small problems into many pieces."""
    sizes = {
        "CPU_TILE_BYTES": 300,
        "GPU_TILE_BYTES": 300,
        "CPU_LIBRARY_TOKENS": 7,
        "GPU_LIBRARY_TOKENS": 7,
        "DENSE_TOKENS": 5,
        "GATHER_ENTRIES": 11,
        "GATHER_TOKENS": 6,
    }
    with mock.patch.multiple(kernels, **sizes):
        yield


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    tokens, rows, columns = (draw(st.integers(1, n)) for n in (40, 20, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    dy = torch.randn(tokens, rows, generator=generator).to(dtype)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    k = draw(st.integers(0, rows * columns))
    flat_index = torch.randperm(rows * columns, generator=generator)[:k].sort().values
    return dy, x, flat_index.to(draw(st.sampled_from([torch.int32, torch.int64])))


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=NUM_EXAMPLES, deadline=None)
@given(problem=problems(), is_cut=st.booleans())
def test_random_shapes_and_dtypes(kernel, problem, is_cut):
    if is_cut:
        with _small_blocks():
            _assert_right(*problem, kernel)
    else:
        _assert_right(*problem, kernel)


@settings(max_examples=30, deadline=None)
@given(problem=problems())
def test_the_whole_product(problem):
    dy, x, _ = (tensor.to(DEVICE) for tensor in problem)
    scale = _dense(dy.abs(), x.abs())
    whole = product(dy, x)
    assert whole.dtype == torch.float32
    assert ((whole - _dense(dy, x)).abs() <= 1e-5 * scale).all()
    out = torch.full_like(whole, float("nan"))
    assert product(dy, x, out) is out
    assert torch.equal(out, whole)
    with _small_blocks():
        added = torch.ones_like(whole)
        add_product(added, dy, x, scale=-2.5)
    assert ((added - 1 + 2.5 * _dense(dy, x)).abs() <= 1e-5 * (scale + 1)).all()


@pytest.mark.parametrize(
    "entries", [[], [0], [29], [0, 5, 24, 29], range(12, 18), range(2, 30, 6), range(30)], ids=str
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_which_entries_are_selected(kernel, entries):
    """Of five rows and six columns: none, one, the corners, a row, a column, all."""
    dy, x = torch.randn(9, 5), torch.randn(9, 6)
    _assert_right(dy, x, torch.tensor(list(entries), dtype=torch.int32), kernel)


@pytest.mark.parametrize("kernel", KERNELS)
class TestNumbers:
    """What is multiplied and summed."""

    def test_the_result_is_added(self, kernel):
        """Twice on the slice of a longer vector, of which nothing else is touched."""
        out = torch.ones(9, device=DEVICE)
        dy, x = torch.ones(5, 2, device=DEVICE), torch.ones(5, 3, device=DEVICE)
        pattern = Pattern.of(torch.tensor([0, 2, 4], dtype=torch.int32, device=DEVICE), (2, 3))
        for _ in range(2):
            add_sampled_product(out[4:7], dy, x, pattern, kernel)
        assert out.tolist() == [1.0] * 4 + [11.0] * 3 + [1.0] * 2

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_numbers_of_tokens_around_the_blocks(self, kernel, dtype):
        for tokens in (0, 1, 127, 129, 300, 1031):
            dy, x = torch.randn(tokens, 13).to(dtype), torch.randn(tokens, 29).to(dtype)
            _assert_right(dy, x, torch.arange(3, 13 * 29, 5, dtype=torch.int32), kernel)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_inputs_that_are_not_contiguous(self, kernel, dtype):
        dy = torch.randn(5, 18, device=DEVICE).to(dtype).t()[::2]
        x = torch.randn(18, 12, device=DEVICE).to(dtype)[::2, ::2]
        assert not dy.is_contiguous()
        assert not x.is_contiguous()
        _assert_right(dy, x, torch.arange(0, 30, 3), kernel)
        _assert_right(dy[:, ::2], x.flip(1), torch.arange(0, 18, 2), kernel)
        broadcast = torch.randn(1, 5, device=DEVICE).to(dtype).expand(9, 5)
        _assert_right(broadcast, x, torch.arange(0, 30, 3), kernel)

    def test_low_precision_is_summed_in_fp32(self, kernel):
        """300 ones: bf16 cannot count past 256."""
        ones = torch.ones(300, 1, dtype=torch.bfloat16, device=DEVICE)
        entry = torch.tensor([0], device=DEVICE)
        assert _sampled(ones, ones, entry, kernel).tolist() == [300.0]
        assert product(ones, ones).tolist() == [[300.0]]

    def test_what_is_not_finite_shows_in_its_entry_only(self, kernel):
        dy, x = torch.ones(3, 2, device=DEVICE), torch.ones(3, 2, device=DEVICE)
        dy[1, 1] = float("inf")
        index = torch.tensor([0, 2], device=DEVICE)
        assert _sampled(dy, x, index, kernel).tolist() == [3.0, float("inf")]
        x[0, 0] = float("nan")
        index = torch.tensor([0, 1], device=DEVICE)
        assert _sampled(dy, x, index, kernel).isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_kernel_makes_is_bounded_by_the_blocks(dtype):
    """Or by the selected entries, of 60 tokens, 40 rows and 30 columns."""
    dy = torch.randn(60, 40, device=DEVICE).to(dtype)
    x = torch.randn(60, 30, device=DEVICE).to(dtype)
    index = torch.arange(0, 1200, 17, dtype=torch.int32, device=DEVICE)
    pattern, found = Pattern.of(index, (40, 30)), {}
    for kernel in ("tiled", "gather", "library", "dense"):
        with _small_blocks(), LargestTensor() as largest:
            add_sampled_product(torch.zeros(71, device=DEVICE), dy, x, pattern, kernel)
        found[kernel] = largest.num_entries
    assert found.pop("dense") == 1200, "the recorder sees the whole product"
    for kernel, bound in {"tiled": 5 * 30, "gather": 11 * 6, "library": 7 * 40}.items():
        assert found[kernel] <= max(bound, 71), kernel


def test_a_matrix_that_fits_a_tile_takes_three_launches():
    """Its product, the picking, the adding; with the writing a target layer has four in a step."""
    dy, x = torch.randn(60, 40, device=DEVICE), torch.randn(60, 30, device=DEVICE)
    pattern = Pattern.of(torch.arange(0, 1200, 17, device=DEVICE), (40, 30))
    out = torch.zeros(71, device=DEVICE)
    with Operations() as run:
        add_sampled_product(out, dy, x, pattern, "tiled")
    host = ("aten.new_empty.default", "aten._local_scalar_dense.default")  # the rows' bounds
    launches = {name: count for name, count in run.counts.items() if name not in host}
    kernels = ("aten.mm.out", "aten.index_select.default", "aten.add_.Tensor")
    assert launches == dict.fromkeys(kernels, 1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_masks_of_a_trained_model(kernel):
    """Whose entries share rows and columns, of the targets' 1 % and 0.1 %."""
    model = AutoModelForCausalLM.from_pretrained(REPOSITORY / "launch" / "demo" / "model")
    tokens = torch.arange(64).view(2, 32) % 50
    model(input_ids=tokens, labels=tokens).loss.backward()
    for name, module in list(find_targets(model).items())[:2]:
        weight = module.get_parameter("weight")
        dy, x = torch.randn(70, weight.shape[0]), torch.randn(70, weight.shape[1])
        for share in (0.01, 0.001):
            budget = round(share * weight.numel())
            index = select_entries({name: weight.grad}, {name: weight}, budget)[name]
            _assert_right(dy.bfloat16(), x.bfloat16(), index, kernel)


# What lasts from step to step


@settings(max_examples=50, deadline=None)
@given(problem=problems(), tile=st.integers(1, 9))
def test_the_strips_of_a_pattern(problem, tile):
    """By the loop that the Triton kernel is equivalent to."""
    dy, x, flat_index = problem
    with mock.patch.object(strips, "TILE", tile):
        found = Strips.of(flat_index, x.shape[1])
    made = torch.full((len(found.columns), ROWS), float("nan"), dtype=torch.float64)
    bounds = found.bounds_of_tile.tolist()
    for block, start, stop in zip(
        found.block_of_tile.tolist(), bounds[:-1], bounds[1:], strict=True
    ):
        assert 1 <= stop - start <= tile
        rows = dy[:, block * ROWS : (block + 1) * ROWS]
        made[start:stop, : rows.shape[1]] = _dense(x[:, found.columns[start:stop].long()], rows)
    expected = _dense(dy, x).flatten()[flat_index.long()]
    torch.testing.assert_close(made.flatten()[found.place.long()], expected, rtol=1e-12, atol=1e-12)
    blocks = flat_index // x.shape[1] // ROWS * x.shape[1] + flat_index % x.shape[1]
    assert len(found.columns) == len(set(blocks.tolist())), "a column is read once for a block"


@settings(max_examples=50, deadline=None)
@given(problem=problems())
def test_the_bounds_of_a_pattern_are_those_of_the_rows(problem):
    dy, x, flat_index = problem
    rows, columns = dy.shape[1], x.shape[1]
    pattern = Pattern.of(flat_index, (rows, columns))
    assert pattern.num_entries == flat_index.numel()
    assert pattern.flat_index is flat_index, "it is shared"
    assert pattern.row_bounds.dtype == flat_index.dtype
    row_of_entry = [index // columns for index in flat_index.tolist()]
    assert pattern.row_bounds[0] == 0
    assert pattern.row_bounds.diff().tolist() == [row_of_entry.count(row) for row in range(rows)]


def test_a_pattern_of_entries_beyond_int32():
    pattern = Pattern.of(torch.tensor([3, 2**31 + 5, 2**32 - 1]), (2**17, 2**15))
    rows = [0, 1, 2**16, 2**16 + 1, 2**17 - 1, 2**17]
    assert pattern.row_bounds[rows].tolist() == [0, 1, 1, 2, 2, 3]
