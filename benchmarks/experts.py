"""Experts as targets against attention alone, at equal K, on a small mixture of experts.

    PYTHONPATH=. python benchmarks/experts.py --output_dir runs/experts

Pretrains a mixture (Qwen3-MoE, 8 experts a block of which a token passes through 2, no balancing
loss) on the text of launch/demo/corpus.py, and fine-tunes it on the demo's task. Contenders differ
in their targets, and in what is a matrix to scores and budgets: that of each expert, or the whole
parameter of all of them, which here alone can be had. Each is given the rate, of as many for every
contender, at which the first seed's loss on held-out training examples is lowest; then three seeds
are scored on the test examples, by strict-match and by the answers' loss.

Also writes how tokens are routed, and which share of the budget each expert gets. Runs whose
results stand in the folder are not made again.

Results: ``benchmarks/experts.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from steps import flags_of
from steps.table import markdown
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import gem_ds
from gem_ds.evaluate import gsm8k
from gem_ds.select import selection, zeros
from launch.demo.pretrain import pretrain, save

DEMO = Path("launch/demo")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SEEDS = (42, 43, 44)
FLAGS: dict[str, Any] = {
    "task": "gsm8k",  # the form of the files; the problems are our own
    "data_dir": DEMO / "task",
    "max_length": 96,
    "density": "0.02",  # so small a model needs more than the usual 0.001
    "calibration_examples": 256,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 100,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 2,
    "lr_scheduler_type": "linear",
    "warmup_steps": 8,
    "save_strategy": "no",
    "disable_tqdm": True,
}


@dataclass(frozen=True)
class Contender:
    """Targets, and whether each expert's matrix is a layer of its own to scores and budgets."""

    targets: list[str]
    by_expert: bool = True


CONTENDERS = {
    "query and value": Contender(["q_proj", "v_proj"]),
    "attention": Contender(ATTENTION),
    "experts": Contender(["experts"]),
    "experts, by parameter": Contender(["experts"], by_expert=False),
}
RATES = (1e-2, 3e-2, 9e-2, 2.7e-1)


def main(argv: Sequence[str] | None = None) -> None:
    """Pretrain, search rates, score, and print the tables."""
    parser = flags_of("experts", __doc__)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1600, help="of pretraining")
    parser.add_argument("--rows", type=int, default=12, help="of 256 tokens a step")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="of pretraining")
    parser.add_argument("--seed", type=int, default=17, help="of pretraining")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = args.output_dir / "model"
    if not model.exists():
        make_mixture(model, args)
    rows = [row_of(args.output_dir, name) for name in args.contenders]
    table = f"{markdown(rows)}\n\n{markdown(list(routing_rows(args.output_dir)))}\n"
    (args.output_dir / "experts.md").write_text(table)
    print(table)


def make_mixture(folder: Path, args: argparse.Namespace) -> None:
    """Pretrain the mixture and save it, with the embedded model's tokenizer."""
    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO / "model")
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        moe_intermediate_size=128,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos")},
    )
    config._experts_implementation = "eager"  # the one that autocast knows
    torch.manual_seed(args.seed)
    model: Any = AutoModelForCausalLM.from_config(config)
    for step, loss in enumerate(pretrain(model, tokenizer, args), start=1):
        if step % 50 == 0 or step == args.steps:
            print(f"step {step} loss {loss:.4f}", flush=True)
    save(model, tokenizer, folder)


def row_of(folder: Path, name: str) -> dict[str, str]:
    """A contender's results, in words."""
    search = {rate: result_of(folder, name, rate, SEEDS[0], "dev") for rate in RATES}
    rate = min(search, key=lambda rate: search[rate]["loss"])
    results = [result_of(folder, name, rate, seed, "test") for seed in SEEDS]

    def told(key: str, form: str) -> str:
        values = [result[key] for result in results]
        several = ", ".join(format(value, form) for value in values)
        return f"{statistics.mean(values):{form}} ({several})"

    return {
        "targets": name,
        "K": f"{results[0]['num_trainable']:,}",
        "of the targets' entries": f"{results[0]['share']:.1%}",
        "rate": f"{rate:g}",
        "losses of the search": ", ".join(f"{found['loss']:.3f}" for found in search.values()),
        "strict-match (three seeds)": told("score", ".1%"),
        "loss of the answers": told("loss", ".4f"),
    }


