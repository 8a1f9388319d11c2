"""The selected entries on real ranks: reading, cutting and writing them, to the bit."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gem_ds.distributed.comm import Comm
from gem_ds.distributed.process_group import init_distributed
from gem_ds.files.fingerprint import fingerprints
from gem_ds.select.selection import gather_indices
from gem_ds.sparse.entries import SelectedEntries
from tests.largest_tensor import LargestTensor
from tests.operations import Operations
from tests.ranks import run_ranks, told_as
from tests.tiny import Matrices, Setting, bits, make_engine, whole_state

pytestmark = pytest.mark.slow  # starts engines or programs

#: What differs in reading and writing; every stage, dtype and variant is test_engine.py's.
SETTINGS = {
    1: [Setting(0)],
    2: [
        Setting(1),
        Setting(2, "bf16"),
        Setting(3, variant="offload"),
        Setting(3, "bf16", variant="persistent"),
    ],
    4: [Setting(3, variant="gathered")],
}
SHAPES = {"point": (1, 1), "pair": (1, 2), "odd": (7, 11), "skipped": (3, 5), "wide": (9, 31)}
SHAPES |= {"large": (47, 53)}  # of which a fingerprint is of a sample
NUM_SELECTED = {"point": 1, "pair": 2, "odd": 23, "skipped": 0, "wide": 60, "large": 0}
K = sum(NUM_SELECTED.values())


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _weight(name: str, dtype: torch.dtype) -> Tensor:
    """Half random values, half such whose bits are lost where numbers are added or cast."""
    limits, shape = torch.finfo(dtype), SHAPES[name]
    special = [-0.0, 0.0, limits.tiny / 2, -limits.max, limits.max, 1 / 3, -1 / 3]
    generator = _generator(shape[0] * shape[1])
    chosen = torch.randint(0, len(special), shape, generator=generator)
    weight = torch.randn(shape, generator=generator).to(dtype)
    is_special = torch.rand(shape, generator=generator) < 0.5
    if name == "point":
        is_special[0, 0], chosen[0, 0] = True, 0
    return torch.where(is_special, torch.tensor(special, dtype=dtype)[chosen], weight)


def _indices(name: str) -> Tensor:
    """Random entries, the first and the last among them."""
    numel, count = SHAPES[name][0] * SHAPES[name][1], NUM_SELECTED[name]
    inner = torch.randperm(numel, generator=_generator(count))
    ends = torch.tensor([0, numel - 1])
    order = torch.cat([ends[:count], inner[(inner != 0) & (inner != numel - 1)]])
    return order[:count].sort().values


class Bench:
    """Entries of matrices in an engine, and the dense matrices as they should be."""

    def __init__(self, setting: Setting, comm: Comm) -> None:
        self.dtype = setting.torch_dtype
        self.dense = {name: _weight(name, self.dtype) for name in SHAPES}
        model = Matrices(self.dense)
        self.engine, layers = make_engine(setting, comm, model, K, targets=model.targets)
        self.entries = SelectedEntries(self.engine, layers, [_indices(name) for name in SHAPES])

    def selected(self) -> Tensor:
        """What ``read`` should give."""
        return torch.cat([self.dense[name].flatten()[_indices(name)] for name in SHAPES])

    def num_whole(self) -> int:
        """Weights of which this rank keeps whole copies, beside its parts."""
        weights: list[Any] = [layer.weight for layer in self.entries.layers]
        return sum(hasattr(w, "ds_id") and w.ds_status.name == "AVAILABLE" for w in weights)

    def assert_weights(self) -> None:
        """This rank's ranges, and the whole copies that it keeps, are the dense weights."""
        for layer, weight in zip(self.entries.layers, self.dense.values(), strict=True):
            start, stop = self.engine.weights.shard_range(layer.weight)
            shard = self.engine.weights.read_shard(layer.weight)
            assert torch.equal(bits(shard), bits(weight.flatten()[start:stop])), layer.name
            if layer.weight.data.numel() == layer.numel:
                whole = layer.weight.data.flatten()
                assert torch.equal(bits(whole), bits(weight.flatten())), layer.name


# The checks. Each begins where the one before has left the bench.


def layout(bench: Bench) -> None:
    """Each parameter's slice of the flat vector, in order."""
    entries = bench.entries
    assert entries.names == [f"{name}.weight" for name in SHAPES]
    assert entries.starts == [0, 1, 3, 26, 26, 86]
    for index, name in zip(entries.flat_indices, SHAPES, strict=True):
        assert index.dtype == torch.int32
        assert torch.equal(index.long(), _indices(name))
    vector = torch.randn(K, generator=_generator(2))
    slices = entries.split(vector)
    assert [part.numel() for part in slices.values()] == list(NUM_SELECTED.values())
    assert list(slices) == entries.names
    assert torch.equal(torch.cat(list(slices.values())), vector)


