"""vLLM as what generates: the same requests, prompts as tokens, one seed per sample.

vLLM batches by itself and draws its own noise, so samples differ from those of the transformers
backend, and repeat only as far as vLLM's kernels do. It has to be installed beside gem_ds
(`pip install 'gem_ds[vllm]'`), and is imported when it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gem_ds.evaluate.generation import Completion, GenerationSettings, Request, sample_seed
from gem_ds.models.load import ModelFiles

_PART = 1024


class Vllm:
    """A model in vLLM, spread over all visible GPUs of this machine by tensor parallelism."""

    synced_ranks = False

    def __init__(self, files: ModelFiles, settings: GenerationSettings) -> None:
        self._settings = settings
        self._stop_token_ids = _stop_token_ids(files.tokenizer, settings.stop_strings)
        self._vllm = _import_vllm()
        self._model = self._vllm.LLM(
            model=files.name,
            revision=files.revision,
            dtype=files.dtype,
            tensor_parallel_size=max(1, torch.cuda.device_count()),
        )

    def batches(self, requests: Sequence[Request]) -> list[list[list[Request]]]:
        """Parts after each of which the file grows; vLLM makes the batches within by itself."""
        parts = range(0, len(requests), _PART)
        return [[list(requests[first : first + _PART]) for first in parts]]

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer the requests, in their order."""
        outputs = self._model.generate(
            [{"prompt_token_ids": request.prompt_ids} for request in requests],
            [self._parameters(request) for request in requests],
            use_tqdm=False,
        )
        return [self._completion(output.outputs[0]) for output in outputs]

    def _parameters(self, request: Request) -> Any:
        settings = self._settings
        return self._vllm.SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=request.limit,
            stop=list(settings.stop_strings),
            stop_token_ids=self._stop_token_ids,
            seed=None if settings.is_greedy else sample_seed(settings.seed, request.key),
        )

    def _completion(self, output: Any) -> Completion:
        """What vLLM returns: eos and stops are all "stop", told apart by the reason."""
        is_stop = isinstance(output.stop_reason, str) or output.stop_reason in self._stop_token_ids
        reason = output.finish_reason
        if reason == "stop" and not is_stop:
            reason = "eos"
        return Completion(text=output.text, num_tokens=len(output.token_ids), finish_reason=reason)


def _stop_token_ids(tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str]) -> list[int]:
    """Stop strings that are special tokens: these do not come into the text that vLLM looks at."""
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return [special[stop] for stop in stop_strings if stop in special]


def _import_vllm() -> Any:
    try:
        import vllm
    except ImportError as error:
        raise ValueError(
            f"--backend vllm needs vLLM, which cannot be imported ({error}): install it with "
            "pip install 'gem_ds[vllm]', or leave --backend out."
        ) from error
    return vllm
