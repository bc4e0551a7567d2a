"""What a run folder holds, read only as it was written: every file is held against the hash that was kept of it.

The manifest names the hashes of config.json, partition.json, holdings.json, canaries.json, finished.json and of the
adapters' files. A round has its own list, ``hashes.json``, which appears together with the round and names its run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from pydantic import BaseModel, ConfigDict

from fedloom.errors import RunError
from fedloom.run_folder import durable
from fedloom.run_folder.manifest import FORMAT, MANIFEST, read_manifest, sealed, unsealed
from fedloom.wording import resuming

ADAPTER = "adapter"
ROUNDS = "rounds"
RECORD = "record.json"
HASHES = "hashes.json"
STATE = "state"
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
_ROUND = re.compile(r"[1-9][0-9]{0,17}")
"""The name of a round's folder, as it is written: ``²`` is a digit too, and no number."""
_RESTORE = "restore the file, or start over with --fresh"
_DEPTH = 4
"""Folders between a run and an adapter in it: rounds/<n>/clients/<id>."""


class _Hashes(BaseModel):
    """The shape of a round's hashes.json."""

    model_config = ConfigDict(strict=True, extra="forbid")

    run: str
    round: Annotated[int, Ge(1)]
    files: dict[str, str]


def sha256(data: bytes) -> str:
    """Return the hash of a file's content."""
    return hashlib.sha256(data).hexdigest()


def hashes_in(folder: Path) -> dict[str, str]:
    """Return the hash of every file in a folder by its name relative to it; files are read in pieces."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): durable.file_sha256(path) for path in files}


def rounds_done(run: Path) -> list[int]:
    """Return the numbers of the rounds that the run in ``run`` has completed, in order."""
    folder = run / ROUNDS
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if _ROUND.fullmatch(name))


def read_file(run: Path, manifest: Mapping[str, Any], name: str) -> bytes:
    """Return a file that the manifest names.

    Raises:
        RunError: it is missing, cannot be read, or is not what was written.
    """
    data = _read(run / name, _RESTORE)
    _check(run, manifest, name, sha256(data), _RESTORE)
    return data


def read_object(run: Path, manifest: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the object in a JSON file that the manifest names.

    Raises:
        RunError: as for :func:`read_file`.
    """
    found: dict[str, Any] = json.loads(read_file(run, manifest, name))
    return found


def check_adapter(run: Path, manifest: Mapping[str, Any], name: str) -> None:
    """Check an adapter's folder, ``adapter`` or ``adapter/client-<k>``.

    Raises:
        RunError: a file of it is missing or not what was written.
    """
    remedy = f"remove {run / ADAPTER} and run again to write it anew: {resuming(run)}"
    for file in PEFT_FILES:
        path = f"{name}/{file}"
        _check(run, manifest, path, _hash_of(run / path, remedy), remedy)


def check_in_run(path: Path) -> Path | None:
    """Check an adapter's folder or a file that may be part of a run, and return that run's folder.

    Such are the result, a kept update and a partition.

    Raises:
        RunError: it is part of a run and not what was written there.
    """
    path = path.resolve()
    run = next((parent for parent in list(path.parents)[:_DEPTH] if _is_run(parent)), None)
    if run is None:
        return None
    manifest, name = read_manifest(run), path.relative_to(run)
    files = [name / file for file in PEFT_FILES] if path.is_dir() else [name]
    if name.parts[0] == ROUNDS and len(name.parts) > 2 and _ROUND.fullmatch(name.parts[1]):
        kept = RoundFiles.of(run, manifest, int(name.parts[1]))
        for file in files:
            kept.check(Path(*file.parts[2:]).as_posix())
    elif name.parts[0] == ADAPTER or name.as_posix() in manifest["files"]:
        for file in files:
            _check(run, manifest, file.as_posix(), _hash_of(run / file, _RESTORE), _RESTORE)
    return run


def _is_run(folder: Path) -> bool:
    """Tell whether a folder is a run whose files have hashes."""
    try:
        found = durable.read_json(folder / MANIFEST)
    except RunError:
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT and isinstance(found.get("files"), dict)


