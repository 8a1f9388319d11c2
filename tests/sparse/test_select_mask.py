"""A mask from Python: the launcher's for the same examples, and a model that is left as it was."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

import gem_ds
from gem_ds.calibration.calibrate import NUM_TRIED_STEPS
from gem_ds.files.mask import Mask
from gem_ds.train import main as train
from gem_ds.train.arguments import parse_arguments
from gem_ds.train.prepare import prepare
from tests import oracle
from tests.tiny import (
    checkpointed,
    make_model,
    naive_examples,
    naive_gradients,
    naive_loss,
    random_examples,
)
from tests.tiny_model import one_rank

DENSITY = "0.02"


def _labelled(tokens: Tensor, prompt_length: int) -> dict[str, Tensor]:
    labels = tokens.clone()
    labels[:prompt_length] = -100
    return {"input_ids": tokens[None], "labels": labels[None]}


def test_the_mask_is_the_launchers_and_a_run_takes_it(tiny, tmp_path):
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny.model)
    with one_rank():
        prepared = prepare(parse_arguments(tiny.flags(tmp_path / "none")), world_size=1)
        data = prepared.data.train
        batches = [_labelled(*e) for e in naive_examples(data, range(len(data)))]
        rules = ("gem", "damped", "ratio_global", "gem_abs", "fish", "lift", "random")
        for rule in rules:
            folder = tmp_path / rule
            # Packs are no examples: of these, examples are looked at one by one.
            switches = ["--packing"] if rule in ("gem_abs", "fish") else []
            train.main(tiny.flags(folder, *switches, method=rule, max_steps=0, seed=3))
            launched = Mask.load(folder / "mask.safetensors")
            reads = batches if rule not in ("lift", "random") else ()
            found = gem_ds.select_mask(model, reads, density=DENSITY, rule=rule, seed=3)
            assert list(found.indices) == list(launched.indices)
            for name, index in launched.indices.items():
                assert torch.equal(found.indices[name], index), f"{rule}: {name}"
            assert found.weights == launched.weights
            assert found.fingerprints == launched.fingerprints
            assert found.fingerprints.keys() == dict(model.named_parameters()).keys()
            assert (found.method, found.base_model) == (rule, str(tiny.model))
            assert found.settings.items() <= launched.settings.items()
        found.save(tmp_path / "mine.safetensors")
        flags = {"mask": tmp_path / "mine.safetensors", "density": None, "max_steps": 1}
        train.main(tiny.flags(tmp_path / "run", **flags))
        assert (tmp_path / "run" / "delta.safetensors").exists()


def _everything(model: nn.Module) -> list[object]:
    """What of a model a call may have changed."""
    return [
        list(model.state_dict()),
        [(id(m), m.training, sorted(vars(m)), len(m._forward_pre_hooks)) for m in model.modules()],
        [(id(p), p.requires_grad, p.grad) for p in model.parameters()],
        getattr(getattr(model, "config", None), "use_cache", None),
    ]


@pytest.mark.parametrize("architecture", ["llama", "opt", "bert"])
@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_gradients_are_dense_autograds_in_eval_mode(architecture, is_checkpointed):
    model = make_model(architecture)
    if is_checkpointed:
        checkpointed(model)
        block = next(m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))
        block.forward = block.forward  # as libraries do that replace it; it is to stay
    model.train()
    next(model.parameters()).requires_grad_(False)
    before, weights = _everything(model), {n: w.clone() for n, w in model.state_dict().items()}
    examples = naive_examples(random_examples(9), range(9))
    mask = gem_ds.select_mask(model, examples, naive_loss, density="0.01")
    assert _everything(model) == before
    assert all(torch.equal(w, model.state_dict()[n]) for n, w in weights.items())
    dense = naive_gradients(make_model(architecture), 9)
    for name, chosen in oracle.select(*dense, mask.num_selected).items():
        assert mask.indices[name].tolist() == chosen.flatten().nonzero()[:, 0].tolist()


class Plain(nn.Module):
    """No model of transformers; one layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 4), nn.Linear(4, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 5] to [batch, 3]."""
        return self.outer(self.inner(x).tanh())


def _squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


def test_any_model_of_torch_will_do():
    torch.manual_seed(0)
    model, x = Plain().requires_grad_(False), torch.randn(6, 5)
    mask = gem_ds.select_mask(
        model, [x], _squares, density="0.3", target_modules=["inner", "outer"]
    )
    assert mask.num_selected == int(0.3 * sum(p.numel() for p in model.parameters()))
    assert mask.base_model == "Plain"
    assert not any(p.requires_grad for p in model.parameters())
    chain = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).eval()  # calls what it holds
    found = gem_ds.select_mask(chain, [x], _squares, density="0.2", target_modules=["0", "2"])
    names = ["0.weight", "2.weight"]
    weights = {name: chain.get_parameter(name) for name in names}
    gradients = oracle.summed_gradients(chain, [x], _squares, names)
    expected = gem_ds.select_entries(gradients, weights, found.num_selected)
    assert {n: i.tolist() for n, i in found.indices.items()} == {
        n: i.tolist() for n, i in expected.items()
    }


def test_zeros_of_a_pruned_weight_are_selected_only_where_they_are_asked_for():
    """And what cannot be is refused before a batch is read."""
    model = Plain()
    with torch.no_grad():
        model.inner.weight[:, ::2] = 0.0
    zeros = set((model.inner.weight == 0).flatten().nonzero()[:, 0].tolist())
    options = {"target_modules": ["inner"], "density": "0.15"}
    x, chosen = [torch.randn(6, 5)], {}
    for keep_zeros in (None, True, False):
        mask = gem_ds.select_mask(model, x, _squares, keep_zeros=keep_zeros, **options)
        chosen[keep_zeros] = set(mask.indices["inner.weight"].tolist())
        assert ("keep_zeros" in mask.settings) == (keep_zeros is not False)
    assert chosen[None] == chosen[True]
    assert not chosen[None] & zeros
    assert chosen[False] < zeros
    with pytest.raises(ValueError, match="hold 8 entries that are not 0, and 11 are to be sel"):
        gem_ds.select_mask(model, (), _squares, **options | {"density": "0.25"})


def test_a_first_batch_whose_gradient_is_zero_says_nothing_yet():
    """Several do: then the layer is refused before all the rest of the batches are read."""
    model, x = Plain(), torch.randn(6, 5)
    options = {"density": "0.1", "target_modules": ["inner"]}
    expected = gem_ds.select_mask(model, [x], _squares, **options)
    found = gem_ds.select_mask(model, [torch.zeros(6, 5), x], _squares, **options)
    assert {n: i.tolist() for n, i in found.indices.items()} == {
        n: i.tolist() for n, i in expected.indices.items()
    }
    batches = iter([torch.zeros(2, 5)] * 99)
    with pytest.raises(ValueError, match=r"No gradient reaches inner\.weight"):
        gem_ds.select_mask(model, batches, _squares, **options)
    assert len([*batches]) == 99 - NUM_TRIED_STEPS
    batches = iter([torch.randn(2, 5)] * 99)
    with pytest.raises(ValueError, match=r"No gradient reaches unused\.weight"):
        gem_ds.select_mask(
            model, batches, _squares, density="0.1", target_modules=["outer", "unused"]
        )
    assert len([*batches]) == 98, "what no backward comes by is known after one"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_mode_and_calls_of_the_model_do_not_matter(mode):
    examples = naive_examples(random_examples(4), range(4))
    expected = gem_ds.select_mask(make_model("llama"), examples, naive_loss, density="0.01")

    def loss_of_two(model: nn.Module, pair: tuple) -> Tensor:
        return naive_loss(model, pair[0]) + naive_loss(model, pair[1])

    model = checkpointed(make_model("llama"))
    with mode():
        pairs = (pair for pair in [examples[:2], examples[2:]])
        mask = gem_ds.select_mask(model, pairs, loss_of_two, density="0.01")
    assert mask.weights == expected.weights


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (_squares, {"rule": "gim"}, "no rule 'gim': pass one of gem,"),
        (_squares, {"density": "0.99"}, "lower it or widen target_modules"),
        (_squares, {"target_modules": ["outer", "unused"]}, "No gradient reaches unused.weight"),
        (
            lambda model, x: _squares(model, x).detach(),
            {},
            "return the sum of the batch's losses, not detached",
        ),
        (lambda model, x: _squares(model, x) * torch.inf, {}, "loss of batch 1 is not finite"),
        (None, {}, "Pass loss, which takes the model and a batch"),
        (_squares, {"batches": []}, "no batches: pass at least one"),
        (
            lambda model, x: _squares(model, x) + _squares(model, 2 * x),
            {"rule": "gradient_abs"},
            "runs inner.weight more than once for an example",
        ),
    ],
)
def test_what_is_refused_leaves_the_model_as_it_was(loss, options, message):
    model = Plain()
    settings = {"density": "0.1", "target_modules": ["inner"], "batches": [torch.randn(2, 5)]}
    before = _everything(model)
    with pytest.raises(ValueError, match=message):
        gem_ds.select_mask(model, loss=loss, **settings | options)
    assert _everything(model) == before


def test_a_model_that_lies_elsewhere_is_refused():
    with pytest.raises(ValueError, match="not whole in this process"):
        gem_ds.select_mask(Plain().to("meta"), target_modules=["inner"], rule="magnitude")
    model = Plain()
    model.inner.forward = model.inner.forward
    with pytest.raises(ValueError, match="forward was replaced"):
        gem_ds.select_mask(model, target_modules=["inner"], rule="magnitude", density="0.1")


def test_one_name_or_expression_needs_no_list():
    found = gem_ds.select_mask(Plain(), target_modules="inner", rule="magnitude", density="0.1")
    assert found.indices.keys() == {"inner.weight"}
