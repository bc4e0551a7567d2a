"""Lost, doubled, damaged and foreign frames, sites and servers that end: the result is that of who counted."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_link import NAMES, Hub, SiteThread, adapter_of, records_of, replayed, served, site_of, study_of
from safetensors.torch import load, save

from fedloom.clients.held_sides import HeldSides
from fedloom.config import Settings
from fedloom.errors import RunError, TooFewClientsError
from fedloom.experiment.session import run
from fedloom.federation.blob import sealed, unsealed
from fedloom.lora.pair import Adapter
from fedloom.seeding import stream
from fedloom.sites import sites_engine
from fedloom.sites.frames import TO_SERVER, TO_SITE, frame, unframe
from fedloom.sites.link import SERVER

StartSites = Callable[..., list[SiteThread]]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites_engine, "ASK_AGAIN_SECONDS", 0.2)


@pytest.mark.parametrize("seed", [1, 2])
def test_lost_and_doubled_frames_change_nothing(
    seed: int, recipe: Callable[..., Settings], sites: StartSites, tmp_path: Path
) -> None:
    rng, lock = stream(seed, "losses"), threading.Lock()

    def meddle(_sender: str, _to: str, data: bytes) -> list[bytes]:
        with lock:
            draw = rng.random()
        return [] if draw < 0.2 else [data, data] if draw < 0.4 else [data]

    settings, hub = recipe(method__name="rolora", method__ranks=4), Hub(meddle)
    alone = run(settings, tmp_path / "alone")
    sites(hub)
    served(study_of(settings, NAMES, quorum=3), tmp_path / "served", hub)
    assert adapter_of(tmp_path / "served") == adapter_of(alone.folder)


@pytest.mark.parametrize("is_same", [True, False], ids=["the same connection", "a new one"])
def test_a_large_task_that_is_still_on_its_way_is_sent_again_on_a_new_connection_alone(
    is_same: bool, recipe: Callable[..., Settings], sites: StartSites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sites_engine, "SLOW_LINE_BYTES", 1)
    sent: list[bytes] = []

    def meddle(sender: str, to: str, data: bytes) -> list[bytes]:
        if to != NAMES[1] or b'{"kind":"task"' not in data:
            return [data]
        sent.append(data)
        if len(sent) > 1:
            return [data]
        site, server = hub.ends[to], hub.ends[SERVER]  # the timers may outlast both
        threading.Timer(1.2, lambda: site.inbox.put((sender, data))).start()
        if not is_same:
            threading.Timer(0.1, lambda: server.connections.update([to])).start()
        return []

    hub = Hub(meddle)
    sites(hub)
    served(study_of(recipe(federation__num_rounds=1), NAMES, quorum=3), tmp_path / "served", hub)
    assert len(sent) == (1 if is_same else 2)


def test_a_thousand_mutated_frames_each_way_are_not_taken(
    recipe: Callable[..., Settings], sites: StartSites, tmp_path: Path
) -> None:
    rng, lock, sent = stream(3, "mutations"), threading.Lock(), {"up": 0, "down": 0}

    def mutated(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[int(rng.integers(len(changed)))] ^= 1 << int(rng.integers(8))
        return bytes(changed) if rng.random() < 0.7 else bytes(changed[: int(rng.integers(1, len(changed)))])

    def meddle(sender: str, _to: str, data: bytes) -> list[bytes]:
        way = "down" if sender == SERVER else "up"
        with lock:
            extra = [mutated(data) for _ in range(120)]
            sent[way] += len(extra)
        return [*extra[:60], data, *extra[60:]]

    settings, hub = recipe(), Hub(meddle)
    alone = run(settings, tmp_path / "alone")
    started = sites(hub)
    served(study_of(settings, NAMES, quorum=3), tmp_path / "served", hub)
    assert min(sent.values()) >= 1000
    assert adapter_of(tmp_path / "served") == adapter_of(alone.folder)
    assert all(site.thread.is_alive() and site.worker.dropped.total > 100 for site in started)


def test_a_site_that_ends_in_a_round_is_left_out_and_comes_back(
    recipe: Callable[..., Settings], sites: StartSites, site_rows: Path, base_folder: Path, tmp_path: Path
) -> None:
    started: list[SiteThread] = []
    back: list[SiteThread] = []

    def meddle(_sender: str, to: str, data: bytes) -> list[bytes]:
        if to == NAMES[1] and not back and b'"task"' in data and unframe(data, TO_SITE, 1 << 30)[0].round == 2:
            hub.ends.pop(NAMES[1], None)  # the process is gone, and what was sent to it with it

            def again() -> None:
                time.sleep(1.0)
                rows = site_rows / "training" / "local_training_1.json"
                back.append(SiteThread(site_of(NAMES[1], rows, tmp_path / "state", base_folder), hub))

            started[1].stop.set()
            threading.Thread(target=again).start()
            return []
        return [data]

    hub = Hub(meddle)
    changes = {"method__name": "rolora", "method__ranks": 4, "federation__num_rounds": 6}
    started += sites(hub)
    try:
        study = study_of(recipe(**changes), NAMES, quorum=2, grace_s=0.2)
        served(study, tmp_path / "served", hub)
    finally:
        for site in back:
            site.end()
    rounds = records_of(tmp_path / "served")
    left_out = {record["round"]: [c["name"] for c in record["clients"] if c["reason"]] for record in rounds}
    assert left_out[2] == [NAMES[1]]
    assert "did not answer within" in rounds[1]["clients"][1]["reason"]
    assert rounds[1]["sites"][1]["left_out"] == rounds[1]["clients"][1]["reason"]
    assert adapter_of(tmp_path / "served") == replayed(recipe, tmp_path / "served", **changes)


def test_the_server_goes_on_after_a_kill_and_sites_do_not_train_again(
    recipe: Callable[..., Settings], sites: StartSites, tmp_path: Path
) -> None:
    """The server ends when two of three have answered round 2; they send their answers again."""
    results: list[str] = []

    class KilledError(Exception):
        pass

    def meddle(sender: str, to: str, data: bytes) -> list[bytes]:
        if to == SERVER and b'"result"' in data:
            head, _ = unframe(data, TO_SERVER, 1 << 30)
            if head.round == 2 and not head.again:
                results.append(sender)
        return [data]

    changes = {"method__name": "rolora", "method__ranks": 4, "federation__num_rounds": 4}
    settings, hub = recipe(**changes), Hub(meddle)
    alone = run(settings, tmp_path / "alone")
    started = sites(hub)
    study, take = study_of(settings, NAMES, quorum=3), sites_engine.SitesEngine.take

    def dying(engine: Any) -> Any:
        if len(results) >= 2:
            raise KilledError
        return take(engine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sites_engine.SitesEngine, "take", dying)
        with pytest.raises(KilledError):
            served(study, tmp_path / "served", hub)
    served(study, tmp_path / "served", hub)
    assert adapter_of(tmp_path / "served") == adapter_of(alone.folder)
    again = [note for site in started for note in site.notes if "sent again" in note]
    assert len(again) >= 2


def test_a_memory_of_a_round_that_did_not_count_is_taken_back(
    recipe: Callable[..., Settings], sites: StartSites, tmp_path: Path
) -> None:
    """An answer is lost for good: the site has trained, the server went on without, and the replay knows nothing."""

    def meddle(sender: str, _to: str, data: bytes) -> list[bytes]:
        is_lost = sender == NAMES[0] and b'"result"' in data and unframe(data, TO_SERVER, 1 << 30)[0].round == 2
        return [] if is_lost else [data]

    changes = {"method__name": "ffa-lora", "method__ranks": 4, "federation__num_rounds": 4, "wire__dtype": "bf16"}
    hub = Hub(meddle)
    sites(hub)
    served(study_of(recipe(**changes), NAMES, quorum=2, grace_s=1.5), tmp_path / "served", hub)
    rounds = records_of(tmp_path / "served")
    assert [bool(record["clients"][0]["reason"]) for record in rounds] == [False, True, False, False]
    assert adapter_of(tmp_path / "served") == replayed(recipe, tmp_path / "served", **changes)


def test_a_site_that_holds_another_side_than_it_believes_is_sent_the_whole_one(
    recipe: Callable[..., Settings], sites: StartSites, tmp_path: Path
) -> None:
    """The hash says so, and within the same round it gets everything."""
    started: list[SiteThread] = []
    spoilt: list[str] = []

    def meddle(_sender: str, to: str, data: bytes) -> list[bytes]:
        if to == NAMES[2] and not spoilt and b'"task"' in data and unframe(data, TO_SITE, 1 << 30)[0].round == 3:
            spoilt.append(to)
            training: Any = started[2].worker._trainer
            training._trainer._run._sides = HeldSides(2, Adapter())
        return [data]

    settings, hub = recipe(wire__dtype="bf16"), Hub(meddle)
    alone = run(settings, tmp_path / "alone")
    started += sites(hub)
    served(study_of(settings, NAMES, quorum=3), tmp_path / "served", hub)
    assert spoilt
    assert any("its side does not lead to the server's" in note for note in started[2].notes)
    assert adapter_of(tmp_path / "served") == adapter_of(alone.folder)


def test_answers_are_handed_on_in_the_order_of_the_broadcasts(
    recipe: Callable[..., Settings], sites: StartSites, tmp_path: Path
) -> None:
    """The first site answers last."""
    answers, order = [], []

    def meddle(sender: str, _to: str, data: bytes) -> list[bytes]:
        if b'"result"' not in data:
            return [data]
        answers.append(sender)
        if sender == NAMES[0]:
            while answers.count(NAMES[1]) + answers.count(NAMES[2]) < 2:
                time.sleep(0.01)
        return [data]

    hub = Hub(meddle)
    sites(hub)
    train = sites_engine.SitesEngine.train

    def watched(engine: Any, broadcasts: Any) -> Any:
        for arrival in train(engine, broadcasts):
            order.append(arrival.outcome.client)
            yield arrival

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sites_engine.SitesEngine, "train", watched)
        study = study_of(recipe(federation__num_rounds=1), NAMES, quorum=3)
        served(study, tmp_path / "served", hub)
    assert order == [0, 1, 2]


def test_a_site_that_never_answers_is_waited_for_to_the_deadline_and_no_longer(
    recipe: Callable[..., Settings], sites: StartSites, tmp_path: Path
) -> None:
    """The quorum cannot be reached; min_clients can."""

    def meddle(sender: str, _to: str, data: bytes) -> list[bytes]:
        return [] if sender == NAMES[0] and b'"result"' in data else [data]

    hub, settings = Hub(meddle), recipe(federation__num_rounds=1, federation__min_clients=2)
    sites(hub)
    served(study_of(settings, NAMES, quorum=3, deadline_s=3.0), tmp_path / "served", hub)
    (record,) = records_of(tmp_path / "served")
    assert 3.0 <= record["seconds"]["train"] < 10.0
    assert "did not answer within 3 s" in record["clients"][0]["reason"]
    assert [client["reason"] for client in record["clients"][1:]] == [None, None]


def test_strangers_foreign_runs_and_late_answers_are_dropped(
    recipe: Callable[..., Settings], sites: StartSites, tmp_path: Path
) -> None:
    def meddle(_sender: str, to: str, data: bytes) -> list[bytes]:
        if to == SERVER and b'"result"' in data:
            head, body = unframe(data, TO_SERVER, 1 << 30)
            foreign = head.model_copy(update={"run": "0" * 32})
            late = head.model_copy(update={"task": "0" * 64})
            hub.ends[SERVER].inbox.put(("paris", data))
            return [frame(foreign, body), frame(late, body), data, data]
        return [data]

    settings, hub = recipe(), Hub(meddle)
    alone = run(settings, tmp_path / "alone")
    sites(hub)
    engines: list[sites_engine.SitesEngine] = []
    with pytest.MonkeyPatch.context() as patch:
        end = sites_engine.SitesEngine.end
        patch.setattr(sites_engine.SitesEngine, "end", lambda engine: (engines.append(engine), end(engine)))
        served(study_of(settings, NAMES, quorum=3), tmp_path / "served", hub)
    assert adapter_of(tmp_path / "served") == adapter_of(alone.folder)
    counts = engines[0].dropped.counts
    assert counts["paris", "stranger"] >= 1
    assert all(counts[name, why] >= 1 for name in NAMES for why in ("run", "late"))


def spoilt(body: bytes, change: Callable[[torch.Tensor], torch.Tensor], **numbers: int) -> bytes:
    """Return an update with its tensors and numbers changed."""
    blob = unsealed(body)
    length = int.from_bytes(blob[:8], "little")
    message = json.loads(json.loads(blob[8 : 8 + length])["__metadata__"]["message"])
    tensors = {key: change(tensor).contiguous() for key, tensor in load(blob).items()}
    return sealed(save(tensors, metadata={"message": json.dumps({**message, **numbers})}))


HOSTILE: list[tuple[Callable[[bytes, int], bytes], str]] = [
    (lambda body, _: spoilt(body, lambda t: t * torch.nan), "finite"),
    (lambda body, _: spoilt(body, lambda t: torch.cat([t, t])), "shape"),
    (lambda body, _: spoilt(body, lambda t: t * 1e6), "federation.max_norm_ratio"),
    (lambda body, round: spoilt(body, lambda t: t, round=round - 1), "round"),
    (lambda body, round: spoilt(body, lambda t: t, round=round + 1), "round"),
    (lambda body, _: spoilt(body, lambda t: t, client=1), "client"),
    (lambda body, _: spoilt(body, lambda t: t, num_rows=10**6), "rows"),
    (lambda body, _: sealed((100 << 20).to_bytes(8, "little") + unsealed(body)), "message"),
]


def test_a_hostile_update_is_left_out_and_its_site_named(
    recipe: Callable[..., Settings], sites: StartSites, tmp_path: Path
) -> None:
    """One after the other, a round each; the others' updates make the adapter of a replay without that site."""

    def meddle(sender: str, _to: str, data: bytes) -> list[bytes]:
        if sender != NAMES[0] or b'"result"' not in data:
            return [data]
        head, body = unframe(data, TO_SERVER, 1 << 30)
        return [frame(head, HOSTILE[head.round - 2][0](bytes(body), head.round))] if head.round > 1 else [data]

    hub, changes = Hub(meddle), {"federation__num_rounds": 1 + len(HOSTILE)}
    sites(hub)
    served(study_of(recipe(**changes), NAMES, quorum=3), tmp_path / "served", hub)
    first, *rounds = records_of(tmp_path / "served")
    assert [client["reason"] for client in first["clients"]] == [None, None, None]
    for record, (_, told) in zip(rounds, HOSTILE, strict=True):
        assert told in record["clients"][0]["reason"]
        assert record["clients"][0]["name"] == NAMES[0]
        assert [client["reason"] for client in record["clients"][1:]] == [None, None]
    assert adapter_of(tmp_path / "served") == replayed(recipe, tmp_path / "served", **changes)


