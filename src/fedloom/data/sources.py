"""Read rows from files, folders or the hub, and remember where each row came from.

JSON, JSON Lines, CSV, TSV and text are read by the standard library; Parquet and hub names go through ``datasets``.
The first kinds do not go through ``datasets`` because its readers infer a type per column: an answer ``"2019-05-03"``
comes back as a timestamp, ``"007"`` as 7, and a CSV line with too many fields shifts its columns without a word
(seen with datasets 5.2). Here every value stays what the file says.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedloom import embedded
from fedloom.data.csv_rows import read_csv
from fedloom.data.hub_refusal import hub_refusal
from fedloom.data.json_rows import read_json_lines, rows_of_lines, rows_of_list
from fedloom.data.stored_rows import STORED_FROM_BYTES, ChosenRows, StoredRows, is_stored
from fedloom.data.text_files import read_utf8
from fedloom.errors import DataError
from fedloom.names import looks_like_hub_name
from fedloom.wording import meant

Row = dict[str, Any]
_CLIENT_FILE = re.compile(r"local_(training|eval|test)_(\d+)\.(json|jsonl|csv|tsv|parquet)")
_CLIENT_FILE_SPLITS = {"train": "training", "eval": "eval", "test": "test"}
_GLOBAL_FILES = {"train": "global_training.json", "eval": "global_eval.json", "test": "global_test.json"}
_READ_BY_LINE = (".jsonl", ".csv", ".tsv", ".txt")
_SPLIT_PREFIXES = {"train": ("train",), "eval": ("eval", "valid", "dev"), "test": ("test",)}


_NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
"""Files that describe rows beside them, as LLaMA-Factory and ``datasets`` write them."""


class Split(StrEnum):
    """Which part of a folder or of a hub data set."""

    TRAIN = "train"
    EVAL = "eval"
    TEST = "test"


@dataclass(frozen=True)
class Rows:
    """Rows in reading order, and the file and number each one has in it.

    ``file_of_row`` holds positions in ``files``; ``numbers`` count from 1 inside a file (for JSON Lines, CSV and
    text: the line the row begins on). ``grouped`` are equal for rows of one person, say, where a column names them.
    """

    rows: Sequence[Row]
    files: tuple[str, ...]
    file_of_row: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]
    grouped: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """Name the place of row ``index`` as a person would look it up."""
        file = self.files[self.file_of_row[index]]
        return f"{file} {'line' if Path(file).suffix.lower() in _READ_BY_LINE else 'row'} {self.numbers[index]}"

    def column(self, name: str) -> list[Any]:
        """Return the values of one column.

        Raises:
            DataError: a row lacks the column.
        """
        for index, row in enumerate(self.rows):
            if name not in row:
                raise DataError(
                    f"{self.where(index)}: expected a column {name!r}, found {_listed(row)}; {meant(name, row)}fill "
                    "the row, or name another column"
                )
        return [row[name] for row in self.rows]

    def select(self, indices: npt.NDArray[np.int64] | Sequence[int]) -> Rows:
        """Return the rows at ``indices``, in that order; the files stay listed."""
        chosen = np.asarray(indices, dtype=np.int64)
        rows = ChosenRows(self.rows, chosen) if is_stored(self.rows) else [self.rows[i] for i in chosen]
        grouped = None if self.grouped is None else self.grouped[chosen]
        return Rows(rows, self.files, self.file_of_row[chosen], self.numbers[chosen], grouped)

    @property
    def originals(self) -> npt.NDArray[np.int64]:
        """Which rows are one row of a file: a dialogue that was encoded answer by answer is there as often."""
        same = (np.diff(self.file_of_row) == 0) & (np.diff(self.numbers) == 0)
        return np.concatenate([np.zeros(min(len(self), 1), np.int64), np.cumsum(~same)])

    @property
    def units(self) -> npt.NDArray[np.int64]:
        """Which rows are held out, dealt and hidden together, counted from 0: one row's of a file, or one group's."""
        return self.originals if self.grouped is None else np.unique(self.grouped, return_inverse=True)[1]

    def units_of(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return numbers that are equal for places of one unit, where a row may be named several times."""
        return places if self.grouped is None else self.grouped[places]

    def distinct(self) -> Rows:
        """Return every row once."""
        return self._firsts(self.originals)

    def one_of_each_unit(self) -> Rows:
        """Return the first row of every unit, in the order of the units' numbers."""
        return self._firsts(self.units)

    def _firsts(self, numbers: npt.NDArray[np.int64]) -> Rows:
        _, first = np.unique(numbers, return_index=True)
        return self if len(first) == len(self) else self.select(first)

    def client_of_file(self) -> list[str]:
        """Name each row's client after its file: ``7`` for ``local_training_7.json``, else the file's stem."""
        names = _client_names(self.files)
        return [names[file] for file in self.file_of_row]


