"""A mask in a training loop of one's own: select, train, save, load; nothing but PyTorch and peft.

    python examples/own_loop.py --model Qwen/Qwen2.5-0.5B --data train.jsonl --output_dir runs/loop

``train.jsonl`` has a ``prompt`` and a ``completion`` on each line.
"""

# %% What is trained, and on what
import argparse
import json

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import gem_ds

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--output_dir", required=True)
parser.add_argument("--density", default="0.001")
parser.add_argument("--num_steps", type=int, default=100)
flags = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(flags.model)
model = AutoModelForCausalLM.from_pretrained(flags.model).to(device)


def encode(line: str) -> dict[str, torch.Tensor]:
    """One example as a batch of one; the prompt is not learnt."""
    example = json.loads(line)
    prompt = tokenizer(example["prompt"]).input_ids
    ids = tokenizer(example["prompt"] + example["completion"]).input_ids
    ids.append(tokenizer.eos_token_id)
    labels = [-100] * len(prompt) + ids[len(prompt) :]
    return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}


with open(flags.data, encoding="utf-8") as file:
    batches = [{k: v.to(device) for k, v in encode(line).items()} for line in file]

# %% Select the entries by the model's own loss, and train them
mask = gem_ds.select_mask(model, batches[:64], density=flags.density)
print(mask)
model = get_peft_model(model, gem_ds.GemConfig(mask=mask))
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
for step in range(flags.num_steps):
    loss = model(**batches[step % len(batches)]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step}: loss {loss.item():.4f}")

# %% Save it, and load it onto the base again
model.save_pretrained(flags.output_dir)
base = AutoModelForCausalLM.from_pretrained(flags.model).to(device)
model = PeftModel.from_pretrained(base, flags.output_dir).merge_and_unload()
