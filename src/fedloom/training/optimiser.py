"""The local optimiser: AdamW over one client's factors, its learning-rate schedule and its own gradient clipping.

The steps of several clients are taken in calls that they share: a client's arithmetic is its own, and so are its bits.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from fedloom.errors import AdapterError, SettingsError
from fedloom.lora.transfer import moved_together

Schedule = Literal["constant", "linear", "cosine"]
ScheduleSpan = Literal["round", "run"]

_STATES = ("step", "exp_avg", "exp_avg_sq")
_EPSILON = 1e-8
_OWN_STATE = "use the state of this client, at this rank"


@dataclass(frozen=True)
class AdamWSettings:
    """AdamW's numbers; ``max_grad_norm`` bounds the norm of one client's whole gradient, None means no clipping."""

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_grad_norm: float | None = None


def schedule(kind: Schedule, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Return the factor on the learning rate at step i = 0, 1, ...

    ``(i + 1) / (w + 1)`` during w warm-up steps, which unlike the usual ``i / w`` wastes no first step at zero; then,
    with ``u = (i − w) / (total − w)``: 1 (constant), ``1 − u`` (linear) or ``(1 + cos πu) / 2`` (cosine), so that zero
    would be reached just after the last step.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        match kind:
            case "constant":
                return 1.0
            case "linear":
                return 1.0 - done
            case "cosine":
                return (1.0 + math.cos(math.pi * done)) / 2.0
            case _:
                assert_never(kind)

    return factor


def first_step(span: ScheduleSpan, round: int, total_rounds: int, steps_per_round: int) -> tuple[int, int]:
    """Return (index of a round's first step, total steps) on the schedule; rounds count from 1.

    Over a ``round`` every round starts at 0; over the ``run`` round n continues where round n − 1 stopped.

    Raises:
        SettingsError: if the round is outside the run.
    """
    match span:
        case "round":
            return 0, steps_per_round
        case "run":
            if not 1 <= round <= total_rounds:
                raise SettingsError(
                    f"training.schedule_span: expected a round from 1 to {total_rounds} of the run, got {round}; "
                    "raise federation.num_rounds"
                )
            return (round - 1) * steps_per_round, total_rounds * steps_per_round
        case _:
            assert_never(span)


class ClientOptimiser:
    """AdamW over one client's named factors, clipped by that client's own gradient norm.

    Fresh (no ``state``) its moments are zero and its step count 0; ``state`` as given by ``export_state`` continues
    exactly where that one stopped. The learning rate is ``learning_rate · factor(step)`` with steps counted from
    ``first``, whatever the state says: schedule and moments are separate choices.

    Raises:
        AdapterError: if the state is of other factors.
    """

    def __init__(
        self,
        factors: Mapping[str, nn.Parameter],
        settings: AdamWSettings,
        factor: Callable[[int], float],
        *,
        first: int = 0,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._factors, self._settings, self._factor = dict(factors), settings, factor
        self._next = first
        self._state: dict[str, dict[str, Tensor]] = {}
        if state is not None:
            self._import_state(state)

    def step(self) -> float:
        """Clip, update the factors in place from their gradients, and return the learning rate used."""
        return step_together([self])[0]

    def _take(self) -> tuple[list[_Moved], float]:
        """Return what the next step moves, and its learning rate."""
        held = [(name, factor, factor.grad) for name, factor in self._factors.items() if factor.grad is not None]
        if fresh := {name: factor for name, factor, _ in held if name not in self._state}:
            self._state.update(_fresh_states(fresh))
        moved = [_Moved(factor, grad, self._state[name]) for name, factor, grad in held]
        self._next += 1
        return moved, self._settings.learning_rate * self._factor(self._next - 1)

    def export_state(self) -> dict[str, Tensor]:
        """Return AdamW's state as ``<factor>.step``, ``.exp_avg``, ``.exp_avg_sq``, copies on the CPU."""
        names = [name for name in self._factors if name in self._state]
        found: dict[str, dict[str, Tensor]] = {name: {} for name in names}
        for key in _STATES:
            held = [self._state[name][key].detach() for name in names]
            for name, state in zip(names, moved_together(held, torch.device("cpu")), strict=True):
                found[name][key] = state.clone()
        return {f"{name}.{key}": found[name][key] for name in names for key in _STATES}

    def _import_state(self, state: Mapping[str, Tensor]) -> None:
        expected = {f"{name}.{key}" for name in self._factors for key in _STATES}
        if state.keys() != expected:
            name = sorted(state.keys() ^ expected)[0]
            raise AdapterError(
                f"expected an optimiser state of this client's factors, {name!r} is foreign or missing; {_OWN_STATE}"
            )
        for name, parameter in self._factors.items():
            moments = {key: state[f"{name}.{key}"] for key in _STATES[1:]}
            for key, moment in moments.items():
                if moment.shape != parameter.shape:
                    shapes = f"{tuple(parameter.shape)}, got {tuple(moment.shape)}"
                    raise AdapterError(f"{name}.{key}: expected an optimiser state of shape {shapes}; {_OWN_STATE}")
            self._state[name] = {
                "step": state[f"{name}.step"].to(parameter.device, torch.float32, copy=True),
                **{key: moment.to(parameter, copy=True) for key, moment in moments.items()},
            }


def _fresh_states(factors: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    """Return zeroed states: parts of one tensor, which a device makes in one call."""
    sizes, first = [factor.numel() for factor in factors.values()], next(iter(factors.values()))
    moments = [torch.split(first.new_zeros(sum(sizes)), sizes) for _ in _STATES[1:]]
    # The fused kernel keeps its step count as an fp32 tensor on the factor's device.
    steps = first.new_zeros(len(sizes), dtype=torch.float32).unbind()
    return {
        name: dict(zip(_STATES, (step, *(moment.view_as(factor) for moment in own)), strict=True))
        for (name, factor), step, *own in zip(factors.items(), steps, *moments, strict=True)
    }


@dataclass(frozen=True, eq=False)
class _Moved:
    """A factor that a step moves, its gradient and its state."""

    factor: nn.Parameter
    grad: Tensor
    state: dict[str, Tensor]


@torch.no_grad()
def step_together(optimisers: Sequence[ClientOptimiser]) -> list[float]:
    """Take a step of each of several clients' optimisers, and return the learning rates used.

    Clients whose numbers are the same at this step share the calls: one for the norms of all gradients, one for all of
    AdamW. Beside them are a client's norm of norms and its product that clips. No bit depends on who else steps.
    """
    groups: dict[tuple[AdamWSettings, float], list[list[_Moved]]] = defaultdict(list)
    rates = []
    for optimiser in optimisers:
        moved, rate = optimiser._take()
        if moved:
            groups[optimiser._settings, rate].append(moved)
        rates.append(rate)
    for (settings, rate), clients in groups.items():
        if settings.max_grad_norm is not None:
            _clip([[one.grad for one in moved] for moved in clients], settings.max_grad_norm)
        _move([one for moved in clients for one in moved], settings, rate)
    return rates


def _clip(clients: Sequence[list[Tensor]], bound: float) -> None:
    """Scale each client's gradients to a norm of at most the bound, as ``torch.nn.utils.clip_grad_norm_`` does."""
    norms = torch.stack(torch._foreach_norm([grad for grads in clients for grad in grads]))
    of_client_K = [torch.linalg.vector_norm(own) for own in torch.split(norms, [len(g) for g in clients])]
    scale_K = (bound / (torch.stack(of_client_K) + 1e-6)).clamp(max=1.0)
    for grads, scale in zip(clients, scale_K.unbind(), strict=True):
        torch._foreach_mul_(grads, scale)


def _move(moved: Sequence[_Moved], settings: AdamWSettings, learning_rate: float) -> None:
    """Take AdamW's step of all factors, each by its own state."""
    states = {key: [one.state[key] for one in moved] for key in _STATES}
    adamw(
        [one.factor for one in moved],
        [one.grad for one in moved],
        states["exp_avg"],
        states["exp_avg_sq"],
        [],
        states["step"],
        fused=True,  # one kernel for many factors; it exists for the CPU and for CUDA
        amsgrad=False,
        beta1=settings.betas[0],
        beta2=settings.betas[1],
        lr=learning_rate,
        weight_decay=settings.weight_decay,
        eps=_EPSILON,
        maximize=False,
    )
