"""Many clients on one machine: they share its base, the sides it holds, and packed passes, but no memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from fedloom.clients.client import Assignment, Client
from fedloom.clients.held_sides import HeldSides
from fedloom.clients.memory import Memory
from fedloom.data.tokens import TokenSet
from fedloom.errors import FedloomError, ModelError
from fedloom.federation.blob import WireDtype
from fedloom.federation.buffers import Buffer
from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import Adapter
from fedloom.methods.client_half import ClientHalf
from fedloom.training.cohort_round import ClientResult, LocalTraining, StepReport, train_cohort


class Asked(NamedTuple):
    """A message for one client, and what that client keeps."""

    client: int
    message: Buffer
    memory: Memory


class Answered(NamedTuple):
    """A client's answer, and what it keeps from then on."""

    message: bytes
    memory: Memory


@dataclass
class SharedBase:
    """A base and the clients that train on it, one cohort at a time.

    Attributes:
        rows_of: a client's rows.
        training: how each client trains.
        half: what each client trains, sends and keeps.
        sides: the sides held on this machine.
    """

    lora: LoRAModel
    rows_of: Callable[[int], TokenSet]
    training: LocalTraining
    seed: int
    half: ClientHalf
    sides: HeldSides = field(default_factory=HeldSides)
    on_step: Callable[[StepReport], None] | None = None
    _beside: Adapter | None = None

    def client(self, number: int, memory: Memory) -> Client:
        """Return a client of this machine, with what it keeps."""
        return Client(number, self.half, self.lora.shapes, self.seed, lambda: self.rows_of(number), self.sides, memory)

    def forget_side(self) -> None:
        """Put the side on again with the next cohort, since something else was put on the base."""
        self._beside = None

    def train(self, cohort: Sequence[Assignment]) -> list[ClientResult | FedloomError]:
        """Train clients together that share a side; if that fails, one by one, each with its error.

        Raises:
            ModelError: what is wrong with the base is no client's failure.
        """
        if not cohort:
            return []
        if any(one.side is not cohort[0].side for one in cohort):
            groups = groupby(cohort, key=lambda one: id(one.side))
            return [found for _, group in groups for found in self.train(list(group))]
        if cohort[0].side is not self._beside:
            self._beside = cohort[0].side
            self.lora.set_side(self._beside)
        tasks, round = [one.task for one in cohort], cohort[0].round
        try:
            return list(
                train_cohort(self.lora, tasks, self.training, seed=self.seed, round=round, on_step=self.on_step)
            )
        except ModelError:
            raise
        except FedloomError as error:
            return [error] if len(cohort) == 1 else [found for one in cohort for found in self.train([one])]

    def answers(self, asked: Sequence[Asked], dtype: WireDtype) -> list[Answered]:
        """Let clients read their messages, train together, and answer, each in the order it was asked.

        Raises:
            ModelError: the base that they share cannot be trained.
        """
        answers: dict[int, Answered] = {}
        ready: list[tuple[Client, Assignment]] = []
        for one in asked:
            client = self.client(one.client, one.memory)
            try:
                ready.append((client, client.receive(one.message)))
            except FedloomError as error:
                answers[one.client] = Answered(client.refuse(error), one.memory)
        results = self.train([assignment for _, assignment in ready])
        for (client, assignment), result in zip(ready, results, strict=True):
            if isinstance(result, FedloomError):
                blob = client.refuse(result)
            else:
                blob = client.answer(assignment, result, dtype)
            answers[client.number] = Answered(blob, client.memory)
        return [answers[one.client] for one in asked]
