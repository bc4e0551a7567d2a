"""The server's side of a split step: messages in, gradients out, one optimiser step per cohort or per client."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.lora.dropout import dropout_of
from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import Adapter
from fedloom.lora.turns import Turn
from fedloom.models.causal import context_of
from fedloom.models.cut import num_blocks
from fedloom.split.codecs import Encoded, ErrorFeedback, encode
from fedloom.split.cut_messages import SplitMessage
from fedloom.split.party import MakeOptimiser, Party, without
from fedloom.split.pieces import Piece, Spread, joined
from fedloom.split.plan import SplitPlan, block_of
from fedloom.split.split_step import (
    Arrival,
    ServerHalf,
    ServerPass,
    backward_from_labels,
    backward_from_tails,
    in_order_of_joining,
    labels_between,
)
from fedloom.training.output_head import OutputHead

_ENDLESS = 1 << 20
"""Tokens of a row where neither the plan nor the base states a limit."""


@dataclass(frozen=True, eq=False)
class _Pass:
    """A piece of the step that has gone forward, and its turn to go back."""

    done: ServerPass
    tokens: dict[int, slice]
    turn: Turn


@dataclass(frozen=True, eq=False)
class CachedRow:
    """One row's activations as they crossed, and its labels where the server has them."""

    matrix: Encoded
    target_index_S: Tensor | None
    targets_S: Tensor | None


