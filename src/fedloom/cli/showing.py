"""demo, report: the first five minutes, and the page about any runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.options import FreshOption, JsonOption, ReferenceOption
from fedloom.cli.output import print_json, print_line, print_result
from fedloom.errors import RunError

REPORT = "report.html"
_OURS = b"<title>fedloom report"


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder to write.")] = Path("runs/demo"),
    fresh: FreshOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run every method on the model and data in the package, offline, and show what came of it.

    The same command again goes on where it stopped.
    """
    from fedloom.experiment.demo import demonstrate
    from fedloom.reporting.progress import progress_for

    with progress_for() as progress:
        result = demonstrate(out, fresh=fresh, progress=progress)
    print_result(result, as_json=as_json)


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Run folders, or folders of runs as `compare` makes them.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="File to write; left out: `report.html` in the folder named, of several in this folder.",
            show_default=False,
        ),
    ] = None,
    reference: ReferenceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write one self-contained HTML page about runs: curves, tables, clients, costs, settings, hashes."""
    from fedloom.reporting.report import write_report

    file = report_file(runs, out)
    write_report(runs, file, reference)
    if as_json:
        print_json({"report": str(file), "runs": [str(run) for run in runs]})
    else:
        print_line(str(file))


def report_file(runs: list[Path], out: Path | None) -> Path:
    """Return the file to write.

    Raises:
        RunError: a file that is no report of ours is there.
    """
    place = out or (runs[0] if len(runs) == 1 else Path())
    file = place / REPORT if out is None or place.is_dir() else place
    if file.is_file() and _OURS not in file.read_bytes()[:4096]:
        raise RunError(f"{file}: expected a new file or an earlier report, found another file; choose another --out")
    return file
