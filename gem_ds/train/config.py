"""What the command line takes: plain values.

The ``help`` of a field is its documentation, its type says what is allowed. Names are those of
transformers' ``TrainingArguments`` wherever it has one, but for ``optimizer`` (``optim`` there).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from gem_ds.data.tasks import task_names
from gem_ds.distributed.watchdog import DEFAULT_SECONDS
from gem_ds.distributed.zero_config import Dtype
from gem_ds.flags import option
from gem_ds.select.zeros import PRUNED_SHARE
from gem_ds.train.methods import METHODS, methods_help

SddmmKernel = Literal["auto", "dense", "tiled", "gather", "library", "triton"]

#: The schedules of transformers that are functions of the step alone.
SCHEDULES = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial"),
    *("constant", "constant_with_warmup", "inverse_sqrt"),
)

DEFAULT_DENSITY = "0.001"
DEFAULT_HEAD_STEPS = 100
DEFAULT_LEARNING_RATE = 1e-3
DEFAULT_LEARNING_RATE_OF_FULL = 5e-5  # that of transformers


@dataclass(frozen=True)
class Limit:
    """What a flag's value must be: in words, and whether it holds. None is no value."""

    words: str
    holds: Callable[[Any], bool]


def _one_of(names: tuple[str, ...]) -> Limit:
    return Limit(f"one of {', '.join(names)}", lambda name: name in names)


_INFINITY = float("inf")
_NOT_NEGATIVE = Limit("a finite number of at least 0", lambda value: 0 <= value < _INFINITY)


def _is_buffer_size(text: str) -> bool:
    try:
        return text == "auto" or _NOT_NEGATIVE.holds(float(text))
    except ValueError:
        return False


Count = Annotated[int, Limit("at least 1", lambda count: count >= 1)]
CountFromZero = Annotated[int, _NOT_NEGATIVE]
Amount = Annotated[float, _NOT_NEGATIVE]
Positive = Annotated[float, Limit("above 0", lambda value: 0 < value < _INFINITY)]
Share = Annotated[float, Limit("at least 0 and below 1", lambda share: 0 <= share < 1)]
Steps = Annotated[int, Limit("-1 (use epochs) or at least 0", lambda steps: steps >= -1)]
BufferSize = Annotated[str, Limit(f"{_NOT_NEGATIVE.words}, or auto", _is_buffer_size)]
Schedule = Annotated[str, _one_of(SCHEDULES)]
Method = Annotated[str, _one_of(METHODS)]
OptimizerName = Annotated[str, _one_of(("adamw", "adamw_8bit"))]


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """The base model."""

    model_name_or_path: str | None = option(
        None, "Hub id or folder of the pretrained model: a causal language model or an encoder."
    )
    revision: str | None = option(None, "Revision of the model on the Hub.")
    trust_remote_code: bool = option(False, "Run model code that comes with the weights.")
    attn_implementation: str | None = option(
        None, "Attention kernel, for instance sdpa or flash_attention_2 (default: the model's own)."
    )


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """The task and its examples."""

    task: str | None = option(
        None,
        f"What to train on: {', '.join(task_names())} (jsonl, your own data, is the default where "
        "--train_file or --dataset_name is given).",
    )
    data_dir: str | None = option(
        None, "Folder with the task's files; without it the task is loaded from the Hub."
    )
    train_file: str | None = option(None, "With --task jsonl: the training file.")
    test_file: str | None = option(None, "With --task jsonl: the held-out file.")
    dataset_name: str | None = option(
        None, "Instead of files: your data set's id on the Hub, or a folder that datasets loads."
    )
    dataset_config_name: str | None = option(
        None, "With --dataset_name: which of its configurations."
    )
    prompt_field: str | None = option(None, "With --task jsonl: the field that holds the prompt.")
    target_field: str | None = option(None, "With --task jsonl: the field that holds the target.")
    train_on: Literal["all", "last"] | None = option(
        None, "Of your own conversations: learn all answers, or the last (default: all)."
    )
    max_length: Count = option(1024, "Tokens of prompt and answer; longer answers are cut.")
    long_prompts: Literal["drop", "truncate_left", "error"] = option(
        "drop",
        "What becomes of an example whose prompt leaves no room for an answer within --max_length: "
        "drop leaves it out and says how many there were, truncate_left cuts the prompt at its "
        "start, error ends the run and names the line.",
    )
    packing: bool = option(
        False, "Let several examples share one sequence; attention stays within each."
    )
    train_sampling_strategy: Literal["random", "group_by_length"] = option(
        "random",
        "Order of the examples: random, or group_by_length, where those of a step are of about the "
        "same length and little is padded.",
    )
    classification_loss: Literal["tokens", "candidates"] = option(
        "tokens",
        "What a causal model learns of a classification task: to write the right candidate, or to "
        "rank it above the others.",
    )
    train_examples: Count | None = option(
        None, "Train on so many examples only; which ones does not depend on the seed."
    )
    dev_examples: CountFromZero = option(
        0, "Take so many training examples as a development set; the same ones for every seed."
    )
    max_eval_samples: Count | None = option(
        None, "Measure the held-out loss and the metrics on the first so many examples only."
    )
    evaluate_on: Literal["test", "dev"] | None = option(
        None,
        "What the held-out loss and the metrics are measured on (default: test, where the task has "
        "held-out examples).",
    )


