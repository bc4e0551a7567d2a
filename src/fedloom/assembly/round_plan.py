"""Settings become the objects of a round loop: population, strategy, server rules, plan.

Controls run through the same loop at the same number of rows. Where one client owns every row (centralised), it takes
as many steps a round as all sampled clients together; otherwise every client tunes for itself (standalone). Neither
sends anything, both keep their optimiser and follow the schedule once over the whole run, as ordinary tuning does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, Literal

from fedloom.assembly.cores import cores_here
from fedloom.assembly.inputs import Inputs
from fedloom.assembly.participation import participation_of
from fedloom.assembly.start_adapter import start_adapter
from fedloom.config import Settings
from fedloom.data.batches import num_batches, num_rows_read
from fedloom.data.tokens import TokenSet
from fedloom.federation.blob import WireDtype
from fedloom.federation.coding import num_bytes_of
from fedloom.federation.masked_round import Masking
from fedloom.federation.messages import expected_tensors
from fedloom.federation.robust import Robust, RobustRule
from fedloom.federation.rounds import RoundPlan
from fedloom.federation.sampling import sample_by_rows, sample_clients, sample_poisson
from fedloom.federation.server import BroadcastForm, ServerRules
from fedloom.federation.sum_terms import threshold_of
from fedloom.federation.update_checks import Asked
from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import BOTH
from fedloom.methods import table
from fedloom.methods.adaptive_steps import Adaptive, AdaptiveStep
from fedloom.methods.continued import ContinuedFrom
from fedloom.methods.masked_sums import MaskedSums
from fedloom.methods.options import ClientPrivacy, MethodOptions, ServerAdamW
from fedloom.methods.server_steps import FedExPStep, MomentumStep, PlainStep, ServerStep
from fedloom.methods.strategy import Cohort, Strategy
from fedloom.models.causal import context_of
from fedloom.training.cohort_round import LocalTraining
from fedloom.training.private_rows import RowPrivacy

SEED: Final = "seed"
SYSTEM: Final = "system"
Drawn = Literal["seed", "system"]
"""Where noise comes from: from the run's seed it is a simulation, from an operating system it is not."""
_ENDLESS = 1 << 20
"""Tokens of a row where neither the recipe nor the base states a limit."""


@dataclass(frozen=True)
class Population:
    """The clients as the loop sees them: their number, ranks, scales and rows."""

    num_clients: int
    clients_per_round: int
    ranks: Mapping[int, int]
    scales: Mapping[int, float]
    rows_of: Callable[[int], TokenSet]
    names: tuple[str, ...]
    num_rows: Mapping[int, int]


def population_of(settings: Settings, inputs: Inputs) -> Population:
    """Return the real clients, or the one that owns all rows."""
    ranks, scales = dict(enumerate(settings.client_ranks)), dict(enumerate(settings.client_scales))
    if settings.traits.pools_rows:
        rows = inputs.tokens
        return Population(1, 1, {0: ranks[0]}, {0: scales[0]}, lambda client: rows, ("everyone",), {0: len(rows)})
    partition = inputs.partition
    num_rows = dict(enumerate(partition.sizes.tolist()))
    return Population(
        num_clients=settings.federation.num_clients,
        clients_per_round=settings.cohort_size,
        ranks=ranks,
        scales=scales,
        rows_of=inputs.rows_of,
        names=partition.names,
        num_rows=num_rows,
    )


def strategy_of(settings: Settings, cohort: Cohort, draws: Drawn = SEED) -> Strategy:
    """Return the strategy that ``method.name`` names; ``draws`` says where a server's noise comes from.

    Raises:
        MethodError: if the method does not run in rounds.
        AdapterError: if the adapter that training continues does not fit.
    """
    method = settings.method
    options = MethodOptions(
        weighting=method.weighting,
        initialisation=method.initialisation,
        adamw=_adamw_of(settings) if settings.server.step == "adamw" else None,
        few_bits=WireDtype(settings.wire.dtype).is_coded and not settings.traits.is_control,
        moments=settings.training.moments,
        moments_prior=settings.training.moments_prior,
        control_clients=settings.federation.num_clients if settings.training.control_variates else 0,
        client_privacy=client_privacy_of(settings, draws),
        masked=settings.privacy.sum != "plain",
        sketch_rank=sketch_rank_of(settings),
        sketch_is_whole=is_sketch_whole(settings),
    )
    strategy: Strategy = table.make(method.name, cohort, options)
    start = start_adapter(settings.model) if settings.model.train_adapter else None
    if start is None:
        return strategy
    if isinstance(strategy, MaskedSums):  # a sum stays the outermost: whoever runs rounds asks for it
        return replace(strategy, inner=ContinuedFrom(strategy.inner, start))
    return ContinuedFrom(strategy, start)


