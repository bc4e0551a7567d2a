"""Read rows of JSON as JSON defines it, where Python's reader takes more: each row with the number it has in its file.

Of an object that names one key twice Python keeps the last value, and it reads the words ``NaN`` and ``Infinity``,
which are not JSON. Here the first is rejected with its place, and so is infinity; ``NaN``, which is what pandas writes
where a value is missing, counts as ``null``. Half a pair of surrogates, which no tokenizer reads,
is rejected too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedloom.data.text_files import not_utf8
from fedloom.errors import DataError

_SPACE = " \t\n\r"


def read_json_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the object of every line of a file, with the line's number; the file is read line by line.

    Raises:
        DataError: the file cannot be read or is not UTF-8, a line is not a JSON object, or names a key twice.
    """
    for number, _, line in lines_of(file):
        yield number, row_of_line(line, f"{file} line {number}")


def rows_of_lines(file: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the object of every line that is not empty, with the line's number.

    Raises:
        DataError: a line is not a JSON object, or names a key twice.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, row_of_line(line, f"{file} line {number}")


def lines_of(file: Path) -> Iterator[tuple[int, int, str]]:
    """Yield every line of a file that is not empty, with its number and the byte at which it begins.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """
    try:
        with file.open("rb") as stream:
            at = 0
            for number, line in enumerate(stream, start=1):
                begin, at = at, at + len(line)
                if text := decoded(line, file, begin).strip("\n"):
                    yield from [(number, begin, text)] if text.strip() else []
    except OSError as cause:
        raise DataError(f"{file}: expected a file that can be read, got {cause.strerror}; check the path") from cause


def decoded(line: bytes, file: Path, begin: int) -> str:
    """Return a line as text; a byte-order mark at the file's beginning is not part of it.

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        return line.decode("utf-8" if begin else "utf-8-sig")
    except UnicodeDecodeError as cause:
        raise not_utf8(file, cause, begin) from cause


def row_of_line(line: str, place: str) -> dict[str, Any]:
    """Return the one object of a line.

    Raises:
        DataError: the line is not a JSON object, or names a key twice.
    """
    try:
        value, end = _value(line, _begin(line, 0), place)
        _expect_end(line, end)
    except json.JSONDecodeError as cause:
        raise DataError(
            f"{place}: expected one JSON object per line, or one list of objects for the file; "
            f"got {cause.msg} at column {cause.colno}; correct the line"
        ) from cause
    return _as_row(value, place)


def rows_of_list(file: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of one JSON list, counted from 1.

    Raises:
        DataError: the text is not a list of objects, or an object names a key twice.
    """
    try:
        for number, value in _elements(file, text):
            yield number, _as_row(value, f"{file} row {number}")
    except json.JSONDecodeError as cause:
        raise DataError(
            f"{file} line {cause.lineno} column {cause.colno}: expected JSON, got {cause.msg}; correct the file, or "
            "fetch it again if it is cut short"
        ) from cause


def _elements(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    number, at = 0, _begin(text, _begin(text, 0) + 1)
    is_open = not text.startswith("]", at)
    while is_open:
        number += 1
        value, end = _value(text, at, f"{file} row {number}")
        yield number, value
        at = _begin(text, end)
        is_open = text.startswith(",", at)
        at = _begin(text, at + 1) if is_open else at
    if not text.startswith("]", at):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
    _expect_end(text, at + 1)


def _expect_end(text: str, at: int) -> None:
    if (rest := _begin(text, at)) < len(text):
        raise json.JSONDecodeError("Extra data", text, rest)


def _value(text: str, at: int, place: str) -> tuple[Any, int]:
    """Return the JSON value that begins at ``at``, and where it ends."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        named = dict(pairs)
        if len(named) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in named if keys.count(key) > 1)
            raise DataError(f"{place}: expected every key once in an object, got {twice!r} twice; keep one of them")
        return named

    def constant(word: str) -> None:
        if word != "NaN":
            raise DataError(
                f"{place}: expected JSON, got {word}, which is not a number in JSON; write null or a number"
            )

    try:
        value, end = json.JSONDecoder(object_pairs_hook=unique, parse_constant=constant).raw_decode(text, at)
    except RecursionError as cause:
        raise DataError(
            f"{place}: expected a row, got lists or objects nested too deep to be read; remove the row"
        ) from cause
    except ValueError as cause:
        if "integer string conversion" not in str(cause):  # Python reads no number of more than 4,300 digits
            raise
        raise DataError(
            f"{place}: expected numbers, got one of too many digits to be read; write it as text"
        ) from cause
    if "\\ud" in text[at:end].lower():
        _check_surrogates(value, place)
    return value, end


def _check_surrogates(value: Any, place: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as cause:
        half = ascii(cause.object[cause.start])
        raise DataError(
            f"{place}: expected text, got {half}, a surrogate without its other half (was the text cut inside a "
            "character?); remove it"
        ) from cause


def _begin(text: str, at: int) -> int:
    """Return where the next character that is not a space is, from ``at`` on."""
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def _as_row(value: object, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place}: expected an object with named values, got {type(value).__name__}; correct it")
    return value
