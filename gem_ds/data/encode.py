"""Examples -> tokens: what the model reads and where the answer begins, for each kind of answer.

    encode_texts       prompt, answer and eos in one sequence: the model learns to write the answer
    encode_candidates  prompt and candidate, a sequence for each: which is the likeliest? Without an
                       eos: what follows an answer is no part of it, and a token that all candidates
                       share would weigh most in the shortest one

Sentence pairs are `gem_ds.data.pairs`. The prompt's tokens are those a generation would start from:
the special tokens that the tokenizer puts at the start (unless the text has its bos itself), then
the text, never an eos. The answer's tokens are what `prompt + target` has beyond the prompt's
tokens; where a token spans the border, they are those of the target behind another text, so that
both together are the text given: at the start of a text many tokenizers would add a space.

Chat messages pass through the chat template (`gem_ds.data.chat`), which then is in charge of the
special tokens; an eos follows only where neither the template nor the data ends an answer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from transformers import PreTrainedTokenizerBase

from gem_ds.data import chat
from gem_ds.data.dataset import Dataset, flat, offsets_of
from gem_ds.data.tasks import ChoiceExample, Example, PlainText, Prompt

_CHUNK_SIZE = 1000  # examples per tokenizer call: enough to keep a fast tokenizer's threads busy

#: Texts that an answer is tokenized behind where the prompt is none: the first whose tokens stay
#: what they are by themselves. A line's end comes first, as words seldom merge with it.
_NEIGHBOURS = ("\n", ".", "a", "0", " .")


class LongPromptsError(ValueError):
    """Prompts that leave no room for an answer; `rows` are the examples' indices."""

    def __init__(self, lengths: dict[int, int], places: Sequence[str], max_length: int) -> None:
        self.rows, self.longest = sorted(lengths), max(lengths.values())
        first = self.rows[0]
        others = f"; so it is with {len(lengths):,} of {len(places):,} examples, of up to "
        super().__init__(
            f"{places[first]} has a prompt of {lengths[first]} tokens, which leaves no room for an "
            f"answer within the max_length of {max_length}"
            + (f"{others}{self.longest} tokens" if len(lengths) > 1 else "")
            + ": raise --max_length, shorten or remove what is too long, or in training pass "
            "--long_prompts drop or truncate_left."
        )


@dataclass(frozen=True, kw_only=True)
class _Sequence:
    """One text in tokens, not yet cut: what is read and what is learnt, in turn."""

    row: int  # the example's index
    num_start: int  # tokens at its start that stay where the prompt is cut
    pieces: list[list[int]]

    def cut(self, max_length: int, *, from_left: bool) -> list[list[int]]:
        """The pieces within a length: answers are cut at the end, before that a prompt may be."""
        prompt, *rest = self.pieces
        if from_left:
            room = max(max_length - sum(map(len, rest)), max_length // 2, 1)
            num_kept = min(self.num_start, room)
            if len(prompt) > room:
                prompt = prompt[:num_kept] + prompt[len(prompt) - room + num_kept :]
        kept, room = [prompt], max_length - len(prompt)
        for piece in rest:
            kept.append(piece[: max(room, 0)])
            room -= len(piece)
        return kept


def encode_texts(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    truncate_left: bool = False,
) -> Dataset:
    """Encode examples as `prompt tokens + answer tokens + eos`, cut at `max_length`.

    With `truncate_left` a prompt loses tokens at its start so that the answer fits, but keeps half
    of `max_length`. A conversation may be several rows.

    Raises:
        LongPromptsError: Prompts fill `max_length`.
        ValueError: The tokenizer lacks what an example needs: an eos token, a bos token for an
            empty prompt, a chat template that takes the messages.
    """
    if examples and tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no end-of-sequence token, so the model could not learn where an "
            "answer stops: set eos_token in its tokenizer_config.json."
        )
    rows = [[example] for example in examples]
    return _dataset(rows, tokenizer, max_length, truncate_left=truncate_left, has_eos=True)


def encode_candidates(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    truncate_left: bool = False,
) -> Dataset:
    """Encode `prompt tokens + candidate tokens` for every candidate of every example.

    Raises:
        ValueError: As `encode_texts` (no eos is needed), or a candidate has no tokens.
    """
    choices = cast(Sequence[ChoiceExample], examples)
    rows = [
        [Example(prompt=e.prompt, target=text, place=e.place) for text in e.candidates]
        for e in choices
    ]
    dataset = _dataset(rows, tokenizer, max_length, truncate_left=truncate_left, has_eos=False)
    groups = offsets_of([len(row) for row in rows])
    answers = torch.tensor([example.answer for example in choices], dtype=torch.int64)
    return replace(dataset, groups=groups, answers=answers)


