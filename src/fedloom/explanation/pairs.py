"""Which clients agree with which: cosines of their changes, from the uploads that a run kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedloom.federation.robust import change_of, gram
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods.client_half import Payload, Work
from fedloom.methods.state import Broadcast, News, ServerState, Update
from fedloom.methods.strategy import Strategy
from fedloom.training.stats import TrainingStats

Cosines = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Pairs:
    """Cosines of every two clients' changes of a round, over the modules asked for, and in each."""

    clients: tuple[int, ...]
    cosines: Cosines
    of_module: Mapping[str, Cosines]

    @property
    def mean_of_module(self) -> dict[str, float | None]:
        """The mean cosine of two clients in each module; None of one client."""
        num = len(self.clients)
        if num < 2:
            return dict.fromkeys(self.of_module)
        return {name: (sum(map(sum, one)) - num) / (num * (num - 1)) for name, one in self.of_module.items()}

    @property
    def extremes(self) -> tuple[tuple[int, int, float], tuple[int, int, float]] | None:
        """The two clients that agree least, and the two that agree most; None of one client."""
        found = [
            (one, other, self.cosines[k][j])
            for k, one in enumerate(self.clients)
            for j, other in enumerate(self.clients)
            if k < j
        ]
        return (min(found, key=lambda pair: pair[2]), max(found, key=lambda pair: pair[2])) if found else None


def pairs_of(
    uploads: Mapping[int, Adapter], before: ServerState, strategy: Strategy, ranks: Mapping[int, int]
) -> Pairs:
    """Return the cosines of what clients changed in the round after ``before``.

    As in :mod:`fedloom.federation.agreement`, that is the change of the product; of gradients, and of factors whose
    product the server does not know, what crossed.
    """
    work = strategy.client.work(before.round + 1)
    changes = []
    for client, adapter in uploads.items():
        start = strategy.start_for(before, client)
        broadcast = Broadcast(before.round + 1, client, ranks[client], 1.0, News(), start)
        changes.append(_change(Update(broadcast.round, client, adapter, TrainingStats(1)), broadcast, work))
    return cosines_of(tuple(uploads), changes)


def cosines_of(clients: tuple[int, ...], changes: Sequence[Mapping[str, Adapter]]) -> Pairs:
    """Return the cosines of changes, each given by module as pairs that count together."""
    grams = {name: gram([change[name] for change in changes]) for name in changes[0]}
    together = torch.stack(list(grams.values())).sum(dim=0)
    return Pairs(clients, _cosines(together), {name: _cosines(one) for name, one in grams.items()})


def _change(update: Update, broadcast: Broadcast, work: Work) -> dict[str, Adapter]:
    if work.keeps:
        began = broadcast.trained
        assert isinstance(began, Adapter)
        moved = {n: Pair(p.b_OR - began[n].b_OR, p.a_RI - began[n].a_RI) for n, p in update.adapter.items()}
        update, work = replace(update, adapter=Adapter(moved)), replace(work, payload=Payload.GRADIENT)
    return {
        name: change_of(replace(update, adapter=Adapter({name: pair})), broadcast, work)
        for name, pair in update.adapter.items()
    }


def _cosines(gram_KK: Tensor) -> Cosines:
    norms_K = gram_KK.diagonal().clamp_min(0.0).sqrt().clamp_min(1e-300)
    return tuple(map(tuple, (gram_KK / norms_K[:, None] / norms_K[None, :]).clamp(-1.0, 1.0).tolist()))