@dataclass(frozen=True)
class RoundFiles:
    """A completed round's files."""

    folder: Path
    hashes: Mapping[str, str]
    remedy: str

    @classmethod
    def of(cls, run: Path, manifest: Mapping[str, Any], n: int, last: int | None = None) -> RoundFiles:
        """Return the files of round ``n``; ``last`` is the run's last round, where the caller has looked already.

        Raises:
            RunError: their list is missing, damaged, or of another round or run.
        """
        folder = run / ROUNDS / str(n)
        remedy = _remedy(folder, n, max(rounds_done(run), default=n) if last is None else last)
        document = durable.read_json(folder / HASHES)
        found = unsealed(folder / HASHES, document, _Hashes, remedy)
        if (found["run"], found["round"]) != (manifest["run"], n):
            raise RunError(
                f"{folder / HASHES}: expected round {n} of this run, found round {found['round']} of "
                f"{'this' if found['run'] == manifest['run'] else 'another'} run; {remedy}"
            )
        return cls(folder, found["files"], remedy)

    @staticmethod
    def listed(run_id: str, n: int, folder: Path) -> bytes:
        """Return the list of the files that ``folder``, the round to be, holds."""
        return durable.json_bytes(sealed({"run": run_id, "round": n, "files": hashes_in(folder)}))

    def read(self, name: str) -> bytes:
        """Return a file.

        Raises:
            RunError: it is missing or not what was written.
        """
        data = _read(self.folder / name, self.remedy)
        self._hold(name, sha256(data))
        return data

    def check(self, name: str) -> None:
        """Check a file without keeping it in memory.

        Raises:
            RunError: it is missing or not what was written.
        """
        self._hold(name, _hash_of(self.folder / name, self.remedy))

    def _hold(self, name: str, got: str) -> None:
        if got != self.hashes.get(name):
            raise _changed(self.folder / name, self.hashes.get(name), got, self.remedy)


def records_of(run: Path, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the records of the completed rounds, in order.

    Raises:
        RunError: a round is missing, or its record is not what was written.
    """
    rounds = rounds_done(run)
    for n, found in enumerate(rounds, start=1):
        if n != found:
            raise RunError(
                f"{run / ROUNDS / str(n)}: expected rounds 1 to {rounds[-1]}, found none of this number; restore it, "
                "or start over with --fresh"
            )
    return [json.loads(RoundFiles.of(run, manifest, n, rounds[-1]).read(RECORD)) for n in rounds]


def check_end(run: Path, finished: Mapping[str, Any], last_round: int) -> None:
    """Check that a finished run has all the rounds that it finished with.

    Raises:
        RunError: it has fewer.
    """
    wanted = finished.get("round") or 0
    if wanted > last_round:
        raise RunError(
            f"{run / ROUNDS}: expected round {wanted} as the last, as finished.json says, found {last_round}; restore "
            "the rounds, or run again with the command that began it"
        )


def accepted_on_disk(run: Path, name: str, accepted: Collection[str]) -> list[str]:
    """Return the hashes of a file that have to be accepted on: of several the one that is there."""
    if len(accepted) < 2:
        return list(accepted)
    path = run / name
    found = durable.file_sha256(path) if path.is_file() else None
    return [one for one in accepted if one == found]


def _check(run: Path, manifest: Mapping[str, Any], name: str, got: str, remedy: str) -> None:
    accepted = manifest["files"].get(name, [])
    if got not in accepted:
        # Another process may have replaced both since the manifest was read.
        accepted = read_manifest(run)["files"].get(name, [])
    if got not in accepted:
        raise _changed(run / name, accepted[-1] if accepted else None, got, remedy)


def _changed(path: Path, wanted: str | None, got: str, remedy: str) -> RunError:
    expected = "no such file" if wanted is None else f"what the run wrote (sha256 {wanted[:12]})"
    return RunError(f"{path}: expected {expected}, got other content (sha256 {got[:12]}); {remedy}")


def _read(path: Path, remedy: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error, remedy) from error


def _hash_of(path: Path, remedy: str) -> str:
    try:
        return durable.file_sha256(path)
    except OSError as error:
        raise _unreadable(path, error, remedy) from error


def _unreadable(path: Path, error: OSError, remedy: str) -> RunError:
    return RunError(f"{path}: expected a file that the run wrote, got {error.strerror or error}; {remedy}")


def _remedy(folder: Path, n: int, last: int) -> str:
    if n == last and n > 1:
        return f"remove {folder} to resume from the round before, or start over with --fresh"
    return _RESTORE
