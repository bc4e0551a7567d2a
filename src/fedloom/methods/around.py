"""Strategies around others: what crosses, and who steps, is a choice beside the method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedloom.lora.initial import Draw
from fedloom.lora.pair import Adapter
from fedloom.methods.client_half import ClientHalf, InFewBits, MeasuresGradient, Moments, WithControl, WithMoments
from fedloom.methods.options import ServerAdamW
from fedloom.methods.state import Aggregate, ServerState, Update
from fedloom.methods.strategy import Cohort, Strategy, Weighting, normalised, weigh
from fedloom.methods.sums import RunningFactors
from fedloom.training.control_variates import mean_after
from fedloom.training.optimiser import AdamWSettings, ClientOptimiser, Schedule, schedule


@dataclass(frozen=True)
class Around(Strategy):
    """A strategy that does what another does."""

    inner: Strategy

    @property
    def name(self) -> str:  # type: ignore[override]
        """The method's name."""
        return self.inner.name

    @property
    def cohort(self) -> Cohort:  # type: ignore[override]
        """The population."""
        return self.inner.cohort

    @property
    def weighting(self) -> Weighting:  # type: ignore[override]
        """How clients are weighed."""
        return self.inner.weighting

    @property
    def client(self) -> ClientHalf:
        """What clients do."""
        return self.inner.client

    @property
    def origin(self) -> Draw | None:
        """The draw that every client can make by itself."""
        return self.inner.origin

    @property
    def drawn(self) -> Draw | None:
        """The draw of the first start."""
        return self.inner.drawn

    def initial(self) -> ServerState:
        """Return the state before the first round."""
        return self.inner.initial()

    def start_for(self, state: ServerState, client: int) -> Adapter | Draw:
        """Return what a client trains from."""
        return self.inner.start_for(state, client)

    def empty(self, state: ServerState) -> Any:
        """Return the sum of no updates."""
        return self.inner.empty(state)

    def finish(self, state: ServerState, sums: Any) -> Aggregate:
        """Return what a sum of updates amounts to."""
        return self.inner.finish(state, sums)


@dataclass(frozen=True)
class FewBits(Around):
    """A method whose updates cross as codes of few bits: their changes, with what was rounded off owed."""

    owes: bool = True

    @property
    def client(self) -> ClientHalf:
        """Do the method's part, and send the change."""
        return InFewBits(self.inner.client, self.owes)