def result_of(folder: Path, name: str, rate: float, seed: int, split: str) -> dict[str, Any]:
    """Train a contender, if that has not been done, and score it on a split."""
    run = folder / "runs" / name / f"{split}_lr{rate:g}_seed{seed}"
    path = run.with_name(f"{run.name}.json")
    if not path.exists():
        contender, model = CONTENDERS[name], folder / "model"
        own = {"model_name_or_path": model, "output_dir": run, "target_modules": contender.targets}
        own |= {"learning_rate": rate, "seed": seed, "dev_examples": 200, "evaluate_on": split}
        with ExitStack() as stack:
            if not contender.by_expert:
                stack.enter_context(whole_parameters())
            trained = gem_ds.finetune(**FLAGS, **own, overwrite_output_dir=True)
        mask = gem_ds.Mask.load(run / "mask.safetensors")
        found = {
            "loss": trained.results["last_eval_loss"],
            "num_trainable": mask.num_selected,
            "share": mask.num_selected / sum(math.prod(w.shape) for w in mask.weights.values()),
            "score": None if split == "dev" else exact_match(model, run),
        }
        path.write_text(json.dumps(found))
        print(name, rate, seed, split, found, flush=True)
    result: dict[str, Any] = json.loads(path.read_text())
    return result


@contextmanager
def whole_parameters() -> Iterator[None]:
    """Scores and budgets take a parameter for one matrix, however many experts it holds."""
    with ExitStack() as stack:
        for module in (selection, zeros):
            stack.enter_context(mock.patch.object(module, "matrices", lambda shard: [shard]))
        yield


def exact_match(model: Path, run: Path) -> float:
    """The share of the test examples that is right, by strict-match."""
    flags = ["--model_name_or_path", model, "--delta", run / "delta.safetensors"]
    flags += ["--data_dir", DEMO / "task", "--output_dir", run / "eval", "--batch_size", 100]
    flags += ["--max_new_tokens", 48, "--dtype", "float32", "--disable_tqdm"]
    results = gsm8k.main(list(map(str, [*flags, "--overwrite_output_dir"])))
    return float(results["exact_match"]["strict-match"]["accuracy"])


def routing_rows(folder: Path) -> Iterator[dict[str, str]]:
    """By block: which shares of the task's tokens experts see, and of the budget they get."""
    shares = routed_shares(folder / "model")
    masks = next((folder / "runs" / "experts").glob(f"test_*seed{SEEDS[0]}/mask.safetensors"), None)
    mask = None if masks is None else gem_ds.Mask.load(masks)
    for block, share in enumerate(shares):
        row = {"block": str(block), "share of the routed tokens, by expert": _percents(share)}
        if mask is not None:
            counts = torch.zeros(len(share))
            for name, index in mask.indices.items():
                if f".{block}." in name:
                    size = math.prod(mask.weights[name].shape[1:])
                    counts += torch.bincount(index.long() // size, minlength=len(share))
            row["share of the block's budget"] = _percents(counts / counts.sum())
            row["their correlation"] = f"{torch.corrcoef(torch.stack([share, counts]))[0, 1]:.2f}"
        yield row


@torch.no_grad()
def routed_shares(folder: Path) -> list[Tensor]:
    """Of each block the share of the training examples' tokens that each expert sees."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lines = (DEMO / "task" / "train.jsonl").read_text().splitlines()[:500]
    counts = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    for row in map(json.loads, lines):
        ids = tokenizer(f"Question: {row['question']}\nAnswer: {row['answer']}")["input_ids"]
        found = model(input_ids=torch.tensor([ids]), output_router_logits=True).router_logits
        for count, logits in zip(counts, found, strict=True):
            chosen = logits.topk(model.config.num_experts_per_tok).indices.flatten()
            count += torch.bincount(chosen, minlength=len(count))
    return list(counts / counts.sum(dim=1, keepdim=True))


def _percents(shares: Tensor) -> str:
    return " ".join(f"{100 * share:.0f}" for share in shares.tolist())


if __name__ == "__main__":
    main()