def encode_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids from which a generation starts: exactly the prompt part of `encode_texts`."""
    text = prompt
    if not isinstance(text, str):
        text = chat.render_prompt(text, tokenizer, "A prompt")
    (ids,) = _tokenize([text], tokenizer)
    start = _start_of(ids, prompt, tokenizer, _start_tokens(tokenizer))
    if not (start or ids):
        raise ValueError(_empty_prompt("A question"))
    return start + ids


def _dataset(
    rows: Sequence[Sequence[Example]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    truncate_left: bool,
    has_eos: bool,
) -> Dataset:
    """Every text of every row as a sequence, a row for each."""
    places = [row[0].place or f"Example {number}" for number, row in enumerate(rows, 1)]
    numbered = [(i, example) for i, row in enumerate(rows) for example in row]
    sequences = [
        sequence
        for first in range(0, len(numbered), _CHUNK_SIZE)
        for sequence in _encode(numbered[first : first + _CHUNK_SIZE], places, tokenizer, has_eos)
    ]
    cut = [sequence.cut(max_length, from_left=truncate_left) for sequence in sequences]
    if long := {
        sequence.row: len(sequence.pieces[0])
        for sequence, pieces in zip(sequences, cut, strict=True)
        if len(pieces[0]) >= max_length
    }:
        raise LongPromptsError(long, places, max_length)
    lengths = [sum(map(len, pieces)) for pieces in cut]
    whole = [sum(map(len, sequence.pieces)) for sequence in sequences]
    has_turns = any(len(pieces) > 2 for pieces in cut)
    return Dataset(
        tokens=flat([piece for pieces in cut for piece in pieces]),
        offsets=offsets_of(lengths),
        groups=torch.arange(len(cut) + 1),
        truncated=torch.tensor(lengths, dtype=torch.int64) < torch.tensor(whole, dtype=torch.int64),
        prompt_lengths=torch.tensor([len(pieces[0]) for pieces in cut], dtype=torch.int32),
        unlearnt=torch.cat([_unlearnt(pieces) for pieces in cut]) if has_turns else None,
    )


def _unlearnt(pieces: Sequence[list[int]]) -> torch.Tensor:
    """Which tokens are read behind the prompt, bool."""
    turns = [torch.full([len(piece)], i > 0 and i % 2 == 0) for i, piece in enumerate(pieces)]
    return torch.cat(turns)


def _encode(
    numbered: Sequence[tuple[int, Example]],
    places: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    has_eos: bool,
) -> Iterator[_Sequence]:
    """The tokens of each example."""
    start_tokens = _start_tokens(tokenizer)
    eos, ends = ([tokenizer.eos_token_id], None) if has_eos else ([], False)
    texts = []
    for row, example in numbered:
        if isinstance(example.prompt, str):
            texts.append((row, example, [example.prompt, example.target]))
            continue
        rendered = chat.render_answers(example, tokenizer, places[row])
        texts += [(row, example, pieces) for pieces in rendered]
        if ends is None:
            ends = bool(chat.end_of_turn(example, tokenizer, places[row]).strip())
    tokens = _tokenize_pieces([pieces for _, _, pieces in texts], tokenizer)
    for (row, example, _), (prompt, *rest) in zip(texts, tokens, strict=True):
        start = _start_of(prompt, example.prompt, tokenizer, start_tokens)
        is_ended = not isinstance(example.prompt, str) and ends
        if eos and not is_ended and rest[-1][-1:] != eos:
            rest[-1] = rest[-1] + eos
        if not rest[-1]:
            raise ValueError(
                f"{places[row]} has the candidate {example.target!r}, which the tokenizer makes no "
                "tokens of, so it has no likelihood: write it out."
            )
        if not (start or prompt):
            if not isinstance(example, PlainText) or len(rest[0]) < 2:
                raise ValueError(_empty_prompt(places[row]))
            prompt, rest[0] = rest[0][:1], rest[0][1:]  # nothing precedes what could be learnt
        num_start = len(start) or int(prompt[:1] == [tokenizer.bos_token_id])
        yield _Sequence(row=row, num_start=num_start, pieces=[start + prompt, *rest])


def _empty_prompt(place: str) -> str:
    return (
        f"{place} has an empty prompt and the tokenizer has no bos token to stand for it: give it "
        "a prompt."
    )


def _start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before any text (mostly bos, or none)."""
    probe = "a"
    (plain,) = _tokenize([probe], tokenizer)
    full: list[int] = tokenizer(probe)["input_ids"]
    num_added = len(full) - len(plain)
    return next(full[:n] for n in range(num_added + 1) if full[n : n + len(plain)] == plain)


def _start_of(
    ids: list[int],
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    start_tokens: list[int],
) -> list[int]:
    """What precedes a prompt's tokens, so that the first answer token has one to follow."""
    bos = tokenizer.bos_token_id
    has_bos = bos is not None and ids[:1] == [bos]
    if isinstance(prompt, str) and start_tokens and not has_bos:  # a template writes its own
        return start_tokens
    return [] if ids or bos is None else [bos]


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each text, without special tokens and without a limit on the length."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _tokenize_pieces(
    texts: Sequence[chat.Pieces], tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[list[int]]]:
    """The tokens of each text in pieces that lie end to end, no token across a border."""
    begun = ["".join(pieces[: n + 1]) for pieces in texts for n in range(len(pieces))]
    tokens = iter(_tokenize(begun, tokenizer))
    for pieces in texts:
        found = [before := next(tokens)]
        for piece in pieces[1:]:
            whole = next(tokens)
            is_border = whole[: len(before)] == before
            found.append(whole[len(before) :] if is_border else _behind(piece, tokenizer))
            before = whole
        yield found


def _behind(piece: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a text that does not stand at the start."""
    for neighbour in _NEIGHBOURS:
        alone, whole = _tokenize([neighbour, neighbour + piece], tokenizer)
        if whole[: len(alone)] == alone:
            return whole[len(alone) :]
    return _tokenize([piece], tokenizer)[0]
