"""What a name on the hub looks like."""

from __future__ import annotations

import re

ROW_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".tsv", ".txt", ".toml", ".gz", ".zst")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def looks_like_hub_name(text: str) -> bool:
    """Tell a hub name (``org/name`` or a bare name) from a path that does not exist."""
    return _HUB_NAME.fullmatch(text) is not None and not text.endswith(ROW_SUFFIXES)