class SplitServer:
    """The server of a split run in this process: its blocks, its slot, and what it remembers of frozen clients."""

    def __init__(
        self, lora: LoRAModel, head: OutputHead | None, plan: SplitPlan, make_optimiser: MakeOptimiser
    ) -> None:
        self._lora, self._head, self._plan, self._slot, self._make = lora, head, plan, 0, make_optimiser
        stop = None if plan.tail_blocks is None else num_blocks(lora.model) - plan.tail_blocks
        self._half = ServerHalf(lora.model, plan.cut_layers, stop)
        weight = lora.base_weight
        self._dtype, self._device = weight.dtype, weight.device
        self.width: int = lora.model.config.hidden_size  # type: ignore[union-attr, assignment]
        self.max_length: int = plan.max_length or context_of(lora.model.config) or _ENDLESS
        self._modules_of_block: dict[int, set[str]] = {}
        for module in lora.shapes:
            self._modules_of_block.setdefault(block_of(lora.model, module), set()).add(module)
        self.feedback = ErrorFeedback()
        self._cache: dict[int, dict[int, CachedRow]] = {}
        self._party: Party | None = None
        self._round = 0
        self._spread = Spread.of(lora, plan.training.cores)
        self._passes: list[_Pass] = []

    def begin(
        self, start: Adapter, side: Adapter, round: int, state: Mapping[str, Tensor], drawn: Collection[str]
    ) -> None:
        """Start a period from an adapter of the server's modules, of which ``drawn`` have no moments yet.

        The server's slot is the last one that is open.
        """
        self._lora.set_side(Adapter({name: pair for name, pair in side.items() if name in self._lora.shapes}))
        self._round, self._slot = round, len(self._lora.slots) - 1
        self._party = Party(self._lora, self._slot, start, self._plan, round, self._make, without(state, drawn))

    @property
    def vocabulary(self) -> int | None:
        """What targets are below, where the labels are the server's."""
        return None if self._head is None or self._plan.labels == "client" else self._head.vocabulary

    @property
    def party(self) -> Party:
        """The server's slot and optimiser in the period under way."""
        assert self._party is not None
        return self._party

    def missing_rows(self, client: int, rows: Sequence[int]) -> list[int]:
        """Return the rows whose activations must cross: all of them, or those not cached if they never change."""
        if not self._plan.is_frozen:
            return list(rows)
        return [row for row in dict.fromkeys(rows) if row not in self._cache.get(client, {})]

    def remember(self, message: SplitMessage, rows: Sequence[int]) -> None:
        """Keep a frozen client's rows apart."""
        assert message.lengths_N is not None
        starts = np.concatenate([[0], np.cumsum(message.lengths_N.tolist())])
        cached = self._cache.setdefault(message.client, {})
        for row, start, end in zip(rows, starts[:-1], starts[1:], strict=True):
            scales_T = message.matrix.scales_T
            matrix = Encoded(message.matrix.values_TD[start:end], None if scales_T is None else scales_T[start:end])
            labels = labels_between(message.target_index_S, message.targets_S, slice(int(start), int(end)))
            cached[row] = CachedRow(matrix, *labels)

    def recall(self, client: int, rows: Sequence[int], step_rows: Sequence[int]) -> Arrival:
        """Return rows of a frozen client from the cache, in the order of the batch; its step has ``step_rows``."""
        cached = [self._cache[client][row] for row in rows]
        lengths = tuple(len(row.matrix.values_TD) for row in cached)
        starts = np.cumsum(lengths) - np.asarray(lengths)
        labelled = [(row.target_index_S, int(start)) for row, start in zip(cached, starts, strict=True)]
        indices = [index_S + start for index_S, start in labelled if index_S is not None]
        targets = [row.targets_S for row in cached if row.targets_S is not None]
        return Arrival(
            client,
            self._plan.cut_layers[client],
            torch.cat([row.matrix.decode(self._dtype) for row in cached]).to(self._device),
            lengths,
            self._num_cached_targets(client, step_rows),
            target_index_S=torch.cat(indices) if indices else None,
            targets_S=torch.cat(targets) if targets else None,
        )

    def _num_cached_targets(self, client: int, rows: Sequence[int]) -> int:
        labels = [self._cache[client][row].targets_S for row in rows]
        return sum(len(targets_S) for targets_S in labels if targets_S is not None)

    def arrival(self, message: SplitMessage) -> Arrival:
        """Decode a client's activations."""
        assert message.lengths_N is not None
        return Arrival(
            message.client,
            self._plan.cut_layers[message.client],
            message.matrix.decode(self._dtype).to(self._device),
            tuple(message.lengths_N.tolist()),
            message.num_loss_tokens,
            target_index_S=message.target_index_S,
            targets_S=message.targets_S,
        )

    def forward(self, arrivals: Sequence[Arrival], step: int, micro_batch: int) -> None:
        """Run the server's blocks on all arrivals of a micro-batch."""
        of_client = {arrival.client: arrival for arrival in in_order_of_joining(arrivals)}
        keys = {client: self._plan.row_keys(self._round, client, step, micro_batch) for client in of_client}
        pieces = self._spread.pieces({client: arrival.lengths for client, arrival in of_client.items()})

        def run(piece: Piece, turn: Turn) -> _Pass:
            own = [of_client[client].part(samples, piece.tokens[client]) for client, samples in piece.samples.items()]
            own_keys = np.concatenate([keys[client][samples] for client, samples in piece.samples.items()])
            route = partial(self._route, own_keys, turn)
            done = self._half.forward(own, wants_gradients=not self._plan.is_frozen, route=route)
            return _Pass(done, piece.tokens, turn)

        self._passes = self._spread.begin(run, pieces)

    def _route(self, keys_N: NDArray[np.uint64], turn: Turn, lengths: Sequence[int]) -> None:
        """Send the samples that have joined, the first ones, to the server's slot."""
        dropout = dropout_of(self._plan.training.dropout, [keys_N[: len(lengths)]], lengths, self._device)
        self._lora.route([(self._slot, sum(lengths))], dropout, lengths, turn=turn)

    def weigh(self, num_loss_tokens: Mapping[int, int]) -> None:
        """Set every client's share of the step: its supervised tokens among those of all."""
        total = max(1, sum(num_loss_tokens.values()))

        def weighed(done: ServerPass) -> ServerPass:
            arrivals = [replace(a, weight=num_loss_tokens.get(a.client, 0) / total) for a in done.arrivals]
            return replace(done, arrivals=arrivals)

        self._passes = [replace(one, done=weighed(one.done)) for one in self._passes]

    def learn(self) -> dict[int, float]:
        """Run backward from the labels; return each client's sum of nats."""
        head, smoothing = self._head, self._plan.training.label_smoothing
        assert head is not None

        def run(one: _Pass) -> dict[int, float]:
            with one.turn.ending():
                return backward_from_labels(one.done, head, label_smoothing=smoothing)

        nats = Counter[int]()
        for found in self._spread.run(run, self._passes):
            nats.update(found)
        return dict(nats)

    def hidden(self, step: int, micro_batch: int) -> list[SplitMessage]:
        """Return what the clients' tails need (U-shape)."""
        whole = joined(
            (a.client, one.done.hidden_of(i)) for one in self._passes for i, a in enumerate(one.done.arrivals)
        )
        return [
            SplitMessage("hidden", client, step, micro_batch, encode(hidden_TD, self._plan.wire_dtype))
            for client, hidden_TD in whole.items()
        ]

    def learn_from(self, tails: Sequence[SplitMessage]) -> None:
        """Run backward from the tails' gradients (U-shape)."""
        gradients = {message.client: message.matrix.decode(self._dtype).to(self._device) for message in tails}

        def run(one: _Pass) -> None:
            with one.turn.ending():
                backward_from_tails(
                    one.done, {c: gradients[c][tokens] for c, tokens in one.tokens.items() if c in gradients}
                )

        self._spread.run(run, self._passes)

    def step(self, num_loss_tokens: Mapping[int, int]) -> None:
        """Take the server's step.

        Where deeper clients run a block themselves, its gradient here is first made that of the mean loss of the
        clients whose block the server runs, as a client's is of its own; their aggregate then weighs each rightly.
        """
        # The loss is the mean over the tokens of all clients, but in these blocks the server sees only the tokens of
        # clients cut below them: without the factor its gradient would be too small by their share.
        cuts, total = self._plan.cut_layers, max(1, sum(num_loss_tokens.values()))
        for block in range(min(cuts), max(cuts)):
            passing = sum(tokens for client, tokens in num_loss_tokens.items() if cuts[client] <= block)
            if passing:
                self.party.scale_gradients(self._modules_of_block.get(block, set()), total / passing)
        if self.party.gradients_are_finite():
            self.party.step()
        else:  # of a client that is left out by now: whose step it spoiled, the others' next one does not
            self.party.drop_gradients()

    def gradients(self, step: int, micro_batch: int, nats: Mapping[int, float]) -> list[SplitMessage]:
        """Return the gradients of the clients' activations, none to frozen clients, and forget the pass."""
        passes, self._passes = self._passes, []
        found = {} if self._plan.is_frozen else joined(own for one in passes for own in one.done.gradients().items())
        return [
            SplitMessage("gradients", client, step, micro_batch, self._encode(client, grad_TD), loss_nats=nats[client])
            for client, grad_TD in found.items()
            if client in nats
        ]

    def _encode(self, client: int, grad_TD: Tensor) -> Encoded:
        if self._plan.error_feedback == "on":
            return self.feedback.encode(client, grad_TD, self._plan.gradient_wire_dtype)
        return encode(grad_TD, self._plan.gradient_wire_dtype)
