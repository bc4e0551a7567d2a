"""What runs give away, as one table, and as a page with a plot: ε, held-out loss, what an attacker reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fedloom.reporting.charts import Axis, Level, Line, line_chart
from fedloom.reporting.page.document import page, scheme_button
from fedloom.reporting.page.parts import figure, section, table
from fedloom.reporting.svg import element

if TYPE_CHECKING:
    from fedloom.results.round_leaks import RoundLeakage, RoundLeakages

TITLE = "fedloom leakage"
NONE = "–"
HEAD = ("run", "method", "ε", "loss", "rows: AUC", "at 1 %", "tokens: AUC", "named", "control", "commonest", "canaries")
_Value = Callable[["RoundLeakage"], float | None]


def cells(one: RoundLeakage) -> tuple[str, ...]:
    """Return a run's line of the table."""
    rows, tokens = one.membership.all, one.tokens and one.tokens.all
    planted = one.exposures and one.exposures.bits_against_base
    return (
        one.path.name,
        one.method,
        "∞" if one.epsilon is None else f"{one.epsilon:.2f}",
        _number(one.loss_nats, 4),
        NONE if rows is None else f"{rows.auc:.3f} [{rows.low:.3f}, {rows.high:.3f}]",
        NONE if rows is None else _share(rows.found_at_few_alarms),
        NONE if not tokens else _number(tokens.auc, 3),
        NONE if not tokens else _share(tokens.named),
        NONE if not tokens else _share(tokens.named_of_control),
        NONE if not tokens else _share(tokens.commonest),
        NONE if planted is None else f"{planted:.2f} bits",
    )


def table_lines(found: RoundLeakages) -> list[str]:
    """Return the table and what it says, for a terminal."""
    rows = [HEAD, *map(cells, found.runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for one in found.runs:
        lines += _details(one, many=len(found.runs) > 1)
    return [*lines, *_legend(found.runs), *(f"note: {note}" for note in found.notes)]


def _details(one: RoundLeakage, *, many: bool) -> list[str]:
    """Say how many rows, tokens and canaries a run's figures are of; by client where it is the only run."""
    rows, name = one.membership.all, f"{one.path.name}: " if many else ""
    lines = []
    if rows is not None:
        lines.append(f"{name}{rows.num_members:,} rows read, {rows.num_others:,} others ({one.membership.others})")
    if one.tokens is not None:
        mean, clients = one.tokens.all, len(one.tokens.clients)
        lines.append(f"{name}updates of round {one.tokens.round}, {clients} clients, {mean.num_tokens:.0f} tokens each")
    else:
        lines.append(f"{name}tokens are not measured: {one.unread}")
    if (planted := one.exposures) is not None:
        told = f"{planted.num_read} of {planted.num_canaries} canaries read"
        if planted.bits is not None and planted.most is not None:
            told += f", exposure {planted.bits:.2f} bits by the loss alone, {planted.most:.2f} of the most exposed"
        lines.append(f"{name}{told} (never planted {planted.unplanted:.2f}, at most {planted.ceiling:.2f})")
    if not many:
        for client, apart in one.membership.clients.items():
            interval = f"{apart.auc:.3f} [{apart.low:.3f}, {apart.high:.3f}]"
            lines.append(f"  client {client}: AUC {interval} of {apart.num_members} rows and {apart.num_others} others")
        for client, read in one.tokens.clients.items() if one.tokens is not None else ():
            lines.append(
                f"  client {client}'s update: AUC {_number(read.auc, 3)}, named {_share(read.named)} of "
                f"{read.num_tokens:.0f} tokens, control {_share(read.named_of_control)}"
            )
    return lines


def _legend(runs: Sequence[RoundLeakage]) -> list[str]:
    lines = [
        "rows: AUC is the chance that a row trained on looks more so than another, 0.5 a guess; at 1 %: those trained "
        "on that are found at one false alarm in a hundred"
    ]
    if any(one.tokens is not None for one in runs):
        lines.append(
            "tokens: AUC likewise, of tokens that one of two clients read; named: of as many tokens as it read, those "
            "rightly named; control: those that another client read; commonest: of the commonest public tokens"
        )
    return lines


def html_of(found: RoundLeakages) -> str:
    """Return the page: what an attacker reads and what the model learned, over ε, and the table."""
    head = element("div", element("h1", text="What the runs give away"), scheme_button())
    told = [element("p", text=line, class_="note") for line in (*_legend(found.runs), *found.notes)]
    body = "".join(
        (
            element("header", head),
            section("attacks", "Over ε", "Runs without noise (ε = ∞) are the horizontal lines.", *_charts(found.runs)),
            section("runs", "Runs", "", table(HEAD, [cells(one) for one in found.runs]), *told),
        )
    )
    return page(TITLE, element("main", body))


def _charts(runs: Sequence[RoundLeakage]) -> list[str]:
    read: list[tuple[str, _Value]] = [
        ("rows", lambda one: None if one.membership.all is None else one.membership.all.auc),
        ("tokens", lambda one: None if one.tokens is None else one.tokens.all.auc),
    ]
    return [
        _chart("What an attacker reads", "AUC, 0.5 is a guess", runs, read),
        _chart("Exposure of canaries", "bits", runs, [("canaries", _bits)]),
        _chart("Held-out loss", "nats per token", runs, [("loss", lambda one: one.loss_nats)]),
    ]


def _bits(one: RoundLeakage) -> float | None:
    return None if one.exposures is None else one.exposures.bits_against_base


def _chart(title: str, axis: str, runs: Sequence[RoundLeakage], of: Sequence[tuple[str, _Value]]) -> str:
    """Return a plot over ε, or nothing where no run has noise; every run with noise is a point."""
    lines, levels = [], []
    for colour, (label, value_of) in enumerate(of):
        known = [(one.epsilon, value) for one in runs if (value := value_of(one)) is not None]
        points = sorted((epsilon, value) for epsilon, value in known if epsilon is not None and epsilon > 0.0)
        if points:
            lines.append(Line(label, colour, [x for x, _ in points], [y for _, y in points]))
        free = [value for epsilon, value in known if epsilon is None]
        levels += [Level(f"{label}, ε = ∞", colour, math.fsum(free) / len(free))] if free else []
    if not lines:
        return ""
    return figure(title, line_chart(title, Axis("ε", kind="log"), Axis(axis), lines, levels))


def _number(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f} %"
