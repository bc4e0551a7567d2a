"""The clients of a split run that live in this process.

Here all clients share one resident base and the clients of one cut go through it in one packed pass, each with its own
adapter; a client elsewhere does the same with its own part of the model and one slot.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.clients.held_sides import HeldSides
from fedloom.data.tokens import TokenSet
from fedloom.lora.dropout import dropout_of
from fedloom.lora.initial import Draw
from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods.state import Broadcast, Failure, Update
from fedloom.models.cut import num_blocks, part_of, top_of
from fedloom.split.client_seam import Memory
from fedloom.split.codecs import Encoded, ErrorFeedback, encode
from fedloom.split.cut_messages import SplitMessage
from fedloom.split.message_checks import Expected, fitting
from fedloom.split.party import MakeOptimiser, Party, without
from fedloom.split.plan import Segment, SplitPlan
from fedloom.split.split_step import run_bottom, tail_step
from fedloom.training.output_head import OutputHead
from fedloom.training.packing import PackedBatch, num_targets, pack
from fedloom.training.stats import TrainingStats


@dataclass(frozen=True, eq=False)
class _Graph:
    """A forward pass that waits for gradients: whose token rows are where in it."""

    hidden_TD: Tensor
    rows: dict[int, slice]


@dataclass
class _Tally:
    """What a client has trained on since the period began."""

    steps: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    nats: float = 0.0
    last_nats: float = 0.0
    last_loss_tokens: int = 0
    begun: float = field(default_factory=time.perf_counter)


class LocalSplitClients:
    """Clients in this process. The open slots of ``lora`` are those of a period's clients, in the order of its cohort.

    With a slot each, all clients of a cut share one packed pass: a route gives every token the adapter of its client,
    so that no client's gradient depends on another's rows, as on machines of their own.
    """

    def __init__(
        self,
        lora: LoRAModel,
        head: OutputHead | None,
        plan: SplitPlan,
        segments: Sequence[Segment],
        rows: Sequence[TokenSet] | Mapping[int, TokenSet],
        make_optimiser: MakeOptimiser,
    ) -> None:
        self._lora, self._head, self._plan, self._segments, self._make = lora, head, plan, segments, make_optimiser
        self._rows = rows
        self._bottoms = {cut_layer: part_of(lora.model, 0, cut_layer) for cut_layer in set(plan.cut_layers)}
        depth = num_blocks(lora.model)
        self._tail = None if plan.tail_blocks is None else top_of(lora.model, depth - plan.tail_blocks)
        weight = lora.base_weight
        self._dtype, self._device = weight.dtype, weight.device
        self._parties: dict[int, Party] = {}
        self._broadcasts: dict[int, list[Broadcast]] = {}
        self._ready: dict[tuple[int, int], list[SplitMessage]] = {}
        self._graphs: dict[tuple[int, int], list[_Graph]] = {}
        self._tallies: dict[int, _Tally] = {}
        self._memory: dict[int, Memory] = {}
        self._refused: dict[int, str] = {}
        self._feedback = ErrorFeedback()
        self._sides = [HeldSides() for _ in segments]
        self._versions: dict[int, int] = {}
        self._slot_of: dict[int, int] = {}
        self._round = 0

    def begin(
        self, round: int, broadcasts: Mapping[int, Sequence[Broadcast]], memory: Mapping[int, Memory]
    ) -> tuple[Failure, ...]:
        """Load every client's adapter into its slot and set up its optimiser; all clients are here."""
        self._ready, self._graphs, self._parties, self._refused, self._round = {}, {}, {}, {}, round
        self._broadcasts = {client: list(received) for client, received in broadcasts.items()}
        self._slot_of = {client: slot for slot, client in enumerate(broadcasts)}
        self._tallies = {client: _Tally() for client in broadcasts}
        self._memory = {client: dict(carried) for client, carried in memory.items()}
        self._feedback.residuals_D = {c: m["residual"] for c, m in self._memory.items() if "residual" in m}
        sides: dict[str, Pair] = {}
        for client, received in self._broadcasts.items():
            for broadcast, segment in zip(received, self._own(client), strict=True):
                held = self._sides[self._segments.index(segment)]
                sides.update(held.caught_up(self._versions.get(client, 0), broadcast.news))
            self._versions[client] = round - 1
        self._lora.set_side(Adapter(sides))
        for client, received in self._broadcasts.items():
            if received:
                start, state = self._start_of(client), self._state_of(client)
                slot = self._slot_of[client]
                self._parties[client] = Party(self._lora, slot, start, self._plan, round, self._make, state)
        return ()

    def restore(self, version: int, sides: Sequence[Adapter]) -> None:
        """Let every client hold the segments' sides of a version, where a run resumes."""
        self._sides = [HeldSides(version, side) for side in sides]
        self._versions = dict.fromkeys(range(self._plan.num_clients), version)

    def request(self, step: int, micro_batch: int, rows: Mapping[int, Sequence[int]]) -> None:
        """Run the bottoms now: here nothing is gained by waiting."""
        by_cut: dict[int, list[int]] = {}
        for client in rows:
            by_cut.setdefault(self._plan.cut_layers[client], []).append(client)
        messages: list[SplitMessage] = []
        for cut_layer, clients in sorted(by_cut.items()):
            messages += self._run_bottom(cut_layer, {client: rows[client] for client in clients}, step, micro_batch)
        self._ready[step, micro_batch] = messages

    def activations(self, step: int, micro_batch: int) -> Iterator[SplitMessage | Failure]:
        """Return the activations that are ready."""
        yield from self._ready.pop((step, micro_batch))

    def tails(self, hidden: Sequence[SplitMessage]) -> Iterator[SplitMessage | Failure]:
        """Run the tail of all clients in one pass."""
        assert self._tail is not None
        assert self._head is not None
        step, micro_batch = hidden[0].step, hidden[0].micro_batch
        clients = [message.client for message in hidden]
        batch, counts = self._batch({c: self._plan.rows(c, step, micro_batch).tolist() for c in clients})
        whole = {client: self._num_loss_tokens(client, step) for client in clients}
        targets = [self._targets_in(client, step, micro_batch) for client in clients]
        weights = torch.tensor([1.0 / max(1, whole[client]) for client in clients], dtype=torch.float64)
        weights_S = weights.repeat_interleave(torch.tensor(targets)).to(self._device)
        self._route(counts, batch, step, micro_batch)
        received_TD = torch.cat([message.matrix.decode(self._dtype).to(self._device) for message in hidden])
        smoothing = self._plan.training.label_smoothing
        grad_TD, nats_S = tail_step(self._tail, self._head, received_TD, batch, weights_S, label_smoothing=smoothing)
        sums = [float(nats.sum()) for nats in torch.split(nats_S.cpu().double(), targets)]
        for client, part_TD, nats in zip(clients, torch.split(grad_TD, list(counts.values())), sums, strict=True):
            matrix = self._encode_gradient(client, part_TD)
            yield SplitMessage("tail gradients", client, step, micro_batch, matrix, whole[client], nats)

    def gradients(self, messages: Sequence[SplitMessage]) -> None:
        """Run backward through the bottoms; a client without a message that fits gets a gradient of zero."""
        if not messages:
            return
        graphs = self._graphs.pop((messages[0].step, messages[0].micro_batch), [])
        received, refused = fitting(messages, self._expected(messages, graphs))
        self._refused |= refused
        for graph in graphs:
            grad_TD = torch.zeros_like(graph.hidden_TD)
            for client, rows in graph.rows.items():
                if client in received:
                    grad_TD[rows] = received[client].matrix.decode(self._dtype).to(self._device)
            if graph.hidden_TD.requires_grad:
                graph.hidden_TD.backward(grad_TD)  # type: ignore[no-untyped-call]

    def finish(self, step: int, clients: Sequence[int]) -> Iterator[Failure]:
        """Step every client once."""
        for client in clients:
            party, tally = self._parties.get(client), self._tallies[client]
            self._book_rows(tally, client, step)
            if client in self._refused:
                yield Failure(client, self._refused.pop(client))
                continue
            if party is None:
                continue
            if not party.gradients_are_finite():
                party.drop_gradients()
                what = "expected finite gradients, got NaN or infinity; lower training.learning_rate"
                yield Failure(client, f"step {step}: {what}")
                continue
            party.step()
            tally.steps += 1

    def end(self, clients: Sequence[int]) -> Iterator[tuple[int, list[Update]] | Failure]:
        """Read every client's slot into one update per segment."""
        for client in clients:
            party = self._parties.get(client)
            if party is None:
                continue
            adapter = party.adapter()
            self._memory[client] = party.export_state()
            if client in self._feedback.residuals_D:
                self._memory[client]["residual"] = self._feedback.residuals_D[client]
            parts = zip(self._broadcasts[client], self._own(client), strict=True)
            yield client, [self._update(broadcast, segment, adapter) for broadcast, segment in parts]

    def memory(self) -> dict[int, Memory]:
        """Return the clients' optimiser states and residuals."""
        return self._memory

    def sides(self) -> list[Adapter]:
        """Return what is added to the base in the period under way, segment by segment."""
        return [held.at(self._round - 1) for held in self._sides]

    def _expected(self, messages: Sequence[SplitMessage], graphs: Sequence[_Graph]) -> dict[int, Expected]:
        """Return the gradients that fit the activations which wait for them, by client."""
        step, micro_batch, plan = messages[0].step, messages[0].micro_batch, self._plan
        width, dtype = self._lora.model.config.hidden_size, plan.gradient_wire_dtype  # type: ignore[union-attr]
        tokens = {client: rows.stop - rows.start for graph in graphs for client, rows in graph.rows.items()}
        return {c: Expected("gradients", c, step, micro_batch, width, dtype, count) for c, count in tokens.items()}  # type: ignore[arg-type]

    def _own(self, client: int) -> list[Segment]:
        return [segment for segment in self._segments if client in segment.owners]

    def _start_of(self, client: int) -> Adapter:
        """Join the starts of the segments that the client owns."""
        pairs: dict[str, Pair] = {}
        for broadcast, segment in zip(self._broadcasts[client], self._own(client), strict=True):
            pairs.update(start_of(broadcast, segment, self._plan.seed))
        return Adapter(pairs)

    def _state_of(self, client: int) -> Memory:
        """Return the moments that are kept: none for factors that are drawn anew."""
        parts = zip(self._broadcasts[client], self._own(client), strict=True)
        drawn = {
            module for broadcast, segment in parts if isinstance(broadcast.start, Draw) for module in segment.shapes
        }
        carried = {key: tensor for key, tensor in self._memory.get(client, {}).items() if key != "residual"}
        return without(carried, drawn)

    def _update(self, broadcast: Broadcast, segment: Segment, adapter: Adapter) -> Update:
        tally = self._tallies[broadcast.client]
        return Update(
            round=broadcast.round,
            client=broadcast.client,
            adapter=Adapter({module: adapter[module] for module in segment.shapes}),
            stats=TrainingStats(
                num_rows=len(self._rows[broadcast.client]),
                num_tokens=tally.tokens,
                num_loss_tokens=tally.loss_tokens,
                num_steps=tally.steps,
                seconds=time.perf_counter() - tally.begun,
            ),
            held=broadcast.news.version,
        )

    def _run_bottom(
        self, cut_layer: int, rows: Mapping[int, Sequence[int]], step: int, micro_batch: int
    ) -> list[SplitMessage]:
        if self._plan.is_frozen:
            return [self._frozen(cut_layer, client, own, step, micro_batch) for client, own in rows.items()]
        batch, counts = self._batch(rows)
        self._route(counts, batch, step, micro_batch)
        hidden_TD = run_bottom(self._bottoms[cut_layer], batch)
        spans = _spans(counts)
        self._graphs.setdefault((step, micro_batch), []).append(_Graph(hidden_TD, spans))
        return [self._message(c, step, micro_batch, hidden_TD.detach()[spans[c]], rows[c]) for c in counts]

    def _frozen(self, cut_layer: int, client: int, rows: Sequence[int], step: int, micro_batch: int) -> SplitMessage:
        """Run a frozen bottom row by row: a row's activations then do not depend on its company, bit for bit."""
        self._lora.route_all(None)
        batches = [pack([self._rows[client].row(row)], self._device) for row in rows]
        with torch.no_grad():
            hidden_TD = torch.cat([run_bottom(self._bottoms[cut_layer], batch) for batch in batches])
        return self._message(client, step, micro_batch, hidden_TD, rows)

    def _message(
        self, client: int, step: int, micro_batch: int, hidden_TD: Tensor, rows: Sequence[int]
    ) -> SplitMessage:
        batch = pack([self._rows[client].row(row) for row in rows])
        labels = self._plan.labels == "server"
        return SplitMessage(
            "activations",
            client,
            step,
            micro_batch,
            encode(hidden_TD, self._plan.wire_dtype),
            num_loss_tokens=self._num_loss_tokens(client, step),
            lengths_N=torch.tensor(batch.lengths, dtype=torch.int32),
            target_index_S=batch.target_index_S.int() if labels else None,
            targets_S=batch.targets_S.int() if labels else None,
        )

    def _batch(self, rows: Mapping[int, Sequence[int]]) -> tuple[PackedBatch, dict[int, int]]:
        """Pack several clients' rows; also return each client's tokens."""
        lengths = {client: int(self._rows[client].lengths[list(own)].sum()) for client, own in rows.items()}
        return pack([self._rows[c].row(row) for c, own in rows.items() for row in own], self._device), lengths

    def _route(self, counts: Mapping[int, int], batch: PackedBatch, step: int, micro_batch: int) -> None:
        if self._plan.is_frozen:
            self._lora.route_all(None)
            return
        keys = [self._plan.row_keys(self._round, client, step, micro_batch) for client in counts]
        dropout = dropout_of(self._plan.training.dropout, keys, batch.lengths, self._device)
        self._lora.route([(self._slot_of[client], tokens) for client, tokens in counts.items()], dropout, batch.lengths)

    def _num_loss_tokens(self, client: int, step: int) -> int:
        return _count_targets(self._rows[client], self._plan.all_rows(client, step))

    def _targets_in(self, client: int, step: int, micro_batch: int) -> int:
        return _count_targets(self._rows[client], self._plan.rows(client, step, micro_batch))

    def _encode_gradient(self, client: int, grad_TD: Tensor) -> Encoded:
        if self._plan.error_feedback == "on":
            return self._feedback.encode(client, grad_TD, self._plan.gradient_wire_dtype)
        return encode(grad_TD, self._plan.gradient_wire_dtype)

    def _book_rows(self, tally: _Tally, client: int, step: int) -> None:
        tally.tokens += int(self._rows[client].lengths[self._plan.all_rows(client, step)].sum())
        tally.loss_tokens += self._num_loss_tokens(client, step)


def start_of(broadcast: Broadcast, segment: Segment, seed: int) -> Adapter:
    """Return what an owner of a segment trains from: what it was sent, or a fresh draw from the stream it was given."""
    start = broadcast.start
    return start.adapter(segment.shapes, broadcast.rank, seed) if isinstance(start, Draw) else start


def _count_targets(rows: TokenSet, chosen: NDArray[np.int64]) -> int:
    return sum(num_targets(rows.row(int(row))[1]) for row in chosen)


def _spans(counts: Mapping[int, int]) -> dict[int, slice]:
    ends = np.cumsum(list(counts.values()))
    return {client: slice(int(end - n), int(end)) for (client, n), end in zip(counts.items(), ends, strict=True)}
