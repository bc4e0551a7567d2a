"""A run folder as read: nothing is locked, changed or repaired, and what is not as it was written is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom.errors import RunError
from fedloom.run_folder.contents import (
    ADAPTER,
    PEFT_FILES,
    RoundFiles,
    check_adapter,
    check_end,
    read_object,
    records_of,
)
from fedloom.run_folder.manifest import MANIFEST, read_manifest
from fedloom.wording import typed


@dataclass(frozen=True)
class Holding:
    """What one client owns: rows, and rows by group (category, task, ...; empty where nobody counted)."""

    name: str
    num_rows: int
    rank: int | None
    rows_by_group: Mapping[str, int]


@dataclass(frozen=True)
class StoredRun:
    """What a run folder holds; ``records`` are the completed rounds in order, ``finished`` None while it is not."""

    path: Path
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]
    records: tuple[Mapping[str, Any], ...]
    holdings: tuple[Holding, ...]
    finished: Mapping[str, Any] | None

    @property
    def method(self) -> str:
        """The method's name, as in the recipe."""
        return str(self.config.get("method", {}).get("name", self.path.name))

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.config.get("run", {}).get("seed", 0))

    @property
    def adapter_folder(self) -> Path | None:
        """Where the result is, or None while there is none."""
        folder = self.path / ADAPTER
        return folder if (folder / PEFT_FILES[0]).exists() else None

    def check_adapter(self, name: str = ADAPTER) -> None:
        """Check the result's files, or those of one client's: ``adapter/client-<k>``.

        Raises:
            RunError: one is missing or not what was written.
        """
        check_adapter(self.path, self.manifest, name)

    def round_files(self, n: int) -> RoundFiles:
        """Return the files of round ``n``.

        Raises:
            RunError: the round is missing, or its list of files is not what was written.
        """
        return RoundFiles.of(self.path, self.manifest, n)

    def evaluations(self) -> list[Mapping[str, Any]]:
        """Return the records that hold an evaluation, in order."""
        return [record for record in self.records if record.get("eval")]


def read_run(path: Path) -> StoredRun:
    """Read a run folder, finished or not.

    Raises:
        RunError: there is no folder, it is not a run or one of another format, or a file in it is damaged.
    """
    if not path.is_dir():
        raise RunError(
            f"{path}: expected a run folder, as `fedloom run --out` makes it, found no folder; check the path"
        )
    if not (path / MANIFEST).exists():
        inside = _run_inside(path)
        action = "name the folder of a run" if inside is None else f"name one of the runs in it, as {inside}"
        raise RunError(f"{path}: expected a run folder, found one without manifest.json; {action}")
    manifest = read_manifest(path)
    finished = read_object(path, manifest, "finished.json") if (path / "finished.json").exists() else None
    records = records_of(path, manifest)
    if finished is not None:
        check_end(path, finished, len(records))
    return StoredRun(
        path=path,
        config=read_object(path, manifest, "config.json"),
        manifest=manifest,
        records=tuple(records),
        holdings=_holdings(path, manifest),
        finished=finished,
    )


def check_result_folder(path: Path) -> None:
    """Check that a folder is there that may be a run or a PEFT adapter; nothing in it is read.

    Raises:
        RunError: it is neither.
    """
    if not path.is_dir():
        raise RunError(f"{path}: expected the folder of a run or of a PEFT adapter, found no folder; check the path")
    if not any((path / name).exists() for name in (MANIFEST, PEFT_FILES[0])):
        names = sorted(entry.name for entry in path.iterdir())
        found = ", ".join(names[:5]) or "an empty folder"
        inside = _run_inside(path)
        action = "give the folder of the run or adapter itself"
        if inside is not None:
            action = f"give one of the runs in it, as {inside}, or compare all: {typed('fedloom', 'report', path)}"
        elif "config.json" in names and any(re.fullmatch(r"model.*\.safetensors", name) for name in names):
            action = "this is a whole model: give it as --base of an adapter, or as model.base of a run"
        raise RunError(
            f"{path}: expected a run ({MANIFEST}) or a PEFT adapter ({PEFT_FILES[0]}), found {found}; {action}"
        )


def _run_inside(path: Path) -> Path | None:
    """Return the first run in a folder of runs, as a comparison makes it."""
    return next((entry for entry in sorted(path.iterdir()) if (entry / MANIFEST).exists()), None)


def missing_adapters(path: Path, finished: Mapping[str, Any]) -> list[Path]:
    """Return the adapters' folders that the finished run in ``path`` wrote and that are no longer there as a whole."""
    names = finished.get("adapters", ())
    return [path / name for name in names if not all((path / name / file).is_file() for file in PEFT_FILES)]


def find_runs(path: Path) -> list[Path]:
    """Return ``path`` itself where it is a run, otherwise the runs directly inside it (a comparison's folder).

    Raises:
        RunError: there is no run in it.
    """
    if (path / MANIFEST).exists() or not path.is_dir():
        return [path]
    inside = sorted(entry for entry in path.iterdir() if (entry / MANIFEST).exists())
    if not inside:
        raise RunError(f"{path}: expected a run folder, or a folder of run folders, found no run in it; check the path")
    return inside


def holdings_document(holdings: list[Holding], group: str | None) -> dict[str, Any]:
    """Return the content of holdings.json; ``group`` says what the groups are, e.g. "category"."""
    clients = [
        {"name": one.name, "num_rows": one.num_rows, "rank": one.rank, "rows_by_group": dict(one.rows_by_group)}
        for one in holdings
    ]
    return {"group": group, "clients": clients}


def _holdings(path: Path, manifest: Mapping[str, Any]) -> tuple[Holding, ...]:
    if not (path / "holdings.json").exists():
        return ()
    return tuple(Holding(**client) for client in read_object(path, manifest, "holdings.json")["clients"])
