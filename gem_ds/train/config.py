"""What the command line takes: plain values, no torch.

The ``help`` of a field is its documentation.

Names are those of transformers' ``TrainingArguments`` wherever it has one, but for ``optimizer``,
which is ``optim`` there and takes other values. The dataclasses become flags through
``HfArgumentParser``; a recipe (YAML, flag name to value) gives defaults that flags override.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from gem_ds.select.methods import DENSE_METHODS, METHODS, SPARSE_METHODS

Dtype = Literal["fp32", "bf16", "fp16"]
SddmmKernel = Literal["auto", "dense", "tiled", "gather", "library", "triton"]

#: The schedules of transformers that are functions of the step alone.
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)

DEFAULT_DENSITY = "0.001"
DEFAULT_HEAD_STEPS = 100
DEFAULT_LEARNING_RATE = 1e-3
DEFAULT_LEARNING_RATE_OF_FULL = 5e-5  # that of transformers

OPTIMIZERS = ("adamw", "adamw_8bit")


def _option(default: Any, text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text, **metadata})


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """The base model."""

    model_name_or_path: str | None = _option(
        None, "Hub id or folder of the pretrained model: a causal language model or an encoder."
    )
    revision: str | None = _option(None, "Revision of the model on the Hub.")
    trust_remote_code: bool = _option(False, "Run model code that comes with the weights.")
    attn_implementation: str | None = _option(
        None, "Attention kernel, for instance sdpa or flash_attention_2 (default: the model's own)."
    )


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """The task and its examples."""

    task: str | None = _option(
        None,
        "What to train on: gsm8k, mbpp, squad; of GLUE cola, sst2, mrpc, stsb, qqp, mnli (or "
        "mnli_mismatched, held out that is), qnli, rte, wnli; of SuperGLUE boolq, cb, copa, "
        "multirc, record, rte, wic, wsc; or jsonl for your own file.",
    )
    data_dir: str | None = _option(
        None, "Folder with the task's files; without it the task is loaded from the Hub."
    )
    train_file: str | None = _option(None, "With --task jsonl: the training file.")
    test_file: str | None = _option(None, "With --task jsonl: the held-out file.")
    prompt_field: str | None = _option(None, "With --task jsonl: the field that holds the prompt.")
    target_field: str | None = _option(None, "With --task jsonl: the field that holds the target.")
    max_length: int = _option(1024, "Tokens of prompt and answer; longer answers are cut.")
    packing: bool = _option(
        False, "Let several examples share one sequence; attention stays within each."
    )
    train_sampling_strategy: Literal["random", "group_by_length"] = _option(
        "random",
        "Order of the examples: random, or group_by_length, where those of a step are of about the "
        "same length and little is padded.",
    )
    classification_loss: Literal["tokens", "candidates"] = _option(
        "tokens",
        "What a causal model learns of a classification task: to write the right candidate, or to "
        "rank it above the others.",
    )
    train_examples: int | None = _option(
        None, "Train on so many examples only; which ones does not depend on the seed."
    )
    dev_examples: int = _option(
        0, "Take so many training examples as a development set; the same ones for every seed."
    )
    evaluate_on: Literal["test", "dev"] | None = _option(
        None,
        "What the held-out loss and the metrics are measured on (default: test, where the task has "
        "held-out examples).",
    )


@dataclass(frozen=True, kw_only=True)
class MethodArguments:
    """What is trained."""

    method: str = _option(
        "gem",
        "How to fine-tune: gem; its ablations ratio, gradient, entropy_gradient, magnitude, random;"
        " supertuning; or full, bitfit, lora, ia3, shira.",
    )
    density: str | None = _option(
        None,
        "Sparse methods and shira: share of the model's parameters that is trained, in (0, 1] "
        f"(default: {DEFAULT_DENSITY}).",
    )
    lora_r: int = _option(8, "With --method lora: rank of the update.")
    lora_alpha: float = _option(16.0, "With --method lora: the update is scaled by this over r.")
    lora_dropout: float = _option(0.0, "With --method lora: dropout before the update.")
    target_modules: list[str] | None = _option(
        None,
        "Module-name suffixes (q_proj v_proj), one regular expression over whole module names, or "
        "all-linear (default: the query and value projections of the architecture).",
        nargs="+",
    )
    calibration_examples: int | None = _option(
        None,
        "Calibrated methods: look at the first N examples of the shuffled order (default: all).",
    )
    calibration_head_steps: int | None = _option(
        None,
        "Calibrated methods on an encoder: first train its head alone for so many steps on the "
        "calibration examples, so that gradients are not those of a random head; training itself "
        f"starts from the head's first values all the same (default: {DEFAULT_HEAD_STEPS}).",
    )
    calibration_buffer_gb: float = _option(
        0.0,
        "Calibrated methods: keep whole gradients of as many layers as fit in so many gigabytes "
        "(10^9 bytes) per rank, beside the statistics; they cross the network once, those of the "
        "other layers with every micro-batch.",
    )
    mask: str | None = _option(None, "Train the entries of this mask.safetensors; no calibration.")
    sddmm_kernel: SddmmKernel = _option(
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


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """The training run."""

    output_dir: str | None = _option(None, "Where everything is written.")
    overwrite_output_dir: bool = _option(False, "Delete the run that output_dir holds.")
    resume_from_checkpoint: str | None = _option(
        None, "A checkpoint folder, or last for the newest one in output_dir."
    )
    deepspeed: str | None = _option(None, "DeepSpeed JSON (default: ZeRO stage 0).")
    local_rank: int = _option(-1, "Set by the deepspeed launcher.")
    per_device_train_batch_size: int = _option(8, "Examples per rank and micro-batch.")
    per_device_eval_batch_size: int = _option(8, "The same for the held-out loss and predictions.")
    gradient_accumulation_steps: int = _option(1, "Micro-batches per rank and step.")
    num_train_epochs: float = _option(3.0, "Passes over the training set.")
    max_steps: int = _option(
        -1, "Steps instead of epochs; 0 calibrates, writes the mask and stops."
    )
    optimizer: str = _option(
        "adamw", "adamw, or with --method full adamw_8bit (needs bitsandbytes and a GPU)."
    )
    learning_rate: float | None = _option(
        None,
        f"Peak learning rate (default: {DEFAULT_LEARNING_RATE:g}, with --method full "
        f"{DEFAULT_LEARNING_RATE_OF_FULL:g}).",
    )
    head_learning_rate: float = _option(
        1e-3,
        "Peak learning rate of an encoder's head, pooler and classifier, which is trained whole.",
    )
    weight_decay: float = _option(0.0, "Decoupled weight decay of the selected weights.")
    adam_beta1: float = _option(0.9, "Decay of the first moment.")
    adam_beta2: float = _option(0.999, "Decay of the second moment.")
    adam_epsilon: float = _option(1e-8, "Added to the root of the second moment.")
    max_grad_norm: float = _option(
        1.0, "Largest norm of the gradient; a larger one is scaled down to it, 0 turns this off."
    )
    lr_scheduler_type: str = _option("linear", f"One of {', '.join(SCHEDULES)}.")
    warmup_steps: float = _option(0, "Steps of warmup; a value below 1 is a share of all steps.")
    seed: int = _option(42, "Seeds the order of the data and dropout.")
    bf16: bool = _option(False, "Weights and activations in bfloat16; masters stay fp32.")
    fp16: bool = _option(False, "Weights and activations in float16 with loss scaling.")
    gradient_checkpointing: bool = _option(False, "Recompute activations in the backward pass.")
    logging_steps: int = _option(10, "Log every so many steps.")
    eval_steps: int | None = _option(
        None, "Held-out loss every so many steps (default: each epoch)."
    )
    save_steps: int | None = _option(None, "Checkpoint every so many steps (default: each epoch).")
    save_total_limit: int | None = _option(None, "Keep only the newest checkpoints.")
    report_to: str = _option("none", "tensorboard, or none; metrics.jsonl is written always.")
    disable_tqdm: bool = _option(False, "No progress bar.")

    @property
    def dtype(self) -> Dtype:
        """fp32, bf16 or fp16."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"


