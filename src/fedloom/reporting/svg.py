"""Drawing primitives: elements as text, scales, ticks. Colours are CSS classes, so that the page's scheme decides."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedloom.wording import Unit, one_line, written_bytes

ScaleKind = Literal["linear", "log"]


def element(tag: str, *children: str, text: str = "", **attributes: Any) -> str:
    """Return an element; ``class_`` and ``data_x`` stand for ``class`` and ``data-x``; None leaves an attribute out.

    Text and attributes may hold anything: they are escaped, and control characters shown by their pictures.
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(one_line(_number(value)), quote=True)}"'
        for name, value in attributes.items()
        if value is not None
    )
    content = html.escape(one_line(text)) + "".join(children)
    return f"<{tag}{written}>{content}</{tag}>"


def _number(value: str | float | None) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Scale:
    """Maps ``low``..``high`` to pixels ``start``..``end``; a log scale needs ``low`` above 0."""

    low: float
    high: float
    start: float
    end: float
    kind: ScaleKind = "linear"

    def __call__(self, value: float) -> float:
        """Return the pixel of ``value``."""
        if self.kind == "log":
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def fitted(values: Sequence[float], start: float, end: float, kind: ScaleKind, *, whole: bool = False) -> Scale:
    """Return a scale around the values with a little air; ``whole`` keeps the ends on the data (rounds)."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if kind == "log":
        return Scale(low / 1.15, high * 1.15 if high > low else high * 10, start, end, kind)
    floor = 0.0 if low >= 0 else -math.inf
    if high <= low:
        low, high = max(low - 0.5 * (abs(low) or 1.0), floor), high + 0.5 * (abs(high) or 1.0)
    air = 0.0 if whole else 0.06 * (high - low)
    return Scale(max(low - air, floor), high + air, start, end, kind)


def ticks(scale: Scale, count: int = 5, *, whole: bool = False) -> list[float]:
    """Return round values inside the scale: steps of 1, 2 or 5 times a power of ten."""
    if scale.kind == "log":
        return _log_ticks(scale, count)
    rough = (scale.high - scale.low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(multiple * power for multiple in (1, 2, 5, 10) if multiple * power >= rough)
    if whole:
        step = max(1.0, step)
    first = math.ceil(scale.low / step - 1e-9)
    last = math.floor(scale.high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _log_ticks(scale: Scale, count: int) -> list[float]:
    powers = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
    for multiples in ((1,), (1, 3), (1, 2, 5)):
        found = [m * 10.0**p for p in powers for m in multiples if scale.low <= m * 10.0**p <= scale.high]
        if len(found) >= min(count, 3):
            break
    return found[:: max(1, math.ceil(len(found) / (count + 2)))]


def tick_text(value: float, unit: Unit) -> str:
    """Return a tick's label."""
    match unit:
        case "B":
            return written_bytes(value)
        case "%":
            return f"{100 * value:g} %"
        case "s":
            return f"{value:g} s"
        case "":
            return f"{value:.0e}" if value and not 1e-3 <= abs(value) < 1e5 else f"{value:.4g}"


def path_data(points: Sequence[tuple[float, float]], *, closed: bool = False) -> str:
    """Return the ``d`` of a path through the points."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + ("Z" if closed else "")


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move labels apart to at least ``gap`` pixels, keeping their order and, where they fit, the range."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    placed = [0.0] * len(positions)
    previous = low - gap
    for index in order:
        previous = placed[index] = max(positions[index], previous + gap)
    following = high + gap
    for index in reversed(order):
        following = placed[index] = min(placed[index], following - gap)
    return placed
