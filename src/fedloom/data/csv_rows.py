"""Read rows of comma- or tab-separated values, each with the line on which it begins."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from fedloom.data.text_files import not_utf8
from fedloom.errors import DataError

_SIGNS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_REMEDIES = {"\t": "rename the file to .tsv", ",": "rename the file to .csv"}


def read_csv(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield every record of a file with a header, and the line on which it begins; ``.tsv`` is separated by tabs.

    Raises:
        DataError: the file is not UTF-8 or not CSV, its header is separated otherwise, or a record has another
            number of values.
    """
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        begins = 1
        try:
            for values in reader:
                if header is None:
                    header = _header(values, file, delimiter)
                elif values and len(values) != len(header):
                    raise DataError(
                        f"{file} line {begins}: expected {len(header)} values ({', '.join(header)}), got "
                        f"{len(values)}; quote the values that contain the separator"
                    )
                elif values:
                    yield begins, dict(zip(header, values, strict=True))
                begins = reader.line_num + 1
        except csv.Error as cause:
            raise DataError(
                f"{file} line {begins}: expected CSV, got {cause}; correct the line (is a quote never closed?)"
            ) from cause
        except UnicodeDecodeError as cause:
            raise not_utf8(file, cause) from cause


def _header(names: list[str], file: Path, delimiter: str) -> list[str]:
    between = next((sign for sign in ",;\t|" if sign != delimiter and sign in names[0]), None) if names else None
    if len(names) == 1 and between is not None:
        action = _REMEDIES.get(between, "write the file with commas between its values")
        found = f"{names[0]!r}, as if by {_SIGNS[between]}"
        raise DataError(f"{file} line 1: expected columns separated by {_SIGNS[delimiter]}, got {found}; {action}")
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{file} line 1: expected every column once, got {name!r} twice; rename or remove one")
    return names
