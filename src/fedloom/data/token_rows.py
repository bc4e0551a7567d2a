"""Turn texts into token ids: one rule for what is trained on, generated from and scored.

A text begins with what the tokenizer puts before any text (its beginning-of-text, where it adds one), unless the text
carries its own special tokens: a chat template writes them all, and a text that spells the beginning keeps that one.
Where it ends, :mod:`fedloom.data.answer_frame` says.

A prompt is read as training reads the row it begins: the row is written with a stand-in for its answer, and the prompt
is every token before the answer's first. So a token that reaches over the border (the blank before a first word, in
most tokenizers) is left for the model to write, as in training.

What a record's author wrote never becomes a special token, whatever it spells (``fedloom.data.special_text``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedloom.data.chat import render_chat
from fedloom.data.records import Dialogue, Prompt, Record, Turn
from fedloom.data.special_text import contents_of, given_beside, special_text
from fedloom.data.templates import AnyTemplate, ChatTemplate, Rendered
from fedloom.data.tokenizer import check_ids
from fedloom.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast

_ROWS_PER_CALL = 1000
# A letter: most answers begin with one, and it joins punctuation before it in no tokenizer's split.
_STAND_IN = "a"


@dataclass(frozen=True, eq=False)
class TokenRow:
    """The ids of one text, which of them belong to answers, and where the last answer begins."""

    ids: npt.NDArray[np.int32]
    answer: npt.NDArray[np.bool_]
    last_answer: int


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as a person reads it, and the ids a model is given."""

    text: str
    ids: tuple[int, ...]


def render(record: Record, template: AnyTemplate, tokenizer: PreTrainedTokenizerFast) -> Rendered:
    """Write one record with ``template``.

    Raises:
        DataError: the chat template rejects the turns, or changes contents that spell a special token.
    """
    written, special = _write(record, template, tokenizer), special_text(tokenizer)
    if (given := given_beside(record)) and special.spelt_in([given]):
        raise DataError(
            f"expected tools and calls that spell no special token, got {special.first_in(given)!r}; remove that text "
            "from the row"
        )
    if not special.spelt_in(contents_of(record)):
        return written
    hidden = _write(special.hidden(record), template, tokenizer)
    return replace(written, special_spans=special.template_spans(written.text, hidden.text))


def _write(record: Record, template: AnyTemplate, tokenizer: PreTrainedTokenizerFast) -> Rendered:
    if isinstance(template, ChatTemplate):
        return render_chat(record, template, tokenizer)
    return template.render(record, tokenizer.eos_token)


def token_rows(rendered: Iterable[Rendered], tokenizer: PreTrainedTokenizerFast) -> Iterator[TokenRow]:
    """Yield the tokens of each text; a token is of an answer when one of the answer's characters is in it."""
    prefix, texts = prefix_ids(tokenizer), iter(rendered)
    while batch := list(islice(texts, _ROWS_PER_CALL)):
        for item, encoding in zip(batch, _encodings(batch, tokenizer), strict=True):
            yield _marked(item, encoding, [] if item.framed else _missing(prefix, encoding.ids))


def record_prompts(
    records: Iterable[Record], template: AnyTemplate, tokenizer: PreTrainedTokenizerFast
) -> list[PromptTokens]:
    """Return the prompt of each record: what stands before its last answer, which may be empty.

    Law: the ids are those before the answer's first token in :func:`~fedloom.data.encode`, whatever the template,
    for every answer whose beginning joins the prompt's last characters as that of most words does.

    Raises:
        DataError: the chat template rejects the turns, or writes them differently once an answer follows.
    """
    rendered = [render(with_last_answer(record, _STAND_IN), template, tokenizer) for record in records]
    for item in rendered:
        _check_is_text(item.prompt)
    prompts = [
        PromptTokens(item.prompt, tuple(row.ids[: row.last_answer].tolist()))
        for item, row in zip(rendered, token_rows(rendered, tokenizer), strict=True)
    ]
    return _known(prompts, tokenizer)


def text_prompts(texts: Sequence[str], tokenizer: Any) -> list[PromptTokens]:
    """Return texts that no template wraps, each as it stands: the special tokens it spells are meant.

    Raises:
        DataError: a prompt is not text: bytes of it are not UTF-8, or it holds half a pair of surrogates.
    """
    return _prompts([Rendered(text, ()) for text in texts], tokenizer)


