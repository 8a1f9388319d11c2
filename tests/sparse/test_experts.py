"""Experts as targets against autograd's gradients of what transformers computes by itself.

In one process and on ranks, of models that hold their experts in different ways. Few tokens, so
that some experts get none, on some ranks or on all.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

import gem_ds
from gem_ds.calibration.calibrate import calibrate
from gem_ds.data.batches import permutation
from gem_ds.distributed.comm import Comm
from gem_ds.distributed.process_group import init_distributed
from gem_ds.files.checkpoint import TrainerState
from gem_ds.formats.export import export
from gem_ds.models.loss import chunked_answer_loss, summed_answer_loss
from gem_ds.models.router_loss import refuse_silent_routers, with_router_loss
from gem_ds.models.targets import find_targets, targets_of
from gem_ds.sddmm import Pattern, add_sampled_product, grouped, grouped_linear, product
from gem_ds.select.selection import Selection, gather_indices
from gem_ds.sparse.entries import SelectedEntries
from gem_ds.sparse.experts import project
from gem_ds.sparse.kinds import ExpertsLayer
from gem_ds.sparse.target_layers import TargetLayers
from gem_ds.train.config import Arguments, MethodArguments, ModelArguments
from gem_ds.train.fit import fit
from gem_ds.train.targets import settle_targets
from tests import oracle
from tests.largest_tensor import LargestTensor
from tests.ranks import run_ranks, told_as
from tests.tiny import (
    PAD_TOKEN_ID,
    Setting,
    Tensors,
    assert_selected_up_to_rounding,
    checkpointed,
    make_batches,
    make_engine,
    naive_examples,
    naive_loss,
    random_examples,
    tiny_config,
)

KINDS = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
NUM_EXAMPLES = 5
K = 90
NUM_STEPS = 20
LEARNING_RATE = 0.01
MICRO_BATCH_SIZE = 2


def _model(kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Always the same weights; biases and routers are random too.

    A kind's second word is *balanced* (the routers' loss counts), *apart* (a rank's tokens pass
    through experts of its own, `_send`) or *alone* (all tokens through one).
    """
    name, _, variant = kind.partition(" ")
    balance = {"output_router_logits": True, "router_aux_loss_coef": 0.3}
    config = tiny_config(name, **(balance if variant == "balanced" else {}))
    config._experts_implementation = "eager"  # a loop over the experts
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for name, parameter in model.named_parameters():
            if "experts" in name or "gate" in name or "router" in name:
                nn.init.normal_(parameter, std=0.3)
    if variant in ("apart", "alone"):
        for router in _routers(model):
            router.is_apart = variant == "apart"
            router.register_forward_hook(_sent)
        _send(model, 0)
    return model.to(dtype)


def _routers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, MixtralTopKRouter)]


def _send(model: nn.Module, rank: int) -> None:
    """From now on tokens are those of a rank."""
    for router in _routers(model):
        router.rank = rank


