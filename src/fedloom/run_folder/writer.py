"""The run folder: everything a run leaves behind, written so that a kill at any moment loses at most one round.

    runs/x/
      config.json         settings, resolved
      manifest.json       versions, seeds, hashes of base, data and partition
      partition.json      who owns which row
      holdings.json       what each client holds, counted by group, for people and the report
      metrics.jsonl       one record per round
      tensorboard/        the same as events
      rounds/<n>/         record.json, state/ (pruned), clients/, global/
      adapter/            the result, a PEFT folder
      finished.json       there once the run is complete

A round exists when ``rounds/<n>`` does: it is filled under a temporary name and renamed. ``metrics.jsonl`` is rebuilt
from the rounds at every start, so it never holds half a line or a round that did not complete.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

from fedloom.errors import RunError
from fedloom.run_folder import claim, durable
from fedloom.run_folder.claim import ENTRIES, READY, RECORD, complete_lines, inside

MAY_CHANGE = ("federation.num_rounds", "engine", "run.keep_states", "run.trackers", "model.trust_remote_code")
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
        with durable.explained(str(path), "choose another folder"):
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
            self.write_json("manifest.json", self.manifest)

    # Rounds

    def rounds(self) -> list[int]:
        """Return the numbers of the completed rounds, in order."""
        return claim.rounds_done(self.path)

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
        final = self.path / "rounds" / str(n)
        if final.exists():
            raise RunError(f"{final} exists: expected the next round to be {(self.last_round() or 0) + 1}, got {n}")
        record = {"round": n, **{key: value for key, value in record.items() if key != "round"}}
        with durable.explained(str(final), f"the run is kept up to the round before: {_RETRY}"):
            (self.path / "finished.json").unlink(missing_ok=True)
            final.parent.mkdir(exist_ok=True)
            encoded = {RECORD: durable.encode_json(record).encode(), **(files or {})}
            self._publish(final, encoded, writers or {})
            self._append_metrics(record)

    def read_round_file(self, n: int, name: str) -> bytes:
        """Return one file of round ``n``.

        Raises:
            RunError: the round or the file is missing.
        """
        path = self.round_path(n) / inside(name)
        try:
            return path.read_bytes()
        except OSError as error:
            raise RunError(
                f"{path}: expected a file of round {n}, got {error.strerror}; restore it, or start over with --fresh"
            ) from error

    def round_path(self, n: int) -> Path:
        """Return the folder of round ``n``, to read from."""
        return self.path / "rounds" / str(n)

    def prune(self, keep: int, entry: str = "state") -> None:
        """Remove ``rounds/<n>/<entry>`` of all but the last ``keep`` (at least 1) rounds."""
        if keep < 1:
            raise ValueError(f"expected to keep at least 1 round's {entry}, got {keep}")
        for n in self.rounds()[:-keep]:
            claim.remove(self.path, self.round_path(n) / inside(entry))

    def records(self) -> list[dict[str, Any]]:
        """Return the records of the completed rounds, in order."""
        return complete_lines(self.path / "metrics.jsonl")

    # Other entries

    def write_json(self, name: str, value: Any) -> None:
        """Replace the file ``name`` by ``value`` as JSON."""
        path = self._entry(name)
        with durable.explained(str(path), f"the run is kept: {_RETRY}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            durable.write_json(path, value)

    def read_json(self, name: str) -> Any:
        """Return the content of the JSON file ``name``."""
        return durable.read_json(self._entry(name))

    def write_folder(self, name: str, writer: Writer) -> None:
        """Replace the folder ``name`` by what ``writer`` writes into the path it is given, all or nothing."""
        final = self._entry(name)
        ready = self.path / f"{READY}{name}"
        with durable.explained(str(final), f"the run is kept: {_RETRY}"):
            self._publish(ready, {}, {"": writer})
            claim.roll_forward(ready)

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

    def _publish(self, final: Path, files: Mapping[str, bytes], writers: Mapping[str, Writer]) -> None:
        temporary = durable.temporary_name(self.path)
        try:
            temporary.mkdir()
            for name, data in files.items():
                path = temporary / inside(name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            for name, writer in writers.items():
                path = temporary / inside(name)
                path.parent.mkdir(parents=True, exist_ok=True)
                writer(path)
            durable.publish(temporary, final)
        except BaseException:
            durable.discard(temporary)
            raise

    def _append_metrics(self, record: Mapping[str, Any]) -> None:
        with (self.path / "metrics.jsonl").open("ab") as file:
            file.write(durable.encode_json(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _repair_metrics(self) -> None:
        """Make metrics.jsonl hold exactly the completed rounds."""
        path = self.path / "metrics.jsonl"
        lines = {line["round"]: line for line in complete_lines(path)}
        kept = [lines.get(n) or durable.read_json(self.round_path(n) / RECORD) for n in self.rounds()]
        wanted = "".join(durable.encode_json(record) + "\n" for record in kept).encode()
        if not path.exists() or path.read_bytes() != wanted:
            with durable.explained(str(path), _RETRY):
                durable.write_bytes(path, wanted)
