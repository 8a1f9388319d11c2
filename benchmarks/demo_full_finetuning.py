"""Full fine-tuning of the embedded model on its task, for comparison with `make demo`.

    python benchmarks/demo_full_finetuning.py --learning_rate 5e-4 --output_dir runs/demo_full

Plain torch: every parameter trains, with AdamW and the demo's batches, steps, clipping and
schedule, in one process. The result is an ordinary Hugging Face folder, which
`python -m eval.gsm8k` evaluates as it does the demo's.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from eval import gsm8k
from gem_ds.batches import Batches
from gem_ds.comm import Comm
from gem_ds.loss import summed_answer_loss
from gem_ds.tasks import load_task
from gem_ds.texts import EncodedDataset
from launch.arguments import parse_arguments

RECIPE = "launch/recipes/demo.yaml"
NUM_RANKS = 2  # of the demo, whose global batch this keeps


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--output_dir", default="runs/demo_full")
    flags = parser.parse_args(argv)
    args = parse_arguments(["--config", RECIPE, "--output_dir", flags.output_dir])
    folder, train = str(args.model.model_name_or_path), args.train

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = load_task(str(args.data.task), data_dir=args.data.data_dir).train
    batches = Batches(
        EncodedDataset.encode(examples, tokenizer, args.data.max_length),
        Comm(torch.device("cpu")),
        global_batch_size=train.per_device_train_batch_size * NUM_RANKS,
        micro_batch_size=train.per_device_train_batch_size * NUM_RANKS,
        seed=train.seed,
        pad_token_id=tokenizer.pad_token_id,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=flags.learning_rate, weight_decay=0.0)
    num_steps = math.ceil(train.num_train_epochs * batches.steps_per_epoch)
    scheduler = get_scheduler(
        train.lr_scheduler_type,
        optimizer,
        num_warmup_steps=int(train.warmup_steps),
        num_training_steps=num_steps,
    )
    for step in tqdm(range(num_steps), desc="Full fine-tuning", unit="step"):
        for batch in batches.micro_batches(step):
            (summed_answer_loss(model, batch) / batches.weight(step)).backward()
        clip_grad_norm_(model.parameters(), train.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model.save_pretrained(f"{flags.output_dir}/model")
    tokenizer.save_pretrained(f"{flags.output_dir}/model")
    gsm8k.main(
        [
            *("--model_name_or_path", f"{flags.output_dir}/model"),
            *("--data_dir", str(args.data.data_dir)),
            *("--output_dir", f"{flags.output_dir}/eval", "--overwrite_output_dir"),
            *("--max_new_tokens", "48"),
        ]
    )


if __name__ == "__main__":
    main()
