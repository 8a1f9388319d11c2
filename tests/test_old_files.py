r"""Files that version 0.1 wrote load and mean the same.

They lie in tests/files_0_1/ and are never made again: what they guard is that a later version reads
them. Base models follow a formula (:func:`write_inputs`), so that neither the random numbers of
torch nor the first values of transformers matter. They were made from the root of the repository,
on a CPU (DS_ACCELERATOR=cpu, OMP_NUM_THREADS=1), with:

    python -c 'from tests import test_old_files as t; t.write_inputs(t.Path("inputs"))'
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

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
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


#: Of the run that wrote llama/, without its steps and its place.
LLAMA = """--model_name_or_path inputs/llama --task gsm8k --data_dir inputs/sums --density 0.02
    --learning_rate 0.01 --adam_epsilon 1e-3 --logging_steps 1 --per_device_train_batch_size 4
    --disable_tqdm"""


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
    rows = []
    for a, b in ((i, 7 * i % 40 + 1) for i in range(1, 61)):
        question, answer = f"How many are {a} eggs and {b} eggs?", f"{a}+{b}={a + b}\n#### {a + b}"
        rows.append({"question": question, "answer": answer})
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


def _digest(model: Any, names: Iterable[str]) -> str:
    parts = (model.get_parameter(name).detach().numpy().tobytes() for name in sorted(names))
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.mark.parametrize(("name", "make"), [("llama", make_llama), ("encoder", make_bert)])
def test_a_delta_gives_the_weights_that_were_trained_then(name: str, make: Any) -> None:
    """Read without gem_ds, the same values stand at the same places; reverting gives the base."""
    stored = load_file(FILES / name / "delta.safetensors")
    model, base = make(), dict(make().named_parameters())
    delta = Delta.load(FILES / name / "delta.safetensors")
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


def test_an_encoder_is_exported_with_its_head(inputs: Path, tmp_path: Path) -> None:
    delta = FILES / "encoder" / "delta.safetensors"
    folder = tmp_path / "exported"
    flags = f"--model_name_or_path {inputs}/bert --delta {delta} --output_dir {folder}"
    export.main(flags.split())
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "entailment", 1: "not_entailment"}
    stored = [name for name in load_file(delta) if not name.endswith(".indices")]
    names = {name.removeprefix("head.").removesuffix(".values") for name in stored}
    assert _digest(model, names) == TRAINED["encoder"]


def train_llama(inputs: Path, flags: str) -> None:
    train.main(f"{LLAMA.replace('inputs', str(inputs))} {flags}".split())


def test_a_mask_is_taken_up(inputs: Path, tmp_path: Path) -> None:
    """launch/train.py finds the base values that the mask was made for, and trains its entries."""
    mask = FILES / "llama" / "mask.safetensors"
    train_llama(inputs, f"--mask {mask} --max_steps 1 --output_dir {tmp_path}")
    old, new = Mask.load(mask), Delta.load(tmp_path / "delta.safetensors").mask
    assert old.method == "gem"
    assert old.settings["density"] == "0.02"
    assert old.num_selected == 475
    assert new.weights == old.weights
    assert all(torch.equal(new.indices[name], old.indices[name]) for name in old.weights)


def test_a_checkpoint_is_resumed(inputs: Path, tmp_path: Path) -> None:
    """And ends where the run that wrote it did, whatever the processor rounds to."""
    shutil.copytree(FILES / "llama" / "checkpoint-3", tmp_path / "checkpoint-3")
    train_llama(inputs, f"--max_steps 6 --output_dir {tmp_path} --resume_from_checkpoint last")
    old = Delta.load(FILES / "llama" / "delta.safetensors")
    new = Delta.load(tmp_path / "delta.safetensors")
    assert new.mask.weights == old.mask.weights
    for name, values in old.values.items():
        torch.testing.assert_close(new.values[name], values, rtol=1e-4, atol=1e-6)
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4, 5, 6]


def assert_judged_as_then(task: str, name: str, folder: Path, flags: str, field: str) -> None:
    """Score old samples again: the verdicts are the old ones, which are of two kinds."""
    words = (
        f"--task {task} {flags} --output_dir {folder} --disable_tqdm {FILES / name}/samples.jsonl"
    )
    score.main(words.split())
    old, new = (
        [json.loads(line) for line in (each / "verdicts.jsonl").read_text().splitlines()]
        for each in (FILES / name, folder)
    )
    assert new == old
    assert len({row[field] for row in old}) == 2


def test_sampled_answers_are_judged_as_then(inputs: Path, tmp_path: Path) -> None:
    assert_judged_as_then("gsm8k", "gsm8k", tmp_path, f"--data_dir {inputs}/sums", "numeric")


@pytest.mark.usefixtures("sandbox")
def test_sampled_programs_are_judged_as_then(tmp_path: Path) -> None:
    flags = f"--data_dir {FILES}/programs --prompt_template {{header}} --k 1 2"
    assert_judged_as_then("mbpp", "programs", tmp_path, flags, "status")
