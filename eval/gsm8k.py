r"""Exact match on GSM8K: zero-shot, greedy, under three rules of judgement.

    python -m eval.gsm8k --model_name_or_path M [--delta F] [--data_dir D] --output_dir O

    strict-match        the first `#### (\-?[0-9\.\,]+)` of the output
    flexible-extract    the last `(-?[$0-9.,]{2,})|(-?[0-9]+)` of the output
                        each compared as a string with the reference, after both have lost commas,
                        dollar signs, everything through `#### ` and one trailing full stop
    numeric             the value of the final answer, exactly: 29.00 = 29, 3/4 = 0.75

The first two follow the community harness (lm-evaluation-harness, task gsm8k) and bear its names.

    output_dir/
      samples.jsonl    per problem: task_id, prompt, completion, how it ended, generation settings
      results.json     the counts, and what they were counted on
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import HfArgumentParser

from eval.generation import Completion, GenerationSettings, generate, load_model
from gem_ds.files import atomic_write, save_json
from gem_ds.mask import dtype_name
from gem_ds.tasks import Example, load_task

SAMPLES_FILE = "samples.jsonl"
RESULTS_FILE = "results.json"
STOP_STRINGS = ("Question:", "</s>", "<|im_end|>")

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")

#: What announces a final answer, and a calculation that may stand before its result.
_ANNOUNCEMENT = re.compile(r"(?:####|\\boxed\{|\banswer(?: is|:))\s*", re.IGNORECASE)
_CALCULATION = re.compile(r"(?:[-+*/x\N{MULTIPLICATION SIGN}()$.,0-9 ]+=)*")
#: A number as people write it. The minus of a subtraction (10-3, 10 -3) is not its sign.
_NUMBER = re.compile(
    r"""
    (?P<sign> (?<![\w)%]) (?<![0-9)%]\ ) [-\N{MINUS SIGN}] )?
    (?: [$€£] (?P<inner_sign> [-\N{MINUS SIGN}] )? )?
    (?: (?P<whole> [0-9]+ ) \ (?= [0-9]+/[0-9] ) )?
    (?P<numerator> [0-9]{1,3} (?:,[0-9]{3})+ (?![0-9]) (?:\.[0-9]+)? | [0-9]*\.[0-9]+ | [0-9]+ )
    (?: / (?P<denominator> [0-9]+ ) )?
    """,
    re.VERBOSE,
)


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The flags."""

    model_name_or_path: str = field(metadata={"help": "Hub id or folder of the model."})
    delta: str | None = _option(None, "delta.safetensors to apply to that model.")
    data_dir: str | None = _option(
        None, "Folder with train.jsonl and test.jsonl (default: GSM8K from the Hub)."
    )
    output_dir: str = field(metadata={"help": "Where samples and results are written."})
    overwrite_output_dir: bool = _option(False, "Replace the evaluation that output_dir holds.")
    limit: int | None = _option(None, "Evaluate the first so many problems only.")
    batch_size: int = _option(32, "Problems per batch; decides memory and speed.")
    max_new_tokens: int = _option(256, "The longest completion, in tokens.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto", "Of the weights; auto is the delta's, or without one that of the model's files."
    )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether an output is right, under each of the three rules."""

    strict_match: bool
    flexible_extract: bool
    numeric: bool


#: The rules by the names under which they are reported, in the order of `Verdict`.
RULES = ("strict-match", "flexible-extract", "numeric")


def score(output: str, answer: str) -> Verdict:
    """Judge what a model wrote.

    Args:
        output: The completion of a problem's prompt, whatever it is.
        answer: The dataset's answer, which ends in `#### <number>`, or the number alone.

    Returns:
        The three verdicts; an output in which a rule finds no answer is wrong under that rule.
    """
    reference = _normalise(answer)
    strict = _STRICT.search(output)
    flexible = [match[0] for match in _FLEXIBLE.finditer(output)]
    value = final_value(output.partition("\nQuestion:")[0])  # a model may run on
    return Verdict(
        strict_match=strict is not None and _normalise(strict[1]) == reference,
        flexible_extract=bool(flexible) and _normalise(flexible[-1]) == reference,
        numeric=value is not None and value == final_value(answer),
    )


def final_value(text: str) -> Fraction | None:
    r"""The exact value of the answer at which a text arrives, or None if it has no number.

    It is the first number after the last `####`, `\boxed{`, "answer is" or "answer:" that has one
    on its line (after the `=` where a calculation comes first), else the last number of the text.
    Currency signs, thousands separators and units do not count; a percentage is taken as it is
    written, so 50% is 50.
    """
    for announcement in reversed(list(_ANNOUNCEMENT.finditer(text))):
        start, end = announcement.end(), text.find("\n", announcement.end())
        calculation = _CALCULATION.match(text, start)
        assert calculation is not None, "it matches the empty text"
        if values := _values(text, calculation.end(), len(text) if end < 0 else end):
            return values[0]
    values = _values(text, 0, len(text))
    return values[-1] if values else None


def tally(verdicts: Sequence[Verdict]) -> dict[str, dict[str, float]]:
    """By rule, how many of the verdicts are right, of how many, and their share in [0, 1]."""
    assert verdicts, "no verdicts"
    total = len(verdicts)
    counts = [sum(column) for column in zip(*map(astuple, verdicts), strict=True)]
    return {
        rule: {"correct": correct, "total": total, "accuracy": correct / total}
        for rule, correct in zip(RULES, counts, strict=True)
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Evaluate a model; returns what results.json holds.

    Raises:
        SystemExit: Flags, model, delta or data are refused; its message is one sentence.
    """
    parser = HfArgumentParser(
        (Arguments,),  # type: ignore[arg-type]
        prog="python -m eval.gsm8k",
        description="Exact match of a causal language model on GSM8K: zero-shot, greedy.",
        allow_abbrev=False,
    )
    (arguments,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    try:
        return evaluate(arguments)
    except (ValueError, OSError) as error:
        raise SystemExit(f"eval.gsm8k: {error}") from error


def evaluate(arguments: Arguments) -> dict[str, Any]:
    """Sample, score, write both files and print the result.

    Returns:
        What results.json holds.

    Raises:
        ValueError: A flag, the model, the delta or the data are at fault.
        OSError: A file cannot be read or written.
    """
    started = time.perf_counter()
    output_dir = Path(arguments.output_dir)
    _check(arguments, output_dir)
    examples = load_task("gsm8k", data_dir=arguments.data_dir).test[: arguments.limit]
    _check_references(examples)
    output_dir.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(
        arguments.model_name_or_path,
        delta_path=arguments.delta,
        dtype=arguments.dtype,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    settings = GenerationSettings(
        max_new_tokens=arguments.max_new_tokens, stop_strings=STOP_STRINGS
    )
    prompts = [example.prompt for example in examples]
    completions = generate(model, tokenizer, prompts, settings, batch_size=arguments.batch_size)
    exact_match = tally(
        [
            score(completion.text, example.target)
            for completion, example in zip(completions, examples, strict=True)
        ]
    )
    results = {
        "task": "gsm8k",
        "exact_match": exact_match,
        "protocol": {"split": "test", "num_fewshot": 0, "greedy": True, **asdict(settings)},
        "arguments": asdict(arguments),
        "dtype": dtype_name(model.dtype),
        "device": model.device.type,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    _save(output_dir, _samples(examples, completions, settings), results)
    print(summary(exact_match))
    return results


def summary(exact_match: dict[str, dict[str, float]]) -> str:
    """The result line, from `tally`."""
    parts = [
        f"{rule} {counts['correct']}/{counts['total']} = {100 * counts['accuracy']:.1f} %"
        for rule, counts in exact_match.items()
    ]
    return "exact match: " + ", ".join(parts)


def _normalise(text: str) -> str:
    """What the harness does to prediction and reference before it compares them."""
    for ignored in (r",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(ignored, "", text)
    return text


def _values(text: str, start: int, end: int) -> list[Fraction]:
    """The numbers of `text[start:end]`, in order; what stands around them is seen too."""
    values = []
    for number in _NUMBER.finditer(text, start, end):
        denominator = _exact(number["denominator"] or "1")
        if denominator:
            value = _exact(number["whole"] or "0") + _exact(number["numerator"]) / denominator
            values.append(-value if number["sign"] or number["inner_sign"] else value)
    return values


def _exact(digits: str) -> Fraction:
    """A decimal number of any length; `int` refuses strings of many thousand digits."""
    return Fraction(Decimal(digits.replace(",", "")))


def _check(arguments: Arguments, output_dir: Path) -> None:
    """Refuses flags that can be seen to be wrong, and a folder that holds other results."""
    for flag in ("limit", "batch_size", "max_new_tokens"):
        count = getattr(arguments, flag)
        if count is not None and count < 1:
            raise ValueError(f"--{flag} must be at least 1, not {count}.")
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output_dir {output_dir} is a file: choose another name.")
    for name in (SAMPLES_FILE, RESULTS_FILE):
        if (output_dir / name).exists() and not arguments.overwrite_output_dir:
            raise ValueError(
                f"--output_dir {output_dir} holds an evaluation ({name}): choose another folder "
                "or pass --overwrite_output_dir."
            )


def _check_references(examples: Sequence[Example]) -> None:
    """Refuses answers that could never be matched, on which every model would score zero."""
    for number, example in enumerate(examples, start=1):
        if _STRICT.search(example.target) is None:
            raise ValueError(
                f"Example {number} of the test split has no '#### <number>' in its answer, so "
                "nothing can be scored against it: add it."
            )


def _samples(
    examples: Sequence[Example], completions: Sequence[Completion], settings: GenerationSettings
) -> list[dict[str, Any]]:
    """What samples.jsonl holds: enough to score again without a model."""
    return [
        {
            "task_id": f"gsm8k/test/{i}",
            "prompt": example.prompt,
            "completion": completion.text,
            "finish_reason": completion.finish_reason,
            "num_tokens": completion.num_tokens,
            "settings": asdict(settings),
        }
        for i, (example, completion) in enumerate(zip(examples, completions, strict=True))
    ]


def _save(output_dir: Path, samples: list[dict[str, Any]], results: dict[str, Any]) -> None:
    """Writes both files, each as a whole; earlier results never lie beside new samples."""
    (output_dir / RESULTS_FILE).unlink(missing_ok=True)
    payload = "".join(json.dumps(sample) + "\n" for sample in samples).encode()
    atomic_write(output_dir / SAMPLES_FILE, lambda path: path.write_bytes(payload))
    save_json(output_dir / RESULTS_FILE, results)


if __name__ == "__main__":
    main()
