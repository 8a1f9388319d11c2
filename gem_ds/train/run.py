"""One training run, from its preparation to its results: what is made for it, in which order."""

import math
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

from gem_ds.data.batches import Batches, SummedLoss, permutation
from gem_ds.data.dataset import Dataset
from gem_ds.data.packing import pack, refuse_leaking_rows
from gem_ds.distributed.comm import Comm
from gem_ds.models.blocks import enable_checkpointing
from gem_ds.models.load import DTYPES, load_for_training
from gem_ds.models.loss import answer_loss_of, summed_answer_loss
from gem_ds.models.router_loss import refuse_silent_routers, with_router_loss
from gem_ds.select.rules import RULES, SPARSE_METHODS
from gem_ds.sparse.layer_draws import LayerDraws
from gem_ds.sparse.sam import Sam
from gem_ds.train.checkpoints import Checkpoints
from gem_ds.train.dense_tuning import DenseTuning
from gem_ds.train.fit import fit, mean_loss
from gem_ds.train.methods import product_of
from gem_ds.train.optimizer import make_scheduler
from gem_ds.train.output_dir import refuse_taken_checkpoints
from gem_ds.train.prepare import PreparedRun
from gem_ds.train.reporting import Reporter, peak_memory_bytes
from gem_ds.train.results import measure, save_results, try_to_report
from gem_ds.train.resume import batch_size_of_flags, initial_state
from gem_ds.train.schedule import Schedule
from gem_ds.train.sparse_tuning import SparseTuning
from gem_ds.train.summary import describe


