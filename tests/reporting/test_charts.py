"""Charts as SVG."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

from fedloom.reporting.charts import Axis, Bar, Level, Line, bar_chart, line_chart, matrix_chart

X, Y = Axis("round", whole=True), Axis("loss", digits=2)


def texts(drawing: str) -> list[str]:
    return [text for node in ElementTree.fromstring(drawing).iter() if (text := (node.text or "").strip())]


def test_a_line_chart_names_itself_its_axes_and_its_curves() -> None:
    drawing = line_chart("Loss", X, Y, [Line("a<b", 0, [1, 2], [3.0, 2.0])], [Level("base", 1, 4.0)])
    assert {"Loss", "round", "loss", "a<b", "base"} <= set(texts(drawing))


def test_hovering_reads_the_values_and_the_range_of_the_seeds() -> None:
    line = Line("fedit", 9, [1, 2], [3.0, 2.0], low=[2.5, 2.0], high=[3.5, 2.0])
    root = ElementTree.fromstring(line_chart("Loss", X, Y, [line]))
    (series,) = json.loads(root.attrib["data-points"])
    assert series["colour"] == 1
    assert [point[2:] for point in series["points"]] == [["1", "3.00 (2.50–3.50)"], ["2", "2.00"]]


def test_a_single_point_and_many_points_are_drawn() -> None:
    assert line_chart("Loss", X, Y, [Line("a", 0, [1], [2.0])]).count("<circle") == 1
    many = [float(value) for value in range(1, 1000)]
    drawing = line_chart("Loss", X, Y, [Line("a", 0, many, many)])
    assert drawing.count("<circle") == 0
    assert drawing.count('class="line"') == 1


def test_a_curve_that_ends_early_is_labelled_where_it_ends() -> None:
    lines = [Line("short", 0, [1, 2], [3.0, 2.0]), Line("long", 1, [1, 9], [3.0, 1.0])]
    root = ElementTree.fromstring(line_chart("Loss", X, Y, lines))
    at = {node.text: float(node.attrib["x"]) for node in root.iter("text") if node.attrib["class"] == "end-label"}
    assert at["short"] < 200 < at["long"]


def test_bars_are_stacked_in_proportion() -> None:
    bars = [Bar("flora", [("up", 0, 10.0), ("down", 1, 30.0)]), Bar("none", [("up", 0, 0.0)], note="left out: x")]
    drawing = bar_chart("Bytes", Axis("bytes", "B"), bars)
    widths = [float(node.attrib["width"]) for node in ElementTree.fromstring(drawing).iter("rect")]
    assert round(widths[1] / widths[0], 1) == 3.0
    assert "left out: x" in texts(drawing)
    assert "40 B" in texts(drawing)


def test_nothing_but_zeros_can_be_drawn() -> None:
    assert bar_chart("Bytes", Axis("bytes", "B"), [Bar("a", [("up", 0, 0.0)])]).count("<rect") == 1


def test_a_matrix_shades_a_cell_by_its_share_of_the_row() -> None:
    drawing = matrix_chart("Rows", [("client 0", [30, 0, 10])], ["qa", "summary", "open"])
    cells = [node for node in ElementTree.fromstring(drawing).iter("rect") if node.attrib["class"].startswith("cell")]
    assert [cell.attrib.get("fill-opacity") for cell in cells] == ["0.79", None, "0.36"]
    assert "client 0: 30 rows of qa" in texts(drawing)
    assert "40" in texts(drawing)
