"""One round over a link: who is asked, who is waited for and how long, and what came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from fedloom.engines.receiving import arrival_of
from fedloom.federation.broadcasts import broadcast_buffers
from fedloom.federation.buffers import num_bytes
from fedloom.federation.intake import Arrival
from fedloom.federation.messages import largest_answer
from fedloom.federation.server import addressed
from fedloom.lora.pair import Adapter
from fedloom.methods.client_half import Work
from fedloom.methods.side import digest
from fedloom.methods.state import Broadcast, Failure, Update
from fedloom.sites import policy
from fedloom.sites.frames import Body, Hello, Ready, Result, Task, framed
from fedloom.sites.site_state import SiteState
from fedloom.training.stats import TrainingStats

if TYPE_CHECKING:
    from fedloom.sites.sites_engine import SitesEngine

_UNSEEN = TrainingStats(0)
"""Of an update that stays with its site: its counts are what was registered, and it tells no loss."""


@dataclass
class SitesRound:
    """One round of the engine: who is waited for, and what came."""

    engine: SitesEngine
    broadcasts: Sequence[Broadcast]
    work: Work
    arrivals: dict[int, Arrival]

    def __post_init__(self) -> None:
        self.waiting = {broadcast.client: broadcast for broadcast in self.broadcasts}
        self.keys = task_keys(self.engine.run, self.broadcasts)
        self.sent = dict.fromkeys(self.waiting, 0)
        self.begun = self.engine.clock()
        self.quorum_at: float | None = None
        shapes, wire = self.engine.plan.shapes, self.engine.wire
        self.engine.expect(max(largest_answer(b, self.work, shapes, wire) for b in self.broadcasts))

    def run(self) -> None:
        """Ask, and take answers until all have come or the round waits no longer."""
        for client in list(self.waiting):
            self._post(client)
        while self.waiting and not self._is_over():
            self._take()
        seconds = self.engine.clock() - self.begun
        for client in list(self.waiting):
            site = self._site(client)
            asked = "did not answer" if site.posted is not None else "was not reachable"
            self._fail(client, f"{asked} within {seconds:.0f} s")

    def _take(self) -> None:
        taken = self.engine.take()
        if taken is not None:
            self._hear(*taken)

    def _is_over(self) -> bool:
        engine, now = self.engine, self.engine.clock()
        if now - self.begun > engine.patience.deadline_s:
            return True
        used = sum(isinstance(arrival.outcome, Update) for arrival in self.arrivals.values())
        if used < min(engine.patience.quorum, len(self.broadcasts)):
            return False
        self.quorum_at = self.quorum_at or now
        at_work = [c for c in self.waiting if self._site(c).posted is not None and self._site(c).is_near(now)]
        return not at_work or now - self.quorum_at > engine.patience.grace_s

    def _hear(self, site: SiteState, head: object, body: Body) -> None:
        client = site.client
        if isinstance(head, Result) and (client not in self.waiting or head.task != self.keys[client]):
            self.engine.dropped.add(site.name, "late")
        elif client not in self.waiting:
            return
        elif isinstance(head, Ready):
            self._post(client)
        elif isinstance(head, Hello):
            is_idle = site.posted is None or (self._is_lost(site) and head.task != self.keys[client])
            if site.is_usable and is_idle:
                self._post(client)
        elif isinstance(head, Result):
            self._take_result(site, head, body)

    def _is_lost(self, site: SiteState) -> bool:
        """Tell whether a task is lost; on the connection it was sent on, a large one may be on its way for long."""
        is_same = self.engine.link.connections[site.name] == site.posted_on
        return self.engine.is_lost(site.posted, site.posted_bytes if is_same else 0)

    def _take_result(self, site: SiteState, head: Result, body: Body) -> None:
        client, refusal, site.epsilon = site.client, head.refusal, head.epsilon
        if refusal is not None and refusal.code == policy.BEHIND and not site.is_whole_sent:
            site.is_whole_sent = True
            self.engine.note(f"{site.name} needs the whole side")
            self._post(client)
        elif refusal is not None:
            self._fail(client, policy.in_words(refusal))
        else:
            self._take_answer(site, head, body)

    def _take_answer(self, site: SiteState, head: Result, body: Body) -> None:
        client, engine = site.client, self.engine
        if engine.plan.masking is not None and body:
            self._fail(client, "expected no update in a masked round, got one; run the same version on both sides")
            return
        broadcast, shapes = self.waiting.pop(client), engine.plan.shapes
        seed = engine.sheets[client].seed
        if engine.plan.masking is None:
            arrival = arrival_of(
                body, broadcast, self.sent[client], work=self.work, shapes=shapes, wire=engine.wire, seed=seed
            )
        else:  # it has trained, and what it came to crosses in the sum alone
            stays = Update(head.round, client, Adapter(), _UNSEEN, broadcast.news.version)
            arrival = Arrival(stays, self.sent[client], 0)
        outcome = arrival.outcome
        site.posted, site.seconds = None, head.seconds
        if isinstance(outcome, Update):
            stats, site.held = outcome.stats, outcome.held
            site.last_loss = stats.loss_nats if stats.tells_loss else None
            assert site.ready is not None
            site.ready = site.ready.model_copy(
                update={"last_round": head.round, "last_version": outcome.held, "kept_version": self._kept(site)}
            )
        else:
            site.left_out = outcome.reason
        self.arrivals[client] = arrival

    def _kept(self, site: SiteState) -> int:
        return site.held_version(self.engine.counted.get(site.client, 0))

    def _post(self, client: int) -> None:
        """Give a site its task, with the news since the version that it holds; all of the side where it says so."""
        engine, site, broadcast = self.engine, self._site(client), self.waiting[client]
        if site.refusal is not None:
            self._fail(client, policy.in_words(site.refusal))
            return
        if not site.is_usable:
            return
        counted = engine.counted.get(client, 0)
        held = None if site.is_whole_sent else min(site.held_version(counted), engine.state.round)
        body = broadcast_buffers(
            addressed(broadcast, engine.state, engine.plan.strategy, held, engine.wire), engine.wire
        )
        task = Task(run=engine.run, round=broadcast.round, task=self.keys[client], counted=counted)
        if engine.link.send(site.name, framed(task, body)):
            site.posted, site.posted_bytes = engine.clock(), num_bytes(body)
            site.posted_on = engine.link.connections[site.name]
            self.sent[client] += site.posted_bytes
        else:
            site.posted = None

    def _fail(self, client: int, reason: str) -> None:
        site = self._site(client)
        site.posted, site.left_out = None, reason
        self.arrivals[client] = Arrival(Failure(client, reason), self.sent[client], 0)
        del self.waiting[client]

    def _site(self, client: int) -> SiteState:
        return self.engine.sites[self.engine.names[client]]


def task_keys(run: str, broadcasts: Sequence[Broadcast]) -> dict[int, str]:
    """Return by client what names its task, whatever version its site holds: run, round, and what training starts from.

    A start that several clients share is hashed once.
    """
    begins: dict[int, str] = {}
    keys = {}
    for broadcast in broadcasts:
        start = broadcast.start
        if id(start) not in begins:
            begins[id(start)] = digest(start) if isinstance(start, Adapter) else f"{start.name} {start.rank}"
        place = f"{run} {broadcast.round} {broadcast.client} {broadcast.rank} {broadcast.scale!r}"
        named = f"{place} {broadcast.news.sha256} {begins[id(start)]}"
        keys[broadcast.client] = sha256(named.encode()).hexdigest()
    return keys
