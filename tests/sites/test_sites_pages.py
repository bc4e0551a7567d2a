"""The examples of the pages are a study and a site as they are read."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedloom.sites.site_settings import resolve_site
from fedloom.sites.study import resolve_study

PAGES = Path(__file__).parents[2] / "docs" / "sites"


def example(page: str) -> dict[str, Any]:
    return examples(page)[0]


def examples(page: str) -> list[dict[str, Any]]:
    blocks = re.findall(r"^```toml\n(.*?)^```$", (PAGES / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [tomllib.loads(block) for block in blocks]


def test_the_coordinators_example_is_a_study() -> None:
    study = resolve_study(example("coordinator.md"), "study.toml")
    assert study.settings.client_ranks == (16, 8, 4)


def test_the_coordinators_second_version_goes_on_from_the_first() -> None:
    first, second, _ = examples("coordinator.md")
    changed = {**first, "sites": {**first["sites"], **second["sites"]}}
    changed["method"]["ranks"]["hospital-d"] = 4
    study = resolve_study(changed, "study.toml")
    assert study.members.names[:3] == tuple(first["sites"]["names"])
    assert (study.sites.version, study.cohort_size) == (2, 3)


def test_the_coordinators_cut_model_is_a_study() -> None:
    first, _, cut = examples("coordinator.md")
    document = {name: {**first.get(name, {}), **cut.get(name, {})} for name in {**first, **cut}}
    document["sites"]["evaluate"] = "server"
    study = resolve_study(document, "study.toml")
    assert study.settings.per_client(study.settings.split.cut_layer) == (1, 2, 2)
    assert study.sites.step_deadline_s == 60.0


def test_the_owners_example_is_a_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.jsonl").touch()
    assert resolve_site(example("site-owner.md"), "site.toml").policy.confirm == "first"
