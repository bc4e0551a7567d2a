"""A split run from settings: the plan of who is cut where, its parties in this process, and its records.

A recipe's budget means the same as for every other method: each client takes ``num_rounds`` times its local steps or
epochs. The loop's own rounds are the periods between two aggregations, ``split.aggregate_every`` steps each, the last
one with what is left.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from fedloom.assembly.inputs import Inputs
from fedloom.assembly.participation import departures_of
from fedloom.assembly.round_plan import robust_of, rules_of, training_of
from fedloom.config import Settings
from fedloom.lora.layer import LoRAModel
from fedloom.methods import table
from fedloom.methods.options import MethodOptions
from fedloom.methods.strategy import Cohort, Strategy
from fedloom.models.cut import cut
from fedloom.reporting.peak_memory import peaks_of_round
from fedloom.split.departures import Departures, nobody_leaves
from fedloom.split.local_parties import local_parties
from fedloom.split.lockstep import SplitRecord, run_split
from fedloom.split.parties import SplitParties
from fedloom.split.plan import SplitPlan, steps_for_epochs
from fedloom.split.split_state import SplitState

TENSORS, NUMBERS = "state/split.safetensors", "state/split.json"


@dataclass(frozen=True)
class SplitRun:
    """A split run ready to go: its parties, and the names of the clients."""

    parties: SplitParties
    names: tuple[str, ...]
    evaluate_every: int

    @property
    def num_rounds(self) -> int:
        """Periods in all."""
        return self.parties.plan.num_rounds

    def initial(self) -> SplitState:
        """Return the state before the first step."""
        return self.parties.initial()

    def periods(self, state: SplitState, evaluate: Any, on_step: Any) -> Iterator[SplitRecord]:
        """Yield one record per period from a state on."""
        return run_split(state, self.parties, evaluate, evaluate_every=self.evaluate_every, on_step=on_step)


def checked_plan(settings: Settings, num_rows: Sequence[int], lora: LoRAModel) -> SplitPlan:
    """Return the plan for clients of so many rows, checked to fit the base as far as that shows without its weights.

    Raises:
        CutError: if the base cannot be cut there.
        SettingsError: if the plan cannot be followed.
        AdapterError: if a rank does not fit a module.
    """
    plan = split_plan(settings, num_rows)
    for rank in {*plan.ranks, plan.server_rank}:
        lora.check_rank(rank)
    plan.check(lora.model, lora.shapes)
    for cut_layer in sorted(set(plan.cut_layers)):
        cut(lora.model, cut_layer)
    return plan


def split_run(settings: Settings, inputs: Inputs, lora: LoRAModel, plan: SplitPlan) -> SplitRun:
    """Set up a split run over a base in this process.

    Raises:
        CutError: if the base does not compute the same when it is cut.
    """
    rows = [inputs.rows_of(client) for client in range(settings.federation.num_clients)]
    parties = local_parties(lora, plan, rows, partial(segment_strategy, settings), rules_of(settings, lora.shapes))
    return SplitRun(parties, inputs.partition.names, settings.evaluation.every)


def split_plan(settings: Settings, num_rows: Sequence[int] | Mapping[int, int]) -> SplitPlan:
    """Return the plan that the settings describe for clients of so many rows, by client where they are told later."""
    split = settings.split
    ranks = settings.client_ranks if split.client_rank is None else settings.per_client(split.client_rank)
    steps = steps_of(settings, num_rows)
    server_rank = split.server_rank or max(settings.client_ranks)
    return SplitPlan(
        seed=settings.run.seed,
        num_steps=steps,
        aggregate_every=split.aggregate_every,
        cut_layers=settings.per_client(split.cut_layer),
        ranks=ranks,
        scales=tuple(scale_at(settings, client, rank) for client, rank in enumerate(ranks)),
        server_rank=server_rank,
        server_scale=scale_at(settings, max(range(len(ranks)), key=settings.client_ranks.__getitem__), server_rank),
        num_rows=num_rows if isinstance(num_rows, Mapping) else tuple(num_rows),
        training=training_of(settings),
        server_update=split.server_update,
        tail_blocks=split.tail_blocks if split.labels == "client" else None,
        client_half=split.client_half,
        wire_dtype=split.wire_dtype,
        gradient_wire_dtype=split.gradient_wire_dtype,
        error_feedback=split.error_feedback,
        micro_batches=split.micro_batches,
        clients_per_round=settings.cohort_size,
        min_clients=settings.federation.min_clients,
        max_norm_ratio=settings.federation.max_norm_ratio,
        max_weight=settings.federation.max_weight,
        robust=robust_of(settings),
        max_length=settings.data.max_length,
        departures=_departures(settings),
    )


def _departures(settings: Settings) -> Departures:
    replayed = settings.federation.participation
    return nobody_leaves if replayed is None else departures_of(Path(replayed))


def steps_of(settings: Settings, num_rows: Sequence[int] | Mapping[int, int]) -> int:
    """Return the steps each client takes in all: the recipe's, or those in which all read its epochs' rows."""
    training, rounds = settings.training, settings.federation.num_rounds
    if training.local_steps is not None:
        return rounds * training.local_steps
    assert training.local_epochs is not None
    sizes = list(num_rows.values()) if isinstance(num_rows, Mapping) else num_rows
    return steps_for_epochs(sizes, training.batch_size, rounds * training.local_epochs)


def scale_at(settings: Settings, client: int, rank: int) -> float:
    """Return a client's scale at another rank than its own: alpha stays, or by default stays twice the rank."""
    own_rank, own_scale = settings.client_ranks[client], settings.client_scales[client]
    if settings.method.alpha is None:
        power = 1.0 if settings.method.scaling == "alpha/r" else 0.5
        return 2.0 * math.pow(rank, 1.0 - power)
    return own_scale * (own_rank / rank if settings.method.scaling == "alpha/r" else math.sqrt(own_rank / rank))


