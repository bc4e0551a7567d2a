"""A masked sum over a link: each step is asked of the sites that are in it, and waited for as a round is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from fedloom.federation.sum_terms import SumTerms
from fedloom.privacy.secure_sum.fixed_point import WORD_BYTES
from fedloom.privacy.secure_sum.steps import Answers, Step
from fedloom.privacy.secure_sum.wire import MAX_SIGNATURE_BYTES, SEALED_BYTES
from fedloom.sites import policy
from fedloom.sites.frames import Body, Hello, Ready, frame
from fedloom.sites.site_state import SiteState
from fedloom.sites.sum_frames import SumAnswered, SumAsked, Terms

if TYPE_CHECKING:
    from fedloom.sites.sites_engine import SitesEngine

_ROOM = 1 << 10


def largest_sum_message(num_members: int, num_numbers: int) -> int:
    """Return the most bytes that a site's message of a sum can have."""
    return max(WORD_BYTES * num_numbers, num_members * (SEALED_BYTES + 4), MAX_SIGNATURE_BYTES) + _ROOM


@dataclass
class SitesSum:
    """One attempt at a round's sum; called once a step, in order.

    A step waits for the threshold until the deadline, and for the others ``grace_s`` more. Who does not answer in time
    has left the sum. A message that may be lost is sent again, and answered alike.
    """

    engine: SitesEngine
    terms: SumTerms
    num_numbers: int
    _waiting: dict[int, bytes] = field(default_factory=dict)
    _sent: dict[int, float] = field(default_factory=dict)
    _sent_on: dict[int, int] = field(default_factory=dict)
    _found: dict[int, bytes] = field(default_factory=dict)
    _left: dict[int, str] = field(default_factory=dict)
    _step: Step = Step.KEYS

    def __call__(self, step: Step, messages: Mapping[int, bytes]) -> Answers:
        """Hand each site its message, and return what came back in time."""
        engine, n = self.engine, len(self.terms.members)
        self._step, self._waiting, self._found, self._left = step, dict(messages), {}, {}
        self._sent, self._sent_on = {}, {}
        engine.expect(largest_sum_message(n, self.num_numbers))
        begun, enough_at = engine.clock(), None
        for client in list(self._waiting):
            self._post(client)
        while self._waiting:
            now = engine.clock()
            if enough_at is None and len(self._found) >= self.terms.threshold:
                enough_at = now
            if self._is_over(now - begun, None if enough_at is None else now - enough_at):
                break
            taken = engine.take()
            if taken is not None:
                self._hear(*taken)
        for client in list(self._waiting):
            self._leave(client, f"left the secure sum: no answer at step {step} in {engine.clock() - begun:.0f} s")
        return Answers(self._found, self._left)

    def _is_over(self, seconds: float, since_enough: float | None) -> bool:
        patience = self.engine.patience
        if seconds > patience.deadline_s or len(self._found) + len(self._waiting) < self.terms.threshold:
            return True
        if since_enough is None:
            return False
        now = self.engine.clock()
        return since_enough > patience.grace_s or not any(self._site(client).is_near(now) for client in self._waiting)

    def _hear(self, site: SiteState, head: object, body: Body) -> None:
        client = site.client
        if isinstance(head, SumAnswered):
            is_due = (head.token, head.round, head.step) == (self.terms.token, self.terms.round, self._step)
            if client not in self._waiting or not is_due:
                self.engine.dropped.add(site.name, "late")
            elif head.refusal is not None:
                self._leave(client, policy.in_words(head.refusal))
            else:
                self._found[client] = bytes(body)
                self._done(client)
        elif client not in self._waiting:
            return
        elif isinstance(head, Ready) or (isinstance(head, Hello) and site.is_usable and self._is_lost(site)):
            self._post(client)

    def _is_lost(self, site: SiteState) -> bool:
        """Tell whether a message may be lost; on the connection it was sent on, a large one may be on its way."""
        connections = self.engine.link.connections[site.name]
        is_same = connections == self._sent_on.get(site.client)
        sent = self._sent.get(site.client)
        return sent is None or self.engine.is_lost(sent, len(self._waiting[site.client]) if is_same else 0)

    def _post(self, client: int) -> None:
        """Send a site the step's message; one that is not there is sent it when it says that it is."""
        engine, site, terms = self.engine, self._site(client), self.terms
        if site.refusal is not None:
            self._leave(client, policy.in_words(site.refusal))
            return
        if not site.is_usable:
            return
        told = Terms(**{key: value for key, value in asdict(terms).items() if key in Terms.model_fields})
        head = SumAsked(
            run=engine.run,
            round=terms.round,
            token=terms.token,
            step=self._step.value,
            task=engine.tasks[client],
            terms=told if self._step is Step.KEYS else None,
        )
        if engine.link.send(site.name, frame(head, self._waiting[client])):
            site.posted = self._sent[client] = engine.clock()
            self._sent_on[client] = engine.link.connections[site.name]

    def _leave(self, client: int, reason: str) -> None:
        self._left[client] = reason
        self._done(client)

    def _done(self, client: int) -> None:
        self._site(client).posted = None
        del self._waiting[client]

    def _site(self, client: int) -> SiteState:
        return self.engine.sites[self.engine.names[client]]
