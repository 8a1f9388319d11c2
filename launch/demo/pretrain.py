"""Pretrain the embedded model: a Llama of a few million parameters and its SentencePiece tokenizer.

Documents of `corpus.py` are closed by the end-of-sequence token and packed whole into rows of at
most 256 tokens. The result is an ordinary Hugging Face folder in bfloat16. The same seed, flags and
software give the same tokenizer, and the same weights but for the order in which a machine adds.

    python -m launch.demo.pretrain --output_dir launch/demo/model
"""

import argparse
import io
import itertools
import math
import shlex
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from launch.demo.corpus import generate_documents

VOCABULARY_SIZE = 768
TOKENIZER_DOCUMENTS = 20_000
ROW_LENGTH = 256
PAD_LABEL = -100
LOG_EVERY = 50


def main(argv: list[str] | None = None) -> None:
    """Train the tokenizer and the model, and save both with a README that records how."""
    parser = argparse.ArgumentParser(prog="launch.demo.pretrain", description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the model")
    for name, default, text in (
        ("seed", 17, "fixes the text and the initial weights"),
        ("steps", 2600, "number of training steps"),
        ("rows", 12, "packed rows of 256 tokens a step"),
        ("learning_rate", 2e-3, "peak learning rate"),
        ("threads", 1, "CPU threads"),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    args = parser.parse_args(argv)
    if args.steps < 1 or args.rows < 1:
        raise ValueError("--steps and --rows count training steps and rows a step; pass 1 or more.")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    started = time.monotonic()
    tokenizer = train_tokenizer(args.seed)
    model = build_model(tokenizer)
    recent: deque[float] = deque(maxlen=LOG_EVERY)
    for step, loss in enumerate(pretrain(model, tokenizer, args), start=1):
        recent.append(loss)
        if step % LOG_EVERY == 0 or step == args.steps:
            seconds = time.monotonic() - started
            print(f"step {step} loss {sum(recent) / len(recent):.4f} {seconds:.0f} s", flush=True)
    save(model, tokenizer, args.output_dir)
    flags = sys.argv[1:] if argv is None else argv
    card = MODEL_CARD.format(
        parameters=sum(p.numel() for p in model.parameters()),
        vocabulary=VOCABULARY_SIZE,
        command=shlex.join(["python", "-m", "launch.demo.pretrain", *flags]),
        args=args,
        tokens=args.steps * args.rows * ROW_LENGTH,
        minutes=(time.monotonic() - started) / 60,
        loss=sum(recent) / len(recent),
        averaged=len(recent),
        torch=torch.__version__,
    )
    (args.output_dir / "README.md").write_text(card, encoding="utf-8")


def train_tokenizer(seed: int) -> LlamaTokenizer:
    """Train a byte-pair SentencePiece model on the corpus and wrap it for transformers.

    Digits and newlines stand alone. Every text encodes, as what the vocabulary lacks falls back to
    bytes. Decoding gives the text back, but for U+2581, SentencePiece's own mark for a space.
    """
    lines = (
        line
        for document in generate_documents(seed, TOKENIZER_DOCUMENTS)
        for line in document.split("\n")
        if line
    )
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=proto,
        model_type="bpe",
        vocab_size=VOCABULARY_SIZE,
        byte_fallback=True,
        split_digits=True,
        required_chars="\n",
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(proto.getvalue())
        tokenizer: LlamaTokenizer = LlamaTokenizer.from_pretrained(
            folder, add_prefix_space=False, add_bos_token=False, pad_token="<pad>"
        )
    return tokenizer


def build_model(tokenizer: LlamaTokenizer) -> LlamaForCausalLM:
    """The untrained model in fp32, from torch's global generator."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=4,
            num_attention_heads=8,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            **_special_tokens(tokenizer),
        )
    )


def packed_rows(tokenizer: LlamaTokenizer, seed: int) -> Iterator[list[int]]:
    """Yield rows of whole documents without end, from behind those that trained the tokenizer."""
    row: list[int] = []
    for block in itertools.count(1):
        for document in generate_documents(seed + block, TOKENIZER_DOCUMENTS):
            tokens = [*tokenizer.encode(document), tokenizer.eos_token_id]
            assert len(tokens) <= ROW_LENGTH, "a generated document does not fit into a row"
            if len(row) + len(tokens) > ROW_LENGTH:
                yield row
                row = []
            row += tokens


def _special_tokens(tokenizer: LlamaTokenizer) -> dict[str, Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(tokenizer, name) for name in names}


def pretrain(
    model: LlamaForCausalLM, tokenizer: LlamaTokenizer, args: argparse.Namespace
) -> Iterator[float]:
    """Train `model` in place, one step for every loss (mean over tokens, nats) that is drawn.

    The learning rate warms up over the first 2 % of the steps and then falls linearly to zero.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    warmup = max(1, args.steps // 50)
    decay = max(1, args.steps - warmup)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (args.steps - step) / decay)
    )
    stream = packed_rows(tokenizer, args.seed)
    model.train()
    for _ in range(args.steps):
        batch = [torch.tensor(row) for row in itertools.islice(stream, args.rows)]
        input_ids, labels = (  # [rows, longest row]
            pad_sequence(batch, batch_first=True, padding_value=value)
            for value in (tokenizer.pad_token_id, PAD_LABEL)
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=input_ids, labels=labels).loss
        if not math.isfinite(loss.item()):
            raise FloatingPointError("The pretraining loss is not finite; lower --learning_rate.")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        yield loss.item()


def save(model: LlamaForCausalLM, tokenizer: LlamaTokenizer, output_dir: Path) -> None:
    """Write the folder that `from_pretrained` reads, in bfloat16."""
    model.bfloat16()
    model.generation_config = GenerationConfig(do_sample=False, **_special_tokens(tokenizer))
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


MODEL_CARD = """\
---
license: apache-2.0
---

# The embedded model

A Llama-shaped language model of {parameters:,} parameters with a SentencePiece vocabulary of
{vocabulary} pieces, for the demo and the tests. It knows arithmetic on small numbers, a few shapes
of word problems and tiny Python functions, all generated by `launch/demo/corpus.py`, and nothing
else.

    {command}

| | |
|---|---|
| seed | {args.seed} |
| tokens | {tokens:,} at most, packed |
| time | {minutes:.0f} minutes on {args.threads} CPU thread(s) |
| loss, mean of the last {averaged} steps | {loss:.4f} nats a token |
| torch | {torch} |
| stored as | bfloat16 |
"""


if __name__ == "__main__":
    main()
