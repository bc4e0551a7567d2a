"""A cut model over sites comes to what one process comes to, bit for bit; nothing that a side sends is believed."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_link import NAMES, Hub, SiteThread, adapter_of, records_of, replayed, served, site_of, study_of
from transformers import LlamaConfig, LlamaForCausalLM

from fedloom.config import Settings
from fedloom.errors import RunError, SettingsError
from fedloom.experiment.session import run
from fedloom.seeding import stream
from fedloom.sites import policy, sites_engine
from fedloom.sites.frames import TO_SERVER, TO_SITE, frame, unframe
from fedloom.sites.grpc_link import GrpcServerLink, GrpcSiteLink
from fedloom.sites.kit import read_kit
from fedloom.sites.link import SERVER
from fedloom.sites.serving import serve
from fedloom.sites.sheet import ClientCut, Sheet, SheetSplit, sheet_of
from fedloom.sites.site_settings import Policy
from fedloom.sites.study import resolve_study
from fedloom.sites.throwaway_certificates import ThrowawayRoot
from fedloom.split.cut_messages import SplitMessage
from fedloom.split.server_half import SplitServer

StartSites = Callable[..., list[SiteThread]]
Recipe = Callable[..., Settings]
Messages = Callable[[SplitMessage], SplitMessage]

SPLIT: dict[str, Any] = {
    "method__name": "splitlora",
    "method__ranks": 2,
    "data__eval_path": None,
    "federation__num_rounds": 3,
    "split__aggregate_every": 2,
}
SHORT = {"training__local_steps": 1, "split__aggregate_every": 1}
LABELS_STAY = {"split__labels": "client", "split__micro_batches": 2}


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a random Llama over bytes with blocks enough for two cuts and a tail."""
    folder = tmp_path_factory.mktemp("cut-base")
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256,
            max_position_embeddings=256,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites_engine, "ASK_AGAIN_SECONDS", 0.5)


