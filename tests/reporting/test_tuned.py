"""What was chosen, as told and as kept: edges of a grid, reasons, a file that is refused when it was changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedloom.errors import RunError
from fedloom.reporting.report import write_report
from fedloom.reporting.tuned import TunedMethod, TunedPoint, Tuning, read_tuning


def method(chosen: int, *values: Any, name: str = "training.learning_rate") -> TunedMethod:
    points = [
        TunedPoint(values={name: value}, folder=f"tuning/x/{k}", loss_nats=2.0 + abs(k - chosen))
        for k, value in enumerate(values)
    ]
    return TunedMethod(method="fedit", points=points, chosen=chosen)


def tuning(*methods: TunedMethod) -> Tuning:
    skipped = {"base": {"training.learning_rate": "it does not act"}}
    return Tuning(format_version=1, seed=3, fraction=0.1, num_rows=40, methods=list(methods), skipped=skipped)


@pytest.mark.parametrize(
    ("chosen", "values", "edges"),
    [
        (0, (1e-3, 2e-3, 4e-3), ["the lowest training.learning_rate of the grid"]),
        (1, (1e-3, 2e-3, 4e-3), []),
        (0, (4e-3, 2e-3, 1e-3), ["the highest training.learning_rate of the grid"]),
        (0, (1e-3,), []),
        (0, ("plain", "momentum"), []),
        (0, (True, False), []),
        (1, ([8, 4], [4, 2]), []),
    ],
    ids=str,
)
def test_a_number_at_the_edge_of_its_grid_is_told(chosen: int, values: tuple[Any, ...], edges: list[str]) -> None:
    found = method(chosen, *values)
    assert found.edges == edges
    rows = [cells for cells, is_chosen in tuning(found).rows() if is_chosen]
    assert [cells[3] for cells in rows] == [", ".join(["chosen", *edges])]
    assert ("a wider grid" in tuning(found).caption()) == bool(edges)


def test_every_point_is_shown_with_its_loss_or_the_reason_why_it_has_none() -> None:
    point = TunedPoint(values={"server.step": "plain"}, folder="x", loss_nats=None, reason="its loss is none")
    found = tuning(TunedMethod(method="fedit", points=[point, *method(0, 1e-3).points], chosen=1))
    assert [cells[1:3] for cells, _ in found.rows()] == [
        ['server.step = "plain"', "its loss is none"],
        ["training.learning_rate = 0.001", "2.0000"],
    ]
    assert found.caption().startswith("Chosen per method by the loss on 40 validation rows of seed 3: 10 % of")
    assert found.caption().endswith("Not chosen: training.learning_rate of base: it does not act.")


def test_what_was_chosen_is_read_as_it_was_written_or_refused(tmp_path: Path) -> None:
    assert read_tuning(tmp_path) is None
    found = tuning(method(1, 1e-3, 2e-3))
    found.write(tmp_path)
    assert read_tuning(tmp_path) == found
    changed = json.loads((tmp_path / "tuning.json").read_text())
    changed["methods"][0]["chosen"] = 0
    (tmp_path / "tuning.json").write_text(json.dumps(changed))
    with pytest.raises(RunError, match=r"tuning\.json: expected what the run wrote .*; run the comparison again"):
        read_tuning(tmp_path)


def test_the_report_of_a_comparison_shows_what_was_chosen_or_that_it_cannot(make_run: Any, tmp_path: Path) -> None:
    folder = make_run("fedit").parent
    tuning(method(0, 1e-3, 2e-3)).write(folder)
    write_report([folder], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "chosen, the lowest training.learning_rate of the grid" in page
    assert "40 validation rows of seed 3" in page
    (folder / "tuning.json").write_text("{}")
    write_report([folder], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Tuned settings" not in page
    assert "Left out: " in page
    assert "tuning.json: expected a file of tuned settings" in page
