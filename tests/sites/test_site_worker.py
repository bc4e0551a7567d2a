"""A site: what it does with its trainer, its owner's word, and what it writes down."""

from __future__ import annotations

import errno
import os
import queue
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from memory_link import Hub, SiteThread, ThreadTrainer, site_of, study_of

from fedloom.clients.memory import Memory
from fedloom.config import Settings
from fedloom.data.tokenizer import fingerprint
from fedloom.federation.blob import SEAL_BYTES, WireDtype, sealed
from fedloom.federation.broadcasts import encode_broadcast
from fedloom.federation.server import broadcasts_for
from fedloom.methods import table
from fedloom.methods.strategy import Cohort
from fedloom.models.load import load_base
from fedloom.run_folder import durable
from fedloom.sites.frames import FORMAT, TO_SERVER, Hello, Ready, Result, SheetSent, Task, frame, unframe
from fedloom.sites.handover import Stored
from fedloom.sites.link import SERVER
from fedloom.sites.sheet import Sheet, SheetTemplate, sheet_of
from fedloom.sites.site_settings import SiteSettings
from fedloom.sites.store import Ledger, Recall, Store, confirmation
from fedloom.sites.trainer import Trainer, TrainerProcess

RUN = "0" * 32
NAME = "berlin"


@pytest.fixture
def sheet(recipe: Callable[..., Settings], base_folder: Path) -> Sheet:
    base = load_base(base_folder, tokenizer="bytes")
    settings = study_of(recipe(), ["berlin", "oslo", "rome"]).settings
    return sheet_of(settings, 0, RUN, base.revision_hash, fingerprint(base.tokenizer), scores=False)


@pytest.fixture
def settings(base_folder: Path, site_rows: Path, tmp_path: Path) -> SiteSettings:
    return site_of(NAME, site_rows / "training" / "local_training_0.json", tmp_path, base_folder)


def sheet_frame(sheet: Sheet, format: int = FORMAT) -> bytes:
    return frame(SheetSent(run=RUN, format=format), sheet.model_dump_json().encode())


def task_frame(sheet: Sheet, shapes: dict[str, tuple[int, int]], round: int = 1) -> bytes:
    strategy: Any = table.make(
        sheet.method, Cohort(shapes, sheet.rank, lambda client: sheet.rank, sheet.seed), table.MethodOptions()
    )
    state = replace(strategy.initial(), round=round - 1)
    (broadcast,) = broadcasts_for(state, [0], strategy, {0: sheet.rank}, {0: sheet.scale})
    key = sha256(str(round).encode()).hexdigest()
    return frame(Task(run=RUN, round=round, task=key, counted=0), encode_broadcast(broadcast, WireDtype.FP32))


def shapes_of(base_folder: Path) -> dict[str, tuple[int, int]]:
    from fedloom.lora.layer import LoRAModel
    from fedloom.models.families import resolve_targets

    base = load_base(base_folder, tokenizer="bytes")
    return dict(LoRAModel(base.model, resolve_targets(base.model, None)).shapes)


