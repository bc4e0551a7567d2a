"""Replies of a judge, kept on disk: a repeated run costs nothing, an interrupted one goes on."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedloom.errors import EvaluationError
from fedloom.evaluation.judge.endpoint import Reply


class VerdictCache:
    """One SQLite file: the hash of all that was asked, and the replies. ``path`` None keeps them in memory."""

    def __init__(self, path: Path | None) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._database = sqlite3.connect(path or ":memory:")
            self._database.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, replies TEXT NOT NULL)")
        except sqlite3.Error as error:
            raise EvaluationError(f"{path} is no cache of verdicts ({error}): choose another file") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._database.close()

    def get(self, key: str) -> list[Reply] | None:
        """Return the replies to what ``key`` stands for, None where it was never asked."""
        row = self._database.execute("SELECT replies FROM verdicts WHERE key = ?", (key,)).fetchone()
        return None if row is None else [Reply(*fields) for fields in json.loads(row[0])]

    def put(self, key: str, replies: Sequence[Reply]) -> None:
        """Keep replies, at once and for good."""
        rows = [(reply.text, reply.prompt_tokens, reply.completion_tokens) for reply in replies]
        with self._database:
            self._database.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?)", (key, json.dumps(rows)))


def request_key(**asked: Any) -> str:
    """Return the hash of everything that makes a request what it is."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
