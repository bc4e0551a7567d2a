"""What it cost: bytes by direction and kind, seconds by phase."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from fedloom.reporting.charts import Axis, Bar, bar_chart
from fedloom.reporting.page.parts import figure, table
from fedloom.reporting.run_groups import RunGroup
from fedloom.reporting.svg import element
from fedloom.run_folder.reader import StoredRun
from fedloom.wording import written


def costs(groups: Sequence[RunGroup]) -> str:
    """Return bytes by direction and kind, and seconds by phase, a bar per group."""
    byte_parts = _stacked(groups, _bytes_by_kind)
    second_parts = _stacked(groups, _seconds_by_phase)
    drawn = [
        _stacked_figure("Bytes by direction and kind", Axis("bytes of the whole run", "B"), byte_parts),
        _stacked_figure("Seconds by phase", Axis("seconds of the whole run", "s"), second_parts),
    ]
    return "".join(drawn)


def _stacked(
    groups: Sequence[RunGroup], parts_of: Callable[[StoredRun], Mapping[str, float]]
) -> list[tuple[str, Mapping[str, float]]]:
    return [(group.label, parts) for group in groups if sum((parts := parts_of(group.first)).values()) > 0]


def _stacked_figure(title: str, axis: Axis, bars: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    if not bars:
        return ""
    names = list({name: None for _, parts in bars for name in parts})
    drawn = [Bar(label, [(name, names.index(name), value) for name, value in parts.items()]) for label, parts in bars]
    swatches = [
        element("span", element("span", class_="swatch"), element("span", text=name), class_=f"s{index % 8}")
        for index, name in enumerate(names)
    ]
    legend = element("div", *swatches, class_="legend")
    rows = [[label, *(written(parts.get(name, 0.0), axis.unit) for name in names)] for label, parts in bars]
    return figure(
        title, legend + bar_chart(title, axis, drawn), "The first seed of each.", table(["method", *names], rows)
    )


def _bytes_by_kind(run: StoredRun) -> dict[str, float]:
    parts: Counter[str] = Counter()
    for record in run.records:
        kinds = record.get("bytes_by_kind") or {"": record}
        for kind, counts in kinds.items():
            for direction, word in (("upload_bytes", "up"), ("download_bytes", "down")):
                parts[f"{kind} {word}".strip()] += counts.get(direction) or 0
    return {name: float(count) for name, count in parts.items() if count}


def _seconds_by_phase(run: StoredRun) -> dict[str, float]:
    parts: Counter[str] = Counter()
    for record in run.records:
        for phase, seconds in (record.get("seconds") or {}).items():
            parts[phase] += seconds
    return dict(parts)
