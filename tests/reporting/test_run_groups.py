"""Runs side by side."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from example_runs import rewrite

from fedloom.reporting import run_groups
from fedloom.reporting.metrics import NOISE
from fedloom.reporting.run_groups import (
    RunGroup,
    by_group,
    client_entries,
    loss_by_bytes,
    loss_by_round,
    rank_by_round,
    result_table,
    results,
    value_by_round,
)
from fedloom.run_folder.reader import read_run

MakeRun = Callable[..., Path]


def group_runs(paths: Iterable[Path]) -> list[RunGroup]:
    return run_groups.group_runs(map(read_run, paths))


def test_runs_that_differ_by_the_seed_alone_are_one_group(comparison: Path) -> None:
    groups = group_runs(comparison.iterdir())
    assert [group.label for group in groups] == ["fedit", "zero-padding", "flora", "centralised", "standalone", "base"]
    assert all([run.seed for run in group.runs] == [1, 2] for group in groups)


def test_equal_methods_are_told_apart_by_the_setting_that_differs(make_run: MakeRun) -> None:
    groups = group_runs([make_run("flora", seed=1, shape="dolly"), make_run("flora", seed=2, shape="alpaca")])
    assert sorted(group.label for group in groups) == ["flora (shape=alpaca)", "flora (shape=dolly)"]


def test_no_two_groups_share_a_label(make_run: MakeRun) -> None:
    stored = [read_run(make_run("flora", seed=seed)) for seed in (1, 2, 3, 4)]
    settings = [{"data": {"x": "1"}}, {"model": {"x": "1"}}, {"data": {"y": 1}}, {"data": {"y": "1"}}]
    runs = [
        replace(run, config={**one, "method": {"name": "flora"}, "run": {"seed": run.seed}})
        for run, one in zip(stored, settings, strict=True)
    ]
    labels = [group.label for group in run_groups.group_runs(runs)]
    assert labels == ["flora (data.x=1)", "flora (model.x=1)", "flora (data.y=1) #1", "flora (data.y=1) #2"]


def test_a_curve_is_the_mean_of_the_seeds_over_the_rounds_all_have(make_run: MakeRun) -> None:
    paths = [make_run("fedit", seed=1), make_run("fedit", seed=2)]
    (group,) = group_runs(paths)
    curve = loss_by_round(group)
    first, second = (run.records[2]["eval"]["loss_nats"] for run in group.runs)
    assert curve.xs == [1, 2, 3, 4, 5, 6]
    assert curve.ys[2] == pytest.approx((first + second) / 2)
    assert (curve.low[2], curve.high[2]) == (min(first, second), max(first, second))


def test_the_curve_of_a_finished_run_starts_at_its_base(make_run: MakeRun) -> None:
    path = make_run("flora", num_rounds=2)
    rewrite(path, "finished.json", {"base_eval": {"loss_nats": 4.5}, "eval": {"loss_nats": 2.0}})
    (group,) = group_runs([path])
    assert (loss_by_round(group).xs, loss_by_round(group).ys[0]) == ([0, 1, 2], 4.5)
    assert (loss_by_bytes(group).xs, loss_by_bytes(group).ys[0]) == ([0, 22e6, 44e6], 4.5)


def test_bytes_accumulate_both_ways(make_run: MakeRun) -> None:
    (group,) = group_runs([make_run("flora", num_rounds=2)])
    curve = loss_by_bytes(group)
    assert curve.xs == [22e6, 44e6]
    assert curve.low == []


def test_rounds_without_a_value_are_left_out(make_run: MakeRun) -> None:
    (group,) = group_runs([make_run("centralised")])
    assert value_by_round(group, NOISE).ys == []
    assert rank_by_round(group).ys == [64] * 6


def test_final_figures_are_the_last_evaluation_and_the_run_s_costs(make_run: MakeRun) -> None:
    (group,) = group_runs([make_run("fedit", num_rounds=2)])
    figures = results(group.first)
    assert figures["loss_nats"] == group.first.records[-1]["eval"]["loss_nats"]
    assert (figures["upload_bytes"], figures["aggregation_noise"]) == (4_000_000, pytest.approx(0.4))
    assert "num_tokens" not in figures


def test_the_table_judges_scores_and_costs(comparison: Path) -> None:
    table = result_table(group_runs(comparison.iterdir()), "fedit")
    assert table.best("loss_nats") == "centralised"
    assert table.best("exact-match.exact_match") == "centralised"
    assert table.best("aggregation_noise") == "flora"
    assert table.cells["base"]["upload_bytes"] is None  # nothing crosses: not the best of those that send


def test_a_client_is_shown_as_it_last_took_part(make_run: MakeRun) -> None:
    (group,) = group_runs([make_run("flora", num_rounds=2)])
    entries = client_entries(group.first)
    assert [entry["client"] for entry in entries] == list(range(10))
    assert entries[4]["reason"] == "not finite"


def test_suites_give_their_scores_and_clients_and_intervals_no_columns(make_run: MakeRun) -> None:
    path = make_run("standalone")
    finished = json.loads((path / "finished.json").read_text())
    scores = {"suite": "exact-match", "metrics": {"exact_match": {"value": 0.25, "low": 0.2, "high": 0.3, "n": 9}}}
    own = {"loss_nats_of_client": {"0": 2.0, "1": 4.0}, "loss_nats_sd": 1.0}
    finished["eval"] = {"loss_nats": 3.0, "num_rows": 9, "suites": {"exact-match": scores}, **own}
    rewrite(path, "finished.json", finished)
    (group,) = group_runs([path])
    figures = results(group.first)
    costs = {"upload_bytes", "download_bytes", "seconds", "aggregation_noise", "num_rounds"}
    assert set(figures) <= {"loss_nats", "exact-match.exact_match", *costs}
    assert figures["exact-match.exact_match"] == 0.25


def test_figures_by_group_are_means_over_the_seeds_beside_every_method(make_run: MakeRun) -> None:
    for seed, loss in ((1, 2.0), (2, 4.0)):
        path = make_run("flora", seed=seed)
        scores = {"metrics": {"exact_match": {"value": 0.5}}, "per_group": {"towns": {"value": 0.25 * seed}}}
        evaluation = {"loss_nats": 3.0, "loss_nats_of_group": {"towns": loss}, "suites": {"exact-match": scores}}
        rewrite(path, "finished.json", {"eval": evaluation})
    fedit = make_run("fedit")
    groups = group_runs([path.parent / f"flora-seed{seed}" for seed in (1, 2)] + [fedit])
    found = by_group(groups)
    assert found["loss_nats"]["towns"] == {"flora": 3.0}
    assert found["exact-match.exact_match"] == {"towns": {"flora": 0.375}}
    last = json.loads((fedit / "metrics.jsonl").read_text().splitlines()[-1])["eval"]["loss_nats_of_group"]
    assert {name: row["fedit"] for name, row in found["loss_nats"].items() if "fedit" in row} == last


def test_a_run_without_rounds_has_the_loss_it_was_finished_with(make_run: MakeRun) -> None:
    path = make_run("base", num_rounds=0)
    shutil.rmtree(path / "rounds")
    rewrite(path, "finished.json", {"base_eval": {"loss_nats": 4.5}, "eval": {"loss_nats": 4.5}})
    (group,) = group_runs([path])
    assert (loss_by_round(group).xs, loss_by_round(group).ys) == ([0.0], [4.5])
