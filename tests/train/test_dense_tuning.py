"""Training whole parameters on real ranks against torch's AdamW in one process, and its files.

The reference differentiates a dense model by ordinary autograd, one example at a time, clips by
``torch.nn.utils.clip_grad_norm_`` and steps ``torch.optim.AdamW`` on the mean loss of the global
batch, with a second parameter group for a head. What a run writes is read by the library that its
users would read it with, and has to give the logits of the engine that wrote it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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

from gem_ds.data.batches import Batches, BatchSchedule
from gem_ds.distributed.comm import Comm
from gem_ds.distributed.process_group import init_distributed
from gem_ds.files.checkpoint import TrainerState
from gem_ds.files.delta import Delta, apply_delta
from gem_ds.models.choices import summed_pair_loss
from gem_ds.models.encoders import head_names
from gem_ds.models.loss import answer_loss_of, chunked_answer_loss
from gem_ds.models.targets import find_targets
from gem_ds.train.config import MethodArguments, TrainArguments
from gem_ds.train.dense_tuning import DenseTuning, trained_network
from gem_ds.train.fit import fit
from gem_ds.train.methods import ADAPTER_METHODS
from tests.ranks import run_ranks
from tests.tiny import Setting, make_model, naive_examples, naive_loss, random_examples
from tests.tiny_classifier import NUM_EXAMPLES, make_classifier, naive_pair_loss, random_pairs

pytestmark = [
    pytest.mark.slow,  # starts engines or programs  # of peft's calls
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]

NUM_STEPS = 5
GLOBAL_BATCH_SIZE = 8  # the last batch of an epoch has one example: some ranks have none
SEED = 3
MAX_GRAD_NORM = 0.5
TRAIN = TrainArguments(
    learning_rate=0.01,
    head_learning_rate=0.03,
    adam_beta1=0.8,
    adam_beta2=0.95,
    adam_epsilon=1e-3,  # see test_head
    weight_decay=0.1,
)


def _rate_factor(step: int) -> float:
    return 1.0 - step / 25


@dataclass(frozen=True)
class Plan:
    """One run."""

    method: str
    model: str
    setting: Setting
    micro_batch_size: int = 2

    def __str__(self) -> str:
        return (
            f"{self.method} {self.model} {self.setting} in micro-batches of {self.micro_batch_size}"
        )


EXACT = [
    Plan("full", "llama", Setting(0)),
    Plan("full", "llama", Setting(3, variant="gathered"), 1),
    Plan("full", "llama", Setting(3, variant="offload"), 3),
    Plan("full", "opt", Setting(1), 8),
    Plan("full", "bert", Setting(3)),
    Plan("bitfit", "opt", Setting(2), 3),
    Plan("bitfit", "bert", Setting(3)),
    Plan("lora", "llama", Setting(0)),
    Plan("lora", "bert", Setting(3), 3),
    Plan("ia3", "llama", Setting(3)),
    Plan("shira", "llama", Setting(2)),
]
ROUNDED = [
    Plan("full", "llama", Setting(0, "bf16")),
    Plan("full", "llama", Setting(3, "bf16")),
    Plan("lora", "bert", Setting(3, "bf16")),
]
PLANS = {1: [EXACT[2], EXACT[8]], 2: [*EXACT, *ROUNDED]}
RUNS = [(size, plan) for size, plans in PLANS.items() for plan in plans]
EXACT_RUNS = [(size, plan) for size, plan in RUNS if plan in EXACT]


def _model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Always the same weights; no dropout. The Llama's embeddings are tied."""
    if name == "bert":
        return make_classifier(dtype)
    if name == "opt":
        model = make_model("opt", dtype)
        for module in model.modules():
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=40,
            hidden_size=12,
            intermediate_size=9,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            initializer_range=0.2,
            tie_word_embeddings=True,
        )
        return LlamaForCausalLM(config).to(dtype)


def _head(model: PreTrainedModel) -> list[str]:
    return sorted(head_names(model))


def _args(method: str, folder: Path) -> Any:
    return SimpleNamespace(
        train=TRAIN,
        method=MethodArguments(
            method=method,
            lora_r=2,
            target_modules=["q_proj", "v_proj"] if method == "ia3" else None,
        ),
        model=SimpleNamespace(model_name_or_path=str(folder / "base"), revision=None),
        data=SimpleNamespace(task="none", max_length=0),
    )


