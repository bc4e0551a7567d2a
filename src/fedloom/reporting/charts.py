"""Charts as SVG text: lines with bands, bars, a matrix. A script may add hovering; nothing depends on it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from fedloom.reporting.metrics import Metric
from fedloom.reporting.svg import Scale, ScaleKind, element, fitted, path_data, spread, tick_text, ticks
from fedloom.wording import Unit, written

WIDTH, HEIGHT = 560.0, 330.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 112.0, 14.0, 44.0
NUM_COLOURS = 8
MAX_END_LABELS = 9


@dataclass(frozen=True)
class Axis:
    """An axis: its title, unit and scale; ``whole`` for counts such as rounds."""

    title: str
    unit: Unit = ""
    kind: ScaleKind = "linear"
    whole: bool = False
    digits: int = 3


def axis_of(metric: Metric) -> Axis:
    """Return the axis along which a metric is drawn."""
    return Axis(metric.title, metric.unit, digits=metric.digits)


@dataclass(frozen=True)
class Line:
    """One curve: points, and where several seeds were drawn together, the band they span."""

    label: str
    colour: int
    xs: Sequence[float]
    ys: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Level:
    """A horizontal line: a value that does not depend on x, such as the untouched base's loss."""

    label: str
    colour: int
    y: float


def line_chart(name: str, x: Axis, y: Axis, lines: Sequence[Line], levels: Sequence[Level] = ()) -> str:
    """Return a chart of curves and levels, each labelled at its right end; ``name`` says what it shows."""
    xs = [value for line in lines for value in line.xs]
    ys = [value for line in lines for values in (line.ys, line.low, line.high) for value in values]
    ys += [level.y for level in levels]
    across = fitted(xs, LEFT, WIDTH - RIGHT, x.kind, whole=x.whole)
    up = fitted(ys, HEIGHT - BOTTOM, TOP, y.kind)
    marks = [_level(level, up) for level in levels] + [_line(line, across, up) for line in lines]
    labels = _end_labels(lines, levels, across, up)
    hover = element("g", element("line", class_="crosshair", y1=TOP, y2=HEIGHT - BOTTOM), class_="hover")
    data = json.dumps([_hover_data(line, x, y, across, up) for line in lines], ensure_ascii=False)
    return element(
        "svg",
        element("title", text=name),
        _axes(x, y, across, up),
        *marks,
        *labels,
        hover,
        viewBox=f"0 0 {WIDTH:.0f} {HEIGHT:.0f}",
        role="img",
        class_="plot lines",
        tabindex="0",
        data_points=data,
    )


def _axes(x: Axis, y: Axis, across: Scale, up: Scale) -> str:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value in ticks(up, whole=y.whole):
        parts.append(element("line", class_="grid", x1=LEFT, x2=right, y1=up(value), y2=up(value)))
        parts.append(_text(LEFT - 8, up(value) + 4, tick_text(value, y.unit), "tick end"))
    for value in ticks(across, count=6, whole=x.whole):
        parts.append(element("line", class_="mark", x1=across(value), x2=across(value), y1=bottom, y2=bottom + 4))
        parts.append(_text(across(value), bottom + 17, tick_text(value, x.unit), "tick middle"))
    parts.append(element("line", class_="axis", x1=LEFT, x2=right, y1=bottom, y2=bottom))
    parts.append(_text((LEFT + right) / 2, HEIGHT - 6, x.title, "axis-title middle"))
    turned = f"rotate(-90 13 {(TOP + bottom) / 2:.0f})"
    parts.append(
        element("text", text=y.title, x=13, y=(TOP + bottom) / 2, class_="axis-title middle", transform=turned)
    )
    return element("g", *parts)


def _line(line: Line, across: Scale, up: Scale) -> str:
    points = [(across(x), up(y)) for x, y in zip(line.xs, line.ys, strict=True)]
    parts = []
    if line.low and len(points) > 1:
        upper = [(across(x), up(y)) for x, y in zip(line.xs, line.high, strict=True)]
        lower = [(across(x), up(y)) for x, y in zip(line.xs, line.low, strict=True)]
        parts.append(element("path", d=path_data([*upper, *reversed(lower)], closed=True), class_="band"))
    if len(points) > 1:
        parts.append(element("path", d=path_data(points), class_="line"))
    if len(points) <= 30:
        parts.extend(element("circle", cx=px, cy=py, r=3) for px, py in points)
    return element("g", *parts, class_=f"series s{line.colour % NUM_COLOURS}", data_series=line.label)


def _level(level: Level, up: Scale) -> str:
    drawn = element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=up(level.y), y2=up(level.y), class_="line level")
    return element("g", drawn, class_=f"series s{level.colour % NUM_COLOURS}", data_series=level.label)


def _end_labels(lines: Sequence[Line], levels: Sequence[Level], across: Scale, up: Scale) -> list[str]:
    """Label curves at the right edge, moved apart; a curve that ends well before it is labelled where it ends."""
    right = WIDTH - RIGHT
    early = [line for line in lines if line.ys and across(line.xs[-1]) < right - 70]
    ends = [(line.label, line.colour, up(line.ys[-1])) for line in lines if line.ys and line not in early]
    ends += [(level.label, level.colour, up(level.y)) for level in levels]
    if len(ends) + len(early) > MAX_END_LABELS:
        return []
    heights = spread([y for _, _, y in ends], 14, TOP + 4, HEIGHT - BOTTOM)
    labels = []
    for (label, colour, y), height in zip(ends, heights, strict=True):
        leader = element("path", d=path_data([(right + 3, y), (right + 11, height)]), class_="leader")
        text = element("text", text=_short(label, 15), x=right + 14, y=height + 4, class_="end-label")
        labels.append(element("g", leader, text, class_=f"series s{colour % NUM_COLOURS}", data_series=label))
    if not early:
        return labels
    lower = spread([up(line.ys[-1]) for line in early], 14, TOP + 4, HEIGHT - BOTTOM)
    for line, height in zip(early, lower, strict=True):
        text = element("text", text=line.label, x=across(line.xs[-1]) + 8, y=height + 4, class_="end-label")
        labels.append(element("g", text, class_=f"series s{line.colour % NUM_COLOURS}", data_series=line.label))
    return labels


