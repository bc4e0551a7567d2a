"""Drawing primitives."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from fedloom.reporting.svg import Scale, element, fitted, spread, tick_text, ticks


def test_text_and_attributes_are_escaped() -> None:
    drawn = element("text", text="<b> & 'c'", class_="end", data_x='"', fill_opacity=0.5, hidden=None)
    assert drawn == ('<text class="end" data-x="&quot;" fill-opacity="0.5">&lt;b&gt; &amp; &#x27;c&#x27;</text>')
    assert ElementTree.fromstring(drawn).text == "<b> & 'c'"


def test_a_scale_maps_its_ends_to_pixels() -> None:
    assert [Scale(1, 3, 100, 0)(value) for value in (1, 2, 3)] == [100, 50, 0]
    assert Scale(1, 100, 0, 10, "log")(10) == pytest.approx(5)


@pytest.mark.parametrize("values", [[3.0], [0.0], [], [2.0, 2.0], [-1.0, 1.0], [5.0, 5.0001]])
@pytest.mark.parametrize("kind", ["linear", "log"])
def test_every_value_fits_its_scale(values: list[float], kind: str) -> None:
    if kind == "log" and (not values or min(values) <= 0):
        return
    scale = fitted(values, 0, 100, kind)  # type: ignore[arg-type]
    assert all(0 <= scale(value) <= 100 for value in values)
    assert ticks(scale)


def test_nothing_below_zero_is_invented() -> None:
    assert fitted([0.01, 1.0], 0, 1, "linear").low == 0.0


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (4.6, 5.2, [4.6, 4.8, 5.0, 5.2]), (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(Scale(low, high, 0, 100)) == pytest.approx(expected)


def test_rounds_get_whole_ticks() -> None:
    assert ticks(Scale(1, 3, 0, 100), whole=True) == [1, 2, 3]


@pytest.mark.parametrize(("low", "high"), [(0.8, 1.3), (1, 9), (1, 1e3), (1e-9, 1e9)])
def test_log_ticks_are_inside_and_few(low: float, high: float) -> None:
    found = ticks(Scale(low, high, 0, 100, "log"))
    assert 1 <= len(found) <= 8
    assert all(low <= value <= high for value in found)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(2e6, "B", "2 MB"), (0.25, "%", "25 %"), (5.0, "", "5"), (1e-5, "", "1e-05"), (0.0, "", "0"), (3.0, "s", "3 s")],
)
def test_ticks_carry_their_unit(value: float, unit: str, text: str) -> None:
    assert tick_text(value, unit) == text  # type: ignore[arg-type]


def test_labels_are_moved_apart_in_their_order_and_stay_inside() -> None:
    placed = spread([50.0, 51.0, 99.0, 100.0], 10, 0, 100)
    assert all(upper - lower >= 10 for lower, upper in pairwise(placed))
    assert max(placed) <= 100
    assert spread([10.0, 90.0], 10, 0, 100) == [10.0, 90.0]
