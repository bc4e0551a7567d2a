"""A study served over gRPC inside this process: mutated frames change nothing of the result."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from memory_link import NAMES, SiteThread, joined, site_of, study_of

from fedloom.config import Settings
from fedloom.experiment.session import run
from fedloom.seeding import stream
from fedloom.sites.frames import MAX_HEAD_BYTES
from fedloom.sites.grpc_link import GrpcServerLink, GrpcSiteLink
from fedloom.sites.kit import read_kit
from fedloom.sites.link import Frame, Link
from fedloom.sites.serving import serve
from fedloom.sites.throwaway_certificates import ThrowawayRoot

pytestmark = pytest.mark.extra("sites")
LARGEST = MAX_HEAD_BYTES + (1 << 20)


class Mutating:
    """A link that sends mutated copies of every frame around it."""

    def __init__(self, link: Link, number: int) -> None:
        self.link, self.inbox, self.connections = link, link.inbox, link.connections
        self.close, self._number, self.num_sent = link.close, number, 0
        self._rng, self._lock = stream(3, "mutations", number), threading.Lock()

    def send(self, to: str, frame: Frame) -> bool:
        with self._lock:
            copies = [self._mutated(joined(frame)) for _ in range(self._number)]
        half = self._number // 2
        sent = [self.link.send(to, data) for data in [*copies[:half], frame, *copies[half:]]]
        self.num_sent += sum(sent)
        return sent[half]

    def _mutated(self, data: bytes) -> bytes:
        changed = bytearray(data)
        changed[int(self._rng.integers(len(changed)))] ^= 1 << int(self._rng.integers(8))
        end = len(data) if self._rng.random() < 0.7 else int(self._rng.integers(1, len(data)))
        return bytes(changed[:end])


@pytest.mark.slow
def test_a_thousand_mutated_frames_each_way_over_grpc_are_not_taken(
    recipe: Callable[..., Settings], site_rows: Path, base_folder: Path, tmp_path: Path
) -> None:
    settings, root = recipe(), ThrowawayRoot()
    alone = run(settings, tmp_path / "alone")
    kit = read_kit(root.write(tmp_path / "kit", "server", "server"), "server")
    server = Mutating(GrpcServerLink("127.0.0.1:0", kit, tuple(NAMES), LARGEST), 100)
    links: dict[str, Mutating] = {}

    def dialled(name: str) -> Any:
        own = read_kit(root.write(tmp_path / name, "client", name), "client")
        link = GrpcSiteLink(f"127.0.0.1:{server.link.port}", own, LARGEST, print, print)  # type: ignore[attr-defined]
        links[name] = Mutating(link, 100)
        return links[name]

    class Hub:
        end = staticmethod(dialled)

    sites: list[SiteThread] = []
    try:
        for number, name in enumerate(NAMES):
            rows = site_rows / "training" / f"local_training_{number}.json"
            site = site_of(name, rows, tmp_path / "state", base_folder)
            sites.append(SiteThread(site, Hub(), hello_seconds=2.0))  # type: ignore[arg-type]
        serve(study_of(settings, NAMES, quorum=3), tmp_path / "served", lambda study, largest: server)
        assert server.num_sent >= 1000
        assert sum(link.num_sent for link in links.values()) >= 1000
        assert all(site.thread.is_alive() and site.worker.dropped.total > 100 for site in sites)
    finally:
        for site in sites:
            site.end()
    adapter = Path("adapter", "adapter_model.safetensors")
    assert (tmp_path / "served" / adapter).read_bytes() == (alone.folder / adapter).read_bytes()
