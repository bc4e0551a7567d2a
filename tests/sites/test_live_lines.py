"""What a coordinator sees while a round lasts: a line per site now and then, and at once who is away or back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from memory_link import NAMES, Hub

from fedloom.federation.blob import WireDtype
from fedloom.reporting.page.clients import _sites_table
from fedloom.sites import sites_engine
from fedloom.sites.frames import FORMAT, Hello, frame
from fedloom.sites.link import SERVER
from fedloom.sites.sheet import sheet_of
from fedloom.sites.sites_engine import Attendance, Patience
from fedloom.sites.study import resolve_study

RUN, SHA = "0" * 32, "ab" * 32


class Watched:
    """Attendance at a clock of the test's, and what it notes."""

    def __init__(self) -> None:
        document: dict[str, Any] = {"sites": {"names": NAMES}, "training": {"local_steps": 1}}
        settings = resolve_study(document, "study.toml").settings
        sheets = [sheet_of(settings, client, RUN, SHA, SHA, scores=False) for client in range(len(NAMES))]
        self.now, self.notes, hub = 0.0, list[str](), Hub()
        link = hub.end(SERVER)
        self.attendance = Attendance(
            link=link,
            names=NAMES,
            sheets=sheets,
            wire=WireDtype.FP32,
            patience=Patience(),
            note=self.notes.append,
            rows={},
            clock=lambda: self.now,
        )
        self.site = hub.end(NAMES[0])

    def at(self, now: float, greets: bool) -> list[str]:
        """Let a site greet or not, and return what is noted."""
        self.now = now
        self.notes.clear()
        if greets:
            self.site.send(SERVER, frame(Hello(format=FORMAT, fedloom="1", torch="1", run=RUN, state="ready")))
        self.attendance.take()
        self.attendance._show()
        return list(self.notes)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    monkeypatch.setattr(sites_engine, "_POLL_SECONDS", 0.0)
    return Watched()


def test_every_site_has_a_line_once_a_minute_while_a_round_lasts(watched: Watched) -> None:
    assert watched.at(50.0, greets=True) == []
    lines = watched.at(61.0, greets=False)
    assert lines == [
        "  berlin: loading, holds version 0, seen 11 s ago",
        "  oslo: never seen, holds version 0",
        "  rome: never seen, holds version 0",
    ]
    assert watched.at(69.0, greets=True) == []


def test_a_site_that_is_away_is_named_at_once_and_when_it_is_back(watched: Watched) -> None:
    assert watched.at(1.0, greets=True) == []
    assert watched.at(15.0, greets=False) == []
    (line,) = watched.at(22.0, greets=False)
    assert line == "berlin: away, holds version 0, seen 21 s ago"
    assert watched.at(25.0, greets=False) == []
    assert watched.at(27.0, greets=True) == ["berlin is back"]


def test_a_site_that_greeted_while_the_server_was_busy_is_not_away(watched: Watched) -> None:
    watched.at(1.0, greets=True)
    watched.now = 100.0
    watched.site.send(SERVER, frame(Hello(format=FORMAT, fedloom="1", torch="1", run=RUN, state="ready")))
    watched.notes.clear()
    watched.attendance.catch_up()
    assert watched.notes == []
    assert watched.attendance.report()[0]["state"] == "loading"


def test_the_report_has_what_the_lines_have(watched: Watched) -> None:
    watched.at(1.0, greets=True)
    watched.now = 3.0
    site = watched.attendance.sites["berlin"]
    site.last_loss, site.seconds, site.held = 1.25, 4.5, 7
    sites = json.loads(json.dumps(watched.attendance.report()))
    reason = "did not answer within 3 s"
    clients = [{"name": name, "reason": reason if name == "oslo" else None} for name in NAMES]
    page = _sites_table([{"round": 1, "sites": sites, "clients": clients}])
    for told in (
        "berlin",
        "loading",
        "7",
        "2 s before",
        "1.2500",
        "4.5",
        "round 1: did not answer within 3 s",
        "never",
    ):
        assert told in page
