"""What comes back to the server at a split step: each message is checked, and used, or its client sits out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fedloom.methods.state import Failure
from fedloom.split.cut_messages import MessageKind, SplitMessage
from fedloom.split.departures import Departure, Stage
from fedloom.split.message_checks import Expected, fitting
from fedloom.split.plan import SplitPlan
from fedloom.split.server_half import SplitServer

_ACTIVATIONS: MessageKind = "activations"


class CutIntake:
    """Who of a period's cohort still takes part, why others do not, and what has come from whom.

    ``told`` are the supervised tokens that each client said its present step has, ``left_at`` when others left.
    """

    def __init__(self, plan: SplitPlan, server: SplitServer, cohort: Sequence[int], round: int) -> None:
        self._plan, self._server = plan, server
        self._replayed, self.left_at = plan.departures(round), dict[int, Departure]()
        self.moment = Departure(plan.steps(round).start, 0, "begin")
        self.present, self.reasons = list(cohort), dict[int, str]()
        self.up = dict.fromkeys(cohort, 0)
        self.told, self._targets = dict[int, int](), dict[int, int]()

    @property
    def longest_step(self) -> int:
        """The most supervised tokens that a client's step can have: all but the first of every row."""
        return self._plan.training.batch_size * (self._server.max_length - 1)

    def reach(self, step: int, micro_batch: int, stage: Stage) -> None:
        """Say where the period is; who left there in a run that is replayed leaves."""
        self.moment = Departure(step, micro_batch, stage)
        for client, moment in self._replayed.items():
            if moment == self.moment:
                self.leave_out(Failure(client, f"left at step {step}, as in the run that is replayed"))

    def begin_step(self) -> None:
        """Forget what was told of the step before."""
        self.told, self._targets = {}, {}

    def activations(
        self, step: int, micro_batch: int, num_rows: Mapping[int, int], num_parts: int
    ) -> dict[int, Expected]:
        """Return the one message of activations that fits, by client, of a step that comes in so many parts."""
        server, plan = self._server, self._plan
        return {
            client: Expected(
                kind=_ACTIVATIONS,
                client=client,
                step=step,
                micro_batch=micro_batch,
                width=server.width,
                dtype=plan.wire_dtype,
                num_rows=rows,
                max_length=server.max_length,
                vocabulary=server.vocabulary,
                max_loss_tokens=self.longest_step,
                loss_tokens=self.told.get(client),
                is_whole_step=num_parts == 1,
            )
            for client, rows in num_rows.items()
        }

    def accepted(
        self, messages: Iterable[SplitMessage | Failure], expected: Mapping[int, Expected]
    ) -> list[SplitMessage]:
        """Take what can be used; leave out, until the next aggregation, whoever sent nothing or nothing usable."""
        arrived: list[SplitMessage] = []
        for message in messages:
            if not isinstance(message, Failure):
                arrived.append(message)
            elif message.client in expected:
                self.leave_out(message)
        found, refused = fitting(arrived, expected)
        for client, message in found.items():
            self.up[client] += message.num_bytes
        for client in expected:
            if client not in found:
                self.leave_out(Failure(client, refused.get(client, "vanished: it sent nothing")))
        return [found[client] for client in sorted(found) if client in self.present]

    def counted_targets(self, messages: Iterable[SplitMessage], micro_batch: int) -> list[SplitMessage]:
        """Leave out who told at a step's beginning of other targets than it sent until its end."""
        kept = []
        for message in messages:
            client, told = message.client, message.num_loss_tokens
            self.told[client] = told
            if message.targets_S is not None:
                sent = self._targets[client] = self._targets.get(client, 0) + len(message.targets_S)
                if sent > told or (micro_batch == self._plan.micro_batches - 1 and sent != told):
                    reason = (
                        f"num_loss_tokens: expected the {sent} targets that were sent, got {told}; check the client"
                    )
                    self.leave_out(Failure(client, f"client {client}, step {message.step}: {reason}"))
                    continue
            kept.append(message)
        return kept

    def finite(self, step: int, nats: Mapping[int, float]) -> dict[int, float]:
        """Leave out whose activations gave a loss that is none."""
        self.moment = replace(self.moment, stage="loss")
        for client, loss in nats.items():
            if not math.isfinite(loss):
                reason = f"client {client}, step {step}: its activations gave a loss that is not finite; check its base"
                self.leave_out(Failure(client, reason))
        return {client: loss for client, loss in nats.items() if math.isfinite(loss)}

    def leave_out(self, failure: Failure) -> None:
        """Let a client sit out until the next aggregation."""
        if failure.client in self.present:
            self.present.remove(failure.client)
            self.reasons[failure.client], self.left_at[failure.client] = failure.reason, self.moment
