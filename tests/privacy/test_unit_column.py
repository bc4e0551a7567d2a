"""All rows of a person are hidden together: which rows these are, what the run and its plan say, and at a site."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedloom.assembly.preparation import Preparation
from fedloom.config import Settings
from fedloom.errors import DataError, SettingsError
from fedloom.experiment import describe, run
from fedloom.preview.rehearsal import SketchWorkshop
from fedloom.preview.row_check import check_rows
from fedloom.privacy.accountant import PrivateStep, epsilon
from fedloom.sites.sheet import read_sheet, sheet_of
from fedloom.sites.site_inputs import divided, encoded_rows
from fedloom.sites.site_settings import resolve_site

Make = Callable[..., Settings]
HIDDEN: dict[str, Any] = {"privacy__unit": "row", "privacy__noise_multiplier": 8.0, "data__unit_column": "person"}
IID: dict[str, Any] = {"partition__scheme": "iid", "partition__column": None, "partition__categories_per_client": 2}


@pytest.fixture
def people(rows_file: Path, tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes the rows with a column that says whose each is."""

    def write(whose: Callable[[int], Any]) -> str:
        rows = (
            [json.loads(line) for line in rows_file.read_text().splitlines()]
            if rows_file.suffix == ".jsonl"
            else (json.loads(rows_file.read_text()))
        )
        path = tmp_path / "people.json"
        path.write_text(json.dumps([{**row, "person": whose(index)} for index, row in enumerate(rows)]))
        return str(path)

    return write


def prepared(settings: Settings) -> Preparation:
    return Preparation(settings, Path("nowhere"), SketchWorkshop(), fresh=True)


def adapter(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted((folder / "adapter").rglob("*.safetensors"))}


