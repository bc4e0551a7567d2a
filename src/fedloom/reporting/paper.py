"""A comparison's table for a paper: LaTeX and Markdown as the report shows it, and CSV with every run's figures."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedloom.reporting.collected import Collected
from fedloom.reporting.metrics import metrics_among
from fedloom.reporting.run_groups import result_table, results
from fedloom.reporting.tables import Comparison
from fedloom.reporting.tuned import Tuning
from fedloom.run_folder import durable

CSV_HEAD = ("method", "seed", "figure", "unit", "value")
_LATEX_MARK = "% written by fedloom report"
_MARKDOWN_MARK = "<!-- written by fedloom report -->"
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "▲": r"$\blacktriangle$",
    "▼": r"$\blacktriangledown$",
    "–": "--",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def write_tables(told: Collected, files: Mapping[str, Path]) -> None:
    """Write the table of runs that were read, as ``files`` say by format: csv, latex or markdown.

    Raises:
        RunError: a file is there that no earlier report wrote, or one cannot be written.
    """
    for kind, file in files.items():
        durable.refuse_other_file(file, MARKS[kind], "table", "choose another place for the table")
    for kind, file in files.items():
        text = WRITERS[kind](told)
        with durable.explained(str(file), "choose another place for the table"):
            file.parent.mkdir(parents=True, exist_ok=True)
            durable.write_bytes(file, text.encode())


def csv_table(told: Collected) -> str:
    """Return a line per run and figure, unrounded."""
    found = [(group, run, results(run)) for group in told.groups for run in group.runs]
    metrics = metrics_among(row for *_, row in found)
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(CSV_HEAD)
    for group, run, row in found:
        for metric in metrics:
            if (value := row.get(metric.key)) is not None:
                lines.writerow((group.label, run.seed, metric.key, metric.unit, repr(value)))
    return out.getvalue()


def latex_table(told: Collected) -> str:
    """Return a table of the package booktabs; the best value of a column is bold."""
    table = result_table(told.groups, told.reference)
    rows = [
        [latex(method), *(rf"\textbf{{{latex(text)}}}" if is_best else latex(text) for text, is_best in cells)]
        for method, cells in table.rows()
    ]
    head = ["method", *(latex(metric.title) for metric in table.metrics)]
    lines = [
        f"{_LATEX_MARK}; needs the packages booktabs and amssymb",
        r"\begin{table}",
        r"\centering",
        rf"\begin{{tabular}}{{l{'r' * len(table.metrics)}}}",
        r"\toprule",
        rf"{' & '.join(head)} \\",
        r"\midrule",
        *(rf"{' & '.join(cells)} \\" for cells in rows),
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{latex(caption(table, told.tunings))}}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def markdown_table(told: Collected) -> str:
    """Return a Markdown table; the best value of a column is bold."""
    chosen = tuned_to(told.tunings)
    table = result_table(told.groups, told.reference).to_markdown()
    return f"{_MARKDOWN_MARK}\n{table}" + (f"\n{chosen}\n" if chosen else "")


def caption(table: Comparison, tunings: Sequence[Tuning]) -> str:
    """Say what the numbers mean, and what each method was tuned to."""
    return " ".join(part for part in (f"{table.caption()}.", tuned_to(tunings)) if part)


def tuned_to(tunings: Sequence[Tuning]) -> str:
    """Say which settings were chosen for each method that had a choice; nothing where none had one."""
    chosen = [
        f"{one.method}: {one.points[one.chosen].title}" for tuning in tunings for one in tuning.methods if one.points
    ]
    return f"Tuned on validation rows to {'; '.join(part for part in chosen)}." if chosen else ""


def latex(text: str) -> str:
    """Return a text that LaTeX shows as it is."""
    return re.sub(r"[\\~^±▲▼–&%$#_{}]", lambda found: _LATEX[found[0]], text)


WRITERS: dict[str, Callable[[Collected], str]] = {"csv": csv_table, "latex": latex_table, "markdown": markdown_table}
MARKS = {"csv": ",".join(CSV_HEAD), "latex": _LATEX_MARK, "markdown": _MARKDOWN_MARK}
