"""pass@k on MBPP: sample programs, run them in the sandbox, estimate.

    python -m eval.passk --model_name_or_path M [--delta F] [--data_dir D] --output_dir O
        [--n 10 --k 1 10 --temperature 0.8 --top_p 0.95] [--sanitized] [--num_fewshot 0]

    output_dir/
      samples.jsonl     what the model wrote, one line a sample; a run that was stopped goes on here
      verdicts.jsonl    what became of each: the program that was run, and why it failed
      results.json      pass@k with its interval, the counts, and what they were counted on

A sample passes when its program, the problem's setup code and all of the problem's tests run
without an error. Greedy pass@1 is `--n 1 --k 1 --temperature 0`.

`python -m eval.score --task mbpp O/samples.jsonl` does the second half again, without a model.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from gem_ds.evaluate.arguments import SamplingArguments, check_arguments, option
from gem_ds.evaluate.completion import GenerationSettings
from gem_ds.evaluate.judging import JudgingArguments, load, open_sandbox, report
from gem_ds.evaluate.mbpp import prompts_of, stop_strings
from gem_ds.evaluate.sampling import sample_all


@dataclass(frozen=True, kw_only=True)
class PassKArguments:
    """The flags of sampling that are this evaluator's own."""

    n: int = option(10, "Samples of each problem.")
    temperature: float = option(0.8, "Divides the logits; 0 is greedy.")
    top_p: float = option(0.95, "Share of the probability that tokens are drawn from.")
    max_new_tokens: int = option(512, "The longest completion, in tokens.")
    seed: int = option(0, "Of the noise in sampling.")
    num_fewshot: int | None = option(
        None, "Worked problems in the prompt, 0 or 3 (default: 3, and 0 with a template)."
    )

    def settings(self, template: str | None) -> GenerationSettings:
        """How completions of such prompts are made; raises ValueError for a value out of range."""
        return GenerationSettings(
            max_new_tokens=self.max_new_tokens,
            stop_strings=stop_strings(template),
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
        )


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Evaluate a model; returns what results.json holds, on rank 0.

    Raises:
        ValueError, OSError: Flags, model, delta, data or the host are refused, in one sentence.
    """
    parser = HfArgumentParser(
        (SamplingArguments, PassKArguments, JudgingArguments),  # type: ignore[arg-type]
        prog="python -m eval.passk",
        description="pass@k of a causal language model on MBPP.",
        allow_abbrev=False,
    )
    return evaluate(*parser.parse_args_into_dataclasses(argv, look_for_args_file=False))


def evaluate(
    sampling: SamplingArguments, own: PassKArguments, judging: JudgingArguments
) -> dict[str, Any] | None:
    """Sample, judge, write the files and print the result.

    Returns:
        What results.json holds; None on every rank but the first.

    Raises:
        ValueError: A flag, the model, the delta, the data or the host are at fault.
        OSError: A file cannot be read or written.
        PeerError: Another rank tells what went wrong.
    """
    check_arguments(sampling)
    num_fewshot = _check(own, judging)
    ks = judging.ks(own.n, "--n is")
    settings = own.settings(judging.prompt_template)
    asked = load(judging, sampling.data_dir, sampling.limit)
    prompts = prompts_of(
        asked.problems,
        asked.dataset,
        num_fewshot=num_fewshot,
        template=judging.prompt_template,
    )
    with ExitStack() as stack:
        if is_main := int(os.environ.get("RANK", 0)) == 0:
            sandbox = stack.enter_context(open_sandbox(judging))  # refused before a model is loaded
        samples = sample_all(sampling, prompts, settings, num_samples=own.n)
        if not is_main or samples is None:
            return None
        return report(
            samples,
            judging,
            asked,
            sandbox,
            Path(sampling.output_dir),
            ks=ks,
            num_fewshot=num_fewshot,
            show_bar=not sampling.disable_tqdm,
        )


def _check(own: PassKArguments, judging: JudgingArguments) -> int:
    """Refuses flags that can be seen to be wrong; returns the number of shots."""
    if own.n < 1:
        raise ValueError(f"--n must be at least 1, not {own.n}.")
    if own.temperature == 0 and own.n > 1:
        raise ValueError(
            f"--temperature 0 is greedy, and {own.n} samples would be the same one: pass --n 1 "
            "--k 1, or a temperature."
        )
    if judging.prompt_template is not None and own.num_fewshot is not None:
        raise ValueError(
            "--num_fewshot has no meaning with --prompt_template: write examples into the template."
        )
    if own.num_fewshot not in (None, 0, 3):
        raise ValueError(f"--num_fewshot must be 0 or 3, not {own.num_fewshot}.")
    if own.num_fewshot is None:
        return 3 if judging.prompt_template is None else 0
    return own.num_fewshot
