"""The meter of rounds: what it takes for read was read, what it attacks is what crossed, and runs share one table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from example_runs import rewrite

from fedloom.cli.app import exit_code
from fedloom.config import Settings
from fedloom.errors import EvaluationError, SettingsError
from fedloom.experiment import run
from fedloom.explanation.kept import uploads_of
from fedloom.results.opened_result import open_result
from fedloom.results.replayed_rounds import Replay
from fedloom.results.round_leaks import MASKED, NOTHING_CROSSES, MeterSettings, round_leakage

Make = Callable[..., Settings]
FEW = MeterSettings(num_candidates=63)
METHODS: dict[str, dict[str, Any]] = {
    "flora": {},
    "ffa-lora": {"method__ranks": 2, "wire__dtype": "int8"},
    "fedsa-lora": {"method__ranks": 2},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_round_that_is_run_again_sends_what_was_sent(method: str, settings_for: Make, tmp_path: Path) -> None:
    settings = settings_for(**{"method__name": method, **METHODS[method]}, run__keep_updates=True)
    run(settings, tmp_path / "run")
    opened = open_result(tmp_path / "run")
    replay = Replay.of(opened)
    assert replay.last_round() == 2
    assert opened.found.run is not None
    for round in (1, 2):
        kept, sent = uploads_of(opened.found.run.round_files(round)), list(replay.sent(round))
        assert [one.client for one in sent] == list(kept) == replay.took_part(round)
        for one in sent:
            for module, pair in kept[one.client].items():
                assert pair.a_RI.equal(one.seen[module].a_RI)
                assert pair.b_OR.allclose(one.seen[module].b_OR, rtol=1e-5)  # the file holds it over the scale
                began = one.start[module]
                assert not (pair.b_OR.equal(began.b_OR) and pair.a_RI.equal(began.a_RI))


def test_memorised_rows_and_canaries_are_told_and_those_of_others_are_not(settings_for: Make, tmp_path: Path) -> None:
    many = {"federation__num_rounds": 4, "training__local_steps": 6, "training__batch_size": 2}
    planted = {"data__canaries": 2, "data__canary_clients": ["0"], "data__canary_repetitions": 4}
    rate = {"training__learning_rate": 3e-2, "method__ranks": 4, "run__keep_states": "all"}
    run(settings_for(**{**many, **planted, **rate}, evaluation__clients=0.3), tmp_path / "run")
    assert [one["client"] for one in json.loads((tmp_path / "run/canaries.json").read_text())["canaries"]] == ["0"] * 2
    holdings = json.loads((tmp_path / "run/holdings.json").read_text())["clients"]
    found = round_leakage(open_result(tmp_path / "run"), FEW)
    assert found.exposures is not None
    assert found.exposures.num_read == found.exposures.num_canaries == 2
    assert found.exposures.bits_against_base is not None
    assert found.exposures.bits_against_base > 3.0  # 1.44 where nothing was planted, 6 at most
    assert found.membership.all is not None
    assert found.membership.all.num_members <= sum(one["num_rows"] for one in holdings)  # no canary among them
    assert (found.epsilon, found.unit) == (None, "none")
    assert found.tokens is not None
    assert found.tokens.round == 4
    rewrite(tmp_path / "run", "canaries.json", {"canaries": []})
    with pytest.raises(EvaluationError, match=r"canaries.json: expected the canaries that the settings plant"):
        Replay.of(open_result(tmp_path / "run"))


def test_nothing_is_measured_that_the_server_does_not_see(settings_for: Make, tmp_path: Path) -> None:
    run(settings_for(method__name="standalone", method__ranks=2), tmp_path / "alone")
    alone = round_leakage(open_result(tmp_path / "alone"), FEW)
    assert (alone.tokens, alone.unread, alone.exposures) == (None, NOTHING_CROSSES, None)
    assert alone.membership.clients


@pytest.mark.slow
@pytest.mark.extra("privacy")
def test_runs_with_and_without_noise_share_one_table_and_page(
    settings_for: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {"method__name": "fedit", "method__ranks": 2}
    run(settings_for(**given), tmp_path / "plain")
    noise = {"privacy__unit": "row", "privacy__noise_multiplier": 1.0}
    run(settings_for(**given, **noise, data__canaries=1), tmp_path / "noised")
    run(settings_for(**given, privacy__sum="masked"), tmp_path / "masked")
    capsys.readouterr()
    page = tmp_path / "page.html"
    paths = [str(tmp_path / name) for name in ("plain", "noised", "masked")]
    assert exit_code(["leakage", *paths, "--json", "--candidates", "15", "--html", str(page)]) == 0
    plain, noised, masked = json.loads(capsys.readouterr().out)["runs"]
    assert plain["epsilon"] is None
    assert noised["epsilon"] > 0.0
    assert noised["exposures"]["ceiling"] == 4.0
    assert (masked["tokens"], masked["unread"]) == (None, MASKED)
    assert page.read_text().count("<svg") == 3
    assert exit_code(["leakage", *paths[:2]]) == 0
    shown = capsys.readouterr().out
    assert "∞" in shown
    assert f"{noised['epsilon']:.2f}" in shown


def test_what_cannot_be_measured_says_so(
    settings_for: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(settings_for(run__keep_states="last"), tmp_path / "run")
    opened = open_result(tmp_path / "run")
    with pytest.raises(EvaluationError, match=r"--round: expected 1 to 2, the rounds of .*, got 3; choose one"):
        round_leakage(opened, MeterSettings(round=3))
    capsys.readouterr()
    assert exit_code(["leakage", str(tmp_path / "run"), "--cuts", "1"]) == 2
    assert "give one run and public text" in capsys.readouterr().err
    assert exit_code(["leakage", str(tmp_path / "run" / "adapter")]) == 2


def test_who_gets_canaries_has_a_meaning_only_where_there_are_any(settings_for: Make) -> None:
    with pytest.raises(SettingsError, match=r"data.canary_repetitions only with canaries"):
        settings_for(data__canary_repetitions=2)
    with pytest.raises(SettingsError, match=r"data.canaries only with method.name = any but splitlora or base"):
        settings_for(method__name="splitlora", method__ranks=2, data__canaries=1)
