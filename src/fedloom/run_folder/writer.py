"""The run folder: everything a run leaves behind, written so that a kill at any moment loses at most one round.

    runs/x/
      config.json         settings, resolved
      manifest.json       versions, seeds, hashes of base, data and partition, and of the files beside it
      partition.json      who owns which row
      holdings.json       what each client holds, counted by group, for people and the report
      canaries.json       sequences planted among the clients' rows (data.canaries)
      study.json          of a run across sites: the versions of its study, each with its first round
      metrics.jsonl       one record per round
      tensorboard/        the same as events
      rounds/<n>/         record.json, state/ (pruned), clients/, global/, and hashes.json of all these
      adapter/            the result, a PEFT folder
      finished.json       there once the run is complete

A round exists when ``rounds/<n>`` does: it is filled under a temporary name and renamed. ``metrics.jsonl`` is rebuilt
from the rounds at every start and never read, so it never holds half a line or a round that did not complete.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

from fedloom.errors import RunError
from fedloom.run_folder import claim, durable
from fedloom.run_folder.claim import ENTRIES, READY, inside
from fedloom.run_folder.contents import (
    HASHES,
    RECORD,
    ROUNDS,
    STATE,
    RoundFiles,
    hashes_in,
    read_object,
    records_of,
    rounds_done,
    sha256,
)
from fedloom.run_folder.manifest import MANIFEST, write_manifest

TRACKING = ("run.trackers", "run.project", "run.group", "run.tags")
MAY_CHANGE = ("federation.num_rounds", "engine", "run.keep_states", *TRACKING, "model.trust_remote_code")
_RETRY = "free space or mend the disk, then run the same command again"

Writer = Callable[[Path], None]


class RunFolder:
    """A run's folder, held by one process; open it with :meth:`open` and use it as a context manager."""

    def __init__(self, path: Path, lock_descriptor: int, config: dict[str, Any], manifest: dict[str, Any]) -> None:
        self.path = path
        self.config = config
        self.manifest = manifest
        self._lock_descriptor = lock_descriptor

    @classmethod
    def open(
        cls,
        path: Path | str,
        config: Mapping[str, Any],
        identity: Mapping[str, Any],
        fresh: bool = False,
        may_change: Collection[str] = MAY_CHANGE,
    ) -> Self:
        """Create the run folder ``path``, or resume the run in it.

        ``config`` is the resolved recipe, ``identity`` seeds and hashes by name; ``fresh`` removes the earlier run
        first. Settings named in ``may_change`` (or in a table named there) may differ from the earlier run's.

        Raises:
            RunError: the folder is foreign, held by another process, of other settings, or cannot be written.
        """
        path = Path(path)
        claim.refuse_foreign(path)
        with durable.explained(str(path), claim.CHOOSE_ANOTHER):
            path.mkdir(parents=True, exist_ok=True)
            descriptor = claim.lock(path)
        try:
            with durable.explained(str(path), "free space or choose another folder, then run the same command again"):
                claim.recover(path)
                if fresh:
                    claim.clear(path)
                    manifest = claim.start(path, config, identity)
                else:
                    manifest = claim.start_or_resume(path, config, identity, may_change)
            folder = cls(path, descriptor, durable.plain(config), manifest)
            folder._repair_metrics()
        except BaseException:
            os.close(descriptor)
            raise
        return folder

    def close(self) -> None:
        """Let go of the folder; another process may then open it."""
        if self._lock_descriptor >= 0:
            os.close(self._lock_descriptor)
            self._lock_descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # What went in

    def confirm_identity(self, **identity: Any) -> None:
        """Record seeds and hashes the first time; afterwards check that they are the run's.

        Raises:
            RunError: a value differs from the one the run was started with.
        """
        known = self.manifest["identity"]
        claim.refuse_other_identity(self.path, known, durable.plain(identity))
        if not known.keys() >= identity.keys():
            self.manifest["identity"] = {**known, **durable.plain(identity)}
            with durable.explained(str(self.path / MANIFEST), f"the run is kept: {_RETRY}"):
                write_manifest(self.path, self.manifest)

    # Rounds

    def rounds(self) -> list[int]:
        """Return the numbers of the completed rounds, in order."""
        return rounds_done(self.path)

    def last_round(self) -> int | None:
        """Return the number of the last completed round, or None before the first."""
        return max(self.rounds(), default=None)

    def write_round(
        self,
        n: int,
        record: Mapping[str, Any],
        files: Mapping[str, bytes] | None = None,
        writers: Mapping[str, Writer] | None = None,
    ) -> None:
        """Complete round ``n``: its record, its files, and what each writer leaves at its own path, all or nothing.

        Names are relative to ``rounds/<n>/`` and may hold slashes; :meth:`prune` removes what is in ``state/``.

        Raises:
            RunError: the round exists already, or the disk is full or read-only; the rounds before it are untouched.
        """
        final = self.round_path(n)
        if final.exists():
            raise RunError(f"{final} exists: expected the next round to be {(self.last_round() or 0) + 1}, got {n}")
        record = {"round": n, **{key: value for key, value in record.items() if key != "round"}}
        with durable.explained(str(final), f"the run is kept up to the round before: {_RETRY}"):
            (self.path / "finished.json").unlink(missing_ok=True)
            final.parent.mkdir(exist_ok=True)
            encoded = {RECORD: durable.encode_json(record).encode(), **(files or {})}
            with self._filled(encoded, writers or {}) as temporary:
                (temporary / HASHES).write_bytes(RoundFiles.listed(self.manifest["run"], n, temporary))
                durable.publish(temporary, final)
            durable.append_line(self.path / "metrics.jsonl", record)

    def round_files(self, n: int) -> RoundFiles:
        """Return the files of round ``n``.

        Raises:
            RunError: the round is missing, or its list of files is not what was written.
        """
        return RoundFiles.of(self.path, self.manifest, n)

    def round_path(self, n: int) -> Path:
        """Return the folder of round ``n``, to read from."""
        return self.path / ROUNDS / str(n)

    def prune(self, keep: int, entry: str = STATE, also: int | None = None) -> None:
        """Remove ``rounds/<n>/<entry>`` of all but the last ``keep`` (at least 1) rounds, and round ``also``."""
        if keep < 1:
            raise ValueError(f"expected to keep at least 1 round's {entry}, got {keep}")
        for n in self.rounds()[:-keep]:
            if n != also:
                claim.remove(self.path, self.round_path(n) / inside(entry))

    def records(self) -> list[dict[str, Any]]:
        """Return the records of the completed rounds, in order.

        Raises:
            RunError: a round is missing, or its record is not what was written.
        """
        return records_of(self.path, self.manifest)

    # Other entries

    def write_json(self, name: str, value: Any) -> None:
        """Replace the file ``name`` by ``value`` as JSON."""
        self.write_bytes(name, durable.json_bytes(value))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Replace the file ``name``, after the manifest names its hash."""
        path, hashes = self._entry(name), {name: sha256(data)}
        with durable.explained(str(path), f"the run is kept: {_RETRY}"):
            claim.announce(self.path, self.manifest, hashes)
            durable.write_bytes(path, data)
            claim.settle(self.manifest, hashes)

    def read_json(self, name: str) -> Any:
        """Return the content of the JSON file ``name``.

        Raises:
            RunError: it is missing or not what was written.
        """
        return read_object(self.path, self.manifest, self._entry(name).name)

    def write_folder(self, name: str, writer: Writer) -> None:
        """Replace the folder ``name`` by what ``writer`` writes into the path it is given, all or nothing."""
        final = self._entry(name)
        ready = self.path / f"{READY}{name}"
        with durable.explained(str(final), f"the run is kept: {_RETRY}"):
            with self._filled({}, {"": writer}) as temporary:
                hashes = {f"{name}/{file}": found for file, found in hashes_in(temporary).items()}
                claim.announce(self.path, self.manifest, hashes)
                durable.publish(temporary, ready)
            claim.roll_forward(ready)
            claim.settle(self.manifest, hashes)

    def finish(self, record: Mapping[str, Any]) -> None:
        """Mark the run as complete; a later round (after an extension) takes the mark away."""
        self.write_json("finished.json", {"round": self.last_round(), **record})

    @property
    def finished(self) -> dict[str, Any] | None:
        """Return what :meth:`finish` recorded, or None while the run is not complete."""
        return self.read_json("finished.json") if (self.path / "finished.json").exists() else None

    def _entry(self, name: str) -> Path:
        if PurePosixPath(name).parts[0] not in ENTRIES:
            raise ValueError(f"expected an entry of the run folder ({', '.join(ENTRIES)}), got {name!r}")
        return self.path / inside(name)

    @contextmanager
    def _filled(self, files: Mapping[str, bytes], writers: Mapping[str, Writer]) -> Iterator[Path]:
        """Yield a temporary folder that holds the files and what the writers wrote; it is there to be renamed."""
        with durable.temporary_folder(self.path) as temporary:
            for name, data in files.items():
                path = temporary / inside(name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            for name, writer in writers.items():
                path = temporary / inside(name)
                path.parent.mkdir(parents=True, exist_ok=True)
                writer(path)
            yield temporary

    def _repair_metrics(self) -> None:
        """Make metrics.jsonl hold exactly the completed rounds."""
        path = self.path / "metrics.jsonl"
        wanted = "".join(durable.encode_json(record) + "\n" for record in self.records()).encode()
        if not path.exists() or path.read_bytes() != wanted:
            with durable.explained(str(path), _RETRY):
                durable.write_bytes(path, wanted)
