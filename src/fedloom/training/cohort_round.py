"""Train a cohort of clients over one frozen base: several clients' rows in one pass, each with its own adapter.

What a client ends with depends on its own rows, rank, start and streams only; which other clients were in its passes
changes rounding at most, and on a CPU no bit (:mod:`fedloom.lora.linear` says how). Per step and client the loss is the
mean over all supervised tokens of the batch, however many micro-batches it is cut into.

Fresh in each round are the optimiser's moments and step count (unless ``optimiser_state`` is given), the order of the
rows (stream ``batches``), the dropout masks (one per row, :mod:`fedloom.lora.dropout`), and with ``schedule_span =
"round"`` the schedule. What persists is passed in again: ``start`` and ``optimiser_state``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from fedloom.data.batches import batches
from fedloom.data.tokens import TokenSet
from fedloom.lora.dropout import row_keys
from fedloom.lora.layer import LoRAModel, Slot
from fedloom.lora.pair import BOTH, Adapter, Factors
from fedloom.privacy.draws import Draws, SeededDraws
from fedloom.seeding import stream
from fedloom.training.checkpointing import checkpointed_blocks
from fedloom.training.client_passes import MicroBatch, Passes, spread
from fedloom.training.control_variates import Variates, corrected_steps
from fedloom.training.local_training import LocalTraining
from fedloom.training.moments import Prior, means_of, state_of
from fedloom.training.optimiser import ClientOptimiser, first_step, schedule, step_together
from fedloom.training.packing import num_targets
from fedloom.training.private_rows import PrivateSteps, Unit, shares
from fedloom.training.proximal import pull_to_start
from fedloom.training.row_passes import row_passes
from fedloom.training.slot_factors import factor_names, factor_of, gradient_of
from fedloom.training.stats import TrainingStats
from fedloom.training.verified_head import output_head

__all__ = ["ClientResult", "ClientTask", "LocalTraining", "StepReport", "train_cohort"]


@dataclass(frozen=True, eq=False)
class ClientTask:
    """One client's part of a round: its rows, the rank and scale it trains at, and what it starts from.

    ``trains`` are the factors that the optimiser moves. With ``measures_gradient`` it moves none: the client reads one
    batch and its result holds the gradient at the start; where it ``sketches``, that of
    :meth:`LocalTraining.for_sketch`, which is no step. With ``keeps_moments`` the result holds the optimiser's state,
    twice the adapter's size; with ``shares_moments`` means of its second moments. A ``prior`` takes a state's place.
    The ``correction`` is spread over the steps.
    """

    client: int
    rows: TokenSet
    rank: int
    scale: float
    start: Adapter
    optimiser_state: Mapping[str, Tensor] | None = None
    trains: Factors = BOTH
    measures_gradient: bool = False
    sketches: bool = False
    keeps_moments: bool = False
    shares_moments: bool = False
    prior: Prior | None = None
    correction: Variates = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ClientResult:
    """What a client ends with.

    ``seconds`` are the client's share, by tokens, of the passes it was in. ``gradient`` is that of the batch's mean
    loss with respect to the effective factors, where the task measures it; ``optimiser_state`` is there where the task
    keeps it. A client whose loss is not finite takes that step and then stops: its losses and its adapter are not
    finite either, so the check of updates drops it and says why.
    """

    client: int
    adapter: Adapter
    stats: TrainingStats
    num_examples_seen: int
    optimiser_state: dict[str, Tensor] | None = None
    gradient: Adapter | None = None
    moments: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StepReport:
    """One client's step, for progress: ``step`` counts from 1 to ``num_steps``."""

    client: int
    step: int
    num_steps: int
    loss_nats: float
    learning_rate: float
    num_tokens: int