def _run_plan(model: PreTrainedModel, folder: Path, deepspeed: dict[str, Any]) -> Any:
    return SimpleNamespace(
        targets=list(find_targets(model)),
        budget=0,
        shira_rank=1,
        num_parameters=0,
        config=model.config,
        mask=None,
        deepspeed=deepspeed,
        output_dir=folder,
        tokenizer=SimpleNamespace(save_pretrained=lambda path: None),
    )


# A run on the ranks


@dataclass
class Outcome:
    """What one rank knows of a run.

    Attributes:
        losses: mean loss of each global batch, before its update.
        norms: of the gradient before clipping, where the stage computes it.
        trained: the trained parameters at the end, by name; on rank 0.
        logits: of the trained engine's model.
    """

    losses: list[float]
    norms: list[float]
    trained: dict[str, Tensor]
    logits: Tensor


def _train(comm: Comm, plan: Plan, folder: Path) -> Outcome:
    model = _model(plan.model, plan.setting.torch_dtype)
    folder = folder / f"{plan} on {comm.world_size}"
    deepspeed = plan.setting.config(comm.world_size, MAX_GRAD_NORM, 400)
    run = _run_plan(model, folder, deepspeed)
    tuning = DenseTuning(_args(plan.method, folder), run, model, _head(model), comm)
    batches = Batches(
        random_pairs() if plan.model == "bert" else random_examples(NUM_EXAMPLES),
        comm,
        global_batch_size=GLOBAL_BATCH_SIZE,
        micro_batch_size=plan.micro_batch_size,
        seed=SEED,
        pad_token_id=0,
    )
    summed_loss = summed_pair_loss
    if plan.model != "bert":
        summed_loss = answer_loss_of(tuning.engine.model, comm)
        assert summed_loss is chunked_answer_loss
    state = TrainerState(max_steps=NUM_STEPS)
    scheduler = LambdaLR(tuning.engine.optimizer, _rate_factor)
    results = list(fit(tuning.engine, [], batches, summed_loss, scheduler, state, seed=0))
    folder.mkdir(parents=True, exist_ok=True)
    tuning.save_weights()
    return Outcome(
        losses=[step.loss for step in results],
        norms=[step.grad_norm for step in results if step.grad_norm is not None],
        trained=tuning._trained(),
        logits=_logits(tuning.engine.model),
    )


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
    run = functools.cache(lambda size: run_ranks(size, _all_plans, folder))
    return lambda size, plan: [known[plan] for known in run(size)]


# The dense reference


@dataclass
class Dense:
    """The same run in one process."""

    losses: list[float]
    norms: list[float]
    base: dict[str, Tensor]
    trained: dict[str, Tensor]


