"""Every shipped method keeps what it claims, what it does not claim it misses, and planted defects are found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from fedloom.audit.battery import BROKEN, EXEMPT, UNCLAIMED, Audit, audit
from fedloom.audit.method import MethodSubject, method_subject
from fedloom.errors import MethodError
from fedloom.federation import server
from fedloom.lora.algebra import stack
from fedloom.lora.initial import Draw
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods import table
from fedloom.methods.client_half import ClientHalf, EveryRound, Work
from fedloom.methods.fedex import FedEx
from fedloom.methods.flora import FLoRA, Initialisation, Stack
from fedloom.methods.rolora import RoLoRA
from fedloom.methods.state import Aggregate, News, ServerState
from fedloom.methods.strategy import Cohort, Strategy, Weighting
from fedloom.methods.sums import FactorSum
from fedloom.methods.table import Method
from fedloom.methods.traits import Law, Traits
from fedloom.methods.zero_padding import ZeroPadding, fedit

METHODS = table.shipped("aggregates")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_keeps_every_law_that_it_claims_and_misses_every_other(name: str) -> None:
    found = audit(method_subject(name))
    assert not found.broken, found.lines()
    unclaimed = {one.law for one in found.findings if one.verdict == UNCLAIMED}
    assert unclaimed == set(table.traits_of(name).unclaimed)
    assert not [one.law for one in found.findings if one.verdict == UNCLAIMED and one.holds]
    exempt = {one.law for one in found.findings if one.verdict == EXEMPT}
    assert exempt <= {Law.RESCALING, Law.NO_OP_RANKS, Law.ORIENTATION, Law.CATCH_UP}
    assert (Law.ORIENTATION in exempt) == (name in ("weave", "carry"))
    assert (Law.CATCH_UP in exempt) == table.traits_of(name).is_personal
    assert (Law.NO_OP_RANKS in exempt) == table.traits_of(name).needs_one_rank


@pytest.mark.parametrize(
    ("make", "unclaimed"),
    [
        (lambda c: FLoRA(c, initialisation=Initialisation.SHARED), set()),
        (
            lambda c: ZeroPadding(c, Weighting.NORM),
            {Law.EXACTNESS, Law.RESCALING, Law.NO_OP_RANKS, Law.SPLITTING},
        ),
        (lambda c: ZeroPadding(c, Weighting.TOKENS), {Law.EXACTNESS, Law.RESCALING, Law.NO_OP_RANKS}),
        (lambda c: FLoRA(c, Weighting.UNIFORM), {Law.EXACTNESS, Law.SPLITTING}),
    ],
    ids=["flora, shared draws", "zero-padding by norm", "zero-padding by tokens", "flora, uniform"],
)
def test_a_method_under_other_options_misses_these_laws_only(
    make: Callable[[Cohort], Strategy], unclaimed: set[Law]
) -> None:
    assert set(audited(make).broken) == unclaimed


# ---- planted defects -----------------------------------------------------------------------------------------------


class CountsTwice(FLoRA):
    def finish(self, state: ServerState, sums: Stack) -> Aggregate:
        found = super().finish(state, sums)
        first = sorted(sums.adapters)[0]
        return replace(found, side=stack([found.side, sums.adapters[first]], [1.0, found.weights[first]]))


class TransposesItsResidual(FedEx):
    def finish(self, state: ServerState, sums: FactorSum) -> Aggregate:
        found = super().finish(state, sums)
        side = {
            name: Pair(pair.a_RI.T, pair.b_OR.T) if pair.shape[0] == pair.shape[1] else pair
            for name, pair in found.side.items()
        }
        return replace(found, side=Adapter(side))


class NormalisesOverAllItHasSeen(FLoRA):
    def finish(self, state: ServerState, sums: Stack) -> Aggregate:
        known = self.__dict__.setdefault("known", {})
        known |= sums.weights
        found = super().finish(state, sums)
        return replace(found, side=found.side.scaled(sum(sums.weights.values()) / sum(known.values())))


class KeepsTheFirst(ZeroPadding):
    """A running mean whose merge forgets what it is given."""

    def empty(self, state: ServerState) -> FactorSum:
        sums = super().empty(state)
        sums.merge = lambda other: None if sums.weights else FactorSum.merge(sums, other)  # type: ignore[method-assign]
        return sums


class DividesByTheRank(FLoRA):
    def finish(self, state: ServerState, sums: Stack) -> Aggregate:
        scaled = {k: one.scaled(1 / self.cohort.rank_of(k)) for k, one in sums.adapters.items()}
        return super().finish(state, replace(sums, adapters=scaled))


@dataclass(frozen=True)
class ChangesAThatNobodyTrains(ZeroPadding):
    """Its clients train B and draw A once for all; the server changes A none the less."""

    @property
    def client(self) -> ClientHalf:
        return EveryRound(Work(trains=frozenset("b"), sends=frozenset("b")))

    @property
    def origin(self) -> Draw:
        return self.drawn

    def finish(self, state: ServerState, sums: FactorSum) -> Aggregate:
        found = super().finish(state, sums)
        assert found.start is not None
        moved = {name: Pair(pair.b_OR, 2.0 * pair.a_RI) for name, pair in found.start.items()}
        return replace(found, start=Adapter(moved))


class ScalesInPlace(FLoRA):
    def finish(self, state: ServerState, sums: Stack) -> Aggregate:
        found = super().finish(state, sums)
        for one in sums.adapters.values():
            for pair in one.values():
                pair.b_OR.mul_(2.0)
        return found


class ForgetsModules(FLoRA):
    def finish(self, state: ServerState, sums: Stack) -> Aggregate:
        raise KeyError("layers.0.q")


class DoublesA(RoLoRA):
    """Right in its first round, in which B is trained, and wrong in the second."""

    def finish(self, state: ServerState, sums: FactorSum) -> Aggregate:
        found = super().finish(state, sums)
        assert found.start is not None
        return replace(found, start=found.start.scaled(2.0)) if state.round % 2 else found


class ScalesItsStart(ZeroPadding):
    def finish(self, state: ServerState, sums: FactorSum) -> Aggregate:
        found = super().finish(state, sums)
        assert state.start is not None
        for pair in state.start.values():
            pair.b_OR.mul_(2.0)
        return found


def audited(make: Callable[[Cohort], Strategy], *unclaimed: Law, needs_one_rank: bool = False) -> Audit:
    return audit(MethodSubject("mine", make, frozenset(Law) - set(unclaimed), needs_one_rank))


NOISY = {Law.EXACTNESS, Law.RESCALING}
ALONE = {Law.EXACTNESS, Law.ONE_CLIENT, Law.NORMALISATION}
AGREED = ALONE | {Law.EQUAL_CLIENTS}


@pytest.mark.parametrize(
    ("make", "needs_one_rank", "laws"),
    [
        (CountsTwice, False, AGREED | {Law.SPLITTING}),
        (DividesByTheRank, False, AGREED),
        (fedit, True, NOISY),
        (TransposesItsResidual, True, {*NOISY, Law.ORIENTATION}),
        (NormalisesOverAllItHasSeen, False, ALONE | {Law.PARTIAL}),
        (ChangesAThatNobodyTrains, False, AGREED | {Law.NO_OP, Law.NO_OP_RANKS, Law.CATCH_UP}),
        (DoublesA, False, AGREED | {Law.NO_OP, Law.NO_OP_RANKS, Law.CATCH_UP}),
        (ScalesInPlace, False, {Law.INPUTS}),
        (ScalesItsStart, False, {*NOISY, Law.NO_OP_RANKS, Law.INPUTS}),
        (KeepsTheFirst, False, {*NOISY, Law.NO_OP_RANKS, Law.STREAMING}),
    ],
)
def test_a_planted_defect_is_found_by_exactly_the_laws_that_it_breaks(
    make: Callable[[Cohort], Strategy], needs_one_rank: bool, laws: set[Law]
) -> None:
    found = audited(make, needs_one_rank=needs_one_rank)
    assert set(found.broken) == laws
    assert {one.law for one in found.findings if one.note and one.verdict == BROKEN} <= {Law.INPUTS}


@pytest.mark.parametrize(
    ("name", "function", "replacement"),
    [
        ("rolora", "_crossing", lambda state, strategy, client: strategy.client.work(state.round).trains),
        (
            "flora",
            "news_for",
            lambda state, version, sha256: News(version, state.round, state.chain[-1:], False, sha256),
        ),
    ],
    ids=["factors of the last round only", "the last addition only"],
)
def test_a_server_that_forgets_how_long_a_client_was_away_is_found(
    name: str, function: str, replacement: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, function, replacement)
    assert audit(method_subject(name)).broken == (Law.CATCH_UP,)


def test_a_strategy_that_fails_is_told_in_one_line_a_law() -> None:
    found = audited(ForgetsModules)
    assert {one.verdict for one in found.findings} == {BROKEN}
    assert {one.note for one in found.findings} == {"mine raised KeyError: 'layers.0.q'; correct it"}


# ---- what is audited -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "standalone", "splitlora"])
def test_a_method_that_aggregates_nothing_is_rejected(name: str) -> None:
    with pytest.raises(MethodError, match=rf"expected a method that aggregates \(fedit, .*got '{name}'; name one"):
        method_subject(name)


def test_a_method_of_ones_own_claims_every_law_that_its_traits_do_not_except() -> None:
    table.register_method(Method(Traits("mine", "ours", unclaimed=(Law.STREAMING,)), "fedloom.methods.makers:flora"))
    try:
        assert method_subject("mine").claims == set(Law) - {Law.STREAMING}
    finally:
        table.unregister_method("mine")


def test_a_law_that_does_not_exist_cannot_be_excepted() -> None:
    with pytest.raises(MethodError, match=r"method mine: expected unclaimed laws of exactness, .*got 'luck'"):
        Traits("mine", "ours", unclaimed=("luck",))
