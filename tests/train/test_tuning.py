"""Training on real ranks against dense AdamW in one process: entries with a head, or parameters.

The reference differentiates a dense model by ordinary autograd, one example at a time. A run has to
come to its losses and values at any ZeRO stage and on any number of ranks, clip all by their common
norm, and where entries are trained leave every other parameter as it was, to the bit. What other
methods write is read by the library that its users would read it with.
"""

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from gem_ds.calibration.calibrate import calibrate
from gem_ds.data.batches import Batches, permutation
from gem_ds.distributed.comm import Comm
from gem_ds.distributed.process_group import init_distributed
from gem_ds.files.apply import apply_delta
from gem_ds.files.checkpoint import TrainerState
from gem_ds.files.delta import Delta
from gem_ds.models.blocks import block_sizes
from gem_ds.models.encoders import head_names
from gem_ds.models.loss import answer_loss_of, chunked_answer_loss
from gem_ds.models.objective import summed_pair_loss
from gem_ds.models.targets import find_targets
from gem_ds.select.selection import Selection
from gem_ds.sparse import layer_draws
from gem_ds.sparse.entries import SelectedEntries
from gem_ds.sparse.layer_draws import LayerDraws
from gem_ds.sparse.sam import Sam
from gem_ds.train import sparse_tuning
from gem_ds.train.config import (
    Arguments,
    MethodArguments,
    ModelArguments,
    TrainArguments,
)
from gem_ds.train.dense_tuning import DenseTuning, trained_network
from gem_ds.train.fit import fit
from gem_ds.train.methods import ADAPTER_METHODS
from gem_ds.train.sparse_tuning import SparseTuning
from gem_ds.train.targets import Targets
from tests import oracle
from tests.ranks import run_ranks
from tests.tiny import (
    Setting,
    bits,
    make_model,
    model_of,
    naive_examples,
    naive_loss,
    random_examples,
    whole_state,
)
from tests.tiny_tasks import NUM_PAIRS, make_classifier, naive_pair_loss, random_pairs

pytestmark = [
    pytest.mark.slow,  # starts engines or programs
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]

NUM_HEAD_STEPS = 4  # of the head alone, before the calibration
GLOBAL_BATCH_SIZE = 8  # the last batch of an epoch has one example: some ranks have none
SEED = 3
NUM_SELECTED = (41, 7, 60, 13)
FACTORS = (1.0, 0.5, 0.1, 2.0)  # of the layers' learning rates, where they are scaled
SHARE = 0.4  # of the layers, where they are drawn
K = sum(NUM_SELECTED)
HEAD_SIZE = 16 * 17 + 3 * 17  # pooler and classifier; neither two nor three ranks can share it
assert HEAD_SIZE % 2
assert HEAD_SIZE % 3

#: An Adam update is close to ``sign(g)`` where ``|g|`` is far above eps, and then a gradient that
#: is all rounding moves its weight as far as any other. With this eps, a hundredth of a usual
#: gradient, an update is as exact as its gradient, and its size depends on clipping.
ADAM: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
TRAIN = TrainArguments(
    learning_rate=0.01,
    head_learning_rate=0.03,
    adam_beta1=ADAM["betas"][0],
    adam_beta2=ADAM["betas"][1],
    adam_epsilon=ADAM["eps"],
    weight_decay=ADAM["weight_decay"],
    disable_tqdm=True,
)


def _rate_factor(step: int) -> float:
    return 1.0 - step / 25


@dataclass(frozen=True)
class Plan:
    """One run; ``gem`` trains given entries of an encoder, and its head."""

    method: str
    model: str
    setting: Setting
    micro_batch_size: int = 2
    max_grad_norm: float = 0.5
    sam_rho: float = 0.0
    scales_rates: bool = False
    draws_layers: bool = False

    def __str__(self) -> str:
        size, norm = self.micro_batch_size, self.max_grad_norm
        more = f" sam {self.sam_rho}" * bool(self.sam_rho) + " by layer" * self.scales_rates
        more += " of drawn layers" * self.draws_layers
        return f"{self.method} {self.model} {self.setting} by {size} clipped to {norm}{more}"

    @property
    def num_steps(self) -> int:
        return 20 if self.draws_layers else 9 if self.method == "gem" else 5


