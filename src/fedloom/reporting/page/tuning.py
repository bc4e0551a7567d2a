"""What was chosen for every method before it was compared: every point that was tried, and its validation loss."""

from __future__ import annotations

from collections.abc import Sequence

from fedloom.reporting.svg import element
from fedloom.reporting.tuned import HEAD, Tuning


def tuned_settings(tunings: Sequence[Tuning]) -> str:
    """Return a table per comparison that was tuned."""
    return "".join(_table(tuning) for tuning in tunings)


def _table(tuning: Tuning) -> str:
    top = element("thead", element("tr", *(element("th", text=title, scope="col") for title in HEAD)))
    body = "".join(
        element(
            "tr",
            element("th", text=cells[0], scope="row"),
            *(element("td", text=cell, class_="best" if is_chosen else None) for cell in cells[1:]),
        )
        for cells, is_chosen in tuning.rows()
    )
    note = element("p", text=tuning.caption(), class_="note")
    return element("div", element("table", top, element("tbody", body), class_="results"), class_="scroll") + note
