"""Turn rows of any known shape into records: what is asked, and the answer to learn.

Every shape ends as one of two records: a ``Prompt`` (an instruction, perhaps an input, and an answer) or a
``Dialogue`` (turns by role). Templates know these two and nothing about shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, overload

from fedloom.data.sources import Row, Rows
from fedloom.data.stored_rows import is_stored
from fedloom.data.turns import Turn, history_turns, message_turns, sharegpt_turns, text_of, tools_of, with_system
from fedloom.errors import DataError
from fedloom.wording import meant

__all__ = ["Dialogue", "Prompt", "Record", "Records", "Shape", "Turn", "detect_shape", "read_records"]


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
class Prompt:
    """An instruction with an optional input, and its answer."""

    instruction: str
    input: str
    answer: str

    @property
    def asked(self) -> str:
        """What is asked, as one turn."""
        return f"{self.instruction}\n\n{self.input}" if self.input.strip() else self.instruction


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Turns in order; the assistant's are the answers, which may call ``tools``."""

    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)

    @property
    def last_answer(self) -> int | None:
        """The position of the last answer that is learned; None where there is none."""
        learned = [position for position, turn in enumerate(self.turns) if turn.is_learned_answer]
        return learned[-1] if learned else None

    def up_to(self, position: int) -> Dialogue:
        """Return the dialogue up to and with the answer at ``position``, which alone is learned."""
        before = (replace(turn, learned=False) for turn in self.turns[:position])
        return replace(self, turns=(*before, self.turns[position]))


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
    """Column names of a shape: the instruction (or the turns), the optional input, the answer, what stands before."""

    asked: str
    answer: str | None = None
    extra: str | None = None
    before: tuple[str, ...] = ()

    @property
    def required(self) -> tuple[str, ...]:
        return (self.asked,) if self.answer is None else (self.asked, self.answer)

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.required, *((self.extra,) if self.extra else ()), *self.before)


_EARLIER = ("system", "history")
_FIELDS = {
    Shape.ALPACA: _Fields("instruction", "output", "input", _EARLIER),
    Shape.DOLLY: _Fields("instruction", "response", "context", _EARLIER),
    Shape.PROMPT_COMPLETION: _Fields("prompt", "completion", before=_EARLIER),
    Shape.MESSAGES: _Fields("messages", before=("system", "tools")),
    Shape.SHAREGPT: _Fields("conversations", before=("system", "tools")),
    Shape.E2E: _Fields("mr", "ref"),
    Shape.QUESTION_ANSWER: _Fields("question", "answer", before=_EARLIER),
}
_E2E_SEPARATOR = "||"


def read_records(rows: Rows, shape: Shape | str = Shape.AUTO, columns: Mapping[str, str] | None = None) -> Records:
    """Read each row as ``shape``; ``columns`` maps the shape's names to the file's, e.g. ``{"prompt": "frage"}``.

    What changes learning is read too: an earlier exchange or a system prompt in a column of its own makes a dialogue
    of a prompt. An answer may still be empty here: ``encode`` decides what becomes of such rows. Numbers count as text,
    and NaN, a missing value, as none.

    Raises:
        DataError: the shape cannot be determined, or a row misses a column or holds something that is not text.
    """
    shape, named = _parse_shape(shape), dict(columns or {})
    if shape is Shape.AUTO:
        shape = detect_shape(rows, named)
    fields = _FIELDS[shape]
    _check_columns(named, shape)

    def read(index: int, row: Row) -> Record:
        try:
            return _read(row, shape, fields, named)
        except DataError as problem:
            raise DataError(f"{rows.where(index)}: {problem}") from None

    if not is_stored(rows.rows):
        return Records(shape, [read(index, row) for index, row in enumerate(rows.rows)], rows)
    for index, row in enumerate(rows.rows):
        read(index, row)
    return Records(shape, _StoredRecords(rows.rows, read), rows)


class _StoredRecords(Sequence[Record]):
    """Records of rows that are not held in memory, made each time they are asked for."""

    def __init__(self, rows: Sequence[Row], read: Callable[[int, Row], Record]) -> None:
        self._rows, self._read = rows, read

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        return self._read(index, self._rows[index])


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
    action = "name your columns by data.columns, or rename them"
    inner = next((name for name, value in first.items() if _holds_rows(value)), None)
    if len(rows) == len(first) == 1 and inner is not None:
        action = f"write the list {inner!r}, which seems to hold the rows, to a file of its own"
    raise DataError(f"{found}, which fit no shape ({known}); {action}")


def _holds_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)


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
    return meant(name, map(str, names)).rstrip() or "choose one of these"


def _read(row: Row, shape: Shape, fields: _Fields, columns: Mapping[str, str]) -> Record:
    free = [name for name in fields.before if name in columns or name not in columns.values()]
    before = {name: row.get(columns.get(name, name)) for name in free}
    if shape in (Shape.MESSAGES, Shape.SHAREGPT):
        read = message_turns if shape is Shape.MESSAGES else sharegpt_turns
        turns = with_system(read(_value(row, fields.asked, columns)), text_of(before.get("system"), "system"))
        return Dialogue(turns, tools_of(before.get("tools")))
    if shape is Shape.E2E and not columns and _is_e2e_text(row):
        meaning, _, reference = row["text"].partition(_E2E_SEPARATOR)
        return Prompt(meaning.strip(), "", reference.strip())
    assert fields.answer is not None
    extra = columns.get(fields.extra, fields.extra) if fields.extra else None
    prompt = Prompt(
        text_of(_value(row, fields.asked, columns), fields.asked),
        text_of(row.get(extra), extra) if extra else "",
        text_of(_value(row, fields.answer, columns), fields.answer),
    )
    return _after(before, prompt)


def _after(before: Mapping[str, Any], prompt: Prompt) -> Record:
    """Return a prompt after what its row says stands before it: then it is the last exchange of a dialogue."""
    turns = history_turns(before.get("history"))
    system = text_of(before.get("system"), "system")
    if not turns and not system.strip():
        return prompt
    asked = (Turn("user", prompt.asked), Turn("assistant", prompt.answer))
    return Dialogue(with_system((*turns, *asked), system))


def _value(row: Row, name: str, columns: Mapping[str, str]) -> Any:
    column = columns.get(name, name)
    if column not in row:
        raise DataError(
            f"expected a column {column!r}, found {', '.join(map(repr, row))}; {meant(column, row)}add it, or name "
            "yours with data.columns"
        )
    return row[column]


def _is_e2e_text(row: Row) -> bool:
    text = row.get("text")
    return isinstance(text, str) and _E2E_SEPARATOR in text
