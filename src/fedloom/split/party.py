"""One party's trainable half: a slot of the LoRA model, loaded from an adapter of the party's own modules.

The same optimiser and schedule serve a client and the server. What persists between aggregations: the moments of the
factors that go on from where they stopped. What starts afresh: the moments of factors that were drawn anew (FLoRA).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from fedloom.lora.layer import LoRAModel
from fedloom.lora.pair import Adapter, Pair, is_finite, rank_in
from fedloom.split.plan import SplitPlan
from fedloom.training.optimiser import ClientOptimiser, schedule


class Optimiser(Protocol):
    """What takes a party's step."""

    def step(self) -> float:
        """Update the factors from their gradients; return the learning rate."""
        ...

    def export_state(self) -> dict[str, Tensor]:
        """Return what the next period continues from."""
        ...


MakeOptimiser = Callable[[Mapping[str, nn.Parameter], SplitPlan, int, Mapping[str, Tensor] | None], Optimiser]
"""From a party's factors, the plan, the period's number and what its predecessor exported."""


def adamw(
    factors: Mapping[str, nn.Parameter], plan: SplitPlan, round: int, state: Mapping[str, Tensor] | None
) -> Optimiser:
    """Return AdamW on the plan's schedule; factors without state get zero moments and a step count of zero."""
    settings, steps = plan.training, plan.steps(round)
    over_the_run = settings.schedule_span == "run"
    first, total = (steps.start, plan.num_steps) if over_the_run else (0, len(steps))
    factor = schedule(settings.schedule, settings.warmup_steps, total)
    return ClientOptimiser(factors, settings.adamw, factor, first=first, state=_completed(factors, state))


def _completed(factors: Mapping[str, nn.Parameter], state: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    if not state:
        return None
    fresh: dict[str, Tensor] = {}
    for name, factor in factors.items():
        zeros = torch.zeros_like(factor, device="cpu")
        fresh |= {f"{name}.step": torch.zeros(()), f"{name}.exp_avg": zeros, f"{name}.exp_avg_sq": zeros.clone()}
    return {key: state.get(key, tensor) for key, tensor in fresh.items()}


class Party:
    """A slot while a period runs: its factors, its optimiser, and where it started."""

    def __init__(
        self,
        lora: LoRAModel,
        slot: int,
        start: Adapter,
        plan: SplitPlan,
        round: int,
        make_optimiser: MakeOptimiser,
        state: Mapping[str, Tensor] | None,
    ) -> None:
        self.slot, self._lora, self._modules = slot, lora, list(start)
        load_partly(lora, slot, start)
        self._factors = {name: factor for name, factor in factors_of(lora, slot).items() if module_of(name) in start}
        self.drop_gradients()
        self._optimiser = make_optimiser(self._factors, plan, round, state)

    def step(self) -> None:
        """Take one step, and clear this party's gradients."""
        self._optimiser.step()
        self.drop_gradients()

    def gradients_are_finite(self) -> bool:
        """Tell whether a step can be taken."""
        return all(is_finite(f.grad) for f in self._factors.values() if f.grad is not None)

    def scale_gradients(self, modules: Collection[str], factor: float) -> None:
        """Multiply the gradients of some modules."""
        for name, parameter in self._factors.items():
            if module_of(name) in modules and parameter.grad is not None:
                parameter.grad.mul_(factor)

    def drop_gradients(self) -> None:
        """Clear this party's gradients."""
        for factor in self._factors.values():
            if factor.grad is not None:
                factor.grad.zero_()

    def adapter(self) -> Adapter:
        """Return the party's own modules as effective pairs."""
        whole = self._lora.adapter(self.slot)
        return Adapter({module: whole[module] for module in self._modules})

    def export_state(self) -> dict[str, Tensor]:
        """Return the optimiser's state."""
        return self._optimiser.export_state()


def factors_of(lora: LoRAModel, slot: int) -> dict[str, nn.Parameter]:
    """Name a slot's factors."""
    names = [f"{module}.{factor}" for module in lora.shapes for factor in ("a_RI", "bt_RO")]
    return dict(zip(names, lora.parameters(slot), strict=True))


def module_of(factor: str) -> str:
    """Return the module whose factor a name is."""
    return factor.rpartition(".")[0]


def without(state: Mapping[str, Tensor], modules: Collection[str]) -> dict[str, Tensor]:
    """Drop what an optimiser state says of some modules."""
    return {key: tensor for key, tensor in state.items() if module_of(module_of(key)) not in modules}


def load_partly(lora: LoRAModel, slot: int, adapter: Adapter) -> None:
    """Load an adapter of some modules into a slot; the others get zeros, which add nothing and are never trained."""
    rank = lora.slots[slot].rank
    lora.load(slot, _spread(adapter, lora, rank))


def _spread(adapter: Adapter, lora: LoRAModel, rank: int) -> Adapter:
    return Adapter(
        {
            module: adapter[module]
            if module in adapter
            else Pair(torch.zeros(shape[0], rank_in(shape, rank)), torch.zeros(rank_in(shape, rank), shape[1]))
            for module, shape in lora.shapes.items()
        }
    )
