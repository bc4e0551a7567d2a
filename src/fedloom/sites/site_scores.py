"""How well an adapter does on the rows that the sites hold out: each sends two sums and a count."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from safetensors.torch import save

from fedloom.lora.pair import Adapter
from fedloom.sites import policy
from fedloom.sites.frames import Hello, Ready, Score, Scored, framed

if TYPE_CHECKING:
    from fedloom.sites.sites_engine import Attendance


def scored_by_sites(engine: Attendance, round: int, adapter: Adapter) -> dict[str, Any]:
    """Let every site that is there score an adapter; return the mean loss over all their targets.

    A site that is away, or has no held-out rows, is not part of the mean; ``loss_nats_of_site`` says who is.
    """
    body = save({key: tensor.contiguous() for key, tensor in adapter.as_tensors().items()})
    data = framed(Score(run=engine.run, round=round), [body])
    asked: dict[str, float] = {}
    found: dict[str, Scored] = {}
    begun = engine.clock()
    while engine.clock() - begun <= engine.patience.deadline_s:
        now = engine.clock()
        waited_for = [s for s in engine.sites.values() if s.name not in found and s.is_usable and s.is_near(now)]
        for site in waited_for:
            if site.name not in asked:
                asked[site.name] = now
                engine.link.send(site.name, data)
        if not waited_for:
            break
        taken = engine.take()
        if taken is None:
            continue
        site, head, _ = taken
        is_lost = engine.is_lost(asked.get(site.name))
        if isinstance(head, Scored) and head.round == round:
            found[site.name] = head
            if head.refusal is not None:
                engine.note(f"{site.name} did not score: {policy.in_words(head.refusal)}")
        elif isinstance(head, Ready) or (isinstance(head, Hello) and head.state == "ready" and is_lost):
            asked.pop(site.name, None)
    return _mean_of(found)


def _mean_of(found: Mapping[str, Scored]) -> dict[str, Any]:
    scored = {name: one for name, one in found.items() if one.refusal is None and one.num_loss_tokens > 0}
    targets = sum(one.num_loss_tokens for one in scored.values())
    if not targets:
        return {}
    loss = sum(one.sum_nats for one in scored.values()) / targets
    return {
        "loss_nats": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "num_loss_tokens": targets,
        "num_rows": sum(one.num_rows for one in scored.values()),
        "loss_nats_of_site": {name: one.sum_nats / one.num_loss_tokens for name, one in scored.items()},
    }
