"""Read the text of a file: rows to train on, questions, references, plain text."""

from __future__ import annotations

from pathlib import Path

from fedloom.errors import DataError


def read_utf8(path: Path) -> str:
    """Return the text of a file; a byte-order mark is not part of it.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as cause:
        raise DataError(f"{path}: expected UTF-8 text, got {cause}; convert the file") from cause
    except OSError as cause:
        raise DataError(f"{path}: expected a file that can be read, got {cause.strerror}; check the path") from cause
