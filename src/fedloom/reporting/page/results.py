"""The results: the methods' table, loss against rounds and bytes, aggregation noise, rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.names import name_order
from fedloom.reporting.budget import unequal_rows
from fedloom.reporting.charts import Axis, Level, Line, axis_of, line_chart
from fedloom.reporting.metrics import AGREEMENT, CLIENT_LOSS, LOSS, NOISE, Metric, metric_of
from fedloom.reporting.page.parts import figure, table
from fedloom.reporting.run_groups import (
    Curve,
    RunGroup,
    by_group,
    loss_by_bytes,
    loss_by_round,
    rank_by_round,
    result_table,
    value_by_round,
)
from fedloom.reporting.svg import element
from fedloom.wording import written

MAX_ROWS = 60
ROUNDS = Axis("round", whole=True)


def methods(groups: Sequence[RunGroup], reference: str | None) -> str:
    """Return the table of final figures."""
    comparison = result_table(groups, reference)
    if not comparison.metrics:
        return ""
    rows = "".join(
        element(
            "tr",
            element("th", element("span", class_="swatch"), element("span", text=label), scope="row"),
            *(element("td", text=text, class_="best" if best else None) for text, best in cells),
            class_=f"s{group.colour % 8}",
        )
        for (label, cells), group in zip(comparison.rows(), groups, strict=True)
    )
    head = ["method", *(metric.title for metric in comparison.metrics)]
    top = element("thead", element("tr", *(element("th", text=title, scope="col") for title in head)))
    note = element("p", text=comparison.caption(), class_="note")
    if (told := unequal_rows(comparison)) is not None:
        note += element("p", text=f"{told[0].upper()}{told[1:]}.", class_="warning")
    return element("div", element("table", top, element("tbody", rows), class_="results"), class_="scroll") + note


def losses(groups: Sequence[RunGroup]) -> str:
    """Return held-out loss against rounds, and against bytes where any cross."""
    by_round = [loss_by_round(group) for group in groups]
    by_bytes = [loss_by_bytes(group) for group in groups]
    sent = Axis("bytes sent so far, both ways, all clients", unit="B", kind=_kind_of(by_bytes))
    against_rounds = _curves("Loss against rounds", by_round, ROUNDS, axis_of(LOSS))
    if not any(x > 0 for one in by_bytes for x in one.xs):
        return against_rounds
    return against_rounds + _curves("Loss against bytes", by_bytes, sent, axis_of(LOSS))


def noise_and_rank(groups: Sequence[RunGroup]) -> str:
    """Return aggregation noise, agreement of the clients and the result's largest rank, by round."""
    noise = [value_by_round(group, NOISE) for group in groups]
    rank = [rank_by_round(group) for group in groups]
    agreement = [value_by_round(group, AGREEMENT) for group in groups]
    drawn = _curves("Aggregation noise", noise, ROUNDS, axis_of(NOISE))
    drawn += _curves("Agreement of the clients", agreement, ROUNDS, axis_of(AGREEMENT))
    return drawn + _curves("Rank of the result", rank, ROUNDS, Axis("largest rank", digits=0))


def groups_of_rows(groups: Sequence[RunGroup]) -> str:
    """Return a table for each figure that was reported by groups of held-out rows: groups down, methods across."""
    return "".join(_group_table(key, rows, groups) for key, rows in by_group(groups).items())


def _group_table(key: str, rows: Mapping[str, Mapping[str, float]], groups: Sequence[RunGroup]) -> str:
    metric = metric_of(key)
    most = max(value for row in rows.values() for value in row.values())
    top = element("tr", *(element("th", text=text, scope="col") for text in ("", *(group.label for group in groups))))
    body = "".join(
        element("tr", element("th", text=name, scope="row"), *(_shaded(row.get(g.label), metric, most) for g in groups))
        for name, row in sorted(rows.items(), key=lambda entry: name_order(entry[0]))[:MAX_ROWS]
    )
    what = "by client" if key == CLIENT_LOSS.key else "by group of held-out rows"
    what += f", the first {MAX_ROWS} of {len(rows)}" if len(rows) > MAX_ROWS else ""
    title = element("caption", text=f"{metric.title}, {what}")
    return element(
        "div", element("table", title, element("thead", top), element("tbody", body)), class_="scroll shaded"
    )


def _shaded(value: float | None, metric: Metric, most: float) -> str:
    if value is None:
        return element("td", text="–")
    share = value if metric.unit == "%" else value / most if most > 0 else 0.0
    return element("td", text=written(value, metric.unit, metric.digits), style=f"--share: {100 * share:.0f}%")


def _kind_of(curves: Sequence[Curve]) -> Any:
    totals = [x for curve in curves for x in curve.xs if x > 0]
    return "log" if totals and max(totals) > 30 * min(totals) else "linear"


def _curves(title: str, curves: Sequence[Curve], x: Axis, y: Axis) -> str:
    drawn = [curve for curve in curves if curve.ys]
    if not drawn:
        return ""
    flat = [curve for curve in drawn if len(curve.xs) == 1 or (x.unit == "B" and max(curve.xs) == 0)]
    moving = [curve for curve in drawn if curve not in flat]
    if not moving:
        moving, flat = flat, []
    lines = [Line(c.group.label, c.group.colour, *_visible(c, x)) for c in moving]
    levels = [Level(c.group.label, c.group.colour, c.ys[-1]) for c in flat]
    note = "Band: range over seeds. " if any(line.low for line in lines) else ""
    note += "Dashed: nothing crosses, or a single measurement." if levels else ""
    rows = [
        [c.group.label, written(at, x.unit, 0), written(value, y.unit, y.digits)]
        for c in drawn
        for at, value in zip(c.xs, c.ys, strict=True)
    ]
    numbers = table(["method", x.title, y.title], rows)
    return figure(title, line_chart(title, x, y, lines, levels), note.strip(), numbers)


def _visible(curve: Curve, x: Axis) -> tuple[list[float], list[float], list[float], list[float]]:
    """Return the points a log axis can show: those at zero bytes are skipped."""
    kept = [index for index, at in enumerate(curve.xs) if x.kind == "linear" or at > 0]
    low, high = ([values[i] for i in kept] if values else [] for values in (curve.low, curve.high))
    return [curve.xs[i] for i in kept], [curve.ys[i] for i in kept], low, high
