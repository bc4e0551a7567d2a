"""A site joins or withdraws by a version of the study that its coordinator signs; earlier rounds stay as they were."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from memory_link import NAMES, Hub, SiteThread, adapter_of, served, site_of, study_of

from fedloom.config import Settings
from fedloom.errors import RunError, SettingsError
from fedloom.experiment.session import run
from fedloom.sites.members import ROOT_KEY, with_signature
from fedloom.sites.provisioning import members
from fedloom.sites.study import Study
from fedloom.sites.study_versions import versions_of
from fedloom.sites.throwaway_certificates import ThrowawayRoot

pytestmark = pytest.mark.extra("sites")
FOUR = [*NAMES, "paris"]


@pytest.fixture(autouse=True)
def project(tmp_path: Path, site_rows: Path) -> None:
    """Make a root with its key in ``ca``, a kit at the server and at every site, and rows for each of the four."""
    from cryptography.hazmat.primitives import serialization

    found = ThrowawayRoot()
    (tmp_path / "ca").mkdir()
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "ca" / ROOT_KEY).write_bytes(found._key.private_bytes(*form))
    for name in FOUR:
        found.write(tmp_path / "kits" / name, "client", name)
    found.write(tmp_path / "kit", "server", "server")
    (tmp_path / "rows").mkdir()
    for number in range(len(FOUR)):
        text = (site_rows / "training" / f"local_training_{number % 3}.json").read_text()
        (tmp_path / "rows" / f"local_training_{number}.json").write_text(text)


@pytest.fixture
def start(base_folder: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Return a function that starts a site by its name, in its own folder."""
    started: list[SiteThread] = []

    def begin(hub: Hub, *names: str, **policy: Any) -> list[SiteThread]:
        for name in names:
            rows = tmp_path / "rows" / f"local_training_{FOUR.index(name)}.json"
            site = site_of(name, rows, tmp_path / "state", base_folder, **policy)
            own = site.site.model_copy(update={"kit": str(tmp_path / "kits" / name)})
            started.append(SiteThread(site.model_copy(update={"site": own}), hub))
        return started[-len(names) :]

    yield begin
    for site in started:
        site.end()


@pytest.fixture
def version(recipe: Callable[..., Settings], tmp_path: Path) -> Callable[..., Study]:
    """Return a function that makes a version of the study, signed where it is not the first."""

    def make(number: int, names: list[str], withdrawn: tuple[str, ...] = (), **changes: Any) -> Study:
        sites = {"quorum": changes.pop("quorum", len(names) - len(withdrawn)), "withdrawn": list(withdrawn)}
        rows = {"data__path": str(tmp_path / "rows")} if len(names) == len(FOUR) else {}
        settings = recipe(**{"federation__num_clients": len(names), **rows, **changes})
        study = study_of(settings, names, version=number, kit=str(tmp_path / "kit"), deadline_s=120.0, **sites)
        if number == 1:
            return study
        return replace(study, signature=with_signature(study.members, tmp_path / "ca").signature)

    return make


def counted(folder: Path) -> list[list[str]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[client["name"] for client in record["clients"] if client["reason"] is None] for record in records]


METHODS: list[dict[str, Any]] = [
    {"method__name": "flora", "method__ranks": [4, 2, 1, 8]},
    {"method__name": "rolora", "method__ranks": [4, 4, 4, 4]},
    {"method__name": "fedex-lora", "method__ranks": [4, 4, 4, 4], "wire__dtype": "bf16"},
]


@pytest.mark.parametrize("changes", METHODS, ids=lambda changes: str(changes["method__name"]))
def test_one_site_joins_and_another_withdraws_and_one_process_replays_it_bit_for_bit(
    changes: dict[str, Any],
    recipe: Callable[..., Settings],
    version: Callable[..., Study],
    start: Callable[..., list[SiteThread]],
    tmp_path: Path,
) -> None:
    hub, out, ranks = Hub(), tmp_path / "served", changes["method__ranks"]
    sites = start(hub, *NAMES)
    first = {**changes, "method__ranks": ranks[:3]}
    served(version(1, NAMES, **first, federation__num_rounds=2), out, hub)
    before = {path: path.read_bytes() for path in (out / "rounds").rglob("record.json")}
    start(hub, "paris")
    served(version(2, FOUR, **changes, federation__num_rounds=4), out, hub)
    sites[1].end()
    summary = served(version(3, FOUR, ("oslo",), **changes, federation__num_rounds=5), out, hub)
    assert summary.num_rounds == 5
    assert counted(out) == [NAMES, NAMES, FOUR, FOUR, ["berlin", "rome", "paris"]]
    assert {path: path.read_bytes() for path in before} == before
    assert [(one["version"], one["from_round"]) for one in versions_of(out)] == [(1, 1), (2, 3), (3, 5)]
    replay = {"data__path": str(tmp_path / "rows"), "federation__participation": str(out)}
    run(recipe(**changes, **replay, federation__num_clients=4, federation__num_rounds=5), tmp_path / "alone")
    assert adapter_of(out) == adapter_of(tmp_path / "alone")


