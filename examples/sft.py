"""Supervised fine-tuning of a mask with TRL, the loss on completions alone.

    python examples/sft.py --model Qwen/Qwen2.5-0.5B --data train.jsonl --output_dir runs/sft

``train.jsonl`` has a ``prompt`` and a ``completion`` on each line.
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

import gem_ds

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--output_dir", required=True)
parser.add_argument("--density", default="0.001")
parser.add_argument("--learning_rate", type=float, default=3e-3)
parser.add_argument("--max_steps", type=int, default=-1)
flags = parser.parse_args()

args = SFTConfig(
    output_dir=flags.output_dir,
    learning_rate=flags.learning_rate,
    max_steps=flags.max_steps,
    per_device_train_batch_size=8,
    logging_steps=1,
    use_cpu=not torch.cuda.is_available(),
)
model = AutoModelForCausalLM.from_pretrained(flags.model)
data = load_dataset("json", data_files=flags.data, split="train")

# Where to train: the entries whose gradient is largest, by 16 of the trainer's own batches.
trainer = SFTTrainer(model, args, train_dataset=data)
mask = gem_ds.select_mask_with(trainer, 16, density=flags.density)
print(mask)

trainer = SFTTrainer(model, args, train_dataset=data, peft_config=gem_ds.GemConfig(mask=mask))
trainer.train()
trainer.save_model()  # an adapter's folder: adapter_config.json, adapter_model.safetensors
