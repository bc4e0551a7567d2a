"""Replies of a judge, kept on disk: a repeated run costs nothing, an interrupted one resumes."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedloom.errors import EvaluationError
from fedloom.evaluation.judge.endpoint import Reply
from fedloom.file_formats import VERDICT_CACHE

_TABLE = "verdicts"


class VerdictCache:
    """One SQLite file: the hash of all that was asked, the replies, and a hash over both.

    ``path`` None keeps them in memory. Replies of an older file, which has no such hash, get one when it is opened.
    """

    def __init__(self, path: Path | None) -> None:
        """Open the cache, or begin it where there is no file.

        Raises:
            EvaluationError: the file is of another format, no cache of verdicts or a damaged one; nothing was changed.
        """
        self._path = path
        with self._explained():
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path or ":memory:")
        try:
            with self._explained(), self._database:
                self._begin_or_check()
        except EvaluationError:
            self._database.close()
            raise

    def _begin_or_check(self) -> None:
        tables = {name for (name,) in self._database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        number = self._database.execute("PRAGMA user_version").fetchone()[0]
        if not tables and number == 0:
            self._database.execute(f"CREATE TABLE {_TABLE} (key TEXT PRIMARY KEY, replies TEXT NOT NULL, hash TEXT)")
        else:
            # The first caches had no number, and SQLite's own for that is 0.
            is_first = number == 0 and _TABLE in tables
            VERDICT_CACHE.check(str(self._path), 1 if is_first else number, EvaluationError)
            self._hash_older_rows()
        self._database.execute(f"PRAGMA user_version = {VERDICT_CACHE.number}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._database.close()

    def get(self, key: str) -> list[Reply] | None:
        """Return the replies to what ``key`` stands for, None where it was never asked.

        Raises:
            EvaluationError: the file changed since they were written.
        """
        with self._explained():
            row = self._database.execute("SELECT replies, hash FROM verdicts WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        replies, found = row
        if not isinstance(replies, str) or found != _hash(key, replies):
            raise self._damaged("a verdict in it is not what was written")
        return [Reply(*fields) for fields in json.loads(replies)]

    def put(self, key: str, replies: Sequence[Reply]) -> None:
        """Keep replies, at once and for good.

        Raises:
            EvaluationError: the file cannot be written.
        """
        rows = json.dumps([(reply.text, reply.prompt_tokens, reply.completion_tokens) for reply in replies])
        with self._explained(), self._database:
            self._database.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?)", (key, rows, _hash(key, rows)))

    def _hash_older_rows(self) -> None:
        columns = [row[1] for row in self._database.execute("PRAGMA table_info(verdicts)")]
        if columns == ["key", "replies"]:
            self._database.execute("ALTER TABLE verdicts ADD COLUMN hash TEXT")
            rows = self._database.execute("SELECT key, replies FROM verdicts").fetchall()
            self._database.executemany(
                "UPDATE verdicts SET hash = ? WHERE key = ?", [(_hash(key, replies), key) for key, replies in rows]
            )
        elif columns != ["key", "replies", "hash"]:
            raise self._damaged(f"its table has the columns {', '.join(columns)}")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, UnicodeError, ValueError) as error:
            if isinstance(error, EvaluationError):
                raise
            if isinstance(error, sqlite3.OperationalError) and ("locked" in str(error) or "full" in str(error)):
                raise EvaluationError(
                    f"{self._path}: verdicts cannot be kept: {error}; run again when that ends"
                ) from error
            raise self._damaged(str(error)) from error

    def _damaged(self, what: str) -> EvaluationError:
        return EvaluationError(
            f"{self._path}: expected a cache of verdicts, got another or a damaged file ({what}): remove it, or name "
            "another with --out"
        )


def _hash(key: str, replies: Any) -> str:
    return hashlib.sha256(f"{key}\n{replies}".encode()).hexdigest()


def request_key(**asked: Any) -> str:
    """Return the hash of everything that makes a request what it is."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
