"""Read the text of a file: rows to train on, questions, references, plain text."""

from __future__ import annotations

import shlex
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
        raise not_utf8(path, cause) from cause
    except OSError as cause:
        raise DataError(f"{path}: expected a file that can be read, got {cause.strerror}; check the path") from cause


def not_utf8(path: Path | str, cause: UnicodeDecodeError, begin: int = 0) -> DataError:
    """Return the refusal of bytes that are no UTF-8, with what they seem to be and how to convert the file.

    ``begin`` is where in the file the bytes begin that were decoded.
    """
    place = begin + cause.start
    if place == 0 and cause.object[:2] in (b"\xff\xfe", b"\xfe\xff"):
        found, encoding = "UTF-16 by its first two bytes", "UTF-16"
    else:
        found, encoding = f"the byte 0x{cause.object[cause.start]:02x} at position {place}", "ENCODING"
    action = f"convert the file, for instance by iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > NEW"
    return DataError(f"{path}: expected UTF-8 text, got {found}; {action}")
