"""The trainers of transformers and TRL train a mask: on one rank, on two, at ZeRO 0, 2 and 3."""

import json
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (  # noqa: TID251
    StateDictOptions,
    get_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh  # noqa: TID251
from torch.distributed.fsdp import fully_shard  # noqa: TID251
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import gem_ds
from gem_ds.calibration.calibrate import calibrate
from gem_ds.data.batches import permutation
from gem_ds.distributed.process_group import init_distributed
from gem_ds.files.mask import Mask
from gem_ds.models.loss import chunked_answer_loss
from gem_ds.models.router_loss import with_router_loss
from gem_ds.models.targets import find_targets
from gem_ds.select.budget import total_budget
from gem_ds.select.selection import gather_indices
from gem_ds.tuner import GemConfig
from tests.deltas import bits
from tests.ranks import run_ranks, told_as
from tests.tiny import (
    PAD_TOKEN_ID,
    Setting,
    make_batches,
    make_engine,
    make_model,
    naive_examples,
    random_examples,
)
from tests.tuner.test_tuner import WEIGHTS, mask_of

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "launch/demo/model")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of peft's, TRL's and accelerate's calls
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

NUM_STEPS, PER_STEP, MAX_NORM, RATE = 3, 8, 0.1, 0.01
TRAINED = ("llama", "gpt2", "deepseek_v3")  # of the last experts are trained too


def examples() -> list[dict[str, Tensor]]:
    """What three steps of eight read, of one length."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 40, (NUM_STEPS * PER_STEP, 9), generator=generator)
    learnt = tokens.clone()
    learnt[:, 0] = -100  # which nothing predicts; who counts labels counts it or not
    return [{"input_ids": ids, "labels": row} for ids, row in zip(tokens, learnt, strict=True)]


def batches(size: int) -> list[dict[str, Tensor]]:
    """The same, so many at once."""
    rows = examples()
    return [
        {key: torch.stack([row[key] for row in rows[i : i + size]]) for key in rows[0]}
        for i in range(0, len(rows), size)
    ]


def sequential(trainer: type[Trainer]) -> type[Trainer]:
    """A trainer that reads the examples as they come."""

    def sampler(self: Any, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    return type("InOrder", (trainer,), {"_get_train_sampler": sampler})


def arguments(
    output_dir: str, stage: int, world_size: int, checkpointing: bool | None
) -> dict[str, Any]:
    """Two micro-batches a step, clipping, and a norm and loss of every step."""
    config: dict[str, Any] = {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
    }
    return {
        "output_dir": output_dir,
        "per_device_train_batch_size": PER_STEP // 2 // world_size,
        "gradient_accumulation_steps": 2,
        "max_steps": NUM_STEPS,
        "max_grad_norm": MAX_NORM,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "ddp_find_unused_parameters": False,
        "deepspeed": config if stage else None,
        "gradient_checkpointing": checkpointing is not None,
        "gradient_checkpointing_kwargs": {"use_reentrant": bool(checkpointing)},
    }


Steps = tuple[list[float], list[float], dict[str, Tensor]]
"""Losses, norms before clipping, and values in the end."""


def by_transformers(base: str, options: dict[str, Any]) -> Trainer:
    """As a user sets it up with ``Trainer``."""
    args = TrainingArguments(**options)
    model: Any = AutoModelForCausalLM.from_pretrained(f"{base}/model")
    assert hasattr(next(model.parameters()), "ds_id") == ("stage': 3" in str(args.deepspeed))
    config = GemConfig(mask=f"{base}/mask.safetensors", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    return sequential(Trainer)(model=model, args=args, train_dataset=examples())


def sft(
    model: Any, rows: list[Any], options: dict[str, Any], *, in_order: bool = True, **more: Any
) -> Trainer:
    """An ``SFTTrainer``, its examples tokenized before; shuffled by itself if not in order."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    made: Any = sequential(SFTTrainer) if in_order else SFTTrainer
    options = {"bf16": False, "max_length": None, "completion_only_loss": True} | options
    return made(  # type: ignore[no-any-return]
        model,
        SFTConfig(**options),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(DEMO),
        **more,
    )


def by_trl(base: str, options: dict[str, Any]) -> Trainer:
    """As a user sets it up with ``SFTTrainer``."""
    rows = [
        {
            "input_ids": row["input_ids"].tolist(),
            "completion_mask": (row["labels"] != -100).tolist(),
        }
        for row in examples()
    ]
    config = GemConfig(mask=f"{base}/mask.safetensors")
    model = AutoModelForCausalLM.from_pretrained(f"{base}/model")
    return sft(model, rows, options, peft_config=config)


Run = tuple[Callable[[str, dict[str, Any]], Trainer], bool | None]
"""What makes a trainer, and whether its checkpointing, if any, is reentrant."""


