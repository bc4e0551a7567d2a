"""A run folder as read: nothing is locked, changed or repaired."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom.errors import RunError
from fedloom.run_folder import durable
from fedloom.run_folder.claim import RECORD, complete_lines, read_manifest, rounds_done

ADAPTER = "adapter"


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
        return folder if (folder / "adapter_config.json").exists() else None

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
    if not (path / "manifest.json").exists():
        raise RunError(f"{path}: expected a run folder, found one without manifest.json; name the folder of a run")
    manifest = read_manifest(path)
    finished = path / "finished.json"
    return StoredRun(
        path=path,
        config=durable.read_json(path / "config.json"),
        manifest=manifest,
        records=tuple(_records(path)),
        holdings=_holdings(path / "holdings.json"),
        finished=durable.read_json(finished) if finished.exists() else None,
    )


def missing_adapters(path: Path, finished: Mapping[str, Any]) -> list[Path]:
    """Return the adapters' folders that the finished run in ``path`` wrote and that no longer exist."""
    return [path / name for name in finished.get("adapters", ()) if not (path / name / "adapter_config.json").is_file()]


def find_runs(path: Path) -> list[Path]:
    """Return ``path`` itself where it is a run, otherwise the runs directly inside it (a comparison's folder).

    Raises:
        RunError: there is no run in it.
    """
    if (path / "manifest.json").exists() or not path.is_dir():
        return [path]
    inside = sorted(entry for entry in path.iterdir() if (entry / "manifest.json").exists())
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


def _records(path: Path) -> list[dict[str, Any]]:
    """Return the completed rounds' records, from the rounds themselves where metrics.jsonl does not hold them all."""
    lines = complete_lines(path / "metrics.jsonl")
    rounds = rounds_done(path)
    if [line.get("round") for line in lines] == rounds or not rounds:
        return lines
    return [durable.read_json(path / "rounds" / str(n) / RECORD) for n in rounds]


def _holdings(path: Path) -> tuple[Holding, ...]:
    if not path.exists():
        return ()
    try:
        return tuple(Holding(**client) for client in durable.read_json(path)["clients"])
    except (KeyError, TypeError) as error:
        raise RunError(
            f"{path}: expected the clients' names and numbers of rows, got {error!r}; restore the file"
        ) from error
