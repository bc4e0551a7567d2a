"""What the result is made of: singular values, and the rank that holds the energy, by module."""

from __future__ import annotations

from collections.abc import Sequence

from fedloom.errors import AdapterError, RunError
from fedloom.reporting.charts import Axis, Line, line_chart
from fedloom.reporting.page.parts import choice, figure, table
from fedloom.reporting.run_groups import RunGroup
from fedloom.reporting.spectra import NOTHING, Spectrum, mean_spectrum, spectra_of
from fedloom.reporting.svg import element


def spectrum(groups: Sequence[RunGroup]) -> str:
    """Return the mean spectrum of every group's result, and a table of its modules; what cannot be read is said."""
    found: list[tuple[RunGroup, list[Spectrum]]] = []
    problems = []
    for group in groups:
        if group.first.adapter_folder is not None:
            try:
                group.first.check_adapter()
                found.append((group, spectra_of(group.first.adapter_folder)))
            except (AdapterError, RunError) as error:
                problems.append(element("p", text=f"Left out: {error}.", class_="warning"))
    lines = [
        Line(group.label, group.colour, [float(i + 1) for i in range(len(values))], values)
        for group, spectra in found
        if (values := [value for value in mean_spectrum(spectra) if value > NOTHING])
    ]
    if not lines:
        return "".join(problems)
    x, y = Axis("direction", whole=True), Axis("singular value / largest", kind="log")
    chart = line_chart("Spectrum of the result", x, y, lines)
    note = "Root mean square over modules; the first seed of each."
    panels = [((group.label,), _module_table(group, spectra)) for group, spectra in found]
    return "".join(problems) + figure("Spectrum of the result", chart, note) + choice(("Modules of",), panels)


def _module_table(group: RunGroup, spectra: Sequence[Spectrum]) -> str:
    head = ["module", "out × in", "rank", "90 %", "99 %", "norm"]
    rows = [
        [
            one.module,
            f"{one.shape[0]} × {one.shape[1]}",
            str(one.rank),
            str(one.rank_holding(0.9)),
            str(one.rank_holding(0.99)),
            f"{one.norm:.4g}",
        ]
        for one in spectra
    ]
    caption = (
        f"{group.label}, seed {group.first.seed}: rank as stored, and directions that hold 90 and 99 % of the energy"
    )
    return table(head, rows, caption)
