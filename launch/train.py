"""Fine-tune a causal language model with GEM: what `deepspeed` runs.

    deepspeed launch/train.py --deepspeed ds_configs/zero3.json --model_name_or_path M \
        --task gsm8k --output_dir O

    text -> data -> calibrate (scores -> budget -> selection) -> fit -> delta

Under plain `python` it runs in one process. What can be refused is refused before the weights are
loaded, on all ranks together.
"""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import Any

import transformers
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import get_scheduler

from gem_ds.batches import Batches
from gem_ds.calibrate import calibrate
from gem_ds.checkpoint import Checkpoint, TrainerState
from gem_ds.comm import Comm, PeerError
from gem_ds.data import refuse_leaking_rows
from gem_ds.encode import EncodedDataset
from gem_ds.entries import SelectedEntries, gather_indices
from gem_ds.files import sentence_of
from gem_ds.fit import Intervals, fit, log_together, mean_loss
from gem_ds.loss import summed_answer_loss
from gem_ds.mask import Mask, WeightInfo, checksum, dtype_name
from gem_ds.optim import SparseAdamW
from gem_ds.reporting import Reporter, budget_table, effective_layers
from gem_ds.selection import Selection
from gem_ds.sparse import TargetLayers
from gem_ds.targets import targets_of
from gem_ds.zero import Engine, init_distributed, leave_distributed
from launch.arguments import Arguments, parse_arguments
from launch.model import load_model
from launch.output_dir import make_output_dir
from launch.prepare import Plan, batch_size_of_flags, prepare
from launch.results import save_results

