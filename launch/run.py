"""One training run, from the plan to the results: what is made for it, and in which order."""

from __future__ import annotations

import math
import time
from contextlib import closing
from typing import Any

from torch import Tensor
from tqdm import tqdm

from eval.predictions import metrics_of, save_predictions
from gem_ds.batches import Batches
from gem_ds.calibrate import calibrate
from gem_ds.checkpoint import Checkpoint, TrainerState, delete_old_checkpoints
from gem_ds.comm import Comm
from gem_ds.data import Dataset, permutation
from gem_ds.entries import SelectedEntries, gather_indices
from gem_ds.fit import StepResult, fit, mean_loss
from gem_ds.mask import Mask, dtype_name
from gem_ds.packing import PackedDataset, refuse_leaking_rows
from gem_ds.predict import predict_all
from gem_ds.reporting import Reporter
from gem_ds.selection import Selection
from gem_ds.sparse import TargetLayers
from gem_ds.summary import NEARLY_ZERO, budget_table, changed_share, selection_shape
from gem_ds.targets import targets_of
from gem_ds.texts import EncodedDataset
from gem_ds.zero import Engine
from launch.arguments import Arguments
from launch.model import load_model
from launch.optimizer import make_optimizer, make_scheduler
from launch.prepare import Plan, batch_size_of_flags
from launch.results import make_mask, save_results


