"""The clients of a split run that live in this process.

Here all clients share one resident base and the clients of one cut go through it in one packed pass, each with its own
adapter; a client elsewhere does the same with its own part of the model and one slot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

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
from fedloom.lora.turns import Turn
from fedloom.methods.state import Broadcast, Failure, Update
from fedloom.models.cut import num_blocks, part_of, top_of
from fedloom.split.client_record import Tally
from fedloom.split.client_seam import Memory
from fedloom.split.codecs import Encoded, ErrorFeedback, encode
from fedloom.split.cut_messages import SplitMessage
from fedloom.split.message_checks import Expected, fitting
from fedloom.split.party import MakeOptimiser, Party, without
from fedloom.split.pieces import Piece, Spread, joined
from fedloom.split.plan import Segment, SplitPlan
from fedloom.split.split_step import run_bottom, tail_step
from fedloom.training.output_head import OutputHead
from fedloom.training.packing import PackedBatch, num_targets, pack


@dataclass(frozen=True, eq=False)
class _Graph:
    """A forward pass that waits for gradients: what of whom is in it, and its turn to go back."""

    hidden_TD: Tensor
    piece: Piece
    turn: Turn


class LocalSplitClients:
    """Clients in this process. The open slots of ``lora`` are those of a period's clients, in the order of its cohort.

    With a slot each, all clients of a cut share packed passes: a route gives every token the adapter of its client, so
    that no client's gradient depends on another's rows, as on machines of their own.
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
        self._spread = Spread.of(lora, plan.training.cores)
        self._parties: dict[int, Party] = {}
        self._broadcasts: dict[int, list[Broadcast]] = {}
        self._ready: dict[tuple[int, int], list[SplitMessage]] = {}
        self._graphs: dict[tuple[int, int], list[_Graph]] = {}
        self._tallies: dict[int, Tally] = {}
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
        self._tallies = {client: Tally() for client in broadcasts}
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
        hidden = self._run_frozen(rows) if self._plan.is_frozen else self._run_bottoms(rows, step, micro_batch)
        self._ready[step, micro_batch] = [
            self._message(client, step, micro_batch, hidden_TD, rows[client]) for client, hidden_TD in hidden.items()
        ]

    def activations(self, step: int, micro_batch: int) -> Iterator[SplitMessage | Failure]:
        """Return the activations that are ready."""
        yield from self._ready.pop((step, micro_batch))

    def tails(self, hidden: Sequence[SplitMessage]) -> Iterator[SplitMessage | Failure]:
        """Run the tails of all clients."""
        assert self._tail is not None
        assert self._head is not None
        tail, head, smoothing = self._tail, self._head, self._plan.training.label_smoothing
        step, micro_batch = hidden[0].step, hidden[0].micro_batch
        received = {message.client: message.matrix.decode(self._dtype).to(self._device) for message in hidden}
        rows = {client: self._plan.rows(client, step, micro_batch).tolist() for client in received}
        whole = {client: self._num_loss_tokens(client, step) for client in received}
        pieces = self._spread.pieces(self._lengths(rows))

        def run(piece: Piece, turn: Turn) -> tuple[Tensor, Tensor, list[int]]:
            own_TD = torch.cat([received[client][tokens] for client, tokens in piece.tokens.items()])
            targets = [_count_targets(self._rows[c], rows[c][samples]) for c, samples in piece.samples.items()]
            weights = torch.tensor([1.0 / max(1, whole[client]) for client in piece.samples], dtype=torch.float64)
            weights_S = weights.repeat_interleave(torch.tensor(targets)).to(self._device)
            with turn.ending():
                batch = self._routed(piece, rows, step, micro_batch, turn)
                return *tail_step(tail, head, own_TD, batch, weights_S, label_smoothing=smoothing), targets

        gradients, nats = list[tuple[int, Tensor]](), dict.fromkeys(received, 0.0)
        for piece, (grad_TD, nats_S, targets) in zip(pieces, self._spread.begin(run, pieces), strict=True):
            gradients += [(client, grad_TD[own]) for client, own in piece.rows.items()]
            for client, own_S in zip(piece.samples, torch.split(nats_S.cpu().double(), targets), strict=True):
                nats[client] += float(own_S.sum())
        for client, own_TD in joined(gradients).items():
            matrix = self._encode_gradient(client, own_TD)
            yield SplitMessage("tail gradients", client, step, micro_batch, matrix, whole[client], nats[client])

    def gradients(self, messages: Sequence[SplitMessage]) -> None:
        """Run backward through the bottoms; a client without a message that fits gets a gradient of zero."""
        if not messages:
            return
        graphs = self._graphs.pop((messages[0].step, messages[0].micro_batch), [])
        received, refused = fitting(messages, self._expected(messages, graphs))
        self._refused |= refused
        decoded = {client: message.matrix.decode(self._dtype).to(self._device) for client, message in received.items()}

        def run(graph: _Graph) -> None:
            grad_TD = torch.zeros_like(graph.hidden_TD)
            for client, rows in graph.piece.rows.items():
                if client in decoded:
                    grad_TD[rows] = decoded[client][graph.piece.tokens[client]]
            with graph.turn.ending():
                if graph.hidden_TD.requires_grad:
                    graph.hidden_TD.backward(grad_TD)  # type: ignore[no-untyped-call]

        self._spread.run(run, graphs)

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
        # A client's last piece ends where all of its tokens do.
        tokens = {client: own.stop for graph in graphs for client, own in graph.piece.tokens.items()}
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
        return Update(
            round=broadcast.round,
            client=broadcast.client,
            adapter=Adapter({module: adapter[module] for module in segment.shapes}),
            stats=self._tallies[broadcast.client].stats(len(self._rows[broadcast.client])),
            held=broadcast.news.version,
        )

    def _run_bottoms(self, rows: Mapping[int, Sequence[int]], step: int, micro_batch: int) -> dict[int, Tensor]:
        """Run bottoms that train, and keep their graphs; return each client's activations (T, D)."""
        by_cut: dict[int, dict[int, list[int]]] = {}
        for client, lengths in self._lengths(rows).items():
            by_cut.setdefault(self._plan.cut_layers[client], {})[client] = lengths
        cut_pieces = [(cut, piece) for cut in sorted(by_cut) for piece in self._spread.pieces(by_cut[cut])]

        def run(cut_piece: tuple[int, Piece], turn: Turn) -> _Graph:
            cut_layer, piece = cut_piece
            batch = self._routed(piece, rows, step, micro_batch, turn)
            return _Graph(run_bottom(self._bottoms[cut_layer], batch), piece, turn)

        self._graphs[step, micro_batch] = graphs = self._spread.begin(run, cut_pieces)
        return joined((c, graph.hidden_TD.detach()[own]) for graph in graphs for c, own in graph.piece.rows.items())

    def _run_frozen(self, rows: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """Run frozen bottoms row by row: a row's activations then do not depend on its company, bit for bit."""

        def run(one: tuple[int, int]) -> tuple[int, Tensor]:
            client, row = one
            bottom = self._bottoms[self._plan.cut_layers[client]]
            self._lora.route_all(None)
            with torch.no_grad():
                return client, run_bottom(bottom, pack([self._rows[client].row(row)], self._device))

        return joined(self._spread.run(run, [(client, row) for client, own in rows.items() for row in own]))

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

    def _lengths(self, rows: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
        return {client: self._rows[client].lengths[list(own)].tolist() for client, own in rows.items()}

    def _routed(
        self, piece: Piece, rows: Mapping[int, Sequence[int]], step: int, micro_batch: int, turn: Turn
    ) -> PackedBatch:
        """Pack a piece of clients' rows, and send this thread's next pass to their slots."""
        own = [
            self._rows[client].row(row) for client, samples in piece.samples.items() for row in rows[client][samples]
        ]
        batch = pack(own, self._device)
        if self._plan.is_frozen:
            self._lora.route_all(None)
            return batch
        keys = [self._plan.row_keys(self._round, c, step, micro_batch)[samples] for c, samples in piece.samples.items()]
        dropout = dropout_of(self._plan.training.dropout, keys, batch.lengths, self._device)
        segments = [(self._slot_of[client], own.stop - own.start) for client, own in piece.tokens.items()]
        self._lora.route(segments, dropout, batch.lengths, turn=turn)
        return batch

    def _num_loss_tokens(self, client: int, step: int) -> int:
        return _count_targets(self._rows[client], self._plan.all_rows(client, step))

    def _encode_gradient(self, client: int, grad_TD: Tensor) -> Encoded:
        if self._plan.error_feedback == "on":
            return self._feedback.encode(client, grad_TD, self._plan.gradient_wire_dtype)
        return encode(grad_TD, self._plan.gradient_wire_dtype)

    def _book_rows(self, tally: Tally, client: int, step: int) -> None:
        tally.tokens += int(self._rows[client].lengths[self._plan.all_rows(client, step)].sum())
        tally.loss_tokens += self._num_loss_tokens(client, step)


def start_of(broadcast: Broadcast, segment: Segment, seed: int) -> Adapter:
    """Return what an owner of a segment trains from: what it was sent, or a fresh draw from the stream it was given."""
    start = broadcast.start
    return start.adapter(segment.shapes, broadcast.rank, seed) if isinstance(start, Draw) else start


def _count_targets(rows: TokenSet, chosen: Sequence[int] | NDArray[np.int64]) -> int:
    return sum(num_targets(rows.row(int(row))[1]) for row in chosen)
