"""What sections are built of: headings, figures, tables, choices. Text is escaped; drawings pass as they are."""

from __future__ import annotations

import json
from collections.abc import Sequence

from fedloom.reporting.run_groups import RunGroup
from fedloom.reporting.svg import element
from fedloom.wording import one_line


def section(name: str, title: str, text: str, *figures: str) -> str:
    """Return a section with its heading and one sentence; the empty text where no figure has anything to show."""
    content = "".join(figures)
    if not content:
        return ""
    lead = element("p", text=text, class_="lead") if text else ""
    return element("section", element("h2", text=title), lead, content, id=name)


def figure(title: str, drawing: str, note: str = "", *numbers: str) -> str:
    """Return a chart under its title, with the numbers behind it folded away."""
    caption = element("figcaption", element("strong", text=title), element("span", text=note) if note else "")
    folded = element("details", element("summary", text="Numbers"), *numbers) if numbers else ""
    return element("figure", caption, drawing, folded)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """Return a table; all columns but the first hold numbers."""
    top = element("tr", *(element("th", text=cell, scope="col") for cell in head))
    body = "".join(
        element("tr", element("th", text=row[0], scope="row"), *(element("td", text=cell) for cell in row[1:]))
        for row in rows
    )
    title = element("caption", text=caption) if caption else ""
    return element("div", element("table", title, element("thead", top), element("tbody", body)), class_="scroll")


def choice(labels: Sequence[str], panels: Sequence[tuple[tuple[str, ...], str]]) -> str:
    """Return panels of which lists show one, a list per label; without a script, and on paper, the first is seen.

    A panel's names say which entry of each list it belongs to.
    """
    panels = [(tuple(map(one_line, names)), content) for names, content in panels]
    if len(panels) < 2:
        return "".join(content for _, content in panels)
    selects = []
    for index, label in enumerate(labels):
        entries = list({names[index]: None for names, _ in panels})
        options = "".join(element("option", text=entry, value=entry) for entry in entries)
        hidden = "hidden" if len(entries) < 2 else None
        selects.append(element("label", element("span", text=label), element("select", options), hidden=hidden))
    shown = [
        element("div", content, class_="panel", data_names=json.dumps(names), hidden="hidden" if index else None)
        for index, (names, content) in enumerate(panels)
    ]
    return element("div", element("div", *selects, class_="choose"), *shown, class_="choice")


def key(groups: Sequence[RunGroup]) -> str:
    """Return the colours' key, whose buttons hide and show a group in every chart."""
    buttons = [
        element(
            "button",
            element("span", class_="swatch"),
            element("span", text=group.label),
            type="button",
            aria_pressed="true",
            class_=f"s{group.colour % 8}",
            data_key=group.label,
        )
        for group in groups
    ]
    return element("div", *buttons, class_="key", role="group", aria_label="Methods shown") if len(groups) > 1 else ""