def _hover_data(line: Line, x: Axis, y: Axis, across: Scale, up: Scale) -> dict[str, object]:
    points = []
    for index, (at, value) in enumerate(zip(line.xs, line.ys, strict=True)):
        text = written(value, y.unit, y.digits)
        if line.low and line.low[index] != line.high[index]:
            text += f" ({written(line.low[index], y.unit, y.digits)}–{written(line.high[index], y.unit, y.digits)})"
        points.append([round(across(at), 1), round(up(value), 1), tick_text(at, x.unit), text])
    return {"label": line.label, "colour": line.colour % NUM_COLOURS, "x": x.title, "points": points}


@dataclass(frozen=True)
class Bar:
    """One bar: stacked parts as (label, colour, value); ``note`` replaces the value where there is none."""

    label: str
    parts: Sequence[tuple[str, int, float]]
    note: str = ""


def bar_chart(name: str, axis: Axis, bars: Sequence[Bar]) -> str:
    """Return horizontal bars from zero, one under the other, values at their ends."""
    pitch, left, right = 24.0, 118.0, 84.0
    height = TOP + pitch * len(bars) + 34
    totals = [sum(value for _, _, value in bar.parts) for bar in bars]
    across = Scale(0.0, max([*totals, 1e-12]) * 1.02, left, WIDTH - right)
    parts = []
    for value in ticks(across, count=4):
        at = across(value)
        parts.append(element("line", class_="grid", x1=at, x2=at, y1=TOP, y2=height - 34))
        parts.append(_text(at, height - 19, tick_text(value, axis.unit), "tick middle"))
    for row, (bar, total) in enumerate(zip(bars, totals, strict=True)):
        y = TOP + row * pitch
        parts.append(_text(left - 8, y + 16, _short(bar.label, 17), "tick end"))
        parts.extend(_bar_parts(bar, axis, across, y, pitch))
        shown = bar.note or written(total, axis.unit, axis.digits)
        parts.append(_text(across(total) + 6, y + 16, shown, "value"))
    parts.append(element("line", class_="axis", x1=left, x2=left, y1=TOP, y2=height - 34))
    parts.append(_text((left + WIDTH - right) / 2, height - 3, axis.title, "axis-title middle"))
    title = element("title", text=name)
    return element("svg", title, *parts, viewBox=f"0 0 {WIDTH:.0f} {height:.0f}", role="img", class_="plot bars")


def _bar_parts(bar: Bar, axis: Axis, across: Scale, y: float, pitch: float) -> list[str]:
    drawn, start = [], 0.0
    for label, colour, value in bar.parts:
        tip = element("title", text=f"{bar.label}: {label} {written(value, axis.unit, axis.digits)}")
        width = max(across(start + value) - across(start), 0.0)
        rectangle = element("rect", tip, x=across(start), y=y + 4, width=width, height=pitch - 8)
        drawn.append(element("g", rectangle, class_=f"fill s{colour % NUM_COLOURS}"))
        start += value
    return drawn


def matrix_chart(name: str, rows: Sequence[tuple[str, Sequence[int]]], columns: Sequence[str]) -> str:
    """Return a matrix of counts: the darker a cell, the larger its share of the row; totals at the right."""
    cell, left = (30.0 if len(columns) <= 16 else 16.0), 150.0
    top = 24.0 + 4.6 * min(max(map(len, columns), default=0), 22)
    row_height = 22.0 if len(rows) <= 40 else 14.0
    edge = left + cell * len(columns)
    width, height = edge + 190.0, top + row_height * len(rows) + 10
    parts = []
    for index, column in enumerate(columns):
        x = left + (index + 0.5) * cell
        turn = f"rotate(-50 {x:.0f} {top - 8:.0f})"
        parts.append(element("text", text=_short(column, 22), x=x, y=top - 8, class_="tick", transform=turn))
    most = max((sum(counts) for _, counts in rows), default=1) or 1
    for number, (label, counts) in enumerate(rows):
        y = top + number * row_height
        parts.append(_text(left - 10, y + row_height / 2 + 4, _short(label, 22), "tick end"))
        total = sum(counts)
        for index, count in enumerate(counts):
            tip = element("title", text=f"{label}: {count} rows of {columns[index]}")
            x = left + index * cell
            class_, shade = ("cell", 0.15 + 0.85 * count / total) if count else ("cell empty", None)
            size = {"x": x + 1, "y": y + 1, "width": cell - 2, "height": row_height - 2}
            parts.append(element("rect", tip, text="", class_=class_, fill_opacity=shade, **size))
        length = 90 * total / most
        parts.append(element("rect", class_="total", x=edge + 12, y=y + 5, width=length, height=row_height - 10))
        parts.append(_text(edge + 18 + length, y + row_height / 2 + 4, f"{total:,}", "value"))
    parts.append(_text(edge + 12, top - 8, "rows", "tick"))
    title = element("title", text=name)
    box = f"0 0 {width:.0f} {height:.0f}"
    return element(
        "svg", title, *parts, viewBox=box, role="img", class_="plot matrix", style=f"max-width:{width:.0f}px"
    )


def _text(x: float, y: float, text: str, class_: str) -> str:
    return element("text", text=text, x=x, y=y, class_=class_)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
