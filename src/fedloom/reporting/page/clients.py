"""Who took part: bars by client, and who holds what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.reporting.charts import Axis, Bar, axis_of, bar_chart, matrix_chart
from fedloom.reporting.metrics import CLIENT_FIGURES, Metric, was_left_out
from fedloom.reporting.page.parts import choice, figure, table
from fedloom.reporting.run_groups import RunGroup, client_entries
from fedloom.run_folder.reader import Holding
from fedloom.wording import written

MAX_BARS = 60
MAX_REASONS = 5


def clients(groups: Sequence[RunGroup]) -> str:
    """Return per-client bars, one panel per group and quantity."""
    panels = []
    for group in groups:
        entries = client_entries(group.first)
        shown = [metric for metric in CLIENT_FIGURES if len(entries) > 1 and any(metric.of(one) for one in entries)]
        panels += [((metric.title, group.label), _client_figure(group, entries, metric)) for metric in shown]
    return choice(("Show", "of"), panels)


def _client_figure(group: RunGroup, entries: Sequence[Mapping[str, Any]], metric: Metric) -> str:
    names = {index: holding.name for index, holding in enumerate(group.first.holdings)}
    bars = []
    for entry in entries[:MAX_BARS]:
        value, label = metric.of(entry), _client_label(entry["client"], names)
        note = f"dropped: {entry.get('reason')}" if was_left_out(entry) else "–" if value is None else ""
        bars.append(Bar(label, [(metric.title, group.colour, value or 0.0)], note[:40]))
    note = f"{group.label}, seed {group.first.seed}, the last round each took part in"
    note += f"; the first {MAX_BARS} of {len(entries)} clients" if len(entries) > MAX_BARS else ""
    rows = [[bar.label, bar.note or written(bar.parts[0][2], metric.unit, metric.digits)] for bar in bars]
    return figure(
        f"By client: {metric.title}",
        bar_chart(metric.title, axis_of(metric), bars),
        note,
        table(["client", metric.title], rows),
    )


def _client_label(client: int, names: Mapping[int, str]) -> str:
    name = names.get(client, str(client))
    return f"client {name}" if name.isdigit() else name


def sites(groups: Sequence[RunGroup]) -> str:
    """Return where the sites of served runs stood at the end, and who was left out of which round and why."""
    panels = [((group.label,), _sites_table(group.first.records)) for group in groups if group.first.records]
    return choice(("Sites of",), [panel for panel in panels if panel[1]])


def _sites_table(records: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for site in records[-1].get("sites", ()):
        name, loss, seconds = str(site["name"]), site.get("last_loss_nats"), site.get("seconds")
        missed = [
            f"round {record['round']}: {client['reason']}"
            for record in records
            for client in record["clients"]
            if client.get("name") == name and client.get("reason") is not None
        ]
        more = f"; and {len(missed) - MAX_REASONS} more" if len(missed) > MAX_REASONS else ""
        seen = site.get("seconds_since_seen")
        figures = (
            "never" if seen is None else f"{seen:.0f} s before",
            "–" if loss is None else f"{loss:.4f}",
            "–" if seconds is None else f"{seconds:.1f}",
        )
        left_out = "; ".join(missed[:MAX_REASONS]) + more
        rows.append([name, str(site["state"]), str(site["held_version"]), *figures, left_out or "–"])
    head = ["site", "at the end", "held version", "last seen", "last loss", "seconds", "left out of"]
    return table(head, rows) if rows else ""


def partition(groups: Sequence[RunGroup]) -> str:
    """Return who holds what, a panel per distinct partition."""
    distinct: list[RunGroup] = []
    for group in groups:
        if group.first.holdings and all(group.first.holdings != other.first.holdings for other in distinct):
            distinct.append(group)
    panels = [((group.label,), _partition_figure(group.first.holdings)) for group in distinct]
    return choice(("Partition of",), panels)


def _partition_figure(holdings: Sequence[Holding]) -> str:
    columns = sorted({name for holding in holdings for name in holding.rows_by_group})
    rows = [
        (_holder(index, holding), [holding.rows_by_group.get(column, 0) for column in columns])
        for index, holding in enumerate(holdings)
    ]
    head = ["client", "rank", "rows", *columns]
    body = [
        [label, "–" if holding.rank is None else str(holding.rank), f"{holding.num_rows:,}", *map(str, counts)]
        for (label, counts), holding in zip(rows, holdings, strict=True)
    ]
    note = f"the first {MAX_BARS} of {len(rows)} clients; " if len(rows) > MAX_BARS else ""
    if columns:
        drawing = matrix_chart("Rows by client and group", rows[:MAX_BARS], columns)
        note += "The stronger a cell's colour, the larger its share of the client's rows."
    else:
        bars = [Bar(_holder(i, holding), [("rows", 0, float(holding.num_rows))]) for i, holding in enumerate(holdings)]
        drawing = bar_chart("Rows by client", Axis("rows", digits=0), bars[:MAX_BARS])
    return figure("Who holds what", drawing, note, table(head, body))


def _holder(index: int, holding: Holding) -> str:
    label = _client_label(index, {index: holding.name})
    return label if holding.rank is None else f"{label} · r {holding.rank}"
