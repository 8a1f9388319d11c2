r"""Files that version 0.1 wrote load and mean the same.

They lie in tests/files_0_1/ and are never made again: what they guard is that a later version reads
them. Base models follow a formula (:func:`write_inputs`), so that neither the random numbers of
torch nor the first values of transformers matter. They were made from the root of the repository,
on a CPU (DS_ACCELERATOR=cpu, OMP_NUM_THREADS=1), with:

    python -c 'from tests import test_old_files as t; t.write_inputs(t.Path("inputs"))'
    python launch/train.py $LLAMA --save_steps 3 --max_steps 6 --output_dir llama
    python launch/train.py $ENCODER --max_steps 4 --output_dir encoder
    python launch/train.py --config launch/recipes/demo.yaml --data_dir inputs/sums --max_steps 24 \
        --output_dir demo
    python -m eval.gsm8k --model_name_or_path launch/demo/model --delta demo/delta.safetensors \
        --data_dir inputs/sums --max_new_tokens 24 --output_dir gsm8k
    python -m eval.passk --model_name_or_path launch/demo/model --output_dir programs \
        --data_dir tests/files_0_1/programs --prompt_template '{header}' --n 2 --k 1 2 \
        --max_new_tokens 24

where LLAMA and ENCODER are the flags below with "inputs" for the folder, and programs/mbpp.jsonl is
lines 1, 17 and 37 of launch/demo/programs/mbpp.jsonl. Of what they wrote a part was kept.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from gem_ds import Delta, Mask, apply_delta
from gem_ds.evaluate import score
from gem_ds.models import export
from gem_ds.train import main as train
from tests.tiny_model import one_rank

FILES = Path(__file__).parent / "files_0_1"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "green", "warm", "cold", "not"]

#: SHA-256 of the trained parameters, whole, in the order of their names.
TRAINED = {
    "llama": "8acdb0659fd494190d5a0129d658c02c154b2f61efa79798a51c5dbf3ae300e0",
    "encoder": "b1da79fdfbe2394b0a7d05235b4e7101c1fe4daddc7e365ce2ee59bc93642c1e",
}


def llama_flags(folder: Path) -> list[str]:
    """Of the run that wrote llama/; without its steps and its place."""
    flags = f"--model_name_or_path {folder}/llama --task gsm8k --data_dir {folder}/sums"
    flags += " --density 0.02 --learning_rate 0.01 --adam_epsilon 1e-3 --logging_steps 1"
    return [*flags.split(), "--per_device_train_batch_size", "4", "--disable_tqdm"]


def encoder_flags(folder: Path) -> list[str]:
    """Of the run that wrote encoder/."""
    flags = f"--model_name_or_path {folder}/bert --task rte --data_dir {folder}/rte"
    flags += " --density 0.02 --learning_rate 0.01 --calibration_head_steps 2 --disable_tqdm"
    return flags.split()


def make_llama() -> LlamaForCausalLM:
    """Two layers, 23,776 parameters."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=258,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    return _filled(LlamaForCausalLM(config))


def make_bert() -> BertForSequenceClassification:
    """Two layers and a classifier of two labels."""
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
    )
    return _filled(BertForSequenceClassification(config))


