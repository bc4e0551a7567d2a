"""The report as a file; the browser's own view of it is in test_report_in_browser.py."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedloom.errors import EvaluationError, RunError
from fedloom.reporting.report import write_report
from fedloom.reporting.run_groups import group_runs, result_table
from fedloom.run_folder.reader import read_run

MakeRun = Callable[..., Path]
SECTIONS = ["results", "loss", "groups", "clients", "aggregation", "result", "costs", "provenance"]


class Checked(HTMLParser):
    """Collect sections and addresses, and check that elements close in order."""

    VOID = frozenset({"meta"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sections: list[str] = []
        self.addresses: list[str] = []
        self.rows: list[list[str]] = []
        """The cells of the table of results."""
        self.in_results = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        found = dict(attrs)
        if tag == "section":
            self.sections.append(str(found["id"]))
        if tag == "table":
            self.in_results = found.get("class") == "results"
        if self.in_results and tag == "tr":
            self.rows.append([])
        if self.in_results and tag in {"th", "td"}:
            self.rows[-1].append("")
        self.addresses += [str(found[name]) for name in ("src", "href", "action") if name in found]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.in_results = self.in_results and tag != "table"

    def handle_data(self, data: str) -> None:
        if self.in_results:
            self.rows[-1][-1] += data


def read(page: Path) -> Checked:
    parser = Checked()
    parser.feed(page.read_text(encoding="utf-8"))
    assert parser.open == []
    return parser


def test_the_page_has_every_section_and_asks_the_network_for_nothing(comparison: Path, tmp_path: Path) -> None:
    write_report([comparison], tmp_path / "report.html", reference="fedit")
    page = read(tmp_path / "report.html")
    assert page.sections == SECTIONS
    assert page.addresses == []
    text = (tmp_path / "report.html").read_text()
    assert not re.findall(r"https?://|@import|url\(", text)
    assert "default-src 'none'" in text


def test_a_run_without_partition_adapter_or_finish_is_reported_with_a_warning(
    make_run: MakeRun, tmp_path: Path
) -> None:
    path = make_run("flora", finish="no")
    (path / "holdings.json").unlink()
    shutil.rmtree(path / "adapter")
    write_report([path], tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    assert page.sections == [name for name in SECTIONS if name != "result"]
    text = (tmp_path / "report.html").read_text()
    assert "Not finished: flora-seed1" in text
    assert "dropped: not finite" not in text  # client 4 took part again after round 2
    assert "Who holds what" not in text


def test_a_run_that_has_no_round_yet_is_refused_unless_others_have(make_run: MakeRun, tmp_path: Path) -> None:
    empty, out = make_run("fedit", num_rounds=0, finish="no"), tmp_path / "report.html"
    with pytest.raises(RunError, match="expected a completed round"):
        write_report([empty], out)
    assert not out.exists()
    write_report([empty, make_run("flora")], out)
    assert "Not finished: fedit-seed1" in out.read_text()


def test_loss_against_bytes_is_left_out_where_nothing_crosses(make_run: MakeRun, tmp_path: Path) -> None:
    write_report([make_run("standalone"), make_run("base")], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "Loss against rounds" in text
    assert "Loss against bytes" not in text


def test_names_from_outside_are_text_and_not_markup(make_run: MakeRun, tmp_path: Path) -> None:
    write_report([make_run("fedit", path="<script>alert(1)</script>")], tmp_path / "report.html")
    assert "<script>alert" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "value",
    [
        ["model.layers.*(q_proj|v_proj)"],
        "**bold** | `code` || |",
        "<b>&amp;</b>\" onclick='x'",
        "two\nlines\r\n| and | a row |",
        "\x00\x1b[31m\x1f\u2028",
        "",
        None,
    ],
    ids=repr,
)
def test_a_row_of_the_table_survives_any_label(value: object, make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("flora", seed=1, shape="plain"), make_run("flora", seed=2, shape=value), make_run("fedit")]
    write_report(runs, tmp_path / "report.html")
    page, groups = read(tmp_path / "report.html"), group_runs(map(read_run, runs))
    table = result_table(groups, "fedit")
    assert len(table.cells) == 3
    wanted = [[method, *(text for text, _ in cells)] for method, cells in table.rows()]
    assert page.rows == [["method", *(metric.title for metric in table.metrics)], *wanted]
    assert all(len(row) == 1 + len(table.metrics) for row in page.rows)


def test_a_run_named_twice_counts_once(make_run: MakeRun, tmp_path: Path) -> None:
    path = make_run("fedit")
    write_report([path, path], tmp_path / "twice.html")
    write_report([path], tmp_path / "once.html")
    assert (tmp_path / "twice.html").read_bytes() == (tmp_path / "once.html").read_bytes()


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="at least one run folder"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(RunError, match="found no run in it"):
        write_report([tmp_path], tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_run_is_skipped_and_named(make_run: MakeRun, tmp_path: Path) -> None:
    whole, broken, torn = make_run("fedit"), make_run("flora"), make_run("zero-padding")
    (broken / "config.json").write_text("{")
    weights = torn / "adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    write_report([whole.parent], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<title>fedloom report: fedit, zero-padding</title>" in page
    assert "config.json: expected what the run wrote" in page
    assert str(weights) in page
    with pytest.raises(RunError, match=r"adapter_model\.safetensors: expected what the run wrote .*; remove "):
        write_report([torn], tmp_path / "none.html")
    for path in (whole, torn):
        (path / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config.json: expected what the run wrote"):
        write_report([whole.parent], tmp_path / "none.html")


def test_the_figures_are_of_all_rounds_though_metrics_jsonl_lost_some(make_run: MakeRun) -> None:
    path = make_run("fedit")
    whole = read_run(path).records
    metrics = path / "metrics.jsonl"
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:2]))
    assert read_run(path).records == whole
    metrics.unlink()
    assert read_run(path).records == whole


def test_methods_are_set_against_fedit_unless_another_is_named(comparison: Path, tmp_path: Path) -> None:
    for reference, named in ((None, "fedit"), ("flora", "flora")):
        write_report([comparison], tmp_path / "report.html", reference)
        assert f"worse than {named} by more than noise" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_reference_that_is_not_there_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"expected one of fedit.*, got 'flora'"):
        write_report([make_run("fedit")], tmp_path / "report.html", reference="flora")
