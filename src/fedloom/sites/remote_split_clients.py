"""The seam to the clients of a split run over a link: each client's half runs at its site.

What is sent to a site within a period has a number, and is kept until an answer shows that it arrived. A site's
greeting says which number it waits for: what was lost on the way is sent again, and done once. So a broken connection
costs time and no step. A site that fails, ends or is silent for longer than a step's deadline is out until the next
period, under its name and with the reason; whose message it is, the link says and never the message.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedloom.federation.broadcasts import encode_broadcast
from fedloom.federation.messages import largest_answer
from fedloom.federation.server import addressed
from fedloom.lora.pair import Adapter
from fedloom.methods.state import Broadcast, Failure, Update
from fedloom.methods.strategy import Strategy
from fedloom.sites import policy
from fedloom.sites.frames import Body, Hello, Ready, frame
from fedloom.sites.site_state import SiteState
from fedloom.sites.sites_engine import Attendance
from fedloom.sites.split_answers import message_of, updates_of
from fedloom.sites.split_frames import (
    Activations,
    Begin,
    Begun,
    Collect,
    Failed,
    Finish,
    Gradients,
    Hidden,
    InPeriod,
    Request,
    TailGradients,
    Updates,
)
from fedloom.split.client_seam import Memory
from fedloom.split.cut_messages import SplitMessage, largest_split_message
from fedloom.split.plan import Segment, SplitPlan
from fedloom.split.split_state import SplitState


@dataclass
class _Line:
    """One site within a period: what it was sent and may not have, which answers are due, and which have come."""

    site: SiteState
    sent: int = 0
    unanswered: list[tuple[int, bytes]] = field(default_factory=list)
    due: dict[int, type[InPeriod]] = field(default_factory=dict)
    arrived: dict[int, tuple[Any, Body]] = field(default_factory=dict)
    touched: float = 0.0
    has_begun: bool = False
    is_over: bool = False
    failed: str | None = None


@dataclass
class RemoteSplitClients:
    """``SplitClients`` over a link.

    Attributes:
        state: the server's, of the last completed period; whoever runs the periods keeps it.
        width, max_length: numbers of an activation, and tokens of a row, by which messages are bounded.
        deadline_s: how long an answer within a period is waited for.
    """

    attendance: Attendance
    plan: SplitPlan
    segments: Sequence[Segment]
    strategy_of: Callable[[Segment], Strategy]
    width: int
    max_length: int
    deadline_s: float
    state: SplitState = field(init=False)

    def __post_init__(self) -> None:
        self._lines: dict[int, _Line] = {}
        self._broadcasts: Mapping[int, Sequence[Broadcast]] = {}
        self._asked: dict[tuple[int, int], dict[int, int]] = {}
        self._period, self._round = "", 0

    def begin(
        self, round: int, broadcasts: Mapping[int, Sequence[Broadcast]], memory: Mapping[int, Memory]
    ) -> list[Failure]:
        """Begin with the sites that are there; wait for the others as a round does, by quorum, grace and deadline."""
        attendance = self.attendance
        self._period, self._round, self._broadcasts, self._asked = secrets.token_hex(16), round, broadcasts, {}
        self._lines = {client: _Line(attendance.sites[attendance.names[client]]) for client in broadcasts}
        for site in attendance.sites.values():
            site.posted, site.is_whole_sent, site.left_out, site.seconds = None, False, None, None
        attendance.expect(self.largest_body())
        began, quorum_at = attendance.clock(), None
        while waiting := [line for line in self._lines.values() if not line.has_begun and line.failed is None]:
            for line in waiting:
                self._invite(line)
            now, begun = attendance.clock(), sum(line.has_begun for line in self._lines.values())
            if begun >= min(attendance.patience.quorum, len(self._lines)):
                quorum_at = quorum_at or now
            near = [line for line in waiting if line.site.is_near(now)]
            grace = quorum_at is not None and (not near or now - quorum_at > attendance.patience.grace_s)
            if grace or now - began > attendance.patience.deadline_s:
                break
            self._take()
        for line in self._lines.values():
            if not line.has_begun and line.failed is None:
                what = "did not begin" if line.sent else "was not reachable"
                self._fail(line, f"{what} within {attendance.clock() - began:.0f} s")
        return [Failure(client, line.failed) for client, line in self._lines.items() if line.failed is not None]

    def request(self, step: int, micro_batch: int, rows: Mapping[int, Sequence[int]]) -> None:
        """Ask for a micro-batch; which rows it has every site knows, unless only some of them cross."""
        asked = self._asked[step, micro_batch] = dict[int, int]()
        for client, own in rows.items():
            named = tuple(own) if self.plan.is_frozen else None
            head = Request(**self._place(client), step=step, micro_batch=micro_batch, rows=named)
            asked[client] = self._send(client, head, b"", Activations)

    def activations(self, step: int, micro_batch: int) -> list[SplitMessage | Failure]:
        """Return what was asked for, as it was sent: what it holds is the intake's to check."""
        return self._messages(self._asked.pop((step, micro_batch)), f"step {step}")

    def tails(self, hidden: Sequence[SplitMessage]) -> list[SplitMessage | Failure]:
        """Let the sites run their last blocks."""
        asked = {}
        for message in hidden:
            head = Hidden(**self._place(message.client), step=message.step, micro_batch=message.micro_batch)
            asked[message.client] = self._send(message.client, head, message.to_bytes(), TailGradients)
        return self._messages(asked, f"step {hidden[0].step}")

    def gradients(self, messages: Sequence[SplitMessage]) -> None:
        """Send the gradients of a micro-batch's activations."""
        for message in messages:
            head = Gradients(**self._place(message.client), step=message.step, micro_batch=message.micro_batch)
            self._send(message.client, head, message.to_bytes())

    def finish(self, step: int, clients: Sequence[int]) -> Iterable[Failure]:
        """Let the sites step; who cannot says so in place of its next answer, which is not waited for here."""
        for client in clients:
            self._send(client, Finish(**self._place(client), step=step))
        return ()

    def end(self, clients: Sequence[int]) -> list[tuple[int, list[Update]] | Failure]:
        """Collect the updates."""
        asked = {client: self._send(client, Collect(**self._place(client)), b"", Updates) for client in clients}
        found: list[tuple[int, list[Update]] | Failure] = []
        for client, answer in self._gathered(asked, "the period's end").items():
            line = self._lines[client]
            line.is_over, line.site.posted = True, None
            if isinstance(answer, Failure):
                found.append(answer)
                continue
            head, body = answer
            asked_of = zip(self._broadcasts[client], self._own(client), strict=True)
            parts = [(sent, own.shapes, self.strategy_of(own).client.work(self._round)) for sent, own in asked_of]
            updates = updates_of(client, head.sizes, body, parts, self.attendance.wire, self.plan.seed)
            if isinstance(updates, Failure):
                found.append(updates)
                continue
            self._note_held(line.site, head)
            if updates:
                found.append((client, updates))
        return found

    def memory(self) -> dict[int, Memory]:
        """Return nothing: what clients carry over lies at the sites."""
        return {}

    def restore(self, version: int, sides: Sequence[Adapter]) -> None:
        """Do nothing: sites say themselves which version they hold."""

    def largest_body(self) -> int:
        """Return the most bytes that the body of a site's frame can have."""
        plan, wire = self.plan, self.attendance.wire
        rows = plan.training.batch_size if plan.is_frozen else -(-plan.training.batch_size // plan.micro_batches)
        passing = largest_split_message(rows * self.max_length, self.width)
        updates = 0
        for client, received in self._broadcasts.items():
            works = [self.strategy_of(segment).client.work(self._round) for segment in self._own(client)]
            parts = zip(received, works, self._own(client), strict=True)
            updates = max(updates, sum(largest_answer(b, work, own.shapes, wire) for b, work, own in parts))
        return max(passing, updates)

    def _own(self, client: int) -> list[Segment]:
        return [segment for segment in self.segments if client in segment.owners]

    def _place(self, client: int) -> dict[str, Any]:
        return {"run": self.attendance.run, "period": self._period, "number": self._lines[client].sent}

    def _invite(self, line: _Line) -> None:
        """Send a site its broadcasts, with the news since the version that it holds; all of the side if it says so."""
        site, attendance = line.site, self.attendance
        if site.refusal is not None:
            self._fail(line, policy.in_words(site.refusal))
        if line.sent or not site.is_usable or line.failed is not None:
            return
        counted = attendance.counted.get(site.client, 0)
        held = None if site.is_whole_sent else min(site.held_version(counted), self.state.round)
        states = zip(self.segments, self.state.segments, strict=True)
        own = [(part, state) for part, state in states if site.client in part.owners]
        bodies = [
            encode_broadcast(
                addressed(broadcast, state, self.strategy_of(part), held, attendance.wire), attendance.wire
            )
            for broadcast, (part, state) in zip(self._broadcasts[site.client], own, strict=True)
        ]
        sizes = tuple(len(body) for body in bodies)
        head = Begin(**self._place(site.client), round=self._round, counted=counted, sizes=sizes)
        self._send(site.client, head, b"".join(bodies), Begun)
        site.posted = attendance.clock()

    def _send(self, client: int, head: Any, body: bytes = b"", answer: type[InPeriod] | None = None) -> int:
        """Send a frame, keep it until it is known to have arrived, and return its number."""
        line = self._lines[client]
        number, line.sent = line.sent, line.sent + 1
        if line.failed is None:
            data = frame(head, body)
            line.unanswered.append((number, data))
            if answer is not None:
                line.due[number] = answer
            line.touched = self.attendance.clock()
            self.attendance.link.send(line.site.name, data)
        return number

    def _messages(self, asked: Mapping[int, int], what: str) -> list[SplitMessage | Failure]:
        found: list[SplitMessage | Failure] = []
        for client, answer in self._gathered(asked, what).items():
            name = self._lines[client].site.name
            found.append(answer if isinstance(answer, Failure) else message_of(client, name, answer[1]))
        return found

    def _note_held(self, site: SiteState, head: Updates) -> None:
        site.held, site.seconds = self._round - 1, head.seconds
        if site.ready is not None:
            held = {"kept_version": site.held, "last_round": self._round, "last_version": site.held}
            site.ready = site.ready.model_copy(update=held)

    def _gathered(self, asked: Mapping[int, int], what: str) -> dict[int, tuple[Any, Body] | Failure]:
        """Wait for the answers of these numbers, by client; who sends none in time is out of the period."""
        found: dict[int, tuple[Any, Body] | Failure] = {}
        until = self.attendance.clock() + self.deadline_s
        while True:
            for client, number in asked.items():
                line = self._lines[client]
                if client not in found and number in line.arrived:
                    found[client] = line.arrived.pop(number)
                elif client not in found and line.failed is not None:
                    found[client] = Failure(client, line.failed)
            if len(found) == len(asked):
                return {client: found[client] for client in asked}
            if self.attendance.clock() > until:
                for client in asked.keys() - found.keys():
                    self._fail(self._lines[client], f"did not answer within {self.deadline_s:g} s at {what}")
                continue
            self._take()

    def _take(self) -> None:
        """Take one message of whoever sent it."""
        taken = self.attendance.take()
        if taken is None:
            return
        site, head, body = taken
        line = self._lines.get(site.client)
        if isinstance(head, Hello):
            if line is not None and line.failed is None and not line.is_over:
                self._heard_of(line, head)
        elif isinstance(head, Ready):
            return
        elif line is None or line.failed is not None or getattr(head, "period", None) != self._period:
            self.attendance.dropped.add(site.name, "late")
        elif isinstance(head, Failed):
            self._take_failed(line, head)
        elif line.due.get(head.number) is type(head):
            del line.due[head.number]
            line.touched = self.attendance.clock()
            line.unanswered = [(n, data) for n, data in line.unanswered if n > head.number or n in line.due]
            if isinstance(head, Begun):
                self._take_begun(line, head)
            else:
                line.arrived[head.number] = (head, body)
        else:
            self.attendance.dropped.add(site.name, "late")

    def _take_begun(self, line: _Line, head: Begun) -> None:
        line.has_begun = True
        site, counted = line.site, self.attendance.counted.get(line.site.client, 0)
        site.held, site.memory_lost = self._round - 1, head.memory_of != counted
        if site.memory_lost:
            self.attendance.note(f"{site.name} has lost its optimiser's state, and begins with moments of zero")

    def _take_failed(self, line: _Line, head: Failed) -> None:
        is_behind = head.refusal.code == policy.BEHIND and not line.has_begun
        if is_behind and not line.site.is_whole_sent:
            line.site.is_whole_sent, line.sent, line.due, line.unanswered = True, 0, {}, []
            self.attendance.note(f"{line.site.name} needs the whole side")
        else:
            self._fail(line, policy.in_words(head.refusal))

    def _heard_of(self, line: _Line, head: Hello) -> None:
        """Send again what a site has not got; leave out one that has ended and come back, with what it had done."""
        if line.has_begun and head.period != self._period:
            self._fail(line, policy.in_words(policy.lost()))
        elif line.due and self.attendance.is_lost(line.touched):
            has = head.number if head.period == self._period else 0
            line.touched = self.attendance.clock()
            for number, data in line.unanswered:
                if number >= has or number in line.due:
                    self.attendance.link.send(line.site.name, data)

    def _fail(self, line: _Line, reason: str) -> None:
        line.failed = line.site.left_out = reason
        line.site.posted, line.unanswered, line.due = None, [], {}
