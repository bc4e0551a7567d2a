"""Masked sums across sites: the bits of one process, whoever drops out at whichever message, and no server between."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from four_sites import FOUR, Four, alone
from memory_link import Hub, SiteThread, adapter_of, records_of, served

from fedloom import embedded
from fedloom.config import Settings
from fedloom.errors import TooFewClientsError
from fedloom.experiment.session import run
from fedloom.methods import private_clients
from fedloom.privacy.draws import SeededDraws
from fedloom.privacy.secure_sum.steps import Step
from fedloom.seeding import stream
from fedloom.sites import sites_engine
from fedloom.sites.frames import TO_SERVER, TO_SITE, frame, unframe
from fedloom.sites.link import SERVER
from fedloom.sites.throwaway_certificates import ThrowawayRoot

pytestmark = pytest.mark.extra("privacy")


@pytest.fixture
def four(recipe: Callable[..., Settings], base_folder: Path, tmp_path: Path) -> Iterator[Four]:
    found = Four(recipe, base_folder, tmp_path)
    yield found
    for site in found.started:
        site.end()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites_engine, "ASK_AGAIN_SECONDS", 0.2)


def is_sum_answer(data: bytes, step: str, round: int) -> bool:
    if b'"sum-answer"' not in data:
        return False
    head, _ = unframe(data, TO_SERVER, 1 << 30)
    return bool((head.step, head.round) == (step, round))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="zero-padding"),
        pytest.param(
            {"method__name": "fedit", "method__ranks": 2, "method__weighting": "work", "federation__max_weight": 0.3},
            id="fedit",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"method__name": "ffa-lora", "training__moments": "own", "method__weighting": "uniform"},
            id="ffa-lora",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_sites_give_the_adapter_of_one_process(changes: dict[str, Any], four: Four, tmp_path: Path) -> None:
    settings, hub = four.settings(**changes), Hub()
    wanted = run(settings, tmp_path / "alone")
    four.start(hub)
    summary = served(four.study(settings), tmp_path / "served", hub)
    assert adapter_of(tmp_path / "served") == adapter_of(wanted.folder)
    assert summary.eval == wanted.eval
    for record in records_of(tmp_path / "served"):
        assert record["train_loss_nats"] is None
        for client in record["clients"]:
            assert client["reason"] is client["norm"] is client["loss_nats"] is None
            assert client["upload_bytes"] > 8 * client["num_parameters"] > 0


@pytest.mark.slow
def test_sums_of_one_study_hide_rows_and_whole_sites_too(four: Four, tmp_path: Path) -> None:
    """Rows: each site's own noise and ledger. Sites: each clips its own change, and the server adds the noise."""
    settings = four.settings(privacy__unit="row", privacy__noise_multiplier=2.0, training__dropout=0.0)
    hub = Hub()
    sites = four.start(hub)
    served(four.study(settings), tmp_path / "by-rows", hub)
    last = records_of(tmp_path / "by-rows")[-1]
    spent = [client["epsilon"] for client in last["clients"]]
    assert last["privacy"]["epsilon"] == max(spent) > min(spent) > 0.0
    for site in sites:
        site.end()
    hub = Hub()
    four.start(hub)
    hidden = {"privacy__unit": "client", "method__name": "ffa-lora", "method__weighting": "uniform"}
    served(four.study(four.settings(**hidden)), tmp_path / "sites", hub)
    last = records_of(tmp_path / "sites")[-1]
    assert last["privacy"]["unit"] == "client"
    assert [client["weight"] for client in last["clients"]] == [0.25] * 4


