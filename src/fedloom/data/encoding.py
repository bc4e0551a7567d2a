"""Tokenise records and mark the tokens to learn, from character offsets."""

from __future__ import annotations

import datetime
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

import numpy as np
import numpy.typing as npt

from fedloom.data.answer_frame import closed, ends_of_turns
from fedloom.data.chat import RewritesTurnsError
from fedloom.data.records import Dialogue, Prompt, Record, Records, Shape
from fedloom.data.templates import (
    AUTO,
    CHAT,
    AnyTemplate,
    ChatTemplate,
    Rendered,
    Template,
    default_template,
    load_template,
)
from fedloom.data.token_rows import TokenRow, render, token_rows
from fedloom.data.tokenizer import check_ids, may_exceed
from fedloom.data.tokens import TokenSet
from fedloom.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class LossOn(StrEnum):
    """Which tokens are learned: the answer and its end, or everything after the first token."""

    ANSWER = "answer"
    ALL = "all"


class Overlong(StrEnum):
    """What becomes of a row with more tokens than allowed."""

    ERROR = "error"
    DROP = "drop"
    TRUNCATE = "truncate"


class Unanswered(StrEnum):
    """What becomes of a row without an answer."""

    ERROR = "error"
    DROP = "drop"


@dataclass(frozen=True)
class EncodingCounts:
    """What happened to the rows.

    ``num_rows = num_kept + num_unanswered + num_overlong_dropped + num_answer_cut_off``; the truncated ones are kept.
    A dialogue whose earlier turns the chat template rewrites is a row for each answer; ``num_answers_apart`` are those.
    """

    num_rows: int
    num_kept: int
    num_unanswered: int
    num_overlong_dropped: int
    num_truncated: int
    num_answer_cut_off: int
    num_turns_after_last_answer: int
    num_answers_apart: int = 0

    @property
    def told(self) -> str:
        """The counts of what was dropped or changed, for people; empty where nothing was."""
        reasons = {
            "without an answer": self.num_unanswered,
            "too long": self.num_overlong_dropped,
            "whose answer was cut off": self.num_answer_cut_off,
        }
        dropped = ", ".join(f"{number:,} {reason}" for reason, number in reasons.items() if number)
        parts = [f"{self.num_kept:,} of {self.num_rows:,} rows kept; dropped: {dropped}"] if dropped else []
        parts += [f"{self.num_truncated:,} rows truncated"] if self.num_truncated else []
        if self.num_turns_after_last_answer:
            parts.append(f"{self.num_turns_after_last_answer:,} turns after the last answer dropped")
        if self.num_answers_apart:
            parts.append(
                f"{self.num_answers_apart:,} answers learned each in a row of its own, since the chat template writes "
                "earlier turns differently"
            )
        return "; ".join(parts)

    def as_dict(self) -> dict[str, int]:
        """Return the counts by name; what rows of earlier versions could not be is left out where there is none."""
        return {name: number for name, number in self.__dict__.items() if number or name != "num_answers_apart"}


@dataclass(frozen=True)
class Encoded:
    """The tokens, the position among the records each row had (twice for one of two rows), and the counts."""

    tokens: TokenSet
    kept: npt.NDArray[np.int64]
    counts: EncodingCounts