#: By world size. Every stage, dtype and variant of an engine is test_engine.py's: here each method
#: is once where weights are whole and once where they are cut, which SHiRA refuses.
PLANS = {
    1: [
        Plan("full", "llama", Setting(3, variant="offload"), 3),
        Plan("ia3", "llama", Setting(0)),
        Plan("gem", "bert", Setting(0), 3, scales_rates=True),
        Plan("gem", "bert", Setting(0), sam_rho=0.3),
        Plan("gem", "bert", Setting(0), sam_rho=0.3, draws_layers=True),
    ],
    2: [
        Plan("gem", "bert", Setting(0)),
        Plan("gem", "bert", Setting(2), 8, max_grad_norm=0.0),
        Plan("gem", "bert", Setting(3, variant="offload"), 3),
        Plan("full", "llama", Setting(3, variant="gathered"), 1),
        Plan("full", "opt", Setting(1), 8),
        Plan("full", "bert", Setting(3)),
        Plan("bitfit", "opt", Setting(2), 3),
        Plan("bitfit", "bert", Setting(3)),
        Plan("lora", "llama", Setting(0)),
        Plan("lora", "bert", Setting(3), 3),
        Plan("ia3", "llama", Setting(3)),
        Plan("shira", "llama", Setting(2)),
        *(Plan("gem", "bert", Setting(stage), scales_rates=True) for stage in (1, 3)),
        Plan("gem", "bert", Setting(0), sam_rho=0.3),
        Plan("gem", "bert", Setting(3), 1, sam_rho=0.3, draws_layers=True),
        Plan("gem", "bert", Setting(0, "bf16")),
        *(Plan("full", "llama", Setting(stage, "bf16")) for stage in (0, 3)),
        Plan("lora", "bert", Setting(3, "bf16")),
        Plan("gem", "bert", Setting(3, "bf16"), sam_rho=0.3),
    ],
    3: [Plan("gem", "bert", Setting(3, dtype)) for dtype in ("fp32", "bf16")],
}
RUNS = [(size, plan) for size, plans in PLANS.items() for plan in plans]


def _runs(holds: Callable[[Plan], bool]) -> pytest.MarkDecorator:
    chosen = [(size, plan) for size, plan in RUNS if holds(plan)]
    return pytest.mark.parametrize(("world_size", "plan"), chosen, ids=str)


def _model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Always the same weights; no dropout. The Llama's embeddings are tied."""
    if name == "bert":
        return make_classifier(dtype)
    if name == "opt":
        return make_model(name, dtype, dropout=0.0)
    sizes = {"vocab_size": 40, "hidden_size": 12, "intermediate_size": 9}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1}
    config = LlamaConfig(**sizes, initializer_range=0.2, tie_word_embeddings=True)
    return model_of(config, LlamaForCausalLM).to(dtype)


def _indices(model: nn.Module) -> dict[str, Tensor]:
    """The entries that ``gem`` trains."""
    generator = torch.Generator().manual_seed(9)
    return {
        name: torch.randperm(16 * 16, generator=generator)[:count].sort().values
        for name, count in zip(find_targets(model), NUM_SELECTED, strict=True)
    }


def _prepared(method: str, model: PreTrainedModel, folder: Path, deepspeed: Any = None) -> Any:
    """What of a prepared run a tuning asks for."""
    return SimpleNamespace(
        args=Arguments(
            train=TRAIN,
            method=MethodArguments(
                method=method,
                lora_r=2,
                target_modules=["q_proj", "v_proj"] if method == "ia3" else None,
                calibration_head_steps=NUM_HEAD_STEPS,
            ),
            model=ModelArguments(model_name_or_path=str(folder / "base")),
        ),
        targets=Targets(names=list(find_targets(model)), num_parameters=0, budget=K, shira_rank=1),
        config=model.config,
        mask=None,
        checkpoint=None,
        deepspeed=deepspeed,
        output_dir=folder,
    )


