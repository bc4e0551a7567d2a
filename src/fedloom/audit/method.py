"""A method of the table as a subject: its strategy in a first round, or a second, from a random state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedloom.audit.catching_up import distance_of_returned
from fedloom.audit.subject import SHAPES, Contribution, Products, Returned, Scene, asked, products
from fedloom.errors import MethodError
from fedloom.lora.algebra import pad, truncate
from fedloom.lora.initial import Draw
from fedloom.lora.pair import BOTH, Adapter, Factors, Pair, check_finite
from fedloom.methods import table
from fedloom.methods.state import Aggregate, ServerState, Update
from fedloom.methods.strategy import Cohort, Strategy
from fedloom.methods.traits import Law
from fedloom.methods.weave import completed
from fedloom.training.stats import TrainingStats

TOKENS_A_ROW = 7
_ANYBODY = Cohort(SHAPES, 4, lambda client: 4, seed=1)
_SMALL = Cohort(SHAPES, 4, lambda client: 2, seed=1)


@dataclass(frozen=True)
class MethodSubject:
    """A method; ``make`` makes its strategy for a cohort."""

    name: str
    make: Callable[[Cohort], Strategy]
    claims: frozenset[Law]
    needs_one_rank: bool = False

    def exempt(self, law: Law) -> str:
        """Return why a law does not apply: a client that sends one factor cannot factor its product otherwise."""
        work = asked(self.name, lambda: self.make(_ANYBODY).client.work(1))
        if law is Law.RESCALING and work.sends != BOTH:
            return "its clients send one factor; the other is the same for all, or their own"
        if law is Law.ORIENTATION and self.carries:
            return "its clients carry slots that they do not send, and nobody could turn"
        return ""

    @property
    def carries(self) -> bool:
        """Whether a client holds slots of the global adapter beyond its own rank."""
        strategy = asked(self.name, lambda: self.make(_SMALL))
        start = asked(self.name, lambda: strategy.start_for(strategy.initial(), 0))
        return isinstance(start, Adapter) and max(start.ranks.values()) > _SMALL.rank_of(0)

    def trial(self, scene: Scene, registered: Mapping[int, int]) -> MethodTrial:
        """Return a fresh trial."""
        return MethodTrial(self, scene)


def method_subject(name: str) -> MethodSubject:
    """Return a method of the table as a subject.

    Raises:
        MethodError: there is no such method, or it does not average what clients trained.
    """
    traits = table.traits_of(name)
    if not traits.aggregates:
        wanted = ", ".join(table.names("aggregates"))
        raise MethodError(f"expected a method that aggregates ({wanted}) or module:function, got {name!r}; name one")
    work = asked(name, lambda: table.make(name, _ANYBODY).client.work(1))
    if work.is_gradient:
        raise MethodError(f"method {name}: expected one that sends factors, this one sends gradients; name another")
    claims = frozenset(law for law in Law if law not in traits.unclaimed)
    return MethodSubject(name, lambda cohort: table.make(name, cohort), claims, traits.needs_one_rank)


class MethodTrial:
    """One strategy in one scene; odd seeds take it in its first round, even ones in its second."""

    def __init__(self, subject: MethodSubject, scene: Scene) -> None:
        self._name, self._scene, self._carries = subject.name, scene, subject.carries
        self._cohort = Cohort(SHAPES, max(scene.ranks), scene.rank_of, scene.seed)
        self._make, self._changed = subject.make, ""
        self._strategy = self._asked(lambda: subject.make(self._cohort))
        state = self._asked(self._strategy.initial)
        start = scene.draw(self._cohort.max_rank, "start") if state.start else None
        self._state = replace(state, start=start, round=1 - scene.seed % 2)

    @property
    def trains(self) -> Factors:
        """The factors that the round's clients train and send; one that stays with its client is no server's."""
        return self._strategy.client.work(self._state.round + 1).sends

    def before(self) -> Products:
        """Return the product of the global adapter, zeros where every round starts fresh."""
        if self._state.start is not None:
            return products(self._state.start)
        return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}

    def given(self, client: int) -> Adapter:
        """Return a client's start."""
        start = self._asked(lambda: self._strategy.start_for(self._state, client))
        if isinstance(start, Draw):
            start = start.adapter(SHAPES, self._scene.rank_of(client), self._cohort.seed)
        return start.to(torch.float64)

    def ended(self, client: int, factors: Adapter) -> Adapter:
        """Return a client's start with the factors that it trains replaced."""
        given, rank = self.given(client), self._scene.rank_of(client)
        own = truncate(factors, rank)
        filled = completed(own, given) if self._carries else pad(own, rank)
        return given.with_factors(filled.as_tensors(self.trains))

    def combined(self, round: Sequence[Contribution]) -> Products:
        """Return the product that the strategy puts in place of the clients' own."""
        state, start = self._copied_state(), self._state.start
        given = [replace(one, adapter=_copy(one.adapter)) for one in round]
        applied = self._applied(lambda: self._strategy.aggregate(state, map(self._update, given)))
        if start and state.start and not _same(start, state.start):
            self._changed = "the state's start"
        if not all(_same(one.adapter, other.adapter) for one, other in zip(round, given, strict=True)):
            self._changed = "an update"
        return applied

    def grouped(self, groups: Sequence[Sequence[Contribution]]) -> Products:
        """Return the same from sums over groups, merged."""

        state = self._copied_state()

        def merged() -> Aggregate:
            whole: Any = self._strategy.empty(state)
            for group in groups:
                part = self._strategy.empty(state)
                for one in group:
                    part.add(self._update(replace(one, adapter=_copy(one.adapter))))
                whole.merge(part)
            aggregate: Aggregate = self._strategy.finish(state, whole)
            return aggregate

        return self._applied(merged)

    def caught_up(self) -> float | str:
        """Return how far clients that missed rounds are from the server, after some rounds of the real protocol."""
        strategy = self._asked(lambda: self._make(self._cohort))
        return self._asked(lambda: distance_of_returned(strategy, self._scene))

    def changed(self) -> str:
        """Return whether updates or the state were changed."""
        return self._changed

    def _asked(self, call: Callable[[], Returned]) -> Returned:
        return asked(self._name, call)

    def _applied(self, aggregate: Callable[[], Aggregate]) -> Products:
        applied: Adapter = self._asked(lambda: aggregate().applied)
        check_finite(applied, self._name, "correct its aggregate")
        return products(applied)

    def _copied_state(self) -> ServerState:
        start = self._state.start
        return replace(self._state, start=_copy(start) if start else None)

    def _update(self, one: Contribution) -> Update:
        tokens = one.rows * TOKENS_A_ROW
        stats = TrainingStats(one.rows, tokens, tokens, 1)
        return Update(self._state.round + 1, one.client, truncate(one.adapter, self._scene.rank_of(one.client)), stats)


def _copy(adapter: Adapter) -> Adapter:
    return Adapter({name: Pair(pair.b_OR.clone(), pair.a_RI.clone()) for name, pair in adapter.items()})


def _same(left: Adapter, right: Adapter) -> bool:
    ours, theirs = left.as_tensors(), right.as_tensors()
    return all(torch.equal(ours[key], theirs[key]) for key in ours)
