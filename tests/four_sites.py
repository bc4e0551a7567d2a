"""Four sites with kits of one project, of which one may drop out of a masked sum; and the same in one process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from memory_link import Hub, SiteThread, adapter_of, site_of, study_of

from fedloom.config import Settings
from fedloom.errors import UpdateError
from fedloom.experiment.session import run
from fedloom.federation.intake import Arrival
from fedloom.federation.rounds import Engine
from fedloom.methods.state import Broadcast
from fedloom.privacy.secure_sum.steps import Member, Step
from fedloom.seeding import stream
from fedloom.sites.site_settings import SiteSettings
from fedloom.sites.study import Study
from fedloom.sites.throwaway_certificates import ThrowawayRoot

FOUR = ["berlin", "lima", "oslo", "rome"]
SIZES = (20, 12, 16, 9)
RANKS = [4, 2, 1, 2]


def write_rows(folder: Path) -> Path:
    """Write a file of rows for each of the four, in the layout that a natural partition reads."""
    rng, words = stream(4, "site rows"), ["red", "blue", "one", "two", "cat", "dog"]
    folder.mkdir()
    for number, size in enumerate(SIZES):
        rows = [
            {"instruction": " ".join(rng.choice(words, size=2)), "context": "", "response": str(rng.choice(words))}
            for _ in range(size)
        ]
        (folder / f"local_training_{number}.json").write_text(json.dumps(rows))
    return folder


class Four:
    """Four sites with kits of one project, their study, and the settings of one process with the same rows."""

    def __init__(self, recipe: Callable[..., Settings], base: Path, tmp_path: Path) -> None:
        self._recipe, self._base, self.path = recipe, base, tmp_path
        self.rows, self.root = write_rows(tmp_path / "rows"), ThrowawayRoot()
        self.kit = self.root.write(tmp_path / "kits" / "server", "server", "server")
        for name in FOUR:
            self.root.write(tmp_path / "kits" / name, "client", name)
        self.started: list[SiteThread] = []

    def settings(self, **changes: Any) -> Settings:
        own = {
            "data__path": str(self.rows),
            "method__name": "zero-padding",
            "method__ranks": RANKS,
            "federation__num_clients": 4,
            "federation__num_rounds": 2,
            "privacy__sum": "masked",
        }
        return self._recipe(**{**own, **changes})

    def study(self, settings: Settings, **sites: Any) -> Study:
        return study_of(settings, FOUR, kit=str(self.kit), **{"quorum": 3, "grace_s": 0.3, **sites})

    def site(self, number: int, **policy: Any) -> SiteSettings:
        name = FOUR[number]
        found = site_of(name, self.rows / f"local_training_{number}.json", self.path / "state", self._base, **policy)
        kit = found.site.model_copy(update={"kit": str(self.path / "kits" / name)})
        return found.model_copy(update={"site": kit})

    def start(self, hub: Hub, *numbers: int, **policy: Any) -> list[SiteThread]:
        started = [SiteThread(self.site(number, **policy), hub) for number in numbers or range(4)]
        self.started += started
        return started


def alone(settings: Settings, folder: Path, lost: dict[int, tuple[int, Step]]) -> bytes:
    """Return the adapter of one process in which by round a client leaves the sum before a message."""
    from fedloom.experiment import loop

    shown, answer, now = loop.ShownEngine, Member.answer, [0]

    class Watched:
        def __init__(self, engine: Engine) -> None:
            self._engine = engine

        def train(self, broadcasts: list[Broadcast]) -> Iterator[Arrival]:
            now[0] = broadcasts[0].round
            return self._engine.train(broadcasts)

    def leaving(member: Member, step: Step, message: bytes) -> bytes:
        if lost.get(now[0]) == (member.number, step):
            raise UpdateError("its battery was empty")
        return answer(member, step, message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "ShownEngine", lambda engine, progress: Watched(shown(engine, progress)))
        patch.setattr(Member, "answer", leaving)
        run(settings, folder)
    return adapter_of(folder)