CASES: dict[str, dict[str, Any]] = {
    "scored by the server": {"split__wire_dtype": "fp32", "split__gradient_wire_dtype": "fp32"},
    "labels stay": {
        **LABELS_STAY,
        "split__wire_dtype": "int8",
        "split__error_feedback": "on",
        "wire__dtype": "bf16",
    },
    "different cuts and ranks": {
        "split__cut_layer": [1, 2, 3],
        "method__ranks": [4, 2, 1],
        "split__aggregation": "flora",
        "wire__dtype": "bf16",
    },
    "sampled": {
        "federation__clients_per_round": 2,
        "federation__num_rounds": 5,
        "method__ranks": [4, 2, 1],
        "split__aggregation": "zero-padding",
        "split__server_update": "sequential",
    },
    "frozen": {"split__client_half": "frozen", "split__wire_dtype": "int8"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_cut_model_over_sites_gives_the_adapter_of_one_process(
    case: str, recipe: Recipe, site_rows: Path, sites: StartSites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers: list[Any] = []
    begin = SplitServer.begin
    monkeypatch.setattr(SplitServer, "begin", lambda server, *rest: (servers.append(server), begin(server, *rest))[1])
    changes = SPLIT | CASES[case]
    is_scored = case == "scored by the server"
    settings, hub = recipe(**changes | ({"data__eval_path": str(site_rows / "eval.json")} if is_scored else {})), Hub()
    alone = run(settings, tmp_path / "alone")
    servers.clear()
    started = sites(hub, split="yes")
    summary = served(study_of(settings, NAMES, quorum=3), tmp_path / "served", hub)
    assert adapter_of(tmp_path / "served") == adapter_of(alone.folder)
    assert summary.eval == alone.eval
    assert all(client["reason"] is None for record in records_of(tmp_path / "served") for client in record["clients"])
    cuts = settings.per_client(settings.split.cut_layer)
    tail = 1 if settings.split.labels == "client" else 0
    assert is_scored or blocks_of(servers[0]._lora.model) == set(range(min(cuts), 4 - tail))
    for site, cut in zip(started, cuts, strict=True):
        trained: Any = site.notes
        assert any(f"the model cut after block {cut}" in note for note in trained)


@pytest.mark.parametrize("labels", [{}, LABELS_STAY], ids=["at the server", "at the sites"])
def test_a_base_in_bf16_is_cut_too(
    labels: dict[str, Any], recipe: Recipe, site_rows: Path, base_folder: Path, tmp_path: Path
) -> None:
    """A part without embeddings begins with a layer that is adapted, and its adapter is in fp32."""
    folder, hub = tmp_path / "bf16", Hub()
    LlamaForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16).save_pretrained(folder)
    settings = recipe(**SPLIT | SHORT | labels, model__base=str(folder))
    alone = run(settings, tmp_path / "alone")
    rows = [site_rows / "training" / f"local_training_{number}.json" for number in range(len(NAMES))]
    own = [site_of(name, path, tmp_path / "state", folder, split="yes") for name, path in zip(NAMES, rows, strict=True)]
    started = [SiteThread(site, hub) for site in own]
    try:
        served(study_of(settings, NAMES, quorum=3), tmp_path / "served", hub)
    finally:
        for site in started:
            site.end()
    assert adapter_of(tmp_path / "served") == adapter_of(alone.folder)


def blocks_of(model: Any) -> set[int]:
    """Return the blocks that have weights."""
    return {int(name.split(".")[2]) for name, _ in model.named_parameters() if name.startswith("model.layers.")}


class Changed:
    """A hub on which the frames of one site in chosen periods are changed by kind."""

    def __init__(self, site: str, changes: dict[int, tuple[str, Callable[[Any, bytes], tuple[Any, bytes]]]]) -> None:
        self.site, self.changes, self.round, self.done = site, changes, 0, set[int]()
        self.hub = Hub(self.meddle)

    def meddle(self, sender: str, to: str, data: bytes) -> list[bytes]:
        if self.site not in (sender, to):
            return [data]
        head, body = unframe(data, TO_SITE if sender == SERVER else TO_SERVER, 1 << 30) if data else (None, b"")
        self.round = getattr(head, "round", self.round) if sender == SERVER else self.round
        kind, change = self.changes.get(self.round, ("", None))
        if change is None or head.kind != kind or self.round in self.done:
            return [data]
        self.done.add(self.round)
        return [frame(*change(head, body))]


def message(change: Messages) -> Callable[[Any, bytes], tuple[Any, bytes]]:
    return lambda head, body: (head, change(SplitMessage.from_bytes(body)).to_bytes())


def head(**entries: Any) -> Callable[[Any, bytes], tuple[Any, bytes]]:
    return lambda found, body: (found.model_copy(update=entries), body)


def grown(name: str, by: int) -> Messages:
    return lambda m: replace(m, **{name: getattr(m, name) + by})


def first(name: str, value: int) -> Messages:
    def change(m: SplitMessage) -> SplitMessage:
        tensor = getattr(m, name).clone()
        tensor[0] = value
        return replace(m, **{name: tensor})

    return change


def poisoned(m: SplitMessage) -> SplitMessage:
    values = m.matrix.values_TD.clone()
    values[0, 0] = float("nan")
    return replace(m, matrix=replace(m.matrix, values_TD=values))


UP = {
    1: ("activations", message(lambda m: replace(m, client=2)), "names client 2"),
    2: ("activations", message(grown("targets_S", 10**6)), "tokens below 256"),
    3: ("activations", message(first("lengths_N", -7)), "lengths from 1 to"),
    4: ("activations", message(first("lengths_N", 2**31 - 1)), "lengths from 1 to"),
    5: ("activations", message(first("target_index_S", 2**31 - 1)), "rising indices"),
    6: ("activations", message(poisoned), "expected finite activations"),
    7: ("activations", message(lambda m: replace(m, step=m.step + 1)), "step: expected"),
    8: ("activations", lambda found, body: (found, body[:-1]), "expected a whole message"),
    9: ("updates", head(sizes=(7, 7)), "expected a body of 14 bytes"),
    10: ("updates", lambda found, body: (found, bytes(len(body))), "expected a whole message"),
}


def test_what_a_site_forges_costs_it_the_period_and_no_other(recipe: Recipe, sites: StartSites, tmp_path: Path) -> None:
    changes = SPLIT | SHORT | {"federation__num_rounds": len(UP)}
    changed = Changed(NAMES[1], {n: (kind, change) for n, (kind, change, _) in UP.items()})
    sites(changed.hub, split="yes")
    served(study_of(recipe(**changes), NAMES, quorum=3), tmp_path / "served", changed.hub)
    for record in records_of(tmp_path / "served"):
        mine = record["clients"][1]
        assert UP[record["round"]][2] in mine["reason"]
        assert record["sites"][1]["left_out"] == mine["reason"]
        assert [client["reason"] for client in record["clients"]][::2] == [None, None]
    assert adapter_of(tmp_path / "served") == replayed(recipe, tmp_path / "served", **changes)


DOWN: dict[int, tuple[str, Any]] = {
    1: ("request", head(step=2**31)),
    2: ("request", head(micro_batch=7)),
    3: ("request", head(rows=(10**6,))),
    4: ("hidden", message(poisoned)),
    5: ("hidden", message(lambda m: replace(m, client=2))),
    6: ("hidden", message(lambda m: replace(m, matrix=replace(m.matrix, values_TD=m.matrix.values_TD[:-1])))),
    7: ("gradients", message(lambda m: replace(m, micro_batch=1))),
    8: ("gradients", message(poisoned)),
    9: ("finish", head(step=0)),
    10: ("begin", head(round=10**6)),
    11: ("begin", head(sizes=(3,))),
}


def test_what_a_server_forges_is_not_done(recipe: Recipe, sites: StartSites, tmp_path: Path) -> None:
    changes = SPLIT | SHORT | LABELS_STAY | {"federation__num_rounds": len(DOWN)}
    changed = Changed(NAMES[1], DOWN)
    started = sites(changed.hub, split="labels-stay")
    served(study_of(recipe(**changes), NAMES, quorum=3), tmp_path / "served", changed.hub)
    for record in records_of(tmp_path / "served"):
        assert record["clients"][1]["reason"] is not None, record["round"]
        assert [client["reason"] for client in record["clients"]][::2] == [None, None]
    assert all(site.thread.is_alive() for site in started)
    assert adapter_of(tmp_path / "served") == replayed(recipe, tmp_path / "served", **changes)


def test_mutated_frames_each_way_are_not_taken(recipe: Recipe, sites: StartSites, tmp_path: Path) -> None:
    rng, lock, sent = stream(3, "mutations"), threading.Lock(), {"up": 0, "down": 0}

    def mutated(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[int(rng.integers(len(changed)))] ^= 1 << int(rng.integers(8))
        return bytes(changed) if rng.random() < 0.7 else bytes(changed[: int(rng.integers(1, len(changed)))])

    def meddle(sender: str, _to: str, data: bytes) -> list[bytes]:
        with lock:
            extra = [mutated(data) for _ in range(8)]
            sent["down" if sender == SERVER else "up"] += len(extra)
        return [*extra[:4], data, *extra[4:]]

    settings, hub = recipe(**SPLIT | LABELS_STAY), Hub(meddle)
    alone = run(settings, tmp_path / "alone")
    started = sites(hub, split="yes")
    served(study_of(settings, NAMES, quorum=3), tmp_path / "served", hub)
    assert min(sent.values()) >= 300
    assert adapter_of(tmp_path / "served") == adapter_of(alone.folder)
    assert all(site.thread.is_alive() and site.worker.dropped.total > 100 for site in started)


def test_lost_and_doubled_frames_change_nothing(recipe: Recipe, sites: StartSites, tmp_path: Path) -> None:
    rng, lock = stream(2, "losses"), threading.Lock()

    def meddle(_sender: str, _to: str, data: bytes) -> list[bytes]:
        with lock:
            draw = rng.random()
        return [] if draw < 0.07 else [data, data] if draw < 0.25 else [data]

    settings, hub = recipe(**SPLIT | LABELS_STAY), Hub(meddle)
    alone = run(settings, tmp_path / "alone")
    sites(hub, split="yes")
    served(study_of(settings, NAMES, quorum=3), tmp_path / "served", hub)
    assert adapter_of(tmp_path / "served") == adapter_of(alone.folder)


@pytest.mark.parametrize("keeps_folder", [True, False], ids=["its folder kept", "its folder lost"])
def test_a_site_that_ends_in_a_period_is_out_to_the_next_and_comes_back(
    keeps_folder: bool, recipe: Recipe, sites: StartSites, site_rows: Path, base_folder: Path, tmp_path: Path
) -> None:
    started: list[SiteThread] = []
    back: list[SiteThread] = []
    round = 0

    def meddle(sender: str, to: str, data: bytes) -> list[bytes]:
        nonlocal round
        if to != NAMES[1] or sender != SERVER:
            return [data]
        found = unframe(data, TO_SITE, 1 << 30)[0]
        round = getattr(found, "round", round)
        if back or round != 2 or found.kind != "gradients" or found.step != 3:
            return [data]
        started[1].link.hub = Hub()  # the process is gone, in the second step of the second period
        started[1].stop.set()
        if not keeps_folder:
            shutil.rmtree(tmp_path / "state" / NAMES[1] / "runs")
        rows = site_rows / "training" / "local_training_1.json"
        back.append(SiteThread(site_of(NAMES[1], rows, tmp_path / "state", base_folder, split="yes"), hub))
        return []

    hub = Hub(meddle)
    changes = SPLIT | {"split__cut_layer": [1, 2, 2], "federation__num_rounds": 4}
    started += sites(hub, split="yes")
    try:
        served(study_of(recipe(**changes), NAMES, quorum=3, step_deadline_s=5.0), tmp_path / "served", hub)
    finally:
        for site in back:
            site.end()
    rounds = records_of(tmp_path / "served")
    reasons = [record["clients"][1]["reason"] for record in rounds]
    assert [reason is None for reason in reasons] == [True, False, True, True]
    assert rounds[1]["clients"][1]["left_at"]["step"] >= 3
    assert "came back; it takes part again" in reasons[1]
    assert [record["sites"][1]["memory_lost"] for record in rounds] == [False, False, not keeps_folder, False]
    if keeps_folder:
        assert adapter_of(tmp_path / "served") == replayed(recipe, tmp_path / "served", **changes)


def test_a_silent_site_is_waited_for_to_the_steps_deadline_and_no_longer(
    recipe: Recipe, sites: StartSites, tmp_path: Path
) -> None:
    def meddle(sender: str, _to: str, data: bytes) -> list[bytes]:
        return [] if sender == NAMES[2] and b'"activations"' in data else [data]

    hub, changes = Hub(meddle), SPLIT | {"federation__num_rounds": 1}
    sites(hub, split="yes")
    served(study_of(recipe(**changes), NAMES, quorum=2, step_deadline_s=2.0), tmp_path / "served", hub)
    (record,) = records_of(tmp_path / "served")
    assert record["clients"][2]["reason"] == "did not answer within 2 s at step 0"
    assert record["clients"][2]["left_at"] == {"step": 0, "micro_batch": 0, "stage": "activations"}
    assert adapter_of(tmp_path / "served") == replayed(recipe, tmp_path / "served", **changes)


def test_the_server_goes_on_from_the_last_period_after_a_kill(
    recipe: Recipe, sites: StartSites, tmp_path: Path
) -> None:
    steps: list[int] = []

    class KilledError(Exception):
        pass

    def meddle(sender: str, to: str, data: bytes) -> list[bytes]:
        if to == SERVER and sender == NAMES[0] and b'"activations"' in data:
            steps.append(len(steps))
        return [data]

    settings, hub = recipe(**SPLIT), Hub(meddle)
    alone = run(settings, tmp_path / "alone")
    sites(hub, split="yes")
    study, take = study_of(settings, NAMES, quorum=3), sites_engine.Attendance.take

    def dying(engine: Any) -> Any:
        if len(steps) == 4:
            raise KilledError
        return take(engine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sites_engine.Attendance, "take", dying)
        with pytest.raises(KilledError):
            served(study, tmp_path / "served", hub)
    assert len(records_of(tmp_path / "served")) == 1
    served(study, tmp_path / "served", hub)
    assert adapter_of(tmp_path / "served") == adapter_of(alone.folder)


def test_a_run_of_a_cut_model_keeps_its_sites(recipe: Recipe, sites: StartSites, tmp_path: Path) -> None:
    hub, settings = Hub(), recipe(**SPLIT | SHORT | {"federation__num_rounds": 1})
    sites(hub, split="yes")
    served(study_of(settings, NAMES, quorum=1), tmp_path / "served", hub)
    with pytest.raises(
        RunError, match=r"got other sites \(sites\.names\); a cut model keeps its sites: go on with berl"
    ):
        served(study_of(settings, [*NAMES, "paris"], quorum=1), tmp_path / "served", hub)


def sheet(**changes: Any) -> Sheet:
    document: dict[str, Any] = {
        "sites": {"names": ["a"]},
        "method": {"name": "splitlora", "ranks": 8},
        "training": {"local_steps": 30, "batch_size": 8},
    }
    split = {
        "cut_layer": 1,
        "tail_blocks": None,
        "segments": ((0,),),
        "client_half": "trained",
        "num_steps": 300,
        "aggregate_every": 40,
        "micro_batches": 2,
        "wire_dtype": "bf16",
        "gradient_wire_dtype": "bf16",
        "error_feedback": "off",
    }
    cut = ClientCut(8, 2.0, SheetSplit(**split | changes))
    settings = resolve_study(document, "study.toml").settings
    return sheet_of(settings, 0, "0" * 32, "ab" * 32, "ab" * 32, False, cut)


@pytest.mark.parametrize(
    ("line", "changes", "code"),
    [
        ({}, {"tail_blocks": 1}, "split"),
        ({"split": "labels-stay"}, {}, "labels"),
        ({"split": "yes", "max_rounds": 7}, {}, "rounds"),
        ({"split": "yes", "max_steps_per_round": 39}, {}, "steps"),
        ({"split": "labels-stay"}, {"tail_blocks": 1}, None),
        ({"split": "yes"}, {}, None),
    ],
)
def test_a_policy_says_whether_activations_and_labels_may_cross(
    line: dict[str, Any], changes: dict[str, Any], code: str | None
) -> None:
    refusal = policy.of_sheet(Policy(**line), sheet(**changes))
    assert (None if refusal is None else refusal.code) == code
    if code in ("split", "labels"):
        assert "policy.split" in policy.in_words(refusal)


def test_a_pass_of_a_cut_model_has_the_rows_of_a_micro_batch() -> None:
    facts = (20, 100)
    assert policy.of_inputs(Policy(max_tokens_per_pass=400), sheet(), *facts) is None
    refusal = policy.of_inputs(Policy(max_tokens_per_pass=399), sheet(), *facts)
    assert refusal is not None
    assert refusal.numbers == {"asked": 400, "allowed": 399}


def test_a_policy_that_refuses_is_named_in_the_record(recipe: Recipe, sites: StartSites, tmp_path: Path) -> None:
    hub = Hub()
    sites(hub)
    with pytest.raises(Exception, match=r"policy\.split"):
        served(study_of(recipe(**SPLIT), NAMES, quorum=1, deadline_s=1.0), tmp_path / "served", hub)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"training__local_steps": None, "training__local_epochs": 1.0}, "training.local_steps: expected a number"),
        ({"sites__evaluate": "sites"}, "sites.evaluate: expected server"),
        ({"model__quantization": "8bit"}, "model.quantization: expected none"),
        ({"sites__withdrawn": ["b"]}, "sites.withdrawn: expected nobody"),
        ({"sites__version": 2}, "sites.version: expected 1 in a study of a cut model, which keeps its sites, got 2"),
        ({"method__name": "fedit", "sites__step_deadline_s": 5.0}, "sites.step_deadline_s: expected none"),
    ],
)
def test_what_a_cut_study_cannot_be_is_refused_in_one_line(changes: dict[str, Any], told: str) -> None:
    document: dict[str, dict[str, Any]] = {
        "sites": {"names": ["a", "b"]},
        "method": {"name": "splitlora", "ranks": 2},
        "training": {"local_steps": 2},
    }
    for name, value in changes.items():
        table, _, key = name.partition("__")
        document.setdefault(table, {})[key] = value
        if value is None:
            del document[table][key]
    with pytest.raises(SettingsError) as refusal:
        resolve_study(document, "study.toml")
    assert told in str(refusal.value)


