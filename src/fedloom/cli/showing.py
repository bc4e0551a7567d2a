"""demo, report, paper: every method on the embedded data, and what is shown of any runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.options import FreshOption, JsonOption, ReferenceOption
from fedloom.cli.output import print_json, print_line, print_result

REPORT = "report.html"


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder to write.")] = Path("runs/demo"),
    fresh: FreshOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run every method on the model and data in the package, offline, and show the results.

    The same command again resumes an interrupted demo.
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
            metavar="RUN...", help="Run folders, or folders of runs as written by `compare`.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="File to write. Default: `report.html` in the given folder, or here for several.",
            show_default=False,
        ),
    ] = None,
    reference: ReferenceOption = None,
    csv: Annotated[
        Path | None,
        typer.Option("--csv", metavar="FILE", help="Also write every run's figures, a line each.", show_default=False),
    ] = None,
    latex: Annotated[
        Path | None,
        typer.Option("--latex", metavar="FILE", help="Also write the table of methods as LaTeX.", show_default=False),
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(
            "--markdown", metavar="FILE", help="Also write the table of methods as Markdown.", show_default=False
        ),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(
            "--figures",
            metavar="DIR",
            help="Also draw figures for a paper (PDF, SVG, PNG) with their numbers as CSV. Needs the extra `figures`.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write one self-contained HTML page about runs: curves, tables, clients, costs, settings, hashes."""
    from fedloom.reporting.collected import collect
    from fedloom.reporting.figures import write_figures
    from fedloom.reporting.paper import write_tables
    from fedloom.reporting.report import write_page

    file = report_file(runs, out)
    told = collect(runs, reference)
    write_page(told, file)
    wanted = {"csv": csv, "latex": latex, "markdown": markdown}
    tables = {kind: path for kind, path in wanted.items() if path is not None}
    write_tables(told, tables)
    drawn = [] if figures is None else write_figures(told, figures)
    if as_json:
        others = [str(path) for path in (*tables.values(), *drawn)]
        print_json({"report": str(file), "files": others, "runs": [str(run) for run in runs]})
    else:
        for path in (file, *tables.values(), *drawn):
            print_line(str(path))


def paper(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A TOML file with a table per comparison of the paper: `runs`, a list of folders, and `reference`.",
            show_default=False,
        ),
    ],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Folder to write.")] = Path("paper"),
    as_json: JsonOption = False,
) -> None:
    """Write all tables and figures of a paper from finished runs, a folder for each comparison.

    Tables are LaTeX and Markdown, figures PDF, SVG and PNG; every run's figures and every curve's numbers are beside
    them as CSV. Needs the extra `figures`.
    """
    from fedloom.reporting.paper_set import read_parts, write_paper

    written = [str(path) for path in write_paper(read_parts(file), to)]
    if as_json:
        print_json({"files": written})
    else:
        for path in written:
            print_line(path)


def report_file(runs: list[Path], out: Path | None) -> Path:
    """Return the file to write.

    Raises:
        RunError: the file exists and is not an earlier report.
    """
    from fedloom.reporting.page.document import beginning
    from fedloom.run_folder.durable import refuse_other_file

    place = out or (runs[0] if len(runs) == 1 else Path())
    file = place / REPORT if out is None or place.is_dir() else place
    refuse_other_file(file, beginning("fedloom report"), "report", "choose another --out")
    return file
