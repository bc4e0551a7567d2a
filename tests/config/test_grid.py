"""Grids: what is tried for each method, what is refused, and which of two values wins."""

from __future__ import annotations

from typing import Any

import pytest

from fedloom import config
from fedloom.config import Settings, compared_variants
from fedloom.config.compared_variants import refuse_ignored
from fedloom.config.grid import MethodGrid
from fedloom.errors import SettingsError

RATES = "training.learning_rate=1e-3,2e-3"


@pytest.fixture
def settings() -> Settings:
    document = {"federation": {"num_clients": 4}, "training": {"local_steps": 2}}
    return config.resolve(document, "a test")


def tried(grid: MethodGrid) -> list[dict[str, Any]]:
    return [dict(point.values) for point in grid.points]


def test_all_combinations_of_a_grid_are_tried_and_each_is_that_experiment(settings: Settings) -> None:
    (fedit,) = compared_variants(settings, ["fedit"], [1], grid=[RATES, "federation.num_rounds=2,4"])
    assert [tuple(one.values()) for one in tried(fedit)] == [(2, 1e-3), (2, 2e-3), (4, 1e-3), (4, 2e-3)]
    for point in fedit.points:
        assert {name: point.settings.value(name) for name in point.values} == point.values
        assert point.settings.method.name == "fedit"


def test_the_order_of_two_grids_changes_nothing(settings: Settings) -> None:
    grid = [RATES, "federation.num_rounds=2,4"]
    first, again = (compared_variants(settings, ["fedit"], [1], grid=one) for one in (grid, grid[::-1]))
    assert first == again


def test_a_grid_of_all_methods_is_skipped_where_it_does_not_act_and_that_is_said(settings: Settings) -> None:
    fedit, pooled, base = compared_variants(
        settings, ["fedit", "centralised", "base"], [1], grid=[RATES, "server.step=plain,momentum"]
    )
    assert len(fedit.points) == 4
    assert tried(pooled) == [{"training.learning_rate": 1e-3}, {"training.learning_rate": 2e-3}]
    assert pooled.skipped == {"server.step": "it does not act"}
    assert tried(base) == [{}]
    assert not base.is_tuned


def test_a_value_that_does_not_act_at_a_point_makes_no_point_of_its_own(settings: Settings) -> None:
    grid = ["server.step=plain,momentum", "server.momentum=0.5,0.9"]
    (fedit,) = compared_variants(settings, ["fedit"], [1], grid=grid)
    assert [tuple(one.values()) for one in tried(fedit)] == [("plain", 0.5), ("momentum", 0.5), ("momentum", 0.9)]


def test_a_methods_own_grid_wins_over_that_of_all_and_its_own_setting_over_both(settings: Settings) -> None:
    fedit, flora, pooled = compared_variants(
        settings,
        ["fedit", "flora", "centralised"],
        [1],
        overrides=["centralised:training.learning_rate=5e-3"],
        grid=[RATES, "flora:training.learning_rate=3e-3,4e-3"],
    )
    rates = [[one.settings.training.learning_rate for one in grid.points] for grid in (fedit, flora, pooled)]
    assert rates == [[1e-3, 2e-3], [3e-3, 4e-3], [5e-3]]
    assert flora.skipped == {"training.learning_rate": "it has a grid of its own"}
    assert pooled.skipped == {"training.learning_rate": "it has a value of its own"}


def test_a_grid_of_steps_takes_the_place_of_the_recipes_epochs_and_gives_way_to_a_methods_own(
    settings: Settings,
) -> None:
    fedit, flora = compared_variants(
        settings,
        ["fedit", "flora"],
        [1],
        overrides=["flora:training.local_steps=7"],
        grid=["training.local_epochs=1,2"],
    )
    assert [(one.settings.training.local_steps, one.settings.training.local_epochs) for one in fedit.points] == [
        (None, 1.0),
        (None, 2.0),
    ]
    assert [one.settings.training.local_steps for one in flora.points] == [7]


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("method.ranks=[8,4,4,2],[4,4,2,2]", [(8, 4, 4, 2), (4, 4, 2, 2)]),
        ("server.step=plain, momentum", ["plain", "momentum"]),
        ("federation.clients_per_round=1,1.0", [1, 1.0]),
    ],
)
def test_values_are_read_as_those_of_any_override(part: str, values: list[Any], settings: Settings) -> None:
    (flora,) = compared_variants(settings, ["flora"], [1], grid=[part])
    found = [one.settings.value(part.partition("=")[0]) for one in flora.points]
    assert list(map(repr, found)) == list(map(repr, values))


