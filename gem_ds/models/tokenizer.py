"""The tokenizer that lies with a model, if one does, and whether it suits the model."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import has_file

_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)


def load_tokenizer(
    model: str, revision: str, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model, or None where it has no tokenizer files.

    transformers builds an empty tokenizer for a known architecture without files; that must not be
    used as if it were the model's.

    Args:
        model: Folder or Hub name of the model.
        revision: Its revision on the Hub.
        trust_remote_code: Run tokenizer code that comes with the model.

    Raises:
        ValueError, OSError: There are files and they cannot be used.
    """
    if not any(has_file(model, name, revision=revision) for name in _TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(
        model, revision=revision, trust_remote_code=trust_remote_code
    )


def pad_token_id(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """What rows are filled with: any token that the model has, since it is masked."""
    tokens: tuple[Any, ...] = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in tokens if token is not None and token < vocab_size)


def refuse_foreign_tokens(largest: int, vocab_size: int) -> None:
    """Beyond the embedding a GPU would only report a failed kernel.

    Raises:
        ValueError: the largest token is none of the model's.
    """
    if largest >= vocab_size:
        raise ValueError(
            f"The tokenizer makes token {largest} and the model knows {vocab_size} tokens: save "
            "the model's own tokenizer in its folder."
        )
