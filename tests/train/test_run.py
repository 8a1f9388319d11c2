"""A whole run, from its flags to its files, against the oracle on a dense model in one process."""

import errno
import json
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from gem_ds.data.batches import permutation
from gem_ds.distributed.comm import Comm
from gem_ds.files.checkpoint import TrainerState
from gem_ds.files.mask import Mask
from gem_ds.models.targets import find_targets
from gem_ds.train.arguments import parse_arguments
from gem_ds.train.config import TrainArguments
from gem_ds.train.resume import initial_state
from gem_ds.train.run import Run
from gem_ds.train.schedule import Schedule
from gem_ds.train.sparse_tuning import SparseTuning
from tests import oracle
from tests.ranks import run_ranks
from tests.runs import delta_of, logged
from tests.tiny import (
    Example,
    assert_selected_up_to_rounding,
    bits,
    naive_loss,
    random_examples,
)
from tests.tiny_model import REPOSITORY, Tiny, mains

pytestmark = pytest.mark.slow  # starts engines or programs

PUBLISHED = yaml.safe_load(
    (REPOSITORY / "tests" / "distributed" / "published_configs.yaml").read_text()
)["taken"]
NUM_STEPS = 9
BATCH_SIZE = 4
SEED = 42
PEAK, WARMUP, CLIPPING = 0.02, 3, 0.5
ADAM = {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.3}


def _batches(examples: list[Example]) -> Iterator[list[Example]]:
    """The examples of each step; the last batch of an epoch is smaller."""
    for epoch in range(NUM_STEPS):
        order = permutation(len(examples), SEED, epoch).tolist()
        for start in range(0, len(examples), BATCH_SIZE):
            yield [examples[i] for i in order[start : start + BATCH_SIZE]]


def _rate(step: int) -> float:
    """Linear warmup, then half a cosine down to zero."""
    if step < WARMUP:
        return PEAK * step / WARMUP
    return PEAK / 2 * (1 + math.cos(math.pi * (step - WARMUP) / (NUM_STEPS - WARMUP)))


def _model(tiny: Tiny) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny.model).eval()


def _assert_selected(
    model: PreTrainedModel, indices: dict[str, Tensor], examples: list[Example], total: int
) -> None:
    """The entries are those that the oracle selects on these examples."""
    names = list(find_targets(model))
    weights = {n: model.get_parameter(n).detach() for n in names}
    gradients = oracle.summed_gradients(model, examples, naive_loss, names)
    assert_selected_up_to_rounding(indices, gradients, weights, total)


def _dense_run(tiny: Tiny, mask: Mask) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of the steps, and the weights of the mask's layers at the end."""
    model = _model(tiny)
    params = {name: model.get_parameter(name) for name in mask.indices}
    masks = oracle.masks_at(params, mask.indices)
    optimizer = oracle.DenseMaskedAdamW(params, masks, max_norm=CLIPPING, **ADAM)
    losses = []
    for step, batch in zip(range(NUM_STEPS), _batches(tiny.encoded("train.jsonl")), strict=False):
        num_tokens = sum(len(tokens) - prompt_length for tokens, prompt_length in batch)
        with torch.no_grad():
            losses.append(sum(float(naive_loss(model, e)) for e in batch) / num_tokens)
        sums = oracle.summed_gradients(model, batch, naive_loss, list(params))
        optimizer.step({name: g / num_tokens for name, g in sums.items()}, _rate(step))
    return losses, {name: p.detach() for name, p in params.items()}


#: Nothing at its default, so that a flag that goes astray shows.
FLAGS = {
    "adam_beta1": ADAM["betas"][0],
    "adam_beta2": ADAM["betas"][1],
    "adam_epsilon": ADAM["eps"],
    "weight_decay": ADAM["weight_decay"],
    "learning_rate": PEAK,
    "lr_scheduler_type": "cosine",
    "warmup_steps": WARMUP,
    "max_grad_norm": CLIPPING,
    "max_steps": NUM_STEPS,
    "logging_steps": 1,
    "seed": SEED,
}

#: World size, one of the DeepSpeed JSONs that other projects publish, examples of a micro-batch,
#: micro-batches of a step; four in all.
RUNS = [
    (1, "llama-factory z0", 4, 1),
    (2, "alpaca zero3 offload", 2, 1),
    (2, "axolotl zero1", 1, 2),
]


def _read_entries(flags: list[str]) -> dict[str, Tensor]:
    """On each rank: run, and read the selected entries back out of the weights at the end."""
    seen: dict[str, Tensor] = {}
    finish = Run.finish

    def look(run: Run, reporter: object) -> dict[str, float]:
        assert isinstance(run.tuning, SparseTuning)
        entries = run.tuning.entries
        seen.update(entries.split(entries.read()))
        comm, base = run.comm, run.tuning.base
        assert hasattr(run.tuning, "mask") == comm.is_main
        held = base.untyped_storage().nbytes() // base.itemsize
        assert held <= -(-entries.num_entries // comm.world_size), "of the values its own range"
        whole = run.tuning.whole_base()
        if comm.is_main:
            folder = str(run.args.model.model_name_or_path)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=base.dtype)
            for weight, index in run.tuning.mask.indices.items():
                assert torch.equal(
                    whole[weight], model.get_parameter(weight).flatten()[index.long()]
                )
        return finish(run, reporter)  # type: ignore[arg-type]

    with mock.patch.object(Run, "finish", look):
        mains(flags)
    return seen