def target_of(name: str) -> str:
    """The module, or projection of experts, whose values have a name in a model or a file."""
    return name.replace(".default", "").replace(".gem_entries", "").removesuffix(".values")


def train_in_order(folder: str, stage: int, world_size: int, runs: list[Run]) -> dict[str, Steps]:
    """What trainers find, by what makes them, the architecture, and the checkpointing."""
    found = {}
    for (make, checkpointing), architecture in product(runs, TRAINED):
        AcceleratorState._reset_state(reset_partial_state=False)
        name = f"{make.__name__} {architecture} {checkpointing}"
        output_dir = f"{folder}/out{stage}{world_size}/{name}"
        options = arguments(output_dir, stage, world_size, checkpointing)
        with told_as(name):
            trainer = make(f"{folder}/{architecture}", options)
            trainer.train()
            trainer.save_model(output_dir)
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        weights = load_file(f"{output_dir}/{WEIGHTS}") if trainer.args.process_index == 0 else {}
        values = {target_of(n): v for n, v in weights.items() if "valu" in n}
        found[name] = [e["loss"] for e in log], [float(e["grad_norm"]) for e in log], values
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each architecture a base and a mask on disk."""
    path = tmp_path_factory.mktemp("trainers")
    for architecture in TRAINED:
        model = make_model(architecture, dropout=0.0)
        model.save_pretrained(path / architecture / "model")
        mask_of(model).save(path / architecture / "mask.safetensors")
    return path


@pytest.fixture(scope="module")
def by_hand(folder: Path) -> dict[str, Steps]:
    """The same steps in a loop, whole batches at once; test_tuner.py has the oracle of one."""
    found = {}
    for architecture in TRAINED:
        mask = Mask.load(folder / architecture / "mask.safetensors")
        model: Any = get_peft_model(make_model(architecture, dropout=0.0), GemConfig(mask=mask))
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(named.values(), lr=RATE, weight_decay=0.0)
        losses, norms = [], []
        for batch in batches(PER_STEP):
            loss = model(**batch).loss
            loss.backward()
            norms.append(float(nn.utils.clip_grad_norm_(named.values(), MAX_NORM)))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert min(norms) > MAX_NORM, "every step is clipped"
        values = {target_of(n): p.detach() for n, p in named.items()}
        found[architecture] = losses, norms, values
    return found


def assert_same(steps: Steps, expected: Steps) -> None:
    """fp32's rounding apart; ranks but the first have no values."""
    torch.testing.assert_close(steps[0], expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(steps[1], expected[1], rtol=1e-5, atol=1e-6)
    if steps[2]:
        torch.testing.assert_close(steps[2], expected[2], rtol=1e-6, atol=1e-6)


PLAIN: list[Run] = [(by_transformers, None), (by_trl, None)]


@pytest.mark.parametrize(
    ("stage", "world_size", "runs"),
    [
        (0, 1, [*PLAIN, *product((by_transformers, by_trl), (True, False))]),
        (0, 2, PLAIN),
        (2, 2, PLAIN),
        (3, 2, [(by_transformers, True), (by_trl, False)]),
    ],
    ids=["one rank", "zero0", "zero2", "zero3"],
)
def test_a_trainer_takes_the_steps_of_a_loop(folder, by_hand, stage, world_size, runs):
    pytest.importorskip("trl")
    results = run_ranks(
        world_size, train_in_order, str(folder), stage, world_size, runs, timeout=900
    )
    for found in results:
        for name, steps in found.items():
            with told_as(name):
                assert_same(steps, by_hand[name.split()[1]])
    assert all(steps[2] for steps in results[0].values()), "rank 0 has saved"


def train_sharded(folder: str) -> dict[str, Steps]:
    """The steps of two ranks by FSDP2: as torch has it, and as accelerate does."""
    comm, found = init_distributed(), {}
    half = PER_STEP // 2
    for by in ("torch", "accelerate"):
        model: Any = AutoModelForCausalLM.from_pretrained(f"{folder}/llama/model")
        model = get_peft_model(model, GemConfig(mask=f"{folder}/llama/mask.safetensors"))
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=False,
        )
        if by == "accelerate":  # whose Accelerator takes FSDP for GPUs alone
            stub = SimpleNamespace(
                state=SimpleNamespace(fsdp_plugin=plugin),
                mixed_precision="no",
                is_main_process=comm.is_main,
                device=comm.device,
            )
            model = fsdp2_prepare_model(stub, model)
        else:
            mesh = init_device_mesh("cpu", (comm.world_size,))
            for layer in model.base_model.model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
        before = {name: p.full_tensor().clone() for name, p in model.named_parameters()}
        losses, norms = [], []
        for batch in batches(PER_STEP):
            own = {key: rows[comm.rank * half :][:half] for key, rows in batch.items()}
            loss = model.train()(**own).loss
            loss.backward()
            norm: Any = nn.utils.clip_grad_norm_(trained, MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
            norms.append(norm.full_tensor().item())
            losses.append(comm.all_reduce(loss.detach().clone(), "sum").item() / comm.world_size)
        after = {name: p.full_tensor().clone() for name, p in model.named_parameters()}
        values = {name: after.pop(name) for name in list(after) if ".gem_entries." in name}
        assert all(torch.equal(before[name], weight) for name, weight in after.items())
        if by == "accelerate":
            state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
            if comm.is_main:
                model.save_pretrained(f"{folder}/sharded", state_dict=state)
        else:
            with pytest.raises(ValueError, match="before fully_shard"):
                model.add_adapter("other", model.peft_config["default"])
            with pytest.raises(ValueError, match="before fully_shard"):
                model.merge_adapter()
        found[by] = losses, norms, {target_of(n): v for n, v in values.items()}
    return found


def test_weights_sharded_by_fsdp2_train_as_whole_ones(folder, by_hand):
    for found in run_ranks(2, train_sharded, str(folder)):
        for name, steps in found.items():
            with told_as(name):
                assert_same(steps, by_hand["llama"])
    base = make_model("llama", dropout=0.0)
    loaded = PeftModel.from_pretrained(base, str(folder / "sharded"))
    for name, values in loaded.named_parameters():
        if ".gem_entries." in name:
            torch.testing.assert_close(values, by_hand["llama"][2][target_of(name)])


def answers() -> list[dict[str, list[int]]]:
    """Examples of several lengths, which fill four rows of 12; their ends are learnt."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in (3, 9, 5, 7, 4, 8, 6, 6):
        ids = torch.randint(1, 40, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "completion_mask": [0, 0] + [1] * (length - 2)})
    return rows


def summed_answer(model: Any, row: dict[str, list[int]]) -> Tensor:
    """The loss of one example by itself."""
    ids, learnt = torch.tensor(row["input_ids"]), torch.tensor(row["completion_mask"]).bool()
    losses = nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
    return losses[learnt[1:]].sum()


def mixture(**more: Any) -> Any:
    """One whose routers' loss counts."""
    return make_model("mixtral", output_router_logits=True, router_aux_loss_coef=0.3, **more)


def in_order_of_ranks(world_size: int) -> list[int]:
    """Eight rows so that a sampler deals two at a time to the ranks as our engine does."""
    steps = permutation(8, 0, 0).split(2 * world_size)
    by_rank = [rows[rank::world_size] for rows in steps for rank in range(world_size)]
    return torch.cat(by_rank).tolist()  # type: ignore[no-any-return]


def collated(rows: list[dict[str, int]]) -> dict[str, Tensor]:
    """These examples, as our engine reads them."""
    batch = random_examples(8).collate([row["row"] for row in rows], PAD_TOKEN_ID)
    return {name: tensor for name, tensor in batch.items() if name != "answer_positions"}


def trainers_of_mixtures(options: dict[str, Any]) -> dict[str, Any]:
    """Their steps would be of two micro-batches, each with a routers' loss."""
    options = options | {"gradient_accumulation_steps": 2, "remove_unused_columns": False}
    rows = in_order_of_ranks(int(os.environ["WORLD_SIZE"]))
    examples = [
        {"input_ids": ids.tolist(), "completion_mask": [int(i >= n) for i in range(len(ids))]}
        for ids, n in naive_examples(random_examples(8), rows)
    ]
    return {
        "a mixture": sequential(Trainer)(
            model=mixture(),
            args=TrainingArguments(**options),
            train_dataset=[{"row": row} for row in rows],
            data_collator=collated,
        ),
        "a mixture by TRL": sft(mixture(), examples, options),
    }


def calibrate_mixture() -> dict[str, Tensor]:
    """The mask of our engine."""
    comm, model = init_distributed(), mixture()
    budget = total_budget("0.02", sum(p.numel() for p in model.parameters()))
    targets = find_targets(model, ["all-linear"])
    engine, layers = make_engine(Setting(0), comm, model, budget, targets=targets)
    loss = with_router_loss(chunked_answer_loss, model)
    selection = calibrate(engine, layers, make_batches(random_examples(8), comm, 2), loss, budget)
    return dict(zip(targets, gather_indices(selection.indices, comm), strict=True))


def select_on_ranks(folder: str) -> dict[str, dict[str, Tensor]]:
    """The masks that trainers' own batches give."""
    options: dict[str, Any] = {
        "output_dir": f"{folder}/select",
        "per_device_train_batch_size": 2,
        "report_to": [],
        "use_cpu": True,
    }
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/llama/model")
    args = TrainingArguments(**options)
    trainers = {"": sequential(Trainer)(model=model, args=args, train_dataset=examples())}
    for packing in (False, True):
        own = options | {"max_length": 12, "packing": packing}
        trainers["packed" if packing else "padded"] = sft(model, answers(), own, in_order=False)
    masks = {
        name: gem_ds.select_mask_with(trainer, density="0.02").indices
        for name, trainer in trainers.items()
    }
    for name, trainer in trainers_of_mixtures(options).items():
        with told_as(name):
            mask = gem_ds.select_mask_with(trainer, density="0.02", target_modules="all-linear")
        masks[name] = mask.indices
    return masks


def test_the_mask_of_a_trainer_is_that_of_its_batches(folder):
    """Padded or packed, the loss on completions alone, on one rank or two.

    Of a mixture the routers' loss counts as in our engine's calibration.
    """
    pytest.importorskip("trl")
    whole = gem_ds.select_mask(make_model("llama"), batches(1), density="0.02").indices
    model = make_model("llama")
    learnt = gem_ds.select_mask(model, answers(), summed_answer, density="0.02").indices
    expected = {"": whole, "padded": learnt, "packed": learnt}
    for world_size in (1, 2):
        engines = run_ranks(world_size, calibrate_mixture)[0]
        expected |= dict.fromkeys(("a mixture", "a mixture by TRL"), engines)
        for found in run_ranks(world_size, select_on_ranks, str(folder), timeout=600):
            for kind, indices in expected.items():
                assert found[kind].keys() == indices.keys()
                for name, index in indices.items():
                    assert torch.equal(found[kind][name], index), kind


@pytest.fixture(autouse=True)
def _no_state_of_accelerate_is_left() -> Iterator[None]:
    """The state of one process's trainers is global and would reach the next module's tests."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run_example(
    name: str, data: Path, monkeypatch: pytest.MonkeyPatch, **flags: Any
) -> dict[str, Any]:
    """Run a program of examples/ on the demo's model, into the folder of its name; its names."""
    flags = {"model": DEMO, "data": data, "output_dir": name} | flags
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    monkeypatch.setattr(sys, "argv", [name, *words])
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))


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


