"""Sites that hide their rows: each draws for itself, books before it trains, and stops at its own budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from memory_link import NAMES, Hub, SiteThread, adapter_of, served, study_of

from fedloom.config import Settings
from fedloom.errors import SettingsError
from fedloom.privacy.accountant import PrivateStep, epsilon
from fedloom.privacy.ledger import LEDGER
from fedloom.reporting.report import write_report

pytestmark = pytest.mark.extra("privacy")
ROWS = (20, 12, 16)
PRIVATE = {"privacy__unit": "row", "privacy__noise_multiplier": 2.0, "training__dropout": 0.0}


def cost(rows: int, rounds: int, delta: float = 1e-5) -> float:
    return epsilon({PrivateStep(4 / rows, 2.0): 2 * rounds}, delta)


def test_each_site_counts_its_own_cost_and_stops_at_its_own_budget(
    recipe: Callable[..., Settings], sites: Callable[..., list[SiteThread]], tmp_path: Path
) -> None:
    hub = Hub()
    limit = (cost(12, 1) + cost(16, 1)) / 2
    assert cost(20, 2) < limit < min(cost(12, 1), cost(16, 2))
    started = sites(hub, max_epsilon=limit)
    settings = recipe(**PRIVATE, federation__num_rounds=1)
    served(study_of(settings, NAMES, quorum=2, grace_s=1.0), tmp_path / "served", hub)
    (record,) = [json.loads(line) for line in (tmp_path / "served" / "metrics.jsonl").read_text().splitlines()]
    assert record["privacy"] == {"unit": "row", "epsilon": cost(16, 1), "delta": 1e-5, "draws": "system"}
    for client, rows in zip(record["clients"], ROWS, strict=True):
        assert client["loss_nats"] is None
        assert client["epsilon"] == (0.0 if rows == 12 else cost(rows, 1))
        assert (client["reason"] is None) is (rows != 12)
        assert rows != 12 or "policy.max_epsilon" in client["reason"]
    ledgers = [tmp_path / "state" / name / LEDGER for name in NAMES]
    assert [ledger.exists() for ledger in ledgers] == [True, False, True]
    write_report([tmp_path / "served"], tmp_path / "report.html")
    assert "policy.max_epsilon" in (tmp_path / "report.html").read_text()
    for site in started:
        site.end()
    another = Hub()  # the sites have restarted, and another study begins: what was spent is spent
    sites(another, max_epsilon=limit)
    served(study_of(settings, NAMES, quorum=2, grace_s=1.0), tmp_path / "again", another)
    (record,) = [json.loads(line) for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()]
    assert [client["reason"] is None for client in record["clients"]] == [True, False, False]
    assert [client["epsilon"] for client in record["clients"]] == [cost(20, 1), 0.0, 0.0], "what this study cost"
    assert [len(ledger.read_text().splitlines()) for ledger in (ledgers[0], ledgers[2])] == [2, 1]


def test_nobody_can_repeat_what_a_site_drew(
    recipe: Callable[..., Settings], sites: Callable[..., list[SiteThread]], tmp_path: Path
) -> None:
    adapters = []
    for place in ("one", "other"):
        hub = Hub()
        started = sites(hub)
        served(study_of(recipe(**PRIVATE, federation__num_rounds=1), NAMES, quorum=3), tmp_path / place, hub)
        adapters.append(adapter_of(tmp_path / place))
        for site in started:
            site.end()
    assert adapters[0] != adapters[1]


def test_a_server_that_hides_whole_sites_draws_from_its_system_and_counts_every_round(
    recipe: Callable[..., Settings], sites: Callable[..., list[SiteThread]], tmp_path: Path
) -> None:
    hidden = {"method__name": "ffa-lora", "method__weighting": "uniform", "privacy__unit": "client"}
    settings = recipe(**hidden, federation__num_rounds=2)
    adapters = []
    for place in ("one", "other"):
        hub = Hub()
        started = sites(hub)
        served(study_of(settings, NAMES, quorum=3), tmp_path / place, hub)
        adapters.append(adapter_of(tmp_path / place))
        for site in started:
            site.end()
    assert adapters[0] != adapters[1], "nobody can repeat what the server drew"
    booked = [json.loads(line) for line in (tmp_path / "one" / LEDGER).read_text().splitlines()]
    assert [(one["client"], one["round"], one["draws"]) for one in booked] == [
        (client, round, "system") for round in (1, 2) for client in (0, 1, 2)
    ]
    last = json.loads((tmp_path / "one" / "metrics.jsonl").read_text().splitlines()[-1])
    spent = epsilon({PrivateStep(1.0, 1.0): 2}, 1e-5)
    assert last["privacy"] == {
        "unit": "client",
        "epsilon": spent,
        "delta": 1e-5,
        "draws": "system",
        "amplified": False,
    }
    assert [client["epsilon"] for client in last["clients"]] == [spent] * 3
    assert not list((tmp_path / "state").rglob(LEDGER)), "the sites spend nothing of their own"


@pytest.mark.parametrize(
    ("overrides", "sites", "words"),
    [
        (
            {"privacy__unit": "client", "federation__sampling": "poisson", "federation__clients_per_round": 2},
            {},
            "show who was asked, so the draw is no secret",
        ),
        ({"privacy__sum": "masked"}, {"withdrawn": NAMES[:1]}, "masked only with 3 clients a round or more"),
    ],
)
def test_what_sites_would_know_or_could_not_hide_is_refused(
    overrides: dict[str, object], sites: dict[str, object], words: str, recipe: Callable[..., Settings]
) -> None:
    own = {"method__name": "ffa-lora", "method__weighting": "uniform", **overrides}
    with pytest.raises(SettingsError, match=words):
        study_of(recipe(**own), NAMES, quorum=2, **sites)