def load_rows(
    path: str | Path, split: Split | str = Split.TRAIN, *, subset: str | None = None, revision: str | None = None
) -> Rows:
    """Read the rows of ``split`` from a file, a folder or a hub name, or the package's own by the name ``embedded``.

    A file is read whole whatever the split, and so is a folder that ``datasets`` wrote with ``save_to_disk``, if it has
    no splits. In any other folder, the files ``local_<split>_<n>.json`` are one client each (Shepherd's and
    FederatedScope's layout), ordered by number; else ``global_<split>.json``; else the files whose names begin with the
    split; else, for the training split, every data file. A name that is not a path is a hub data set, whose ``subset``
    and ``revision`` may be named.

    Raises:
        DataError: nothing exists there, a file is malformed or empty, or the hub cannot be reached.
    """
    split = Split(split)
    if str(path) == embedded.NAME:
        path = embedded.eval_path() if split is Split.TEST else embedded.data_path()
    place = Path(path).expanduser()
    if place.is_dir():
        return _read_saved(place, split) if _is_saved(place) else _read_files(_files_of_folder(place, split))
    if place.is_file():
        return _read_files([place])
    if place.suffix.lower() in _READERS or not looks_like_hub_name(str(path)):
        raise DataError(
            f"{path}: expected a file, a folder or a hub name, found nothing; check the path (it is relative to the "
            "current folder)"
        )
    return _read_hub(str(path), split, subset, revision)


def client_names_of_files(path: str | Path, split: Split | str = Split.TRAIN) -> list[str] | None:
    """Return the names that ``Rows.client_of_file`` will give, without reading a row; None for a hub data set.

    Raises:
        DataError: a folder has no files of the split.
    """
    place = Path(path).expanduser()
    if place.is_dir() and _is_saved(place):
        return None
    if place.is_dir():
        return _client_names(_short_names(_files_of_folder(place, Split(split))))
    return _client_names([place.name]) if place.is_file() else None


def _files_of_folder(folder: Path, split: Split) -> list[Path]:
    files = sorted(p for p in folder.iterdir() if p.is_file() and _may_hold_rows(p))
    word = _CLIENT_FILE_SPLITS[split]
    of_clients = [(int(m[2]), p) for p in files if (m := _CLIENT_FILE.fullmatch(p.name)) and m[1] == word]
    if of_clients:
        return [p for _, p in sorted(of_clients)]
    if (shared := folder / _GLOBAL_FILES[split]) in files:
        return [shared]
    named = [p for p in files if p.stem.lower().startswith(_SPLIT_PREFIXES[split])]
    if named:
        return named
    marked = tuple(prefix for prefixes in _SPLIT_PREFIXES.values() for prefix in (*prefixes, "local_", "global_"))
    if split is Split.TRAIN and files and not any(p.stem.lower().startswith(marked) for p in files):
        return files
    kinds = " ".join(_READERS)
    raise DataError(
        f"{folder}: expected files of the {split} split ({kinds}), found {_listed(p.name for p in files)}; rename one, "
        "or name the file itself"
    )


def _may_hold_rows(file: Path) -> bool:
    """Tell whether a file is one of rows by its name; what begins with a dot is a system's own (macOS's ``._x``)."""
    return file.suffix.lower() in _READERS and not file.name.startswith(".") and file.name not in _NO_ROWS


