"""The day on which a run began: it is what chat templates are told, however long after the run is used."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedloom.run_folder.claim import is_begun
from fedloom.run_folder.manifest import read_manifest

_begun_on: list[str] = []


def today() -> str:
    """Return the day on which a run that starts now begins: today, in UTC as in the manifest."""
    return _begun_on[-1] if _begun_on else datetime.datetime.now(datetime.UTC).date().isoformat()


def begin_on(date: str) -> None:
    """Let every run that this process starts begin on one day, that of the comparison it is part of."""
    _begun_on.append(date)


def date_of(manifest: Mapping[str, Any]) -> str:
    """Return the day on which a run began; manifests that do not name it name the time of its first session."""
    return str(manifest["identity"].get("date") or manifest["sessions"][0]["started"][:10])


def date_in(out: Path, fresh: bool = False) -> str | None:
    """Return the day on which the run in ``out`` began; None where none has, or it starts over."""
    return date_of(read_manifest(out)) if not fresh and is_begun(out) else None


def date_of_all(folders: Iterable[Path], fresh: bool) -> str:
    """Return the day of runs that are to be compared: that on which the first of them began, else today."""
    return min((date for out in folders if (date := date_in(out, fresh)) is not None), default=today())
