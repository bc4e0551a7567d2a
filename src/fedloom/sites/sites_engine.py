"""The server's engine over a link: sites answer in any order, at any time or never; a round's result does not show it.

Answers are handed on in the order of the broadcasts, so that sums round as they do in one process. A site that comes
back inside a round is asked again; one that had answered sends its answer again without training. Who did not count is
known by name and reason, and the site's own memory follows what counted (``Task.counted``).
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from fedloom.clients.memory import Memory
from fedloom.data.tokens import TokenSet
from fedloom.errors import RunError, UpdateError
from fedloom.federation.blob import WireDtype
from fedloom.federation.intake import Arrival
from fedloom.federation.rounds import RoundPlan
from fedloom.federation.sum_terms import SumTerms
from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import Adapter
from fedloom.methods.masked_sums import MaskedSums
from fedloom.methods.state import Broadcast, ServerState
from fedloom.privacy.secure_sum.steps import Ask
from fedloom.sites import policy
from fedloom.sites.dropped import Dropped
from fedloom.sites.frame_parts import Members
from fedloom.sites.frames import FORMAT, TO_SERVER, Body, End, Hello, Ready, SheetSent, frame, unframe
from fedloom.sites.link import Link
from fedloom.sites.sheet import Sheet
from fedloom.sites.site_state import SiteState
from fedloom.sites.sites_round import SitesRound
from fedloom.sites.sites_sum import SitesSum
from fedloom.training.row_losses import RowLosses, row_losses_of

ASK_AGAIN_SECONDS = 5.0
"""A sheet or task that shows no effect for this long may be lost, and is sent again."""
SLOW_LINE_BYTES = 1 << 20
"""What a line is taken to carry in a second: while a large task may still be on its way, it is not sent again."""
SHOWN_SECONDS = 60.0
"""A line per site is shown after every round, and this often while one lasts."""
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Patience:
    """How long a round waits: for the quorum until the deadline, for the others a while longer."""

    quorum: int = 1
    deadline_s: float = 3600.0
    grace_s: float = 120.0


@dataclass(kw_only=True)
class Attendance:
    """Who is there: the server's end of a link, whatever is trained over it.

    Attributes:
        sheets: of every client, whose numbers are the positions of ``names``.
        members: who takes part by the study's version, as the sites are told.
        counted: the last round in which each client's update counted; whoever runs the rounds keeps it.
        rows: rows that each site has told; filled as they become ready.
    """

    link: Link
    names: Sequence[str]
    sheets: Sequence[Sheet]
    wire: WireDtype
    patience: Patience
    note: Callable[[str], None]
    rows: dict[int, int]
    members: Members | None = None
    counted: dict[int, int] = field(default_factory=dict)
    versions: str = ""
    clock: Callable[[], float] = time.monotonic
    dropped: Dropped = field(default_factory=Dropped)

    def __post_init__(self) -> None:
        away = () if self.members is None else self.members.withdrawn
        self.sites = {name: SiteState(name, client, name in away) for client, name in enumerate(self.names)}
        self.run = self.sheets[0].run
        self._bodies = [sheet.model_dump_json().encode() for sheet in self.sheets]
        self._largest = 1 << 16
        self._shown, self._away = self.clock(), set[str]()

    def wait_for(self, quorum: int, seconds: float) -> None:
        """Wait until so many sites are ready.

        Raises:
            RunError: they are not, in that time.
        """
        until = self.clock() + seconds
        while (found := sum(site.is_usable for site in self.sites.values())) < quorum:
            if self.clock() > until:
                now = self.clock()
                states = "; ".join(site.line(now) for site in self.sites.values())
                raise RunError(
                    f"expected {quorum} sites (sites.quorum) within {seconds:g} s (sites.deadline_s), got {found} "
                    f"({states}); start the sites, then run the same command again"
                )
            self.take()

    def is_lost(self, sent: float | None, num_bytes: int = 0) -> bool:
        """Tell whether so many bytes that were sent then should have shown an effect by now."""
        return sent is not None and self.clock() - sent > ASK_AGAIN_SECONDS + num_bytes / SLOW_LINE_BYTES

    def report(self) -> list[dict[str, Any]]:
        """Return where every site stands, for the round's record."""
        now = self.clock()
        connections = self.link.connections
        return [{**site.as_dict(now), "connections": connections[site.name]} for site in self.sites.values()]

    def lines(self) -> list[str]:
        """Return a line per site, for people."""
        now = self._shown = self.clock()
        return [site.line(now) for site in self.sites.values()]

    def catch_up(self) -> None:
        """Read what came while the server was busy between two rounds, so that who greeted is not taken for away."""
        for _ in range(self.link.inbox.qsize()):
            self.take()

    def end(self) -> None:
        """Tell every site that the run is complete."""
        for name in self.names:
            self.link.send(name, frame(End(run=self.run)))

    def expect(self, largest_body: int) -> None:
        """Take in no longer bodies than this."""
        self._largest = max(1 << 16, largest_body)

    def greet(self, site: SiteState) -> None:
        """Send a site its sheet; it is repeated until the site is ready."""
        site.sheet_sent = self.clock()
        self.link.send(
            site.name, frame(SheetSent(run=self.run, format=FORMAT, members=self.members), self._bodies[site.client])
        )

    def take(self) -> tuple[SiteState, Any, Body] | None:
        """Take one message, and note what it says of its site; None where there is none, or it was dropped."""
        self._repeat_sheets()
        self._show()
        try:
            name, data = self.link.inbox.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            return None
        site = self.sites.get(name)
        if site is None or site.is_withdrawn:
            self.dropped.add(name, "stranger")
            return None
        try:
            head, body = unframe(data, TO_SERVER, self._largest)
        except UpdateError:
            self.dropped.add(name, "damaged")
            return None
        site.last_seen = self.clock()
        if isinstance(head, Hello):
            self._take_hello(site, head)
        elif head.run != self.run:
            self.dropped.add(name, "run")
            return None
        elif isinstance(head, Ready):
            self._take_ready(site, head)
        return site, head, body

    def _take_hello(self, site: SiteState, hello: Hello) -> None:
        if hello.run != self.run or site.ready is None:
            if hello.run != self.run:
                site.ready = site.posted = None
            if site.sheet_sent is None or self.clock() - site.sheet_sent >= 1.0:
                self.greet(site)
        mine = self.versions
        if (theirs := f"fedloom {hello.fedloom}, torch {hello.torch}") != site.versions:
            site.versions = theirs
            if mine and theirs != mine:
                self.note(f"{site.name} has {theirs}, the server {mine}: results may differ in rounding")

    def _take_ready(self, site: SiteState, ready: Ready) -> None:
        if ready.sheet != sha256(self._bodies[site.client]).hexdigest():
            self.dropped.add(site.name, "sheet")
            return
        is_news = site.ready is None or site.ready.refusal != ready.refusal
        site.ready, site.posted = ready, None
        site.held = site.held_version(self.counted.get(site.client, 0))
        if ready.refusal is None:
            self.rows[site.client] = ready.rows
        if is_news:
            why = "" if ready.refusal is None else f", but it refuses: {policy.in_words(ready.refusal)}"
            self.note(f"{site.name} is ready: {ready.rows} rows, holds version {site.held}{why}")

    def _show(self) -> None:
        """Show where all stand every now and then while something lasts, and at once who is away, or back."""
        now = self.clock()
        if not self.link.inbox.empty():  # the server was busy: what came meanwhile is not read yet
            return
        if now - self._shown >= SHOWN_SECONDS:
            for line in self.lines():
                self.note(f"  {line}")
        for site in self.sites.values():
            is_away = site.last_seen is not None and not site.is_near(now)
            if is_away != (site.name in self._away):
                self._away ^= {site.name}
                self.note(site.line(now) if is_away else f"{site.name} is back")

    def _repeat_sheets(self) -> None:
        """Send a sheet again where it may have been lost: while a site is registered anew, a message can be."""
        now = self.clock()
        for site in self.sites.values():
            if site.ready is None and site.is_near(now) and self.is_lost(site.sheet_sent):
                self.greet(site)


