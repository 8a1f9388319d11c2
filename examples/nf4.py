r"""A mask on a base of 4 bits: half a byte a weight, and fp32 values at the entries.

    python examples/nf4.py --model Qwen/Qwen2.5-0.5B --mask mask.safetensors \
        --data train.jsonl --output_dir runs/nf4

``train.jsonl`` has a ``prompt`` and a ``completion`` on each line. The mask is one of the model as
it is on disk (``launch/train.py --max_steps 0``). Needs bitsandbytes.
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import gem_ds

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", required=True)
parser.add_argument("--mask", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--output_dir", required=True)
parser.add_argument("--learning_rate", type=float, default=3e-3)
parser.add_argument("--max_steps", type=int, default=-1)
flags = parser.parse_args()

nf4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
model = AutoModelForCausalLM.from_pretrained(flags.model, quantization_config=nf4)
args = SFTConfig(
    output_dir=flags.output_dir,
    learning_rate=flags.learning_rate,
    max_steps=flags.max_steps,
    per_device_train_batch_size=8,
    logging_steps=1,
    use_cpu=not torch.cuda.is_available(),
)
data = load_dataset("json", data_files=flags.data, split="train")

trainer = SFTTrainer(model, args, train_dataset=data, peft_config=gem_ds.GemConfig(mask=flags.mask))
trainer.train()
trainer.save_model()
