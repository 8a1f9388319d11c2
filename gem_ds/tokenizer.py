"""The tokenizer that lies with a model, if one does."""

from __future__ import annotations

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