@dataclass(kw_only=True)
class SitesEngine(Attendance):
    """fedloom's ``Engine`` over a link.

    Attributes:
        state: the server's, of the last completed round; whoever runs the rounds keeps it.
        tasks: what names each client's task of the round.
    """

    lora: LoRAModel
    plan: RoundPlan
    state: ServerState
    tasks: dict[int, str] = field(default_factory=dict)

    @property
    def clients_at_once(self) -> int:
        """Return 1: a site is one client."""
        return 1

    def train(self, broadcasts: Sequence[Broadcast]) -> Iterator[Arrival]:
        """Give every site its task, and yield what came back in the order of the broadcasts."""
        if not broadcasts:
            return
        for site in self.sites.values():
            site.posted, site.is_whole_sent, site.left_out, site.seconds = None, False, None, None
        arrivals: dict[int, Arrival] = {}
        round = SitesRound(self, broadcasts, self.plan.strategy.client.work(broadcasts[0].round), arrivals)
        self.tasks = round.keys
        round.run()
        for broadcast in broadcasts:
            yield arrivals[broadcast.client]

    def sum_of(self, terms: SumTerms) -> Ask:
        """Return what hands the sites the messages of a sum of what they have just trained."""
        strategy = self.plan.strategy
        assert isinstance(strategy, MaskedSums)
        return SitesSum(self, terms, strategy.num_numbers)

    def held(self) -> Mapping[int, Memory]:
        """Return nothing: what clients keep lies at the sites."""
        return {}

    def row_losses(self, adapter: Adapter, rows: TokenSet, token_budget: int) -> RowLosses:
        """Return the loss of every row that the server itself holds out."""
        return row_losses_of(self.lora, adapter, rows, token_budget=token_budget)