def train_cohort(
    lora: LoRAModel,
    tasks: Sequence[ClientTask],
    settings: LocalTraining,
    *,
    seed: int,
    round: int,
    on_step: Callable[[StepReport], None] | None = None,
    draws: Callable[[int, int, int], Draws] = SeededDraws,
) -> list[ClientResult]:
    """Train every task's adapter from its start for one round; return the results in the tasks' order.

    Law: ``loss_k = (1/S_k) Σ_s nll_s`` over the S_k targets of client k's batch; the pass minimises ``Σ_k loss_k``,
    whose gradient at client k's factors is that of ``loss_k`` alone. A client with fewer steps is not touched again
    after its last. Rounds count from 1; in one all clients sketch, or none. Slots are freed at the end in any case.
    With ``settings.privacy`` steps are private (:mod:`fedloom.training.private_rows`); ``draws`` makes the draws of
    one client from seed, round and client. What is counted of such steps is their number alone.

    Raises:
        ModelError: if the passes of the model are not its own forward.
        AdapterError: if a start does not fit the model or its task's rank.
    """
    if settings.privacy is not None and len(tasks) > 1:  # a unit of a private client has a slot: one client at a time
        told = {"seed": seed, "round": round, "on_step": on_step, "draws": draws}
        return [one for task in tasks for one in train_cohort(lora, [task], settings, **told)]  # type: ignore[arg-type]
    sketch = any(task.sketches for task in tasks)
    settings, make_room = (settings.for_sketch(), lora.open_narrow) if sketch else (settings, lora.open)
    make_room([Slot(task.rank, task.scale) for task in tasks for _ in range(1 + settings.num_unit_slots)])
    try:
        lora.route_all(None)  # output_head compares the model with itself: no adapter may be in the way
        head, rows = output_head(lora.model), row_passes(lora.model)
        budget, cores = spread(lora, settings, lora.base_weight.device.type)
        passes = Passes(lora, rows, head, budget, settings.dropout, settings.label_smoothing, cores)
        chance = _Chance(seed, round, draws)
        clients = [_Client(lora, passes, slot, task, settings, chance) for slot, task in enumerate(tasks)]
        with checkpointed_blocks(lora) if settings.checkpoint_activations else nullcontext():
            while active := [client for client in clients if not client.is_done]:
                passes.gather([client.micro_batches() for client in active])
                for report in _update(active):
                    if on_step is not None:
                        on_step(report)
                lora.zero_grad()
        return [client.result() for client in clients]
    finally:
        lora.close()


def _update(clients: Sequence[_Client]) -> list[StepReport]:
    """Take every client's step on the gradients that have gathered, AdamW's of all in one."""
    begun = time.perf_counter()
    moving = [client for client in clients if client.settle()]
    rates = dict(zip(moving, step_together([client.optimiser for client in moving]), strict=True))
    reports = [client.close_step(rates.get(client, 0.0)) for client in clients]
    each = (time.perf_counter() - begun) / len(clients)
    for client in clients:
        client.seconds += each
    return reports


@dataclass(frozen=True)
class _Chance:
    """What a round's draws are named by, and where those of private steps come from."""

    seed: int
    round: int
    draws: Callable[[int, int, int], Draws]


