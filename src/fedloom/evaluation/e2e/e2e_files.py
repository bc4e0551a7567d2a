"""Read E2E's references and outputs in the formats that are around.

References: the official CSV (``mr,ref``), GPT-2/LoRA's text lines (``mr||ref``), or the official scorer's blocks (one
text per line, an empty line between meaning representations). Outputs: ``MR<TAB>output`` with a header, or one text
per line.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from fedloom.data.text_files import read_utf8
from fedloom.errors import EvaluationError


@dataclass(frozen=True)
class References:
    """Human texts grouped by meaning representation, in order of appearance; no ``mrs`` where the file has none."""

    mrs: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def num_texts(self) -> int:
        """Return how many human texts there are in all."""
        return sum(map(len, self.texts))


@dataclass(frozen=True)
class Outputs:
    """One system's text for every item; ``mrs`` is empty where the file names none."""

    mrs: tuple[str, ...]
    texts: tuple[str, ...]


def read_references(path: Path) -> References:
    """Read references and group them by meaning representation.

    Raises:
        EvaluationError: the file is absent, empty, or in none of the three formats.
    """
    text = _read(path, "references")
    if path.suffix.lower() in {".csv", ".tsv"}:
        return _grouped(_table(path, text, ("mr", "ref")), path)
    lines = text.split("\n")
    if any("||" in line for line in lines):
        return _grouped(_bar_lines(path, lines), path)
    blocks = [tuple(block.split("\n")) for block in text.strip().split("\n\n")]
    texts = tuple(tuple(line for line in block if line.strip()) for block in blocks)
    return _checked(References((), texts), path)


def read_outputs(path: Path) -> Outputs:
    """Read one output per item; single quotes around every cell, as some published systems have them, are taken off.

    Raises:
        EvaluationError: the file is absent or empty, or a table without the columns ``MR`` and ``output``.
    """
    text = _read(path, "outputs")
    if path.suffix.lower() in {".csv", ".tsv"}:
        rows = _table(path, text, ("mr", "output"))
        if all(_is_single_quoted(cell) for row in rows for cell in row):
            rows = [(mr[1:-1], output[1:-1]) for mr, output in rows]
        return Outputs(tuple(mr for mr, _ in rows), tuple(output for _, output in rows))
    return Outputs((), tuple(text.rstrip("\n").split("\n")))


def matched_texts(references: References, outputs: Outputs) -> tuple[str, ...]:
    """Return the outputs in the order of the references, checked item by item.

    Outputs that name their meaning representations are matched by name, others by position.

    Raises:
        EvaluationError: the numbers differ, an item is missing or unknown, or two outputs share one item.
    """
    if len(references) != len(outputs.texts):
        raise EvaluationError(
            f"expected one output for each of {len(references)} meaning representations, got {len(outputs.texts)}: "
            "decode every unique meaning representation once, in the order of the references"
        )
    if not references.mrs or not outputs.mrs:
        return outputs.texts
    by_mr = dict(zip(map(_key, outputs.mrs), outputs.texts, strict=True))
    if len(by_mr) < len(outputs.mrs):
        raise EvaluationError("expected one output per meaning representation, got two for one: keep one of them")
    missing = [mr for mr in references.mrs if _key(mr) not in by_mr]
    if missing:
        raise EvaluationError(
            f"expected an output for every meaning representation, {len(missing)} have none, the first is "
            f"{missing[0]!r}: use the references that the outputs were made from"
        )
    return tuple(by_mr[_key(mr)] for mr in references.mrs)


def _read(path: Path, what: str) -> str:
    if not path.is_file():
        raise EvaluationError(f"{path}: expected a file of {what}, found none: check the path")
    text = read_utf8(path)
    if not text.strip():
        raise EvaluationError(f"{path}: expected {what}, found an empty file: fill it or name another")
    return text.replace("\r\n", "\n")


def _table(path: Path, text: str, columns: tuple[str, str]) -> list[tuple[str, str]]:
    """Return the two named columns; quoted as a whole or not, as published system outputs are."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(StringIO(text, newline=""), delimiter=delimiter)
    try:
        names: Mapping[str, str] = {name.lower().strip(): name for name in reader.fieldnames or ()}
    except csv.Error as error:
        raise EvaluationError(f"{path} line 1: expected CSV, got {error}: correct the line") from error
    if not set(columns) <= set(names):
        raise EvaluationError(
            f"{path}: expected the columns {columns[0]!r} and {columns[1]!r}, found {list(names)}: rename yours"
        )
    if len(names) < len(reader.fieldnames or ()):
        raise EvaluationError(f"{path}: expected every column once, found {reader.fieldnames}: rename or remove one")
    try:
        return [(row[names[columns[0]]] or "", row[names[columns[1]]] or "") for row in reader]
    except csv.Error as error:
        raise EvaluationError(f"{path} line {reader.line_num}: expected CSV, got {error}: correct the line") from error


def _bar_lines(path: Path, lines: list[str]) -> Iterable[tuple[str, str]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        mr, bar, text = line.partition("||")
        if not bar:
            raise EvaluationError(f"{path} line {number}: expected 'mr||ref', got {line[:60]!r}: correct the line")
        yield mr.strip(), text.strip()


def _grouped(rows: Iterable[tuple[str, str]], path: Path) -> References:
    groups: dict[str, list[str]] = {}
    for mr, text in rows:
        groups.setdefault(mr, []).append(text)
    return _checked(References(tuple(groups), tuple(map(tuple, groups.values()))), path)


def _checked(references: References, path: Path) -> References:
    for index, texts in enumerate(references.texts):
        if not any(text.strip() for text in texts):
            name = references.mrs[index] if references.mrs else f"item {index + 1}"
            raise EvaluationError(f"{path}: expected a human text for {name}, got none: fill or remove it")
    return references


def _is_single_quoted(cell: str) -> bool:
    return len(cell) > 1 and cell.startswith("'") and cell.endswith("'")


def _key(mr: str) -> str:
    return " ".join(mr.split())
