"""A study is a recipe with sites and without rows; a site's file is its owner's alone."""

from __future__ import annotations

from typing import Any

import pytest

from fedloom.errors import SettingsError
from fedloom.sites.site_settings import SiteSettings, resolve_site, site_tables
from fedloom.sites.study import Study, resolve_study

STUDY: dict[str, Any] = {
    "sites": {"names": ["a", "b"], "quorum": 1},
    "method": {"name": "flora", "ranks": [8, 4]},
    "federation": {"num_rounds": 2},
    "training": {"local_steps": 2},
}
SITE: dict[str, Any] = {
    "site": {"name": "a", "server": "localhost:8002", "kit": "kit", "folder": "state"},
    "data": {"path": "embedded"},
}


def study(**changes: Any) -> Study:
    document = {name: dict(values) for name, values in STUDY.items()}
    for name, value in changes.items():
        part, _, key = name.partition("__")
        document.setdefault(part, {})
        if key:
            document[part][key] = value
    return resolve_study(document, "study.toml")


def site(**changes: Any) -> SiteSettings:
    document = {name: dict(values) for name, values in SITE.items()}
    for name, value in changes.items():
        part, _, key = name.partition("__")
        document.setdefault(part, {})[key] = value
        if value is None:
            del document[part][key]
    return resolve_site(document, "site.toml")


def test_a_study_has_as_many_clients_as_sites_and_no_rows() -> None:
    found = study()
    assert found.settings.federation.num_clients == 2
    assert found.settings.data.template == "auto", "not the wording of this machine's embedded rows"


def test_a_value_per_site_is_given_by_its_name() -> None:
    assert study(method__ranks={"b": 4, "a": 16}).settings.client_ranks == (16, 4)


def test_overrides_reach_the_table_of_sites_and_the_recipe() -> None:
    found = resolve_study(STUDY, "study.toml", ["sites.quorum=2", "run.seed=5"])
    assert (found.sites.quorum, found.settings.run.seed) == (2, 5)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sites__names": []}, "sites.names: expected"),
        ({"sites__names": ["a", "a"]}, "sites.names: expected each name once"),
        ({"sites__quorum": 3}, "sites.quorum: expected at most the 2 sites, got 3"),
        ({"sites__quorrum": 1}, "did you mean sites.quorum?"),
        ({"sites__address": "nowhere"}, "sites.address: expected"),
        ({"partition": None}, "partition: expected no table [partition]"),
        ({"data__path": "rows.json"}, "data.path: expected a study without data.path"),
        ({"data__eval_rows": 4}, "data.eval_rows: expected a study without"),
        ({"data__canaries": 2}, "data.canaries: expected a study without data.canaries, got 2"),
        ({"sites__evaluate": "sites", "data__eval_path": "embedded"}, "data.eval_path: expected none"),
        ({"evaluation__clients": 0.1}, "evaluation.clients: expected 0 in a study"),
        (
            {"method__name": "fedsa-lora", "method__ranks": 2},
            "method.name: expected a method whose result is one adapter",
        ),
        ({"method__name": "standalone"}, "method.name: expected a method whose clients train adapters in rounds"),
        ({"method__ranks": [8, 4, 2]}, "method.ranks: expected one value, or 2"),
        ({"evaluation__suites": ["exact-match"]}, "evaluation.suites: expected none in a study"),
    ],
)
def test_what_is_no_study_is_refused_in_one_line(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        study(**changes)
    assert told in str(refusal.value)
    assert "study.toml" in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"site__name": None}, "site.name: expected text, got none"),
        ({"site__server": "host"}, "site.server: expected"),
        ({"data__path": "/no/such/rows"}, "data.path: expected a file or folder"),
        ({"policy__max_ranks": 4}, "did you mean policy.max_rank?"),
        ({"policy__max_rank": 0}, "policy.max_rank: expected an integer ≥ 1, got 0"),
        ({"policy__methods": ["no-such"]}, "policy.methods: expected"),
        ({"partitions__x": 1}, "partitions: expected one of the tables site, data, model, policy"),
    ],
)
def test_what_is_no_site_file_is_refused_in_one_line(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        site(**changes)
    assert told in str(refusal.value)
    assert "site.toml" in str(refusal.value)


def test_a_file_without_its_tables_names_the_first_of_them() -> None:
    with pytest.raises(SettingsError, match=r"site: expected a table \[site\], got none"):
        resolve_site({}, "site.toml")


def test_every_setting_of_a_site_has_a_sentence() -> None:
    for kind in site_tables().values():
        assert all(field.description for field in kind.model_fields.values())
