"""Who owns which row: a record that is saved once and reused, tied to its data by hash."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedloom.errors import PartitionError
from fedloom.file_formats import PARTITION

IntArray = npt.NDArray[np.int64]
_FORMAT = "fedloom-partition-"


@dataclass(frozen=True, eq=False)
class Partition:
    """Every row given to exactly one client, and no client without a row.

    Client k (0 to K-1, called ``names[k]``) owns ``rows[starts[k]:starts[k+1]]``, in rising order. ``how`` says how it
    was made, for people. The arrays are read-only.

    Raises:
        PartitionError: the rows are no exact cover, a client is empty, or two clients share a name.
    """

    names: tuple[str, ...]
    rows: IntArray
    starts: IntArray
    how: Mapping[str, str | int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        num_clients = len(self.names)
        if len(self.starts) != num_clients + 1 or self.starts[0] != 0 or self.starts[-1] != len(self.rows):
            raise PartitionError(f"expected row limits for {num_clients} clients and {len(self.rows)} rows, got others")
        if len(set(self.names)) < num_clients:
            raise PartitionError("expected every client to have its own name, two share one")
        _refuse_empty(self.names, np.diff(self.starts))
        if not np.array_equal(np.sort(self.rows), np.arange(len(self.rows))):
            raise PartitionError("expected every row to belong to exactly one client; some are missing or given twice")
        for array in (self.rows, self.starts):
            array.setflags(write=False)

    @classmethod
    def from_owners(
        cls,
        owner_of_row: IntArray,
        names: Sequence[str] | int,
        how: Mapping[str, str | int | float] | None = None,
    ) -> Partition:
        """Build a partition from the client of each row; ``names`` may be a number of clients, named 0 to K-1.

        Raises:
            PartitionError: a client owns no row.
        """
        named = tuple(map(str, range(names))) if isinstance(names, int) else tuple(names)
        counts = np.bincount(owner_of_row, minlength=len(named))
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        return cls(named, np.argsort(owner_of_row, kind="stable"), starts, dict(how or {}))

    @property
    def num_clients(self) -> int:
        """Number of clients K."""
        return len(self.names)

    @property
    def num_rows(self) -> int:
        """Number of rows over all clients."""
        return len(self.rows)

    @property
    def sizes(self) -> IntArray:
        """Rows of each client, (K,)."""
        return np.diff(self.starts)

    def rows_of(self, client: int) -> IntArray:
        """Return the rows of one client, in rising order."""
        if not 0 <= client < self.num_clients:
            raise IndexError(f"client {client} of {self.num_clients}")
        return self.rows[self.starts[client] : self.starts[client + 1]]

    def owner_of_row(self) -> IntArray:
        """Return the client of each row, (N,)."""
        owner = np.empty(self.num_rows, np.int64)
        owner[self.rows] = np.repeat(np.arange(self.num_clients), self.sizes)
        return owner

    def save(self, path: Path, data_sha256: str) -> None:
        """Write the partition as JSON, tied to the data whose hash is given; the file appears whole or not at all."""
        unfinished = path.with_name(f".tmp-{path.name}-{os.getpid()}")
        try:
            unfinished.write_bytes(self.encoded(data_sha256))
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    def encoded(self, data_sha256: str) -> bytes:
        """Return the partition as JSON, tied to the data whose hash is given."""
        document = {
            "format": f"{_FORMAT}{PARTITION.number}",
            "data_sha256": data_sha256,
            "num_rows": self.num_rows,
            "how": dict(self.how),
            "clients": [
                {"name": name, "rows": self.rows_of(client).tolist()} for client, name in enumerate(self.names)
            ],
        }
        return json.dumps(document).encode()

    @classmethod
    def load(cls, path: Path, data_sha256: str) -> Partition:
        """Read a saved partition and check that it belongs to the data whose hash is given.

        Raises:
            PartitionError: the file is missing, malformed or of another format, was made for other data, or does not
                give each row to exactly one client.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as cause:
            raise PartitionError(
                f"{path}: expected a partition saved by fedloom, got {cause}; restore the file, or make a new partition"
            ) from cause
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        PARTITION.check(path, _number_in(found), PartitionError)
        if document.get("data_sha256") != data_sha256:
            raise PartitionError(
                f"{path}: expected the data it was made for (sha256 {str(document.get('data_sha256'))[:12]}), got rows "
                f"with {data_sha256[:12]}; restore the data, tokenizer, template and max_length, or make a new "
                "partition"
            )
        try:
            partition = _from_clients(document["clients"], document["how"])
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as cause:
            raise PartitionError(
                f"{path}: expected a whole partition, got a damaged one ({cause}); restore the file, or make a "
                "new partition"
            ) from cause
        if partition.num_rows != document.get("num_rows"):
            raise PartitionError(
                f"{path}: expected {document.get('num_rows')} rows, its clients own {partition.num_rows}; "
                "restore the file, or make a new partition"
            )
        return partition


def _number_in(format: object) -> object:
    """Return the number of a format that is a partition's, anything else as it is."""
    number = format.removeprefix(_FORMAT) if isinstance(format, str) and format.startswith(_FORMAT) else ""
    return int(number) if number.isdecimal() and number.isascii() else format


def _from_clients(clients: Sequence[Mapping[str, object]], how: Mapping[str, str | int | float]) -> Partition:
    parts = [np.asarray(client["rows"], np.int64) for client in clients]
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum([len(part) for part in parts], dtype=np.int64)])
    rows = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    return Partition(tuple(str(client["name"]) for client in clients), rows, starts, dict(how))


def _refuse_empty(names: Sequence[str], sizes: IntArray) -> None:
    empty = np.flatnonzero(sizes == 0)
    if len(names) == 0:
        raise PartitionError("expected at least one client, got none; set federation.num_clients, or check the data")
    if empty.size:
        shown = ", ".join(names[i] for i in empty[:5])
        raise PartitionError(
            f"expected at least one row for each of {len(names)} clients, {empty.size} have none (client {shown}"
            f"{', ...' if empty.size > 5 else ''}) of {int(sizes.sum())} rows; "
            "lower federation.num_clients or use more rows"
        )
