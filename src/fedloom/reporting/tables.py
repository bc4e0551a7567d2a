"""The comparison table: methods by metrics, mean ± standard deviation over seeds, and what exceeds the noise.

A difference is judged on pairs: both methods ran every seed on the same data and the same initial draws, so what the
seed contributes cancels. With n seeds and differences d, the 95 % interval is mean(d) ± t · sd(d) / sqrt(n), t being
Student's quantile at n - 1 degrees of freedom; a difference counts when the interval excludes zero. Differences that
are all the same (few seeds, a score that is counted) say nothing of the noise and are not judged.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from fedloom.errors import EvaluationError
from fedloom.methods.table import BASELINE
from fedloom.reporting.metrics import Better, Metric
from fedloom.wording import one_line, written

Verdict = Literal["better", "worse", "within noise", "too few seeds", "not judged"]

# Student's t at 0.975 for 1..9 degrees of freedom.
_T975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


@dataclass(frozen=True)
class Difference:
    """A method against the reference over the seeds both ran: mean, half-width of the 95 % interval, verdict."""

    mean: float
    half_width: float | None
    verdict: Verdict


@dataclass(frozen=True)
class Cell:
    """One method's value of one metric. ``sd`` is None for a single seed, ``difference`` for the reference itself."""

    mean: float
    sd: float | None
    num_seeds: int
    difference: Difference | None


@dataclass(frozen=True)
class Comparison:
    """A finished table. ``cells[method][key]`` is None where the method has no such value."""

    metrics: tuple[Metric, ...]
    reference: str | None
    cells: dict[str, dict[str, Cell | None]]

    def rows(self) -> list[tuple[str, list[tuple[str, bool]]]]:
        """Return, method by method, each cell's text and whether it is the best of its column."""
        best = {metric.key: self.best(metric.key) for metric in self.metrics}
        return [
            (method, [(_cell_text(cells[m.key], m), self._is_best(m.key, method, best[m.key])) for m in self.metrics])
            for method, cells in self.cells.items()
        ]

    def to_rich(self, title: str | None = None) -> Table:
        """Return the table for a terminal; the best value of a column is bold."""
        # Text and not str: rich would read [brackets] and :names: in a str as markup.
        head = None if title is None else Text(one_line(title), style="table.title")
        caption = Text(one_line(self.caption()), style="table.caption")
        table = Table(title=head, caption=caption, caption_justify="left")
        table.add_column("method")
        for metric in self.metrics:
            table.add_column(Text(one_line(metric.title)), justify="right")
        for method, cells in self.rows():
            shown = (Text(text, style="bold" if is_best else "") for text, is_best in cells)
            table.add_row(Text(one_line(method)), *shown)
        return table

    def to_html(self) -> str:
        """Return the table for a notebook; the best value of a column is bold."""
        head = "".join(f"<th>{escape(one_line(title))}</th>" for title in ("method", *(m.title for m in self.metrics)))
        body = "".join(
            f"<tr><th>{escape(one_line(method))}</th>"
            + "".join(f"<td>{f'<b>{escape(text)}</b>' if best else escape(text)}</td>" for text, best in cells)
            + "</tr>"
            for method, cells in self.rows()
        )
        return f"<table><caption>{escape(self.caption())}</caption><tr>{head}</tr>{body}</table>"

    def to_markdown(self) -> str:
        """Return the table as markdown; the best value of a column is bold."""
        titles = [_as_markdown(metric.title) for metric in self.metrics]
        head = [["method", *titles], ["---", *["---:"] * len(titles)]]
        body = [
            [_as_markdown(method), *(f"**{text}**" if is_best else text for text, is_best in cells)]
            for method, cells in self.rows()
        ]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in [*head, *body])
        return f"{table}\n\n{_as_markdown(self.caption())}\n"

    def to_json(self) -> dict[str, Any]:
        """Return every number, unrounded, in JSON's types."""
        methods = {
            method: {key: None if cell is None else _cell_json(cell) for key, cell in cells.items()}
            for method, cells in self.cells.items()
        }
        metrics = [
            {"key": metric.key, "title": metric.title, "better": metric.better, "unit": metric.unit}
            for metric in self.metrics
        ]
        return {"reference": self.reference, "metrics": metrics, "methods": methods}

    def only(self, *keys: str) -> Comparison:
        """Return the table of these columns, in this order; a column that does not exist is skipped."""
        metrics = {metric.key: metric for metric in self.metrics}
        chosen = tuple(metrics[key] for key in keys if key in metrics)
        cells = {method: {one.key: row[one.key] for one in chosen} for method, row in self.cells.items()}
        return Comparison(chosen, self.reference, cells)

    def _is_best(self, key: str, method: str, best: str | None) -> bool:
        """Tell whether a method's mean is the best one; several may have it."""
        cell, top = self.cells[method][key], None if best is None else self.cells[best][key]
        return cell is not None and top is not None and cell.mean == top.mean

    def best(self, key: str) -> str | None:
        """Return the first method whose mean of ``key`` is best, or None where no direction is better."""
        metric = next(metric for metric in self.metrics if metric.key == key)
        means = {method: cell.mean for method, cells in self.cells.items() if (cell := cells[key]) is not None}
        if metric.better == "neither" or len(means) < 2 or any(math.isnan(mean) for mean in means.values()):
            return None
        return min(means, key=means.__getitem__) if metric.better == "lower" else max(means, key=means.__getitem__)

    def caption(self) -> str:
        """Return what the numbers and marks mean, in one line."""
        seeds = {cell.num_seeds for cells in self.cells.values() for cell in cells.values() if cell is not None}
        if seeds <= {1}:
            return "one seed: differences are not judged"
        text = f"mean ± standard deviation over {'–'.join(map(str, sorted({min(seeds), max(seeds)})))} seeds"
        if self.reference is None:
            return text
        return f"{text}; ▲ better, ▼ worse than {self.reference} by more than noise (paired t, 95 %)"