@dataclass(frozen=True, kw_only=True)
class MethodArguments:
    """What is trained."""

    method: Method = option("gem", f"How to fine-tune: {methods_help()}.")
    density: str | None = option(
        None,
        "Sparse methods and shira: share of the model's parameters that is trained, in (0, 1] "
        f"(default: {DEFAULT_DENSITY}).",
    )
    lora_r: Count = option(8, "With --method lora: rank of the update.")
    lora_alpha: Amount = option(16.0, "With --method lora: the update is scaled by this over r.")
    lora_dropout: Share = option(0.0, "With --method lora: dropout before the update.")
    target_modules: list[str] | None = option(
        None,
        "Module-name suffixes (q_proj v_proj), one regular expression over whole module names, or "
        "all-linear (default: the query and value projections of the architecture).",
        nargs="+",
    )
    calibration_examples: Count | None = option(
        None,
        "Calibrated methods: look at the first N examples of the shuffled order (default: all).",
    )
    calibration_head_steps: CountFromZero | None = option(
        None,
        "Calibrated methods on an encoder: first train its head alone for so many steps on the "
        "calibration examples, so that gradients are not those of a random head; training itself "
        f"starts from the head's first values all the same (default: {DEFAULT_HEAD_STEPS}).",
    )
    calibration_buffer_gb: BufferSize | None = option(
        None,
        "Calibrated methods: keep whole gradients of as many layers as fit in so many gigabytes "
        "(10^9 bytes) per rank, beside the statistics; they cross the network once, those of the "
        "other layers with every micro-batch. auto: half of the memory that is free (default: 0).",
    )
    keep_zeros: bool | None = option(
        None,
        "Sparse methods: select no weight that is exactly 0, so that the zeros of a pruned model "
        "survive the training (default: where a target matrix has more than "
        f"{PRUNED_SHARE:.0%}% of them).",
        nargs="?",
        const=True,
    )
    mask: str | None = option(None, "Train the entries of this mask.safetensors; no calibration.")
    sddmm_kernel: SddmmKernel = option(
        "auto",
        "Sparse methods: how the gradient at the selected entries is computed. dense makes a "
        "layer's whole gradient, tiled a few rows of it at a time, gather and library the selected "
        "entries alone, as does triton (needs a GPU); auto takes for each layer what should be the "
        "fastest.",
    )

    @property
    def head_steps(self) -> int:
        """Steps of a head alone before the calibration."""
        given = self.calibration_head_steps
        return DEFAULT_HEAD_STEPS if given is None else given

    @property
    def fixed_buffer_gb(self) -> float | None:
        """``--calibration_buffer_gb`` as a number; None where it follows from what is free."""
        given = self.calibration_buffer_gb
        return None if given == "auto" else float(given or 0)


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """The training run."""

    output_dir: str | None = option(None, "Where everything is written.")
    overwrite_output_dir: bool = option(False, "Delete the run that output_dir holds.")
    resume_from_checkpoint: str | None = option(
        None, "A checkpoint folder, or last for the newest one in output_dir."
    )
    deepspeed: str | None = option(None, "DeepSpeed JSON (default: ZeRO stage 0).")
    local_rank: int = option(-1, "Set by the deepspeed launcher.")
    watchdog_seconds: Amount = option(
        DEFAULT_SECONDS,
        "Several ranks: end all when a process of theirs is stopped, dead or cut off for so long; "
        "0 waits for it.",
    )
    per_device_train_batch_size: Count = option(8, "Examples per rank and micro-batch.")
    per_device_eval_batch_size: Count = option(8, "The same for held-out examples.")
    gradient_accumulation_steps: Count = option(1, "Micro-batches per rank and step.")
    num_train_epochs: float = option(3.0, "Passes over the training set.")
    max_steps: Steps = option(
        -1, "Steps instead of epochs; 0 calibrates, writes the mask and stops."
    )
    optimizer: OptimizerName = option(
        "adamw", "adamw, or with --method full adamw_8bit (needs bitsandbytes and a GPU)."
    )
    learning_rate: Amount | None = option(
        None,
        f"Peak learning rate (default: {DEFAULT_LEARNING_RATE:g}, with --method full "
        f"{DEFAULT_LEARNING_RATE_OF_FULL:g}).",
    )
    head_learning_rate: Amount = option(
        1e-3,
        "Peak learning rate of an encoder's head, pooler and classifier, which is trained whole.",
    )
    weight_decay: Amount = option(0.0, "Decoupled weight decay of the selected weights.")
    adam_beta1: Share = option(0.9, "Decay of the first moment.")
    adam_beta2: Share = option(0.999, "Decay of the second moment.")
    adam_epsilon: Positive = option(1e-8, "Added to the root of the second moment.")
    max_grad_norm: Amount = option(
        1.0, "Largest norm of the gradient; a larger one is scaled down to it, 0 turns this off."
    )
    sam_rho: Amount = option(
        0.0,
        "Sparse methods: take the gradient where the loss is largest nearby, at weights that are "
        "moved by so much along it (sharpness-aware minimization, arXiv 2010.01412, which takes "
        "0.05); a second forward and backward in each step. 0 turns this off.",
    )
    sam_layers: Share = option(
        0.0,
        "With --sam_rho: for each step draw about this share of the target matrices, by their "
        "gradients' norms, and perturb and update these alone (Sparse-Layer SAM, arXiv 2602.09395, "
        "which takes 0.2). 0 takes all.",
    )
    lr_scheduler_type: Schedule = option("linear", f"One of {', '.join(SCHEDULES)}.")
    warmup_steps: Amount = option(
        0, "Steps of warmup; a value below 1 is a share of all steps, as --warmup_ratio would be."
    )
    seed: int = option(42, "Seeds the order of the data and dropout.")
    bf16: bool = option(False, "Weights and activations in bfloat16; masters stay fp32.")
    fp16: bool = option(False, "Weights and activations in float16 with loss scaling.")
    tf32: bool = option(
        False, "On a GPU, TF32 for products of fp32 matrices: faster, with 10 bits of mantissa."
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass.")
    logging_steps: Count = option(10, "Log every so many steps.")
    eval_strategy: Literal["no", "steps", "epoch"] | None = option(
        None,
        "When the held-out loss is measured: before training and every --eval_steps or each epoch, "
        "or never; a task's metrics are measured once at the end all the same (default: steps "
        "where --eval_steps is given, else epoch).",
    )
    eval_steps: Count | None = option(
        None, "Held-out loss every so many steps (default: each epoch, else --logging_steps)."
    )
    save_strategy: Literal["no", "steps", "epoch"] | None = option(
        None,
        "When checkpoints are written: every --save_steps (500 if it is not given), each epoch, or "
        "never but at a SIGTERM (default: steps where --save_steps is given, else epoch; no with "
        "methods that train whole parameters).",
    )
    save_steps: Count | None = option(None, "Steps between checkpoints (see --save_strategy).")
    save_total_limit: Count | None = option(None, "Keep only the newest checkpoints.")
    load_best_model_at_end: bool = option(
        False,
        "Deliver the best of the models that were measured on held-out examples "
        "after a step, not the last; each new best one gets a checkpoint, which stays.",
    )
    metric_for_best_model: str | None = option(
        None,
        "What is best: eval_loss, or a metric of the task that needs no generation, such as "
        "accuracy, which is then measured with each held-out loss (default: eval_loss).",
    )
    greater_is_better: bool | None = option(
        None, "Whether more of it is better (default: yes, unless its name ends in loss)."
    )
    report_to: list[str] = option(
        ["none"],
        "Trackers: none, all that are installed, or some of tensorboard, wandb, trackio, mlflow, "
        "comet_ml, clearml, aim, dvclive, swanlab; metrics.jsonl is written always.",
        nargs="+",
    )
    disable_tqdm: bool = option(False, "No progress bar, nor its lines in a log file.")

    @property
    def dtype(self) -> Dtype:
        """fp32, bf16 or fp16."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Everything that the user said."""

    model: ModelArguments = ModelArguments()
    data: DataArguments = DataArguments()
    method: MethodArguments = MethodArguments()
    train: TrainArguments = TrainArguments()
    notes: list[str] = field(default_factory=list)  # how what was said was read, a line each

    def values(self) -> dict[str, Any]:
        """All flags by name."""
        return vars(self.model) | vars(self.data) | vars(self.method) | vars(self.train)