@pytest.fixture
def after_two_rounds(
    version: Callable[..., Study], start: Callable[..., list[SiteThread]], tmp_path: Path
) -> tuple[Hub, list[SiteThread]]:
    """Serve two rounds of the first version, by a method whose start has a largest rank."""
    hub = Hub()
    sites = start(hub, *NAMES)
    served(version(1, NAMES, **ALIKE, federation__num_rounds=2), tmp_path / "served", hub)
    return hub, sites


ALIKE: dict[str, Any] = {"method__name": "fedit", "method__ranks": 4}


def refused(study: Study, folder: Path, hub: Hub) -> str:
    with pytest.raises(RunError) as refusal:
        served(study, folder, hub)
    text = str(refusal.value)
    assert len(text.splitlines()) == 1
    return text


def test_what_is_no_version_of_the_study_is_refused_in_one_line_and_changes_nothing(
    after_two_rounds: tuple[Hub, list[SiteThread]], version: Callable[..., Study], tmp_path: Path
) -> None:
    hub, out = after_two_rounds[0], tmp_path / "served"
    three = {**ALIKE, "federation__num_rounds": 3}
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    good = version(2, FOUR, **three)
    assert "got none that can be read; run `fedloom sites sign`" in refused(replace(good, signature=""), out, hub)
    other = version(3, FOUR, **three).signature
    assert "the signature of something else" in refused(replace(good, signature=other), out, hub)
    assert "set sites.version = 2 and sign it" in refused(version(1, FOUR, **three), out, hub)
    assert "set sites.version = 2 and sign it" in refused(version(1, NAMES, ("oslo",), **three), out, hub)
    assert "keep berlin, oslo, rome at its beginning" in refused(version(2, ["paris", *NAMES], **three), out, hub)
    assert "keep berlin, oslo, rome at its beginning" in refused(
        version(2, ["rome", "oslo", "berlin"], **three), out, hub
    )
    larger = {**three, "method__name": "zero-padding", "method__ranks": [4, 4, 4, 2]}
    assert "method.name is 'fedit' there" in refused(version(2, FOUR, **larger), out, hub)
    assert "training.learning_rate" in refused(version(2, FOUR, **three, training__learning_rate=1.0), out, hub)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    served(version(2, FOUR, **three, quorum=3), out, hub)
    assert "got version 1 (sites.version); serve the newest" in refused(version(1, NAMES, **three), out, hub)


def test_what_earlier_sites_have_stays_theirs(
    version: Callable[..., Study], start: Callable[..., list[SiteThread]], tmp_path: Path
) -> None:
    hub, out = Hub(), tmp_path / "served"
    start(hub, *NAMES)
    padded = {"method__name": "zero-padding", "federation__num_rounds": 1}
    served(version(1, NAMES, **padded, method__ranks=[4, 2, 1]), out, hub)
    more = {**padded, "federation__num_rounds": 2}
    message = refused(version(2, FOUR, **more, method__ranks=[4, 1, 2, 1]), out, hub)
    assert "got another method.ranks for oslo, rome; keep what earlier sites have" in message
    message = refused(version(2, FOUR, **more, method__ranks=[4, 2, 1, 8]), out, hub)
    assert "got rank 8 (method.ranks) for a site that joins" in message


def test_a_site_takes_no_unsigned_older_or_foreign_version_and_the_round_goes_on_without_it(
    after_two_rounds: tuple[Hub, list[SiteThread]],
    version: Callable[..., Study],
    start: Callable[..., list[SiteThread]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server was broken into: it lets a site in without the key of the root."""
    hub, _ = after_two_rounds
    monkeypatch.setattr("fedloom.sites.serving.check_version", lambda *_: ("federation.num_clients",))
    start(hub, "paris")
    forged = replace(version(2, FOUR, **ALIKE, federation__num_rounds=3, quorum=1, federation__min_clients=1))
    forged = replace(forged, signature="00" * 256, sites=forged.sites.model_copy(update={"deadline_s": 2.0}))
    message = refused(forged, tmp_path / "served", hub)
    assert message.count("version 2 of the study is not signed by its project's coordinator") == 4


def test_a_study_lists_a_withdrawn_site_and_asks_no_more_of_a_round_than_those_present(
    version: Callable[..., Study], tmp_path: Path
) -> None:
    two = version(2, NAMES, ("oslo",), **ALIKE)
    assert two.cohort_size == 2
    assert [member.state for member in members(two, tmp_path)] == [
        "not approved",
        "not approved, withdrawn",
        "not approved",
    ]
    for told, changes in (
        ("sites.withdrawn: expected names of sites.names", {"withdrawn": ("paris",)}),
        ("sites.quorum: expected at most the 2 sites that take part", {"withdrawn": ("oslo",), "quorum": 3}),
        ("federation.min_clients: expected at most the 2 sites of a round", {"federation__min_clients": 3}),
        ("federation.clients_per_round: expected at most the 2 sites", {"federation__clients_per_round": 3}),
    ):
        with pytest.raises(SettingsError) as refusal:
            version(2, NAMES, **{"withdrawn": ("oslo",), **ALIKE, **changes})
        assert told in str(refusal.value)
