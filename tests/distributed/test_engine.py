"""The conformance test of the one door to DeepSpeed, on real ranks.

Every ZeRO stage, in fp32 and bf16, plainly, offloaded to the CPU and with every weight persistent,
has to do the same things: read a rank's range, write entries so that every later forward pass sees
them, keep masters and moments, apply a step, skip a step, go on from another engine's state. If a
DeepSpeed release lays its memory out in another way, it shows here first and by name.

All of it runs on two ranks, the fp32 engines also on one and on three. The engines of one world
size are made one after another in the same processes; each check of each is a test of its own.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from gem_ds.distributed import engine as zero
from gem_ds.distributed.comm import Comm
from gem_ds.distributed.optim import SparseAdamW
from gem_ds.models.targets import find_targets
from gem_ds.sparse.entries import SampledSink
from gem_ds.sparse.layers import TargetLayers
from gem_ds.sparse.sddmm import Pattern
from tests.ranks import Cases, Outcomes, run_cases, run_ranks
from tests.zero_bench import (
    ADAM,
    CLIPPING,
    SETTINGS_BY_WORLD_SIZE,
    Bench,
    DenseAdamW,
    K,
    Setting,
    Vectors,
    assert_close,
    assert_equal,
    flat_gradient,
    generator,
    micro_batch,
    some_vectors,
)

pytestmark = pytest.mark.slow  # starts engines or programs

# The checks. Each begins in any state of the bench and leaves it usable.


def read(bench: Bench) -> None:
    """The ranks' ranges are the weight, in order, each entry once and to the bit."""
    engine, world_size = bench.engine, bench.comm.world_size
    assert [layer.numel for layer in bench.layers] == [35, 99, 33, 3, 1]
    for layer in bench.layers:
        original = bench.dense.get_parameter(layer.name).detach()
        assert layer.shape == tuple(original.shape)
        shard = engine.weights.read_shard(layer.weight)
        start, stop = engine.weights.shard_range(layer.weight)
        assert (shard.dim(), shard.numel(), shard.dtype) == (1, stop - start, original.dtype)
        assert (
            stop - start
            <= engine.weights.partition_size(layer.weight)
            == -(-layer.numel // world_size)
        )
        bounds = torch.cat(bench.comm.all_gather(torch.tensor([start, stop]))).tolist()
        assert (bounds[0], bounds[-1]) == (0, layer.numel)
        assert bounds[1:-1:2] == bounds[2:-1:2], "each range begins where the one before ends"
        whole = torch.cat(bench.comm.all_gather(shard))
        assert torch.equal(whole, original.flatten()), f"{layer.name} is read wrongly"


def count(bench: Bench) -> None:
    """N counts every stored parameter whole."""
    from gem_ds.distributed.weights import num_parameters

    trained = bench.layers.vector.num_entries
    dense = sum(parameter.numel() for parameter in bench.dense.parameters())
    assert num_parameters(bench.engine.model) == dense + trained


def fresh_state(bench: Bench) -> None:
    """Before anything is set, the state is whole and zero."""
    state = bench.engine.get_state()
    assert sorted(state) == ["exp_avg", "exp_avg_sq", "master"]
    assert_equal(state, {key: torch.zeros(K) for key in state})


def state_round_trip(bench: Bench) -> None:
    """Masters and moments come back to the bit; the values are the masters, rounded."""
    engine = bench.engine
    for seed, num_updates in ((1, 0), (2, 41)):
        vectors = some_vectors(seed)
        engine.set_state(vectors, num_updates)
        assert_equal(engine.get_state(), vectors)
        assert engine.num_updates == num_updates
        rounded = vectors["master"].to(bench.setting.torch_dtype)
        assert torch.equal(engine.gather_values(), rounded)
        assert engine.gather_values().dtype == bench.setting.torch_dtype


def state_after_training(bench: Bench) -> None:
    """The same once steps were taken, which leaves small parameters gathered."""
    _train_once(bench)
    state_round_trip(bench)


def write_before_training(bench: Bench) -> None:
    """A new engine's weights show what was written, and nothing else has moved."""
    _write_and_look(bench, seed=21)


def write_after_training(bench: Bench) -> None:
    """So do weights that a step has moved or kept whole copies of."""
    bench.engine.set_state(some_vectors(3), 0)
    _train_once(bench)
    if bench.setting.variant == "persistent":
        assert _whole_copies(bench) == len(bench.layers), "the premise of this check"
    _write_and_look(bench, seed=22)
    _train_once(bench)
    _write_and_look(bench, seed=23)


def write_to_whole_copies(bench: Bench) -> None:
    """So do weights that lie there whole, as a forward pass that nothing followed leaves them."""
    if bench.setting.stage == 3:
        for layer in bench.layers:
            layer.weight.all_gather()
        assert _whole_copies(bench) == len(bench.layers)
    _write_and_look(bench, seed=24)


def gathers_wait_for_writes(bench: Bench) -> None:
    """The stream of ZeRO-3's gathers, had the device streams, waits for each kind of write."""
    if bench.setting.stage < 3:
        return
    offload = bench.engine._engine.optimizer.parameter_offload
    assert offload._DeepSpeedZeRoOffload__allgather_stream is None, "a CPU has none"
    offload._DeepSpeedZeRoOffload__allgather_stream = stream = mock.Mock()
    try:
        bench.engine.set_state(some_vectors(25), 0)
        assert stream.wait_stream.call_count == 1
        bench.write(torch.randn(K, generator=generator(26)))
        assert stream.wait_stream.call_count > 1
    finally:
        offload._DeepSpeedZeRoOffload__allgather_stream = None


def _whole_copies(bench: Bench) -> int:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus  # noqa: TID251

    return sum(layer.weight.ds_status == ZeroParamStatus.AVAILABLE for layer in bench.layers)


def _train_once(bench: Bench) -> list[Tensor]:
    """Three micro-batches in train mode, the last one delivering; their logits."""
    bench.engine.model.train()
    seen: list[Tensor] = []
    for i in range(3):
        x, y = bench.batch(i)

        def loss(model: nn.Module, x: Tensor = x, y: Tensor = y) -> Tensor:
            seen.append(model(x))
            return F.cross_entropy(seen[-1].float(), y)

        with bench.layers.sinks(bench.sinks):
            bench.engine.backward(loss, deliver=i == 2)
    assert bench.engine.step()
    return [logits.detach() for logits in seen]


def _write_and_look(bench: Bench, seed: int) -> None:
    values = torch.randn(K, generator=generator(seed))
    bench.write(values)
    shown = bench.gathered()
    assert shown.keys() == dict(bench.dense.named_parameters()).keys()
    assert_equal(shown, {n: p.detach() for n, p in bench.dense.named_parameters()})
    batches = [bench.batch(i) for i in range(3)]
    with torch.no_grad():
        expected = [bench.dense(x) for x, _ in batches]
        bench.engine.model.eval()
        evaluated = [bench.engine.model(x) for x, _ in batches]
    torch.testing.assert_close(evaluated, expected)
    torch.testing.assert_close(_train_once(bench), expected)


def gradient(bench: Bench) -> None:
    """What reaches the optimizer is the mean over the ranks of the dense gradient's entries."""
    engine, dense = bench.engine, copy.deepcopy(bench.dense).float()
    still = {key: torch.zeros(K) for key in ("master", "exp_avg", "exp_avg_sq")}
    engine.set_state(still, 0)
    _train_once(bench)
    moments = engine.get_state()["exp_avg"] / (1 - ADAM["betas"][0])
    world_size = bench.comm.world_size
    for rank, i in itertools.product(range(world_size), range(3)):
        x, y = micro_batch(rank, i, bench.setting.torch_dtype)
        (F.cross_entropy(dense(x.float()), y) / world_size).backward()
    expected = torch.cat(
        [
            dense.get_parameter(layer.name).grad.flatten()[index.long()]
            for layer, index in zip(bench.layers, bench.indices, strict=True)
        ]
    )
    norm = expected.norm()
    expected *= (CLIPPING / (norm + 1e-6)).clamp(max=1.0)
    tolerance = 1e-5 if bench.setting.dtype == "fp32" else 5e-2
    assert (moments - expected).norm() <= tolerance * expected.norm()
    assert engine.loss_scale == 1.0
    if engine.grad_norm is not None:
        assert engine.grad_norm == pytest.approx(float(norm), rel=tolerance)
    unexpected = [n for n, p in engine.model.named_parameters() if p.grad is not None]
    assert not unexpected, "gradients outlive the step"


def closed_passes(bench: Bench) -> None:
    """A backward that delivers nothing takes another loss scale, and leaves no weight gathered."""
    engine = bench.engine
    x, y = bench.batch(0)
    buffers = []
    for scale in (None, 4.0):
        with bench.layers.sinks(bench.sinks):
            loss = engine.backward(
                lambda model: F.cross_entropy(model(x).float(), y), deliver=False, loss_scale=scale
            )
        assert loss.dim() == 0
        assert not loss.requires_grad
        buffers.append(engine.vectors[0].take_gradient())
        if bench.setting.stage == 3 and bench.setting.variant != "persistent":
            assert _whole_copies(bench) == 0
    assert torch.equal(buffers[1], 4 * buffers[0])


def applied_steps(bench: Bench) -> None:
    """Steps are torch's AdamW on the mean gradient, clipped, at the rate of the moment."""
    engine, vectors = bench.engine, some_vectors(4)
    engine.set_state(vectors, 3)
    dense = DenseAdamW(vectors, 3)
    norms = []
    for step, rate in enumerate((0.1, 0.03, 0.2, 0.1, 0.1)):
        for optimizer in (engine.optimizer, dense.optimizer):
            optimizer.param_groups[0]["lr"] = rate
        assert bench.step_with(flat_gradient(bench.comm.rank, step))
        norms.append(dense.step(bench.everyone(step)))
        if engine.grad_norm is not None:
            assert engine.grad_norm == pytest.approx(norms[-1], rel=1e-5)
        state = engine.get_state()
        assert_close(state, dense.vectors, 1e-6)
        assert engine.num_updates == 4 + step
        rounded = state["master"].to(bench.setting.torch_dtype)
        assert torch.equal(engine.gather_values(), rounded)
    assert min(norms) < CLIPPING < max(norms), "clipping must matter in some steps only"


def skipped_step(bench: Bench) -> None:
    """A gradient that is not finite on one rank changes nothing on any, and the next one counts."""
    engine, vectors = bench.engine, some_vectors(6)
    engine.optimizer.param_groups[0]["lr"] = ADAM["lr"]
    engine.set_state(vectors, 7)
    dense = DenseAdamW(vectors, 7)
    for step, poison in enumerate((float("inf"), float("nan"), -float("inf"))):
        delivered = flat_gradient(bench.comm.rank, step)
        if bench.comm.rank == bench.comm.world_size - 1:
            delivered[step] = poison  # an entry whose master rank 0 keeps
        before = engine.get_state()
        assert not bench.step_with(delivered)
        assert_equal(engine.get_state(), before)
        assert engine.num_updates == 7 + step
        rounded = before["master"].to(bench.setting.torch_dtype)
        assert torch.equal(engine.gather_values(), rounded)
        assert bench.step_with(flat_gradient(bench.comm.rank, step))
        dense.step(bench.everyone(step))
        assert_close(engine.get_state(), dense.vectors, 1e-6)


def state_bytes(bench: Bench) -> None:
    """Twelve bytes per owned entry, and padding of less than two entries per rank."""
    world_size = bench.comm.world_size
    owned = K if bench.setting.stage == 0 else -(-K // world_size)
    measured = bench.engine.optimizer_state_bytes()
    assert measured % 12 == 0
    assert owned <= measured // 12 <= owned + 2 * world_size
    if bench.setting.stage > 0:
        total = bench.comm.all_reduce(torch.tensor([measured]), "sum").item()
        assert total <= 12 * (K + 2 * world_size), "ranks share the state, none holds all of it"


CHECKS: list[Callable[[Bench], None]] = [
    count,
    fresh_state,
    read,
    state_round_trip,
    write_before_training,
    closed_passes,
    applied_steps,
    state_after_training,
    write_after_training,
    write_to_whole_copies,
    gathers_wait_for_writes,
    gradient,
    skipped_step,
    state_bytes,
]


@dataclass
class Uninterrupted:
    """A run of three steps: its state after two, and after the third."""

    second: Vectors = field(default_factory=dict)
    third: Vectors = field(default_factory=dict)


def _run_uninterrupted(bench: Bench) -> Uninterrupted:
    bench.engine.set_state(some_vectors(8), 0)
    for step in range(2):
        bench.step_with(flat_gradient(bench.comm.rank, step))
    second = bench.engine.get_state()
    bench.step_with(flat_gradient(bench.comm.rank, 2))
    return Uninterrupted(second, bench.engine.get_state())


def _resume(bench: Bench, run: Uninterrupted) -> Vectors:
    bench.engine.set_state(run.second, 2)
    bench.step_with(flat_gradient(bench.comm.rank, 2))
    return bench.engine.get_state()


def _few_entries(cases: Cases, setting: Setting, comm: Comm) -> None:
    """Fewer selected entries than ranks."""
    with cases(f"{setting}: one entry"):
        bench = Bench(setting, comm, num_selected=1)
        vectors = some_vectors(9, total=1)
        bench.engine.set_state(vectors, 2)
        assert_equal(bench.engine.get_state(), vectors)
        rounded = vectors["master"].to(setting.torch_dtype)
        assert torch.equal(bench.engine.gather_values(), rounded)
        dense = DenseAdamW(vectors, 2)
        assert bench.step_with(flat_gradient(comm.rank, 0, total=1))
        dense.step(bench.everyone(0, total=1))
        assert_close(bench.engine.get_state(), dense.vectors, 1e-6)
        assert bench.engine.num_updates == 3


def _loading(cases: Cases, stage: int, folder: Path, comm: Comm) -> None:
    """A real model, loaded into partitions, with tied embeddings and checkpointed blocks."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    from gem_ds.distributed.engine import Engine
    from gem_ds.distributed.weights import num_parameters, partitioned_loading

    config = Setting(stage, "fp32", "plain").config(comm.world_size)
    with cases(f"zero{stage}: loading"):
        dense = LlamaForCausalLM.from_pretrained(folder)
        with partitioned_loading(config):
            assert is_deepspeed_zero3_enabled() == (stage == 3)
            model = LlamaForCausalLM.from_pretrained(folder)
        assert not is_deepspeed_zero3_enabled()
        partitioned = [hasattr(parameter, "ds_id") for parameter in model.parameters()]
        assert all(partitioned) if stage == 3 else not any(partitioned)
        assert num_parameters(model) == sum(p.numel() for p in dense.parameters())
        shapes = {name: dense.get_parameter(name).shape for name in find_targets(dense)}
        layers = TargetLayers(model, find_targets(model), 5 * len(shapes))
        assert {layer.name: layer.shape for layer in layers} == shapes
        engine = Engine(
            model, [layers.vector], lambda params: SparseAdamW(params, **ADAM), config, comm
        )
        for layer in layers:
            shards = comm.all_gather(engine.weights.read_shard(layer.weight))
            assert torch.equal(torch.cat(shards), dense.get_parameter(layer.name).flatten())
    with cases(f"zero{stage}: gradient under checkpointing"):
        engine.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        engine.model.train()
        indices = [torch.arange(5, dtype=torch.int32) * 7 + i for i in range(len(layers))]
        sinks = [
            SampledSink(layer, layers.vector, 5 * i, Pattern.of(index, layer.shape))
            for i, (index, layer) in enumerate(zip(indices, layers, strict=True))
        ]
        batches = [
            torch.randint(0, 50, (2, 9), generator=generator(rank, i, 13))
            for rank in range(comm.world_size)
            for i in range(2)
        ]
        with layers.sinks(sinks):
            for i, ids in enumerate(batches[2 * comm.rank : 2 * comm.rank + 2]):
                loss = engine.backward(
                    lambda model, ids=ids: model(ids, labels=ids, use_cache=False).loss,
                    deliver=i == 1,
                )
                torch.testing.assert_close(loss, dense(ids, labels=ids).loss.detach())
        assert engine.step()
        for ids in batches:
            (dense(ids, labels=ids).loss / comm.world_size).backward()
        expected = torch.cat(
            [
                dense.get_parameter(name).grad.flatten()[index.long()]
                for name, index in zip(shapes, indices, strict=True)
            ]
        )
        expected *= (CLIPPING / (expected.norm() + 1e-6)).clamp(max=1.0)
        delivered = engine.get_state()["exp_avg"] / (1 - ADAM["betas"][0])
        torch.testing.assert_close(delivered, expected, rtol=1e-4, atol=1e-7)


def _all_cases(cases: Cases, folder: Path) -> None:
    from gem_ds.distributed.process_group import init_distributed

    comm = init_distributed()
    elsewhere: Uninterrupted | None = None
    for setting in SETTINGS_BY_WORLD_SIZE[comm.world_size]:
        bench = Bench(setting, comm)
        for check in CHECKS:
            with cases(f"{setting}: {check.__name__}"):
                check(bench)
        with cases(f"{setting}: resume in a new engine"):
            run = _run_uninterrupted(bench)
            bench = Bench(setting, comm)
            bench.step_with(flat_gradient(comm.rank, 5))  # a past that must not show
            assert_equal(_resume(bench, run), run.third)
        with cases(f"{setting}: resume of another stage"):
            elsewhere = elsewhere or run
            assert_close(_resume(bench, elsewhere), elsewhere.third, 1e-6)
        if setting.variant == "plain":
            _few_entries(cases, setting, comm)
    for stage in (2, 3):
        _loading(cases, stage, folder, comm)


def _names(settings: list[Setting]) -> list[str]:
    return [
        *(f"{setting}: {check.__name__}" for setting in settings for check in CHECKS),
        *(f"{setting}: resume in a new engine" for setting in settings),
        *(f"{setting}: resume of another stage" for setting in settings),
        *(f"{setting}: one entry" for setting in settings if setting.variant == "plain"),
        *(f"zero{stage}: loading" for stage in (2, 3)),
        *(f"zero{stage}: gradient under checkpointing" for stage in (2, 3)),
    ]


NAMES = {size: _names(settings) for size, settings in SETTINGS_BY_WORLD_SIZE.items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Llama of odd sizes."""
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        hidden_size=14,
        intermediate_size=9,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=51,
        tie_word_embeddings=True,
    )
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def outcomes(llama: Path) -> Callable[[int], Outcomes]:
    """World size -> what its ranks found."""
    return functools.cache(lambda size: run_cases(size, _all_cases, llama, timeout=300))


@pytest.mark.parametrize(
    ("world_size", "name"), [(size, name) for size, names in NAMES.items() for name in names]
)
def test_conformance(outcomes: Callable[[int], Outcomes], world_size: int, name: str) -> None:
    outcomes(world_size).check(name)


@pytest.mark.parametrize("world_size", NAMES)
def test_every_case_of_the_ranks_is_reported(
    outcomes: Callable[[int], Outcomes], world_size: int
) -> None:
    assert outcomes(world_size).names == set(NAMES[world_size])


def _errors_of_sums() -> list[float]:
    """Per stage the largest relative error of a mean over the ranks that reaches the optimizer."""
    from gem_ds.distributed.process_group import init_distributed

    comm = init_distributed()
    by_rank = [torch.rand(K, generator=generator(rank, 3)) * 0.01 for rank in range(4)]
    by_rank = [gradient.bfloat16().float() for gradient in by_rank]
    mean = torch.stack(by_rank).mean(0)
    errors = []
    for stage in range(4):
        bench = Bench(Setting(stage, "bf16", "plain"), comm)
        bench.step_with(by_rank[comm.rank])
        found = bench.engine.get_state()["exp_avg"] / (1 - ADAM["betas"][0])
        errors.append(((found - mean) / mean).abs().max().item())
    return errors


def test_sums_of_bf16_gradients_round_once() -> None:
    """Added in bf16, four ranks would round three times, and a thousand lose what is smaller."""
    rounding = 2.0**-8
    for errors in run_ranks(4, _errors_of_sums):
        assert max(errors) <= rounding
        assert min(errors) > rounding / 2, "means are rounded to bf16 at last"


@pytest.mark.parametrize(
    ("scale", "is_dynamic", "expected"),
    [(2.0, True, True), (1.0, True, False), (2.0, False, False)],
)
def test_a_loss_scale_is_lowered_where_it_can_be(
    scale: float, is_dynamic: bool, expected: bool
) -> None:
    from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler  # noqa: TID251

    limits = {
        "scale_window": 1,
        "min_scale": 1,
        "delayed_shift": 1,
        "consecutive_hysteresis": False,
    }
    scaler = CreateLossScaler(torch.half, scale, is_dynamic, limits | {"init_scale": scale})
    engine = mock.Mock(spec=zero.BaseEngine, _scaler=scaler)
    assert zero.BaseEngine.lowers_loss_scale.fget(engine) == expected
