"""One aggregation period of a split run: the steps between two aggregations, and the aggregation that ends it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

from fedloom.errors import TooFewClientsError
from fedloom.federation.broadcasts import encode_broadcast
from fedloom.federation.coding import as_received
from fedloom.federation.intake import Arrival, ClientRecord, Intake, advice_after
from fedloom.federation.messages import decode_answer, encode_update
from fedloom.federation.rounds import RoundPlan
from fedloom.federation.server import aggregation_noise, broadcasts_for, next_state
from fedloom.federation.update_checks import Asked
from fedloom.lora.initial import Draw
from fedloom.lora.pair import Adapter
from fedloom.methods.state import Broadcast, Failure, ServerState, Update
from fedloom.split.client_halves import start_of
from fedloom.split.client_record import SplitClientRecord
from fedloom.split.cut_intake import CutIntake
from fedloom.split.cut_messages import SplitMessage
from fedloom.split.message_checks import Expected
from fedloom.split.parties import SplitParties
from fedloom.split.plan import SERVER, Segment
from fedloom.split.split_state import SplitState
from fedloom.training.stats import TrainingStats

IN_FLIGHT = 2
"""Micro-batches requested at a time: the one the server works on and the next.

While the server computes on one, the clients compute and send the next, which hides the link's delay. Each one more
would cost every client the memory of another forward pass.
"""


class Period:
    """The steps between two aggregations: who still takes part, what has crossed, what was lost."""

    def __init__(self, parties: SplitParties, state: SplitState) -> None:
        self._parties, self._plan, self._state = parties, parties.plan, state
        self.round = state.round + 1
        self.cohort = self._plan.cohort(self.round)
        self._intake = CutIntake(self._plan, parties.server, self.cohort, self.round)
        self.present, self.reasons, self.up = self._intake.present, self._intake.reasons, self._intake.up
        self.down = dict.fromkeys(self.cohort, 0)
        self.nats: dict[int, float] = dict.fromkeys(self.cohort, 0.0)
        self.loss_tokens = dict.fromkeys(self.cohort, 0)
        self.last_loss, self.last_losses = 0.0, dict[int, float]()
        self._share: dict[int, int] = {}
        self.broadcasts = [
            broadcasts_for(s, segment.clients(self.cohort), parties.strategy(segment), parties.ranks, parties.scales)
            for s, segment in zip(state.segments, parties.segments, strict=True)
        ]
        self._begin()

    def _begin(self) -> None:
        """Send all adapters out, the server's own share included."""
        self._parties.open_slots(self.cohort)
        received: dict[int, list[Broadcast]] = {client: [] for client in self.cohort}
        server_pairs = dict(self._state.server)
        drawn: set[str] = set()
        for segment, broadcasts in zip(self._parties.segments, self.broadcasts, strict=True):
            for broadcast in broadcasts:
                if broadcast.client == SERVER:
                    server_pairs.update(start_of(broadcast, segment, self._plan.seed))
                    drawn |= set(segment.shapes) if isinstance(broadcast.start, Draw) else set()
                else:
                    received[broadcast.client].append(self._as_received(broadcast))
        memory = {client: dict(carried) for client, carried in self._state.clients.items()}
        self._intake.reach(self._plan.steps(self.round).start, 0, "begin")
        for failure in self._parties.clients.begin(self.round, received, memory):
            self._intake.leave_out(failure)
        server = self._parties.server
        server.begin(Adapter(server_pairs), self._state.side(), self.round, self._state.server_memory, drawn)
        server.feedback.residuals_D = dict(self._state.residuals)

    def _as_received(self, broadcast: Broadcast) -> Broadcast:
        """Return a broadcast as its client gets it over the wire; only a first start is not rounded already."""
        start = broadcast.start
        if isinstance(start, Draw):
            return broadcast
        return replace(broadcast, start=as_received(start, self._parties.rules.wire))

    def step(self, step: int) -> float:
        """Take one step with all clients present; return its mean loss in nats."""
        before = dict(self.nats)
        counted: dict[int, int] = {}
        groups = [list(self.present)] if self._plan.server_update == "joint" else [[c] for c in self.present]
        for group in groups:
            self._share = {}
            self._intake.begin_step()
            self._group_step(step, group)
            counted |= {client: tokens for client, tokens in self._share.items() if client in group}
        for client, tokens in counted.items():
            self.loss_tokens[client] += tokens
            self.last_losses[client] = (self.nats[client] - before[client]) / max(1, tokens)
        self.last_loss = sum(self.nats[c] - before[c] for c in counted) / max(1, sum(counted.values()))
        return self.last_loss

    def _group_step(self, step: int, group: list[int]) -> None:
        """Run a group's micro-batches, then let the server and each of its clients step exactly once."""
        server, clients, parts = self._parties.server, self._parties.clients, self._plan.micro_batches
        if self._plan.is_frozen:
            self._fetch_frozen(step, group)
        asked = 0
        for micro_batch in range(parts):
            while asked < min(parts, micro_batch + IN_FLIGHT) and not self._plan.is_frozen:
                rows = {c: self._plan.rows(c, step, asked).tolist() for c in group if c in self.present}
                clients.request(step, asked, rows)
                asked += 1
            self._micro_batch(step, micro_batch, group)
        if any(client in self.present for client in group):
            server.step(self._share)
        self._intake.reach(step, 0, "finish")
        for failure in clients.finish(step, [client for client in group if client in self.present]):
            self._intake.leave_out(failure)

    def _micro_batch(self, step: int, micro_batch: int, group: list[int]) -> None:
        server, clients = self._parties.server, self._parties.clients
        self._intake.reach(step, micro_batch, "activations")
        if self._plan.is_frozen:
            arrivals = [
                server.recall(c, self._plan.rows(c, step, micro_batch).tolist(), self._plan.all_rows(c, step).tolist())
                for c in group
                if c in self.present
            ]
        else:
            expected = [client for client in group if client in self.present]
            rows = {c: len(self._plan.rows(c, step, micro_batch)) for c in expected}
            messages = self._intake.accepted(
                clients.activations(step, micro_batch),
                self._intake.activations(step, micro_batch, rows, self._plan.micro_batches),
            )
            arrivals = [server.arrival(message) for message in self._intake.counted_targets(messages, micro_batch)]
        if not arrivals:
            return
        server.forward(arrivals, step, micro_batch)
        if self._plan.labels == "server":
            self._share = self._share or {arrival.client: arrival.num_loss_tokens for arrival in arrivals}
            server.weigh(self._share)
            nats = self._intake.finite(step, server.learn())
        else:
            nats = self._learn_from_tails(step, micro_batch)
        for client, sum_nats in nats.items():
            self.nats[client] += sum_nats
        gradients = server.gradients(step, micro_batch, nats)
        self._count(gradients, self.down)
        clients.gradients(gradients)

    def _learn_from_tails(self, step: int, micro_batch: int) -> dict[int, float]:
        server, clients = self._parties.server, self._parties.clients
        self._intake.reach(step, micro_batch, "tails")
        hidden = [message for message in server.hidden(step, micro_batch) if message.client in self.present]
        self._count(hidden, self.down)
        expected = {
            m.client: Expected(
                kind="tail gradients",
                client=m.client,
                step=step,
                micro_batch=micro_batch,
                width=server.width,
                dtype=self._plan.gradient_wire_dtype,
                num_tokens=m.num_tokens,
                max_loss_tokens=self._intake.longest_step,
                loss_tokens=self._intake.told.get(m.client),
            )
            for m in hidden
        }
        tails = self._intake.accepted(clients.tails(hidden) if hidden else (), expected)
        self._share = self._share or {message.client: message.num_loss_tokens for message in tails}
        server.weigh(self._share)
        server.learn_from(tails)
        return {message.client: message.loss_nats for message in tails}

    def _fetch_frozen(self, step: int, group: list[int]) -> None:
        """Have the rows of this step that never crossed sent once."""
        server, clients = self._parties.server, self._parties.clients
        self._intake.reach(step, 0, "activations")
        rows = {c: server.missing_rows(c, self._plan.all_rows(c, step).tolist()) for c in group if c in self.present}
        wanted = {client: missing for client, missing in rows.items() if missing}
        if wanted:
            clients.request(step, 0, wanted)
            num_rows = {client: len(missing) for client, missing in wanted.items()}
            # Of the step's targets only those of its missing rows come along.
            fitting = self._intake.activations(step, 0, num_rows, num_parts=2)
            for message in self._intake.accepted(clients.activations(step, 0), fitting):
                server.remember(message, wanted[message.client])

    def _count(self, messages: Iterable[SplitMessage], counter: dict[int, int]) -> None:
        for message in messages:
            counter[message.client] += message.num_bytes

    def mean_loss(self) -> float:
        """Return the mean loss in nats over all targets of the period."""
        return sum(self.nats.values()) / max(1, sum(self.loss_tokens.values()))

    def aggregate(self) -> tuple[SplitState, float | None, tuple[SplitClientRecord, ...]]:
        """Collect one update per participant, aggregate segment by segment, and return the next state.

        Raises:
            TooFewClientsError: if too few are left.
        """
        server = self._parties.server
        arrivals, adapter_up = self._collect()
        self._require_enough()
        states: list[ServerState] = []
        noises: list[float] = []
        parts: dict[int, list[ClientRecord]] = {client: [] for client in self.cohort}
        for index in range(len(self._parties.segments)):
            state, noise, taken = self._aggregate_segment(index, arrivals[index])
            states.append(state)
            noises += [noise] if noise is not None else []
            for record in taken:
                if record.client != SERVER:
                    parts[record.client].append(record)
        whole = server.party.adapter()
        next_one = SplitState(
            round=self.round,
            segments=tuple(states),
            server=Adapter({module: whole[module] for module in self._parties.server_shapes}),
            server_memory=server.party.export_state(),
            residuals=dict(server.feedback.residuals_D),
            clients=self._parties.clients.memory(),
        )
        records = tuple(self._record(client, parts[client], adapter_up.get(client, 0)) for client in self.cohort)
        return next_one, max(noises) if noises else None, records

    def _collect(self) -> tuple[list[list[Arrival]], dict[int, int]]:
        """Ask all clients present for updates; the server adds its own in place of clients with fewer blocks."""
        arrivals: list[list[Arrival]] = [[] for _ in self._parties.segments]
        upload: dict[int, int] = {}
        self._intake.reach(self._plan.steps(self.round).stop, 0, "end")
        for outcome in self._parties.clients.end(list(self.present)):
            if isinstance(outcome, Failure):
                self._intake.leave_out(outcome)
                continue
            client, updates = outcome
            if client not in self.present:
                continue
            own = [i for i, segment in enumerate(self._parties.segments) if client in segment.owners]
            for index, update in zip(own, updates, strict=True):
                wire, segment = self._parties.rules.wire, self._parties.segments[index]
                blob = encode_update(self._counted(update), update.adapter.as_tensors(), wire)
                upload[client] = upload.get(client, 0) + len(blob)
                sent = next(b for b in self.broadcasts[index] if b.client == client)
                arrivals[index].append(Arrival(self._read(blob, sent, segment), 0, len(blob)))
        for index, segment in enumerate(self._parties.segments):
            if SERVER in segment.owners:
                arrivals[index] += self._of_server(segment)
        return arrivals, upload

    def _read(self, blob: bytes, sent: Broadcast, segment: Segment) -> Update | Failure:
        wire, seed = self._parties.rules.wire, self._plan.seed
        work = self._parties.strategy(segment).client.work(self.round)
        return decode_answer(
            blob, sent, work, segment.shapes, wire, lambda draw: draw.adapter(segment.shapes, sent.rank, seed)
        )

    def _of_server(self, segment: Segment) -> list[Arrival]:
        shallow = [client for client in self.present if client not in segment.owners]
        if not shallow:
            return []
        whole = self._parties.server.party.adapter()
        adapter = Adapter({module: whole[module] for module in segment.shapes})
        asked, tokens = self._asked(segment, SERVER), sum(self.loss_tokens[c] for c in shallow)
        stats = TrainingStats(asked.num_rows, tokens, tokens, asked.max_steps)
        return [Arrival(Update(self.round, SERVER, adapter, stats, self._state.round), 0, 0)]

    def _asked(self, segment: Segment, client: int) -> Asked:
        """Return what the period asked of a client; of the server, the work of those it stands in for."""
        of = [c for c in self.present if c not in segment.owners] if client == SERVER else [client]
        num_rows, steps = sum(self._plan.num_rows[one] for one in of), len(self._plan.steps(self.round))
        read = steps * self._plan.training.batch_size
        return Asked(num_rows, steps, read * self._parties.server.max_length, read * len(of))

    def _counted(self, update: Update) -> Update:
        """Return an update with the server's own counts of its client's loss and supervised tokens."""
        tokens = self.loss_tokens[update.client]
        loss = self.nats[update.client] / max(1, tokens)
        last = self.last_losses.get(update.client, loss)
        counted = replace(update.stats, num_loss_tokens=tokens, loss_nats=loss, loss_last_nats=last)
        return replace(update, stats=counted)

    def _aggregate_segment(
        self, index: int, arrivals: Sequence[Arrival]
    ) -> tuple[ServerState, float | None, tuple[ClientRecord, ...]]:
        state, segment, parties = self._state.segments[index], self._parties.segments[index], self._parties
        if not arrivals:
            return replace(state, round=self.round, chain=(*state.chain, Adapter())), None, ()
        plan = RoundPlan(
            num_rounds=self._plan.num_rounds,
            strategy=parties.strategy(segment),
            rules=parties.rules,
            sample=self._plan.cohort,
            shapes=segment.shapes,
            ranks=parties.ranks,
            scales=parties.scales,
            asked=partial(self._asked, segment),
            max_norm_ratio=self._plan.max_norm_ratio,
            max_weight=self._plan.max_weight,
            robust=self._plan.robust,
        )
        work = plan.strategy.client.work(self.round)
        intake = Intake(plan, work, state, self.broadcasts[index], trusted=(SERVER,))
        aggregate = plan.strategy.aggregate(state, intake.usable(arrivals, lambda update: None))
        following = next_state(state, aggregate, parties.rules, intake.norms, intake.held, work.sends)
        return following, aggregation_noise(aggregate.applied, aggregate.ideal), intake.records(aggregate.weights)

    def _require_enough(self) -> None:
        if len(self.present) >= self._plan.min_clients:
            return
        reasons = "; ".join(f"client {client}: {reason}" for client, reason in self.reasons.items())
        raise TooFewClientsError(
            f"round {self.round}: expected at least {self._plan.min_clients} clients (federation.min_clients) to reach "
            f"the aggregation, got {len(self.present)} ({reasons}); {advice_after(self.round - 1)}"
        )

    def _record(self, client: int, parts: Sequence[ClientRecord], adapter_up: int) -> SplitClientRecord:
        wire = self._parties.rules.wire
        sent = [b for broadcasts in self.broadcasts for b in broadcasts if b.client == client]
        adapter_down = sum(len(encode_broadcast(broadcast, wire)) for broadcast in sent)
        reasons = [self.reasons.get(client), *(part.reason for part in parts)]
        counted = [part.stats for part in parts if part.stats is not None]
        tokens = self.loss_tokens[client]
        return SplitClientRecord(
            client=client,
            reason=next((reason for reason in reasons if reason is not None), None),
            download_bytes=self.down[client] + adapter_down,
            upload_bytes=self.up[client] + adapter_up,
            stats=TrainingStats(
                num_rows=self._plan.num_rows[client],
                num_tokens=max((stats.num_tokens for stats in counted), default=0),
                num_loss_tokens=tokens,
                num_steps=max((stats.num_steps for stats in counted), default=0),
                loss_nats=self.nats[client] / max(1, tokens),
                loss_last_nats=self.last_losses.get(client, 0.0),
                seconds=max((stats.seconds for stats in counted), default=0.0),
            ),
            norm=math.sqrt(sum(part.norm**2 for part in parts if part.norm is not None)) if parts else None,
            weight=max((part.weight for part in parts), default=0.0),
            activation_upload_bytes=self.up[client],
            activation_download_bytes=self.down[client],
            left_at=self._intake.left_at.get(client),
        )