class _Client:
    """A client while its round runs: its batches, its optimiser, what it has seen so far."""

    def __init__(
        self,
        lora: LoRAModel,
        passes: Passes,
        slot: int,
        task: ClientTask,
        settings: LocalTraining,
        chance: _Chance,
    ) -> None:
        self.slot, self.task, self._passes, self._lora, self._settings = slot, task, passes, lora, settings
        self._seed, self._round = chance.seed, chance.round - settings.start_rounds
        lora.load(slot, task.start)
        self._factors = dict(zip(factor_names(lora), lora.parameters(slot), strict=True))
        trained = {name: factor for name, factor in self._factors.items() if factor_of(name) in task.trains}
        steps, epochs = (1, None) if task.measures_gradient else (settings.steps, settings.epochs)
        self._private: PrivateSteps | None = None
        self._batches: Iterator[list[Unit]]
        if settings.privacy is None:
            rng = stream(chance.seed, "batches", self._round, task.client)
            order = list(batches(len(task.rows), settings.batch_size, rng, steps=steps, epochs=epochs))
            self._batches, self._num_steps = iter(list(batch[:, None]) for batch in order), len(order)
        else:
            draws, size = chance.draws(chance.seed, chance.round, task.client), settings.batch_size
            self._private = PrivateSteps.of(lora, task.rows, trained, settings.privacy, size, draws)
            self._batches, self._num_steps = self._private.batches(), self._private.num_steps(steps, epochs)
        first, total = first_step(settings.schedule_span, self._round, settings.total_rounds, self._num_steps)
        factor = schedule(settings.schedule, settings.warmup_steps, total)
        self._pull = pull_to_start(settings.proximal, self._factors, task.scale, trained)
        rates = [settings.learning_rate * factor(first + step) for step in range(self._num_steps)]
        self._correct = corrected_steps(task.correction, trained, task.scale, rates)
        state = self._state_to_begin_with()
        if state is not None and trained.keys() != self._factors.keys():
            state = {key: tensor for key, tensor in state.items() if key.rpartition(".")[0] in trained} or None
        self.optimiser = ClientOptimiser(trained, settings.adamw, factor, first=first, state=state)
        self._gradient: Adapter | None = None
        self._step, self._broken = 0, False
        self._examples = self._tokens = self._targets = 0
        self._nats = self.seconds = 0.0
        self._batch_tokens = self._batch_targets = 0
        self._batch_nats, self._last_loss = 0.0, math.nan

    def _state_to_begin_with(self) -> Mapping[str, Tensor] | None:
        task, settings = self.task, self._settings
        if task.prior is None:
            return task.optimiser_state
        rate, steps, ranks = settings.learning_rate, self._num_steps, task.start.ranks
        return state_of(task.prior, ranks, task.scale, betas=settings.betas, learning_rate=rate, num_steps=steps)

    @property
    def is_done(self) -> bool:
        """Whether all steps are taken, or a loss was not finite."""
        return self._broken or self._step == self._num_steps

    def micro_batches(self) -> list[MicroBatch]:
        """Cut the next batch into what goes through in one pass each; decided from this client alone."""
        units, settings = next(self._batches), self._settings
        rows = [[self.task.rows.row(int(index)) for index in unit] for unit in units]
        lengths = [[len(ids) for ids, _ in unit] for unit in rows]
        parts = self._passes.parts(lengths, settings.most_at_once)
        targets = [[num_targets(supervised) for _, supervised in unit] for unit in rows]
        count, learnt = sum(map(len, units)), sum(map(sum, targets))
        self._batch_tokens, self._batch_targets, self._batch_nats = sum(map(sum, lengths)), learnt, 0.0
        self._examples += count
        found = []
        for share, ends in shares(parts, lengths, targets, self._passes.parts):
            own = [rows[i][j] for i, members in share for j in members]
            weighed = [sum(targets[i][j] for j in members) for i, members in share]
            if self._private is None:
                # A row's mask is that of its place in the order in which rows are read.
                places = self._examples - count + np.array([i for i, _ in share])
                slots, weighed, weights = [(self.slot, len(share))], [sum(weighed)], [1 / max(1, learnt)]
            else:
                # Of its place among the client's: whether another row was drawn changes no mask.
                places = self._step * len(self.task.rows) + np.concatenate([units[i][members] for i, members in share])
                slots = [(self.slot + 1 + place, len(members)) for place, (_, members) in enumerate(share)]
                weights = [1 / (sum(targets[i]) or 1) for i, _ in share]
            keys = row_keys(self._seed, self._round, self.task.client, places)
            found.append(MicroBatch(self, own, keys, slots, weighed, weights, ends))
        return found

    def add(self, micro_batch: MicroBatch, nats: Sequence[float], seconds: float) -> None:
        """Record the losses and the time of one of this client's micro-batches, and take its units' gradients."""
        for of_row in nats:  # one by one: the sum then does not depend on how the batch was cut
            self._batch_nats += of_row
        self.seconds += seconds
        if self._private is not None and micro_batch.ends_units:
            self._private.gather(len(micro_batch.slots))

    def settle(self) -> bool:
        """Make of the gradients that have gathered those of the step; return whether the optimiser is to take it."""
        if self._private is not None:
            self._private.release()
        if self.task.measures_gradient:
            self._gradient = gradient_of(self._factors, self.task.scale)
            return False
        self._pull()
        return True

    def close_step(self, learning_rate: float) -> StepReport:
        """Correct the step that was taken, if one was, and count it."""
        if not self.task.measures_gradient:
            self._correct(learning_rate)
        self._step += 1
        self._tokens += self._batch_tokens
        self._targets += self._batch_targets
        self._nats += self._batch_nats
        self._last_loss = self._batch_nats / max(1, self._batch_targets)
        # Of private steps the loss is nobody's to see: where training blew up, the adapter tells.
        self._broken = self._private is None and not math.isfinite(self._last_loss)
        tokens = self._batch_tokens
        return StepReport(self.task.client, self._step, self._num_steps, self._last_loss, learning_rate, tokens)

    def result(self) -> ClientResult:
        """Read the slot and what was counted."""
        state = self.optimiser.export_state() if self.task.keeps_moments or self.task.shares_moments else {}
        kept = {**(self.task.optimiser_state or {}), **state} if self.task.keeps_moments else None
        shared = means_of(state, self.task.scale, self._settings.betas[1]) if self.task.shares_moments else {}
        stats = TrainingStats(
            num_rows=len(self.task.rows),
            num_tokens=self._tokens,
            num_loss_tokens=self._targets,
            num_steps=0 if self.task.sketches else self._step,
            loss_nats=self._nats / max(1, self._targets),
            loss_last_nats=self._last_loss,
            seconds=self.seconds,
        )
        return ClientResult(
            client=self.task.client,
            adapter=self._lora.adapter(self.slot),
            stats=stats if self._private is None else stats.without_rows(),
            num_examples_seen=self._examples,
            optimiser_state=kept,
            gradient=self._gradient,
            moments=shared,
        )
