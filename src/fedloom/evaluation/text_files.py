"""Read the text of a file that is to be scored or asked."""

from __future__ import annotations

from pathlib import Path

from fedloom.errors import EvaluationError


def read_utf8(path: Path) -> str:
    """Return the text of a file; a byte-order mark is no part of it.

    Raises:
        EvaluationError: the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as cause:
        raise EvaluationError(f"{path}: expected UTF-8 text, got {cause}; convert the file") from cause
    except OSError as cause:
        raise EvaluationError(f"{path}: expected a file that can be read, got {cause.strerror}") from cause