# A run on the ranks


@dataclass
class Outcome:
    """What one rank knows of a run."""

    losses: list[float]  # means of the global batches, before their updates
    norms: list[float]  # of the gradient before clipping, where the stage computes it
    logits: Tensor
    trained: dict[str, Tensor]  # of other methods than gem on rank 0
    alone: dict[str, Tensor] = field(default_factory=dict)  # the head that a calibration sees
    probabilities: list[float] = field(default_factory=list)  # of layers, where they are drawn
    violations: list[str] = field(default_factory=list)  # what is not as it should be to the bit


class Inspector:
    """Compares all weights that a rank holds with what they should be, to the bit."""

    def __init__(self, tuning: SparseTuning) -> None:
        self.parts, self.engine = tuning.parts, tuning.engine
        base = make_classifier(self.engine.dtype)
        self.expected = {name: p.detach().clone() for name, p in base.named_parameters()}
        self.violations: list[str] = []
        self.compare("after calibration")
        for part in self.parts:
            part.start_from_weights()

    def take_up_masters(self) -> None:
        """What is expected from now on."""
        for part in self.parts:
            masters = whole_state(self.engine, part.vector)["master"].to(self.engine.dtype)
            masters = part.split(masters)
            for name, index in zip(part.names, part.flat_indices, strict=True):
                self.expected[name].view(-1)[index.long()] = masters[name]

    def compare(self, when: str) -> None:
        """Note what differs."""
        for name, whole in self.expected.items():
            parameter = self.engine.model.get_parameter(name)
            start, stop = self.engine.weights.shard_range(parameter)
            pairs = [(self.engine.weights.read_shard(parameter), whole.flatten()[start:stop])]
            if parameter.data.numel() == whole.numel():
                pairs.append((parameter.data, whole.view(parameter.data.shape)))
            for found, expected in pairs:
                if not torch.equal(bits(found), bits(expected)):
                    self.violations.append(f"{name} {when}")


def _train(comm: Comm, plan: Plan, folder: Path) -> Outcome:
    model = _model(plan.model, plan.setting.torch_dtype)
    folder = folder / f"{plan} on {comm.world_size}"
    blocks = block_sizes(model) if plan.method == "gem" else {}
    deepspeed = plan.setting.config(comm.world_size, plan.max_grad_norm, K, blocks)
    if plan.method == "full" and comm.is_main:  # what is written is as the base
        model.save_pretrained(folder / "base")
    prepared = _prepared(plan.method, model, folder, deepspeed)
    kind = SparseTuning if plan.method == "gem" else DenseTuning
    tuning: Any = kind(prepared, model, sorted(head_names(model)), comm)
    batches = Batches(
        random_pairs() if plan.model == "bert" else random_examples(NUM_PAIRS),
        comm,
        global_batch_size=GLOBAL_BATCH_SIZE,
        micro_batch_size=plan.micro_batch_size,
        seed=SEED,
        pad_token_id=0,
    )
    scheduler = LambdaLR(tuning.engine.optimizer, _rate_factor)
    inspector, parts, summed_loss = None, [], summed_pair_loss
    alone: dict[str, Tensor] = {}
    if isinstance(tuning, SparseTuning):
        alone = _calibrate(tuning, batches, scheduler)
        inspector, parts = Inspector(tuning), tuning.parts
        if plan.scales_rates:
            names = tuning.entries.names
            tuning.entries.scale_rates({n: [f] for n, f in zip(names, FACTORS, strict=True)})
    elif plan.model != "bert":
        summed_loss = answer_loss_of(tuning.engine.model, comm)
        assert summed_loss is chunked_answer_loss
    state, results = TrainerState(max_steps=plan.num_steps), []
    options: Any = {"seed": 0, "sam": Sam(plan.sam_rho) if plan.sam_rho else None}
    draws = None
    if plan.draws_layers:
        draws = LayerDraws([SHARE] * len(FACTORS), [0] * len(FACTORS), SHARE, SEED)
        options["sam"] = Sam(plan.sam_rho, draws)
    for step in fit(tuning.engine, parts, batches, summed_loss, scheduler, state, **options):
        results.append(step)
        if inspector is not None:
            inspector.take_up_masters()
            inspector.compare(f"after step {state.global_step}")
    if isinstance(tuning, SparseTuning):
        trained = {name: value for part in parts for name, value in part.split(part.read()).items()}
    else:
        trained = tuning.engine.whole_parameters(tuning.names)
        folder.mkdir(parents=True, exist_ok=True)
        tuning.save_weights()
    return Outcome(
        losses=[step.loss for step in results],
        norms=[step.grad_norm for step in results if step.grad_norm is not None],
        logits=_logits(tuning.engine.model),
        trained=trained,
        alone=alone,
        probabilities=draws.probabilities if draws else [],
        violations=[] if inspector is None else inspector.violations,
    )


