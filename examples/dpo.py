r"""Preference optimization of a mask with TRL: the disabled adapter is the reference model.

    python examples/dpo.py --model Qwen/Qwen2.5-0.5B-Instruct --data pairs.jsonl \
        --output_dir runs/dpo

``pairs.jsonl`` has a ``prompt``, a ``chosen`` and a ``rejected`` answer on each line.
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

import gem_ds

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--output_dir", required=True)
parser.add_argument("--density", default="0.001")
parser.add_argument("--learning_rate", type=float, default=1e-3)
parser.add_argument("--max_steps", type=int, default=-1)
flags = parser.parse_args()

args = DPOConfig(
    output_dir=flags.output_dir,
    learning_rate=flags.learning_rate,
    max_steps=flags.max_steps,
    per_device_train_batch_size=8,
    logging_steps=1,
    use_cpu=not torch.cuda.is_available(),
)
model = AutoModelForCausalLM.from_pretrained(flags.model)
data = load_dataset("json", data_files=flags.data, split="train")

mask = gem_ds.select_mask_with(
    DPOTrainer(model, args=args, train_dataset=data), 16, density=flags.density
)
print(mask)
trainer = DPOTrainer(model, args=args, train_dataset=data, peft_config=gem_ds.GemConfig(mask=mask))
trainer.train()
trainer.save_model()