@functools.cache
def _dense(method: str, name: str) -> Dense:
    model = _model(name)
    head = _head(model)
    network: Any = model
    if method in ADAPTER_METHODS:
        run = _run_plan(model, Path(), {})
        network = trained_network(model, _args(method, Path()), run.targets, run.shira_rank, head)
    else:
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(method == "full" or key.endswith("bias") or key in head)
    network.eval()
    trained = {key: p for key, p in network.named_parameters() if p.requires_grad}
    base = {key: p.detach().clone() for key, p in trained.items()}
    of_head = {key for key in trained if "classifier" in key or "pooler" in key}
    assert bool(of_head) == (name == "bert")
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for key, p in trained.items() if key not in of_head], "lr": 0.01},
            {"params": [p for key, p in trained.items() if key in of_head], "lr": 0.03},
        ],
        betas=(0.8, 0.95),
        eps=1e-3,
        weight_decay=0.1,
    )
    schedule = LambdaLR(optimizer, _rate_factor)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        loss = _mean_loss(network, name, step)
        losses.append(loss.item())
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(trained.values(), MAX_GRAD_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return Dense(losses, norms, base, {key: p.detach() for key, p in trained.items()})


def _mean_loss(network: nn.Module, name: str, step: int) -> Tensor:
    """Over a global batch, one example at a time."""
    schedule = BatchSchedule(
        num_rows=NUM_EXAMPLES,
        global_batch_size=GLOBAL_BATCH_SIZE,
        micro_batch_size=1,
        rank=0,
        world_size=1,
        seed=SEED,
    )
    batch = list(schedule.global_batch(step))
    if name == "bert":
        return torch.stack([naive_pair_loss(network, i) for i in batch]).sum() / len(batch)
    examples = naive_examples(random_examples(NUM_EXAMPLES), batch)
    num_tokens = sum(len(tokens) - prompt_length for tokens, prompt_length in examples)
    return torch.stack([naive_loss(network, e) for e in examples]).sum() / num_tokens


# The tests


@pytest.mark.parametrize(("world_size", "plan"), EXACT_RUNS, ids=str)
class TestSameTraining:
    """1e-5 relative in fp32."""

    def test_losses_and_norms(self, outcomes: Outcomes, world_size: int, plan: Plan) -> None:
        expected = _dense(plan.method, plan.model)
        for outcome in outcomes(world_size, plan):
            assert outcome.losses == pytest.approx(expected.losses, rel=1e-5)
            if plan.setting.stage > 0:  # an fp32 engine of stage 0 does not tell
                assert outcome.norms == pytest.approx(expected.norms, rel=1e-5)

    def test_parameters(self, outcomes: Outcomes, world_size: int, plan: Plan) -> None:
        expected = _dense(plan.method, plan.model).trained
        found = outcomes(world_size, plan)[0].trained
        assert found.keys() == expected.keys()
        for name, parameter in expected.items():
            # Of a key's bias the exact gradient is zero: absolutely it moves by rounding alone.
            torch.testing.assert_close(found[name], parameter, rtol=0, atol=_slack(parameter))


def _slack(parameter: Tensor) -> float:
    return 1e-6 + 1e-5 * float(parameter.abs().max())


@pytest.mark.parametrize("plan", ROUNDED, ids=str)
def test_bf16_trains_alike(outcomes: Outcomes, plan: Plan) -> None:
    expected = _dense(plan.method, plan.model)
    for outcome in outcomes(2, plan):
        assert outcome.losses == pytest.approx(expected.losses, rel=0.1)
        assert outcome.norms == pytest.approx(expected.norms, rel=0.1)


@pytest.mark.parametrize(("world_size", "plan"), RUNS, ids=str)
def test_files_give_the_trained_model(
    outcomes: Outcomes, folder: Path, world_size: int, plan: Plan
) -> None:
    """Read as their users read them; the base model is what it was before the run."""
    first, *others = outcomes(world_size, plan)
    assert all(torch.equal(other.logits, first.logits) for other in others)
    output = folder / f"{plan} on {world_size}"
    dtype = plan.setting.torch_dtype
    base = _model(plan.model, dtype)
    model: Any
    if plan.method == "full":
        kind = AutoModelForSequenceClassification if plan.model == "bert" else AutoModelForCausalLM
        model, report = kind.from_pretrained(  # type: ignore[attr-defined]
            output / "model", dtype=dtype, output_loading_info=True
        )
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
    elif plan.method == "bitfit":
        with torch.no_grad():
            for name in _head(base):
                base.get_parameter(name).fill_(0.5)  # what the base model's files do not hold
        apply_delta(base, Delta.load(output / "delta.safetensors"))
        model = base
    else:
        model = PeftModel.from_pretrained(base, output / "adapter")
    # peft computes in fp32 what it has read of a bf16 adapter.
    atol = 0.05 if dtype == torch.bfloat16 and plan.method == "lora" else 1e-6
    torch.testing.assert_close(_logits(model), first.logits, rtol=0, atol=atol)
    for name, parameter in first.trained.items():
        found = dict(model.named_parameters())[name]
        assert torch.equal(found.to(parameter.dtype), parameter), name


@pytest.mark.parametrize(("method", "model"), sorted({(p.method, p.model) for p in EXACT}))
def test_the_reference_trains(method: str, model: str) -> None:
    """The premise: clipping acts or does not, and every tensor moves."""
    dense = _dense(method, model)
    assert dense.losses[0] > 0
    for name, parameter in dense.trained.items():
        assert not torch.equal(parameter, dense.base[name]), name