def encode(
    records: Records,
    tokenizer: PreTrainedTokenizerFast,
    *,
    template: str | Path | AnyTemplate = AUTO,
    date: datetime.date | None = None,
    max_length: int | None = None,
    at_most: int | None = None,
    loss_on: LossOn | str = LossOn.ANSWER,
    overlong: Overlong | str = Overlong.ERROR,
    unanswered: Unanswered | str = Unanswered.ERROR,
    named: Callable[[str], str] = "data.{}".format,
) -> Encoded:
    """Tokenise ``records`` and mark what is learned.

    A token is part of the answer when one of the answer's characters is in it, by the tokenizer's offsets; a token
    across the border counts as answer. The tokenizer's beginning-of-text comes first where it has one; the end of text
    follows the answer and is learned, unless a chat template closed the turn with a special token of its own. A
    truncated row has no end of text. A chat template is told that it is ``date``, by default today. ``max_length``
    None means no limit; ``at_most`` is what the base can read, beyond which raising it is no way out. ``named`` gives
    the name by which the user set ``max_length``, ``overlong`` and ``unanswered``: a recipe's setting, unless they are
    options of a command.

    Raises:
        DataError: a row has no answer or too many tokens (unless the policy says otherwise), or none is left.
    """
    loss_on, overlong, unanswered = LossOn(loss_on), Overlong(overlong), Unanswered(unanswered)
    answered, num_trailing = _answered(records, unanswered, named)
    owners: list[int] = []
    wording = resolve_template(template, records.shape, tokenizer, date)
    rows = _Gathered()
    turns_end = ends_of_turns(tokenizer)
    for row in token_rows(_render(records, answered, wording, tokenizer, owners), tokenizer):
        if not row.answer.any():
            raise DataError(
                f"{records.rows.where(owners[len(rows)])}: expected an answer with at least one token, got characters "
                "that the tokenizer drops; correct or remove the row"
            )
        rows.add(closed(row, tokenizer, turns_end))
    lengths = rows.lengths
    limit = max_length if max_length is not None else int(lengths.max(initial=0))
    if overlong is Overlong.ERROR:
        _refuse_overlong(records, owners, lengths, limit, at_most, named)
    too_long = np.flatnonzero(lengths > limit)
    num_truncated = num_cut_off = 0
    stays = lengths <= limit
    if overlong is Overlong.TRUNCATE:
        stays[too_long] = [rows.learns_before(index, limit) for index in too_long.tolist()]
        num_truncated = int(stays[too_long].sum())
        num_cut_off = len(too_long) - num_truncated
    indices = np.array(owners, np.int64)[stays]
    tokens = rows.tokens(stays, limit, loss_on)
    for place, index in enumerate(indices.tolist()) if may_exceed(tokenizer) else ():
        check_ids(tokens.row(place)[0], tokenizer, records.rows.where(index))
    counts = EncodingCounts(
        num_rows=len(records) + len(owners) - len(answered),
        num_kept=len(indices),
        num_unanswered=len(records) - len(answered),
        num_overlong_dropped=len(rows) - len(indices) - num_cut_off,
        num_truncated=num_truncated,
        num_answer_cut_off=num_cut_off,
        num_turns_after_last_answer=num_trailing,
        num_answers_apart=_num_repeated(owners),
    )
    if not len(indices):
        shorter = "shorten the rows, or use a base with a longer context"
        longer = shorter if limit == at_most else f"raise {named('max_length')}"
        remedy = longer if answered else "check the rows and their shape"
        raise DataError(f"expected at least one usable row, got none in {len(records)} ({counts.told}); {remedy}")
    return Encoded(replace(tokens, units=records.rows.units_of(indices)), indices, counts)


def resolve_template(
    name: str | Path | AnyTemplate,
    shape: Shape,
    tokenizer: PreTrainedTokenizerFast,
    date: datetime.date | None = None,
) -> AnyTemplate:
    """Return the template ``name`` stands for, or is; a chat template is told that it is ``date``.

    ``auto`` is the chat template for dialogues when the tokenizer has one, else ``default_template``.

    Raises:
        DataError: ``chat`` was asked for and the tokenizer has no chat template, or there is no template ``name``.
    """
    if isinstance(name, Template | ChatTemplate):
        return name
    has_chat = bool(tokenizer.chat_template)
    if str(name) == CHAT and not has_chat:
        raise DataError(
            "data.template: expected a tokenizer with a chat template for 'chat', got one without; use 'plain'"
        )
    if str(name) == CHAT or (str(name) == AUTO and has_chat and shape in (Shape.MESSAGES, Shape.SHAREGPT)):
        return ChatTemplate(date)
    return load_template(default_template(shape) if str(name) == AUTO else name)


def _answered(records: Records, policy: Unanswered, named: Callable[[str], str]) -> tuple[list[int], int]:
    usable, num_trailing, first_lacking = list[int](), 0, None
    for index, record in enumerate(records.items):
        if _has_answer(record):
            usable.append(index)
            num_trailing += _num_trailing_turns(record)
        elif first_lacking is None:
            first_lacking = index
    if first_lacking is not None and policy is Unanswered.ERROR:
        num_lacking = len(records) - len(usable)
        more = f"; {num_lacking} of {len(records)} rows have none" if num_lacking > 1 else ""
        raise DataError(
            f"{records.rows.where(first_lacking)}: expected an answer, found none ({records.shape} shape{more}); "
            f"fill or remove the row, or set {named('unanswered')} to 'drop'"
        )
    return usable, num_trailing


def _has_answer(record: Record) -> bool:
    match record:
        case Prompt():
            return bool(record.answer.strip())
        case Dialogue():
            answers = [turn for turn in record.turns if turn.is_learned_answer]
            return bool(answers) and not any(answer.is_empty for answer in answers)
        case _:
            assert_never(record)