@pytest.mark.slow
def test_sites_add_their_own_noise_and_the_server_none(
    four: Four, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = {"privacy__unit": "client", "method__name": "ffa-lora", "method__weighting": "uniform"}
    settings = four.settings(**hidden, method__ranks=2, privacy__noise="clients")
    adapters = []
    for place in ("one", "other"):
        hub = Hub()
        sites = four.start(hub)
        served(four.study(settings), tmp_path / place, hub)
        adapters.append(adapter_of(tmp_path / place))
        told = records_of(tmp_path / place)[-1]["privacy"]
        assert (told["draws"], told["noise"]) == ("system", "clients")
        for site in sites:
            site.end()
    assert adapters[0] != adapters[1], "each draws from its own system"
    monkeypatch.setattr(private_clients, "SystemDraws", SeededDraws)
    hub = Hub()
    four.start(hub)
    served(four.study(settings), tmp_path / "seeded", hub)
    wanted = run(settings, tmp_path / "alone")
    assert adapter_of(tmp_path / "seeded") == adapter_of(wanted.folder)


@pytest.mark.parametrize(
    "step", [pytest.param(step, marks=() if step is Step.MASKED else pytest.mark.slow) for step in Step]
)
def test_a_site_that_drops_out_at_a_message_is_in_the_sum_if_its_numbers_came_and_in_the_next_round(
    step: Step, four: Four, tmp_path: Path
) -> None:
    gone: list[Step] = []

    def meddle(sender: str, _to: str, data: bytes) -> list[bytes]:
        if sender == FOUR[1] and b'"sum-answer"' in data and unframe(data, TO_SERVER, 1 << 30)[0].round == 1:
            at = Step(unframe(data, TO_SERVER, 1 << 30)[0].step)
            if [*Step].index(at) >= [*Step].index(step):
                gone.append(at)
                return []
        return [data]

    settings, hub = four.settings(), Hub(meddle)
    came = step in (Step.AGREED, Step.TOLD)
    wanted = alone(settings, tmp_path / "alone", {1: (1, step)})
    four.start(hub)
    served(four.study(settings), tmp_path / "served", hub)
    assert set(gone) == {step}, "what it missed it is not asked for again"
    assert adapter_of(tmp_path / "served") == wanted
    first, second = records_of(tmp_path / "served")
    assert all(client["reason"] is None for client in [*second["clients"], *(first["clients"][k] for k in (0, 2, 3))])
    assert (first["clients"][1]["reason"] is None) is came
    assert came or f"no answer at step {step}" in first["clients"][1]["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, 2])
def test_sketches_of_sites_give_the_adapter_of_one_process_and_the_policy_takes_them_for_masked(
    rank: int | None, recipe: Callable[..., Settings], tmp_path: Path
) -> None:
    """Of the embedded base, whose modules are wide enough to be sketched; a site leaves the first round's sum."""
    base = embedded.base_path("embedded")

    def meddle(sender: str, _to: str, data: bytes) -> list[bytes]:
        is_late = sender == FOUR[1] and b'"sum-answer"' in data and unframe(data, TO_SERVER, 1 << 30)[0].round == 1
        return [] if is_late and unframe(data, TO_SERVER, 1 << 30)[0].step != "keys" else [data]

    four, hub = Four(recipe, Path(base), tmp_path), Hub(meddle)
    ranks = {"method__ranks": [2, 1, 1, 1], "privacy__sketch_rank": rank}
    settings = four.settings(model__base=str(base), method__name="flora", privacy__sum="sketch", **ranks)
    wanted = alone(settings, tmp_path / "alone", {1: (1, Step.SHARES)})
    try:
        four.start(hub, sum="masked")
        served(four.study(settings), tmp_path / "served", hub)
    finally:
        for site in four.started:
            site.end()
    assert adapter_of(tmp_path / "served") == wanted
    first, second = records_of(tmp_path / "served")
    assert [client["reason"] is None for client in first["clients"]] == [True, False, True, True]
    assert [client["reason"] for client in second["clients"]] == [None] * 4
    (numbers,) = {client["num_parameters"] for client in second["clients"]}
    assert numbers < 500_000, "the products themselves are 786,432 numbers"


@pytest.mark.slow
def test_lost_doubled_and_mutated_frames_change_nothing(four: Four, tmp_path: Path) -> None:
    rng, lock = stream(1, "losses"), threading.Lock()

    def meddle(_sender: str, _to: str, data: bytes) -> list[bytes]:
        with lock:
            draw, changed = rng.random(), bytearray(data)
            changed[int(rng.integers(len(changed)))] ^= 1 << int(rng.integers(8))
        kept = [] if draw < 0.2 else [data, data] if draw < 0.4 else [data]
        return [bytes(changed), *kept]

    settings, hub = four.settings(), Hub(meddle)
    wanted = run(settings, tmp_path / "alone")
    four.start(hub)
    served(four.study(settings, quorum=4, grace_s=30.0), tmp_path / "served", hub)
    assert adapter_of(tmp_path / "served") == adapter_of(wanted.folder)


@pytest.mark.slow
def test_a_site_that_ends_within_a_sum_takes_no_further_part_in_it_and_the_next_round(
    four: Four, tmp_path: Path
) -> None:
    back: list[SiteThread] = []

    def meddle(sender: str, _to: str, data: bytes) -> list[bytes]:
        if sender == FOUR[3] and not back and is_sum_answer(data, "shares", 1):
            started[3].link.close()  # the process is gone, with all its secrets, and starts again at once
            started[3].stop.set()
            back.extend(four.start(hub, 3))
            return []
        return [data]

    settings, hub = four.settings(), Hub(meddle)
    wanted = alone(settings, tmp_path / "alone", {1: (3, Step.SHARES)})
    started = four.start(hub)
    served(four.study(settings, grace_s=30.0), tmp_path / "served", hub)
    first, second = records_of(tmp_path / "served")
    assert "it ended within the secure sum and came back" in first["clients"][3]["reason"]
    assert second["clients"][3]["reason"] is None
    assert adapter_of(tmp_path / "served") == wanted
    assert any("left the sum" in line for line in back[0].log)


@pytest.mark.slow
def test_a_server_that_ends_within_a_sum_repeats_the_round_with_the_same_sites_or_not_at_all(
    four: Four, tmp_path: Path
) -> None:
    """Killed once all have signed: the repeated round has their list again, and without one of them it has none."""

    class KilledError(Exception):
        pass

    settings, hub = four.settings(), Hub()
    wanted = run(settings, tmp_path / "alone")
    study, told = four.study(settings, quorum=4, grace_s=30.0), sites_engine.SitesSum.__call__
    sites = four.start(hub)

    def dying(self: Any, step: Step, messages: Any) -> Any:
        if step is Step.TOLD and self.terms.round == 2:
            raise KilledError
        return told(self, step, messages)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sites_engine.SitesSum, "__call__", dying)
        with pytest.raises(KilledError):
            served(study, tmp_path / "served", hub)
    sites[0].end()
    with pytest.raises(TooFewClientsError, match="it has signed a sum of 4 sites for this round"):
        served(four.study(settings, quorum=3), tmp_path / "served", hub)
    four.start(hub, 0)
    served(study, tmp_path / "served", hub)
    assert adapter_of(tmp_path / "served") == adapter_of(wanted.folder)
    records = [json.loads(line) for line in (tmp_path / "state" / FOUR[1] / "ledger.jsonl").read_text().splitlines()]
    assert [one["round"] for one in records if one["event"] == "sum" and "sent_bytes" in one] == [1, 2, 2, 2]


def changed(data: bytes, **terms: Any) -> bytes:
    """Return the first message of a sum with other terms."""
    head, body = unframe(data, TO_SITE, 1 << 30)
    return frame(head.model_copy(update={"terms": head.terms.model_copy(update=terms)}), bytes(body))


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({"threshold": 2}, "wants 3 sites in a sum at least, the study has 2"),
        ({"members": (0, 1, 2)}, "expected a sum of the study's clients with client 3"),
        ({"members": (0, 1, 2, 3, 7)}, "expected a sum of the study's clients"),
        ({"unit_share": 1e-9}, "expected a share of the sum"),
        ({"largest_share": 0.9, "unit_share": 0.02}, "expected a message of keys of this sum"),
    ],
    ids=["threshold", "members", "strangers", "shares", "one site's own shares"],
)
def test_terms_that_would_not_hide_a_site_are_refused_there(
    terms: dict[str, Any], words: str, four: Four, tmp_path: Path
) -> None:
    def meddle(_sender: str, to: str, data: bytes) -> list[bytes]:
        is_first = to == FOUR[3] and b'"kind":"sum"' in data and b'"step":"keys"' in data
        return [changed(data, **terms)] if is_first else [data]

    hub = Hub(meddle)
    sites = four.start(hub)
    served(four.study(four.settings(federation__num_rounds=1)), tmp_path / "served", hub)
    (record,) = records_of(tmp_path / "served")
    assert [client["reason"] is None for client in record["clients"]] == [True, True, True, False]
    assert any(re.search(words, line) for line in [*sites[3].log, record["clients"][3]["reason"]])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((FOUR[0], FOUR[0], FOUR[2], FOUR[3]), "expected a study with each site once"),
        ((FOUR[1], FOUR[0], FOUR[2], FOUR[3]), "expected a message of keys of this sum"),
    ],
    ids=["one twice", "others"],
)
def test_a_site_that_is_told_another_list_of_sites_is_in_no_sum_with_them(
    names: tuple[str, ...], words: str, four: Four, tmp_path: Path
) -> None:
    def meddle(_sender: str, to: str, data: bytes) -> list[bytes]:
        if to != FOUR[3] or b'"kind":"sheet"' not in data:
            return [data]
        head, body = unframe(data, TO_SITE, 1 << 30)
        members = head.members.model_copy(update={"names": names})
        return [frame(head.model_copy(update={"members": members}), bytes(body))]

    hub = Hub(meddle)
    sites = four.start(hub)
    served(four.study(four.settings(federation__num_rounds=1)), tmp_path / "served", hub)
    (record,) = records_of(tmp_path / "served")
    assert [client["reason"] is None for client in record["clients"]] == [True, True, True, False]
    assert any(words in line for line in [*sites[3].log, record["clients"][3]["reason"]])


