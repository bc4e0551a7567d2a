"""Hide whole clients: changes of B clipped over a shared A, their sum noised once, divided by a number fixed before.

    D_k = B_k − B,   n_k = √ Σ_l ‖D_kl A_l‖²,   S = Σ_k D_k · min(1, C / n_k)
    B ← B + (S W + N(0, (z C)² I)) W⁺ / m,      W = (A Aᵀ)^½,   m = the number of clients that is expected

``‖D A‖ = ‖D W‖``, so no client moves ``S W`` by more than C in norm, whatever the rows of A are like: its release is a
Gaussian mechanism of noise multiplier z. What follows, W⁺ and the server's step, is post-processing. Where the rows of
A are orthonormal W is the identity. A client of rank r_k has zeros in the slots beyond.

The number of those who came would tell of each of them, so the sum is never divided by it, and all weigh the same:
rows are counts of data. Noise on A and B both would be no additive noise on the product, of no known size.

Under masks the clients may add the noise themselves, in shares ``N_k ~ N(0, (z C)² / t)`` on ``D_k W`` where t of them
stay at least: then nobody sees a sum without noise, and where all n stay its variance is n / t of what is counted.

Letters: O out, R rank. Source: McMahan et al., Learning Differentially Private Recurrent Language Models (2018),
algorithm 1, with the fixed denominator; the norm by A is this library's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedloom.errors import MethodError
from fedloom.lora.pair import Adapter, rank_in
from fedloom.methods.around import Around
from fedloom.methods.masked_sums import Sizes, factor_sizes
from fedloom.methods.options import ClientPrivacy
from fedloom.methods.state import Aggregate, ServerState, Update
from fedloom.privacy.clipping import add_noise
from fedloom.privacy.draws import Draws, SeededDraws, SystemDraws

SERVER = -1
"""The server among those who draw noise."""
_FLAT = 1e-12
"""An eigenvalue of A Aᵀ below this share of the largest is rounding: there the product cannot move."""


@dataclass(frozen=True, eq=False)
class SharedA:
    """What a round's clients start from, and by module ``(A Aᵀ)^½`` and its pseudo-inverse, (R, R), float64."""

    start: Adapter
    roots: dict[str, Tensor]
    inverses: dict[str, Tensor]

    @classmethod
    def of(cls, start: Adapter) -> SharedA:
        """Take the roots of a start's A."""
        roots, inverses = {}, {}
        for name, pair in start.items():
            a_RI = pair.a_RI.double()
            values_R, vectors_RR = torch.linalg.eigh(a_RI @ a_RI.T)
            is_flat_R = values_R <= _FLAT * values_R.max()
            root_R = values_R.clamp_min(0.0).sqrt().masked_fill(is_flat_R, 0.0)
            inverse_R = (1.0 / root_R).masked_fill(is_flat_R, 0.0)
            roots[name] = (vectors_RR * root_R) @ vectors_RR.T
            inverses[name] = (vectors_RR * inverse_R) @ vectors_RR.T
        return cls(start, roots, inverses)

    def change(self, adapter: Adapter) -> dict[str, Tensor]:
        """Return by module ``D_k``, (O, R), padded with zeros to the largest rank; float64."""
        found = {}
        for name, pair in self.start.items():
            b_OR = adapter[name].b_OR.double()
            moved_OR = b_OR - pair.b_OR[:, : b_OR.shape[1]].double()
            found[name] = torch.nn.functional.pad(moved_OR, (0, pair.rank - moved_OR.shape[1]))
        return found

    def norm(self, change: dict[str, Tensor]) -> float:
        """Return ``√ Σ_l ‖D_l A_l‖²``."""
        return math.hypot(*(float((one @ self.roots[name]).norm()) for name, one in change.items()))

    def clipped(self, change: dict[str, Tensor], clip: float) -> dict[str, Tensor]:
        """Return a change of norm ``clip`` at most; one that is not finite counts as none."""
        size = self.norm(change)
        if not math.isfinite(size):
            return {name: torch.zeros_like(one) for name, one in change.items()}
        return {name: one * min(1.0, clip / size) if size > 0.0 else one for name, one in change.items()}

    def moved(self, change: dict[str, Tensor]) -> Adapter:
        """Return the start with B moved, in float64."""
        b_by_key = {f"{name}.b": self.start[name].b_OR.double() + one for name, one in change.items()}
        return self.start.to(torch.float64).with_factors(b_by_key)


@dataclass(eq=False)
class ClippedSum:
    """Sums over clients of their changes, as they are and clipped; in float64, so that order does not show."""

    shared: SharedA
    clip: float
    whole: dict[str, Tensor] = field(default_factory=dict)
    clipped: dict[str, Tensor] = field(default_factory=dict)
    clients: set[int] = field(default_factory=set)
    squares: float = 0.0

    def __post_init__(self) -> None:
        for name, pair in self.shared.start.items():
            for sums in (self.whole, self.clipped):
                sums.setdefault(name, torch.zeros(pair.b_OR.shape, dtype=torch.float64))

    def add(self, update: Update) -> None:
        """Take one update in."""
        change = self.shared.change(update.adapter)
        clipped = self.shared.clipped(change, self.clip)
        self._put(change, clipped)
        self.clients.add(update.client)
        self.squares += self.shared.norm(clipped) ** 2

    def merge(self, other: ClippedSum) -> None:
        """Take another sum in."""
        self._put(other.whole, other.clipped)
        self.clients |= other.clients
        self.squares += other.squares

    def _put(self, whole: dict[str, Tensor], clipped: dict[str, Tensor]) -> None:
        for name in self.whole:
            self.whole[name] += whole[name]
            self.clipped[name] += clipped[name]


