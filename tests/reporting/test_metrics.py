"""Every figure is declared once, and none is shown that is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from fedloom.config import Settings
from fedloom.config.conduct import SuiteName
from fedloom.evaluation.e2e import meteor, scorer
from fedloom.experiment import compare, run
from fedloom.reporting.metrics import CLIENT_FIGURES, FIGURES, Metric, figures_of, metric_of, metrics_among
from fedloom.reporting.run_groups import group_runs, result_table
from fedloom.run_folder.reader import read_run

Make = Callable[..., Settings]
DECLARED = {metric.key for metric in FIGURES}
# What an evaluation holds besides figures: counts, the spread over clients, and what is told in parts.
NO_FIGURES = {"num_loss_tokens", "num_rows", "loss_nats_sd", "loss_nats_of_client", "loss_nats_of_group", "suites"}


@pytest.fixture
def every_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Return the settings that score every suite there is, on files of a few items; METEOR without its program."""
    monkeypatch.setattr(meteor, "find_spec", lambda _: None)
    (tmp_path / "refs.csv").write_text('mr,ref\n"name[A]","red cat"\n"name[B]","one dog"\n')
    asked = {"question": "?", "choices": ["a", "b"], "answer": 0, "subject": "one"}
    (tmp_path / "choices.jsonl").write_text(json.dumps(asked) + "\n")
    for part in ("test", "dev"):
        (tmp_path / "mmlu" / part).mkdir(parents=True)
        (tmp_path / "mmlu" / part / f"one_{part}.csv").write_text("Which?,a,b,c,d,A\n" * 5)
    (tmp_path / "sums.jsonl").write_text('{"question": "1 + 1", "answer": "#### 2"}\n')
    files = {"e2e": "refs.csv", "multiple-choice": "choices.jsonl", "mmlu": "mmlu", "last-number": "sums.jsonl"}
    return {
        "evaluation__suites": list(get_args(SuiteName)),
        "evaluation__paths": {suite: str(tmp_path / name) for suite, name in files.items()},
        "evaluation__max_new_tokens": 3,
        "evaluation__beams": 1,
        "evaluation__shots": 1,
        "data__shape": "auto",
        "federation__num_rounds": 1,
    }


def test_every_figure_that_a_run_records_is_declared(
    settings_for: Make, every_suite: dict[str, object], tmp_path: Path
) -> None:
    evaluation = run(settings_for(method__name="standalone", **every_suite), tmp_path / "run").eval
    assert {key for key in evaluation.keys() - NO_FIGURES if key not in DECLARED} == set()
    assert set(evaluation["suites"]) == set(get_args(SuiteName))
    told = {f"{suite}.{name}" for suite, scores in evaluation["suites"].items() for name in scores["metrics"]}
    told |= {f"e2e.{name}" for name in scorer.METRICS}
    assert {key for key in told if key not in DECLARED} == set()
    figures = figures_of(evaluation, [])
    assert set(figures) == (told - {"e2e.METEOR"}) | {"loss_nats", "perplexity"}


def test_the_report_judges_and_heads_every_figure_as_the_comparison_does(settings_for: Make, tmp_path: Path) -> None:
    settings = settings_for(evaluation__suites=["exact-match"], federation__num_rounds=1)
    compared = compare(settings, ["fedit", "base"], [1, 2], tmp_path / "out", reference="base").table
    groups = group_runs(read_run(one.parent) for one in sorted((tmp_path / "out").glob("*/manifest.json")))
    assert result_table(groups, "base").to_json() == compared.to_json()


@pytest.mark.parametrize("name", scorer.METRICS)
def test_a_score_of_e2e_is_better_where_it_is_higher(name: str) -> None:
    assert metric_of(f"e2e.{name}").better == "higher"


@pytest.mark.parametrize("key", ["upload_bytes", "download_bytes", "seconds", "aggregation_noise"])
def test_what_is_paid_is_better_where_it_is_lower(key: str) -> None:
    assert metric_of(key).better == "lower"
    assert {metric.better for metric in CLIENT_FIGURES if metric.key == key} <= {"lower"}


def test_keys_and_headings_are_unique_and_every_figure_says_where_it_stands() -> None:
    for declared in (FIGURES, CLIENT_FIGURES):
        assert len({metric.key for metric in declared}) == len({metric.title for metric in declared}) == len(declared)
        assert all(metric.path for metric in declared)


def test_a_figure_of_a_run_is_that_of_its_last_round_the_sum_or_the_highest() -> None:
    records = [{"x": {"train": 1.0, "evaluate": 4.0}}, {"x": {"train": 2.0}}, {"x": None}]
    assert Metric("x", "x", path=("x",)).of_run(records) == 2.0
    assert Metric("x", "x", path=("x",), over_rounds="sum").of_run(records) == 7.0
    assert Metric("x", "x", path=("x",), over_rounds="max").of_run(records) == 5.0
    assert Metric("x", "x", path=("x", "y")).of_run(records) is None


def test_a_score_that_is_not_declared_is_shown_last_and_not_judged() -> None:
    figures = figures_of({"suites": {"bleurt": {"metrics": {"mean_score": {"value": 0.5}}}}, "loss_nats": 2.0}, [])
    assert figures == {"loss_nats": 2.0, "bleurt.mean_score": 0.5}
    shown = metrics_among([{"bleurt.mean_score": 0.5}, {"loss_nats": 2.0}])
    assert [(metric.title, metric.better) for metric in shown] == [
        ("held-out loss [nats]", "lower"),
        ("bleurt · mean score", "neither"),
    ]


def test_a_cost_of_zero_is_no_figure_and_noise_of_zero_is() -> None:
    record = {"upload_bytes": 0, "aggregation_noise": 0.0, "seconds": {"train": 0.5}}
    assert figures_of({}, [record]) == {"aggregation_noise": 0.0, "seconds": 0.5}
