"""The conformance test of the one door to DeepSpeed, on real ranks.

Every kind of engine has to pass the same checks. If a DeepSpeed release lays its memory out in
another way, it shows here first: a failure names the kind of engine, and its traceback the check.

All of it runs on two ranks, the plain fp32 engines also on one and, where ranks hold parts, on
three. The engines of one world size are made one after another in the same processes.
"""

import copy
import itertools
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM
from transformers.integrations import is_deepspeed_zero3_enabled

from gem_ds.distributed import engine as zero
from gem_ds.distributed.comm import Comm
from gem_ds.distributed.process_group import init_distributed
from gem_ds.distributed.weights import num_parameters, partitioned_loading
from gem_ds.models.targets import find_targets
from gem_ds.sparse.target_layers import TargetLayers
from tests.distributed.bench import (
    ADAM,
    CLIPPING,
    Bench,
    DenseAdamW,
    K,
    Vectors,
    assert_close,
    assert_equal,
    config_of,
    delivered,
    flat_gradient,
    generator,
    make_engine,
    micro_batch,
    no_vectors,
    some_vectors,
)
from tests.distributed.streams import Streams
from tests.ranks import run_ranks, told_as
from tests.tiny import Setting, tiny_config, whole_state

pytestmark = pytest.mark.slow  # starts engines or programs

VARIANTS = ("plain", "offload", "persistent")  # the n-th begins at ZeRO stage 0, 1, 3
SETTINGS = [
    Setting(stage, dtype, variant)
    for dtype in ("fp32", "bf16")
    for stage in range(4)
    for variant, first_stage in zip(VARIANTS, (0, 1, 3), strict=True)
    if stage >= first_stage
]
PLAIN_FP32 = [
    setting for setting in SETTINGS if (setting.dtype, setting.variant) == ("fp32", "plain")
]
SETTINGS_BY_WORLD_SIZE = {1: PLAIN_FP32, 2: SETTINGS, 3: PLAIN_FP32[2:]}

# The checks. Each begins in any state of the bench, but for the first, and leaves it usable.