def _sent(router: Any, _: Any, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a router says, but for the experts that it sends tokens to."""
    logits, weights, chosen = outputs
    experts = [2 * router.rank, 2 * router.rank + 1] if router.is_apart else [0, 0]
    return logits, weights, torch.tensor(experts).expand_as(chosen)


def _experts(model: nn.Module) -> list[str]:
    names = [name for name, p in model.named_parameters() if p.dim() == 3]
    assert len(names) in (2, 4)
    return names


def _examples() -> list[Any]:
    return naive_examples(random_examples(NUM_EXAMPLES), range(NUM_EXAMPLES))


def _own_loss(model: nn.Module, part: tuple[int, list[int]]) -> Tensor:
    """Transformers' own, the routers' included, of a rank's micro-batch, times its items."""
    rank, rows = part
    _send(model, rank)
    batch = random_examples(NUM_EXAMPLES).collate(rows, PAD_TOKEN_ID)
    num_items = len(batch.pop("answer_positions"))
    loss: Tensor = model(**batch).loss
    return loss * num_items


def _parts(kind: str, rows: list[int], world_size: int) -> tuple[list[Any], Callable[..., Tensor]]:
    """What the dense model sums over the rows of a step, and the loss of each of these."""
    if " " not in kind:
        return naive_examples(random_examples(NUM_EXAMPLES), rows), naive_loss
    by_rank = [(rank, rows[rank::world_size]) for rank in range(world_size)]
    return [(rank, part) for rank, part in by_rank if part], _own_loss


def _rows(step: int, world_size: int) -> list[int]:
    """Of the global batch."""
    size = world_size * MICRO_BATCH_SIZE
    epoch, number = divmod(step, -(-NUM_EXAMPLES // size))
    return permutation(NUM_EXAMPLES, 0, epoch)[number * size :][:size].tolist()


@functools.cache
def _gradients(kind: str, world_size: int = 1, dtype: torch.dtype = torch.float32) -> Tensors:
    """Of the loss summed over an epoch, by autograd."""
    model = _model(kind, dtype).float()
    found: list[Any] = []
    for step in range(-(-NUM_EXAMPLES // (world_size * MICRO_BATCH_SIZE))):
        parts, loss = _parts(kind, _rows(step, world_size), world_size)
        found += parts
    return oracle.summed_gradients(model, found, loss, _experts(model))


def _by_expert(tensors: Tensors) -> Tensors:
    """Each expert's matrix by a name of its own."""
    return {f"{name}[{i}]": part for name, t in tensors.items() for i, part in enumerate(t)}


def _index_by_expert(indices: Tensors, model: nn.Module) -> Tensors:
    found = {}
    for name, index in indices.items():
        shape = model.get_parameter(name).shape
        expert, place = index.long() // shape[1:].numel(), index.long() % shape[1:].numel()
        found |= {f"{name}[{i}]": place[expert == i] for i in range(shape[0])}
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_projections_of_experts(kind):
    """By a projection's name, a module's, and among all linear layers; routers are none."""
    model = _model(kind)
    names = _experts(model)
    assert list(find_targets(model, ["experts"])) == names
    assert list(find_targets(model, [r".*\.experts\.(gate_up|down)_proj"])) == names
    assert list(find_targets(model, ["experts.down_proj"])) == [n for n in names if "down" in n]
    everything = find_targets(model, ["all-linear"])
    assert set(names) < everything.keys()
    assert not [name for name in everything if "router" in name or name.endswith("mlp.gate.weight")]
    assert list(targets_of(model, names)) == names


@pytest.mark.parametrize("is_one_launch", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradient_are_those_of_the_eager_model(kind, is_one_launch, monkeypatch):
    """Whole and at some entries; of one of a module's projections too. Nothing else is changed.

    A group at a time, and by the one launch that a GPU makes of all.
    """
    monkeypatch.setattr(grouped, "takes_one_launch", lambda *_: is_one_launch)
    model, expected = _model(kind), _gradients(kind)
    ids = _examples()[0][0][None]
    before = model(input_ids=ids).logits
    for names in (_experts(model), _experts(model)[1:2]):
        found = {name: torch.zeros_like(model.get_parameter(name)) for name in names}
        picked = {name: torch.zeros(13) for name in names}
        layers = TargetLayers(model, targets_of(model, names), 1)

        def take(layer: ExpertsLayer, a: Tensor, b: Tensor, ends: Tensor) -> None:
            pattern = Pattern.of(torch.arange(13) * 17, layer.shape)
            found[layer.name] += product(a, b, ends=ends)  # noqa: B023
            add_sampled_product(picked[layer.name], a, b, pattern, ends=ends)  # noqa: B023

        with layers.sinks([functools.partial(take, layer) for layer in layers]):
            for example in _examples():
                naive_loss(model, example).backward()
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-5, atol=1e-6)
        layers.detach()
        for name in names:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(picked[name], found[name].flatten()[::17][:13])
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_is_the_oracles_for_each_expert(kind):
    """An expert's matrix is a layer; one that no token reaches gets nothing, and is no error."""
    model, gradients = _model(kind), _by_expert(_gradients(kind))
    unreached = {name for name, gradient in gradients.items() if not gradient.any()}
    assert unreached or kind in ("mixtral", "gpt_oss"), "the premise"
    total = sum(p.numel() for p in model.parameters())
    weights = _by_expert({name: model.get_parameter(name).detach() for name in _experts(model)})
    for rule in ("gem", "ratio"):
        mask = gem_ds.select_mask(
            model, _examples(), naive_loss, density=0.02, target_modules=["experts"], rule=rule
        )
        assert mask.num_selected == oracle.total_budget("0.02", total)
        found = _index_by_expert(mask.indices, model)
        assert not [name for name in unreached if found[name].numel()]
        if rule == "gem":
            assert_selected_up_to_rounding(found, gradients, weights, mask.num_selected)
        else:
            counts = [index.numel() for name, index in found.items() if name not in unreached]
            assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recomputes", [False, True])
def test_the_routers_loss_is_trained_on_as_transformers_adds_it(kind, recomputes):
    """Where the configuration asks for it; the loss and the gradient of every parameter."""
    model = _model(f"{kind} balanced")
    if recomputes:
        model = checkpointed(model).train()
    rows = list(range(NUM_EXAMPLES))
    dataset, parameters = random_examples(NUM_EXAMPLES), dict(model.named_parameters())
    assert with_router_loss(chunked_answer_loss, _model(kind)) is chunked_answer_loss, "unasked"
    if kind == "deepseek_v3":  # whose bias balances
        with pytest.raises(ValueError, match=r"DeepseekV3ForCausalLM asks .* no aux_loss: set"):
            with_router_loss(chunked_answer_loss, model)(model, dataset.collate(rows, PAD_TOKEN_ID))
        with pytest.raises(ValueError, match="no aux_loss: set"):
            refuse_silent_routers(model, torch.device("cpu"))
        return
    refuse_silent_routers(model, torch.device("cpu"))
    expected = _own_loss(model, (0, rows))
    of_own = torch.autograd.grad(expected, list(parameters.values()))
    for answer_loss in (chunked_answer_loss, summed_answer_loss):
        loss = with_router_loss(answer_loss, model)
        found = loss(model, dataset.collate(rows, PAD_TOKEN_ID))
        alone = answer_loss(model, dataset.collate(rows, PAD_TOKEN_ID))
        assert abs(found - alone) > 1
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        gradients = torch.autograd.grad(found, list(parameters.values()))
        for name, one, other in zip(parameters, gradients, of_own, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=name)
        assert loss(model, dataset.collate([], PAD_TOKEN_ID)) == 0, "a rank without an example"


def test_all_tokens_may_go_to_one_expert():
    """The other experts' matrices have no gradient; the model trains all the same."""
    model = _model("mixtral")
    for module in model.modules():
        if hasattr(module, "top_k") and hasattr(module, "experts"):
            module.gate.top_k = 1
            module.gate.weight.data.zero_()  # ties go to one expert
    mask = gem_ds.select_mask(
        model, _examples(), naive_loss, target_modules=["experts"], density=0.01
    )
    found = _index_by_expert(mask.indices, model)
    assert sum(index.numel() > 0 for index in found.values()) <= 4


def test_adapters_are_of_linear_layers_alone():
    """All-linear means these; experts by name are refused, and rates of a matrix' own."""
    config = tiny_config("mixtral")
    model = ModelArguments(model_name_or_path="m")
    method = MethodArguments(method="lora", lora_r=5, target_modules=["all-linear"])
    names = settle_targets(Arguments(model=model, method=method), config, None).names
    assert len(names) == 8
    assert all(name.endswith("_proj.weight") for name in names)
    named = Arguments(model=model, method=replace(method, target_modules=["q_proj", "experts"]))
    with pytest.raises(ValueError, match=r"--method lora has no adapter for .*experts\.gate_up"):
        settle_targets(named, config, None)
    whole = _model("mixtral")
    mask = gem_ds.select_mask(whole, _examples(), naive_loss, rule="auto_rgn", density="0.05")
    with pytest.raises(ValueError, match="a learning rate of its own"):
        get_peft_model(whole, gem_ds.GemConfig(mask=mask))


def test_one_pruned_expert_is_a_pruned_matrix():
    """Zeros are kept from where a matrix was pruned, of which a parameter holds several."""
    model = _model("mixtral")
    name = _experts(model)[0]
    model.get_parameter(name).data[2, :, ::5] = 0.0
    mask = gem_ds.select_mask(model, rule="random", target_modules=["experts"], density="0.4")
    assert mask.settings["keep_zeros"]
    assert model.get_parameter(name).flatten()[mask.indices[name].long()].all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_delta_of_experts_is_applied_and_exported(kind, tmp_path):
    """To the bit; an export has the files of its base, an expert at a time where that has them."""
    base, output = tmp_path / "base", tmp_path / "exported"
    _model(kind).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    mask = gem_ds.select_mask(model, rule="random", target_modules=["experts"], density="0.02")
    generator = torch.Generator().manual_seed(1)
    values = {n: torch.randn(len(i), generator=generator) for n, i in mask.indices.items()}
    delta = gem_ds.Delta(mask=mask, values=values)
    delta.save(tmp_path / "delta.safetensors")
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, index in mask.indices.items():
        expected[name].view(-1)[index.long()] = values[name]
    gem_ds.apply_delta(model, delta)
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
    export(str(base), tmp_path / "delta.safetensors", output)
    exported = AutoModelForCausalLM.from_pretrained(output)
    assert all(torch.equal(p, expected[name]) for name, p in exported.named_parameters())
    assert (
        load_file(output / "model.safetensors").keys()
        == load_file(base / "model.safetensors").keys()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_launch_computes_what_a_loop_does(dtype):
    """Group by group in fp64; a tile of rows at a time; groups without tokens."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([0, 5, 5, 9, 24, 24], dtype=torch.int32)
    dy = torch.randn(24, 24, generator=generator).to(dtype)
    x = torch.randn(24, 16, generator=generator).to(dtype)
    weight = torch.randn(6, 16, 24, generator=generator).to(dtype)
    spans = [slice(a, b) for a, b in zip([0, *ends.tolist()], ends.tolist(), strict=False)]
    y = torch.cat([x[s].double() @ w.double() for s, w in zip(spans, weight, strict=True)])
    whole = torch.stack([dy[s].double().t() @ x[s].double() for s in spans])
    order = torch.randperm(whole.numel(), generator=generator)
    for is_one_launch in (False, True):
        with (
            mock.patch.object(grouped, "takes_one_launch", return_value=is_one_launch),
            mock.patch.object(grouped, "TILE_BYTES", 6 * 16 * 8 * dy.element_size()),
        ):
            tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {}
            for num_entries in (300, whole.numel()):
                index = order[:num_entries].sort().values.int()
                pattern, out = Pattern.of(index, whole.shape), torch.ones(num_entries)
                with LargestTensor() as made:
                    add_sampled_product(out, dy, x, pattern, ends=ends)
                expected = 1 + whole.flatten()[index.long()]
                torch.testing.assert_close(out, expected.float(), **tolerance)
            assert made.total_entries <= 1.5 * whole.numel(), "no places of all of them"
            torch.testing.assert_close(product(dy, x, ends=ends), whole.float(), **tolerance)
            found = grouped_linear(x, weight, ends)
            torch.testing.assert_close(found, y.to(dtype), **tolerance)


def test_autocast_holds_for_experts_as_for_linear_layers():
    """Of fp32 weights the product is one of bf16, and gradients are fp32 again."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 4, generator=generator, requires_grad=True)
    weight = torch.randn(2, 3, 4, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        y = project(x, weight, torch.tensor([2, 6], dtype=torch.int32), transposed=False)
        expected = torch.cat([F.linear(x[:2], weight[0]), F.linear(x[2:], weight[1])])
    assert y.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    (found,), (dx,) = (torch.autograd.grad(out.float().sum(), x) for out in (y, expected))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, dx, rtol=0.02, atol=0.02)


# On ranks

ADAM: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
SETTINGS = {
    1: [*((kind, Setting(i)) for i, kind in enumerate(KINDS)), ("mixtral balanced", Setting(0))],
    2: [
        *((kind, Setting(3, variant="gathered")) for kind in KINDS),
        ("mixtral", Setting(0)),
        ("qwen3_moe", Setting(1)),
        ("gpt_oss", Setting(2)),
        *((f"mixtral {variant}", Setting(3)) for variant in ("balanced", "apart", "alone")),
        ("mixtral balanced", Setting(3, "bf16")),
    ],
    3: [
        ("mixtral", Setting(0)),
        ("qwen3_moe", Setting(1)),
        ("gpt_oss", Setting(2)),
        ("deepseek_v3", Setting(3)),
    ],
}
Outcome = tuple[Selection, Tensors, list[float], Tensors]
"""A calibration and all the indices it selects; a training's losses, and the values after it."""


def _trained(model: nn.Module) -> Tensors:
    """The flat indices that are trained: some of each expert."""
    return {n: torch.arange(0, model.get_parameter(n).numel(), 37) for n in _experts(model)}


def _run(comm: Comm, kind: str, setting: Setting) -> Outcome:
    model = _model(kind, setting.torch_dtype)
    _send(model, comm.rank)
    summed_loss = with_router_loss(chunked_answer_loss, model)
    names, indices = _experts(model), _trained(model)
    num_trained = sum(index.numel() for index in indices.values())
    targets = targets_of(model, names)
    engine, layers = make_engine(setting, comm, model, num_trained, targets=targets)
    for group in engine.optimizer.param_groups:
        group |= ADAM
    batches = make_batches(random_examples(NUM_EXAMPLES), comm, MICRO_BATCH_SIZE)
    selection = calibrate(engine, layers, batches, summed_loss, K)
    selected = dict(zip(names, gather_indices(selection.indices, comm), strict=True))
    entries = SelectedEntries(engine, layers, list(indices.values()))
    entries.start_from_weights()
    scheduler = LambdaLR(engine.optimizer, lambda step: 1.0)
    state = TrainerState(max_steps=NUM_STEPS)
    steps = fit(engine, [entries], batches, summed_loss, scheduler, state, seed=0)
    losses = [step.loss for step in steps]
    for name, parameter in _model(kind, setting.torch_dtype).named_parameters():
        expected = parameter.detach().flatten()
        if name in indices:
            expected[indices[name]] = entries.split(entries.values())[name]
        start, stop = engine.weights.shard_range(found := model.get_parameter(name))
        assert torch.equal(engine.weights.read_shard(found), expected[start:stop]), name
    return selection, selected, losses, entries.split(entries.read())


def _all_runs() -> list[Outcome]:
    comm = init_distributed()
    outcomes = []
    for kind, setting in SETTINGS[comm.world_size]:
        with told_as(f"{kind} {setting}"):
            outcomes.append(_run(comm, kind, setting))
    return outcomes


@functools.cache
def _dense(kind: str, world_size: int, dtype: torch.dtype) -> tuple[list[float], Tensors]:
    """The same training of a dense model in one process, in fp32."""
    model = _model(kind, dtype).float()
    indices = _trained(model)
    params = {name: model.get_parameter(name) for name in indices}
    masks = oracle.masks_at(params, indices)
    optimizer = oracle.DenseMaskedAdamW(params, masks, max_norm=1.0, **ADAM)
    losses = []
    for step in range(NUM_STEPS):
        rows = _rows(step, world_size)
        examples = naive_examples(random_examples(NUM_EXAMPLES), rows)
        num_items = sum(len(tokens) - start for tokens, start in examples)
        parts, loss = _parts(kind, rows, world_size)
        with torch.no_grad():
            losses.append(float(sum(loss(model, part) for part in parts)) / num_items)
        sums = oracle.summed_gradients(model, parts, loss, list(indices))
        means = {name: gradient / num_items for name, gradient in sums.items()}
        optimizer.step(means, dict.fromkeys(params, LEARNING_RATE))
    return losses, {n: params[n].detach().flatten()[index] for n, index in indices.items()}


def _assert_statistics(
    selection: Selection, gradients: Tensors, weights: Tensors, names: list[str]
) -> None:
    """The scores and budgets of parameters are the sums of those of their experts."""
    scores = [oracle.layer_score(oracle.ratio(gradients[n], weights[n])) for n in weights]
    budgets = oracle.budgets(scores, [weight.numel() for weight in weights.values()], K)
    for i, name in enumerate(names):
        own = [number for number, expert in enumerate(weights) if expert.startswith(f"{name}[")]
        expected = sum(scores[number] for number in own)
        torch.testing.assert_close(selection.layer_scores[i], expected, rtol=1e-3, atol=0)
        assert abs(selection.budgets[i] - sum(budgets[number] for number in own)) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("world_size", SETTINGS)
def test_ranks_select_and_train_as_a_dense_model(world_size):
    """At any stage; nothing else moves, to the bit. Some experts get no token on some ranks.

    Those of some ranks may be none of another's, and all tokens those of one expert: none hangs.
    """
    ranks = run_ranks(world_size, _all_runs)
    for number, (kind, setting) in enumerate(SETTINGS[world_size]):
        dtype = setting.torch_dtype
        model = _model(kind, dtype).float()
        weights = _by_expert({n: model.get_parameter(n).detach() for n in _experts(model)})
        losses, values = _dense(kind, world_size, dtype)
        for name, value in values.items():
            base = model.get_parameter(name).detach().flatten()[_trained(model)[name]]
            assert (value - base).abs().max() > 0.02, "the premise: entries move"
        gradients = _by_expert(_gradients(kind, world_size, dtype))
        tolerance = {"rtol": 1e-5, "atol": 1e-5}
        if dtype == torch.bfloat16:
            tolerance = {"rtol": 0.05, "atol": 0.05}
        for outcomes in ranks:
            selection, selected, found_losses, found = outcomes[number]
            by_expert = _index_by_expert(selected, model)
            if dtype == torch.float32:
                assert_selected_up_to_rounding(by_expert, gradients, weights, K)
                _assert_statistics(selection, gradients, weights, list(values))
            else:  # tokens close to a border take another expert
                masks = {
                    n: mask.flatten() for n, mask in oracle.select(gradients, weights, K).items()
                }
                num_common = sum(int(masks[n][index].sum()) for n, index in by_expert.items())
                assert num_common > 0.9 * K
            torch.testing.assert_close(found_losses, losses, **tolerance)
            for name, expected in values.items():
                torch.testing.assert_close(found[name].float(), expected, **tolerance)