@pytest.mark.parametrize(("world_size", "published", "size", "accumulation"), RUNS)
def test_a_run_is_the_oracles(tiny, tmp_path, world_size, published, size, accumulation):
    """Every flag has reached what it is for: mask, losses, rates, and what the weights hold."""
    deepspeed = tiny.folder / f"{published}.json"
    deepspeed.write_text(json.dumps(PUBLISHED[published][0]))
    flags = tiny.flags(
        tmp_path,
        **FLAGS,
        deepspeed=deepspeed,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing="zero3" in published,
    )
    ranks = run_ranks(world_size, _read_entries, flags)
    delta, base = delta_of(tmp_path), _model(tiny)
    total = oracle.total_budget("0.02", sum(p.numel() for p in base.parameters()))
    _assert_selected(base, delta.mask.indices, tiny.encoded("train.jsonl"), total)
    losses, weights = _dense_run(tiny, delta.mask)
    assert [loss for _, loss in logged(tmp_path, "loss")] == pytest.approx(losses, rel=1e-5)
    rates = [_rate(step) for step in range(NUM_STEPS)]
    assert [rate for _, rate in logged(tmp_path, "learning_rate")] == pytest.approx(rates)
    num_changed = 0
    for weight, values in delta.values.items():
        index = delta.mask.indices[weight].long()
        expected = weights[weight].flatten()[index]
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)
        assert all(torch.equal(bits(held[weight]), bits(values)) for held in ranks)
        num_changed += int((values != base.get_parameter(weight).flatten()[index]).sum())
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["changed_share"] == pytest.approx(num_changed / total)


def test_a_part_of_an_epoch_is_rounded_up_to_steps():
    for epochs, max_steps, expected in ((1.5, -1, 8), (2, -1, 10), (2, 3, 3)):
        train = TrainArguments(num_train_epochs=epochs, max_steps=max_steps)
        assert initial_state(train, None, 5)[0].max_steps == expected


def test_layers_of_different_numbers_of_updates_are_not_updated_as_one():
    """Nor need they be where a run begins to draw them, or draws another share."""
    for before, now in ((0.5, 0.0), (0.5, 0.2), (0.0, 0.5)):
        train = TrainArguments(max_steps=4, sam_rho=0.05, sam_layers=now)
        checkpoint = mock.Mock(state=TrainerState(settings={"sam_layers": before}))
        if not now:
            with pytest.raises(ValueError, match=r"go on with --sam_layers 0\.5, or another"):
                initial_state(train, checkpoint, 6)
        else:
            assert initial_state(train, checkpoint, 6)[0].settings["sam_layers"] == now


@pytest.mark.parametrize(
    ("flags", "expected", "of_whole_parameters"),
    [
        ({}, [3, 6, 7], []),
        ({"save_steps": 2}, [2, 4, 6, 7], [2, 4, 6, 7]),
        ({"save_strategy": "steps", "save_steps": 2}, [2, 4, 6, 7], [2, 4, 6, 7]),
        ({"save_strategy": "steps"}, [7], [7]),
        ({"save_strategy": "epoch"}, [3, 6, 7], [3, 6, 7]),
        ({"save_strategy": "no"}, [], []),
    ],
)
def test_checkpoints_are_due_when_the_flags_say(flags, expected, of_whole_parameters):
    """Of seven steps, three an epoch; the last one is always due, but where none is wanted."""
    for is_sparse, steps in ((True, expected), (False, of_whole_parameters)):
        train = TrainArguments(**flags)
        schedule = Schedule(train=train, max_steps=7, steps_per_epoch=3, is_sparse=is_sparse)
        assert [step for step in range(1, 8) if schedule.saves_after(step)] == steps


def test_predictions_that_fail_cost_no_training(tiny, tmp_path, monkeypatch):
    """Full fine-tuning and adapters have no checkpoints to start again from, unless asked for."""

    def fail(*_: object) -> dict[str, float]:
        raise OSError(errno.ENOSPC, "no space for predictions.jsonl")

    monkeypatch.setattr("gem_ds.train.run.measure", fail)
    flags = tiny.flags(tmp_path, method="full", max_steps=1)
    with pytest.raises(OSError, match="no space for predictions"):
        mains(flags)
    before, after = (
        AutoModelForCausalLM.from_pretrained(p) for p in (tiny.model, tmp_path / "model")
    )
    assert not torch.equal(before.model.norm.weight, after.model.norm.weight)


def test_calibration_takes_the_first_examples_of_the_shuffled_order(tiny, tmp_path):
    mains(tiny.flags(tmp_path, max_steps=0, calibration_examples=2))
    model, examples = _model(tiny), tiny.encoded("train.jsonl")
    indices = Mask.load(tmp_path / "mask.safetensors").indices
    total = sum(index.numel() for index in indices.values())
    chosen = [examples[i] for i in permutation(len(examples), SEED, 0)[:2].tolist()]
    _assert_selected(model, indices, chosen, total)
    with pytest.raises(AssertionError):
        _assert_selected(model, indices, examples[:2], total)


def test_held_out_texts_of_about_one_length_share_a_batch():
    dataset = random_examples(64)
    prepared = SimpleNamespace(identity=SimpleNamespace(global_batch_size=8), pad_token_id=0)
    args, comm = parse_arguments([], needed=[]), Comm(torch.device("cpu"))
    run: Any = SimpleNamespace(args=args, prepared=prepared, comm=comm)
    batches = Run.batches(run, dataset, held_out=True)
    sizes = [
        batch["input_ids"].numel()
        for step in range(batches.steps_per_epoch)
        for batch in batches.micro_batches(step)
    ]
    assert len(sizes) == 8
    assert sum(sizes) < 1.2 * dataset.lengths.sum(), "padding included"