def _is_saved(folder: Path) -> bool:
    """Tell whether ``datasets`` wrote a folder with ``save_to_disk``."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def _read_saved(folder: Path, split: Split) -> Rows:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
        name = folder.name
        if isinstance(saved, datasets.DatasetDict):
            part = _hub_split(str(folder), split, list(saved))
            saved, name = saved[part], f"{name}[{part}]"
        rows = saved.to_list()
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as cause:
        raise DataError(
            f"{folder}: expected what datasets wrote with save_to_disk, got {_root(cause)}; write it again, or save it "
            "with to_json"
        ) from cause
    return Rows(rows, (name,), np.zeros(len(rows), np.int64), np.arange(1, len(rows) + 1))


def _read_files(files: Sequence[Path]) -> Rows:
    if len(files) == 1 and files[0].suffix.lower() == ".jsonl" and files[0].stat().st_size >= STORED_FROM_BYTES:
        stored = StoredRows(files[0])
        if len(stored):
            return Rows(stored, _short_names(files), np.zeros(len(stored), np.int64), stored.numbers)
    rows: list[Row] = []
    numbers: list[int] = []
    counts: list[int] = []
    for file in files:
        before = len(rows)
        for number, row in _reader(file)(file):
            rows.append(row)
            numbers.append(number)
        if len(rows) == before:
            raise DataError(f"{file}: expected rows, found none; remove the file or fill it")
        counts.append(len(rows) - before)
    owner = np.repeat(np.arange(len(files), dtype=np.int64), counts)
    return Rows(rows, _short_names(files), owner, np.asarray(numbers, dtype=np.int64))


def _read_json(file: Path) -> Iterator[tuple[int, Row]]:
    text = read_utf8(file)
    yield from (rows_of_list if text.lstrip(" \t\r\n").startswith("[") else rows_of_lines)(file, text)


def _read_json_lines(file: Path) -> Iterator[tuple[int, Row]]:
    yield from read_json_lines(file)


def _read_text(file: Path) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(read_utf8(file).split("\n"), start=1):
        if line.strip():
            yield number, {"text": line.rstrip("\r")}


def _read_parquet(file: Path) -> Iterator[tuple[int, Row]]:
    import datasets

    with tempfile.TemporaryDirectory(prefix="fedloom-") as cache:
        try:
            table = datasets.load_dataset("parquet", data_files=str(file), split="train", cache_dir=cache)
            rows = table.to_list()  # text that is none is found here
        except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as cause:
            raise DataError(
                f"{file}: expected a Parquet file, got {_root(cause)}; fetch or convert it again"
            ) from cause
        del table
    yield from enumerate(rows, start=1)


def _read_hub(name: str, split: Split, subset: str | None, revision: str | None) -> Rows:
    import datasets

    try:
        part = _hub_split(name, split, datasets.get_dataset_split_names(name, subset, revision=revision))
        rows = datasets.load_dataset(name, subset, split=part, revision=revision).to_list()
    except DataError:
        raise
    except OSError as cause:
        wanted = "a file, a folder or a data set of the hub"
        raise DataError(hub_refusal("data.path", wanted, name, cause)) from cause
    except (ValueError, datasets.exceptions.DatasetsError) as cause:
        raise DataError(
            f"data.path: expected a data set of the hub that datasets reads, got {name!r}: {_root(cause)}; set "
            "data.subset, or save its rows to a file and name that"
        ) from cause
    count = len(rows)
    return Rows(rows, (f"{name}[{part}]",), np.zeros(count, np.int64), np.arange(1, count + 1))


def _hub_split(name: str, split: Split, available: Sequence[str]) -> str:
    wanted = {"train": ("train",), "eval": ("validation", "eval", "dev"), "test": ("test",)}[split]
    for part in wanted:
        if part in available:
            return part
    raise DataError(
        f"{name}: expected a split called {' or '.join(wanted)}, it has {_listed(available)}; save the one you mean to "
        "a file and name that"
    )


_PACKED = frozenset({".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z"})
_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Row]]]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}


def _reader(file: Path) -> Callable[[Path], Iterator[tuple[int, Row]]]:
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        action = "unpack the file" if file.suffix.lower() in _PACKED else "convert the file"
        raise DataError(f"{file}: expected one of {' '.join(_READERS)}, got {file.suffix!r}; {action}")
    return reader


def _short_names(files: Sequence[Path]) -> tuple[str, ...]:
    names = [file.name for file in files]
    return tuple(names if len(set(names)) == len(names) else map(str, files))


def _client_name(file: str) -> str:
    match = _CLIENT_FILE.fullmatch(file)
    return match[2] if match else Path(file).stem


def _client_names(files: Sequence[str]) -> list[str]:
    names = [_client_name(file) for file in files]
    return names if len(set(names)) == len(names) else list(files)


def _listed(names: Iterator[str] | Sequence[str] | Row) -> str:
    shown = list(names)
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "") or "nothing"


def _root(cause: BaseException) -> str:
    deepest = cause.__cause__ or cause
    return f"{type(deepest).__name__}: {str(deepest).splitlines()[0] if str(deepest) else 'no detail'}"
