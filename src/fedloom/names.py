"""Names: how clients are ordered by theirs, and what one on the hub looks like."""

from __future__ import annotations

import re

ROW_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".tsv", ".txt", ".toml", ".gz", ".zst")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")
_DIGITS = re.compile(r"([0-9]+)")

Place = tuple[int, float, tuple[str | int, ...], str]


def name_order(name: str) -> Place:
    """Return the key that sorts clients by name: numbers by value, then text, its stretches of digits by value too.

    So 2 comes before 10, site2 before site10, and every number before every word; nothing but the names matters.
    """
    if _NUMBER.fullmatch(name):
        return (0, float(name), (), name)
    parts = _DIGITS.split(name)
    return (1, 0.0, tuple(int(part) if index % 2 else part for index, part in enumerate(parts)), name)


def looks_like_hub_name(text: str) -> bool:
    """Tell a hub name (``org/name`` or a bare name) from a path that does not exist."""
    return _HUB_NAME.fullmatch(text) is not None and not text.endswith(ROW_SUFFIXES)
