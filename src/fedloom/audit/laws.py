"""The laws, each a measured number: how far what came out is from what the law says, relative to its size.

p_k is client k's share of the rows of those that take part, W_k the product that it ended the round with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedloom.audit.subject import ROWS, SHAPES, Contribution, Products, Scene, Subject, Trial, products, relative
from fedloom.errors import AdapterError
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods.traits import Law

Measure = Callable[[Subject, Scene], float | str]
"""A law's measurement: how far off, or in words why there is nothing to measure."""


@dataclass(frozen=True)
class Measured:
    """A law: what it says, how it is measured, and at which ranks."""

    law: Law
    says: str
    measure: Measure
    at_equal_ranks: bool = True
    at_unequal_ranks: bool = True


RESCALED_BY = (0.25, 4.0, 2.0, 0.5)
MANY_TIMES = 10


def exactness(subject: Subject, scene: Scene) -> float:
    """Return how far the global product after a round, of all clients or some, is from ``Σ p_k W_k``."""
    trial = _trial(subject, scene)
    everyone = _trained(trial, scene)
    return max(relative(trial.combined(round), _mean(round)) for round in (everyone, everyone[::3]))


def rescaling(subject: Subject, scene: Scene) -> float:
    """Return how far the result moves where each client sends ``c_k B_k`` and ``A_k / c_k`` instead."""
    trial = _trial(subject, scene)
    plain = _trained(trial, scene)
    other = [
        replace(one, adapter=Adapter({n: Pair(p.b_OR * c, p.a_RI / c) for n, p in one.adapter.items()}))
        for one, c in zip(plain, RESCALED_BY, strict=True)
    ]
    return relative(trial.combined(other), trial.combined(plain))


def orientation(subject: Subject, scene: Scene) -> float:
    """Return how far the result is from ``U W V`` where every client sends ``U B_k`` and ``A_k V``, both rotations.

    A factor that clients do not train is not rotated.
    """
    trial = _trial(subject, scene)
    plain = _trained(trial, scene)
    turns = {name: tuple(scene.rotation(size, name, side) for side, size in enumerate(s)) for name, s in SHAPES.items()}
    turned = [replace(one, adapter=trial.ended(one.client, _turned(one.adapter, turns))) for one in plain]
    expected = trial.combined(plain)
    for name, (left, right) in turns.items():
        out = left @ expected[name] if "b" in trial.trains else expected[name]
        expected = {**expected, name: out @ right if "a" in trial.trains else out}
    return relative(trial.combined(turned), expected)


def permutation(subject: Subject, scene: Scene) -> float:
    """Return how far the result moves with the order of the clients."""
    trial = _trial(subject, scene)
    round = _trained(trial, scene)
    expected = trial.combined(round)
    return max(relative(trial.combined(order), expected) for order in (round[::-1], [*round[2:], *round[:2]]))


def no_op(subject: Subject, scene: Scene) -> float:
    """Return how far clients that send back what they were given move the model, relative to it or to one client."""
    trial = _trial(subject, scene)
    before = trial.before()
    whole = before if any(product.any() for product in before.values()) else products(_trained(trial, scene)[0].adapter)
    idle = [Contribution(client, trial.given(client), ROWS[client]) for client in scene.clients]
    return relative(trial.combined(idle), before, whole)


def one_client(subject: Subject, scene: Scene) -> float:
    """Return how far the result is from the one client's own product."""
    trial = _trial(subject, scene)
    return max(relative(trial.combined([one]), products(one.adapter)) for one in _trained(trial, scene))


def equal_clients(subject: Subject, scene: Scene) -> float:
    """Return how far the result is from the product that every client sends."""
    trial = _trial(subject, scene)
    round = _equal(trial, scene)
    return relative(trial.combined(round), products(round[0].adapter))


def partial(subject: Subject, scene: Scene) -> float:
    """Return how far a round of some clients is from the same round where nobody else is registered.

    All clients took part in the round before.
    """
    full = _trial(subject, scene)
    everyone = _trained(full, scene)
    full.combined(everyone)
    some = everyone[::3]
    alone = subject.trial(scene, {one.client: one.rows for one in some})
    return relative(full.combined(some), alone.combined(some))


def proportions(subject: Subject, scene: Scene) -> float:
    """Return how far the result moves where every client has ten times its rows."""
    round = _trained(_trial(subject, scene), scene)
    many = [replace(one, rows=MANY_TIMES * one.rows) for one in round]
    found = subject.trial(scene, {one.client: one.rows for one in many}).combined(many)
    return relative(found, _trial(subject, scene).combined(round))


