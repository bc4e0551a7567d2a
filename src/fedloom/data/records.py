"""Turn rows of any known shape into records: what is asked, and the answer to learn.

Every shape ends as one of two records: a ``Prompt`` (an instruction, perhaps an input, and an answer) or a
``Dialogue`` (turns by role). Templates know these two and nothing about shapes.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from fedloom.data.sources import Row, Rows
from fedloom.errors import DataError


class Shape(StrEnum):
    """How a row is laid out."""

    AUTO = "auto"
    ALPACA = "alpaca"
    DOLLY = "dolly"
    PROMPT_COMPLETION = "prompt-completion"
    MESSAGES = "messages"
    SHAREGPT = "sharegpt"
    E2E = "e2e"
    QUESTION_ANSWER = "question-answer"


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a dialogue; ``role`` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """An instruction with an optional input, and its answer."""

    instruction: str
    input: str
    answer: str


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Turns in order; the assistant's are the answers."""

    turns: tuple[Turn, ...]


Record = Prompt | Dialogue


@dataclass(frozen=True)
class Records:
    """Records of one shape, in the order of the rows they were read from."""

    shape: Shape
    items: Sequence[Record]
    rows: Rows

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True)
class _Fields:
    """Column names of a shape: the instruction (or the turns), the optional input, the answer."""

    asked: str
    answer: str | None = None
    extra: str | None = None

    @property
    def required(self) -> tuple[str, ...]:
        return (self.asked,) if self.answer is None else (self.asked, self.answer)

    @property
    def all(self) -> tuple[str, ...]:
        return self.required if self.extra is None else (*self.required, self.extra)


_FIELDS = {
    Shape.ALPACA: _Fields("instruction", "output", "input"),
    Shape.DOLLY: _Fields("instruction", "response", "context"),
    Shape.PROMPT_COMPLETION: _Fields("prompt", "completion"),
    Shape.MESSAGES: _Fields("messages"),
    Shape.SHAREGPT: _Fields("conversations"),
    Shape.E2E: _Fields("mr", "ref"),
    Shape.QUESTION_ANSWER: _Fields("question", "answer"),
}
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
}
_MESSAGE_ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system"}
_E2E_SEPARATOR = "||"


def read_records(rows: Rows, shape: Shape | str = Shape.AUTO, columns: Mapping[str, str] | None = None) -> Records:
    """Read each row as ``shape``; ``columns`` maps the shape's names to the file's, e.g. ``{"prompt": "frage"}``.

    An answer may still be empty here: ``encode`` decides what becomes of such rows. Numbers count as text, and NaN, a
    missing value, as none.

    Raises:
        DataError: the shape cannot be determined, or a row misses a column or holds something that is not text.
    """
    shape, named = _parse_shape(shape), dict(columns or {})
    if shape is Shape.AUTO:
        shape = detect_shape(rows, named)
    fields = _FIELDS[shape]
    _check_columns(named, shape)
    items: list[Record] = []
    for index, row in enumerate(rows.rows):
        try:
            items.append(_read(row, shape, fields, named))
        except DataError as problem:
            raise DataError(f"{rows.where(index)}: {problem}") from None
    return Records(shape, items, rows)


def detect_shape(rows: Rows, columns: Mapping[str, str] | None = None) -> Shape:
    """Return the only shape whose required columns the first row has.

    Raises:
        DataError: no shape fits, or more than one does.
    """
    if len(rows) == 0:
        raise DataError("expected rows, got none; check data.path")
    first, named = rows.rows[0], dict(columns or {})
    present = (set(first) - set(named.values())) | set(named)
    fitting = [shape for shape, fields in _FIELDS.items() if present.issuperset(fields.required)]
    if any(name.startswith(("choice", "option")) for name in first):
        fitting = [shape for shape in fitting if shape is not Shape.QUESTION_ANSWER]
    if _is_e2e_text(first):
        fitting.append(Shape.E2E)
    if len(fitting) == 1:
        return fitting[0]
    found = f"{rows.where(0)}: its columns are {', '.join(map(repr, first))}"
    if fitting:
        raise DataError(
            f"{found}, which fit {' and '.join(fitting)}; set data.shape (--shape of evaluate) to the one you mean"
        )
    known = "; ".join(f"{shape}: {', '.join(fields.required)}" for shape, fields in _FIELDS.items())
    raise DataError(f"{found}, which fit no shape ({known}); name your columns by data.columns, or rename them")