def segment_strategy(settings: Settings, cohort: Cohort) -> Strategy:
    """Return the strategy that aggregates client-side adapters."""
    options = MethodOptions(weighting=settings.method.weighting)
    strategy: Strategy = table.make(settings.split.aggregation, cohort, options)
    return strategy


def split_metrics(record: SplitRecord, method: str, names: Sequence[str]) -> dict[str, Any]:
    """Return a period as plain values, activations and adapters apart."""
    clients = record.clients
    up, down = (sum(getattr(c, f"{way}_bytes") for c in clients) for way in ("upload", "download"))
    moved_up, moved_down = (
        sum(getattr(c, f"activation_{way}_bytes") for c in clients) for way in ("upload", "download")
    )
    return {
        "round": record.round,
        "method": method,
        "num_steps": record.num_steps,
        "train_loss_nats": record.loss_nats,
        "train_loss_last_nats": record.loss_last_nats,
        "eval": record.evaluation or None,
        "aggregation_noise": record.aggregation_noise,
        "num_loss_tokens": sum(client.stats.num_loss_tokens for client in clients if client.stats is not None),
        "upload_bytes": up,
        "download_bytes": down,
        "bytes_by_kind": {
            "activations": {"upload_bytes": moved_up, "download_bytes": moved_down},
            "adapters": {"upload_bytes": up - moved_up, "download_bytes": down - moved_down},
        },
        "seconds": dict(record.seconds),
        **peaks_of_round(),
        "rank": record.state.global_adapter().ranks,
        "clients": [{"name": names[client.client], **client.as_dict()} for client in clients],
    }


def split_state_files(state: SplitState) -> dict[str, bytes]:
    """Return a split state as named files."""
    tensors, numbers = state.to_tensors()
    copies = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    return {TENSORS: save(copies), NUMBERS: json.dumps(numbers).encode()}


def read_split_state(tensors: bytes, numbers: bytes) -> SplitState:
    """Rebuild a split state from its files."""
    return SplitState.from_tensors(load(tensors), json.loads(numbers))