def says(site: SiteThread, words: str, seconds: float = 30.0) -> bool:
    """Tell whether a site's log has these words, or will soon: it may read a message when the server is gone."""
    end = time.monotonic() + seconds
    while not any(words in line for line in site.log) and time.monotonic() < end:
        time.sleep(0.05)
    return any(words in line for line in site.log)


def test_a_server_cannot_put_keys_of_its_own_in_a_sites_place(four: Four, tmp_path: Path) -> None:
    """It has a kit of the project under another name, and one of its own making under the right one."""
    from fedloom.privacy.secure_sum import member, wire
    from fedloom.sites.kit import read_kit
    from fedloom.sites.site_identity import identity_of

    forged_kit = read_kit(ThrowawayRoot().write(four.path / "forged", "client", FOUR[0]), "client")
    other_kit = read_kit(four.root.write(four.path / "other", "client", "paris"), "client")
    sessions: list[Any] = []
    made = member.begin

    def watched(session: Any, *args: Any, **more: Any) -> Any:
        sessions.append(session)
        return made(session, *args, **more)

    for kit in (forged_kit, other_kit):

        def meddle(_sender: str, to: str, data: bytes, kit: Any = kit) -> list[bytes]:
            if to == SERVER or b'"kind":"sum"' not in data or b'"step":"shares"' not in data:
                return [data]
            head, body = unframe(data, TO_SITE, 1 << 30)
            session = sessions[-1]
            _, own = made(session, 0, identity_of(kit, FOUR).sign)
            known = wire.roster_read(bytes(body), session) | {0: wire.keys_read(own, session, 0)}
            return [frame(head, wire.roster_written(session, known))]

        hub = Hub(meddle)
        sites = four.start(hub)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(member, "begin", watched)
            with pytest.raises(TooFewClientsError, match="it left the secure sum"):
                served(four.study(four.settings(federation__num_rounds=1), grace_s=20.0), tmp_path / kit.name, hub)
        for site in sites[1:]:
            assert says(site, "expected keys that member 0 signed"), site.log
        for site in sites:
            site.end()


@pytest.mark.parametrize(
    ("policy", "changes", "words"),
    [
        ({"sum": "masked"}, {"privacy__sum": "plain"}, r"wants its update in masked sums alone"),
        ({"min_sites_in_sum": 4}, {}, r"wants 4 sites in a sum at least, the study has 3"),
        ({"sum": "masked", "min_sites_in_sum": 4}, {"privacy__threshold": 4}, ""),
    ],
)
def test_what_a_sites_policy_demands_of_sums_is_met_or_the_study_is_refused_in_a_line(
    policy: dict[str, Any], changes: dict[str, Any], words: str, four: Four, tmp_path: Path
) -> None:
    hub = Hub()
    sites = four.start(hub, **policy)
    study = four.study(four.settings(federation__num_rounds=1, **changes), deadline_s=1.5 if words else 60.0)
    if not words:
        served(study, tmp_path / "served", hub)
        assert all(client["reason"] is None for client in records_of(tmp_path / "served")[0]["clients"])
        return
    from fedloom.errors import RunError

    with pytest.raises(RunError, match=words):
        served(study, tmp_path / "served", hub)
    assert any("is refused" in note for note in sites[0].notes)