@pytest.mark.extra("sites")
def test_a_cut_model_over_grpc_gives_the_adapter_of_one_process(
    recipe: Recipe, site_rows: Path, base_folder: Path, tmp_path: Path
) -> None:
    settings, root, started = recipe(**SPLIT), ThrowawayRoot(), []
    alone = run(settings, tmp_path / "alone")
    kit = read_kit(root.write(tmp_path / "server", "server", "server"), "server")

    class Dialled(Hub):
        def end(self, name: str) -> Any:
            own = read_kit(root.write(tmp_path / name, "client", name), "client")
            return GrpcSiteLink(f"127.0.0.1:{link.port}", own, 1 << 26, lambda note: None, lambda why: None)

    def listening(_study: Any, largest: int) -> Any:
        nonlocal link
        link = GrpcServerLink("127.0.0.1:0", kit, NAMES, largest)
        for number, name in enumerate(NAMES):
            rows = site_rows / "training" / f"local_training_{number}.json"
            started.append(SiteThread(site_of(name, rows, tmp_path / "state", base_folder, split="yes"), Dialled()))
        return link

    link: Any = None
    try:
        serve(study_of(settings, NAMES, quorum=3), tmp_path / "served", listening)
    finally:
        for site in started:
            site.end()
    assert adapter_of(tmp_path / "served") == adapter_of(alone.folder)
