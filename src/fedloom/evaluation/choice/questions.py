"""Read multiple-choice questions: MMLU's folders of CSV files, and any JSONL with question, choices and answer."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from fedloom.data.json_rows import read_json_lines
from fedloom.data.text_files import read_utf8
from fedloom.errors import EvaluationError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """A question, its choices, and the index of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""


def read_mmlu(folder: Path, split: str = "test") -> list[Question]:
    """Read ``folder/<split>/*.csv``, with or without a header, answers as a letter or an index; by subject, in order.

    Raises:
        EvaluationError: there is no such folder or file, or a row is not a question.
    """
    files = sorted((folder / split).glob("*.csv"))
    if not files:
        raise EvaluationError(
            f"{folder / split}: expected MMLU's CSV files, e.g. anatomy_{split}.csv, found none; name the folder that "
            "holds "
            f"the folder {split}"
        )
    return [question for file in files for question in _read_csv(file, file.stem.removesuffix(f"_{split}"))]


def read_questions(file: Path) -> list[Question]:
    """Read a JSON object per line: ``question``, ``choices`` (a list), ``answer`` (index, letter, text), ``subject``.

    Raises:
        EvaluationError: the file is missing or empty, or a line is not a question.
        DataError: it cannot be read, or a line is not a JSON object.
    """
    if not file.is_file():
        raise EvaluationError(
            f"{file}: expected a file of JSON lines with question, choices and answer, found none; check the path"
        )
    questions = [_from_row(row, f"{file} line {number}") for number, row in read_json_lines(file)]
    if not questions:
        raise EvaluationError(f"{file}: expected at least one question, found none; fill the file or name another")
    return questions


def _read_csv(file: Path, subject: str) -> Iterator[Question]:
    for number, row in enumerate(_cells(file), start=1):
        if number == 1 and row and row[0].strip().lower() == "question":
            continue
        if len(row) < 4:
            raise EvaluationError(
                f"{file} row {number}: expected a question, at least two choices and the answer, got {len(row)} cells; "
                "correct or remove the row"
            )
        yield _question(row[0], row[1:-1], row[-1], subject, f"{file} row {number}")


def _cells(file: Path) -> list[list[str]]:
    reader = csv.reader(StringIO(read_utf8(file), newline=""))
    try:
        return list(reader)
    except csv.Error as error:
        raise EvaluationError(f"{file} line {reader.line_num}: expected CSV, got {error}; correct the line") from error


def _from_row(row: dict[str, Any], where: str) -> Question:
    if not {"question", "choices", "answer"} <= row.keys():
        raise EvaluationError(
            f"{where}: expected the keys question, choices and answer, got {', '.join(row)}; add what is missing"
        )
    choices = row["choices"]
    if isinstance(choices, dict):  # as the hub has ARC: {"text": [...], "label": [...]}
        if str(row["answer"]) in choices.get("label", []):
            row["answer"] = choices["label"].index(str(row["answer"]))
        choices = choices.get("text")
    if not isinstance(choices, list):
        raise EvaluationError(f"{where}: expected a list of choices, got {choices!r}; write a list")
    return _question(row["question"], choices, row["answer"], str(row.get("subject", "")), where)


def _question(text: Any, choices: list[Any], answer: Any, subject: str, where: str) -> Question:
    texts = tuple(str(choice) for choice in choices)
    if len(texts) < 2 or len(texts) > len(LETTERS):
        raise EvaluationError(f"{where}: expected 2 to {len(LETTERS)} choices, got {len(texts)}; correct or remove it")
    if not str(text).strip():
        raise EvaluationError(f"{where}: expected a question, got an empty text; fill or remove it")
    return Question(str(text), texts, _index(answer, texts, where), subject)


def _index(answer: Any, choices: tuple[str, ...], where: str) -> int:
    """Return the answer's index; a number is an index, a letter a label, anything else the text of one choice."""
    written = str(answer).strip()
    if written.isdecimal() and int(written) < len(choices):
        return int(written)
    if len(written) == 1 and written.upper() in LETTERS[: len(choices)]:
        return LETTERS.index(written.upper())
    if choices.count(written) == 1:
        return choices.index(written)
    raise EvaluationError(
        f"{where}: expected the index, letter or text of one of the {len(choices)} choices as answer, got {written!r}; "
        "correct it"
    )
