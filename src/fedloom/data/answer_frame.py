"""Where a text begins and an answer ends: one rule for what is learned, decoded, kept cut, judged and exported.

A text begins with what the tokenizer puts before any text (its beginning-of-text, where it adds one), once, unless a
chat template writes the text: that writes its own or none.

A row is closed by the special token with which its template ends the answer, else by the tokenizer's end of text.
Decoding stops at the first special token after the answer, at the tokenizer's end of text, and at the tokens that the
base's ``generation_config`` names. What a template writes around every answer, as an empty ``<think></think>`` before
it, or ``<|im_end|>`` where that is several tokens, is learned with it and is no part of a decoded answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedloom.data.records import Record
from fedloom.data.special_text import special_text
from fedloom.data.templates import AnyTemplate
from fedloom.data.token_rows import TokenRow, render, token_rows, with_last_answer

_STAND_INS = ("a", "b")
"""Two answers: what their texts have in common is the template's."""


@dataclass(frozen=True)
class AnswerFrame:
    """What stands around an answer.

    ``stop_ids`` end decoding, the tokenizer's end of text among them. ``before`` and ``after`` are the template's words
    without special tokens; ``num_tokens`` is how many a row has around its answer, the one that ends it included.
    """

    stop_ids: tuple[int, ...]
    before: str = ""
    after: str = ""
    num_tokens: int = 1

    def answer(self, ids: Sequence[int], tokenizer: Any) -> tuple[str, bool]:
        """Return the answer that decoded ``ids`` hold, and whether it was cut off: none of them ends it."""
        stop = next((position for position, token in enumerate(ids) if token in self.stop_ids), None)
        text = str(tokenizer.decode(list(ids[:stop]), skip_special_tokens=True)).strip()
        return text.removeprefix(self.before).removesuffix(self.after).strip(), stop is None

    @property
    def tag(self) -> str:
        """A short name for files of what is decoded so; empty where only one token ends an answer and no words do."""
        if len(self.stop_ids) == 1 and not (self.before or self.after):
            return ""
        return hashlib.sha256(json.dumps([self.stop_ids, self.before, self.after]).encode()).hexdigest()[:6]


def plain_frame(tokenizer: Any, ends: Iterable[int] = ()) -> AnswerFrame:
    """Return the frame of text that no template words; ``ends`` are those that the base's files name."""
    return AnswerFrame(_stops(tokenizer, (), ends))


def answer_frame(record: Record, template: AnyTemplate, tokenizer: Any, ends: Iterable[int] = ()) -> AnswerFrame:
    """Return what ``template`` writes around the last answer of a record like this one.

    ``ends`` are the tokens that the base's files name; those that are no special token of this tokenizer are another's.

    Raises:
        DataError: the chat template rejects the turns.
    """
    written = [render(with_last_answer(record, answer), template, tokenizer) for answer in _STAND_INS]
    turns_end = ends_of_turns(tokenizer)
    rows = [closed(row, tokenizer, turns_end) for row in token_rows(written, tokenizer)]
    texts = [item.text[slice(*item.spans[-1])] for item in written]
    ids = [row.ids[row.last_answer :].tolist() for row in rows]
    before = _without_special(texts[0][: _num_shared(*texts)], tokenizer)
    num_after = _num_shared(texts[0][::-1], texts[1][::-1])
    after = _without_special(texts[0][len(texts[0]) - num_after :], tokenizer)
    num_closing = max(_num_shared(ids[0][::-1], ids[1][::-1]), 1)
    closing, special = ids[0][-num_closing:], special_ids(tokenizer)
    # A template may close the turn, and then the text: Phi-3's writes <|end|>, a line's end, and <|endoftext|>.
    first = next(token for token in closing if token in special)
    num_tokens = num_closing + (_num_shared(*ids) if before else 0)
    return AnswerFrame(_stops(tokenizer, (first, closing[-1]), ends), before, after, num_tokens)


def ends_of_turns(tokenizer: Any) -> set[int]:
    """Return the special tokens that end a row by themselves."""
    return special_ids(tokenizer) - {tokenizer.unk_token_id}


def closed(row: TokenRow, tokenizer: Any, ends: Collection[int]) -> TokenRow:
    """Cut what follows the last answer, and end the row with the end of text unless a special token already does.

    ``ends`` are its :func:`ends_of_turns`, which are found once for many rows.
    """
    stop = int(np.flatnonzero(row.answer)[-1]) + 1
    ids, answer = row.ids[:stop], row.answer[:stop]
    if int(ids[-1]) in ends:
        return replace(row, ids=ids, answer=answer)
    end_of_text = np.int32(tokenizer.eos_token_id)
    return replace(row, ids=np.append(ids, end_of_text), answer=np.append(answer, True))


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of the tokenizer's special tokens."""
    return set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}


def _stops(tokenizer: Any, last: Iterable[int], ends: Iterable[int]) -> tuple[int, ...]:
    known = special_ids(tokenizer) | set(tokenizer.added_tokens_decoder)
    found = {*last, *(end for end in ends if end in known)} - {tokenizer.eos_token_id}
    return (int(tokenizer.eos_token_id), *sorted(found))


def _num_shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many items both begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _without_special(text: str, tokenizer: Any) -> str:
    for special in special_text(tokenizer).texts:
        text = text.replace(special, "")
    return text.strip()
