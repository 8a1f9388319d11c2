"""A model folder that trains in a second, with data of its own, and the flags that train it.

    tiny = make_tiny(folder)
    main(tiny.flags(output_dir, max_steps=3))

A Llama of two layers with random weights and a byte-level tokenizer, or a mixture of experts;
questions about sums, in GSM8K's form.
"""

import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoTokenizer

from gem_ds.distributed.process_group import leave_distributed
from gem_ds.train import main as train
from tests.ranks import VARIABLES
from tests.tiny import model_of, tiny_config
from tests.tiny_tokenizers import byte_level

REPOSITORY = Path(__file__).resolve().parents[1]
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True)
class Tiny:
    """Where the model and the data lie."""

    folder: Path  # holds both, and what a test puts beside them
    model: Path
    data: Path  # folder with train.jsonl (22 examples) and test.jsonl (5)

    def flags(self, output_dir: Path, /, *switches: str, **values: object) -> list[str]:
        """The command line of a run in 4-example steps; a value of None leaves its flag out."""
        settings = {
            "model_name_or_path": self.model,
            "task": "gsm8k",
            "data_dir": self.data,
            "output_dir": output_dir,
            "density": "0.02",
            "learning_rate": 0.01,
            "per_device_train_batch_size": 4,
        } | values
        pairs = [(f"--{name}", str(v)) for name, v in settings.items() if v is not None]
        return [*(text for pair in pairs for text in pair), "--disable_tqdm", *switches]

    def encoded(self, name: str) -> list[tuple[Tensor, int]]:
        """The examples of a data file one by one: the tokens, and how many of them are prompt."""
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        examples = []
        for line in (self.data / name).read_text().splitlines():
            row = json.loads(line)
            prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
            answer = tokenizer(f" {row['answer']}")["input_ids"] + [tokenizer.eos_token_id]
            examples.append((torch.tensor(prompt + answer), len(prompt)))
        return examples

    def variant(self, name: str, **config: object) -> Path:
        """A copy of the model folder with other values in its config.json."""
        copy = self.folder / name
        shutil.copytree(self.model, copy)
        path = copy / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return copy

    def mixture(self, name: str = "mixture", **config: object) -> Path:
        """A folder like the model's, of a mixture of experts whose routers' loss counts."""
        copy = self.variant(name)
        tokens = ("vocab_size", "bos_token_id", "eos_token_id")
        known = json.loads((copy / "config.json").read_text())
        own = {name: known[name] for name in tokens} | {"output_router_logits": True} | config
        model_of(tiny_config("qwen3_moe", max_position_embeddings=128, **own)).save_pretrained(copy)
        return copy

    def speaking(self, name: str, template: str) -> Path:
        """A copy of the model folder with another chat template."""
        copy = self.variant(name)
        (copy / "chat_template.jinja").write_text(template)
        return copy


def make_tiny(folder: Path) -> Tiny:
    """Write model, tokenizer and data into ``folder``."""
    tiny = Tiny(folder, folder / "model", folder / "data")
    tokenizer = byte_level(chat_template=CHAT_TEMPLATE)
    tokenizer.save_pretrained(tiny.model)
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = tiny_config("trained", vocab_size=len(tokenizer), **tokens)
    model_of(config).save_pretrained(tiny.model)
    rng = random.Random(0)
    write_jsonl(tiny.data / "train.jsonl", [_sum(rng) for _ in range(22)])
    write_jsonl(tiny.data / "test.jsonl", [_sum(rng) for _ in range(5)])
    return tiny


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    """Write one JSON object per line; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@contextmanager
def joined() -> Iterator[None]:
    """Many calls of ``main`` share one process group, as joining takes longer than most of them."""
    with mock.patch.object(train, "leave_distributed"):
        try:
            yield
        finally:
            leave_distributed()


def mains(*commands: list[str]) -> str:
    """Run command lines one after another, for ``run_ranks``; returns what this rank prints."""
    with joined(), redirect_stdout(StringIO()) as out:
        for flags in commands:
            train.main(flags)
    return out.getvalue()


@contextmanager
def one_rank() -> Iterator[None]:
    """``main`` may be called in this process; what it changes there ends with the block."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with mock.patch.dict(os.environ):
        for name in VARIABLES:
            os.environ.pop(name, None)
        try:
            with joined():
                yield
        finally:
            torch.set_num_threads(num_threads)


def _sum(rng: random.Random) -> dict[str, object]:
    a, b = rng.randint(1, 99), rng.randint(1, 99)
    return {"question": f"What is {a} and {b}?", "answer": f"{a}+{b}={a + b}\n#### {a + b}"}