def default_learning_rate(method: str) -> float:
    """The peak learning rate of a run whose flags give none."""
    return DEFAULT_LEARNING_RATE_OF_FULL if method == "full" else DEFAULT_LEARNING_RATE


def check_arguments(
    model: ModelArguments, data: DataArguments, method: MethodArguments, train: TrainArguments
) -> None:
    """Refuse what can be seen to be wrong without opening a file.

    Raises:
        ValueError: one sentence that names the flag.
    """
    if train.bf16 and train.fp16:
        raise ValueError("Pass --bf16 or --fp16, not both.")
    at_least_one: dict[str, int | None] = {
        "--per_device_train_batch_size": train.per_device_train_batch_size,
        "--per_device_eval_batch_size": train.per_device_eval_batch_size,
        "--gradient_accumulation_steps": train.gradient_accumulation_steps,
        "--logging_steps": train.logging_steps,
        "--eval_steps": train.eval_steps,
        "--save_steps": train.save_steps,
        "--save_total_limit": train.save_total_limit,
        "--calibration_examples": method.calibration_examples,
        "--lora_r": method.lora_r,
        "--max_length": data.max_length,
        "--train_examples": data.train_examples,
    }
    for flag, value in at_least_one.items():
        if value is not None and value < 1:
            raise ValueError(f"{flag} must be at least 1, not {value}.")
    not_negative: dict[str, float | None] = {
        "--dev_examples": data.dev_examples,
        "--learning_rate": train.learning_rate,
        "--head_learning_rate": train.head_learning_rate,
        "--lora_alpha": method.lora_alpha,
        "--weight_decay": train.weight_decay,
        "--max_grad_norm": train.max_grad_norm,
        "--warmup_steps": train.warmup_steps,
        "--calibration_head_steps": method.calibration_head_steps,
        "--calibration_buffer_gb": method.calibration_buffer_gb,
    }
    for flag, number in not_negative.items():
        if number is not None and not 0 <= number < float("inf"):
            raise ValueError(f"{flag} must be a finite number of at least 0, not {number}.")
    for flag, decay in {"--adam_beta1": train.adam_beta1, "--adam_beta2": train.adam_beta2}.items():
        if not 0 <= decay < 1:
            raise ValueError(f"{flag} must be at least 0 and below 1, not {decay}.")
    if not 0 < train.adam_epsilon < float("inf"):
        raise ValueError(f"--adam_epsilon must be above 0, not {train.adam_epsilon}.")
    if train.lr_scheduler_type not in SCHEDULES:
        raise ValueError(
            f"--lr_scheduler_type takes one of {', '.join(SCHEDULES)}, not "
            f"{train.lr_scheduler_type}."
        )
    if train.max_steps < -1:
        raise ValueError(
            f"--max_steps must be -1 (use epochs) or at least 0, not {train.max_steps}."
        )
    if train.max_steps == -1 and not 0 < train.num_train_epochs < float("inf"):
        raise ValueError(f"--num_train_epochs must be above 0, not {train.num_train_epochs}.")
    if train.report_to not in ("none", "tensorboard"):
        raise ValueError(f"--report_to takes tensorboard or none, not {train.report_to}.")
    if not 0 <= method.lora_dropout < 1:
        raise ValueError(
            f"--lora_dropout must be at least 0 and below 1, not {method.lora_dropout}."
        )
    if data.evaluate_on == "dev" and not data.dev_examples:
        raise ValueError("--evaluate_on dev needs a development set: pass --dev_examples.")
    for flag in ("calibration_examples", "calibration_head_steps", "calibration_buffer_gb"):
        if method.mask and getattr(method, flag):
            raise ValueError(f"--mask skips calibration: leave --{flag} out.")
    _check_method(method, train)