def fresh(bench: Bench) -> None:
    """The ranks' ranges are the weights, in order, each entry once and to the bit; N counts all.

    Before anything is set, the state is whole and zero.
    """
    engine, comm = bench.engine, bench.comm
    dense = sum(parameter.numel() for parameter in bench.dense.parameters())
    assert num_parameters(engine.model) == dense + bench.layers.vector.num_entries
    assert_equal(whole_state(engine), no_vectors())
    assert [layer.numel for layer in bench.layers] == [35, 99, 33, 3, 1]
    for layer in bench.layers:
        original = bench.dense.get_parameter(layer.name).detach()
        assert layer.shape == tuple(original.shape)
        shard = engine.weights.read_shard(layer.weight)
        start, stop = engine.weights.shard_range(layer.weight)
        assert (shard.dim(), shard.numel(), shard.dtype) == (1, stop - start, original.dtype)
        size = -(-layer.numel // comm.world_size)
        assert stop - start <= engine.weights.partition_size(layer.weight) == size
        bounds = torch.cat(comm.gather_objects(torch.tensor([start, stop]))).tolist()
        assert (bounds[0], bounds[-1]) == (0, layer.numel)
        assert bounds[1:-1:2] == bounds[2:-1:2], "each range begins where the one before ends"
        whole = torch.cat(comm.gather_objects(shard))
        assert torch.equal(whole, original.flatten()), f"{layer.name} is read wrongly"


def state_round_trip(bench: Bench) -> None:
    """Masters and moments come back to the bit; the values are the masters, rounded."""
    for seed, num_updates in ((1, 0), (2, 41)):
        vectors = some_vectors(seed)
        bench.engine.set_state(vectors, num_updates)
        assert_equal(whole_state(bench.engine), vectors)
        assert bench.engine.num_updates == num_updates
        bench.assert_values_are(vectors["master"])


def write_and_look(bench: Bench, seed: int = 21) -> None:
    """The weights show what was written, and nothing else has moved."""
    bench.write(torch.randn(K, generator=generator(seed)))
    assert_equal(bench.gathered(), {n: p.detach() for n, p in bench.dense.named_parameters()})
    x, _ = bench.batch(0)
    with torch.no_grad():
        expected = bench.dense(x)
        evaluated = bench.engine.model.eval()(x)
    torch.testing.assert_close(evaluated, expected)
    torch.testing.assert_close(_train_once(bench, 1), [expected])


def closed_passes(bench: Bench) -> None:
    """A backward that delivers nothing takes another loss scale, and leaves no weight gathered."""
    engine = bench.engine
    x, y = bench.batch(0)
    buffers = []
    for scale in (None, 4.0):
        with bench.layers.sinks(bench.sinks):
            loss = F.cross_entropy(engine.module(deliver=False)(x).float(), y)
            engine.backward(loss, loss_scale=scale)
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
        state = whole_state(engine)
        assert_close(state, dense.vectors)
        assert engine.num_updates == 4 + step
        bench.assert_values_are(state["master"])
    assert min(norms) < CLIPPING < max(norms), "clipping must matter in some steps only"


def write_after_training(bench: Bench) -> None:
    """Weights that a step has moved or kept whole copies of show what was written."""
    bench.engine.set_state(some_vectors(3), 0)
    _train_once(bench)
    if bench.setting.variant == "persistent":
        assert _whole_copies(bench) == len(bench.layers), "the premise of this check"
    write_and_look(bench, seed=22)
    _train_once(bench)
    write_and_look(bench, seed=23)


def write_to_whole_copies(bench: Bench) -> None:
    """Which a forward pass that nothing followed leaves so."""
    if bench.setting.stage == 3:
        for layer in bench.layers:
            layer.weight.all_gather()
        assert _whole_copies(bench) == len(bench.layers)
        write_and_look(bench, seed=24)


def gathers_wait_for_writes(bench: Bench) -> None:
    """Had the device streams: between each write of a partition and its next gather stands a wait.

    Of all writes of a step one.
    """
    if bench.setting.stage < 3:
        return
    with Streams(bench.engine) as streams:
        bench.engine.set_state(some_vectors(25), 0)
        for seed in (26, 27):
            _train_once(bench)
            bench.write(torch.randn(K, generator=generator(seed)))
        _train_once(bench)
    assert streams.unordered == []
    assert streams.num_waits == 3, "one for the masters, and one for each step's weights together"
    assert streams.num_gathers or bench.comm.world_size == 1, "which gathers nothing"


def gradient(bench: Bench) -> None:
    """What reaches the optimizer is the mean over the ranks of the dense gradient's entries."""
    engine, dense = bench.engine, copy.deepcopy(bench.dense).float()
    engine.set_state(no_vectors(), 0)
    _train_once(bench)
    world_size = bench.comm.world_size
    for rank, i in itertools.product(range(world_size), range(3)):
        x, y = micro_batch(rank, i, bench.setting.torch_dtype)
        (F.cross_entropy(dense(x.float()), y) / world_size).backward()
    gradients = [dense.get_parameter(layer.name).grad.flatten() for layer in bench.layers]
    indices = [index.long() for index in bench.indices]
    expected = torch.cat([g[index] for g, index in zip(gradients, indices, strict=True)])
    norm = float(expected.norm())
    expected *= min(1.0, CLIPPING / (norm + 1e-6))
    tolerance = 1e-5 if bench.setting.dtype == "fp32" else 5e-2
    assert (delivered(engine) - expected).norm() <= tolerance * expected.norm()
    assert engine.loss_scale == 1.0
    if engine.grad_norm is not None:
        assert engine.grad_norm == pytest.approx(norm, rel=tolerance)
    unexpected = [n for n, p in engine.model.named_parameters() if p.grad is not None]
    assert not unexpected, "gradients outlive the step"


def skipped_step(bench: Bench) -> None:
    """A gradient that is not finite on one rank changes nothing on any, and the next one counts."""
    engine, vectors = bench.engine, some_vectors(6)
    engine.optimizer.param_groups[0]["lr"] = ADAM["lr"]
    engine.set_state(vectors, 7)
    dense = DenseAdamW(vectors, 7)
    for step, poison in enumerate((float("inf"), float("nan"), -float("inf"))):
        poisoned = flat_gradient(bench.comm.rank, step)
        if bench.comm.rank == bench.comm.world_size - 1:
            poisoned[step] = poison  # an entry whose master rank 0 keeps
        before = whole_state(engine)
        assert not bench.step_with(poisoned)
        assert_equal(whole_state(engine), before)
        assert engine.num_updates == 7 + step
        bench.assert_values_are(before["master"])
        assert bench.step_with(flat_gradient(bench.comm.rank, step))
        dense.step(bench.everyone(step))
        assert_close(whole_state(engine), dense.vectors)


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


CHECKS = (
    fresh,
    state_round_trip,
    write_and_look,
    closed_passes,
    applied_steps,
    state_round_trip,  # once more, after steps, which leave small parameters gathered
    write_after_training,
    write_to_whole_copies,
    gathers_wait_for_writes,
    gradient,
    skipped_step,
    state_bytes,
)


def _whole_copies(bench: Bench) -> int:
    return sum(layer.weight.ds_status.name == "AVAILABLE" for layer in bench.layers)


def _train_once(bench: Bench, num_batches: int = 3) -> list[Tensor]:
    """A step of micro-batches in train mode, the last one delivering; their logits."""
    bench.engine.model.train()
    seen: list[Tensor] = []
    for i in range(num_batches):
        x, y = bench.batch(i)
        with bench.layers.sinks(bench.sinks):
            seen.append(bench.engine.module(deliver=i == num_batches - 1)(x))
            bench.engine.backward(F.cross_entropy(seen[-1].float(), y))
    assert bench.engine.step()
    return [logits.detach() for logits in seen]


# Several engines


def _uninterrupted(bench: Bench) -> tuple[Vectors, Vectors]:
    """Of a run of three steps the state after two, and after the third."""
    bench.engine.set_state(some_vectors(8), 0)
    for step in range(2):
        bench.step_with(flat_gradient(bench.comm.rank, step))
    return whole_state(bench.engine), _third_step(bench)


def _third_step(bench: Bench) -> Vectors:
    bench.step_with(flat_gradient(bench.comm.rank, 2))
    return whole_state(bench.engine)


def resume(bench: Bench, run: tuple[Vectors, Vectors], elsewhere: tuple[Vectors, Vectors]) -> None:
    """Another engine goes on to the bit; one of another stage, up to rounding."""
    bench.step_with(flat_gradient(bench.comm.rank, 5))  # a past that must not show
    bench.engine.set_state(run[0], 2)
    assert_equal(_third_step(bench), run[1])
    bench.engine.set_state(elsewhere[0], 2)
    assert_close(_third_step(bench), elsewhere[1])


def few_entries(setting: Setting, comm: Comm) -> None:
    """Fewer selected entries than ranks."""
    bench = Bench(setting, comm, num_selected=1)
    vectors = some_vectors(9, total=1)
    bench.engine.set_state(vectors, 2)
    assert_equal(whole_state(bench.engine), vectors)
    bench.assert_values_are(vectors["master"])
    dense = DenseAdamW(vectors, 2)
    assert bench.step_with(flat_gradient(comm.rank, 0, total=1))
    dense.step(bench.everyone(0, total=1))
    assert_close(whole_state(bench.engine), dense.vectors)
    assert bench.engine.num_updates == 3


def real_model(setting: Setting, folder: Path, comm: Comm) -> None:
    """A Llama with tied embeddings, loaded into partitions, is the one that was saved."""
    dense = LlamaForCausalLM.from_pretrained(folder)
    with partitioned_loading(config_of(setting, comm.world_size)):
        model = LlamaForCausalLM.from_pretrained(folder)
    assert not is_deepspeed_zero3_enabled()
    partitioned = [hasattr(parameter, "ds_id") for parameter in model.parameters()]
    assert set(partitioned) == {setting.stage == 3}
    assert num_parameters(model) == sum(p.numel() for p in dense.parameters())
    layers = TargetLayers(model, find_targets(model), 20)
    assert [layer.name for layer in layers] == list(find_targets(dense))
    engine = make_engine(model, layers, setting, comm)
    for layer in layers:
        original = dense.get_parameter(layer.name)
        assert layer.shape == original.shape
        shards = comm.gather_objects(engine.weights.read_shard(layer.weight))
        assert torch.equal(torch.cat(shards), original.flatten())


def _conform(folder: Path) -> None:
    comm = init_distributed()
    elsewhere = None
    for setting in SETTINGS_BY_WORLD_SIZE[comm.world_size]:
        with told_as(setting):
            bench = Bench(setting, comm)
            for check in CHECKS:
                check(bench)
            run = _uninterrupted(bench)
            elsewhere = elsewhere or run
            resume(Bench(setting, comm), run, elsewhere)
            if setting.variant == "plain":
                few_entries(setting, comm)
    if comm.world_size == 3:  # whose parts of it are padded
        for setting in (Setting(2), Setting(3)):
            with told_as(f"a real model, {setting}"):
                real_model(setting, folder, comm)


@pytest.mark.parametrize("world_size", SETTINGS_BY_WORLD_SIZE)
def test_conformance(world_size, tmp_path):
    torch.manual_seed(1)
    LlamaForCausalLM(tiny_config("odd")).save_pretrained(tmp_path)
    run_ranks(world_size, _conform, tmp_path, timeout=300)


def _errors_of_sums() -> list[float]:
    """Per stage the largest relative error of a mean over the ranks that reaches the optimizer."""
    comm = init_distributed()
    by_rank = [torch.rand(K, generator=generator(rank, 3)) * 0.01 for rank in range(4)]
    by_rank = [gradient.bfloat16().float() for gradient in by_rank]
    mean = torch.stack(by_rank).mean(0)
    errors = []
    for stage in range(4):
        bench = Bench(Setting(stage, "bf16"), comm)
        bench.step_with(by_rank[comm.rank])
        errors.append(((delivered(bench.engine) - mean) / mean).abs().max().item())
    return errors


def test_sums_of_bf16_gradients_round_once():
    """Added in bf16, four ranks would round three times, and a thousand lose what is smaller."""
    rounding = 2.0**-8
    for errors in run_ranks(4, _errors_of_sums):
        assert max(errors) <= rounding
        assert min(errors) > rounding / 2, "means are rounded to bf16 at last"


@pytest.mark.parametrize(("scale", "is_dynamic"), [(2.0, True), (1.0, True), (2.0, False)])
def test_a_loss_scale_is_lowered_where_it_can_be(scale, is_dynamic):
    from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler  # noqa: TID251

    limits = {"scale_window": 1, "min_scale": 1, "delayed_shift": 1, "init_scale": scale}
    limits["consecutive_hysteresis"] = False
    scaler = CreateLossScaler(torch.half, scale, is_dynamic, limits)
    engine = mock.Mock(spec=zero.BaseEngine, _scaler=scaler)
    assert zero.BaseEngine.lowers_loss_scale.fget(engine) == (is_dynamic and scale > 1)