class Run:
    """Model, engine, data and progress of one run.

    Attributes:
        entries: what is trained, once it is selected.
        base: [K] on the CPU, the selected weights before training, in the model's dtype.
        mask: the same entries as the file that a later user reads.
    """

    entries: SelectedEntries
    base: Tensor
    mask: Mask

    def __init__(self, args: Arguments, plan: Plan, comm: Comm) -> None:
        self.args, self.plan, self.comm = args, plan, comm
        self.started = time.perf_counter()
        self.train_batches = self.batches(
            plan.data.train, plan.global_batch_size, args.train.per_device_train_batch_size
        )
        with comm.in_unison():
            self.state = self.initial_state()
        model, self.head = load_model(args, plan.config, plan.deepspeed, comm)
        self.layers = TargetLayers(model, targets_of(model, plan.targets), plan.total)
        optimizer = make_optimizer(args.train)
        self.engine = Engine(model, self.layers.gate, optimizer, plan.deepspeed, comm)
        self.scheduler = make_scheduler(
            args.train,
            self.engine.optimizer,
            self.state.max_steps,
            plan.checkpoint.num_updates if plan.checkpoint else 0,
        )
        self.has_unproven_checkpoint = False

    def run(self) -> dict[str, Any]:
        """Calibrate or take up a mask, train, write the results."""
        train = self.args.train
        if self.args.data.packing:
            for size in {train.per_device_train_batch_size, train.per_device_eval_batch_size}:
                vocab_size = self.plan.config.get_text_config().vocab_size
                with self.comm.in_unison():
                    refuse_leaking_rows(self.engine.model, self.comm.device, vocab_size, size)
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

    def batches(self, dataset: Dataset, global_batch_size: int, micro_batch_size: int) -> Batches:
        """A dataset as this rank's batches."""
        if self.args.data.packing:
            assert isinstance(dataset, EncodedDataset), "launch.data refuses to pack others"
            dataset = PackedDataset.pack(dataset, self.args.data.max_length)
        return Batches(
            dataset,
            self.comm,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            seed=self.args.train.seed,
            pad_token_id=self.plan.pad_token_id,
        )

    def initial_state(self) -> TrainerState:
        """Progress at the start: none, or the checkpoint's.

        Raises:
            ValueError: the checkpoint is further than the run should go.
        """
        train = self.args.train
        state = self.plan.checkpoint.state if self.plan.checkpoint else TrainerState()
        state.max_steps = train.max_steps
        if state.max_steps < 0:
            state.max_steps = math.ceil(train.num_train_epochs * self.train_batches.steps_per_epoch)
        if state.global_step > state.max_steps:
            raise ValueError(
                f"The checkpoint stands at step {state.global_step} and the flags end the run at "
                f"step {state.max_steps}: raise --max_steps or --num_train_epochs."
            )
        return state

    def calibrate(self) -> Selection:
        """Score and select, on the first examples of the shuffled order."""
        examples, size = self.plan.data.train, self.args.train.per_device_train_batch_size
        order = permutation(len(examples), self.args.train.seed, epoch=0)
        chosen = examples.select(order[: self.args.gem.calibration_examples].tolist())
        batches = self.batches(chosen, size * self.comm.world_size, size)
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
                self.plan.objective.summed_loss,
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
        if plan.mask is not None:
            with self.comm.in_unison():
                plan.mask.check_base(self.entries.split(self.base))
        self.mask = make_mask(self.args, plan, self.entries, self.base)
        if plan.checkpoint is not None:
            self.engine.set_state(plan.checkpoint.vectors, plan.checkpoint.num_updates)
            self.engine.loss_scale = plan.checkpoint.loss_scale
            self.entries.write_back()
        with self.comm.agreement():
            if self.comm.is_main:
                self.mask.save(plan.output_dir / "mask.safetensors")

    def describe(self, selection: Selection | None, reporter: Reporter) -> None:
        """Say what will be trained, and record how the selection lies."""
        plan = self.plan
        budgets = [index.numel() for index in self.entries.flat_indices]
        shape = selection_shape(budgets, self.base)
        if selection is not None:
            scores = selection.statistics.score
            rows = zip(selection.names, selection.numels, budgets, scores, strict=True)
            reporter.say(f"Where the budget went:\n{budget_table(rows)}")
        if plan.mask is not None and (other := plan.mask.dtype) != dtype_name(self.engine.dtype):
            reporter.say(
                f"The mask was made in {other} and this run is in {dtype_name(self.engine.dtype)}, "
                "so it could not be checked that the base values are the same"
            )
        if cut := plan.data.train.num_truncated:
            reporter.say(
                f"{cut:,} of {len(plan.data.train):,} training examples are cut at --max_length "
                f"{self.args.data.max_length}"
            )
        reporter.say(
            f"Training {plan.total:,} of {plan.num_parameters:,} parameters "
            f"(density {plan.total / plan.num_parameters:.4%}); optimizer state on this rank: "
            f"{self.engine.optimizer_state_bytes():,} bytes"
        )
        reporter.say(
            f"The budget is as concentrated as if {shape['effective_layers']:.1f} of the "
            f"{len(budgets)} layers shared it equally; {shape['selected_near_zero']:,} selected "
            f"weights are nearly zero (below {NEARLY_ZERO:g})"
        )
        if plan.checkpoint is None:
            self.log(reporter, shape)
        else:
            now = batch_size_of_flags(self.args, self.comm.world_size)
            reporter.say(
                f"Resuming at step {self.state.global_step} of {self.state.max_steps} with "
                f"{plan.global_batch_size} examples per step, as before"
                + (f", not the {now} of the flags" if now != plan.global_batch_size else "")
            )

    def train(self, reporter: Reporter) -> dict[str, Any]:
        """Step, log, evaluate, save; then write what a finished run leaves."""
        train, state = self.args.train, self.state
        epoch = self.train_batches.steps_per_epoch
        size = train.per_device_eval_batch_size
        test = (
            self.batches(self.plan.data.test, size * self.comm.world_size, size)
            if len(self.plan.data.test)
            else None
        )

        def evaluate() -> None:
            if test is not None:
                loss = mean_loss(self.entries, test, self.plan.objective.summed_loss)
                self.log(reporter, {"eval_loss": loss})

        if state.global_step == 0:
            evaluate()
        reporter.start()
        for step in fit(
            self.entries,
            self.train_batches,
            self.plan.objective.summed_loss,
            self.scheduler,
            state,
            seed=train.seed,
        ):
            self.delete_old_checkpoints()
            reporter.advance(step.loss, step.num_tokens, step.seconds)
            if self.is_due(train.logging_steps):
                self.log(reporter, reporter.averages() | self.numbers_of(step))
            if self.is_due(train.eval_steps or epoch) and not step.is_stopping:
                evaluate()
            if step.is_stopping or self.is_due(train.save_steps or epoch):
                self.save_checkpoint()
        if state.global_step < state.max_steps:
            reporter.say(
                f"Stopped by SIGTERM after step {state.global_step}; go on with "
                "--resume_from_checkpoint last"
            )
            return {}
        return self.finish(reporter)

    def is_due(self, interval: int) -> bool:
        """Whether what happens every ``interval`` steps, and at the end, happens now."""
        step = self.state.global_step
        return step % interval == 0 or step == self.state.max_steps

    def numbers_of(self, step: StepResult) -> dict[str, float]:
        """What the log tells of the present step beside the averages."""
        numbers = {"learning_rate": step.learning_rate}
        if step.grad_norm is not None and math.isfinite(step.grad_norm):
            numbers["grad_norm"] = step.grad_norm
        return numbers | {"changed_share": self.changed_share()}

    def log(self, reporter: Reporter, entry: dict[str, float]) -> None:
        """Log on all ranks; where the file cannot be written, all of them stop."""
        with self.comm.agreement():
            reporter.log(entry)

    def changed_share(self) -> float:
        """Share of the selected weights that training has changed so far."""
        return changed_share(self.engine.gather_values().cpu(), self.base)

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
                ).save(self.plan.output_dir)
        self.has_unproven_checkpoint = True

    def delete_old_checkpoints(self) -> None:
        """Keep to ``--save_total_limit``, once the newest checkpoint's weights have borne a step.

        Until its loss and gradient were finite, the one before may be the last good one.
        """
        limit = self.args.train.save_total_limit
        if limit is None or not self.has_unproven_checkpoint:
            return
        with self.comm.agreement():
            if self.comm.is_main:
                delete_old_checkpoints(self.plan.output_dir, limit)
        self.has_unproven_checkpoint = False

    def measure(self) -> dict[str, float]:
        """The task's metrics of the trained model; writes each prediction. None for written ones.

        All ranks call this together.
        """
        plan, data = self.plan, self.plan.data
        if plan.objective.predictor is None or not data.questions:
            return {}
        predictions = predict_all(
            self.engine.model,
            data.questions,
            plan.objective.predictor.predict,
            self.comm,
            batch_size=self.args.train.per_device_eval_batch_size,
            pad_token_id=plan.pad_token_id,
        )
        with self.comm.agreement():
            if self.comm.is_main:
                save_predictions(plan.output_dir, data.references, predictions)
            return metrics_of(str(self.args.data.task), data.references, predictions)

    def finish(self, reporter: Reporter) -> dict[str, Any]:
        """Write delta, state, results and model card; returns the results."""
        results: dict[str, Any] = {
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
        if metrics := self.measure():
            results["eval_metrics"] = metrics
            told = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            reporter.say(f"Held-out examples: {told}")
        trained = self.entries.split(self.engine.gather_values().cpu())
        with self.comm.agreement():
            if self.comm.is_main:
                save_results(self.args, self.plan, self.mask, trained, self.state, results)
        self.delete_old_checkpoints()
        reporter.say(f"Wrote the delta and the results to {self.plan.output_dir}")
        return results