def _check_method(method: MethodArguments, train: TrainArguments) -> None:
    """Refuse an unknown method, and flags that ask a method for what it does not do."""
    name = method.method
    if name not in METHODS:
        raise ValueError(f"There is no method {name!r}: pass one of {', '.join(METHODS)}.")
    if train.optimizer not in OPTIMIZERS:
        raise ValueError(
            f"--optimizer takes one of {', '.join(OPTIMIZERS)}, not {train.optimizer}."
        )
    if train.optimizer == "adamw_8bit" and name != "full":
        raise ValueError(
            "--optimizer adamw_8bit is for --method full: the others have little state."
        )
    if name in SPARSE_METHODS:
        return
    if method.mask is not None:
        raise ValueError(f"--method {name} selects no entries: leave --mask out.")
    if name in DENSE_METHODS and method.target_modules:
        raise ValueError(f"--method {name} has no target layers: leave --target_modules out.")
    if method.sddmm_kernel != "auto":
        raise ValueError(f"--method {name} selects no entries: leave --sddmm_kernel out.")
    if train.max_steps == 0:
        raise ValueError(f"--max_steps 0 writes a mask, and --method {name} has none.")
    for flag in ("save_steps", "resume_from_checkpoint"):
        if getattr(train, flag) is not None:
            raise ValueError(f"--method {name} writes no checkpoints: leave --{flag} out.")
