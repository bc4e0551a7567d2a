"""Tables for a paper: the report's numbers, as CSV, LaTeX and Markdown."""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom.errors import RunError
from fedloom.reporting.collected import collect
from fedloom.reporting.paper import latex, write_tables
from fedloom.reporting.run_groups import result_table, results
from fedloom.reporting.tuned import TunedMethod, TunedPoint, Tuning

MakeRun = Callable[..., Path]


def files(folder: Path) -> dict[str, Path]:
    return {kind: folder / f"table.{kind}" for kind in ("csv", "latex", "markdown")}


def test_a_csv_file_has_every_figure_of_every_run_as_it_is(comparison: Path, tmp_path: Path) -> None:
    write_tables(collect([comparison]), files(tmp_path))
    with (tmp_path / "table.csv").open(newline="") as file:
        found = {(row["method"], int(row["seed"]), row["figure"]): float(row["value"]) for row in csv.DictReader(file)}
    groups = collect([comparison]).groups
    assert found == {
        (group.label, run.seed, key): value
        for group in groups
        for run in group.runs
        for key, value in results(run).items()
    }


def test_the_tables_have_the_reports_cells_and_say_what_methods_were_tuned_to(comparison: Path, tmp_path: Path) -> None:
    points = [TunedPoint(values={"training.learning_rate": rate}, folder="x", loss_nats=2.0) for rate in (1e-3, 2e-3)]
    comparison = shutil.copytree(comparison, tmp_path / "comparison")  # the fixture is of all tests
    tuned = [TunedMethod(method="fedit", points=points, chosen=1)]
    Tuning(format_version=1, seed=3, fraction=0.1, num_rows=40, methods=tuned, skipped={}).write(comparison)
    write_tables(collect([comparison], "fedit"), files(tmp_path))
    table = result_table(collect([comparison]).groups, "fedit")
    in_latex = (tmp_path / "table.latex").read_text()
    in_markdown = (tmp_path / "table.markdown").read_text()
    for method, cells in table.rows():
        line = next(one for one in in_latex.splitlines() if one.startswith(f"{latex(method)} & "))
        assert [re.sub(r"^\\textbf\{(.*)\}$", r"\1", cell) for cell in line[:-3].split(" & ")[1:]] == [
            latex(text) for text, _ in cells
        ]
        assert line.count(r"\textbf") == sum(is_best for _, is_best in cells)
    for text in (in_latex, in_markdown):
        assert "Tuned on validation rows to fedit: training.learning" in text
        assert "0.002" in text
    assert in_latex.count("{") == in_latex.count("}")


def test_latex_shows_any_text_as_it_is() -> None:
    assert latex("a_b & 50 % of {c} \\ ^~#$ ▲ ±") == (
        r"a\_b \& 50 \% of \{c\} \textbackslash{} \textasciicircum{}\textasciitilde{}\#\$ $\blacktriangle$ $\pm$"
    )


@pytest.mark.parametrize("kind", ["csv", "latex", "markdown"])
def test_a_table_replaces_an_earlier_table_and_nothing_else(make_run: MakeRun, tmp_path: Path, kind: str) -> None:
    run, file = make_run("fedit"), tmp_path / "mine"
    write_tables(collect([run]), {kind: file})
    before = file.read_bytes()
    write_tables(collect([run]), {kind: file})
    assert file.read_bytes() == before
    file.write_text("notes of mine")
    with pytest.raises(RunError, match="expected a new file or an earlier table"):
        write_tables(collect([run]), {kind: file})
    assert file.read_text() == "notes of mine"
