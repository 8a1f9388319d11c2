"""Which layers are targets: by architecture, by name, by expression, and what is refused."""

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from gem_ds.models.encoders import auto_class
from gem_ds.models.targets import describe_reach, find_targets, targets_of
from gem_ds.sparse.kinds import kind_of
from tests.tiny import model_of, tiny_config

TABLES = tomllib.loads(Path(__file__).with_name("targets.toml").read_text())
QUERY_VALUE, FUSED = (
    {model_type: names for names, types in TABLES[kind].items() for model_type in types.split()}
    for kind in ("query_value", "fused")
)
NUM_LAYERS = 2


def _model(model_type: str) -> PreTrainedModel:
    """A model of this architecture with two layers and no memory behind its weights."""
    sizes = TABLES["sizes"].get(model_type, {"num_hidden_layers": NUM_LAYERS})
    config = AutoConfig.for_model(model_type, **sizes)
    family = (
        AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel
    )
    with torch.device("meta"):
        return family.from_config(config)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return _model("llama")


@pytest.mark.parametrize("model_type", QUERY_VALUE)
def test_the_default_is_query_and_value_of_every_layer(model_type):
    model = _model(model_type)
    targets = find_targets(model)
    assert len(targets) == 2 * NUM_LAYERS
    suffixes = {name.split(".")[-2] for name in targets}
    assert " ".join(sorted(suffixes)) == QUERY_VALUE[model_type]
    assert all(model.get_parameter(name) is module.weight for name, module in targets.items())


@pytest.mark.parametrize("model_type", FUSED)
def test_fused_projections_are_refused_with_a_name_that_works(model_type):
    model = _model(model_type)
    with pytest.raises(ValueError, match=f"{model_type} computes query, key and value in one") as e:
        find_targets(model)
    assert re.findall(r"--target_modules (\S+)", str(e.value)) == [FUSED[model_type]]
    assert len(find_targets(model, [FUSED[model_type]])) == NUM_LAYERS


def test_an_unknown_architecture_asks_for_names():
    with pytest.raises(ValueError, match=r"of mamba are not known.*--target_modules, of dt_proj, "):
        find_targets(_model("mamba"))
    with pytest.raises(ValueError, match=r"projections of Linear are not known"):
        find_targets(nn.Linear(2, 2))


@pytest.mark.parametrize(("names", "expected"), TABLES["chosen"].items())
def test_layers_by_suffix_or_expression(llama, names, expected):
    found = find_targets(llama, names.split())
    assert sorted(name.removesuffix(".weight") for name in found) == expected


def test_all_linear_leaves_out_the_output_layer(llama):
    targets = find_targets(llama, ["all-linear"])
    linear = {f"{n}.weight" for n, m in llama.named_modules() if isinstance(m, nn.Linear)}
    assert linear - set(targets) == {"lm_head.weight"}
    assert len(targets) == 7 * NUM_LAYERS
    transposed = find_targets(_model("gpt2"), ["all-linear"])
    assert len(transposed) == 4 * NUM_LAYERS
    assert {type(module).__name__ for module in transposed.values()} == {"Conv1D"}


def test_targets_come_in_the_order_of_the_parameters(llama):
    order = [name for name, _ in llama.named_parameters()]
    for names in (None, ["v_proj", "q_proj"], ["all-linear"], [".*proj"]):
        targets = list(find_targets(llama, names))
        assert targets == sorted(targets, key=order.index)


def test_layers_by_the_names_of_their_weights(llama):
    targets = find_targets(llama, ["all-linear"])
    assert targets_of(llama, list(targets)[::-1]) == targets
    assert list(targets_of(llama, list(targets)[::-1])) == list(targets)
    with pytest.raises(ValueError, match=r"no module model\.layers\.9\.self_attn\.q_proj: pass"):
        targets_of(llama, ["model.layers.9.self_attn.q_proj.weight"])


@pytest.mark.parametrize(("names", "sentence"), TABLES["refused"].items())
def test_names_that_are_no_linear_layers_are_refused(llama, names, sentence):
    with pytest.raises(ValueError, match=sentence):
        find_targets(llama, names.split())


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_vl", "llava", "idefics3", "mixtral", "gpt_oss"])
def test_every_target_is_reached_from_text_and_what_none_reaches_is_told(kind):
    """As autograd says; of a model that reads images its tower has layers of the same names."""
    config = tiny_config(kind)
    model = model_of(config, auto_class(config).from_config)
    model(input_ids=torch.arange(3, 15).view(2, 6)).logits.square().sum().backward()
    reached = {n: p for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    layers = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    layers |= {name for name, p in model.named_parameters() if "experts" in name and p.dim() == 3}
    layers = layers & set(reached) - {"lm_head.weight"}
    query_value = [name for name in reached if re.fullmatch(r".*[qv]_proj\.weight", name)]
    assert list(find_targets(model)) == query_value == list(find_targets(model, [r".*[qv]_proj"]))
    assert list(find_targets(model, ["q_proj", "v_proj"])) == query_value
    everything = find_targets(model, ["all-linear"])
    assert set(everything) == layers

    sizes = {name: p.numel() for name, p in model.named_parameters()}

    def share(names: Iterable[str]) -> str:
        return f"{sum(sizes[name] for name in names) / sum(sizes.values()):.1%}"

    told = describe_reach(model, query_value)
    assert f"4 target layers hold {share(query_value)} of the parameters" in told
    assert f"those of --target_modules all-linear {share(everything)};" in told
    assert f"; no target reaches {share(sizes.keys() - layers)} (" in told
    outside = [name for name, p in model.named_parameters() if p.grad is None]
    reads_images = kind not in ("mixtral", "gpt_oss")
    assert ("outside of the language model" in told) == bool(outside) == reads_images
    if outside:
        assert f"outside of the language model {share(outside)}" in told
        tower = next(m for n, m in model.named_modules() if f"{n}.weight" in outside and kind_of(m))
        name = next(n for n, m in model.named_modules() if m is tower)
        with pytest.raises(ValueError, match=rf"matches {name}, which no text reaches: name lay"):
            find_targets(model, [re.escape(name)])
        assert list(targets_of(model, [f"{name}.weight"])) == [f"{name}.weight"], "a mask has it"
    elif kind == "gpt_oss":
        biases = [name for name in sizes if "experts" in name and name.endswith("_bias")]
        assert f", experts and convolutions {share(biases)}, " in told
    assert "all-linear" not in describe_reach(model, everything)


class Tied(nn.Module):
    """An output layer with the embedding's weight, a matrix used by two layers, one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.own = nn.Linear(3, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.second.weight = self.first.weight
        self.out.weight = self.embedding.weight


def test_a_tied_weight_is_refused_by_the_names_that_share_it():
    for name, other in (("out", "embedding"), ("first", "second"), ("second", "first")):
        sentence = f"{name} shares its weight with {other}.weight: leave it out"
        with pytest.raises(ValueError, match=sentence):
            find_targets(Tied(), [name])
    assert list(find_targets(Tied(), ["own"])) == ["own.weight"]
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["c"] = model["a"]
    with pytest.raises(ValueError, match=r"a shares its weight with c\.weight"):
        find_targets(model, ["all-linear"])
    model = _model("opt")
    model.tie_weights()
    with pytest.raises(ValueError, match=r"lm_head shares its weight with model\.decoder\.embed"):
        find_targets(model, ["lm_head"])
    assert len(find_targets(model, ["all-linear"])) == 6 * NUM_LAYERS
