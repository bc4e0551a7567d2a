"""Rows that stay in their file: found by where their lines begin, and read each time they are asked for.

A million rows as Python's dictionaries take gigabytes; where they begin takes eight megabytes.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from fedloom.data.json_rows import decoded, lines_of, row_of_line
from fedloom.errors import DataError

STORED_FROM_BYTES = 1 << 26
"""Files of this size and more are not held in memory."""


class _Rows(Sequence[dict[str, Any]]):
    """Rows of which a slice is a choice, and no copy."""

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | Sequence[dict[str, Any]]:
        if isinstance(index, slice):
            return ChosenRows(self, np.arange(len(self))[index])
        return self._at(index)

    @abstractmethod
    def _at(self, index: int) -> dict[str, Any]:
        """Return one row."""


class StoredRows(_Rows):
    """The rows of a file of JSON lines, all of them checked when it is opened.

    ``numbers`` (N,) are the lines on which they begin. A file that is written to later is refused; one that takes its
    place under its name is not seen.

    Raises:
        DataError: the file cannot be read, or a line is no row.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._descriptor = file, -1
        try:
            self._descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as cause:
            raise DataError(
                f"{file}: expected a file that can be read, got {cause.strerror}; check the path"
            ) from cause
        self._stamp = self._now()
        begins, numbers = [], []
        for number, begin, line in lines_of(file):
            row_of_line(line, f"{file} line {number}")
            begins.append(begin)
            numbers.append(number)
        self._begins = np.array([*begins, self._stamp[0]], np.int64)
        self.numbers = np.array(numbers, np.int64)
        self._check_unchanged()

    def __del__(self) -> None:
        if self._descriptor >= 0:
            with suppress(OSError):
                os.close(self._descriptor)

    def __len__(self) -> int:
        return len(self.numbers)

    def _at(self, index: int) -> dict[str, Any]:
        place = range(len(self))[index]
        self._check_unchanged()
        begin = int(self._begins[place])
        # Up to the next row: a line, and empty ones behind it.
        text = decoded(os.pread(self._descriptor, int(self._begins[place + 1]) - begin, begin), self._file, begin)
        return row_of_line(text.partition("\n")[0], f"{self._file} line {self.numbers[place]}")

    def _now(self) -> tuple[int, int]:
        found = os.fstat(self._descriptor)
        return found.st_size, found.st_mtime_ns

    def _check_unchanged(self) -> None:
        if self._now() != self._stamp:
            raise DataError(
                f"{self._file}: expected the file as it was when its rows were read, got another; run again"
            )


class ChosenRows(_Rows):
    """Some rows of others, in a given order, without a copy of them."""

    def __init__(self, rows: Sequence[dict[str, Any]], indices: npt.NDArray[np.int64]) -> None:
        is_chosen = isinstance(rows, ChosenRows)
        self._rows = rows._rows if is_chosen else rows  # type: ignore[attr-defined]
        self._indices = rows._indices[indices] if is_chosen else indices  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self._rows[int(index)] for index in self._indices)

    def _at(self, index: int) -> dict[str, Any]:
        found: dict[str, Any] = self._rows[int(self._indices[index])]
        return found


def is_stored(rows: Sequence[dict[str, Any]]) -> bool:
    """Tell whether rows are read each time that they are asked for."""
    return isinstance(rows, StoredRows | ChosenRows)
