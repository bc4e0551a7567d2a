"""A paper's whole set of tables and figures from finished folders, as one file lists them.

The file is TOML: one table per part of the paper, with ``runs`` (folders of runs and comparisons, from the file's own
folder on) and ``reference``, the method that differences are taken from: where settings tell several groups of runs of
that method apart, the group of the runs that are named first.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedloom.errors import EvaluationError, SettingsError
from fedloom.reporting.collected import collect
from fedloom.reporting.figures import write_figures
from fedloom.reporting.paper import write_tables
from fedloom.wording import nearest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_KEYS = ("runs", "reference")
TABLES = {"latex": "table.tex", "markdown": "table.md", "csv": "runs.csv"}


@dataclass(frozen=True)
class Part:
    """One comparison of a paper: its name, which becomes a folder, its runs, the reference, and the file it is from."""

    name: str
    runs: tuple[Path, ...]
    reference: str | None
    file: Path


def read_parts(file: Path) -> list[Part]:
    """Read a list of parts.

    Raises:
        SettingsError: it cannot be read, or a part is not as expected; all that is wrong is named.
    """
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise SettingsError(
            f"{file}: expected a TOML file with a table for each part, got: {reason}; check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{file}: expected UTF-8 text, got other bytes; name a TOML file") from error
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{file}: expected TOML, got {error}; correct the file") from error
    problems, parts = list[str](), list[Part]()
    if not document:
        problems.append(f'{file}: expected a table for each part, got none; write [results] and runs = ["runs/x"]')
    for name, table in document.items():
        found = _wrong(name, table)
        problems += [f"{file}: {problem}" for problem in found]
        if not found:
            runs = tuple(file.parent / run for run in table["runs"])
            parts.append(Part(name, runs, table.get("reference"), file))
    if problems:
        raise SettingsError("\n".join(problems))
    return parts


def write_paper(parts: list[Part], to: Path) -> Iterator[Path]:
    """Write each part into its own folder of ``to``: tables, every run's figures, curves, and the curves' numbers.

    Files of an earlier time are replaced, others are refused. Yields what was written.

    Raises:
        MissingExtraError: matplotlib is not installed.
        RunError: a folder holds no finished run, or a file cannot be written.
    """
    told = {}  # of all parts before anything is written, so that nothing is if one is wrong
    for part in parts:
        try:
            told[part.name] = collect(list(part.runs), part.reference)
        except EvaluationError as error:
            raise EvaluationError(f"{part.file}: {part.name}.{error}") from error
    for name, one in told.items():
        folder = to / name
        files = {kind: folder / file for kind, file in TABLES.items()}
        write_tables(one, files)
        yield from files.values()
        yield from write_figures(one, folder)


def _wrong(name: str, table: object) -> list[str]:
    if not _NAME.fullmatch(name):
        return [f"[{name}]: expected a name of letters, digits, dots and hyphens, which becomes a folder; rename it"]
    if not isinstance(table, dict):
        return [f"{name}: expected a table [{name}], got {table!r}; write one"]
    problems = [
        f"{name}.{key}: expected runs and reference, got another key; {_instead(key)}"
        for key in table
        if key not in _KEYS
    ]
    runs = table.get("runs")
    if problems and runs is None:
        pass  # it may be there under another name, as the problem says
    elif not isinstance(runs, list) or not runs or not all(isinstance(run, str) and run for run in runs):
        problems.append(f"{name}.runs: expected a list of folders, got {runs!r}; name finished runs or comparisons")
    if not isinstance(table.get("reference", ""), str):
        problems.append(
            f"{name}.reference: expected a method, got {table['reference']!r}; name one of the runs' methods"
        )
    return problems


def _instead(key: str) -> str:
    close = nearest(key, _KEYS)
    return f"did you mean {close}?" if close else "remove it"
