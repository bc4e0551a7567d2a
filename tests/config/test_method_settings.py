"""Settings of one method of a comparison: they win, they are checked as any other, and what is compared stays one."""

from __future__ import annotations

import pytest

from fedloom import config
from fedloom.config import Settings, compared_variants
from fedloom.config.method_settings import split_overrides
from fedloom.errors import SettingsError


@pytest.fixture
def settings() -> Settings:
    document = {
        "method": {"ranks": [4, 2]},
        "federation": {"num_clients": 2},
        "training": {"local_steps": 2},
        "server": {"step": "momentum", "momentum": 0.9},
    }
    return config.resolve({**document, "method": {"name": "flora", "ranks": [4, 2]}}, "a test")


def of_methods(settings: Settings, *overrides: str) -> dict[str, Settings]:
    grids = compared_variants(settings, ["fedit", "flora"], [1], overrides)
    return {grid.method: grid.points[0].settings for grid in grids}


def test_a_setting_of_one_method_is_that_methods_alone(settings: Settings) -> None:
    found = of_methods(settings, "fedit:federation.num_rounds=80", "fedit:federation.clients_per_round=1")
    assert (found["fedit"].federation.num_rounds, found["fedit"].federation.clients_per_round) == (80, 1)
    assert found["flora"] == settings
    assert found["fedit"].method.ranks == 3


def test_the_last_of_one_name_counts_and_nothing_means_the_default(settings: Settings) -> None:
    found = of_methods(settings, "flora:federation.num_rounds=3", "flora:federation.num_rounds=4")
    assert found["flora"].federation.num_rounds == 4
    assert of_methods(settings, "flora:server.momentum=")["flora"].server.momentum == 0.5


def test_a_methods_own_choice_sets_aside_what_acts_only_without_it(settings: Settings) -> None:
    found = of_methods(settings, "fedit:server.step=plain", "fedit:training.local_epochs=1")
    assert (found["fedit"].server.momentum, found["fedit"].training.local_steps) == (0.5, None)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("training.learning_rate=1", "--set training.learning_rate=1: expected METHOD:table.setting=value, got"),
        ("fedit:learning_rate=1", "--set fedit:learning_rate=1: expected METHOD:table.setting=value, got"),
        ("fedti:training.learning_rate=1", "expected one of the methods fedit, flora, got 'fedti'; did you mean fedit"),
        ("standalone:training.learning_rate=1", "got 'standalone'; add it to --methods, or drop this"),
        ("fedit:training.learning_rate=x", 'fedit: training.learning_rate: .*got "x", in --set fedit:; give'),
        ("fedit:training.lerning_rate=1", "fedit: training.lerning_rate: .* in --set fedit:; did you mean"),
        ("fedit:method.broadcast=compressed", "fedit: method.broadcast: expected method.broadcast only with"),
        ("fedit:method.ranks=[4,2]", "fedit: method.ranks: expected one rank for all clients"),
        ("fedit:method.name=flora", "got method.name, which says what is compared .*--methods names the methods"),
        ("fedit:run.seed=2", "got run.seed, which says what is compared .*--seeds names the seeds"),
        ("fedit:data.max_rows=2", "got data.max_rows, which says what is compared"),
        ("fedit:model.base=x", "got model.base, which says what is compared"),
    ],
)
def test_a_setting_that_cannot_be_one_methods_own_is_one_line(override: str, problem: str, settings: Settings) -> None:
    with pytest.raises(SettingsError, match=problem) as caught:
        of_methods(settings, override)
    assert len(str(caught.value).splitlines()) == 1


def test_a_colon_in_a_value_names_no_method() -> None:
    given = ["model.base=C:/models/x", "fedit:wire.dtype=bf16", "data.columns={a = 'b:c'}"]
    assert split_overrides(given) == ([given[0], given[2]], [given[1]])