@pytest.mark.parametrize(
    ("grid", "problem"),
    [
        (["x=1,2"], r"--grid x=1,2: expected \[METHOD:\]table.setting=value,value,..., got"),
        (["fedit:"], r"--grid fedit:: expected \[METHOD:\]table.setting=value"),
        (["fedti:" + RATES], "expected one of the methods fedit, flora, got 'fedti'; did you mean fedit"),
        (["centralised:" + RATES], "got 'centralised'; add it to --methods"),
        (["training.learning_rate="], "expected values separated by commas, got an empty one"),
        (["training.learning_rate=1e-3,"], "expected values separated by commas, got an empty one"),
        (["training.learning_rate=1e-3,0.001"], "expected each value once, got 0.001 twice"),
        (["training.learning_rat=1,2"], "fedit: training.learning_rat: .* in --grid; did you mean"),
        (["trainig.learning_rate=1,2"], "fedit: trainig: expected one of the tables"),
        (["training.learning_rate=1e-3,-1"], "fedit: training.learning_rate: expected a number > 0, got -1, in --grid"),
        (["federation.clients_per_round=2,9"], "expected at most federation.num_clients = 4, got 9, in --grid"),
        ([RATES, "training.learning_rate=3e-3"], "expected one grid of training.learning_rate, got two"),
        (["training.local_steps=1,2", "training.local_epochs=1,2"], "expected one grid of .*local_epochs, got two"),
        (["fedit:" + RATES, "fedit:training.learning_rate=3e-3"], "expected one grid of .*, got two"),
        (["method.tolerance=0.1,0.2"], "expected a setting to choose for one of the methods, got one for none"),
        (["fedit:method.broadcast=stack,compressed"], "expected a setting that acts with fedit, got method.broadcast"),
        ([f"federation.num_rounds={','.join(map(str, range(1, 1002)))}"], "at most 1,000 points for fedit, got 1,001"),
        (["run.seed=1,2"], "got run.seed, which says what is compared .*; --seeds names the seeds, or drop it"),
        (["method.name=fedit,flora"], "--methods names the methods, or drop it"),
        (["data.max_rows=10,20"], "got data.max_rows, which says what is compared and is the same for all runs"),
        (["fedit:evaluation.every=1,2"], "got evaluation.every, which says what is compared"),
        (["federation.num_clients=4,5"], "got federation.num_clients, which says what is compared"),
        (["partition.scheme=iid,length"], "got partition.scheme, which says what is compared"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_grid_that_cannot_be_used_is_one_line(grid: list[str], problem: str, settings: Settings) -> None:
    with pytest.raises(SettingsError, match=problem) as caught:
        compared_variants(settings, ["fedit", "flora"], [1], grid=grid)
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_set_and_tried_at_once_is_refused(settings: Settings) -> None:
    own = ["fedit:training.learning_rate=1e-3"]
    with pytest.raises(SettingsError, match=r"expected no --set fedit:training\.learning_rate besides, got both"):
        compared_variants(settings, ["fedit"], [1], own, ["fedit:" + RATES])
    for given in ("training.local_steps=3", "training.local_epochs=3"):
        grid = ["training.local_steps=1,2"]
        grids = compared_variants(settings, ["fedit"], [1], grid=grid)
        with pytest.raises(SettingsError, match=f"expected no --set {given[:-2]} besides, got both"):
            refuse_ignored(settings, grids, [1], [given], grid)


SCHEDULES = "federation.num_rounds/training.local_steps=2/8,8/2"


def test_settings_that_go_together_are_tried_together(settings: Settings) -> None:
    fedit, pooled, base = compared_variants(settings, ["fedit", "centralised", "base"], [1], grid=[SCHEDULES, RATES])
    pairs = [(one["federation.num_rounds"], one["training.local_steps"]) for one in tried(fedit)]
    assert pairs == [(2, 8), (2, 8), (8, 2), (8, 2)]
    assert len(tried(pooled)) == 4
    assert base.skipped == dict.fromkeys(
        ("federation.num_rounds", "training.local_steps", "training.learning_rate"), "it does not act"
    )


def test_of_settings_that_go_together_one_that_acts_is_enough(settings: Settings) -> None:
    joint = "training.learning_rate/federation.clients_per_round=1e-3/2,2e-3/3"
    (pooled,) = compared_variants(settings, ["centralised"], [1], grid=[joint])
    assert [one["training.learning_rate"] for one in tried(pooled)] == [1e-3, 2e-3]
    assert not pooled.skipped


def test_settings_that_go_together_give_way_to_a_methods_own_as_a_whole(settings: Settings) -> None:
    fedit, flora = compared_variants(
        settings, ["fedit", "flora"], [1], overrides=["flora:training.local_steps=7"], grid=[SCHEDULES]
    )
    assert len(fedit.points) == 2
    assert [one.settings.training.local_steps for one in flora.points] == [7]
    assert set(flora.skipped) == {"federation.num_rounds", "training.local_steps"}


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        ("federation.num_rounds/training.local_steps=2/8,8", "expected 2 values joined by /"),
        ("federation.num_rounds/training.local_steps=2/8/1,8/2/1", "expected 2 values joined by /"),
        ("federation.num_rounds/training.local_steps=2/,8/2", "expected 2 values joined by /"),
        ("federation.num_rounds/training.local_steps=2/8,2/8", "got 2/8 twice"),
        ("federation.num_rounds/federation.num_rounds=2/8,8/2", "got two"),
        ("federation.num_rounds/steps=2/8,8/2", "expected [METHOD:]table.setting=value"),
        ("training.local_steps/training.local_epochs=1/1,2/2", "got two"),
        ("federation.num_rounds/run.seed=2/8,8/2", "got run.seed"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: Settings, grid: str, told: str) -> None:
    with pytest.raises(SettingsError) as refused:
        compared_variants(settings, ["fedit"], [1], grid=[grid])
    assert told in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_a_methods_own_default_follows_the_steps_that_are_tried(settings: Settings) -> None:
    (weave,) = compared_variants(settings, ["weave"], [1], grid=["training.local_steps=1,4"])
    assert [one.settings.server.step for one in weave.points] == ["adamw", "plain"]