@dataclass
class SumWithMoments:
    """A method's own sum, and beside it the weighted sums of the clients' second moments, slot by slot."""

    inner: Any
    weighting: Weighting
    sums: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def add(self, update: Update) -> None:
        """Take one update in."""
        self.inner.add(update)
        weight = weigh(update, self.weighting)
        for key, tensor in update.moments.items():
            self._put(key, weight * tensor.double(), torch.full((len(tensor),), weight, dtype=torch.float64))

    def merge(self, other: SumWithMoments) -> None:
        """Take another sum in."""
        self.inner.merge(other.inner)
        for key, tensor in other.sums.items():
            self._put(key, tensor, other.weights[key])

    def means(self, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean over those that have a slot; one that nobody had keeps what it was."""
        found = dict(before)
        for key, tensor in self.sums.items():
            old = before.get(key, tensor.new_zeros(0)).double()
            longest = max(len(old), len(tensor))
            sums, weights, kept = (_filled(one, longest) for one in (tensor, self.weights[key], old))
            mean = torch.where(weights > 0.0, sums / weights.clamp_min(1e-300), kept)
            found[key] = mean.to(torch.bfloat16).float()
        return found

    def _put(self, key: str, tensor: Tensor, weights: Tensor) -> None:
        if key not in self.sums:
            self.sums[key], self.weights[key] = torch.zeros_like(tensor), torch.zeros_like(weights)
        longest = max(len(tensor), len(self.sums[key]))
        for kept, more in ((self.sums, tensor), (self.weights, weights)):
            kept[key] = _filled(kept[key], longest) + _filled(more, longest)


def _filled(vector: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(vector, (0, length - len(vector)))


@dataclass(frozen=True)
class WithOtherMoments(Around):
    """A method whose clients continue with moments of their own, or start from those that all share."""

    moments: Moments
    prior_steps: int

    @property
    def client(self) -> ClientHalf:
        """Do the method's part from those moments."""
        return WithMoments(self.inner.client, self.moments, self.prior_steps)

    def empty(self, state: ServerState) -> Any:
        """Return the sum of no updates."""
        inner = self.inner.empty(state)
        return SumWithMoments(inner, self.weighting) if self.moments is Moments.SHARED else inner

    def finish(self, state: ServerState, sums: Any) -> Aggregate:
        """Do what the method does, and keep the mean second moments for the next round."""
        if self.moments is not Moments.SHARED:
            return self.inner.finish(state, sums)
        return replace(self.inner.finish(state, sums.inner), optimiser=sums.means(state.optimiser))


@dataclass(frozen=True)
class WithControlVariates(Around):
    """A mean of factors whose clients' steps are corrected (:mod:`fedloom.training.control_variates`)."""

    num_clients: int

    @property
    def client(self) -> ClientHalf:
        """Do the method's part with corrected steps."""
        return WithControl(self.inner.client)

    def finish(self, state: ServerState, sums: Any) -> Aggregate:
        """Do what the method does, and take the clients' mean move into that of all."""
        found = self.inner.finish(state, sums)
        assert state.start is not None
        assert found.start is not None
        before, after = (one.as_tensors(self.client.work(state.round + 1).sends) for one in (state.start, found.start))
        moved = {key: tensor - after[key] for key, tensor in before.items()}
        share = len(found.weights) / self.num_clients
        return replace(found, control=mean_after(state.control, moved, share))


@dataclass
class GradientSum:
    """``Σ w_k g_k`` of the factors' gradients, those of smaller ranks padded with zeros, one update at a time."""

    factors: RunningFactors
    weighting: Weighting
    weights: dict[int, float]

    def add(self, update: Update) -> None:
        """Take one gradient in."""
        weight = self.weights[update.client] = weigh(update, self.weighting)
        self.factors.add(update.adapter, weight)

    def merge(self, other: GradientSum) -> None:
        """Take another sum in."""
        self.factors.merge(other.factors)
        self.weights |= other.weights


@dataclass(frozen=True)
class SynchronisedSteps(Around):
    """One step of the global adapter a round: clients send the gradient of one batch, the server's AdamW steps.

        g = Σ p_k g_k,   (A, B) ← AdamW((A, B), g)

    It is what centralised training does with a batch made of the clients' batches, each weighed by p_k: the optimiser
    is the same and its moments never cross. A client of smaller rank has gradients for its first slots; of the others
    its part of the mean is zero. A client that is late or lost makes the batch smaller, and no more.

    Source: FedSGD (arXiv 1602.05629, section 2), with AdamW as the server's step (FedOpt, arXiv 2003.00295, with one
    local step). Deviation: on the two factors of every pair instead of the weights.
    """

    adamw: ServerAdamW

    @property
    def client(self) -> ClientHalf:
        """Measure the gradient of the factors that the method trains, and send it."""
        return MeasuresGradient(self.inner.client)

    def empty(self, state: ServerState) -> GradientSum:
        """Return the sum of no gradients."""
        return GradientSum(RunningFactors(self.cohort.max_rank), self.weighting, {})

    def finish(self, state: ServerState, sums: GradientSum) -> Aggregate:
        """Take AdamW's step on the mean gradient."""
        assert state.start is not None
        trained = self.client.work(state.round + 1).trains
        moved, kept = self._stepped(state.start, sums.factors.mean(), trained, state)
        weights = normalised(sums.weights)
        return Aggregate(moved, Adapter(), Adapter(), 0.0, weights, kept)

    def _stepped(
        self, start: Adapter, gradient: Adapter, trained: frozenset[str], state: ServerState
    ) -> tuple[Adapter, dict[str, Tensor]]:
        """Return the start after the step, and what the optimiser keeps.

        The parameters are A and B over the scale, as at a client, so that AdamW takes the step it would take there.
        """
        parameters: dict[str, nn.Parameter] = {}
        for name, pair in start.items():
            slope = gradient[name]
            for factor, number, grad in (
                ("a", pair.a_RI, slope.a_RI),
                ("b", pair.b_OR / self.adamw.scale, slope.b_OR * self.adamw.scale),
            ):
                if factor in trained:
                    parameter = parameters[f"{name}.{factor}"] = nn.Parameter(number.clone().contiguous())
                    parameter.grad = grad.to(number.dtype).contiguous()
        optimiser = self._optimiser(parameters, state)
        optimiser.step()
        found = {key: parameter.detach() for key, parameter in parameters.items()}
        found |= {key: tensor * self.adamw.scale for key, tensor in found.items() if key.endswith(".b")}
        return start.with_factors(found), optimiser.export_state()

    def _optimiser(self, parameters: dict[str, nn.Parameter], state: ServerState) -> ClientOptimiser:
        adamw = self.adamw
        factor = schedule(cast(Schedule, adamw.schedule), adamw.warmup_steps, adamw.total_steps)
        settings = AdamWSettings(adamw.learning_rate, adamw.betas, adamw.weight_decay, adamw.max_grad_norm)
        return ClientOptimiser(parameters, settings, factor, first=state.round, state=state.optimiser or None)
