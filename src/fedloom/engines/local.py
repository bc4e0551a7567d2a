"""The local engine: every client in this process, one after another or in cohorts, over one resident base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from fedloom.data.tokens import TokenSet
from fedloom.errors import FedloomError
from fedloom.federation.messages import (
    WireDtype,
    decode_broadcast,
    decode_update,
    encode_broadcast,
    encode_update,
)
from fedloom.federation.rounds import Arrival
from fedloom.lora.initial import Draw
from fedloom.lora.layer import LoRAModel
from fedloom.methods.state import Broadcast, Failure, Update
from fedloom.training.local import ClientResult, ClientTask, LocalTraining, StepReport, train_cohort


@dataclass
class LocalEngine:
    """Train clients over one base in this process, through real messages.

    Attributes:
        rows_of: a client's rows.
        training: how each client trains.
        wire: dtype of the messages; None where nothing crosses (centralised and standalone).
        clients_at_once: clients whose adapters are open at once; results do not depend on it beyond rounding.
        optimisers: optimiser state of each client, kept between rounds; None: every round starts a fresh optimiser,
            as FedIT's and FLoRA's clients do.
    """

    lora: LoRAModel
    rows_of: Callable[[int], TokenSet]
    training: LocalTraining
    seed: int
    wire: WireDtype | None = WireDtype.FP32
    clients_at_once: int = 1
    optimisers: dict[int, dict[str, Tensor]] | None = None
    on_step: Callable[[StepReport], None] | None = None

    def train(self, broadcasts: Sequence[Broadcast]) -> Iterator[Arrival]:
        """Train the clients, ``clients_at_once`` at a time, in the order given."""
        if broadcasts:
            self.lora.set_side(broadcasts[0].side)
        for first in range(0, len(broadcasts), self.clients_at_once):
            yield from self._train_cohort(broadcasts[first : first + self.clients_at_once])

    def _train_cohort(self, cohort: Sequence[Broadcast]) -> Iterator[Arrival]:
        received, sizes = zip(*(self._receive(broadcast) for broadcast in cohort), strict=True)
        try:
            tasks = [self._task(broadcast) for broadcast in received]
            results = train_cohort(
                self.lora, tasks, self.training, seed=self.seed, round=cohort[0].round, on_step=self.on_step
            )
        except FedloomError as error:
            if len(cohort) > 1:
                for broadcast in cohort:
                    yield from self._train_cohort([broadcast])
            else:
                yield Arrival(Failure(cohort[0].client, str(error)), sizes[0], 0)
            return
        for broadcast, size, result in zip(received, sizes, results, strict=True):
            yield self._arrival(broadcast, size, result)

    def _receive(self, broadcast: Broadcast) -> tuple[Broadcast, int]:
        """Return the broadcast as it arrives, and the bytes that crossed."""
        if self.wire is None:
            return broadcast, 0
        blob = encode_broadcast(broadcast, self.wire)
        return decode_broadcast(blob, broadcast.side), len(blob)

    def _task(self, broadcast: Broadcast) -> ClientTask:
        start = broadcast.start
        if isinstance(start, Draw):
            start = start.adapter(self.lora.shapes, broadcast.rank, self.seed)
        return ClientTask(
            client=broadcast.client,
            rows=self.rows_of(broadcast.client),
            rank=broadcast.rank,
            scale=broadcast.scale,
            start=start,
            optimiser_state=self.optimisers.get(broadcast.client) if self.optimisers is not None else None,
        )

    def _arrival(self, broadcast: Broadcast, download_bytes: int, result: ClientResult) -> Arrival:
        if self.optimisers is not None and result.optimiser_state is not None:
            self.optimisers[result.client] = result.optimiser_state
        update = Update(
            round=broadcast.round,
            client=result.client,
            adapter=result.adapter,
            num_rows=result.num_rows,
            num_tokens=result.num_tokens,
            num_loss_tokens=result.num_loss_tokens,
            num_steps=result.num_steps,
            loss_nats=result.loss_nats,
            loss_last_nats=result.loss_last_nats,
            seconds=result.seconds,
        )
        if self.wire is None:
            return Arrival(update, 0, 0)
        blob = encode_update(update, self.wire)
        return Arrival(decode_update(blob), download_bytes, len(blob))