class Run:
    """Model, engine, data and progress of one run; ``kind`` makes what is trained of the model."""

    def __init__(
        self, prepared: PreparedRun, comm: Comm, kind: Callable[..., Any] | None = None
    ) -> None:
        self.prepared, self.args, self.comm = prepared, prepared.args, comm
        self.started = time.perf_counter()
        self.train_batches = self.batches(prepared.data.train)
        test = prepared.data.test
        self.held_out = self.batches(test, held_out=True) if len(test) else None
        with comm.in_unison():
            self.state, self.changes = initial_state(
                self.args.train, prepared.checkpoint, self.train_batches.steps_per_epoch
            )
        with comm.agreement():
            if comm.is_main:
                steps = range(self.state.global_step + 1, self.state.max_steps + 1)
                refuse_taken_checkpoints(prepared.output_dir, steps)
        train, model_args = self.args.train, self.args.model
        model, head = load_for_training(
            str(model_args.model_name_or_path),
            prepared.config,
            prepared.deepspeed,
            comm,
            dtype=DTYPES[train.dtype],
            seed=train.seed,
            revision=model_args.revision,
            trust_remote_code=model_args.trust_remote_code,
            attn_implementation=model_args.attn_implementation,
        )
        if train.gradient_checkpointing:
            enable_checkpointing(model)
        if kind is None:
            is_sparse = self.args.method.method in SPARSE_METHODS
            kind = SparseTuning if is_sparse else DenseTuning
        with comm.in_unison():
            self.tuning: SparseTuning | DenseTuning = kind(prepared, model, head, comm)
        self.engine = self.tuning.engine
        num_updates = prepared.checkpoint.num_updates if prepared.checkpoint else 0
        self.scheduler = make_scheduler(
            train, self.engine.optimizer, self.state.max_steps, num_updates
        )
        self.checkpoints = Checkpoints(prepared, self.tuning, self.state, comm)
        self.is_stopped = False
        self.step_seconds: list[float] = []

    @property
    def sparse(self) -> SparseTuning | None:
        """What is trained, where it is entries of frozen weights."""
        return self.tuning if isinstance(self.tuning, SparseTuning) else None

    def run(self) -> dict[str, Any]:
        """Select what is trained, train it, write the results."""
        train = self.args.train
        if self.args.data.packing:
            vocab_size = self.prepared.config.get_text_config().vocab_size
            for size in {train.per_device_train_batch_size, train.per_device_eval_batch_size}:
                with self.comm.in_unison():
                    refuse_leaking_rows(self.engine.model, self.comm.device, vocab_size, size)
        self.summed_loss = self.settled_loss()
        self.trained_loss = with_router_loss(self.summed_loss, self.engine.model)
        if self.trained_loss is not self.summed_loss:
            with self.comm.in_unison():
                refuse_silent_routers(self.engine.model, self.comm.device)
        if self.sparse is not None:
            self.sparse.start(self.calibration_batches(), self.trained_loss)
        with self.comm.agreement():
            reporter = Reporter(
                self.prepared.output_dir, self.state, self.args, is_main=self.comm.is_main
            )
        with closing(reporter):
            self.describe(reporter)
            if self.state.max_steps == 0:
                reporter.say(
                    f"Wrote the mask to {self.prepared.output_dir}; --max_steps 0 stops here"
                )
                return {}
            return self.train(reporter)

    def settled_loss(self) -> SummedLoss:
        """The objective's loss; that of written answers without whole logits, where this can be."""
        summed_loss = self.prepared.objective.summed_loss
        if summed_loss is not summed_answer_loss:
            return summed_loss
        return answer_loss_of(self.engine.model, self.comm)

    def batches(
        self, dataset: Dataset, *, held_out: bool = False, one_by_one: bool = False
    ) -> Batches:
        """A dataset as this rank's batches, in the sizes of training or of evaluation.

        Or with one example in each micro-batch. Whatever order is trained in, held-out examples of
        about one length share a batch.
        """
        train, data = self.args.train, self.args.data
        num_rows = self.prepared.identity.global_batch_size
        size = train.per_device_train_batch_size
        if held_out:
            size = train.per_device_eval_batch_size
            num_rows = size * self.comm.world_size
        return Batches(
            pack(dataset, data.max_length) if data.packing and not one_by_one else dataset,
            self.comm,
            global_batch_size=num_rows,
            micro_batch_size=1 if one_by_one else size,
            seed=train.seed,
            pad_token_id=self.prepared.pad_token_id,
            group_by_length=held_out or data.train_sampling_strategy == "group_by_length",
        )

    def calibration_batches(self) -> Batches:
        """The first examples of the shuffled order."""
        examples = self.prepared.data.train
        order = permutation(len(examples), self.args.train.seed, epoch=0)
        method = self.args.method
        return self.batches(
            examples.select(order[: method.calibration_examples].tolist()),
            one_by_one=RULES[method.method].is_by_example,
        )

    def describe(self, reporter: Reporter) -> None:
        """Say what will be trained and on what, and where the run begins."""
        prepared = self.prepared
        for note in prepared.data.notes:
            reporter.say(note)
        numbers = describe(self.tuning, reporter.say)
        if self.summed_loss is summed_answer_loss:
            reporter.say(
                "This model's logits are more than a product of its output layer, so those of many "
                "tokens of a micro-batch stand in memory at once"
            )
        if self.trained_loss is not self.summed_loss:
            reporter.say(
                "The routers' auxiliary loss is trained on too, as output_router_logits in the "
                "model's config.json asks; the held-out loss is without it"
            )
        if cut := prepared.data.train.num_truncated:
            reporter.say(
                f"{cut:,} of {len(prepared.data.train):,} training examples are cut at "
                f"--max_length {self.args.data.max_length}"
            )
        if prepared.checkpoint is None:
            self.log(reporter, numbers)
            return
        batch_size = prepared.identity.global_batch_size
        now = batch_size_of_flags(self.args.train, self.comm.world_size)
        reporter.say(
            f"Resuming at step {self.state.global_step} of {self.state.max_steps} with "
            f"{batch_size} examples per step, as before"
            + (f", not the {now} of the flags" if now != batch_size else "")
        )
        if self.changes:
            reporter.say(f"Going on with {', '.join(self.changes)}")

    def train(self, reporter: Reporter) -> dict[str, Any]:
        """Step, log, evaluate, save; then write what a finished run leaves."""
        train, state = self.args.train, self.state
        schedule = Schedule(
            train=train,
            max_steps=state.max_steps,
            steps_per_epoch=self.train_batches.steps_per_epoch,
            is_sparse=self.sparse is not None,
        )
        # At the beginning, and where a signal came before the evaluation that was due.
        if schedule.evaluates_after(state.global_step) and not self.is_evaluated():
            self.evaluate(reporter)
        reporter.start()
        for step in fit(
            self.engine,
            [] if self.sparse is None else self.sparse.parts,
            self.train_batches,
            self.trained_loss,
            self.scheduler,
            state,
            seed=train.seed,
            sam=self.sam(),
        ):
            self.checkpoints.delete_old()
            reporter.advance(step.loss, step.num_tokens, step.seconds)
            self.step_seconds.append(step.seconds)
            if schedule.logs_after(state.global_step):
                numbers = {"learning_rate": step.learning_rate}
                if step.grad_norm is not None and math.isfinite(step.grad_norm):
                    numbers["grad_norm"] = float(step.grad_norm)
                self.log(reporter, reporter.averages() | numbers | self.numbers())
            is_stopped = step.is_stopping and state.global_step < state.max_steps
            if schedule.evaluates_after(state.global_step) and not is_stopped:
                self.evaluate(reporter)
            saves = schedule.saves_after(state.global_step)
            if saves or step.is_stopping or self.checkpoints.is_best():
                self.checkpoints.save()
        if state.global_step < state.max_steps:
            self.is_stopped = True
            reporter.say(
                f"Stopped by a signal after step {state.global_step}; go on with "
                "--resume_from_checkpoint last"
            )
            return {}
        return self.finish(reporter)

    def sam(self) -> Sam | None:
        """Sharpness-aware minimization, where it is asked for; the state keeps what draws layers.

        Where a run has not drawn so far, its layers have had all its updates.
        """
        train, state = self.args.train, self.state
        if not train.sam_rho:
            return None
        if not train.sam_layers or self.sparse is None:
            return Sam(train.sam_rho)
        counts = [index.numel() for index in self.sparse.entries.flat_indices]
        state.layer_probabilities = state.layer_probabilities or [
            train.sam_layers if count else 0.0 for count in counts
        ]
        state.layer_updates = state.layer_updates or [self.engine.num_updates] * len(counts)
        draws = LayerDraws(
            state.layer_probabilities, state.layer_updates, train.sam_layers, train.seed
        )
        return Sam(train.sam_rho, draws)

    def evaluate(self, reporter: Reporter) -> None:
        """Log the held-out loss, where examples are held out."""
        if (batches := self.held_out) is None:
            return
        with closing(reporter.progress("Held-out loss", batches.steps_per_epoch, "batch")) as bar:
            loss = mean_loss(self.engine, batches, self.summed_loss, bar.advance)
        metrics = {}
        best = self.checkpoints.best
        if best and best.is_metric:
            metrics = measure(self.prepared, self.engine.model, self.comm, is_final=False)
        metrics = {f"eval_{name}": value for name, value in metrics.items()}
        self.log(reporter, {"eval_loss": loss} | metrics)

    def is_evaluated(self) -> bool:
        """Whether the held-out loss of this step is known."""
        step = self.state.global_step
        return any(e["step"] == step and "eval_loss" in e for e in self.state.log_history)

    def numbers(self) -> dict[str, float]:
        """How many of the selected weights have changed so far, as a share."""
        return {"changed_share": self.sparse.changed_share()} if self.sparse else {}

    def log(self, reporter: Reporter, entry: dict[str, float]) -> None:
        """Log on all ranks; where the file cannot be written, all of them stop."""
        with self.comm.agreement():
            reporter.log(entry)

    def finish(self, reporter: Reporter) -> dict[str, Any]:
        """Write the weights, the state, the results and the model card; returns the results."""
        delivered = self.checkpoints.load_best(reporter.say)
        results: dict[str, Any] = {
            "num_trainable": self.tuning.num_trainable,
            "num_parameters": self.prepared.targets.num_parameters,
            "global_step": self.state.global_step,
            "calibration_seconds": round(getattr(self.sparse, "calibration_seconds", 0.0), 3),
            "seconds_per_step": round(statistics.median(self.step_seconds or [0.0]), 4),
            "optimizer_state_bytes": self.engine.optimizer_state_bytes(),
            "peak_memory_bytes": self.comm.largest(peak_memory_bytes(self.engine.device)),
            "runtime_seconds": round(time.perf_counter() - self.started, 1),
        } | self.numbers()
        if self.checkpoints.best is not None:
            results["best_global_step"] = delivered
        history = [entry for entry in self.state.log_history if entry["step"] <= delivered]
        for key in ("loss", "eval_loss"):
            if values := [entry[key] for entry in history if key in entry]:
                results |= {f"first_{key}": values[0], f"last_{key}": values[-1]}
        self.tuning.save_weights()  # first: a measurement that fails costs no training
        if metrics := measure(self.prepared, self.engine.model, self.comm):
            results["eval_metrics"] = metrics
            told = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            reporter.say(f"Held-out examples: {told}")
        with self.comm.agreement():
            if self.comm.is_main:
                save_results(self.prepared, self.state, results)
        base = None if self.sparse is None else self.sparse.whole_base()
        if self.comm.is_main:
            try_to_report(self.prepared.output_dir, base)
        self.checkpoints.delete_old()
        product = product_of(self.args.method.method)
        reporter.say(f"Wrote the {product} and the results to {self.prepared.output_dir}")
        return results