def _filled(model: Any) -> Any:
    """The model with matrices between -0.2 and 0.2 that follow from their names and places."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                place = torch.arange(parameter.numel())
                steps = (31 * place * place + 40503 * place + zlib.crc32(name.encode())) % 65536
                parameter.copy_((steps / 65536 - 0.5).mul(0.4).view(parameter.shape))
    return model


def write_inputs(folder: Path) -> None:
    """Write what the runs read: llama/, bert/ (without its classifier), sums/ and rte/."""
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder / "llama")
    make_llama().save_pretrained(folder / "llama")
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    BertTokenizer(vocab=vocabulary).save_pretrained(folder / "bert")
    make_bert().bert.save_pretrained(folder / "bert")
    pairs = ["index\tsentence1\tsentence2\tlabel"]
    for i in range(12):
        first, second = WORDS[5 + i % 5], WORDS[5 + i * i % 5]
        label = "entailment" if first == second else "not_entailment"
        pairs.append(f"{i}\t{first} {second}\t{second}\t{label}")
    sums = [(i, 7 * i % 40 + 1) for i in range(1, 61)]
    rows = [
        {
            "question": f"How many are {a} eggs and {b} eggs?",
            "answer": f"{a}+{b}={a + b}\n#### {a + b}",
        }
        for a, b in sums
    ]
    files = {
        "sums/train.jsonl": map(json.dumps, rows[:48]),
        "sums/test.jsonl": map(json.dumps, rows[48:]),
        "rte/train.tsv": pairs[:9],
        "rte/dev.tsv": [pairs[0], *pairs[9:]],
    }
    for name, lines in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    with one_rank():
        yield folder


def _digest(parameters: Mapping[str, Tensor], names: list[str]) -> str:
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(parameters[name].detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(("name", "make"), [("llama", make_llama), ("encoder", make_bert)])
def test_a_delta_gives_the_weights_that_were_trained_then(name: str, make: Any) -> None:
    """Read without gem_ds, the same values stand at the same places; reverting gives the base."""
    stored = load_file(FILES / name / "delta.safetensors")
    model, base = make(), dict(make().named_parameters())
    delta = Delta.load(FILES / name / "delta.safetensors")
    applied = apply_delta(model, delta)
    found = dict(model.named_parameters())
    assert _digest(found, [*delta.values, *delta.head]) == TRAINED[name]
    for parameter in base:
        expected = base[parameter].detach().clone()
        if f"{parameter}.indices" in stored:
            places = stored[f"{parameter}.indices"].long()
            expected.view(-1)[places] = stored[f"{parameter}.values"]
        assert torch.equal(found[parameter], stored.get(f"head.{parameter}", expected)), parameter
    applied.revert()
    assert all(torch.equal(found[parameter], base[parameter]) for parameter in base)


def test_an_encoder_is_exported_with_its_head(inputs: Path, tmp_path: Path) -> None:
    delta = FILES / "encoder" / "delta.safetensors"
    flags = ["--model_name_or_path", str(inputs / "bert"), "--delta", str(delta)]
    export.main([*flags, "--output_dir", str(tmp_path / "exported")])
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "exported"
    )
    assert model.config.id2label == {0: "entailment", 1: "not_entailment"}
    stored = load_file(delta)
    names = {name.removeprefix("head.").removesuffix(".values") for name in stored}
    names = {name for name in names if not name.endswith(".indices")}
    assert _digest(dict(model.named_parameters()), list(names)) == TRAINED["encoder"]


def test_a_mask_is_taken_up(inputs: Path, tmp_path: Path) -> None:
    """launch/train.py finds the base values that the mask was made for, and trains its entries."""
    mask = FILES / "llama" / "mask.safetensors"
    train.main(
        [
            *llama_flags(inputs),
            "--mask",
            str(mask),
            "--max_steps",
            "1",
            "--output_dir",
            str(tmp_path),
        ]
    )
    old, new = Mask.load(mask), Delta.load(tmp_path / "delta.safetensors").mask
    assert old.method == "gem"
    assert old.settings["density"] == "0.02"
    assert old.num_selected == 475
    assert new.weights == old.weights
    assert all(torch.equal(new.indices[name], old.indices[name]) for name in old.weights)


def test_a_checkpoint_is_resumed(inputs: Path, tmp_path: Path) -> None:
    """And ends where the run that wrote it did, whatever the processor rounds to."""
    shutil.copytree(FILES / "llama" / "checkpoint-3", tmp_path / "checkpoint-3")
    flags = [*llama_flags(inputs), "--max_steps", "6", "--output_dir", str(tmp_path)]
    train.main([*flags, "--resume_from_checkpoint", "last"])
    old = Delta.load(FILES / "llama" / "delta.safetensors")
    new = Delta.load(tmp_path / "delta.safetensors")
    assert new.mask.weights == old.mask.weights
    for name, values in old.values.items():
        torch.testing.assert_close(new.values[name], values, rtol=1e-4, atol=1e-6)
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4, 5, 6]


def _scored(task: str, flags: list[str], folder: Path) -> list[dict[str, Any]]:
    """Score old samples again; returns the verdicts, which are to be the old ones."""
    samples = FILES / folder.name / "samples.jsonl"
    score.main(
        ["--task", task, *flags, "--output_dir", str(folder), "--disable_tqdm", str(samples)]
    )
    lines = (folder / "verdicts.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _verdicts(name: str) -> list[dict[str, Any]]:
    lines = (FILES / name / "verdicts.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_sampled_answers_are_judged_as_then(inputs: Path, tmp_path: Path) -> None:
    found = _scored("gsm8k", ["--data_dir", str(inputs / "sums")], tmp_path / "gsm8k")
    assert found == _verdicts("gsm8k")
    assert {row["numeric"] for row in found} == {True, False}


@pytest.mark.usefixtures("sandbox")
def test_sampled_programs_are_judged_as_then(tmp_path: Path) -> None:
    flags = ["--data_dir", str(FILES / "programs"), "--prompt_template", "{header}"]
    found = _scored("mbpp", [*flags, "--k", "1", "2"], tmp_path / "programs")
    assert found == _verdicts("programs")
    assert {row["status"] for row in found} == {"passed", "failed"}