def read(bench: Bench) -> None:
    """The same bits on every rank, of signed zeros and subnormal numbers too."""
    values = bench.entries.read()
    assert values.dtype == bench.dtype
    assert torch.equal(bits(values), bits(bench.selected()))


def base(bench: Bench) -> None:
    """A model has the same fingerprints in partitions as whole in one process."""
    named = {layer.name: layer.weight for layer in bench.entries.layers}
    found = fingerprints(named, bench.engine.weights.read_entries)
    whole = {f"{name}.weight": nn.Parameter(weight) for name, weight in bench.dense.items()}
    assert found == fingerprints(whole)


def sinks(bench: Bench) -> None:
    """Each layer's sink adds to the layer's own slice."""
    expected = []
    for number, (sink, name) in enumerate(zip(bench.entries.sinks(), SHAPES, strict=True)):
        rows, columns = SHAPES[name]
        dy = torch.randn(6, rows, generator=_generator(number))
        x = torch.randn(6, columns, generator=_generator(number + 50))
        sink(dy, x if sink.inputs is None else x[:, sink.inputs])
        expected.append((dy.double().t() @ x.double()).flatten()[_indices(name)])
    gradient = bench.engine.vectors[0].take_gradient()
    torch.testing.assert_close(gradient, torch.cat(expected).float(), rtol=1e-5, atol=1e-5)


def start(bench: Bench) -> None:
    """The start changes no bit of a weight but fills masters and clears moments.

    Values that were not updated are the weights when they are written, signs of zeros included.
    """
    engine = bench.engine
    engine.set_state({key: torch.ones(K) for key in ("master", "exp_avg", "exp_avg_sq")}, 5)
    values = bench.entries.start_from_weights()
    assert torch.equal(bits(values), bits(bench.selected()))
    bench.assert_weights()
    state = whole_state(engine)
    assert torch.equal(state["master"], bench.selected().float())
    assert not state["exp_avg"].any()
    assert not state["exp_avg_sq"].any()
    assert engine.num_updates == 0
    assert torch.equal(engine.gather_values(), bench.selected())
    bench.entries.write_back()
    bench.assert_weights()


def write_back(bench: Bench) -> None:
    """New masters show in the weights, rounded, at the selected entries and nowhere else."""
    for seed in (5, 6):
        master = torch.randn(K, generator=_generator(seed))
        moments = {key: torch.zeros(K) for key in ("exp_avg", "exp_avg_sq")}
        bench.engine.set_state({"master": master, **moments}, 0)
        with Operations() as operations:
            bench.entries.write_back()
        counts = operations.counts  # a part that is trained whole is copied
        writes = counts["aten.index_copy_.default"] + counts["aten.copy_.default"]
        assert writes == len(SHAPES)
        if bench.engine.stage < 3:
            assert counts["aten.copy_.default"] == 2, "point and pair, which need no index"
        assert sum(operations.counts.values()) <= len(SHAPES) + bench.num_whole() + 8
        parts = master.to(bench.dtype).split(list(NUM_SELECTED.values()))
        for name, part in zip(SHAPES, parts, strict=True):
            bench.dense[name].view(-1)[_indices(name)] = part
        bench.assert_weights()
        read(bench)


CHECKS = [layout, read, base, sinks, start, write_back]


# Putting a selection together


def _gather(comm: Comm) -> None:
    for seed in range(40):
        generator = _generator(seed)
        counts = torch.randint(0, 7, (4,), generator=generator).tolist()  # some layers have none
        whole = [torch.randperm(100, generator=generator)[:n].sort().values for n in counts]
        borders = torch.randint(0, 101, (comm.world_size - 1,), generator=generator).sort().values
        low, high = [0, *borders.tolist(), 100][comm.rank : comm.rank + 2]
        own = [i[(i >= low) & (i < high)].int() for i in whole]
        gathered = gather_indices(own, comm)
        assert all(torch.equal(a, b) for a, b in zip(gathered, whole, strict=True))
        assert all(index.dtype == torch.int32 for index in gathered), "no room is made for more"
    everything = torch.cat([torch.arange(999), torch.tensor([2**31 + 5])])
    for holder in range(comm.world_size):  # one rank holds everything, beyond int32
        index = everything if comm.rank == holder else torch.empty(0).long()
        with LargestTensor() as made:
            _, together = gather_indices([torch.empty(0).int(), index], comm)
        assert torch.equal(together, everything)
        assert made.total_entries <= 1.1 * len(everything), "no rank makes room for others' parts"
    nothing = gather_indices([torch.empty(0).long()] * 2, comm)
    assert [index.tolist() for index in nothing] == [[], []]


def _all_checks() -> None:
    comm = init_distributed()
    _gather(comm)
    for setting in SETTINGS[comm.world_size]:
        with told_as(setting):
            bench = Bench(setting, comm)
            for check in CHECKS:
                check(bench)


@pytest.mark.parametrize("world_size", SETTINGS)
def test_on_ranks(world_size):
    run_ranks(world_size, _all_checks)
