"""Replies of a judge, kept on disk: a repeated run costs nothing, an interrupted one resumes."""

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
from fedloom.file_formats import VERDICT_CACHE

_TABLE = "verdicts"


class VerdictCache:
    """One SQLite file: the hash of all that was asked, and the replies. ``path`` None keeps them in memory."""

    def __init__(self, path: Path | None) -> None:
        """Open the cache, or begin it where there is no file.

        Raises:
            EvaluationError: the file is of another format, or is not a cache of verdicts; nothing was changed.
        """
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._database = sqlite3.connect(path or ":memory:")
            self._begin_or_check(path)
        except sqlite3.Error as error:
            raise EvaluationError(
                f"{path}: expected a cache of verdicts, got another file ({error}): choose another file"
            ) from error

    def _begin_or_check(self, path: Path | None) -> None:
        tables = {name for (name,) in self._database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        number = self._database.execute("PRAGMA user_version").fetchone()[0]
        if not tables and number == 0:
            with self._database:
                self._database.execute(f"CREATE TABLE {_TABLE} (key TEXT PRIMARY KEY, replies TEXT NOT NULL)")
                self._database.execute(f"PRAGMA user_version = {VERDICT_CACHE.number}")
            return
        try:
            # The first caches had no number, and SQLite's own for that is 0.
            is_first = number == 0 and _TABLE in tables
            VERDICT_CACHE.check(str(path), 1 if is_first else number, EvaluationError)
            self._database.execute(f"SELECT key, replies FROM {_TABLE} LIMIT 0")
        except BaseException:
            self._database.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._database.close()

    def get(self, key: str) -> list[Reply] | None:
        """Return the replies to what ``key`` stands for, None where it was never asked."""
        row = self._database.execute(f"SELECT replies FROM {_TABLE} WHERE key = ?", (key,)).fetchone()
        return None if row is None else [Reply(*fields) for fields in json.loads(row[0])]

    def put(self, key: str, replies: Sequence[Reply]) -> None:
        """Keep replies, at once and for good."""
        rows = [(reply.text, reply.prompt_tokens, reply.completion_tokens) for reply in replies]
        with self._database:
            self._database.execute(f"INSERT OR REPLACE INTO {_TABLE} VALUES (?, ?)", (key, json.dumps(rows)))


def request_key(**asked: Any) -> str:
    """Return the hash of everything that makes a request what it is."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