def content_prompts(texts: Sequence[str], tokenizer: Any) -> list[PromptTokens]:
    """Return texts that no template wraps, such as questions of a file: no special token they spell is one.

    Raises:
        DataError: a prompt is not text, or holds a private-use character beside a special token's text.
    """
    return _prompts([_content(text, tokenizer) for text in texts], tokenizer)


def content_encodings(texts: Sequence[str], tokenizer: Any) -> list[Encoding]:
    """Return the tokens of texts alone, with nothing put before them; no special token they spell is one.

    Raises:
        DataError: a text holds a private-use character beside a special token's text.
    """
    return _encodings([_content(text, tokenizer) for text in texts], tokenizer)


def _content(text: str, tokenizer: Any) -> Rendered:
    return Rendered(text, (), special_spans=() if special_text(tokenizer).spelt_in([text]) else None)


def _prompts(items: Sequence[Rendered], tokenizer: Any) -> list[PromptTokens]:
    for item in items:
        _check_is_text(item.text)
    prefix = prefix_ids(tokenizer)
    prompts = [
        PromptTokens(item.text, (*_missing(prefix, encoding.ids), *encoding.ids))
        for item, encoding in zip(items, _encodings(items, tokenizer), strict=True)
    ]
    return _known(prompts, tokenizer)


def _known(prompts: list[PromptTokens], tokenizer: Any) -> list[PromptTokens]:
    for prompt in prompts:
        check_ids(prompt.ids, tokenizer, f"prompt {prompt.text[:40]!r}")
    return prompts


def prefix_ids(tokenizer: Any) -> list[int]:
    """Return the special ids the tokenizer puts before any text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    return list(encoded["input_ids"][: encoded["special_tokens_mask"].index(0)])


def _encodings(items: Sequence[Rendered], tokenizer: Any) -> list[Encoding]:
    usual = [item.text for item in items if item.special_spans is None]
    read = []
    if usual:
        read = tokenizer(usual, add_special_tokens=False, return_attention_mask=False, verbose=False).encodings
    spelling = [(item.text, item.special_spans) for item in items if item.special_spans is not None]
    apart = special_text(tokenizer).encodings(spelling) if spelling else []
    following, following_apart = iter(read), iter(apart)
    return [next(following if item.special_spans is None else following_apart) for item in items]


def _missing(prefix: list[int], ids: list[int]) -> list[int]:
    return [] if ids[: len(prefix)] == prefix else prefix


def with_last_answer(record: Record, answer: str) -> Record:
    """Return the record with another last answer, and nothing after it."""
    match record:
        case Prompt():
            return replace(record, answer=answer)
        case Dialogue(turns):
            last = record.last_answer
            asked = replace(record, turns=(*turns[:last], Turn("assistant", answer)))
            return asked.up_to(len(asked.turns) - 1)


def _marked(item: Rendered, encoding: Encoding, prefix: list[int]) -> TokenRow:
    answer, first = np.zeros(len(encoding.ids), np.bool_), 0
    for start, stop in item.spans:
        first = _first_token(encoding, start, len(item.text))
        last = _first_token(encoding, stop, len(item.text))
        while last < len(answer) and _begins_before(encoding, last, stop):
            last += 1
        answer[first:last] = True
    ids = np.array([*prefix, *encoding.ids], np.int32)
    return TokenRow(ids, np.concatenate([np.zeros(len(prefix), np.bool_), answer]), len(prefix) + first)


def _begins_before(encoding: Encoding, token: int, stop: int) -> bool:
    characters = encoding.token_to_chars(token)
    return characters is None or characters[0] < stop


def _first_token(encoding: Encoding, start: int, stop: int) -> int:
    """Return the first token that holds a character from ``start`` on; characters may have been dropped, so walk."""
    for character in range(start, stop):
        token = encoding.char_to_token(character)
        if token is not None:
            return int(token)
    return len(encoding.ids)


def _check_is_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as cause:
        # What comes from the command line or the terminal holds a byte b that is not UTF-8 as U+DC00 + b (PEP 383).
        code = ord(text[cause.start])
        what = f"the byte 0x{code - 0xDC00:x}" if 0xDC80 <= code <= 0xDCFF else f"U+{code:X}, half of a character,"
        before = text[max(cause.start - 20, 0) : cause.start]
        raise DataError(
            f"prompt: expected UTF-8 text, got {what} after {before!r}; correct the prompt or its encoding"
        ) from cause
