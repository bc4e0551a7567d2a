"""Links in memory for tests: queues, with what a test wants to happen to a frame; and a trainer in a thread."""

from __future__ import annotations

import json
import queue
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedloom.config import Settings
from fedloom.experiment.run_summary import RunSummary
from fedloom.experiment.session import run
from fedloom.sites.link import CONNECTED, SERVER, Frame
from fedloom.sites.serving import serve
from fedloom.sites.site_settings import SiteSettings, resolve_site
from fedloom.sites.site_worker import SiteWorker
from fedloom.sites.study import Study, resolve_study
from fedloom.sites.trainer import Heard, Trainer

NAMES = ["berlin", "oslo", "rome"]
Meddle = Callable[[str, str, bytes], list[bytes]]
"""From sender, receiver and frame to what arrives of it."""


def adapter_of(folder: Path) -> bytes:
    """Return the adapter of the run in a folder."""
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def records_of(folder: Path) -> list[dict[str, Any]]:
    """Return the records of the rounds of the run in a folder."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def replayed(recipe: Callable[..., Settings], folder: Path, **changes: Any) -> bytes:
    """Return the adapter of one process in which those take part who counted in a served run, and no longer."""
    run(recipe(**changes, federation__participation=str(folder)), folder.with_name("replayed"))
    return adapter_of(folder.with_name("replayed"))


def joined(frame: Frame) -> bytes:
    """Return a frame in one piece, as it arrives."""
    return b"".join(frame if isinstance(frame, list) else [frame])


@dataclass
class Hub:
    """Connects ends by name."""

    meddle: Meddle = lambda sender, to, data: [data]
    ends: dict[str, MemoryLink] = field(default_factory=dict)

    def end(self, name: str) -> MemoryLink:
        link = self.ends[name] = MemoryLink(name, self)
        if name != SERVER:
            link.inbox.put((SERVER, CONNECTED))
        return link


@dataclass
class MemoryLink:
    """One end."""

    name: str
    hub: Hub
    inbox: queue.Queue[tuple[str, bytes]] = field(default_factory=queue.Queue)
    connections: Counter[str] = field(default_factory=Counter)

    def send(self, to: str, frame: Frame) -> bool:
        other = self.hub.ends.get(to)
        if other is None:
            return False
        for data in self.hub.meddle(self.name, to, joined(frame)):
            other.inbox.put((self.name, data))
        return True

    def close(self) -> None:
        if self.hub.ends.get(self.name) is self:
            del self.hub.ends[self.name]


class ThreadTrainer:
    """A trainer in a thread of this process, in place of a process of its own."""

    def __init__(
        self,
        site: SiteSettings,
        reply: Callable[[bytes], None],
        ended: Callable[[int], None],
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._trainer = Trainer(site, self._answer, note)
        self._reply, self._ended, self._is_closed = reply, ended, False
        self._waiting: queue.Queue[Heard | None] = queue.Queue()
        threading.Thread(target=self._work, daemon=True).start()

    def send(self, data: bytes) -> None:
        self._waiting.put(self._trainer.hear(data))

    def close(self) -> None:
        self._is_closed = True
        self._waiting.put(None)

    def _answer(self, data: Frame) -> None:
        if not self._is_closed:
            self._reply(joined(data))

    def _work(self) -> None:
        while (heard := self._waiting.get()) is not None:
            self._trainer.handle(heard)


@dataclass
class SiteThread:
    """A site in a thread."""

    site: SiteSettings
    hub: Hub
    notes: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    hello_seconds: float = 0.1

    def __post_init__(self) -> None:
        self.stop = threading.Event()
        self.link = self.hub.end(self.site.site.name)
        self.worker = SiteWorker(
            self.site,
            self.link,
            lambda reply, ended: ThreadTrainer(self.site, reply, ended, self.log.append),
            self.notes.append,
            self.hello_seconds,
        )
        self.thread = threading.Thread(target=self.worker.run, args=(self.stop,), daemon=True)
        self.thread.start()

    def end(self) -> None:
        self.link.close()
        self.stop.set()
        self.thread.join(20)


def site_of(name: str, rows: Path, folder: Path, base: Path, **policy: Any) -> SiteSettings:
    """Return a site's settings."""
    document = {
        "site": {"name": name, "server": "localhost:1", "kit": "kit", "folder": str(folder / name)},
        "data": {"path": str(rows)},
        "model": {"base": str(base), "tokenizer": "bytes"},
        "policy": {"confirm": "never", **policy},
    }
    return resolve_site(document, "site.toml")


def study_of(settings: Settings, names: list[str], *, held_out_at: str = "server", **sites: Any) -> Study:
    """Return the study that trains as the settings of one process do."""
    document = settings.as_dict()
    kept = ("model", "method", "server", "training", "privacy", "split", "wire", "evaluation", "run")
    data = {key: document["data"][key] for key in ("shape", "template", "overlong", "max_length", "loss_on")}
    sites["evaluate"] = held_out_at
    if held_out_at == "server":
        data["eval_path"] = document["data"]["eval_path"]
    data = {key: value for key, value in data.items() if value is not None}
    federation = {
        key: value
        for key, value in document["federation"].items()
        if key in ("num_rounds", "min_clients", "clients_per_round", "sampling") and value is not None
    }
    tables = {name: {k: v for k, v in document[name].items() if v is not None} for name in kept}
    given = {**tables, "data": data, "federation": federation, "sites": {"names": names, "deadline_s": 60.0, **sites}}
    return resolve_study(given, "study.toml")


def served(study: Study, out: Path, hub: Hub) -> RunSummary:
    """Serve a study over a hub."""
    return serve(study, out, lambda study, largest: hub.end(SERVER))