def test_the_programs_of_examples_run(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_example("own_loop", data / "sft.jsonl", monkeypatch, num_steps=3, density="0.01")
    pytest.importorskip("trl")
    steps = {"max_steps": 2, "density": "0.01"}
    names = run_example("sft", data / "sft.jsonl", monkeypatch, **steps)
    only_entries_moved(Path("sft"), names["mask"])
    names["mask"].save("mask.safetensors")

    names = run_example("dpo", data / "dpo.jsonl", monkeypatch, **steps)
    log = [entry for entry in names["trainer"].state.log_history if "loss" in entry]
    assert log[0]["rewards/margins"] == 0  # the reference is the disabled adapter
    assert log[1]["rewards/margins"] > 0
    only_entries_moved(Path("dpo"), names["mask"])

    steps = {"max_steps": 2, "mask": "mask.safetensors", "max_completion_length": 30}
    names = run_example("grpo", data / "grpo.jsonl", monkeypatch, **steps)
    log = [entry for entry in names["trainer"].state.log_history if "loss" in entry]
    assert log[0]["kl"] == 0
    assert any(entry["grad_norm"] > 0 for entry in log)


def test_a_base_of_four_bits_is_trained_at_the_entries_alone(data, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("trl")
    from transformers import BitsAndBytesConfig

    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(DEMO)
    tokens = torch.arange(40).view(2, 20)
    batch = {"input_ids": tokens, "labels": tokens}
    mask = gem_ds.select_mask(model, [batch], density="0.01")
    mask.save("mask.safetensors")
    steps = {"max_steps": 2, "mask": "mask.safetensors"}
    names = run_example("nf4", data / "sft.jsonl", monkeypatch, **steps)

    quantization = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(load_in_4bit=True, **quantization)
    base = AutoModelForCausalLM.from_pretrained(DEMO, quantization_config=config).train()
    before, packed = base(tokens).logits.detach(), bits(base)
    loaded = PeftModel.from_pretrained(base, "nf4").train()
    assert not torch.equal(loaded(tokens).logits, before)
    trained = [p for n, p in names["model"].named_parameters() if n.endswith("values")]
    found = [p for n, p in loaded.named_parameters() if n.endswith("values")]
    assert all(torch.equal(a.float(), b) for a, b in zip(trained, found, strict=True))
    with loaded.disable_adapter():
        assert torch.equal(loaded(tokens).logits, before)
    assert bits(loaded.unload()) == packed