def _num_trailing_turns(record: Record) -> int:
    if isinstance(record, Prompt) or record.last_answer is None:
        return 0
    return len(record.turns) - 1 - record.last_answer


def _render(
    records: Records,
    indices: Sequence[int],
    template: AnyTemplate,
    tokenizer: PreTrainedTokenizerFast,
    owners: list[int],
) -> Iterator[Rendered]:
    """Yield the texts of records, and add to ``owners`` whose each one is: a record may need several."""
    for index in indices:
        record = records.items[index]
        if isinstance(record, Dialogue) and (trailing := _num_trailing_turns(record)):
            record = replace(record, turns=record.turns[:-trailing])
        try:
            for text in _texts(record, template, tokenizer):
                owners.append(index)
                yield text
        except DataError as problem:
            raise DataError(f"{records.rows.where(index)}: {problem}") from problem


def _texts(record: Record, template: AnyTemplate, tokenizer: PreTrainedTokenizerFast) -> list[Rendered]:
    """Return a record's text; of a dialogue whose earlier turns the template rewrites, one that ends on each answer."""
    try:
        return [render(record, template, tokenizer)]
    except RewritesTurnsError:
        assert isinstance(record, Dialogue)
        answers = [position for position, turn in enumerate(record.turns) if turn.is_learned_answer]
        if len(answers) < 2:
            raise
    return [render(record.up_to(position), template, tokenizer) for position in answers]


def _num_repeated(owners: Sequence[int]) -> int:
    """Return how many texts share their record with another."""
    _, counts = np.unique(np.array(owners, np.int64), return_counts=True)
    return int(counts[counts > 1].sum())


def _refuse_overlong(
    records: Records,
    indices: Sequence[int],
    lengths: npt.NDArray[np.int64],
    limit: int,
    at_most: int | None,
    named: Callable[[str], str],
) -> None:
    overlong = np.flatnonzero(lengths > limit)
    if overlong.size:
        first = int(overlong[0])
        what, action = named("max_length"), f"set {named('overlong')} to 'drop' or 'truncate'"
        if limit == at_most:
            what = "the base's context"
        elif at_most is not None and lengths.max() > at_most:
            action = f"raise {named('max_length')}, to {at_most} at most (the base's context), and {action}"
        else:
            action = f"raise {named('max_length')}, or {action}"
        raise DataError(
            f"{records.rows.where(indices[first])}: {lengths[first]} tokens, {what} is {limit} "
            f"({overlong.size} of {len(lengths)} rows are longer, up to {lengths.max()}); {action}"
        )


class _Gathered:
    """The tokens of rows one behind the other, five bytes each: a million rows as objects would take gigabytes."""

    def __init__(self) -> None:
        self._ids, self._answer, self._ends = bytearray(), bytearray(), array("q")

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, row: TokenRow) -> None:
        self._ids += row.ids.astype(np.int32, copy=False).tobytes()
        self._answer += row.answer.tobytes()
        self._ends.append(len(self._answer))

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        return np.concatenate([np.zeros(1, np.int64), np.array(self._ends, np.int64)])

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self.starts)

    def learns_before(self, index: int, limit: int) -> bool:
        """Tell whether one of the first ``limit`` tokens of a row is learned."""
        start = self._ends[index - 1] if index else 0
        return any(self._answer[start : min(start + limit, self._ends[index])])

    def tokens(self, stays: npt.NDArray[np.bool_], limit: int, loss_on: LossOn) -> TokenSet:
        """Return the rows that stay, of each the first ``limit`` tokens, and let go of all."""
        lengths, starts = self.lengths, self.starts[:-1]
        ids, learned = np.frombuffer(self._ids, np.int32), np.frombuffer(self._answer, np.bool_)
        if not stays.all() or (lengths > limit).any():
            place = np.arange(len(ids)) - np.repeat(starts, lengths)
            kept = np.repeat(stays, lengths) & (place < limit)
            ids, learned = ids[kept], learned[kept]
            lengths = np.minimum(lengths[stays], limit)
        match loss_on:
            case LossOn.ANSWER:
                learned = learned.copy()
            case LossOn.ALL:
                learned = np.ones(len(ids), np.bool_)
            case _:
                assert_never(loss_on)
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        learned[ends[:-1]] = False  # no row is empty: nothing stands before its first token
        return TokenSet(ids, learned, ends)