def test_fewer_sites_than_the_quorum_are_one_line(recipe: Callable[..., Settings], tmp_path: Path) -> None:
    hub = Hub()
    with pytest.raises(RunError, match=r"expected 3 sites \(sites.quorum\) within 0.5 s .*berlin: never seen"):
        served(study_of(recipe(), NAMES, quorum=3, deadline_s=0.5), tmp_path / "served", hub)


def test_a_policy_that_refuses_is_told_by_number_and_the_round_goes_on(
    recipe: Callable[..., Settings], sites: StartSites, tmp_path: Path
) -> None:
    hub = Hub()
    started = sites(hub, max_rank=2)
    served(study_of(recipe(), NAMES, quorum=2, grace_s=5.0), tmp_path / "served", hub)
    rounds = records_of(tmp_path / "served")
    reasons = [record["clients"][0]["reason"] for record in rounds]
    assert all("allows ranks up to 2, the study asks for 4" in reason for reason in reasons)
    assert rounds[0]["sites"][0]["state"] == "refuses"
    assert adapter_of(tmp_path / "served") == replayed(recipe, tmp_path / "served")
    assert any("is refused" in note for note in started[0].notes)


def test_too_few_usable_updates_end_the_run_and_the_same_command_goes_on(
    recipe: Callable[..., Settings], sites: StartSites, tmp_path: Path
) -> None:
    hub, settings = Hub(), recipe(federation__min_clients=3)
    sites(hub, max_rank=2)
    with pytest.raises(TooFewClientsError, match="at least 3 clients"):
        served(study_of(settings, NAMES, quorum=2, grace_s=0.1), tmp_path / "served", hub)


def test_sites_score_the_common_adapter_on_their_own_rows(
    recipe: Callable[..., Settings], base_folder: Path, site_rows: Path, tmp_path: Path
) -> None:
    hub, settings = Hub(), recipe()
    started = []
    for number, name in enumerate(NAMES):
        rows = site_rows / "training" / f"local_training_{number}.json"
        site = site_of(name, rows, tmp_path / "state", base_folder)
        data = site.data.model_copy(update={"eval_fraction": 0.25})
        started.append(SiteThread(site.model_copy(update={"data": data}), hub))
    study = study_of(settings, NAMES, held_out_at="sites", quorum=3)
    try:
        summary = served(study, tmp_path / "served", hub)
    finally:
        for thread in started:
            thread.end()
    assert set(summary.eval["loss_nats_of_site"]) == set(NAMES)
    assert summary.eval["loss_nats"] < summary.base_eval["loss_nats"]
    assert summary.eval["num_rows"] == 5 + 3 + 4
