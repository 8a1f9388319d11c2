"""The trainers of transformers and TRL train a mask: on one rank, on two, at ZeRO 0, 2 and 3."""

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import gem_ds
from gem_ds.files.mask import Mask
from gem_ds.tuner import GemConfig
from tests.deltas import bits
from tests.ranks import run_ranks
from tests.tiny import make_model
from tests.tuner.test_tuner import mask_of

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "launch/demo/model")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of peft's, TRL's and accelerate's calls
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

NUM_STEPS, PER_STEP, MAX_NORM = 3, 8, 0.1


def examples() -> list[dict[str, Tensor]]:
    """What three steps of eight read, of one length."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 40, (NUM_STEPS * PER_STEP, 9), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


class InOrder(Trainer):
    """Reads the examples as they come."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def train_in_order(
    folder: str, stage: int, world_size: int, checkpointing: bool | None
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, norms and saved values of a Trainer of two micro-batches a step."""
    config: dict[str, Any] = {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
    }
    output_dir = f"{folder}/out{stage}"
    args = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=PER_STEP // 2 // world_size,
        gradient_accumulation_steps=2,
        max_steps=NUM_STEPS,
        max_grad_norm=MAX_NORM,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        ddp_find_unused_parameters=False,
        deepspeed=config if stage else None,
        gradient_checkpointing=checkpointing is not None,
        gradient_checkpointing_kwargs={"use_reentrant": bool(checkpointing)},
    )
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/base")
    assert hasattr(next(model.parameters()), "ds_id") == (stage == 3)
    config_of_mask = GemConfig(mask=f"{folder}/mask.safetensors", task_type="CAUSAL_LM")
    model = get_peft_model(model, config_of_mask)
    if checkpointing is not None:
        model.enable_input_require_grads()
    trainer = InOrder(model=model, args=args, train_dataset=examples())
    trainer.train()
    trainer.save_model(output_dir)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    weights = (
        load_file(f"{output_dir}/adapter_model.safetensors") if args.process_index == 0 else {}
    )
    values = {name: tensor for name, tensor in weights.items() if name.endswith("values")}
    return [e["loss"] for e in log], [float(e["grad_norm"]) for e in log], values


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a mask on disk."""
    path = tmp_path_factory.mktemp("trainers")
    model = make_model("llama")
    model.save_pretrained(path / "base")
    mask_of(model).save(path / "mask.safetensors")
    return path


@pytest.fixture(scope="module")
def by_hand(folder: Path) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """The same steps in a loop, whole batches at once."""
    mask = Mask.load(folder / "mask.safetensors")
    model: Any = get_peft_model(make_model("llama"), GemConfig(mask=mask))
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=0.01, weight_decay=0.0)
    losses, norms, data = [], [], examples()
    for step in range(NUM_STEPS):
        rows = data[step * PER_STEP : (step + 1) * PER_STEP]
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        loss = model(**batch).loss
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(named.values(), MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, {n.replace(".default", ""): p.detach() for n, p in named.items()}


@pytest.mark.parametrize(
    ("stage", "world_size", "checkpointing"),
    [(0, 1, None), (0, 1, True), (0, 1, False), (0, 2, None), (2, 2, None), (3, 2, False)],
)
def test_a_trainer_takes_the_steps_of_a_loop(
    folder: Path, by_hand: Any, stage: int, world_size: int, checkpointing: bool | None
) -> None:
    results = run_ranks(world_size, train_in_order, str(folder), stage, world_size, checkpointing)
    for losses, norms, values in results:
        torch.testing.assert_close(losses, by_hand[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(norms, by_hand[1], rtol=1e-5, atol=1e-6)
        if values:
            torch.testing.assert_close(values, by_hand[2], rtol=1e-5, atol=1e-6)
    assert results[0][2], "rank 0 has saved"


def select_on_ranks(folder: str) -> dict[str, Tensor]:
    """The mask that a trainer's own batches give."""
    args = TrainingArguments(
        output_dir=f"{folder}/select", per_device_train_batch_size=2, report_to=[], use_cpu=True
    )
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/base")
    trainer = InOrder(model=model, args=args, train_dataset=examples())
    return gem_ds.select_mask_with(trainer, density="0.02").indices


def test_the_mask_of_a_trainer_is_that_of_its_batches(folder: Path) -> None:
    batches = [{key: row[key][None] for key in row} for row in examples()]
    expected = gem_ds.select_mask(make_model("llama"), batches, density="0.02").indices
    for world_size in (1, 2):
        for found in run_ranks(world_size, select_on_ranks, str(folder)):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], index) for name, index in expected.items())


