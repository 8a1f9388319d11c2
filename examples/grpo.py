r"""Reinforcement learning of a mask with TRL's GRPO, from a reward that is a function.

    python examples/grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --mask mask.safetensors \
        --data questions.jsonl --output_dir runs/grpo

``questions.jsonl`` has a ``prompt`` and its ``answer`` on each line. The mask is one of supervised
fine-tuning (``launch/train.py --max_steps 0``, or the first half of examples/sft.py).
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

import gem_ds

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", required=True)
parser.add_argument("--mask", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--output_dir", required=True)
parser.add_argument("--learning_rate", type=float, default=1e-3)
parser.add_argument("--max_steps", type=int, default=-1)
parser.add_argument("--max_completion_length", type=int, default=256)
flags = parser.parse_args()


def reward(completions: list[str], answer: list[str], **others: object) -> list[float]:
    """The share of the answer's words that the completion has."""
    pairs = [
        (set(text.split()), set(a.split())) for text, a in zip(completions, answer, strict=True)
    ]
    return [len(words & wanted) / len(wanted) for words, wanted in pairs]


args = GRPOConfig(
    output_dir=flags.output_dir,
    learning_rate=flags.learning_rate,
    max_steps=flags.max_steps,
    max_completion_length=flags.max_completion_length,
    beta=0.04,
    logging_steps=1,
    use_cpu=not torch.cuda.is_available(),
)
trainer = GRPOTrainer(
    AutoModelForCausalLM.from_pretrained(flags.model),
    reward,
    args=args,
    train_dataset=load_dataset("json", data_files=flags.data, split="train"),
    peft_config=gem_ds.GemConfig(mask=flags.mask),
)
trainer.train()
trainer.save_model()