@dataclass(frozen=True)
class PrivateClients(Around):
    """A method of one shared A whose server releases nothing but the noised sum of clipped changes.

    ``finish`` draws the noise from the run's seed and the round, so that a simulation repeats; with ``draws = system``
    nobody can repeat it.

    Raises:
        MethodError: the method's clients send something else than B.
    """

    privacy: ClientPrivacy

    def __post_init__(self) -> None:
        work = self.inner.client.work(1)
        if work.sends != frozenset("b") or work.trains != work.sends or work.is_gradient:
            raise MethodError(
                f"method {self.name}: expected clients that train and send B alone, as its trait freezes_a says, got "
                f"others that send {sorted(work.sends)}; correct the trait"
            )

    def empty(self, state: ServerState) -> ClippedSum:
        """Return the sum of no changes."""
        assert state.start is not None
        return ClippedSum(SharedA.of(state.start), self.privacy.clip)

    def finish(self, state: ServerState, sums: ClippedSum) -> Aggregate:
        """Release the noised sum; what is not noised, the mean of those who came, is for the server's own record."""
        number = max(1, len(sums.clients))
        ideal = sums.shared.moved({name: one / number for name, one in sums.whole.items()})
        return self._aggregate(state, sums, ideal)

    @property
    def agreed(self) -> tuple[float, ...]:
        """The clip and the noise, where each client relies on what the others add."""
        return () if self.privacy.shares is None else (self.privacy.clip, self.privacy.noise_multiplier)

    def sizes(self) -> Sizes:
        """Return the shapes of what a client adds to a sum."""
        return factor_sizes(self.inner)

    def summand(self, round: int, start: Adapter, trained: Adapter, share: float) -> dict[str, Tensor]:
        """Return a client's clipped change, padded to the largest rank, for a sum that nobody sees into."""
        shared, cohort = SharedA.of(start), self.cohort
        clipped = shared.clipped(shared.change(trained), self.privacy.clip)
        ranks = {name: rank_in(cohort.shapes[name], cohort.max_rank) for name in clipped}
        if self.privacy.shares is not None:  # what the product does not show would have neither clip nor noise
            clipped = {name: one @ shared.roots[name] @ shared.inverses[name] for name, one in clipped.items()}
        pads = {name: (0, ranks[name] - one.shape[1]) for name, one in clipped.items()}
        return {f"{name}.b": torch.nn.functional.pad(one, pads[name]) for name, one in clipped.items()}

    def noise_share(self, start: Adapter, round: int, client: int) -> dict[str, Tensor]:
        """Return a client's share of the noise, to be added to its summand; none where the server adds it all.

        The start has the rank of all: noise goes where any client's change may be. It is of float32, as files are.
        """
        privacy = self.privacy
        if privacy.shares is None:
            return {}
        shared, draws = SharedA.of(start), self._draws(round, client)
        noise = {name: torch.zeros(pair.b_OR.shape, dtype=torch.float64) for name, pair in start.items()}
        add_noise(list(noise.values()), draws, privacy.noise_multiplier * privacy.clip / math.sqrt(privacy.shares))
        return {f"{name}.b": (one @ shared.inverses[name]).float() for name, one in noise.items()}

    def of_sum(self, state: ServerState, numbers: Mapping[str, Tensor], shares: Mapping[int, float]) -> Aggregate:
        """Return what a sum of clipped changes amounts to, with the noise on it, which may be in it already."""
        sums = self.empty(state)
        sums.clients |= shares.keys()
        for name, one in sums.clipped.items():
            one += numbers[f"{name}.b"]
        return self._aggregate(state, sums, Adapter())

    def _aggregate(self, state: ServerState, sums: ClippedSum, ideal: Adapter) -> Aggregate:
        shared, expected = sums.shared, self.privacy.expected_clients
        start = shared.moved(self._released(state.round + 1, sums))
        weights = dict.fromkeys(sorted(sums.clients), 1.0 / expected)
        dtype = next(iter(shared.start.values())).b_OR.dtype
        new = shared.start.with_factors(start.to(dtype).as_tensors(frozenset("b")))
        return Aggregate(new, Adapter(), ideal, sums.squares / expected, weights)

    def _released(self, round: int, sums: ClippedSum) -> dict[str, Tensor]:
        """Return the change of B that everybody may know."""
        shared, privacy = sums.shared, self.privacy
        noised = {name: one @ shared.roots[name] for name, one in sums.clipped.items()}
        if privacy.shares is None:
            add_noise(list(noised.values()), self._draws(round), privacy.noise_multiplier * privacy.clip)
        return {name: one @ shared.inverses[name] / privacy.expected_clients for name, one in noised.items()}

    def _draws(self, round: int, who: int = SERVER) -> Draws:
        kind: type[SystemDraws | SeededDraws] = SystemDraws if self.privacy.draws == "system" else SeededDraws
        return kind(self.cohort.seed, round, who)