def compare(
    results: Mapping[str, Mapping[int, Mapping[str, float | None]]],
    metrics: Sequence[Metric],
    reference: str | None = None,
) -> Comparison:
    """Return the table of ``results[method][seed][key]``, each method set against ``reference`` over common seeds.

    Raises:
        EvaluationError: there is nothing to compare, or the reference is not among the methods.
    """
    if not results:
        raise EvaluationError("expected at least one method to tabulate, got none")
    if reference is not None:
        reference_among(results, reference)
    cells = {
        method: {metric.key: _cell(results, method, metric, reference) for metric in metrics} for method in results
    }
    return Comparison(tuple(metrics), reference, cells)


def reference_among(methods: Collection[str], wanted: str | None = None) -> str | None:
    """Return the method that the others are set against: ``wanted``, else the baseline where it is one of several.

    Of a method in several groups, which are labelled by the settings that differ, the bare name is the first group.

    Raises:
        EvaluationError: ``wanted`` is not among the methods.
    """
    if wanted is not None and wanted not in methods:
        labelled = next((label for label in methods if label.startswith(f"{wanted} (")), None)
        if labelled is not None:
            return labelled
        raise EvaluationError(f"reference: expected one of {', '.join(methods)}, got {wanted!r}: name one of them")
    return wanted or (BASELINE if BASELINE in methods and len(methods) > 1 else None)


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float], better: Better) -> Difference:
    """Return the difference ``values - reference`` over the seeds both have (at least one)."""
    differences = [values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return Difference(mean, None, "too few seeds")
    spread = statistics.stdev(differences)
    if mean != 0.0 and spread <= 1e-9 * abs(mean):
        return Difference(mean, None, "too few seeds")
    half_width = half_width_95(differences)
    return Difference(mean, half_width, _verdict(mean, half_width, better))


def half_width_95(values: Sequence[float]) -> float:
    """Return half of the 95 % interval of the mean of two values or more, by Student's t."""
    return student_t975(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def student_t975(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t distribution, to 1e-4.

    Source: Cornish-Fisher expansion, Abramowitz and Stegun 26.7.5, from ten degrees of freedom on.
    """
    if degrees <= len(_T975):
        return _T975[degrees - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def _verdict(mean: float, half_width: float, better: Better) -> Verdict:
    if better == "neither":
        return "not judged"
    if not abs(mean) > half_width:
        return "within noise"
    return "better" if (mean < 0) == (better == "lower") else "worse"


def _cell(
    results: Mapping[str, Mapping[int, Mapping[str, float | None]]], method: str, metric: Metric, reference: str | None
) -> Cell | None:
    values = _by_seed(results[method], metric.key)
    if not values:
        return None
    sd = statistics.stdev(values.values()) if len(values) > 1 else None
    difference = None
    if reference is not None and reference != method:
        other = _by_seed(results[reference], metric.key)
        if values.keys() & other.keys():
            difference = paired_difference(values, other, metric.better)
    return Cell(statistics.fmean(values.values()), sd, len(values), difference)


def _by_seed(seeds: Mapping[int, Mapping[str, float | None]], key: str) -> dict[int, float]:
    return {seed: float(value) for seed, row in seeds.items() if (value := row.get(key)) is not None}


def _as_markdown(text: str) -> str:
    """Return a text that Markdown shows as it is, within a table's cell too."""
    return re.sub(r"([\\`*_|<>\[\]&~$])", r"\\\1", one_line(text))


def _cell_text(cell: Cell | None, metric: Metric) -> str:
    if cell is None:
        return "–"
    text = written(cell.mean, metric.unit, metric.digits)
    if cell.sd:
        text += f" ± {written(cell.sd, metric.unit, metric.digits)}"
    marks = {"better": " ▲", "worse": " ▼"}
    return text + (marks.get(cell.difference.verdict, "") if cell.difference else "")


def _cell_json(cell: Cell) -> dict[str, Any]:
    difference = cell.difference and {
        "mean": cell.difference.mean,
        "half_width_95": cell.difference.half_width,
        "verdict": cell.difference.verdict,
    }
    return {"mean": cell.mean, "sd": cell.sd, "num_seeds": cell.num_seeds, "difference": difference}