def client_privacy_of(settings: Settings, draws: Drawn = SEED) -> ClientPrivacy | None:
    """Return how the server hides whole clients; None where it does not."""
    privacy, clients = settings.privacy, settings.federation.num_clients
    if privacy.unit != "client":
        return None
    is_poisson = settings.federation.sampling == "poisson"
    expected = settings.sampling_rate * clients if is_poisson else float(settings.cohort_size)
    shares = threshold_of(privacy.threshold, settings.cohort_size) if privacy.noise == "clients" else None
    return ClientPrivacy(privacy.clip, privacy.noise_multiplier, expected, draws, shares)


def _adamw_of(settings: Settings) -> ServerAdamW:
    """Return the recipe's AdamW, for the server: one step a round, the schedule over the run."""
    training, server = settings.training, settings.server
    ranks, scales = settings.client_ranks, settings.client_scales
    return ServerAdamW(
        learning_rate=training.learning_rate * server.learning_rate,
        betas=(training.beta1, training.beta2),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm or None,
        schedule=training.schedule,
        warmup_steps=training.warmup_steps,
        total_steps=settings.federation.num_rounds,
        scale=scales[ranks.index(max(ranks))],
    )


def plan_of(settings: Settings, population: Population, lora: LoRAModel, draws: Drawn = SEED) -> RoundPlan:
    """Return everything that stays the same from round to round; ``draws`` as in :func:`strategy_of`.

    Raises:
        AdapterError: a rank does not fit a module.
    """
    federation, seed = settings.federation, settings.run.seed
    for rank in set(population.ranks.values()):
        lora.check_rank(rank)
    cohort = Cohort(lora.shapes, max(population.ranks.values()), population.ranks.__getitem__, seed)
    training, longest = training_of(settings), max_length_of(settings, lora)
    return RoundPlan(
        num_rounds=settings.start_rounds + federation.num_rounds,
        strategy=strategy_of(settings, cohort, draws),
        rules=rules_of(settings, lora.shapes),
        sample=_sample_of(settings, population),
        shapes=lora.shapes,
        ranks=population.ranks,
        scales=population.scales,
        asked=partial(asked_of, training, population.num_rows, longest),
        asked_to_sketch=partial(asked_of, training.for_sketch(), population.num_rows, longest),
        start_rounds=settings.start_rounds,
        # A Poisson round may have nobody in it, and goes on like any other.
        min_clients=0
        if federation.sampling == "poisson"
        else min(federation.min_clients, population.clients_per_round),
        # Where nothing crosses there is no server to drop an update; where clients are hidden the clip bounds each.
        max_norm_ratio=math.inf
        if settings.traits.is_control or settings.privacy.unit == "client"
        else federation.max_norm_ratio,
        max_weight=1.0 if settings.traits.is_control else federation.max_weight,
        robust=robust_of(settings),
        evaluate_every=settings.evaluation.every,
        masking=masking_of(settings),
    )


def masking_of(settings: Settings) -> Masking | None:
    """Return how the clients' sum is masked; None where it is not."""
    if settings.privacy.sum == "plain":
        return None
    return Masking(settings.privacy.threshold, f"simulation {settings.run.seed}")


def sketch_rank_of(settings: Settings) -> int | None:
    """Return the rank of a sum of products that sketches give exactly; None where nothing is sketched."""
    if settings.privacy.sum != "sketch":
        return None
    return settings.privacy.sketch_rank or settings.ranks_of_a_round


def is_sketch_whole(settings: Settings) -> bool:
    """Tell whether no round's sum can have a higher rank than sketches give exactly."""
    return (sketch_rank_of(settings) or settings.ranks_of_a_round) >= settings.ranks_of_a_round


def _sample_of(settings: Settings, population: Population) -> Callable[[int], list[int]]:
    """Return the clients of a round by its number: drawn, or those of a run that is replayed."""
    if settings.federation.participation is not None:
        return participation_of(Path(settings.federation.participation), population.num_clients)
    return cohorts(settings, population.clients_per_round, range(population.num_clients), population.num_rows)


