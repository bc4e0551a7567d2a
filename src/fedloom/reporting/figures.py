"""Figures for a paper, drawn by matplotlib from the report's curves, each beside a CSV file of its numbers."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fedloom.errors import MissingExtraError, RunError
from fedloom.reporting.collected import Collected
from fedloom.reporting.metrics import LOSS
from fedloom.reporting.run_groups import Curve, loss_by_bytes, loss_by_round, results
from fedloom.reporting.tables import half_width_95
from fedloom.run_folder import durable

FORMATS = ("pdf", "svg", "png")
INCHES = (3.4, 2.6)
"""Width and height: one column of a paper."""
DOTS_PER_INCH = 300
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c8c8c")
"""Okabe and Ito's colours, which stay apart for eyes that see fewer."""
_STYLES = ("-", "--", "-.", ":")
_MARKERS = "osv^DPX*"
_FONT = {"font.size": 8, "legend.fontsize": 7, "svg.hashsalt": "fedloom", "pdf.fonttype": 42, "axes.axisbelow": True}


@dataclass(frozen=True)
class Figure:
    """A figure: its name as a file, x as a column and as an axis, and its curves, or ``points``: final losses."""

    name: str
    x_name: str = ""
    x_title: str = ""
    curves: tuple[Curve, ...] = ()
    is_logarithmic: bool = False
    points: tuple[tuple[str, tuple[float, ...]], ...] = ()


def write_figures(told: Collected, folder: Path) -> list[Path]:
    """Write held-out loss against rounds and bytes, and the final losses, of runs that were read.

    Every figure is a PDF, an SVG and a PNG file, one column wide, and a CSV file with its numbers. Bands are the range
    of the seeds. Files of these names are replaced. Returns what was written.

    Raises:
        MissingExtraError: matplotlib is not installed.
        RunError: no run has a held-out loss, or a file cannot be written.
    """
    figure_class, settings = _matplotlib()
    drawn = figures_of(told)
    if not drawn:
        raise RunError("expected a run with a held-out loss to draw, got none; set data.eval_rows or data.eval_path")
    written = []
    with durable.explained(str(folder), "choose another --figures"):
        folder.mkdir(parents=True, exist_ok=True)
        for one in drawn:
            with settings(_FONT):
                picture = figure_class(figsize=INCHES, layout="constrained")
                _draw(picture.add_subplot(), one)
                for suffix in FORMATS:
                    written.append(folder / f"{one.name}.{suffix}")
                    durable.write_bytes(written[-1], _saved(picture, suffix))
            written.append(folder / f"{one.name}.csv")
            durable.write_bytes(written[-1], numbers(one).encode())
    return written


def figures_of(told: Collected) -> list[Figure]:
    """Return the figures that there is something to draw for."""
    by_round, by_bytes = (tuple(curve(group) for group in told.groups) for curve in (loss_by_round, loss_by_bytes))
    finals = tuple((group.label, _final_losses(group.runs)) for group in told.groups)
    found = [
        Figure("loss-by-round", "round", "round", _curves(by_round)),
        Figure("loss-by-bytes", "bytes", "sent so far", _curves(by_bytes, beyond=0.0), is_logarithmic=True),
        Figure("final-loss", points=tuple((label, losses) for label, losses in finals if losses)),
    ]
    return [one for one in found if one.curves or one.points]


def _final_losses(runs: Sequence[Any]) -> tuple[float, ...]:
    return tuple(value for run in runs if (value := results(run).get(LOSS.key)) is not None)


def _curves(found: Sequence[Curve], beyond: float = -1.0) -> tuple[Curve, ...]:
    """Return the curves with two points at least, for one is a final loss, and one with an x above ``beyond``."""
    return tuple(one for one in found if len(one.xs) > 1 and max(one.xs) > beyond)


def numbers(figure: Figure) -> str:
    """Return a figure's numbers as CSV."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    if figure.points:
        lines.writerow(("method", "run", LOSS.key))
        lines.writerows((label, n, repr(loss)) for label, losses in figure.points for n, loss in enumerate(losses, 1))
        return out.getvalue()
    lines.writerow(("method", figure.x_name, f"{LOSS.key} mean", "lowest", "highest"))
    for one in figure.curves:
        low, high = one.low or one.ys, one.high or one.ys
        for row in zip(one.xs, one.ys, low, high, strict=True):
            lines.writerow((one.group.label, *map(repr, row)))
    return out.getvalue()


def _draw(axes: Any, figure: Figure) -> None:
    axes.grid(visible=True, linewidth=0.4, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if figure.points:
        _draw_points(axes, figure)
        return
    for place, one in enumerate(figure.curves):
        # Bytes start at zero, which a logarithmic axis does not have.
        shown = [n for n, x in enumerate(one.xs) if x > 0.0 or not figure.is_logarithmic]
        xs, ys = [one.xs[n] for n in shown], [one.ys[n] for n in shown]
        colour = _COLOURS[place % len(_COLOURS)]
        style = {"linestyle": _STYLES[place // len(_COLOURS) % len(_STYLES)], "marker": _MARKERS[place % len(_MARKERS)]}
        axes.plot(xs, ys, color=colour, linewidth=1.2, markersize=2.5, label=one.group.label, **style)
        if one.low:
            axes.fill_between(xs, [one.low[n] for n in shown], [one.high[n] for n in shown], color=colour, alpha=0.15)
    if figure.is_logarithmic:
        _set_bytes(axes)
    axes.set_xlabel(figure.x_title)
    axes.set_ylabel(LOSS.title)
    axes.legend(frameon=False)


def _set_bytes(axes: Any) -> None:
    """Make x a logarithmic axis of bytes, with labels that stay apart however few decades it spans."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_points(axes: Any, figure: Figure) -> None:
    """Draw every run, and the mean with its 95 % interval over seeds."""
    for place, (_, losses) in enumerate(reversed(figure.points)):
        axes.plot(losses, [place] * len(losses), linestyle="", marker="o", markersize=2.5, color="#8c8c8c")
        half = half_width_95(losses) if len(losses) > 1 else None
        axes.errorbar(fmean(losses), place, xerr=half, fmt="D", markersize=4, capsize=2, color=_COLOURS[0])
    axes.set_yticks(range(len(figure.points)), [label for label, _ in reversed(figure.points)])
    axes.set_xlabel(LOSS.title)


def _saved(picture: Any, suffix: str) -> bytes:
    """Return a picture as a file: the same numbers give the same bytes, so it carries no date."""
    out = io.BytesIO()
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(suffix)
    picture.savefig(out, format=suffix, dpi=DOTS_PER_INCH, metadata=undated)
    return out.getvalue()


def _matplotlib() -> tuple[Any, Any]:
    """Return the class of figures that need no display, and the scope of settings.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure as Picture
    except ImportError as error:
        raise MissingExtraError("figures", "fedloom report --figures") from error
    return Picture, rc_context