#: A selected weight below this is reported as nearly zero (a pretrained weight is about 0.02).
NEARLY_ZERO = 1e-4


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run one training and return its results (the content of all_results.json).

    Raises:
        ValueError, OSError: bad input or a failed run, in one sentence. On ranks that only follow
            another one's failure, :class:`gem_ds.comm.PeerError`.
    """
    transformers.utils.logging.set_verbosity_error()
    comm = init_distributed()
    try:
        with comm.agreement():
            args = parse_arguments(sys.argv[1:] if argv is None else argv)
            plan = prepare(args, comm.world_size)
        with comm.in_unison():
            refuse_other_plans(plan, comm)
        with comm.agreement():
            if comm.is_main:
                make_output_dir(plan.output_dir, overwrite=args.train.overwrite_output_dir)
        if args.train.disable_tqdm or not comm.is_main:
            transformers.utils.logging.disable_progress_bar()
        results = Run(args, plan, comm).run()
    except (ValueError, OSError, PeerError):
        leave_distributed()  # after any other error a peer may wait, and leaving would wait for it
        raise
    leave_distributed()
    return results


def refuse_other_plans(plan: Plan, comm: Comm) -> None:
    """Refuse ranks that have read different files.

    Raises:
        ValueError: on all ranks alike.
    """
    digest = plan.digest()
    if comm.any(comm.broadcast_object(digest) != digest):
        raise ValueError(
            "The ranks do not see the same run: give all nodes the same data, mask, checkpoint and "
            "DeepSpeed JSON."
        )


class Run:
    """One training run: what is made for it, in the order in which it is made."""

    def __init__(self, args: Arguments, plan: Plan, comm: Comm) -> None:
        self.args, self.plan, self.comm = args, plan, comm
        self.started = time.perf_counter()
        model = load_model(args, plan.config, plan.deepspeed, comm)
        self.layers = TargetLayers(model, targets_of(model, plan.targets), plan.total)
        self.engine = Engine(model, self.layers.gate, make_optimizer(args), plan.deepspeed, comm)
        self.train_batches = self.batches(plan.train, plan.global_batch_size)
        self.state = initial_state(args, plan, self.train_batches.steps_per_epoch)
        self.scheduler = make_scheduler(
            args,
            self.engine.optimizer,
            self.state.max_steps,
            plan.checkpoint.num_updates if plan.checkpoint else 0,
        )

    def run(self) -> dict[str, float]:
        """Calibrate or take up a mask, train, write the results."""
        train = self.args.train
        if self.args.data.packing:
            for size in (train.per_device_train_batch_size, train.per_device_eval_batch_size):
                with self.comm.in_unison():
                    refuse_leaking_rows(
                        self.engine.model,
                        self.comm.device,
                        self.plan.config.get_text_config().vocab_size,
                        size,
                    )
        selection = self.calibrate() if self.plan.mask is None else None
        self.take_up_entries(selection)
        with self.comm.agreement():
            reporter = Reporter(
                self.plan.output_dir,
                self.state,
                is_main=self.comm.is_main,
                tensorboard=train.report_to == "tensorboard",
                show_bar=not train.disable_tqdm,
            )
        with closing(reporter):
            self.describe(selection, reporter)
            if self.state.max_steps == 0:
                reporter.say(f"Wrote the mask to {self.plan.output_dir}; --max_steps 0 stops here")
                return {}
            return self.train(reporter)

    def batches(self, dataset: EncodedDataset, global_batch_size: int | None = None) -> Batches:
        """A dataset as batches; for evaluation and calibration one micro-batch per step."""
        train = self.args.train
        size = train.per_device_train_batch_size
        if global_batch_size is None:
            size = train.per_device_eval_batch_size
        return Batches(
            dataset,
            self.comm,
            global_batch_size=global_batch_size or size * self.comm.world_size,
            micro_batch_size=size,
            seed=train.seed,
            pad_token_id=self.plan.pad_token_id,
            max_row_length=self.args.data.max_length if self.args.data.packing else None,
        )

    def calibrate(self) -> Selection:
        """Score and select, on the first examples of the shuffled order."""
        examples = self.plan.train
        order = Batches.example_order(len(examples), self.args.train.seed)
        count = min(self.args.gem.calibration_examples or len(examples), len(examples))
        batches = self.batches(
            examples.select(order[:count]),
            self.args.train.per_device_train_batch_size * self.comm.world_size,
        )
        with tqdm(
            total=batches.steps_per_epoch,
            desc="Calibrating",
            unit="batch",
            disable=self.args.train.disable_tqdm or not self.comm.is_main,
            dynamic_ncols=True,
        ) as bar:
            return calibrate(
                self.engine,
                self.layers,
                batches,
                summed_answer_loss,
                self.plan.total,
                progress=bar.update,
            )

    def take_up_entries(self, selection: Selection | None) -> None:
        """Set masters and weights to the start, or to where the checkpoint stopped."""
        plan = self.plan
        if selection is not None:
            indices = gather_indices(selection.indices, self.comm)
        else:
            assert plan.mask is not None
            indices = [plan.mask.indices[layer.name] for layer in self.layers]
        self.entries = SelectedEntries(self.engine, self.layers, indices)
        self.base = self.entries.start_from_weights().cpu()
        self.unchecked: list[str] = []
        if plan.mask is not None:
            with self.comm.in_unison():
                self.unchecked = plan.mask.check_base(self.entries.split(self.base))
        self.mask = self.make_mask()
        if plan.checkpoint is not None:
            self.engine.set_state(plan.checkpoint.vectors, plan.checkpoint.num_updates)
            self.engine.loss_scale = plan.checkpoint.loss_scale
            self.entries.write_back()
        with self.comm.agreement():
            if self.comm.is_main:
                self.mask.save(plan.output_dir / "mask.safetensors")

    def make_mask(self) -> Mask:
        """The mask of this run's base model, with what a later user needs to know of it."""
        args, base = self.args, self.entries.split(self.base)
        settings = {
            "density": str(args.gem.density),
            "task": args.data.task,
            "calibration_examples": args.gem.calibration_examples or len(self.plan.train),
            "max_length": args.data.max_length,
            "seed": args.train.seed,
        }
        return Mask(
            indices={
                layer.name: index.cpu()
                for layer, index in zip(self.layers, self.entries.flat_indices, strict=True)
            },
            weights={
                layer.name: WeightInfo(
                    shape=layer.shape,
                    dtype=dtype_name(self.engine.dtype),
                    checksum=checksum(base[layer.name]),
                )
                for layer in self.layers
            },
            base_model=str(args.model.model_name_or_path),
            revision=args.model.revision,
            settings=settings if self.plan.mask is None else self.plan.mask.settings,
        )

    def describe(self, selection: Selection | None, reporter: Reporter) -> None:
        """Say what will be trained, and record how the selection lies."""
        plan, entries = self.plan, self.entries
        budgets = [index.numel() for index in entries.flat_indices]
        near_zero = int((self.base.float().abs() < NEARLY_ZERO).sum())
        effective = effective_layers(budgets)
        if selection is not None:
            numels, scores = selection.numels, selection.statistics.score
            rows = list(zip(selection.names, numels, budgets, scores, strict=True))
            reporter.say(f"Where the budget went:\n{budget_table(rows)}")
        if self.unchecked:
            reporter.say(
                f"The mask was made in another dtype than {dtype_name(self.engine.dtype)}, so the "
                f"base values of {len(self.unchecked)} weights could not be compared"
            )
        if cut := plan.train.num_truncated:
            reporter.say(
                f"{cut:,} of {len(plan.train):,} training answers are cut at --max_length "
                f"{self.args.data.max_length}"
            )
        reporter.say(
            f"Training {plan.total:,} of {plan.num_parameters:,} parameters "
            f"(density {plan.total / plan.num_parameters:.4%}); optimizer state on this rank: "
            f"{self.engine.optimizer_state_bytes():,} bytes"
        )
        reporter.say(
            f"The budget is as concentrated as if {effective:.1f} of the {len(budgets)} layers "
            "shared it equally; "
            f"{near_zero:,} selected weights are nearly zero (below {NEARLY_ZERO:g})"
        )
        if plan.checkpoint is None:
            shape = {"effective_layers": effective, "selected_near_zero": near_zero}
            log_together(reporter, self.comm, shape)
        else:
            now = batch_size_of_flags(self.args, self.comm.world_size)
            reporter.say(
                f"Resuming at step {self.state.global_step} of {self.state.max_steps} with "
                f"{plan.global_batch_size} examples per step, as before"
                + (f", not the {now} of the flags" if now != plan.global_batch_size else "")
            )

    def train(self, reporter: Reporter) -> dict[str, float]:
        """Fit, and write what a finished run leaves."""
        test = self.batches(self.plan.test) if len(self.plan.test) else None

        def evaluate() -> dict[str, float]:
            assert test is not None
            return {"eval_loss": mean_loss(self.entries, test, summed_answer_loss)}

        if test is not None and self.state.global_step == 0:
            log_together(reporter, self.comm, evaluate())
        train, epoch = self.args.train, self.train_batches.steps_per_epoch
        finished = fit(
            self.entries,
            self.train_batches,
            summed_answer_loss,
            self.scheduler,
            self.state,
            seed=train.seed,
            intervals=Intervals(
                log=train.logging_steps,
                evaluate=(train.eval_steps or epoch) if test is not None else None,
                save=train.save_steps or epoch,
            ),
            reporter=reporter,
            evaluate=evaluate,
            save=self.save_checkpoint,
            log_extra=lambda: {"changed_share": self.changed_share()},
        )
        if not finished:
            reporter.say(
                f"Stopped by SIGTERM after step {self.state.global_step}; go on with "
                "--resume_from_checkpoint last"
            )
            return {}
        return self.finish(reporter)

    def changed_share(self) -> float:
        """Share of the selected weights that differ from the base in the model's dtype."""
        values = self.engine.gather_values().cpu()
        return (values != self.base).double().mean().item()

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the present state; called on all ranks."""
        vectors = self.engine.get_state()
        with self.comm.agreement():
            if self.comm.is_main:
                Checkpoint(
                    mask=self.mask,
                    vectors=vectors,
                    num_updates=self.engine.num_updates,
                    loss_scale=self.engine.loss_scale,
                    identity=self.plan.identity,
                    state=self.state,
                ).save(self.plan.output_dir, self.args.train.save_total_limit)

    def finish(self, reporter: Reporter) -> dict[str, float]:
        """Write delta, state, results and model card; returns the results."""
        results = {
            "num_selected": self.plan.total,
            "num_parameters": self.plan.num_parameters,
            "changed_share": self.changed_share(),
            "global_step": self.state.global_step,
            "runtime_seconds": round(time.perf_counter() - self.started, 1),
        }
        history = self.state.log_history
        for key in ("loss", "eval_loss"):
            values = [entry[key] for entry in history if key in entry]
            if values:
                results |= {f"first_{key}": values[0], f"last_{key}": values[-1]}
        trained = self.entries.split(self.engine.gather_values().cpu())
        with self.comm.agreement():
            if self.comm.is_main:
                save_results(self.args, self.plan, self.mask, trained, self.state, results)
        reporter.say(f"Wrote the delta and the results to {self.plan.output_dir}")
        return results


def make_optimizer(args: Arguments) -> Any:
    """What makes the optimizer of the selected values."""
    train = args.train
    return partial(
        SparseAdamW,
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        weight_decay=train.weight_decay,
    )


def make_scheduler(
    args: Arguments, optimizer: SparseAdamW, max_steps: int, num_updates: int
) -> LambdaLR:
    """The learning-rate schedule of transformers that the flags name, after ``num_updates``."""
    warmup = args.train.warmup_steps
    schedule = get_scheduler(
        args.train.lr_scheduler_type,
        optimizer,
        num_warmup_steps=round(warmup * max_steps if warmup < 1 else warmup),
        num_training_steps=max_steps,
    )
    return LambdaLR(optimizer, schedule.lr_lambdas, last_epoch=num_updates - 1)


def initial_state(args: Arguments, plan: Plan, steps_per_epoch: int) -> TrainerState:
    """Progress at the start of this session."""
    state = plan.checkpoint.state if plan.checkpoint else TrainerState()
    state.max_steps = args.train.max_steps
    if state.max_steps < 0:
        state.max_steps = math.ceil(args.train.num_train_epochs * steps_per_epoch)
    return state


def run_as_program() -> int:
    """Run :func:`main` as a command: errors end in one sentence and a non-zero status."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, to each other
    try:
        main()
    except PeerError:
        return 1
    except (ValueError, OSError) as error:
        rank = int(os.environ.get("RANK", 0))
        place = f"On rank {rank}: " if rank else ""
        print(f"Error: {place}{sentence_of(error)}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_as_program())