@pytest.mark.slow
@pytest.mark.extra("privacy")
def test_where_every_row_is_its_own_unit_the_run_is_that_of_rows_bit_for_bit(
    settings_for: Make, people: Callable[..., str], tmp_path: Path
) -> None:
    path = people(lambda index: f"p{index}")
    short = {"data__path": path, "federation__num_rounds": 1}
    run(settings_for(**short, **{**HIDDEN, "data__unit_column": None}), tmp_path / "rows")
    summary = run(settings_for(**short, **HIDDEN), tmp_path / "people")
    assert adapter(tmp_path / "people") == adapter(tmp_path / "rows")
    costs = [
        [json.loads(line)["privacy"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("rows", "people")
    ]
    assert [{**one, "unit_column": "person"} for one in costs[0]] == costs[1]
    assert "every person hidden with all its rows at a client, with at most ε = " in summary.lines()[-1]


def test_a_run_is_not_gone_on_with_once_rows_are_of_other_people(
    settings_for: Make, people: Callable[..., str]
) -> None:
    natural = {"partition__scheme": "natural", "partition__categories_per_client": 2, "data__eval_rows": None}
    found = []
    for modulus in (5, 6):
        path = people(lambda index, modulus=modulus: index % modulus)
        found.append(prepared(settings_for(data__path=path, **natural, **HIDDEN)).identity)
    assert {name for name in found[0] if found[0][name] != found[1][name]} == {"units_sha256"}


@pytest.mark.extra("privacy")
def test_epsilon_is_of_units_and_is_said_before_a_run_and_after_it(
    settings_for: Make, people: Callable[..., str], tmp_path: Path
) -> None:
    given = {"data__path": people(lambda index: index // 3), "privacy__rows_per_unit": 2, **IID, **HIDDEN}
    settings = settings_for(**given)
    planned = describe(settings).privacy
    assert planned is not None
    inputs = prepared(settings).inputs
    assert inputs.held_out_rows is not None
    apart = {row["person"] for row in inputs.rows.rows} & {row["person"] for row in inputs.held_out_rows.rows}
    assert not apart, "nobody has rows on both sides"
    assert len(inputs.held_out_rows) == 6
    for client, one in enumerate(planned.clients):
        mine = [inputs.rows.rows[row]["person"] for row in inputs.partition.rows_of(client)]
        assert (one.num_units, one.num_rows) == (len(set(mine)), len(mine))
        assert one.num_units < one.num_rows
        cost = epsilon({PrivateStep(min(1.0, 4 / one.num_units), 8.0): 4}, 1e-5)
        assert cost <= one.epsilon <= 1.01 * cost
    lines = planned.lines()
    assert "every person is hidden with all its rows at a client" in lines[0]
    assert lines[1].split() == ["client", "units", "rows", "rounds", "steps", "ε"]
    run(settings, tmp_path / "run")
    *_, last = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert last["privacy"]["epsilon"] == pytest.approx(max(one.epsilon for one in planned.clients), rel=1e-2)


@pytest.mark.extra("privacy")
def test_a_row_of_nobody_is_refused_before_a_run_and_by_validate(
    settings_for: Make, people: Callable[..., str], tmp_path: Path
) -> None:
    settings = settings_for(data__path=people(lambda index: "" if index == 5 else "somebody"), **HIDDEN)
    said = r"people.json row 6: expected a text or a number in the column 'person' \(data.unit_column\), got nothing"
    assert [one for one in check_rows(settings, tmp_path / "run").problems if "person" in one]
    with pytest.raises(DataError, match=said):
        run(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    fine = check_rows(settings_for(data__path=people(lambda index: index // 4), **HIDDEN), tmp_path / "run")
    assert not fine.problems
    assert any("values of person of up to 4 rows" in one for one in fine.found)


def test_the_column_is_refused_where_no_rows_are_hidden(settings_for: Make) -> None:
    with pytest.raises(SettingsError, match=r"data.unit_column only with privacy.unit = row"):
        settings_for(data__unit_column="person")
    with pytest.raises(SettingsError, match=r"privacy.rows_per_unit only with privacy.unit = row"):
        settings_for(privacy__rows_per_unit=3)


def test_dialogues_csv_and_rows_that_were_drawn_are_put_together_too(settings_for: Make, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "red"}]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": turns, "person": k % 7}) + "\n" for k in range(40)))
    table = tmp_path / "rows.csv"
    table.write_text("instruction,context,response,person\n" + "".join(f"say {k},,red,{k % 7}\n" for k in range(40)))
    for path, shape in ((chats, "messages"), (table, "dolly")):
        drawn = {"data__path": str(path), "data__shape": shape, "data__max_rows": 30, "data__validation_fraction": None}
        inputs = prepared(settings_for(**IID, **HIDDEN, **drawn)).inputs
        assert len(inputs.rows) + len(inputs.held_out_rows or ()) == 30
        of_person = [int(row["person"]) for row in inputs.rows.rows]
        owner = inputs.partition.owner_of_row()
        assert all(len({owner[i] for i, one in enumerate(of_person) if one == who}) == 1 for who in of_person)
        assert len(inputs.tokens.by_unit()) == len(set(of_person))


def test_natural_clients_have_people_of_their_own_even_under_the_same_names(
    settings_for: Make, people: Callable[..., str]
) -> None:
    natural = {"partition__scheme": "natural", "partition__categories_per_client": 2, "data__eval_rows": None}
    path = people(lambda index: index % 4)
    inputs = prepared(settings_for(data__path=path, data__eval_fraction=0.3, **natural, **HIDDEN)).inputs
    assert inputs.held_out_rows is not None
    sides = [{(row["category"], row["person"]) for row in side.rows} for side in (inputs.rows, inputs.held_out_rows)]
    assert not sides[0] & sides[1]
    assert [len(inputs.rows_of(client).by_unit()) for client in range(3)] == [3, 3, 3], "one of four is held out"


def test_people_stay_on_one_side_where_settings_are_chosen(settings_for: Make, people: Callable[..., str]) -> None:
    given = {"data__path": people(lambda index: index // 3), "data__validation_fraction": 0.3, **IID, **HIDDEN}
    inputs = prepared(settings_for(**given)).inputs
    assert inputs.held_out_rows is not None
    assert len(inputs.held_out_rows)
    kept, held = ({row["person"] for row in rows.rows} for rows in (inputs.rows, inputs.held_out_rows))
    assert not kept & held


def test_a_site_puts_its_rows_together_by_the_studys_column(
    settings_for: Make, people: Callable[..., str], tmp_path: Path
) -> None:
    settings = settings_for(data__path=people(lambda index: index // 3), privacy__rows_per_unit=2, **HIDDEN)
    sheet = sheet_of(settings, 0, "0" * 32, "ab" * 32, "ab" * 32, scores=False)
    again = read_sheet(sheet.model_dump_json().encode())
    assert (again.unit_column, again.local_training.privacy.rows_per_unit) == ("person", 2)  # type: ignore[union-attr]
    assert "all rows of each person hidden by noise of 8 times the clip" in again.line
    site = resolve_site(
        {
            "site": {"name": "a", "server": "localhost:1", "kit": "kit", "folder": str(tmp_path)},
            "data": {"path": settings.data.path},
        },
        "site.toml",
    )
    base, _ = SketchWorkshop().base(settings)
    encoded = encoded_rows(site, again, base.tokenizer, base.model.config)
    assert {len(unit) for unit in encoded.tokens.by_unit()} == {3}
    left, held = divided(encoded, 0.25, 1)
    assert held is not None
    assert left.units is not None
    assert held.units is not None
    assert not set(left.units) & set(held.units)
    assert np.array_equal(np.sort(np.concatenate([left.units, held.units])), np.sort(encoded.tokens.units))  # type: ignore[arg-type]
