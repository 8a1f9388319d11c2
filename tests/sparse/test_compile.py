"""Blocks with target layers under ``torch.compile``: whole graphs, the gradients of eager mode."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from gem_ds.models.blocks import enable_checkpointing
from gem_ds.models.targets import find_targets
from gem_ds.sddmm import Pattern
from gem_ds.sparse.entries import SampledSink
from gem_ds.sparse.target_layers import TargetLayers
from gem_ds.sparse.used_inputs import among, used_inputs
from tests.tiny import make_model

pytestmark = [
    pytest.mark.slow,  # compiles
    pytest.mark.filterwarnings("ignore"),  # torch warns of what its compiler does itself
]

K = 30  # of a layer
NUM_BLOCKS = 6


class Trained:
    """A model in train mode, some entries of whose targets collect their gradient."""

    def __init__(
        self,
        architecture: str,
        dtype: torch.dtype = torch.float32,
        *,
        in_few_columns: bool = False,
    ) -> None:
        shape = {"dropout": 0.0, "num_hidden_layers": NUM_BLOCKS}
        self.model = make_model(architecture, dtype, **shape).train()
        fused = ["c_attn"] if architecture == "gpt2" else None
        targets = find_targets(self.model, fused)
        random = torch.Generator().manual_seed(0)
        self.layers = TargetLayers(self.model, targets, K * len(targets))
        self.sinks = []
        for i, layer in enumerate(self.layers):
            index = torch.randperm(layer.numel, generator=random)
            if in_few_columns:  # of which the layers have different numbers
                index = index[index % layer.shape[1] < 3 + i % 3]
            index = index[:K].sort().values
            (inputs,) = used_inputs([layer], [index])
            assert (inputs is not None) == in_few_columns, "layers keep a part of their input"
            pattern = Pattern.of(*among(inputs, layer, index))
            self.sinks.append(SampledSink(self.layers.vector, i * K, pattern, inputs=inputs))

    def blocks(self) -> Iterator[nn.Module]:
        """What a model repeats."""
        lists = [module for module in self.model.modules() if isinstance(module, nn.ModuleList)]
        yield from max(lists, key=len)

    def gradient(self, *, delivers: bool = False) -> Tensor:
        """Of two micro-batches, the second of which may deliver it."""
        ids = torch.arange(24).view(2, 12) % 40
        with self.layers.sinks(self.sinks):
            for delivering in (False, delivers):
                self.layers.vector.delivers = delivering
                self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if not delivers:
            return self.layers.vector.take_gradient()
        gradient = self.layers.vector.values.grad
        assert gradient is not None
        self.layers.vector.values.grad = None
        return gradient


@pytest.mark.parametrize(
    ("architecture", "dtype", "backend", "is_checkpointed", "in_few_columns"),
    [
        ("llama", torch.float32, "aot_eager", False, False),
        ("llama", torch.bfloat16, "aot_eager", False, False),
        ("llama", torch.float32, "aot_eager", True, True),
        ("llama", torch.float32, "inductor", False, True),
        ("gpt2", torch.float32, "aot_eager", False, False),
    ],
)
def test_blocks_are_whole_graphs_of_the_same_gradients(
    architecture, dtype, backend, is_checkpointed, in_few_columns
):
    trained = Trained(architecture, dtype, in_few_columns=in_few_columns)
    if is_checkpointed:
        enable_checkpointing(trained.model)
    expected = trained.gradient()
    torch._dynamo.reset()
    counters.clear()
    for block in trained.blocks():
        block.compile(backend=backend)
    for delivers in (False, True):
        found = trained.gradient(delivers=delivers)  # delivered in the model's dtype
        torch.testing.assert_close(found, expected.to(found.dtype))
    assert not counters["graph_break"], dict(counters["graph_break"])
    # The first block's input needs no gradient, all others' do; and micro-batches may deliver.
    assert 1 <= counters["stats"]["unique_graphs"] <= 4, "blocks share what is compiled"
