r"""Files that version 0.1 wrote load and mean the same.

They lie in tests/files_0_1/ and are never made again: what they guard is that a later version reads
them. What they were made of is in inputs/: a Llama of 23,776 parameters, a BERT without its
classifier, their tokenizers and data. They were made beside it, on a CPU (DS_ACCELERATOR=cpu,
OMP_NUM_THREADS=1), with:

    python launch/train.py $LLAMA --save_steps 3 --max_steps 6 --output_dir llama
    python launch/train.py --model_name_or_path inputs/bert --task rte --data_dir inputs/rte \
        --density 0.02 --learning_rate 0.01 --calibration_head_steps 2 --max_steps 4 \
        --output_dir encoder
    python launch/train.py --config launch/recipes/demo.yaml --data_dir inputs/sums --max_steps 24 \
        --output_dir demo
    python -m eval.gsm8k --model_name_or_path launch/demo/model --delta demo/delta.safetensors \
        --data_dir inputs/sums --max_new_tokens 24 --output_dir gsm8k
    python -m eval.passk --model_name_or_path launch/demo/model --output_dir programs \
        --data_dir tests/files_0_1/programs --prompt_template '{header}' --n 2 --k 1 2 \
        --max_new_tokens 24

where LLAMA are the flags below, and programs/mbpp.jsonl is lines 1, 17 and 37 of
launch/demo/programs/mbpp.jsonl. Of what they wrote a part was kept.
"""

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from gem_ds import Mask, apply_delta
from gem_ds.evaluate import score
from gem_ds.formats import export
from gem_ds.train import main as train
from tests.runs import delta_of, logged, rows_of
from tests.tiny_model import one_rank

FILES = Path(__file__).parent / "files_0_1"
INPUTS = FILES / "inputs"

#: SHA-256 of the trained parameters, whole, in the order of their names.
TRAINED = {
    "llama": "8acdb0659fd494190d5a0129d658c02c154b2f61efa79798a51c5dbf3ae300e0",
    "encoder": "b1da79fdfbe2394b0a7d05235b4e7101c1fe4daddc7e365ce2ee59bc93642c1e",
}

#: Of the run that wrote llama/, without its steps and its place.
LLAMA = """--model_name_or_path inputs/llama --task gsm8k --data_dir inputs/sums --density 0.02
    --learning_rate 0.01 --adam_epsilon 1e-3 --logging_steps 1 --per_device_train_batch_size 4
    --disable_tqdm"""


@pytest.fixture(autouse=True, scope="module")
def rank() -> Iterator[None]:
    with one_rank():
        yield


def _digest(model: Any, names: Iterable[str]) -> str:
    parts = (model.get_parameter(name).detach().numpy().tobytes() for name in sorted(names))
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.mark.parametrize(
    ("name", "base_name", "kind"),
    [
        ("llama", "llama", AutoModelForCausalLM),
        ("encoder", "bert", AutoModelForSequenceClassification),
    ],
)
def test_a_delta_gives_the_weights_that_were_trained_then(name, base_name, kind):
    """Read without gem_ds, the same values stand at the same places; reverting gives the base."""
    stored = load_file(FILES / name / "delta.safetensors")
    model = kind.from_pretrained(INPUTS / base_name)
    base = {name: value.detach().clone() for name, value in model.named_parameters()}
    delta = delta_of(FILES / name)
    applied = apply_delta(model, delta)
    found = dict(model.named_parameters())
    assert _digest(model, [*delta.values, *delta.head]) == TRAINED[name]
    for parameter in base:
        expected = base[parameter].detach().clone()
        if f"{parameter}.indices" in stored:
            places = stored[f"{parameter}.indices"].long()
            expected.view(-1)[places] = stored[f"{parameter}.values"]
        assert torch.equal(found[parameter], stored.get(f"head.{parameter}", expected)), parameter
    applied.revert()
    assert all(torch.equal(found[parameter], base[parameter]) for parameter in base)


def test_an_encoder_is_exported_with_its_head(tmp_path):
    delta = FILES / "encoder" / "delta.safetensors"
    folder = tmp_path / "exported"
    flags = f"--model_name_or_path {INPUTS}/bert --delta {delta} --output_dir {folder}"
    export.main(flags.split())
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "entailment", 1: "not_entailment"}
    stored = [name for name in load_file(delta) if not name.endswith(".indices")]
    names = {name.removeprefix("head.").removesuffix(".values") for name in stored}
    assert _digest(model, names) == TRAINED["encoder"]


def train_llama(flags: str) -> None:
    train.main(f"{LLAMA.replace('inputs', str(INPUTS))} {flags}".split())


def test_a_mask_is_taken_up(tmp_path):
    """launch/train.py finds the base values that the mask was made for, and trains its entries."""
    mask = FILES / "llama" / "mask.safetensors"
    train_llama(f"--mask {mask} --max_steps 1 --output_dir {tmp_path}")
    old, new = Mask.load(mask), delta_of(tmp_path).mask
    assert old.method == "gem"
    assert old.settings["density"] == "0.02"
    assert old.num_selected == 475
    assert new.weights == old.weights
    assert all(torch.equal(new.indices[name], old.indices[name]) for name in old.weights)


def test_a_checkpoint_is_resumed(tmp_path):
    """And ends where the run that wrote it did, whatever the processor rounds to."""
    shutil.copytree(FILES / "llama" / "checkpoint-3", tmp_path / "checkpoint-3")
    train_llama(f"--max_steps 6 --output_dir {tmp_path} --resume_from_checkpoint last")
    old, new = delta_of(FILES / "llama"), delta_of(tmp_path)
    assert new.mask.weights == old.mask.weights
    for name, values in old.values.items():
        torch.testing.assert_close(new.values[name], values, rtol=1e-4, atol=1e-6)
    assert [step for step, _ in logged(tmp_path, "loss")] == [1, 2, 3, 4, 5, 6]


def assert_judged_as_then(task: str, name: str, folder: Path, flags: str, field: str) -> None:
    """Score old samples again: the verdicts are the old ones, which are of two kinds."""
    words = (
        f"--task {task} {flags} --output_dir {folder} --disable_tqdm {FILES / name}/samples.jsonl"
    )
    score.main(words.split())
    old, new = (rows_of(each / "verdicts.jsonl") for each in (FILES / name, folder))
    assert new == old
    assert len({row[field] for row in old}) == 2


def test_sampled_answers_are_judged_as_then(tmp_path):
    assert_judged_as_then("gsm8k", "gsm8k", tmp_path, f"--data_dir {INPUTS}/sums", "numeric")


@pytest.mark.usefixtures("sandbox")
def test_sampled_programs_are_judged_as_then(tmp_path):
    flags = f"--data_dir {FILES}/programs --prompt_template {{header}} --k 1 2"
    assert_judged_as_then("mbpp", "programs", tmp_path, flags, "status")
