"""A run whose rows are hidden: with every kind of method, resumed anywhere, and nothing is told of a row."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom.config import Settings
from fedloom.errors import MissingExtraError, SettingsError
from fedloom.experiment import describe, run
from fedloom.privacy.ledger import LEDGER
from fedloom.reporting.report import write_report

Make = Callable[..., Settings]
PRIVATE: dict[str, Any] = {"privacy__unit": "row", "privacy__noise_multiplier": 0.8}


def private(make: Make, method: str = "flora", **overrides: object) -> Settings:
    ranks: object = [4, 2, 1] if method in ("flora", "weave") else 2
    return make(**{"method__name": method, "method__ranks": ranks, **PRIVATE, **overrides})


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def adapter(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted((folder / "adapter").rglob("*.safetensors"))}


@pytest.mark.extra("privacy")
@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("flora", {"training__dropout": 0.1, "training__proximal": 0.1}),
        ("weave", {"training__local_steps": 1}),
        ("fedsa-lora", {}),
        ("rolora", {"wire__dtype": "int4", "training__moments": "shared"}),
        ("standalone", {}),
    ],
)
def test_every_kind_of_method_hides_rows(
    method: str, overrides: dict[str, Any], settings_for: Make, tmp_path: Path
) -> None:
    run(private(settings_for, method, **overrides), tmp_path / "run")
    for record in records(tmp_path / "run"):
        assert record["train_loss_nats"] is None
        assert record["num_tokens"] == record["num_loss_tokens"] == 0
        assert all(client["loss_nats"] is None and client["reason"] is None for client in record["clients"])
    assert adapter(tmp_path / "run")


@pytest.mark.extra("privacy")
def test_clients_at_once_and_a_resumption_change_no_bit(settings_for: Make, tmp_path: Path) -> None:
    run(private(settings_for), tmp_path / "one")
    run(private(settings_for, federation__num_rounds=1, engine__clients_at_once=3), tmp_path / "many")
    run(private(settings_for, engine__clients_at_once=3), tmp_path / "many")
    assert adapter(tmp_path / "many") == adapter(tmp_path / "one")
    costs = [
        [(record["privacy"], [client["epsilon"] for client in record["clients"]]) for record in records(folder)]
        for folder in (tmp_path / "one", tmp_path / "many")
    ]
    assert costs[0] == costs[1]
    assert 0.0 < costs[0][0][0]["epsilon"] < costs[0][1][0]["epsilon"]


@pytest.mark.extra("privacy")
def test_a_client_stops_at_its_budget_and_the_run_goes_on(settings_for: Make, tmp_path: Path) -> None:
    run(private(settings_for, federation__num_rounds=1), tmp_path / "short")
    costs = {client["client"]: client["epsilon"] for client in records(tmp_path / "short")[0]["clients"]}
    first, *_, last = sorted(set(costs.values()))
    assert first < last, "fewer rows are drawn more often"
    limit = (first + last) / 2
    allowed = {client for client, cost in costs.items() if cost <= limit}
    run(private(settings_for, privacy__max_epsilon=limit, federation__num_rounds=1), tmp_path / "run")
    (record,) = records(tmp_path / "run")
    for client in record["clients"]:
        is_allowed = client["client"] in allowed
        assert (client["reason"] is None) is is_allowed
        assert is_allowed or "expected at most privacy.max_epsilon" in client["reason"]
        assert client["epsilon"] == (costs[client["client"]] if is_allowed else 0.0)
    assert max(one["epsilon"] for one in record["clients"]) <= limit


@pytest.mark.extra("privacy")
def test_steps_are_booked_before_they_are_taken(
    settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fedloom.clients.shared_base.train_cohort", killed)
        with pytest.raises(KeyboardInterrupt):
            run(private(settings_for), tmp_path / "run")
    lines = (tmp_path / "run" / LEDGER).read_text().splitlines()
    assert [json.loads(line)["client"] for line in lines] == [0, 1, 2]
    run(private(settings_for), tmp_path / "run")
    booked = [json.loads(line) for line in (tmp_path / "run" / LEDGER).read_text().splitlines()]
    assert [(one["client"], one["round"]) for one in booked] == [(c, r) for r in (1, 2) for c in (0, 1, 2)]


@pytest.mark.extra("privacy")
def test_describe_says_before_a_run_what_summary_and_report_say_after_it(settings_for: Make, tmp_path: Path) -> None:
    drawn = {"federation__clients_per_round": 2, "federation__num_rounds": 3}
    planned = describe(private(settings_for, **drawn, privacy__max_epsilon=2.0))
    assert planned.privacy is not None
    summary = run(private(settings_for, **drawn), tmp_path / "run")
    spent = {c["name"]: c["epsilon"] for record in records(tmp_path / "run") for c in record["clients"]}
    told = {one.name: one.epsilon for one in planned.privacy.clients if one.rounds}
    assert told == {name: pytest.approx(cost, rel=2e-3) for name, cost in spent.items()}
    assert all(told[name] >= cost for name, cost in spent.items())
    assert summary.privacy is not None
    assert summary.privacy["epsilon"] == max(spent.values())
    assert f"at most ε = {max(spent.values()):.3f} at δ = 1e-05; a simulation" in summary.lines()[-1]
    write_report([tmp_path / "run"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert f"ε = {max(spent.values()):.3f} at δ = 1e-05; a simulation" in page
    assert "ε spent" in page
    enough = planned.privacy.enough_noise
    assert enough is not None
    lines = planned.lines()
    assert any(f"privacy.noise_multiplier = {enough:g} none would stop" in line for line in lines)
    quiet = describe(private(settings_for, **drawn, privacy__max_epsilon=2.0, privacy__noise_multiplier=enough))
    assert quiet.privacy is not None
    assert 1.9 < max(one.epsilon for one in quiet.privacy.clients) <= 2.0
    assert quiet.privacy.enough_noise is None


def test_a_missing_accountant_is_named_before_anything_is_made(
    settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(MissingExtraError, match=r"privacy.unit needs the extra 'privacy'"):
        run(private(settings_for), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"method__weighting": "tokens"}, "method.weighting = tokens"),
        ({"method__initialisation": "gradient", "method__name": "fedit"}, "method.initialisation = gradient"),
        ({"method__name": "splitlora"}, "privacy.unit only with method.name = any but splitlora or base"),
        ({"privacy__unit": "none"}, "privacy.noise_multiplier only with privacy.unit = row"),
    ],
)
def test_what_would_tell_of_rows_is_refused(overrides: dict[str, Any], words: str, settings_for: Make) -> None:
    with pytest.raises(SettingsError, match=words):
        private(settings_for, **({"method": "flora"} | overrides))
