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
from fedloom.models.families import model_type
from fedloom.training.loss import OutputHead, supervised_cross_entropy
from fedloom.training.packing import Row
from fedloom.training.row_passes import Batch, RowPasses


class Owner(Protocol):
    """Whose rows a micro-batch holds."""

    def add(self, micro_batch: MicroBatch, sum_nats: float, seconds: float) -> None:
        """Take the loss and the time of a micro-batch whose gradients have gathered in its slots."""
        ...


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Rows of one client's batch that go through in one pass.

    ``slots`` says which slot trains on how many of the rows, in order. ``targets`` are those of each slot's rows, and
    ``weights`` what each of them weighs in the loss that is minimised.
    """

    owner: Owner
    rows: list[Row]
    keys: NDArray[np.uint64]
    slots: list[tuple[int, int]]
    targets: list[int]
    weights: list[float]

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
    """What a pass needs: the model with its slots, how rows go through it, its head, and what acts on every pass."""

    lora: LoRAModel
    rows: RowPasses
    head: OutputHead
    token_budget: int
    dropout: float
    label_smoothing: float

    def gather(self, batches: Sequence[Sequence[MicroBatch]]) -> None:
        """Gather the gradients of every client's batch, given as its micro-batches.

        The n-th micro-batches of all clients share passes as far as the token budget allows. A pass holds one
        micro-batch of a client at most.
        """
        for turn in range(max(len(parts) for parts in batches)):
            ready = [parts[turn] for parts in batches if turn < len(parts) and parts[turn].num_targets]
            for members in self.rows.split([part.lengths for part in ready], self.token_budget):
                self._run([ready[i] for i in members])

    def _run(self, parts: Sequence[MicroBatch]) -> None:
        """Run forward and backward over several clients' micro-batches, and tell each its losses and time."""
        begun = time.perf_counter()
        device = self.head.weight_VD.device
        batch: Batch = self.rows.batch([row for part in parts for row in part.rows], device)
        lengths = iter(batch.lengths)
        segments = [(slot, sum(islice(lengths, count))) for part in parts for slot, count in part.slots]
        dropout = dropout_of(self.dropout, [part.keys for part in parts], batch.lengths, device)
        self.lora.route(segments, dropout, batch.lengths, batch.needed_index_K)
        hidden_SD = self.rows.target_states(self.lora.model, batch)
        if not hidden_SD.requires_grad:
            raise ModelError(
                f"model.target_modules: expected adapted modules whose gradient reaches the loss of "
                f"{model_type(self.lora.model)!r}, none does; choose others, or another base"
            )
        weights, targets = [w for part in parts for w in part.weights], [n for part in parts for n in part.targets]
        weights_S = torch.from_numpy(np.repeat(weights, targets)).to(device)
        loss, nats_S = supervised_cross_entropy(
            hidden_SD, self.head, batch.targets_S, weights_S, label_smoothing=self.label_smoothing
        )
        torch.autograd.backward(loss)
        counts = [part.num_targets for part in parts]
        sums = [float(part.sum()) for part in torch.split(nats_S.double().cpu(), counts)]
        per_token, rest = (time.perf_counter() - begun) / batch.num_tokens, iter(count for _, count in segments)
        for part, sum_nats in zip(parts, sums, strict=True):
            part.owner.add(part, sum_nats, per_token * sum(islice(rest, len(part.slots))))
