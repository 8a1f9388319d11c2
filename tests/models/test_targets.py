"""Which layers are targets: by architecture, by name, by expression, and what is refused."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from gem_ds.models.targets import find_targets, targets_of

Q_PROJ_MODELS = """
    cohere cohere2 exaone4 gemma gemma2 gemma3_text gpt_neo gptj granite helium llama
    ministral mistral mixtral nemotron olmo olmo2 olmo3 opt phi qwen2 qwen2_moe qwen3 qwen3_moe
    smollm3 stablelm starcoder2
"""
QUERY_MODELS = ("bert", "camembert", "electra", "ernie", "roberta", "xlm-roberta")
QUERY_VALUE = {
    **dict.fromkeys(Q_PROJ_MODELS.split(), ("q_proj", "v_proj")),
    **dict.fromkeys(QUERY_MODELS, ("query", "value")),
    "deberta-v2": ("query_proj", "value_proj"),
    "distilbert": ("q_lin", "v_lin"),
}
FUSED = {
    **dict.fromkeys(("gpt2", "gpt_bigcode"), "c_attn"),
    **dict.fromkeys(("gpt_neox", "bloom", "falcon"), "query_key_value"),
    **dict.fromkeys(("phi3", "codegen"), "qkv_proj"),
    **dict.fromkeys(("mpt", "modernbert"), "Wqkv"),
}

NUM_LAYERS = 2
DEPTH_KEYS = {"gpt2": "n_layer", "gptj": "n_layer", "gpt_bigcode": "n_layer", "mpt": "n_layers",
              "bloom": "n_layer", "distilbert": "n_layers", "gpt_neo": "num_layers"}  # fmt: skip
OTHER_KEYS = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "nemotron": {"num_key_value_heads": 48},
    "ministral": {"head_dim": 128},
}


def _model(model_type: str) -> PreTrainedModel:
    """A model of this architecture with two layers and no memory behind its weights."""
    depth = {DEPTH_KEYS.get(model_type, "num_hidden_layers"): NUM_LAYERS}
    config = AutoConfig.for_model(model_type, **depth, **OTHER_KEYS.get(model_type, {}))
    family = (
        AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel
    )
    with torch.device("meta"):
        return family.from_config(config)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return _model("llama")


@pytest.mark.parametrize("model_type", QUERY_VALUE)
def test_the_default_is_query_and_value_of_every_layer(model_type: str) -> None:
    model = _model(model_type)
    targets = find_targets(model)
    assert len(targets) == 2 * NUM_LAYERS
    suffixes = [name.removesuffix(".weight").rpartition(".")[2] for name in targets]
    assert tuple(sorted(set(suffixes))) == QUERY_VALUE[model_type]
    assert all(model.get_parameter(name) is module.weight for name, module in targets.items())


@pytest.mark.parametrize("model_type", FUSED)
def test_fused_projections_are_refused_with_a_name_that_works(model_type: str) -> None:
    model = _model(model_type)
    with pytest.raises(ValueError, match=f"{model_type} computes query, key and value in one") as e:
        find_targets(model)
    assert re.findall(r"--target_modules (\S+)", str(e.value)) == [FUSED[model_type]]
    assert len(find_targets(model, [FUSED[model_type]])) == NUM_LAYERS


def test_an_unknown_architecture_asks_for_names() -> None:
    with pytest.raises(ValueError, match=r"of mamba are not known.*--target_modules, of dt_proj, "):
        find_targets(_model("mamba"))
    with pytest.raises(ValueError, match=r"projections of Linear are not known"):
        find_targets(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["o_proj", "mlp.up_proj"],
            ["model.layers.N.mlp.up_proj", "model.layers.N.self_attn.o_proj"],
        ),
        (["model.layers.1.self_attn.q_proj"], ["model.layers.1.self_attn.q_proj"]),
        (
            [r"model\.layers\.1\..*\.[qk]_proj"],  # an expression matches whole names
            ["model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.q_proj"],
        ),
    ],
)
def test_layers_by_suffix_or_expression(
    llama: PreTrainedModel, names: list[str], expected: list[str]
) -> None:
    whole = {name.replace(".N.", f".{layer}.") for name in expected for layer in range(NUM_LAYERS)}
    assert {name.removesuffix(".weight") for name in find_targets(llama, names)} == whole


def test_all_linear_leaves_out_the_output_layer(llama: PreTrainedModel) -> None:
    targets = find_targets(llama, ["all-linear"])
    linear = {f"{n}.weight" for n, m in llama.named_modules() if isinstance(m, nn.Linear)}
    assert linear - set(targets) == {"lm_head.weight"}
    assert len(targets) == 7 * NUM_LAYERS
    transposed = find_targets(_model("gpt2"), ["all-linear"])
    assert len(transposed) == 4 * NUM_LAYERS
    assert {type(module).__name__ for module in transposed.values()} == {"Conv1D"}


def test_targets_come_in_the_order_of_the_parameters(llama: PreTrainedModel) -> None:
    order = [name for name, _ in llama.named_parameters()]
    for names in (None, ["v_proj", "q_proj"], ["all-linear"], [".*proj"]):
        targets = list(find_targets(llama, names))
        assert targets == sorted(targets, key=order.index)


def test_layers_by_the_names_of_their_weights(llama: PreTrainedModel) -> None:
    targets = find_targets(llama, ["all-linear"])
    assert targets_of(llama, list(targets)[::-1]) == targets
    assert list(targets_of(llama, list(targets)[::-1])) == list(targets)
    with pytest.raises(ValueError, match=r"q_proj\) matches no module"):
        targets_of(llama, ["model.layers.9.self_attn.q_proj.weight"])


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["query"], r"query matches no module.*down_proj, gate_proj, k_proj"),
        (["proj"], "--target_modules proj matches no module"),  # a suffix ends at a dot
        (["q_proj", "v_prj"], "--target_modules v_prj matches no module"),
        ([r"layers\.1\..*\.[qk]_proj"], "matches no module"),  # not the whole name
        (["mlp"], r"matches model\.layers\.0\.mlp, a LlamaMLP: only linear"),
        ([r".*layers.*(q_proj|layernorm)"], "a LlamaRMSNorm: only linear"),
        (["(q_proj"], r"\(q_proj is neither a module name nor a regular"),
    ],
)
def test_names_that_are_no_linear_layers_are_refused(
    llama: PreTrainedModel, names: list[str], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        find_targets(llama, names)


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


def test_a_tied_weight_is_refused_by_the_names_that_share_it() -> None:
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
