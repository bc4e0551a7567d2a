"""What stays the same during a split run: who is cut where, what trains, what crosses, and who owns which module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedloom.errors import CutError, SettingsError
from fedloom.federation.robust import RobustRule
from fedloom.federation.sampling import sample_clients
from fedloom.lora.dropout import row_keys
from fedloom.models.cut import check_cuts, cuttable_parts, num_blocks
from fedloom.split.codecs import WireDtype
from fedloom.split.departures import Departures, nobody_leaves
from fedloom.split.split_step import rows_of_step
from fedloom.training.cohort_round import LocalTraining

SERVER = -1
"""The server's number among the owners of a module that deeper clients train too."""

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class SplitPlan:
    """A split run.

    Attributes:
        seed: the run's seed, of which every draw is a named stream.
        num_steps: optimiser steps of every client over the run.
        aggregate_every: steps I between two aggregations of the client-side adapters; the last period may be shorter.
        cut_layers: blocks on each client, bottom up.
        ranks, scales: of each client's adapter.
        server_rank, server_scale: of the server's.
        num_rows: each client's number of rows, which the server must know to follow its batches; by client where some
            are told later than others.
        training: batch size, optimiser, schedule and cores; ``steps`` and ``epochs`` are not read, nor is
            ``total_rounds``.
        server_update: one server step on all clients together, or one per client in turn (the release).
        tail_blocks: last blocks kept by the clients together with head, loss and labels; None: the server has them.
        client_half: whether client-side adapters train; frozen, a row's activations cross once and are cached.
        wire_dtype, gradient_wire_dtype: what activations and gradients are on the wire.
        error_feedback: whether the gradients' rounding error is carried over.
        micro_batches: parts of a step's batch that are under way at the same time.
        clients_per_round: clients drawn for each aggregation period; None: all.
        min_clients: clients without which the run ends.
        max_norm_ratio: an update whose norm is above this multiple of the last aggregation's median is dropped.
        max_weight: largest share of one client.
        robust: the rule by which few hostile updates cannot decide.
        max_length: tokens that a row can have; None: as many as the base's context.
        departures: who leaves a period when, where a run is replayed.
    """

    seed: int
    num_steps: int
    aggregate_every: int
    cut_layers: tuple[int, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    server_rank: int
    server_scale: float
    num_rows: tuple[int, ...] | Mapping[int, int]
    training: LocalTraining
    server_update: Literal["joint", "sequential"] = "joint"
    tail_blocks: int | None = None
    client_half: Literal["trained", "frozen"] = "trained"
    wire_dtype: WireDtype = "bf16"
    gradient_wire_dtype: WireDtype = "bf16"
    error_feedback: Literal["off", "on"] = "off"
    micro_batches: int = 1
    clients_per_round: int | None = None
    min_clients: int = 1
    max_norm_ratio: float = 100.0
    max_weight: float = 1.0
    robust: RobustRule = field(default_factory=RobustRule)
    max_length: int | None = None
    departures: Departures = nobody_leaves

    @property
    def num_clients(self) -> int:
        """Clients of the run."""
        return len(self.cut_layers)

    @property
    def num_rounds(self) -> int:
        """Aggregation periods of the run."""
        return math.ceil(self.num_steps / self.aggregate_every)

    def steps(self, round: int) -> range:
        """Return the steps of a period, counted from 0 over the run; periods count from 1."""
        return range((round - 1) * self.aggregate_every, min(round * self.aggregate_every, self.num_steps))

    @property
    def labels(self) -> Literal["server", "client"]:
        """Where the labels are."""
        return "server" if self.tail_blocks is None else "client"

    @property
    def is_frozen(self) -> bool:
        """Whether client-side adapters do not train."""
        return self.client_half == "frozen"

    def cohort(self, round: int) -> list[int]:
        """Return the clients of an aggregation period."""
        return sample_clients(self.seed, round, self.num_clients, self.clients_per_round or self.num_clients)

    def rows(self, client: int, step: int, micro_batch: int) -> NDArray[np.int64]:
        """Return the rows of a client's micro-batch, steps counted from 0 over the run."""
        batch = rows_of_step(self.seed, client, self.num_rows[client], self.training.batch_size, step)
        return np.array_split(batch, self.micro_batches)[micro_batch]

    def all_rows(self, client: int, step: int) -> NDArray[np.int64]:
        """Return the rows of a client's whole step."""
        return rows_of_step(self.seed, client, self.num_rows[client], self.training.batch_size, step)

    def row_keys(self, round: int, client: int, step: int, micro_batch: int) -> NDArray[np.uint64]:
        """Return the keys by which dropout knows the rows of a client's micro-batch, the same at client and server."""
        size = self.training.batch_size
        places = np.array_split(np.arange(step * size, (step + 1) * size), self.micro_batches)[micro_batch]
        return row_keys(self.seed, round, client, places)

    def check(self, model: nn.Module, shapes: Shapes) -> None:
        """Refuse a plan that this model or these clients cannot follow.

        Raises:
            CutError: for a cut outside the model.
            SettingsError: for a micro-batch without rows or a server without adapters.
        """
        depth = num_blocks(model)
        check_cuts(self.cut_layers, depth, self.tail_blocks or 0)
        if self.micro_batches > self.training.batch_size:
            raise SettingsError(
                f"split.micro_batches: expected at most training.batch_size ({self.training.batch_size}), "
                f"got {self.micro_batches}; lower it"
            )
        if not server_shapes(self, model, shapes):
            raise SettingsError("model.target_modules: expected modules in the server's blocks, got none; choose more")


def steps_for_epochs(num_rows: Sequence[int], batch_size: int, epochs: float) -> int:
    """Return the steps in which all clients together read ``epochs`` times as many rows as they have.

    Clients step in lockstep, so one with fewer rows than the mean reads its own more often.
    """
    return math.ceil(round(epochs * sum(num_rows) / (len(num_rows) * batch_size), 9))


def block_of(model: nn.Module, module: str) -> int:
    """Return the number of the block that a module is in.

    Raises:
        CutError: if it is in none.
    """
    prefix = f"{cuttable_parts(model).blocks}."
    if not module.startswith(prefix):
        raise CutError(
            f"model.target_modules: expected modules of decoder blocks, got {module}, which neither side owns; remove "
            "it"
        )
    return int(module.removeprefix(prefix).split(".")[0])


def owners_of(plan: SplitPlan, model: nn.Module, module: str) -> tuple[int, ...]:
    """Return who trains an adapter for a module: clients whose part holds it, and the server for the others.

    With frozen client halves a block that any client holds keeps no adapter, so that the result is one model.
    """
    block = block_of(model, module)
    if plan.is_frozen:
        return () if _is_in_tail(plan, model, module) or block < max(plan.cut_layers) else (SERVER,)
    if _is_in_tail(plan, model, module):
        return tuple(range(plan.num_clients))
    deep = tuple(client for client, cut_layer in enumerate(plan.cut_layers) if cut_layer > block)
    return deep if len(deep) == plan.num_clients else (SERVER, *deep)


def _is_in_tail(plan: SplitPlan, model: nn.Module, module: str) -> bool:
    return plan.tail_blocks is not None and block_of(model, module) >= num_blocks(model) - plan.tail_blocks


@dataclass(frozen=True)
class Segment:
    """Modules with the same owners, whose adapters are aggregated together: one state of the strategy each.

    Where deeper clients share a module with the server, the server counts with the rows of the clients whose
    blocks it runs: ``G_l ← Σ_{k: c_k > l} p_k W_kl + (Σ_{k: c_k ≤ l} p_k) W_server,l``.
    """

    shapes: Shapes
    owners: tuple[int, ...]

    def clients(self, cohort: Sequence[int]) -> list[int]:
        """Return the owners present in a cohort; the server always is."""
        return [owner for owner in self.owners if owner == SERVER or owner in cohort]


def segments(plan: SplitPlan, model: nn.Module, shapes: Shapes) -> list[Segment]:
    """Group the modules that some client trains by their owners, in the model's order."""
    grouped: dict[tuple[int, ...], dict[str, tuple[int, int]]] = {}
    for module, shape in shapes.items():
        owners = owners_of(plan, model, module)
        if any(owner != SERVER for owner in owners):
            grouped.setdefault(owners, {})[module] = shape
    return [Segment(modules, owners) for owners, modules in grouped.items()]


def server_shapes(plan: SplitPlan, model: nn.Module, shapes: Shapes) -> dict[str, tuple[int, int]]:
    """Return the modules that the server alone trains."""
    return {module: shape for module, shape in shapes.items() if owners_of(plan, model, module) == (SERVER,)}
