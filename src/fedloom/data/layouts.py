"""Write a partition as files others read: Shepherd's folder, one file per client."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from fedloom.data.partition import Partition
from fedloom.data.sources import Row, Rows
from fedloom.errors import DataError


def write_shepherd(folder: str | Path, rows: Rows, partition: Partition, test: Rows | None = None) -> None:
    """Write ``local_training_<k>.json`` per client, ``global_training.json`` and, for ``test``, ``global_test.json``.

    ``load_rows(folder)`` and ``natural(rows.client_of_file())`` read the same partition back.

    Raises:
        DataError: the folder is not empty or is a file, or the partition is of another number of rows.
    """
    if partition.num_rows != len(rows):
        raise DataError(f"expected a partition of the {len(rows)} rows given, got one of {partition.num_rows}")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(f"{folder}: expected a folder to write to, a file is in the way; name another") from error
    if any(folder.iterdir()):
        raise DataError(f"{folder}: expected an empty folder, it holds files; name another")
    for client in range(partition.num_clients):
        _write(folder / f"local_training_{client}.json", (rows.rows[i] for i in partition.rows_of(client)))
    _write(folder / "global_training.json", rows.rows)
    if test is not None:
        _write(folder / "global_test.json", test.rows)


def _write(file: Path, rows: Iterable[Row]) -> None:
    file.write_text(json.dumps(list(rows), ensure_ascii=False), encoding="utf-8")