@pytest.fixture(autouse=True)
def _no_state_of_accelerate_is_left() -> Iterator[None]:
    """The state of one process's trainers is global and would reach the next module's tests."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run_example(name: str, monkeypatch: pytest.MonkeyPatch, **flags: Any) -> dict[str, Any]:
    """Run a program of examples/; its names."""
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    monkeypatch.setattr(sys, "argv", [name, *words])
    return runpy.run_path(str(ROOT / "examples" / name))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of the demo in the forms that the examples read."""
    path = tmp_path_factory.mktemp("data")
    lines = (ROOT / "launch/demo/task/train.jsonl").read_text().splitlines()[:16]
    rows = [json.loads(line) for line in lines]
    for name, keys in {
        "sft": ("prompt", "completion"),
        "dpo": ("prompt", "chosen"),
        "grpo": ("prompt", "answer"),
    }.items():
        more = {"rejected": "I do not know."} if name == "dpo" else {}
        entries = [{keys[0]: r["question"] + "\n", keys[1]: r["answer"], **more} for r in rows]
        (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return path


def only_entries_moved(adapter: Path, mask: Mask) -> None:
    """A saved adapter changes entries of the mask and nothing else of the demo's model."""
    base = AutoModelForCausalLM.from_pretrained(DEMO)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    moved = 0
    for name, parameter in merged.named_parameters():
        changed = (parameter.detach() != before[name]).view(-1).nonzero()[:, 0]
        assert set(changed.tolist()) <= set(mask.indices.get(name, torch.empty(0)).tolist()), name
        moved += len(changed)
    assert moved > mask.num_selected / 2


def test_the_programs_of_examples_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    common = {"model": DEMO, "density": "0.01"}
    run_example(
        "own_loop.py",
        monkeypatch,
        data=data / "sft.jsonl",
        output_dir="loop",
        num_steps=3,
        **common,
    )
    pytest.importorskip("trl")
    steps = {"max_steps": 2, **common}
    names = run_example("sft.py", monkeypatch, data=data / "sft.jsonl", output_dir="sft", **steps)
    only_entries_moved(Path("sft"), names["mask"])
    names["mask"].save("mask.safetensors")

    names = run_example("dpo.py", monkeypatch, data=data / "dpo.jsonl", output_dir="dpo", **steps)
    log = [entry for entry in names["trainer"].state.log_history if "loss" in entry]
    assert log[0]["rewards/margins"] == 0  # the reference is the disabled adapter
    assert log[1]["rewards/margins"] > 0
    only_entries_moved(Path("dpo"), names["mask"])

    names = run_example(
        "grpo.py",
        monkeypatch,
        model=DEMO,
        mask="mask.safetensors",
        max_steps=2,
        data=data / "grpo.jsonl",
        output_dir="grpo",
        max_completion_length=30,
    )
    log = [entry for entry in names["trainer"].state.log_history if "loss" in entry]
    assert log[0]["kl"] == 0
    assert any(entry["grad_norm"] > 0 for entry in log)


def test_a_base_of_four_bits_is_trained_at_the_entries_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("trl")
    from transformers import BitsAndBytesConfig

    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(DEMO)
    tokens = torch.arange(40).view(2, 20)
    batch = {"input_ids": tokens, "labels": tokens}
    mask = gem_ds.select_mask(model, [batch], density="0.01")
    mask.save("mask.safetensors")
    names = run_example(
        "nf4.py",
        monkeypatch,
        model=DEMO,
        mask="mask.safetensors",
        data=data / "sft.jsonl",
        output_dir="nf4",
        max_steps=2,
    )

    def load(**more: Any) -> Any:
        quantization = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
        } | more
        config = BitsAndBytesConfig(**quantization)
        return AutoModelForCausalLM.from_pretrained(DEMO, quantization_config=config).train()

    base = load()
    before, packed = base(tokens).logits.detach(), bits(base)
    loaded = PeftModel.from_pretrained(base, "nf4").train()
    assert not torch.equal(loaded(tokens).logits, before)
    trained = [p for n, p in names["model"].named_parameters() if n.endswith("values")]
    found = [p for n, p in loaded.named_parameters() if n.endswith("values")]
    assert all(torch.equal(a.float(), b) for a, b in zip(trained, found, strict=True))
    with loaded.disable_adapter():
        assert torch.equal(loaded(tokens).logits, before)
    assert bits(loaded.unload()) == packed
    with pytest.raises(ValueError, match="trained on a base quantized by"):
        PeftModel.from_pretrained(load(bnb_4bit_quant_type="fp4"), "nf4")
    with pytest.raises(ValueError, match="this one is by nothing"):
        PeftModel.from_pretrained(model, "nf4")
    with pytest.raises(ValueError, match="was quantized"):
        gem_ds.tuner.adapter_to_delta("nf4")