def _calibrate(tuning: SparseTuning, batches: Batches, scheduler: LambdaLR) -> dict[str, Tensor]:
    """Select twice, leaving no trace, and take other entries; the head that the first one saw."""
    head, args = tuning.head, tuning.args
    assert head is not None
    assert head.num_entries == HEAD_SIZE
    seen: list[Tensor] = []  # the head, each time that a calibration begins

    def recorded(*arguments: Any, **options: Any) -> Selection:
        seen.append(head.read())
        return calibrate(*arguments, **options)

    untrained = head.read()
    with mock.patch.object(sparse_tuning, "calibrate", recorded):
        tuning.select(batches, summed_pair_loss)
        tuning.args = replace(args, method=MethodArguments(calibration_head_steps=0))
        tuning.select(batches, summed_pair_loss)
    assert scheduler.get_last_lr() == [g["lr"] for g in tuning.engine.optimizer.param_groups]
    assert torch.equal(bits(seen[1]), bits(untrained))
    assert all(vector.buffer is None for vector in tuning.engine.vectors)
    indices = list(_indices(tuning.engine.model).values())
    tuning.entries = SelectedEntries(tuning.engine, tuning.layers, indices)
    return head.split(seen[0])


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    tokens = torch.randint(1, 30, (2, 9), generator=torch.Generator().manual_seed(4))
    return model.eval()(input_ids=tokens).logits


def _all_plans(folder: Path) -> dict[Plan, Outcome]:
    comm = init_distributed()
    return {plan: _train(comm, plan, folder) for plan in PLANS[comm.world_size]}


