"""One step of split training as arithmetic on tensors: client forward, server forward and backward, client backward.

    client k:  H_k = bottom(x_k)
    server:    ℓ = Σ_k w_k ℓ_k,   w_k = S_k / Σ S        (S_k supervised tokens of client k in the step)
               step along ∂ℓ,     G_k = ∂ℓ_k / ∂H_k
    client k:  H_k.backward(G_k)

``G_k`` is the gradient of the client's own mean loss, so a client's learning rate means what it means without the
split, and the clients' mean, weighted by tokens, moves as one large batch does. Clients cut at different depths join
the server's pass where their part ends. In a U-shape the last blocks, the head and the loss are a second client part.

Letters: T tokens of all samples, D width, S supervised targets.
Source: SplitLoRA (arXiv 2407.00952), section III. Deviation: positions and masks follow from the samples' lengths, so
neither crosses, and no keys or values do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedloom.models.cut import Part, part_of, top_of
from fedloom.models.foreign_forward import foreign_forward
from fedloom.seeding import stream
from fedloom.training.attention import LAYOUT, Layout, layout, packed_attention
from fedloom.training.loss import accumulator, supervised_cross_entropy
from fedloom.training.output_head import OutputHead
from fedloom.training.packing import PackedBatch


def rows_of_step(seed: int, client: int, num_rows: int, batch_size: int, step: int) -> NDArray[np.int64]:
    """Return the rows that a client reads at a step, counted from 0 over the whole run.

    Epochs follow one another without a gap, each a fresh permutation: batch i is places ``[i·b, (i+1)·b)`` of them.
    A pure function, so client and server both know it and no row number crosses.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    orders = [_order_of_epoch(seed, client, num_rows, int(epoch)) for epoch in np.unique(places // num_rows)]
    rows: NDArray[np.int64] = np.concatenate(orders)[places - places[0] // num_rows * num_rows]
    return rows


@lru_cache(maxsize=256)
def _order_of_epoch(seed: int, client: int, num_rows: int, epoch: int) -> NDArray[np.int64]:
    return stream(seed, "split batches", client, epoch).permutation(num_rows)


def run_part(part: Part, inputs: Tensor, position_ids_T: Tensor, samples: Layout) -> Tensor:
    """Run a part on packed ids (T,) or activations (T, D) and return the activations (T, D) behind it."""
    with packed_attention(part.decoder, samples), foreign_forward(part.decoder):
        hidden_BTD: Tensor = part(inputs[None], position_ids=position_ids_T[None], use_cache=False, **{LAYOUT: samples})
    return hidden_BTD[0]


def run_bottom(part: Part, batch: PackedBatch) -> Tensor:
    """Run a client's bottom part on a packed batch."""
    return run_part(part, batch.input_ids_T, batch.position_ids_T, batch.layout)


def positions(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Return the positions (T,) of samples one behind the other, each from zero."""
    return torch.cat([torch.arange(length) for length in lengths]).to(device)


@dataclass(frozen=True, eq=False)
class Arrival:
    """What has reached the server from one client: activations (T, D) and, unless it keeps them, labels.

    ``num_loss_tokens`` is the client's S_k over the whole step, ``weight`` its share w_k among the clients.
    """

    client: int
    cut_layer: int
    hidden_TD: Tensor
    lengths: tuple[int, ...]
    num_loss_tokens: int
    weight: float = 1.0
    target_index_S: Tensor | None = None
    targets_S: Tensor | None = None

    def part(self, samples: slice, tokens: slice) -> Arrival:
        """Return some consecutive samples, which are these tokens; the whole step's numbers stay."""
        labels = labels_between(self.target_index_S, self.targets_S, tokens)
        return replace(
            self,
            hidden_TD=self.hidden_TD[tokens],
            lengths=self.lengths[samples],
            target_index_S=labels[0],
            targets_S=labels[1],
        )


def labels_between(
    target_index_S: Tensor | None, targets_S: Tensor | None, tokens: slice
) -> tuple[Tensor | None, Tensor | None]:
    """Return the targets of some tokens, and their places from the first of these on; None where none are told."""
    if target_index_S is None or targets_S is None:
        return None, None
    inside = (target_index_S >= tokens.start) & (target_index_S < tokens.stop)
    return target_index_S[inside] - tokens.start, targets_S[inside]


@dataclass(frozen=True, eq=False)
class ServerPass:
    """A forward pass at the server with its graph: each arrival's leaf and its token rows of ``hidden_TD``."""

    arrivals: list[Arrival]
    leaves: list[Tensor]
    rows: list[slice]
    hidden_TD: Tensor

    def hidden_of(self, index: int) -> Tensor:
        """Return the activations behind the server's last block that belong to one arrival."""
        return self.hidden_TD.detach()[self.rows[index]]

    def gradients(self) -> dict[int, Tensor]:
        """Return ``G_k`` of every client, once a backward pass has run."""
        return {
            arrival.client: _unweighted(leaf, arrival.weight)
            for arrival, leaf in zip(self.arrivals, self.leaves, strict=True)
        }


def in_order_of_joining(arrivals: Sequence[Arrival]) -> list[Arrival]:
    """Return the arrivals as their token rows lie in the server's pass: by their cuts, the shallowest first."""
    return sorted(arrivals, key=lambda arrival: arrival.cut_layer)


class ServerHalf:
    """The server's blocks, in stages between the clients' distinct cuts, up to ``stop`` or to the final norm."""

    def __init__(self, model: nn.Module, cuts: Iterable[int], stop: int | None = None) -> None:
        edges = sorted(set(cuts))
        self.stages: list[tuple[int, Part]] = [
            (start, part_of(model, start, end)) for start, end in itertools.pairwise(edges)
        ]
        last = top_of(model, edges[-1]) if stop is None else part_of(model, edges[-1], stop)
        self.stages.append((edges[-1], last))

    def forward(
        self,
        arrivals: Sequence[Arrival],
        *,
        wants_gradients: bool,
        route: Callable[[Sequence[int]], None] = lambda lengths: None,
    ) -> ServerPass:
        """Run all arrivals, each from its own cut, in one packed pass.

        ``route`` is told the samples' lengths before every stage: those that have joined by then.
        """
        ordered = in_order_of_joining(arrivals)
        leaves = [arrival.hidden_TD.detach().requires_grad_(wants_gradients) for arrival in ordered]
        present: list[Tensor] = []
        lengths: list[int] = []
        for cut_layer, part in self.stages:
            joining = [i for i, arrival in enumerate(ordered) if arrival.cut_layer == cut_layer]
            present += [leaves[i] for i in joining]
            lengths += [length for i in joining for length in ordered[i].lengths]
            if present:
                hidden_TD = torch.cat(present) if len(present) > 1 else present[0]
                samples = layout(lengths, hidden_TD.device)
                route(lengths)
                present = [run_part(part, hidden_TD, positions(lengths, hidden_TD.device), samples)]
        return ServerPass(ordered, leaves, _consecutive([len(leaf) for leaf in leaves]), present[0])


def backward_from_labels(done: ServerPass, head: OutputHead, *, label_smoothing: float = 0.0) -> dict[int, float]:
    """Compute ``Σ_k w_k ℓ_k`` from the labels the server has, run backward, and return each client's sum of nats.

    Of a pass without a target nothing is learnt.
    """
    indices, targets, weights, counts = [], [], [], []
    for arrival, rows in zip(done.arrivals, done.rows, strict=True):
        assert arrival.target_index_S is not None
        assert arrival.targets_S is not None
        indices.append(arrival.target_index_S.long() + rows.start)
        targets.append(arrival.targets_S.long())
        counts.append(len(arrival.targets_S))
        weights.append(arrival.weight / max(1, arrival.num_loss_tokens))
    if not sum(counts):
        return {arrival.client: 0.0 for arrival in done.arrivals}
    device = done.hidden_TD.device
    weights_S = torch.tensor(weights, dtype=torch.float64).repeat_interleave(torch.tensor(counts))
    hidden_SD = done.hidden_TD.index_select(0, torch.cat(indices).to(device))
    weights_S = weights_S.to(accumulator(hidden_SD.dtype)).to(device)  # there is no float64 on every device
    loss, nats_S = supervised_cross_entropy(
        hidden_SD, head, torch.cat(targets).to(device), weights_S, label_smoothing=label_smoothing
    )
    loss.backward()  # type: ignore[no-untyped-call]
    sums = [float(nats.sum()) for nats in torch.split(nats_S.cpu().double(), counts)]
    return {arrival.client: nats for arrival, nats in zip(done.arrivals, sums, strict=True)}


def backward_from_tails(done: ServerPass, gradients: dict[int, Tensor]) -> None:
    """Run backward from the gradients of the clients' own mean losses; a client that sent none does not count."""
    upstream_TD = torch.zeros_like(done.hidden_TD)
    for arrival, rows in zip(done.arrivals, done.rows, strict=True):
        if arrival.client in gradients:
            upstream_TD[rows] = gradients[arrival.client].to(upstream_TD) * arrival.weight
    done.hidden_TD.backward(upstream_TD)  # type: ignore[no-untyped-call]


def tail_step(
    part: Part,
    head: OutputHead,
    hidden_TD: Tensor,
    batch: PackedBatch,
    weights_S: Tensor,
    *,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Run the client's last blocks, head and loss; return the gradient (T, D) at their input and the nats (S,).

    ``weights_S`` are ``1 / S_k`` of each target's client, whose mean loss is what is differentiated.
    """
    leaf_TD = hidden_TD.detach().requires_grad_()
    last_TD = run_part(part, leaf_TD, batch.position_ids_T, batch.layout)
    hidden_SD = last_TD.index_select(0, batch.target_index_S)
    loss, nats_S = supervised_cross_entropy(
        hidden_SD, head, batch.targets_S, weights_S, label_smoothing=label_smoothing
    )
    loss.backward()  # type: ignore[no-untyped-call]
    return torch.zeros_like(leaf_TD) if leaf_TD.grad is None else leaf_TD.grad, nats_S


def _unweighted(leaf: Tensor, weight: float) -> Tensor:
    """Return a leaf's gradient without its client's weight; nothing where the client had nothing to learn."""
    return leaf.grad / weight if leaf.grad is not None and weight else torch.zeros_like(leaf)


def _consecutive(counts: Sequence[int]) -> list[slice]:
    ends = np.cumsum(counts)
    return [slice(int(end - count), int(end)) for count, end in zip(counts, ends, strict=True)]
