"""A step of several clients: their micro-batches share passes as far as the token budget allows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fedloom.errors import ModelError
from fedloom.lora.dropout import dropout_of
from fedloom.lora.layer import LoRAModel
from fedloom.lora.turns import Turn, Turns
from fedloom.models.families import model_type
from fedloom.training.cores import in_threads, spread_passes
from fedloom.training.local_training import LocalTraining
from fedloom.training.loss import accumulator, supervised_cross_entropy
from fedloom.training.output_head import OutputHead
from fedloom.training.packing import Row
from fedloom.training.row_passes import Batch, RowPasses


class Owner(Protocol):
    """Whose rows a micro-batch holds."""

    def add(self, micro_batch: MicroBatch, nats: Sequence[float], seconds: float) -> None:
        """Take the losses of the rows and the time of a micro-batch whose gradients have gathered in its slots."""
        ...


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Rows of one client's batch that go through in one pass.

    ``slots`` says which slot trains on how many of the rows, in order. ``targets`` are those of each slot's rows, and
    ``weights`` what each of them weighs in the loss that is minimised. A unit may go on in the next one.
    """

    owner: Owner
    rows: list[Row]
    keys: NDArray[np.uint64]
    slots: list[tuple[int, int]]
    targets: list[int]
    weights: list[float]
    ends_units: bool = True

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(ids) for ids, _ in self.rows]

    @property
    def num_targets(self) -> int:
        """Targets of all rows."""
        return sum(self.targets)


@dataclass(frozen=True, eq=False)
class Passes:
    """What a pass needs: the model with its slots, how rows go through it, its head, and what acts on every pass.

    ``token_budget`` are the tokens of a pass (:func:`spread`), whatever the number of ``cores``.
    """

    lora: LoRAModel
    rows: RowPasses
    head: OutputHead
    token_budget: int
    dropout: float
    label_smoothing: float
    cores: int

    def parts(self, lengths: Sequence[Sequence[int]], most: int | None) -> list[list[int]]:
        """Cut a client's batch of units, given by their rows' lengths, into what goes through in one pass each."""
        return self.rows.split(lengths, self.token_budget, most)

    def gather(self, batches: Sequence[Sequence[MicroBatch]]) -> None:
        """Gather the gradients of every client's batch, given as its micro-batches.

        The n-th micro-batches of all clients share passes as far as the token budget allows. A pass holds one
        micro-batch of a client at most. With several ``cores`` that many passes are under way at once.
        """
        passes: list[list[MicroBatch]] = []
        for turn in range(max(len(parts) for parts in batches)):
            ready = [parts[turn] for parts in batches if turn < len(parts) and parts[turn].num_targets]
            groups = self.rows.split([part.lengths for part in ready], self.token_budget)
            passes += [[ready[i] for i in members] for members in groups]
        turns = Turns()

        def run(number: int) -> tuple[list[float], list[float]]:
            with turns.turn(number) as turn, torch.enable_grad():
                return self._run(passes[number], turn)

        for parts, found in zip(passes, in_threads(run, range(len(passes)), self.cores), strict=True):
            _tell(parts, *found)

    def _run(self, parts: Sequence[MicroBatch], turn: Turn) -> tuple[list[float], list[float]]:
        """Run forward and backward over clients' micro-batches; return the nats of each row, and each client's time."""
        begun = time.perf_counter()
        device = self.head.weight_VD.device
        batch: Batch = self.rows.batch([row for part in parts for row in part.rows], device)
        lengths = iter(batch.lengths)
        segments = [(slot, sum(islice(lengths, count))) for part in parts for slot, count in part.slots]
        dropout = dropout_of(self.dropout, [part.keys for part in parts], batch.lengths, device)
        self.lora.route(segments, dropout, batch.lengths, batch.needed_index_K, turn)
        hidden_SD = self.rows.target_states(self.lora.model, batch)
        if not hidden_SD.requires_grad:
            raise ModelError(
                f"model.target_modules: expected adapted modules whose gradient reaches the loss of "
                f"{model_type(self.lora.model)!r}, none does; choose others, or another base"
            )
        weights, targets = [w for part in parts for w in part.weights], [n for part in parts for n in part.targets]
        weights_S = torch.from_numpy(np.repeat(weights, targets)).to(accumulator(hidden_SD.dtype)).to(device)
        loss, nats_S = supervised_cross_entropy(
            hidden_SD, self.head, batch.targets_S, weights_S, label_smoothing=self.label_smoothing
        )
        torch.autograd.backward(loss)
        of_row_N = np.zeros(len(batch.lengths))
        np.add.at(of_row_N, batch.row_of_target_S.cpu().numpy(), nats_S.cpu().double().numpy())
        per_token, rest = (time.perf_counter() - begun) / batch.num_tokens, iter(count for _, count in segments)
        return of_row_N.tolist(), [per_token * sum(islice(rest, len(part.slots))) for part in parts]


def _tell(parts: Sequence[MicroBatch], nats_N: list[float], seconds: list[float]) -> None:
    """Tell each owner the losses of its rows and its time."""
    rows = iter(nats_N)
    for part, took in zip(parts, seconds, strict=True):
        part.owner.add(part, list(islice(rows, len(part.rows))), took)


def spread(lora: LoRAModel, settings: LocalTraining, device: str) -> tuple[int, int]:
    """Return the tokens of a pass at most, and how many passes are under way at once; private steps are not spread."""
    if settings.privacy is not None:
        return settings.token_budget, 1
    return spread_passes(lora.model, device, settings.token_budget, settings.cores)