def cohorts(
    settings: Settings, size: int, present: Sequence[int], num_rows: Mapping[int, int]
) -> Callable[[int], list[int]]:
    """Return the clients of a round by its number, drawn from those ``present``; rounds of training count from 1.

    A sketch is drawn as round 0: a start changes the cohort of no later round.
    """
    seed, by_rows = settings.run.seed, settings.federation.sampling == "rows"
    rows = [num_rows[client] for client in present] if by_rows else []

    def drawn(round: int, size: int) -> list[int]:
        size = min(size, len(present))
        if settings.federation.sampling == "poisson":
            places = sample_poisson(seed, round, len(present), settings.sampling_rate)
        elif by_rows and size < len(present):
            places = sample_by_rows(seed, round, rows, size)
        else:
            places = sample_clients(seed, round, len(present), size)
        return [present[place] for place in places]

    def cohort(round: int) -> list[int]:
        trained = round - settings.start_rounds
        return drawn(trained, size if trained > 0 else settings.sketch_cohort_size)

    return cohort


def robust_of(settings: Settings) -> RobustRule:
    """Return the rule against hostile updates; controls have no server to apply one."""
    server = settings.server
    return RobustRule() if settings.traits.is_control else RobustRule(Robust(server.robust), server.hostile_fraction)


def asked_of(training: LocalTraining, num_rows: Mapping[int, int], max_length: int, client: int) -> Asked:
    """Return what a round asks of a client: the steps of its recipe over the rows that were registered."""
    rows, batch = num_rows[client], training.batch_size
    steps = training.steps if training.steps is not None else num_batches(rows, batch, epochs=training.epochs or 0.0)
    return Asked(rows, steps, steps * batch * max_length, num_rows_read(rows, batch, steps))


def max_length_of(settings: Settings, lora: LoRAModel) -> int:
    """Return the tokens that a row can have."""
    return settings.data.max_length or context_of(lora.model.config) or _ENDLESS


def rules_of(settings: Settings, shapes: Mapping[str, tuple[int, int]]) -> ServerRules:
    """Return the server's rules; controls send nothing and have none."""
    if settings.traits.is_control:
        return ServerRules(PlainStep())
    method = settings.method
    form = BroadcastForm(method.broadcast)
    wire, limit = WireDtype(settings.wire.dtype), method.broadcast_max_bytes
    if isinstance(limit, float):
        limit = round(limit * num_bytes_of(expected_tensors(shapes, max(settings.client_ranks), BOTH), wire))
    return ServerRules(_step_of(settings), form, method.tolerance, wire, limit)


def _step_of(settings: Settings) -> ServerStep:
    server = settings.server
    match server.step:
        case "plain":
            return PlainStep(server.learning_rate)
        case "momentum":
            return MomentumStep(server.learning_rate, server.momentum)
        case "adamw":  # the step is the strategy's, on the factors
            return PlainStep()
        case "fedexp":
            return FedExPStep(server.learning_rate, server.fedexp_cap)
        case "fedadagrad":
            return AdaptiveStep(Adaptive.ADAGRAD, server.learning_rate, beta1=0.0, epsilon=server.epsilon)
        case "fedadam" | "fedyogi":
            kind = Adaptive(server.step)
            return AdaptiveStep(kind, server.learning_rate, server.beta1, server.beta2, server.epsilon)


def training_of(settings: Settings) -> LocalTraining:
    """Return what a client does in a round; a control's budget is what the sampled clients have together."""
    training, traits = settings.training, settings.traits
    steps, epochs = training.local_steps, training.local_epochs
    if traits.pools_rows:
        steps = None if steps is None else steps * settings.cohort_size
        epochs = None if epochs is None else epochs * settings.cohort_size / settings.federation.num_clients
    return LocalTraining(
        learning_rate=training.learning_rate,
        batch_size=training.batch_size,
        steps=steps,
        epochs=epochs,
        micro_batch_size=training.micro_batch_size,
        schedule=training.schedule,
        warmup_steps=training.warmup_steps,
        schedule_span="run" if traits.is_control else training.schedule_span,
        total_rounds=settings.federation.num_rounds,
        weight_decay=training.weight_decay,
        betas=(training.beta1, training.beta2),
        max_grad_norm=training.max_grad_norm or None,
        dropout=training.dropout,
        label_smoothing=training.label_smoothing,
        proximal=training.proximal,
        token_budget=training.token_budget,
        start_rounds=settings.start_rounds,
        privacy=privacy_of(settings),
        cores=cores_here(settings),
        checkpoint_activations=training.checkpoint_activations,
    )


def privacy_of(settings: Settings) -> RowPrivacy | None:
    """Return how clients hide their rows; None where they do not."""
    privacy = settings.privacy
    if privacy.unit != "row":
        return None
    return RowPrivacy(privacy.clip, privacy.noise_multiplier, privacy.rows_per_unit)
