"""The tokenizer that lies with a model, and whether it suits the model."""

from __future__ import annotations

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.hub import has_file

_TOKENIZER_FILES = (
    *("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "spiece.model"),
    *("sentencepiece.bpe.model", "vocab.json", "vocab.txt"),
)


def load_tokenizer(
    model: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, given its folder or Hub name, which must hold one."""
    try:
        # Without a file of one transformers would build an empty one.
        if any(has_file(model, file, revision=revision or "main") for file in _TOKENIZER_FILES):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                model, revision=revision or "main", trust_remote_code=trust_remote_code
            )
            return tokenizer
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            reason = "it is code that would have to run: pass --trust_remote_code to allow it."
        raise ValueError(f"The tokenizer of {model} cannot be loaded: {reason}") from error
    raise ValueError(
        f"--model_name_or_path {model} holds no tokenizer: save the model's tokenizer there."
    )


def pad_token_id(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """What rows are filled with: any token that the model has, since it is masked."""
    tokens: tuple[int | None, ...] = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in tokens if token is not None and token < vocab_size)


def refuse_foreign_tokens(largest: int, vocab_size: int) -> None:
    """Beyond the embedding a GPU would only report a failed kernel."""
    if largest >= vocab_size:
        raise ValueError(
            f"The tokenizer makes token {largest} and the model knows {vocab_size} tokens: save "
            "the model's own tokenizer in its folder."
        )