def _parse_shape(shape: Shape | str) -> Shape:
    try:
        return Shape(shape)
    except ValueError:
        advice = _nearest(shape, Shape)
        raise DataError(f"data.shape: expected one of {', '.join(Shape)}, got {shape!r}; {advice}") from None


def _check_columns(columns: Mapping[str, str], shape: Shape) -> None:
    allowed = _FIELDS[shape].all
    for name in columns:
        if name not in allowed:
            advice = _nearest(name, allowed)
            raise DataError(
                f"data.columns: expected names of the {shape} shape ({', '.join(allowed)}), got {name!r}; {advice}"
            )


def _nearest(name: str, names: Sequence[str] | type[Shape]) -> str:
    close = difflib.get_close_matches(name, [str(n) for n in names], n=1)
    return f"did you mean {close[0]!r}?" if close else "choose one of these"


def _read(row: Row, shape: Shape, fields: _Fields, columns: Mapping[str, str]) -> Record:
    if shape is Shape.MESSAGES:
        return Dialogue(_turns(_value(row, fields.asked, columns), "role", "content", _MESSAGE_ROLES))
    if shape is Shape.SHAREGPT:
        return Dialogue(_turns(_value(row, fields.asked, columns), "from", "value", _SHAREGPT_ROLES))
    if shape is Shape.E2E and not columns and _is_e2e_text(row):
        meaning, _, reference = row["text"].partition(_E2E_SEPARATOR)
        return Prompt(meaning.strip(), "", reference.strip())
    assert fields.answer is not None
    extra = columns.get(fields.extra, fields.extra) if fields.extra else None
    return Prompt(
        _text(_value(row, fields.asked, columns), fields.asked),
        _text(row.get(extra), extra) if extra else "",
        _text(_value(row, fields.answer, columns), fields.answer),
    )


def _value(row: Row, name: str, columns: Mapping[str, str]) -> Any:
    column = columns.get(name, name)
    if column not in row:
        raise DataError(
            f"expected a column {column!r}, found {', '.join(map(repr, row))}; add it, or name yours with data.columns"
        )
    return row[column]


def _text(value: object, name: str) -> str:
    match value:
        case None:
            return ""
        case str():
            return value
        case bool():
            pass
        case float() if math.isnan(value):
            return ""
        case float() if math.isinf(value):
            raise DataError(f"column {name!r}: expected text or a number, got {value}; write one or leave it empty")
        case int() | float():
            return str(value)
    raise DataError(f"column {name!r}: expected text, got {type(value).__name__}; write text or leave it empty")


def _turns(value: object, role_key: str, content_key: str, roles: Mapping[str, str]) -> tuple[Turn, ...]:
    if not isinstance(value, list):
        raise DataError(f"expected a list of turns, got {type(value).__name__}; correct the row, or set data.shape")
    turns = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict) or role_key not in turn or content_key not in turn:
            found = ", ".join(map(repr, turn)) if isinstance(turn, dict) else type(turn).__name__
            raise DataError(
                f"turn {number}: expected {role_key!r} and {content_key!r}, found {found}; "
                "correct the row, or set data.shape (messages has role and content, sharegpt has from and value)"
            )
        role = turn[role_key]
        if not isinstance(role, str) or role not in roles:
            raise DataError(
                f"turn {number}: expected {role_key!r} to be one of {', '.join(roles)}, got {role!r}; rename it"
            )
        turns.append(Turn(roles[role], _text(turn[content_key], content_key)))
    return tuple(turns)


def _is_e2e_text(row: Row) -> bool:
    text = row.get("text")
    return isinstance(text, str) and _E2E_SEPARATOR in text