Outcomes = Callable[[int, Plan], list[Outcome]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> Outcomes:
    """World size and plan -> what each rank knows."""
    run = functools.cache(lambda size: run_ranks(size, _all_plans, folder, timeout=600))
    return lambda size, plan: [known[plan] for known in run(size)]


# The dense reference


@dataclass
class Dense:
    """The same run in one process, every weight and moment whole."""

    losses: list[float]
    norms: list[float]
    trained: dict[str, Tensor]  # of gem the selected entries and the head's, flat
    probabilities: list[float]  # of layers, where they are drawn


def _dense_of(plan: Plan, alone: int = 0) -> Dense:
    """Of whatever engine; with ``alone`` the head alone, its rate falling to 0 in so many steps."""
    return _dense(replace(plan, setting=Setting(0), micro_batch_size=1), alone)


@functools.cache
def _dense(plan: Plan, alone: int) -> Dense:
    method, name = plan.method, plan.model
    network: Any = _model(name).eval()
    head = sorted(head_names(network))
    indices = _indices(network) if method == "gem" and not alone else {}
    if method in ADAPTER_METHODS:
        prepared = _prepared(method, network, Path())
        network = trained_network(network, prepared.args, prepared.targets, head).eval()
        params = {key: p for key, p in network.named_parameters() if p.requires_grad}
    else:
        params = {
            key: p
            for key, p in network.named_parameters()
            if method == "full"
            or key in {*head, *indices}
            or (method == "bitfit" and key.endswith("bias"))
        }
    base = {key: p.detach().clone() for key, p in params.items()}
    masks = {key: torch.full(p.shape, True) for key, p in params.items()}
    masks |= oracle.masks_at(params, indices)
    of_head = {key for key in params if "classifier" in key or "pooler" in key}
    assert bool(of_head) == (name == "bert")
    rates = {key: 0.03 if key in of_head else 0.01 for key in params}
    if plan.scales_rates:
        rates |= {key: 0.01 * factor for key, factor in zip(indices, FACTORS, strict=True)}
    optimizer = oracle.DenseMaskedAdamW(params, masks, max_norm=plan.max_grad_norm or None, **ADAM)
    losses, norms = [], []
    bandit = oracle.LayerBandit(len(FACTORS), SHARE, layer_draws.RATE)
    for step in range(alone or plan.num_steps):
        examples, num_items, loss_fn = _global_batch(name, step)
        with torch.no_grad():
            losses.append(sum(float(loss_fn(network, e)) for e in examples) / num_items)
        found = functools.partial(oracle.summed_gradients, network, examples, loss_fn, list(params))
        drawn, own = set(params), masks
        if plan.draws_layers:
            drawn = _drawn(bandit, step, list(indices)) | of_head
            own = {key: mask & (key in drawn) for key, mask in masks.items()}
            layers = [i for i, key in enumerate(indices) if key in drawn]
            here = {key: g * masks[key] / num_items for key, g in found().items()}
            of_drawn = [here[key].norm() for key in indices if key in drawn]
            bandit.learn(torch.tensor(layers), torch.stack(of_drawn))
        sums = oracle.sam_gradients(found, params, own, plan.sam_rho) if plan.sam_rho else found()
        factor = 1 - step / alone if alone else _rate_factor(step)
        means = {key: gradient / num_items for key, gradient in sums.items()}
        now = {key: rate * factor for key, rate in rates.items()}
        norms.append(optimizer.step(means, now, drawn))
    for key, parameter in params.items():
        assert not torch.equal(parameter, base[key]), f"the premise: {key} moves"
    trained = {key: p.detach() for key, p in params.items()}
    trained |= {key: trained[key].flatten()[index] for key, index in indices.items()}
    return Dense(losses, norms, trained, bandit.p.tolist() if plan.draws_layers else [])


def _drawn(bandit: oracle.LayerBandit, step: int, names: list[str]) -> set[str]:
    """The layers whose numbers fall below their probabilities, once one of a round does."""
    noise = random.Random(f"{SEED}/{step}")
    while True:
        found = {name for name, p in zip(names, bandit.p, strict=True) if noise.random() < p}
        if found:
            return found


def _global_batch(name: str, step: int) -> tuple[list[Any], int, Callable[..., Tensor]]:
    """Its examples one by one, how many items the loss is a mean of, and that of an example."""
    epoch, number = divmod(step, 3)  # of 8, 8 and 1 examples
    order = permutation(NUM_PAIRS, SEED, epoch)
    batch = order[number * GLOBAL_BATCH_SIZE :][:GLOBAL_BATCH_SIZE].tolist()
    if name == "bert":
        return batch, len(batch), naive_pair_loss
    examples = naive_examples(random_examples(NUM_PAIRS), batch)
    return examples, sum(len(tokens) - start for tokens, start in examples), naive_loss


# The tests


@_runs(lambda plan: plan.setting.dtype == "fp32")
def test_same_training(outcomes, world_size, plan):
    """1e-5 relative in fp32; the norm is that of entries and head together."""
    expected, is_gem = _dense_of(plan), plan.method == "gem"
    found = outcomes(world_size, plan)
    for outcome in found:
        assert outcome.losses == pytest.approx(expected.losses, rel=1e-5)
        if plan.setting.stage > 0:  # an fp32 engine of stage 0 does not tell
            assert outcome.norms == pytest.approx(expected.norms, rel=1e-5)
        moved = [p - SHARE for p in outcome.probabilities]
        assert moved == pytest.approx([p - SHARE for p in expected.probabilities], rel=1e-3)
    for outcome in found if is_gem else found[:1]:
        # Of a key's bias the exact gradient is zero: absolutely it moves by rounding alone.
        _assert_close(outcome.trained, expected.trained, slack=0 if is_gem else 1e-6)
        if is_gem:
            of_head = Plan("gem", "bert", plan.setting, max_grad_norm=plan.max_grad_norm)
            alone = _dense_of(of_head, NUM_HEAD_STEPS)
            _assert_close(outcome.alone, alone.trained, slack=0)


def _assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], *, slack: float) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        difference = (found[name].flatten() - values.flatten()).abs().max()
        assert difference <= slack + 1e-5 * values.abs().max(), name