def normalisation(subject: Subject, scene: Scene) -> float:
    """Return how far the result is from what the clients of a round send, all the same, while others stay away.

    All clients took part in the round before. Shares that do not sum to one show, whatever else a method does.
    """
    trial = _trial(subject, scene)
    round = _equal(trial, scene)
    trial.combined(round)
    rounds = (round[:1], round[::3], round[1:])
    return max(relative(trial.combined(some), products(round[0].adapter)) for some in rounds)


def splitting(subject: Subject, scene: Scene) -> float:
    """Return how far the result moves where one client is two of half its rows each that send the same."""
    trial = _trial(subject, scene)
    round = _trained(trial, scene)
    expected, off_by = trial.combined(round), 0.0
    for place, one in enumerate(round):
        halves = [replace(one, client=one.client + twin * len(scene.ranks), rows=one.rows // 2) for twin in (0, 1)]
        split = [*round[:place], *halves, *round[place + 1 :]]
        among = subject.trial(scene, {other.client: other.rows for other in split})
        off_by = max(off_by, relative(among.combined(split), expected))
    return off_by


def streaming(subject: Subject, scene: Scene) -> float | str:
    """Return how far the result moves where groups of clients are combined first, of one client or of two."""
    trial = _trial(subject, scene)
    round = _trained(trial, scene)
    expected, off_by = trial.combined(round), 0.0
    for groups in ([[one] for one in round], [round[:2], round[2:]], [round[::2], round[1::2]]):
        found = trial.grouped(groups)
        if isinstance(found, str):
            return found
        off_by = max(off_by, relative(found, expected))
    return off_by


def catch_up(subject: Subject, scene: Scene) -> float | str:
    """Return how far clients that stayed away for some rounds are from the model that the server means them to have."""
    return _trial(subject, scene).caught_up()


def inputs(subject: Subject, scene: Scene) -> float:
    """Return how far the same inputs lead to another result the second time.

    Raises:
        AdapterError: the inputs were changed.
    """
    trial = _trial(subject, scene)
    round = _trained(trial, scene)
    first = trial.combined(round)
    off_by = relative(trial.combined(round), first)
    if changed := trial.changed():
        raise AdapterError(f"{subject.name}: expected its inputs unchanged, it changed {changed}; change a copy")
    return off_by


LAWS: tuple[Measured, ...] = (
    Measured(Law.EXACTNESS, "the global product is the clients' mean", exactness),
    Measured(Law.RESCALING, "c B and A / c count as B and A", rescaling),
    Measured(Law.ORIENTATION, "turned outputs and inputs turn the result", orientation),
    Measured(Law.PERMUTATION, "the order of the clients does not matter", permutation),
    Measured(Law.NO_OP, "clients that change nothing change nothing", no_op, at_unequal_ranks=False),
    Measured(Law.NO_OP_RANKS, "nor do they at unequal ranks", no_op, at_equal_ranks=False),
    Measured(Law.ONE_CLIENT, "one client alone is taken as it is", one_client),
    Measured(Law.EQUAL_CLIENTS, "clients that agree are taken as they are", equal_clients),
    Measured(Law.PARTIAL, "who stays away does not matter to a round", partial),
    Measured(Law.PROPORTIONS, "only the proportions of the rows matter", proportions),
    Measured(Law.NORMALISATION, "the shares of those that take part sum to one", normalisation),
    Measured(Law.SPLITTING, "a client counts as two of half its rows", splitting),
    Measured(Law.STREAMING, "groups of clients may be combined first", streaming),
    Measured(Law.CATCH_UP, "a client that was away ends as one that stayed", catch_up),
    Measured(Law.INPUTS, "inputs stay as they are and give one result", inputs),
)


def _trial(subject: Subject, scene: Scene) -> Trial:
    return subject.trial(scene, {client: ROWS[client] for client in scene.clients})


def _trained(trial: Trial, scene: Scene) -> list[Contribution]:
    """Return a round in which every client has trained, each to something else."""
    return [Contribution(k, trial.ended(k, scene.draw(scene.rank_of(k), "trained", k)), ROWS[k]) for k in scene.clients]


def _turned(adapter: Adapter, turns: Mapping[str, tuple[Tensor, ...]]) -> Adapter:
    return Adapter({n: Pair(turns[n][0] @ pair.b_OR, pair.a_RI @ turns[n][1]) for n, pair in adapter.items()})


def _equal(trial: Trial, scene: Scene) -> list[Contribution]:
    """Return a round in which every client has trained to the same, in the slots that all of them have."""
    same = scene.draw(min(scene.ranks), "same")
    return [Contribution(k, trial.ended(k, same), ROWS[k]) for k in scene.clients]


def _mean(round: Sequence[Contribution]) -> Products:
    """Return ``Σ p_k W_k``, dense."""
    rows = sum(one.rows for one in round)
    parts = [{n: one.rows / rows * product for n, product in products(one.adapter).items()} for one in round]
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}
