"""The report: one self-contained HTML page from run folders, readable without network, in print, in light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedloom.reporting.collected import Collected, collect
from fedloom.reporting.metrics import DEVICE_PEAK, LOSS, PEAK, metric_of
from fedloom.reporting.page import adapter, clients, costs, provenance, results, tuning
from fedloom.reporting.page.document import page, scheme_button
from fedloom.reporting.page.parts import key, section
from fedloom.reporting.privacy import privacy_line
from fedloom.reporting.run_groups import RunGroup, result_table
from fedloom.reporting.svg import element
from fedloom.reporting.tuned import Tuning
from fedloom.run_folder import durable
from fedloom.wording import written, written_bytes


def write_report(runs: Sequence[Path], out: Path, reference: str | None = None) -> None:
    """Write the page ``out`` about run folders, or folders of run folders.

    The methods are set against ``reference``, by default FedIT where it is one of several.

    Raises:
        RunError: there is no run, none can be read or has a completed round yet, or ``out`` cannot be written.
        EvaluationError: ``reference`` is not among the methods.
    """
    write_page(collect(runs, reference), out)


def write_page(told: Collected, out: Path) -> None:
    """Write the page ``out`` about runs that were read.

    Raises:
        RunError: it cannot be written.
    """
    html = report_html(told.groups, told.reference, told.damaged, told.tunings)
    with durable.explained(str(out), "choose another place for the report"):
        out.parent.mkdir(parents=True, exist_ok=True)
        durable.write_bytes(out, html.encode())


def report_html(
    groups: Sequence[RunGroup],
    reference: str | None = None,
    damaged: Sequence[str] = (),
    tunings: Sequence[Tuning] = (),
) -> str:
    """Return the page about run groups; ``damaged`` says what is wrong with what is skipped."""
    losses = results.losses(groups)
    body = "".join(
        (
            _header(groups, damaged),
            section("results", "Results", "", results.methods(groups, reference)),
            section("tuning", "Tuned settings", "", tuning.tuned_settings(tunings)),
            section("loss", "Loss", "", key(groups) + losses if losses else ""),
            section("groups", "By group of rows", "", results.groups_of_rows(groups)),
            section(
                "clients", "Clients", "", clients.clients(groups), clients.partition(groups), clients.sites(groups)
            ),
            section("aggregation", "Aggregation", _NOISE, results.noise_and_rank(groups)),
            section("result", "The result", "", adapter.spectrum(groups)),
            section("costs", "Costs", "", costs.costs(groups)),
            section("provenance", "Settings and hashes", "", provenance.settings(groups), provenance.origins(groups)),
        )
    )
    return page(_title(groups), element("main", body))


_NOISE = (
    "Noise is the distance of what the server applied from the weighted mean of the clients' products, relative to "
    "that mean: zero for an exact method. Agreement is the share of the clients' work that is left in their mean: 1 "
    "where all do the same, one by the number of clients where they have nothing in common."
)


def _title(groups: Sequence[RunGroup]) -> str:
    return f"fedloom report: {', '.join(group.label for group in groups)}"


def _header(groups: Sequence[RunGroup], damaged: Sequence[str]) -> str:
    runs = [run for group in groups for run in group.runs]
    unfinished = [run.path.name for run in runs if run.finished is None]
    warnings = [f"Not finished: {', '.join(unfinished)}. The figures are of the rounds so far."] if unfinished else []
    warnings += [f"Left out: {problem}." for problem in damaged]
    head = element("div", element("h1", text=_heading(groups)), scheme_button())
    about = element("p", text=_about(groups), class_="lead")
    shown = [element("p", text=warning, class_="warning") for warning in warnings]
    shown += [element("p", text=line) for line in _privacy(groups)]
    return element("header", head, about, *shown, _tiles(groups))


def _privacy(groups: Sequence[RunGroup]) -> list[str]:
    """Return a line per group whose runs hide something: of the run that it cost most."""
    lines = []
    for group in groups:
        told = [run.records[-1]["privacy"] for run in group.runs if run.records and run.records[-1].get("privacy")]
        if told:
            most = max(told, key=lambda privacy: privacy.get("epsilon") or 0.0)
            lines.append(f"{group.label}: {privacy_line(most)}.")
    return lines


def _heading(groups: Sequence[RunGroup]) -> str:
    if len(groups) == 1:
        return groups[0].label
    return f"{', '.join(group.label for group in groups[:-1])} and {groups[-1].label}"


def _about(groups: Sequence[RunGroup]) -> str:
    config = groups[0].first.config
    base = config.get("model", {}).get("base")
    data = config.get("data", {}).get("path")
    num_clients = config.get("federation", {}).get("num_clients")
    seeds = sorted({run.seed for group in groups for run in group.runs})
    parts = [
        f"base {Path(str(base)).name}" if base else "",
        f"data {Path(str(data)).name}" if data else "",
        f"{num_clients} clients" if num_clients else "",
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}",
    ]
    return " · ".join(part for part in parts if part)


_TOTALS = ("upload_bytes", "download_bytes", "seconds")


def _tiles(groups: Sequence[RunGroup]) -> str:
    table = result_table(groups)
    tiles = []
    if LOSS in table.metrics:
        losses = {label: cells[LOSS.key] for label, cells in table.cells.items()}
        label, cell = min(((label, cell) for label, cell in losses.items() if cell), key=lambda item: item[1].mean)
        lowest = written(cell.mean, LOSS.unit, LOSS.digits)
        tiles.append((lowest, f"lowest {LOSS.title}", label if len(groups) > 1 else ""))
    runs = [run for group in groups for run in group.runs]
    up, down, seconds = ([metric_of(key).of_run(run.records) or 0.0 for run in runs] for key in _TOTALS)
    tiles.append((written_bytes(sum(up) + sum(down)), "crossed the wire", "as serialised, all runs"))
    tiles.append((f"{sum(seconds):,.0f} s", "of work", f"{len(runs)} runs" if len(runs) > 1 else ""))
    for metric, note in ((PEAK, "of one process"), (DEVICE_PEAK, "of one round")):
        if peaks := [peak for run in runs if (peak := metric.of_run(run.records))]:
            tiles.append((written(max(peaks), metric.unit), metric.title, note))
    drawn = [
        element("div", element("b", text=value), element("span", text=name), element("small", text=note), class_="tile")
        for value, name, note in tiles
    ]
    return element("div", *drawn, class_="tiles")