@_runs(lambda plan: plan.method == "gem")
def test_nothing_else_changes_and_ranks_agree(outcomes, world_size, plan):
    """Calibration changes nothing; after each step weights are the base with rounded masters."""
    first, *others = outcomes(world_size, plan)
    assert first.violations == []
    for other in others:
        assert other.violations == []
        assert other.losses == first.losses
        for name, values in first.trained.items():
            assert torch.equal(bits(other.trained[name]), bits(values)), name


@_runs(lambda plan: plan.setting.dtype == "bf16")
def test_bf16_trains_alike(outcomes, world_size, plan):
    """And clips by the norm of all; one of its own for entries and head would move less."""
    dense = _dense_of(plan)
    for outcome in outcomes(world_size, plan):
        close = 0.05 if plan.method == "gem" else 0.1
        assert outcome.losses == pytest.approx(dense.losses, rel=close)
        assert outcome.norms == pytest.approx(dense.norms, rel=0.1)


@_runs(lambda plan: plan.method != "gem")
def test_files_give_the_trained_model(outcomes, folder, world_size, plan):
    """Read as their users read them; the base model is what it was before the run."""
    first, *others = outcomes(world_size, plan)
    assert all(torch.equal(other.logits, first.logits) for other in others)
    output = folder / f"{plan} on {world_size}"
    dtype = plan.setting.torch_dtype
    model: Any = _model(plan.model, dtype)
    if plan.method == "full":
        kind = AutoModelForSequenceClassification if plan.model == "bert" else AutoModelForCausalLM
        model, report = kind.from_pretrained(  # type: ignore[attr-defined]
            output / "model", dtype=dtype, output_loading_info=True
        )
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
    elif plan.method == "bitfit":
        with torch.no_grad():
            for name in head_names(model):
                model.get_parameter(name).fill_(0.5)  # what the base model's files do not hold
        apply_delta(model, Delta.load(output / "delta.safetensors"))
    else:
        model = PeftModel.from_pretrained(model, output / "adapter")
    # peft computes in fp32 what it has read of a bf16 adapter.
    atol = 0.05 if dtype == torch.bfloat16 and plan.method == "lora" else 1e-6
    torch.testing.assert_close(_logits(model), first.logits, rtol=0, atol=atol)
    for name, parameter in first.trained.items():
        found = dict(model.named_parameters())[name]
        assert torch.equal(found.to(parameter.dtype), parameter), name


def test_clipping_acts_in_nearly_all_steps_and_changes_what_comes_out():
    """The premise."""
    plans = [Plan("gem", "bert", Setting(0), max_grad_norm=norm) for norm in (0.5, 0.0)]
    clipped, free = map(_dense_of, plans)
    assert sorted(clipped.norms)[1] > 0.5
    assert max(abs(a - b) for a, b in zip(clipped.losses, free.losses, strict=True)) > 0.01
