"""Figures for a paper: the report's curves, in every format, with their numbers beside them."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom.errors import MissingExtraError
from fedloom.reporting.collected import collect
from fedloom.reporting.figures import FORMATS, figures_of, numbers, write_figures
from fedloom.reporting.run_groups import loss_by_bytes

MakeRun = Callable[..., Path]
SIGNS = {"pdf": b"%PDF", "svg": b"<?xml", "png": b"\x89PNG"}


@pytest.mark.extra("figures")
def test_every_figure_is_written_in_every_format_with_its_numbers_and_to_the_same_bytes(
    comparison: Path, tmp_path: Path
) -> None:
    written = write_figures(collect([comparison]), tmp_path / "one")
    assert [path.name for path in written] == [
        f"{name}.{suffix}" for name in ("loss-by-round", "loss-by-bytes", "final-loss") for suffix in (*FORMATS, "csv")
    ]
    for path in written:
        if path.suffix != ".csv":
            assert path.read_bytes().startswith(SIGNS[path.suffix[1:]])
    again = write_figures(collect([comparison]), tmp_path / "two")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written]


def test_the_numbers_of_a_figure_are_those_of_the_reports_curve(comparison: Path) -> None:
    told = collect([comparison])
    figure = next(one for one in figures_of(told) if one.name == "loss-by-bytes")
    rows = list(csv.reader(numbers(figure).splitlines()))[1:]
    expected = [
        [curve.group.label, repr(x), repr(y)]
        for curve in map(loss_by_bytes, told.groups)
        if len(curve.xs) > 1 and max(curve.xs) > 0.0  # one point is no curve, and controls send nothing
        for x, y in zip(curve.xs, curve.ys, strict=True)
    ]
    assert [row[:3] for row in rows] == expected


def test_without_matplotlib_the_extra_is_named_and_nothing_is_written(
    comparison: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"fedloom\[figures\]"):
        write_figures(collect([comparison]), tmp_path / "figures")
    assert not (tmp_path / "figures").exists()