def heads(link: Any, kind: type, seconds: float = 20.0) -> Any:
    """Return the next head of a kind."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            _, data = link.inbox.get(timeout=0.2)
        except queue.Empty:
            continue
        head, _ = unframe(data, TO_SERVER, 1 << 30)
        if isinstance(head, kind):
            return head
    raise AssertionError(f"no {kind.__name__}")


def answered(link: Any) -> tuple[Any, bytes]:
    """Return the next answer to a task."""
    while True:
        head, body = unframe(link.inbox.get(timeout=20)[1], TO_SERVER, 1 << 30)
        if isinstance(head, Result):
            return head, body


def test_a_site_waits_for_its_owner_and_goes_on_when_there_is_a_yes(sheet: Sheet, settings: SiteSettings) -> None:
    own = settings.policy.model_copy(update={"confirm": "first"})
    hub = Hub()
    server, site = hub.end(SERVER), SiteThread(settings.model_copy(update={"policy": own}), hub)
    try:
        server.send(NAME, sheet_frame(sheet))
        assert heads(server, Ready).refusal.code == "unconfirmed"
        yes = confirmation(settings.folder, sha256(sheet.model_dump_json().encode()).hexdigest())
        yes.parent.mkdir(parents=True)
        yes.touch()
        ready = heads(server, Ready)
        assert (ready.refusal, ready.rows) == (None, 20)
    finally:
        site.end()
    assert [entry["event"] for entry in Ledger(settings.folder).entries()] == ["run", "refused"]


def test_another_format_and_another_base_are_refused(sheet: Sheet, settings: SiteSettings) -> None:
    hub = Hub()
    server, site = hub.end(SERVER), SiteThread(settings, hub)
    try:
        server.send(NAME, sheet_frame(sheet, FORMAT + 1))
        assert heads(server, Ready).refusal.code == "format"
        other = sheet.model_copy(update={"base_sha256": "ab" * 32})
        server.send(NAME, sheet_frame(other))
        assert heads(server, Ready).refusal.hashes["study"] == "ab" * 32
    finally:
        site.end()


def test_a_reason_that_crosses_is_a_code_and_never_a_text(sheet: Sheet, settings: SiteSettings, tmp_path: Path) -> None:
    rows = tmp_path / "secret-patients.json"
    rows.write_text('[{"instruction": "secret", "context": "", "response": ""}]')
    hub = Hub()
    data = settings.data.model_copy(update={"path": str(rows)})
    server, site = hub.end(SERVER), SiteThread(settings.model_copy(update={"data": data}), hub)
    try:
        server.send(NAME, sheet_frame(sheet))
        while True:
            _, raw = server.inbox.get(timeout=20)
            assert b"secret" not in raw
            head, _ = unframe(raw, TO_SERVER, 1 << 20)
            if isinstance(head, Ready):
                break
        assert head.refusal is not None
        assert head.refusal.code == "data"
    finally:
        site.end()


def test_a_trainer_that_ends_is_told_at_once_and_another_one_trains(
    sheet: Sheet, settings: SiteSettings, base_folder: Path
) -> None:
    """The first trainer dies of the task; the second answers it, and a third time the disk does."""
    hub, lives, task = Hub(), [], task_frame(sheet, shapes_of(base_folder))

    class Mortal(ThreadTrainer):
        def send(self, data: bytes) -> None:
            if b'"task"' in data[:400] and b'"sheet"' not in data[:400] and lives[-1] is self and len(lives) == 1:
                self._ended(-9)
            else:
                super().send(data)

    def start(reply: Callable[[bytes], None], ended: Callable[[int], None]) -> ThreadTrainer:
        trainer = Mortal.__new__(Mortal)
        lives.append(trainer)
        trainer.__init__(settings, reply, ended)  # type: ignore[misc]
        return trainer

    server, site = hub.end(SERVER), SiteThread(settings, hub)
    site.worker.start = start
    try:
        server.send(NAME, sheet_frame(sheet))
        assert heads(server, Ready).refusal is None
        server.send(NAME, task)
        refusal = heads(server, Result).refusal
        assert (refusal.code, refusal.numbers) == ("trainer-ended", {"code": -9})
        while heads(server, Hello).state != "ready":
            pass
        server.send(NAME, task)
        assert heads(server, Result).refusal is None
        server.send(NAME, task)
        assert heads(server, Result).again
    finally:
        site.end()
    entries = [entry for entry in Ledger(settings.folder).entries() if entry["event"] == "task"]
    assert [entry.get("code") or entry["again"] for entry in entries] == ["trainer-ended", False, True]


@pytest.mark.parametrize("rank", [3, 10**6])
def test_a_task_that_is_not_the_sheets_is_refused(
    rank: int, sheet: Sheet, settings: SiteSettings, base_folder: Path
) -> None:
    hub, shapes = Hub(), shapes_of(base_folder)
    server, site = hub.end(SERVER), SiteThread(settings, hub)
    try:
        server.send(NAME, sheet_frame(sheet))
        assert heads(server, Ready).refusal is None
        server.send(NAME, task_frame(sheet.model_copy(update={"rank": rank}), shapes))
        assert heads(server, Result).refusal.code == "message"
    finally:
        site.end()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"rank": 10**6}, "rank"),
        ({"template": SheetTemplate(kind="text", text="/etc/passwd")}, "data"),
        ({"target_modules": ("no_such_module",)}, "model"),
    ],
)
def test_a_hostile_sheet_is_refused_at_the_site(
    changes: dict[str, Any], code: str, sheet: Sheet, settings: SiteSettings
) -> None:
    hub = Hub()
    server, site = hub.end(SERVER), SiteThread(settings, hub)
    try:
        server.send(NAME, sheet_frame(sheet.model_copy(update=changes)))
        assert heads(server, Ready).refusal.code == code
    finally:
        site.end()


def test_a_message_longer_than_the_policy_allows_is_dropped(sheet: Sheet, settings: SiteSettings) -> None:
    own = settings.policy.model_copy(update={"max_message_mib": 1})
    hub = Hub()
    server, site = hub.end(SERVER), SiteThread(settings.model_copy(update={"policy": own}), hub)
    try:
        server.send(NAME, sheet_frame(sheet))
        assert heads(server, Ready).refusal is None
        head = Task(run=RUN, round=1, task="ab" * 32, counted=0)
        server.send(NAME, frame(head, sealed(bytes((1 << 20) - SEAL_BYTES + 1))))
        server.send(NAME, frame(head.model_copy(update={"task": "cd" * 32}), sealed(bytes((1 << 20) - SEAL_BYTES))))
        assert heads(server, Result).task == "cd" * 32
    finally:
        site.end()
    assert site.worker.dropped.counts[SERVER, "damaged"] == 1


def test_a_newer_round_stops_an_older_one_between_two_steps(
    sheet: Sheet, settings: SiteSettings, base_folder: Path
) -> None:
    replies: list[bytes] = []
    trainer, shapes = Trainer(settings, replies.append, lambda text: None), shapes_of(base_folder)
    trainer.handle(trainer.hear(sheet_frame(sheet)))
    first, second = task_frame(sheet, shapes), task_frame(sheet, shapes, 2)
    waiting = trainer.hear(first)
    trainer.hear(second)
    trainer.handle(waiting)
    head, _ = unframe(replies[-1], TO_SERVER, 1 << 30)
    assert head.refusal.code == "superseded"


def test_an_answer_is_handed_over_where_it_was_stored(sheet: Sheet, settings: SiteSettings, base_folder: Path) -> None:
    replies: list[Any] = []
    trainer, task = Trainer(settings, replies.append, lambda text: None), task_frame(sheet, shapes_of(base_folder))
    for data in (sheet_frame(sheet), task):
        trainer.handle(trainer.hear(data))
    stored = replies[-1]
    assert isinstance(stored, Stored)
    body = b"".join(stored[1:])
    assert os.pread(stored.descriptor, len(body) + 1, stored.offset) == body
    trainer.handle(trainer.hear(task))
    assert not isinstance(replies[-1], Stored)  # what is sent again was read
    assert b"".join(replies[-1][1:]) == body


def refuse_writes(patch: pytest.MonkeyPatch, *names: str) -> None:
    """Let the disk refuse what is written by these functions of ``durable``."""

    def full(path: Path, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    for name in names:
        patch.setattr(durable, name, full)


@pytest.mark.parametrize("names", [("write_bytes",), ("append_line",), ("write_bytes", "append_line")])
def test_a_full_disk_costs_answers_and_not_the_membership(
    names: tuple[str, ...], sheet: Sheet, settings: SiteSettings, base_folder: Path
) -> None:
    """What could not be entered in the ledger does not leave."""
    hub, shapes = Hub(), shapes_of(base_folder)
    server, site = hub.end(SERVER), SiteThread(settings, hub)
    try:
        with pytest.MonkeyPatch.context() as patch:
            refuse_writes(patch, *names)
            server.send(NAME, sheet_frame(sheet))
            assert heads(server, Ready).refusal.code == "disk"
        while heads(server, Hello).run is not None:
            pass
        server.send(NAME, sheet_frame(sheet))
        assert heads(server, Ready).refusal is None
        with pytest.MonkeyPatch.context() as patch:
            refuse_writes(patch, *names)
            server.send(NAME, task_frame(sheet, shapes))
            head, body = answered(server)
            assert (head.refusal.code, body) == ("disk", b"")
        server.send(NAME, task_frame(sheet, shapes, 2))
        assert heads(server, Result).refusal is None
        assert site.thread.is_alive()
    finally:
        site.end()
    assert any("the disk is full" in note for note in site.notes)


def test_a_run_for_which_there_was_no_folder_is_loaded_when_there_is(sheet: Sheet, settings: SiteSettings) -> None:
    (settings.folder / "runs").parent.mkdir(parents=True)
    (settings.folder / "runs").write_text("in the way")
    hub = Hub()
    server, site = hub.end(SERVER), SiteThread(settings, hub)
    try:
        server.send(NAME, sheet_frame(sheet))
        assert heads(server, Ready).refusal.code == "disk"
        (settings.folder / "runs").unlink()
        assert heads(server, Ready).refusal is None
    finally:
        site.end()


def test_a_site_whose_folder_is_removed_while_it_runs_goes_on(
    sheet: Sheet, settings: SiteSettings, base_folder: Path
) -> None:
    hub, shapes = Hub(), shapes_of(base_folder)
    server, site = hub.end(SERVER), SiteThread(settings, hub)
    try:
        server.send(NAME, sheet_frame(sheet))
        assert heads(server, Ready).refusal is None
        shutil.rmtree(settings.folder)
        server.send(NAME, task_frame(sheet, shapes))
        assert heads(server, Result).refusal is None
    finally:
        site.end()
    assert Store(settings.folder, RUN).read().round == 1


@pytest.mark.slow
def test_a_killed_trainer_process_is_replaced(sheet: Sheet, settings: SiteSettings, base_folder: Path) -> None:
    hub, lives = Hub(), []

    def start(reply: Callable[[bytes], None], ended: Callable[[int], None]) -> TrainerProcess:
        lives.append(TrainerProcess(settings, reply, ended))
        return lives[-1]

    task = task_frame(sheet, shapes_of(base_folder))
    server, site = hub.end(SERVER), SiteThread(settings, hub)
    site.worker.start = start
    try:
        server.send(NAME, sheet_frame(sheet))
        assert heads(server, Ready, 120).refusal is None
        os.kill(lives[0].pid, signal.SIGKILL)
        while len(lives) < 2:
            time.sleep(0.1)
        while heads(server, Hello, 120).state != "ready":
            pass
        server.send(NAME, task)
        assert heads(server, Result, 120).refusal is None
    finally:
        site.end()


def test_what_is_remembered_comes_back_and_a_damaged_file_is_forgotten(tmp_path: Path) -> None:
    store = Store(tmp_path, RUN)
    assert store.read().round == 0
    store.write(Recall(version=3, round=4, task="ab" * 32), [b"ans", b"wer"])
    found = store.read()
    assert (found.version, found.round, found.task) == (3, 4, "ab" * 32)
    assert store.answer("ab" * 32) == b"answer"
    assert store.answer("cd" * 32) is None
    path = next(tmp_path.rglob("state.safetensors"))
    for size in (0, 5, len(path.read_bytes()) - 3):
        data = path.read_bytes()
        path.write_bytes(data[:size])
        assert store.read().round == 0
        assert store.answer("ab" * 32) is None
        path.write_bytes(data)


def test_a_memory_stays_only_where_its_answer_counted() -> None:
    """Without this a late answer would leave a site with a memory that no replay has."""
    recall = Recall(kept=Memory(version=1), last=Memory(version=4), round=5)
    assert [recall.settled(counted).kept.version for counted in (0, 4, 5, 6)] == [1, 1, 4, 4]
    assert Recall(kept=Memory(version=1)).settled(9).kept.version == 1


def test_a_line_of_the_ledger_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.add(event="run", run=RUN)
    with ledger.path.open("ab") as file:
        file.write(b'{"event": "ta')
    assert [entry["event"] for entry in ledger.entries()] == ["run"]
    ledger.add(event="task", run=RUN)  # as after a disk that was full in the middle of a line
    assert [entry["event"] for entry in ledger.entries()] == ["run", "task"]
