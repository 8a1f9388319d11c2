"""What calibration and selection cost: beside the frozen model's passes over the same examples.

    python benchmarks/calibration.py [--shape opt-125m] [--batches 8] [--rounds 5]

One process holds both: the trainer's model, whose target layers form their dense gradients, and a
plain copy, frozen, whose backward goes to the output of the input embedding, as it must for any
method that adapts the first layer. They take turns, by chance; both have the trainer's loss.
Selection is timed on the way. A cell holds the median, and the 95 % interval of the median over
rounds (bootstrap); ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from steps import flags_of
from steps.shapes import SHAPES, made_weights
from steps.table import markdown
from steps.training import Training
from steps.turns import interval, seconds, take_turns
from transformers import AutoModelForCausalLM, PretrainedConfig

from gem_ds.calibration import calibrate as calibration
from gem_ds.data.batches import Batches, SummedLoss
from gem_ds.distributed.process_group import init_distributed, leave_distributed
from gem_ds.train.arguments import parse_arguments
from gem_ds.train.prepare import prepare
from gem_ds.train.run import Run


def frozen_passes(model: Any, batches: Batches, summed_loss: SummedLoss) -> None:
    """Forward and backward over all examples; no weight has a gradient."""
    for step in range(batches.steps_per_epoch):
        for batch in batches.micro_batches(step):
            summed_loss(model, batch).backward()


def frozen_copy(folder: Path, config: PretrainedConfig, like: Any) -> Any:
    """A second model of the same shape, without the trainer's layers."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=like.dtype)
    model.to(like.device)
    model.requires_grad_(False).eval()
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda _m, _i, output: output.requires_grad_())
    return model


def parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = flags_of("calibration", __doc__)
    parser.add_argument("--shape", choices=SHAPES, default="opt-125m")
    parser.add_argument("--layers", type=int, help="of the model (default: the shape's own)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=4, help="sequences")
    parser.add_argument("--tokens", type=int, default=512, help="of a sequence")
    parser.add_argument("--makes_weights", action="store_true", help="as benchmarks/step.py")
    parser.add_argument("--rounds", type=int, default=5)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table."""
    args = parser().parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    names = ("shape", "layers", "dtype", "batches", "batch_size", "tokens", "makes_weights")
    training = Training(**{name: getattr(args, name) for name in names})
    found = _seconds(training, args.rounds)
    ratio = interval(found["calibration and selection"] / found["frozen model"])
    rows = [
        {"": name, "seconds": "{:.2f} ({:.2f} to {:.2f})".format(*interval(values))}
        for name, values in found.items()
    ]
    size = f"{args.batches} batches of {args.batch_size} x {args.tokens} tokens"
    print(f"{args.shape}, {args.dtype}, {size}\n\n{markdown(rows)}\n")
    print(
        "Calibration and selection, of the frozen model: {:.3f} ({:.3f} to {:.3f})".format(*ratio)
    )


def _seconds(training: Training, rounds: int) -> dict[str, np.ndarray]:
    """By what is timed, [rounds]."""
    comm = init_distributed()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = training.flags(["gem"], folder)["gem"]
        run_args = parse_arguments([*flags, "--output_dir", str(folder / "run")])
        prepared = prepare(run_args, comm.world_size)
        with made_weights(folder / "model", comm.device):
            run = Run(prepared, comm)
            tuning: Any = run.tuning
            frozen = frozen_copy(folder / "model", prepared.config, tuning.engine.model)
        batches, summed_loss = run.calibration_batches(), run.settled_loss()
        selecting: list[float] = []

        def calibrate() -> float:
            engine, layers, gradients = tuning.engine, tuning.layers, list[torch.Tensor]()
            summing = seconds(
                lambda: gradients.extend(
                    calibration.sum_gradients(engine, layers, batches, summed_loss)
                )
            )
            budget = prepared.targets.budget
            selecting.append(seconds(lambda: calibration.select(engine, layers, gradients, budget)))
            return summing + selecting[-1]

        found = take_turns(
            {
                "frozen model": lambda: seconds(
                    lambda: frozen_passes(frozen, batches, summed_loss)
                ),
                "calibration and selection": calibrate,
            },
            rounds,
        )
    leave_distributed()
    return found | {"of it selection": np.array(selecting[1:])}


if __name__ == "__main__":
    main()
