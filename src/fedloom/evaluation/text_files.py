"""Read the text of a file that is to be scored or asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def parse_json(text: str, where: str) -> Any:
    """Return the value of JSON text.

    Raises:
        EvaluationError: it is none, holds half a character, or is nested too deeply.
    """
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as cause:
        reason = "it is nested too deeply" if isinstance(cause, RecursionError) else cause
        raise EvaluationError(f"{where}: expected JSON ({reason}); correct it") from cause
    return value
