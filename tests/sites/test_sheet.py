"""The sheet: what a site is told of a run, and that nothing in it can name a file of the site."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedloom.assembly.round_plan import training_of
from fedloom.data.templates import load_template, shipped_templates
from fedloom.errors import DataError, UpdateError
from fedloom.methods.client_half import Payload
from fedloom.sites.sheet import read_sheet, sheet_of
from fedloom.sites.study import resolve_study

SHA, RUN = "ab" * 32, "0" * 32
STUDY: dict[str, Any] = {
    "sites": {"names": ["a", "b"]},
    "method": {"name": "flora", "ranks": [8, 4]},
    "federation": {"num_rounds": 2},
    "training": {"local_steps": 2, "beta2": 0.99, "max_grad_norm": 0.0},
}


def sheet_bytes(**data: Any) -> bytes:
    settings = resolve_study({**STUDY, "data": data}, "study.toml").settings
    return sheet_of(settings, 1, RUN, SHA, SHA, scores=False).model_dump_json().encode()


def test_a_sheet_comes_back_with_the_training_and_rank_of_its_client() -> None:
    found, settings = read_sheet(sheet_bytes(), RUN), resolve_study(STUDY, "study.toml").settings
    assert found.local_training == training_of(settings)
    assert (found.client, found.rank, found.scale) == (1, 4, 2.0)


def test_a_sheet_says_how_wide_a_sketch_is_and_in_which_round() -> None:
    chosen = {**STUDY, "method": {"name": "weave", "ranks": [8, 4], "initialisation": "gradient"}}
    settings = resolve_study(chosen, "study.toml").settings
    found = read_sheet(sheet_of(settings, 1, RUN, SHA, SHA, scores=False).model_dump_json().encode(), RUN)
    assert [found.rank_asked(round) for round in (1, 2, 3)] == [16, 4, 4]
    assert "a gradient of 4 rows sketched in 16 directions, then 2 rounds" in found.line
    assert [found.half({"m": (40, 40)}).work(round).payload for round in (1, 2)] == [Payload.SKETCH, Payload.CHANGE]
    assert [read_sheet(sheet_bytes(), RUN).rank_asked(round) for round in (1, 2)] == [4, 4]


@pytest.mark.parametrize("name", shipped_templates())
def test_a_template_travels_as_its_text(name: str) -> None:
    template: Any = read_sheet(sheet_bytes(template=name), RUN).template.template()
    assert (template.with_input, template.dialogue) == (load_template(name).with_input, load_template(name).dialogue)


def test_a_template_of_ones_own_travels_as_its_text_too(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    text = json.loads(sheet_bytes(template="plain"))["template"]["text"].replace("{instruction}", "Q: {instruction}")
    own.write_text(text)
    assert b"own.toml" not in sheet_bytes(template=str(own))
    assert "Q: " in read_sheet(sheet_bytes(template=str(own)), RUN).template.text


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("template", {"kind": "path", "text": "/etc/passwd"}),
        ("template", "/etc/passwd"),
        ("data", {"path": "/etc/passwd"}),
        ("model", "/etc"),
        ("rank", 10**7),
        ("rank", True),
        ("client", -1),
        ("training", {"learning_rate": 1.0}),
        ("scale", float("nan")),
        ("shape", "no-such"),
        ("target_modules", ["x" * 500]),
        ("method", "../flora"),
    ],
)
def test_a_sheet_with_anything_else_is_refused(entry: str, value: Any) -> None:
    document = {**json.loads(sheet_bytes()), entry: value}
    with pytest.raises(UpdateError, match="expected a sheet of this form"):
        read_sheet(json.dumps(document).encode(), RUN)


def test_a_template_that_is_none_is_refused_and_names_no_file() -> None:
    document = json.loads(sheet_bytes())
    document["template"] = {"kind": "text", "text": "/etc/passwd"}
    with pytest.raises(DataError, match="the sheet's template"):
        read_sheet(json.dumps(document).encode(), RUN).template.template()
