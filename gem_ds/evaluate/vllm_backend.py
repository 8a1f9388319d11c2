"""vLLM as what generates: the same requests, prompts as tokens, one seed per sample.

vLLM batches by itself and draws its own noise, so samples differ from those of the transformers
backend, and repeat only as far as vLLM's kernels do. It has to be installed beside gem_ds
(`pip install 'gem_ds[vllm]'`), and is imported when it is asked for. A delta is put into the base
that vLLM has loaded, as `gem_ds.serving.vllm_engine` does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gem_ds.evaluate.generation import Completion, GenerationSettings, Request, sample_seed
from gem_ds.models.load import ModelFiles
from gem_ds.serving.vllm_engine import VllmDeltas


class Vllm:
    """A model in vLLM, spread over all visible GPUs of this machine by tensor parallelism."""

    synced_ranks = False

    def __init__(self, files: ModelFiles, settings: GenerationSettings) -> None:
        try:
            import vllm
        except ImportError as error:
            raise ValueError(
                f"--backend vllm needs vLLM, which cannot be imported ({error}): install it with "
                "pip install 'gem_ds[vllm]', or leave --backend out."
            ) from error
        self._settings, self._make_parameters = settings, vllm.SamplingParams
        # Stop strings that are special tokens do not come into the text that vLLM looks at.
        tokenizer = files.tokenizer
        named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        tokens = dict(named) | tokenizer.get_added_vocab()
        self._stop_token_ids = [tokens[text] for text in settings.stop_strings if text in tokens]
        self._model = vllm.LLM(
            model=files.name,
            revision=files.revision,
            dtype=files.dtype,
            trust_remote_code=files.trust_remote_code,
            tensor_parallel_size=max(1, torch.cuda.device_count()),
            worker_extension_cls="" if files.delta is None else VllmDeltas.WORKER,
        )
        if files.delta is not None:
            deltas = VllmDeltas(self._model)
            deltas.add("delta", files.delta)
            deltas.use("delta")

    def batches(self, requests: Sequence[Request]) -> list[list[list[Request]]]:
        """Parts after each of which the file grows; vLLM makes the batches within by itself."""
        return [[list(requests[i : i + 1024]) for i in range(0, len(requests), 1024)]]

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer the requests, in their order."""
        settings = self._settings
        parameters = [
            self._make_parameters(
                temperature=settings.temperature,
                top_p=settings.top_p,
                max_tokens=request.limit,
                stop=list(settings.stop_strings),
                stop_token_ids=self._stop_token_ids,
                seed=None if settings.is_greedy else sample_seed(settings.seed, request.key),
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": request.prompt_ids} for request in requests]
        outputs = self._model.generate(prompts, parameters, use_tqdm=False)
        return [self._completion(output.outputs[0]) for output in outputs]

    def _completion(self, output: Any) -> Completion:
        """Of what vLLM returns, eos and stops are all "stop", told apart by the reason."""
        is_stop = isinstance(output.stop_reason, str) or output.stop_reason in self._stop_token_ids
        is_eos = output.finish_reason == "stop" and not is_stop
        reason = "eos" if is_eos else output.finish_reason
        return Completion(text=output.text, num_tokens=len(output.token_ids), finish_reason=reason)
