"""Validation rows: of the training rows, never of those that a run is scored on, and never trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedloom.assembly.inputs import Inputs, Workshop
from fedloom.config import Settings, with_seed
from fedloom.config.variants import for_tuning
from fedloom.data.tokens import TokenSet
from fedloom.errors import DataError, SettingsError
from fedloom.experiment import run

Make = Callable[..., Settings]


@pytest.fixture
def distinct_rows(tmp_path: Path) -> str:
    """Write 60 rows of which no two are alike."""
    rows = [
        {"instruction": f"question {k}", "context": "", "response": f"answer {k}", "category": "abc"[k % 3]}
        for k in range(60)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return str(tmp_path / "rows.json")


def inputs_of(settings: Settings, workshop: Workshop) -> Inputs:
    return workshop.inputs(settings, workshop.base(settings)[0])


def contents(tokens: TokenSet | None) -> set[bytes]:
    assert tokens is not None
    return {tokens.row(index)[0].tobytes() for index in range(len(tokens))}


def test_no_row_is_used_that_a_run_is_scored_on_and_none_is_both_trained_and_chosen_on(
    settings_for: Make, distinct_rows: str
) -> None:
    settings, workshop = settings_for(data__path=distinct_rows, data__eval_rows=12), Workshop()
    tuned = inputs_of(for_tuning(settings, 1, 0.25, (1, 2, 3)), workshop)
    runs = {seed: inputs_of(with_seed(settings, seed), workshop) for seed in (1, 2, 3)}
    scored = set.union(*(contents(one.held_out) for one in runs.values()))
    trained, validated = contents(tuned.tokens), contents(tuned.held_out)
    assert not trained & validated
    assert not (trained | validated) & scored
    assert trained | validated == contents(runs[1].tokens) - scored
    assert len(validated) == round(0.25 * len(trained | validated))


def test_each_client_trains_on_rows_of_its_own_and_on_none_of_anothers(settings_for: Make, distinct_rows: str) -> None:
    settings, workshop = settings_for(data__path=distinct_rows), Workshop()
    whole, tuned = inputs_of(settings, workshop), inputs_of(for_tuning(settings, 1, 0.5, (1,)), workshop)
    assert tuned.partition.names == whole.partition.names
    for client in range(3):
        assert contents(tuned.rows_of(client)) < contents(whole.rows_of(client))


def test_a_file_of_held_out_rows_is_not_opened(settings_for: Make, distinct_rows: str, tmp_path: Path) -> None:
    (tmp_path / "scored.json").write_text("no rows at all")
    settings = settings_for(
        data__path=distinct_rows, data__eval_rows=None, data__eval_path=str(tmp_path / "scored.json")
    )
    tuned = for_tuning(settings, 1, 0.1, (1, 2))
    assert tuned.data.scored_seeds == ()
    summary = run(tuned, tmp_path / "run")
    assert summary.eval["num_rows"] == 6
    with pytest.raises(DataError, match=r"scored\.json"):
        run(settings, tmp_path / "other")


def test_a_run_with_validation_rows_goes_on_with_its_own(settings_for: Make, tmp_path: Path) -> None:
    settings = settings_for(data__validation_fraction=0.2)
    first = run(settings, tmp_path / "run")
    further = settings.model_copy(update={"federation": settings.federation.model_copy(update={"num_rounds": 3})})
    assert run(further, tmp_path / "run").base_eval == first.base_eval
    assert run(further, tmp_path / "once").eval == run(further, tmp_path / "run").eval


def test_the_answers_of_a_dialogue_stay_together(settings_for: Make, tmp_path: Path) -> None:
    turns = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    rows = [{"messages": [{"role": role, "content": f"{text} {k}"} for role, text in turns]} for k in range(20)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    settings = settings_for(
        data__path=str(tmp_path / "rows.json"),
        data__shape="messages",
        data__eval_rows=5,
        data__template="plain",
        partition__scheme="iid",
        partition__column=None,
        partition__categories_per_client=2,
    )
    workshop = Workshop()
    tuned = inputs_of(for_tuning(settings, 1, 0.25, (1, 2)), workshop)
    assert tuned.held_out_rows is not None
    numbers = [np.unique(one.numbers) for one in (tuned.rows, tuned.held_out_rows)]
    assert not np.intersect1d(*numbers).size
    scored = inputs_of(with_seed(settings, 2), workshop).held_out_rows
    assert scored is not None
    assert not np.intersect1d(np.concatenate(numbers), np.unique(scored.numbers)).size


def test_a_client_that_only_has_scored_rows_is_named(settings_for: Make, tmp_path: Path) -> None:
    same = {"instruction": "one", "context": "", "response": "one", "category": "a"}
    others = [{**same, "instruction": f"q {k}", "category": "b"} for k in range(20)]
    (tmp_path / "rows.json").write_text(json.dumps([same] * 20 + others))
    settings = settings_for(
        data__path=str(tmp_path / "rows.json"),
        partition__scheme="natural",
        partition__column="category",
        partition__categories_per_client=2,
        federation__num_clients=2,
        method__ranks=[2, 2],
    )
    with pytest.raises(
        DataError, match=r"data\.scored_seeds: .* got none of client a; hold rows out by data.eval_path"
    ):
        inputs_of(for_tuning(settings, 1, 0.1, (1, 2)), Workshop())


@pytest.mark.parametrize(
    "given", [{"data__scored_seeds": [1]}, {"data__scored_seeds": [1], "data__validation_fraction": 0.1}], ids=str
)
def test_seeds_without_rows_to_leave_out_are_refused(given: dict[str, Any], settings_for: Make) -> None:
    without = {"data__eval_rows": None} if "data__validation_fraction" in given else {}
    with pytest.raises(SettingsError, match=r"data\.scored_seeds: expected data\.scored_seeds only with"):
        settings_for(**given, **without)


def test_a_tuning_run_scores_keeps_and_tracks_nothing_besides_its_loss_at_the_end(settings_for: Make) -> None:
    given = settings_for(
        evaluation__suites=["exact-match"], run__keep_updates=True, run__keep_states="all", run__trackers=["mlflow"]
    )
    tuned = for_tuning(given, 5, 0.2, (3, 1))
    assert (tuned.run.seed, tuned.data.validation_fraction, tuned.data.scored_seeds) == (5, 0.2, (1, 3))
    assert (tuned.evaluation.suites, tuned.evaluation.every) == ((), 0)
    assert (tuned.run.keep_updates, tuned.run.keep_states, tuned.run.trackers) == (False, "last", ())
