"""Chat templates that write the day: a run is of the day it started on, whatever the clock says when it is used."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedloom import config
from fedloom.config import Settings
from fedloom.config.input_tables import Data
from fedloom.data import Rows, encode, load_rows, read_records
from fedloom.data.chat_clock import on_day
from fedloom.data.records import Turn
from fedloom.errors import RunError, SettingsError
from fedloom.experiment import compare, run
from fedloom.results.conversation import wording_of
from fedloom.results.held_out import evaluate
from fedloom.results.opened_result import open_result
from fedloom.run_folder import run_date
from fedloom.run_folder.manifest import read_manifest, write_manifest
from fedloom.sites.sheet import sheet_of
from tests.chat_families import CHATML, ChatFamily
from tests.tiny_models import seeded_model

BODY = CHATML
CLOCKS = {
    "llama 3.2": "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "{% endif %}Today Date: {{ date_string }}\n" + BODY,
    "smollm3": "{% set today = strftime_now('%d %B %Y') %}Today Date: {{ today }}\n" + BODY,
    "granite": "{% macro day() %}{{ strftime_now('%B %d, %Y') }}{% endmacro %}Today's Date: {{ day() }}.\n" + BODY,
}
WRITTEN = {"llama 3.2": "02 Jan 2020", "smollm3": "02 January 2020", "granite": "January 02, 2020"}


@pytest.fixture(scope="module")
def clock_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = ChatFamily(CLOCKS["llama 3.2"], ("<|im_start|>", "<|im_end|>")).tokenizer()
    seeded_model("llama", vocab_size=len(tokenizer)).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [
        {"messages": [{"role": "user", "content": f"{k}?"}, {"role": "assistant", "content": "yes"}]} for k in range(8)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def settings_of(base: Path, **data: str) -> Settings:
    return config.resolve(
        {
            "model": {"base": str(base)},
            "data": {"path": str(base / "rows.jsonl"), "eval_rows": 2, **data},
            "federation": {"num_clients": 2, "num_rounds": 1},
            "training": {"local_steps": 1},
            "method": {"name": "fedit", "ranks": 1},
        },
        "a test",
    )


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_template_is_told_the_day_it_is_given(clock: str) -> None:
    tokenizer = ChatFamily(CLOCKS[clock], ("<|im_start|>", "<|im_end|>")).tokenizer()
    settings = Data(date="2020-01-02")
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    records = read_records(load_rows_of([row]))
    ids = encode(records, tokenizer, date=settings.day).tokens.row(0)[0]
    assert WRITTEN[clock] in tokenizer.decode(ids.tolist())


def load_rows_of(rows: list[dict[str, object]]) -> Rows:
    embedded = load_rows("embedded").select(range(len(rows)))
    return replace(embedded, rows=rows)


def test_a_run_is_of_its_first_day_when_resumed_evaluated_and_asked(
    clock_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr(run_date, "_begun_on", ["2020-01-02"])
    first = run(settings_of(clock_base), out)
    monkeypatch.setattr(run_date, "_begun_on", [])
    opened = open_result(out)
    assert "02 Jan 2020" in wording_of(opened).prompt([Turn("user", "hi")], opened.base.tokenizer).text
    assert evaluate(opened).mean_nats == pytest.approx(first.eval["loss_nats"], rel=1e-4)
    longer = settings_of(clock_base)
    longer = longer.model_copy(update={"federation": longer.federation.model_copy(update={"num_rounds": 2})})
    assert run(longer, out).num_rounds == 2
    manifest = read_manifest(out)
    assert manifest["identity"]["date"] == "2020-01-02"
    assert json.loads((out / "config.json").read_text())["data"]["date"] is None
    # A run that did not write its day down is of the day of its first session.
    del manifest["identity"]["date"]
    manifest["sessions"][0]["started"] = "2020-01-02T10:00:00+00:00"
    assert run_date.date_of(manifest) == "2020-01-02"
    write_manifest(out, manifest)
    assert run(longer, out).num_rounds == 2


def test_a_day_that_is_set_is_used_and_another_is_another_run(clock_base: Path, tmp_path: Path) -> None:
    run(settings_of(clock_base, date="2021-03-04"), tmp_path / "run")
    opened = open_result(tmp_path / "run")
    assert "04 Mar 2021" in wording_of(opened).prompt([Turn("user", "hi")], opened.base.tokenizer).text
    with pytest.raises(RunError, match=r"data\.date is '2021-03-04' there, '2021-03-05' asked"):
        run(settings_of(clock_base, date="2021-03-05"), tmp_path / "run")
    for wrong in ("yesterday", "2021-02-30", "20210304"):
        with pytest.raises(SettingsError, match=r"data\.date"):
            settings_of(clock_base, date=wrong)


def test_every_run_of_a_comparison_is_of_the_first_ones_day(
    clock_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_date, "_begun_on", ["2020-01-02"])
    compare(settings_of(clock_base), ["fedit"], [0], tmp_path)
    monkeypatch.setattr(run_date, "_begun_on", ["2020-01-03"])
    compare(settings_of(clock_base), ["fedit", "flora"], [0], tmp_path)
    identities = [read_manifest(tmp_path / f"{name}-seed0")["identity"] for name in ("fedit", "flora")]
    assert [one["date"] for one in identities] == ["2020-01-02"] * 2
    assert identities[0]["data_sha256"] == identities[1]["data_sha256"]


def test_a_sheet_tells_the_sites_the_day_of_the_run(clock_base: Path) -> None:
    settings = settings_of(clock_base).on("2020-01-02")
    sheet = sheet_of(settings, 0, "0" * 32, "0" * 64, "0" * 64, False)
    assert str(sheet.template.day) == "2020-01-02"


def test_a_toml_date_is_the_text_of_it() -> None:
    date = datetime.date(2024, 2, 3)
    assert Data.model_validate({"date": date}).day == date


@pytest.mark.parametrize(
    ("wanted", "start"),
    [
        ("%d %b %Y", ""),
        ("%B %d, %Y", "\n"),
        ("%-d.%-m.%y", "  "),
        ("%Y-%m-%d %H:%M", "\n{# a note #}\n"),
        ("100%% %A", ""),
        ("%%d %j", "\n"),
    ],
)
def test_a_day_is_written_as_the_clock_would_write_it_and_nothing_else_changes(wanted: str, start: str) -> None:
    day = datetime.date(2024, 2, 3)
    template = f"{start}{{% if strftime_now is defined %}}\n  {{{{ strftime_now({wanted!r}) }}}}\n{{% endif %}}{CHATML}"
    tokenizer = ChatFamily(template).tokenizer()
    asked = [{"role": "user", "content": "hi"}]
    there = tokenizer.apply_chat_template(asked, tokenize=False, chat_template=on_day(template, day))
    written = datetime.datetime.combine(day, datetime.time()).strftime(wanted)
    literal = template.replace(f"strftime_now({wanted!r})", repr(written))
    assert there == tokenizer.apply_chat_template(asked, tokenize=False, chat_template=literal)
