"""What the clients of a round know together of AdamW's moments, as a prior worth a few steps.

A client that starts AdamW anew takes first steps of the size of the learning rate whatever the gradient. With a prior
it starts as if it had taken n steps before:

    V  ≈ r cᵀ / mean(c)         r, c: row and column means of the clients' mean second moments, bias-corrected
    M  = −(move / steps / learning rate) · √V       move: how far the shared start has moved a round
    m  = M (1 − β₁ⁿ),   v = V (1 − β₂ⁿ),   step count n

so that AdamW's own bias correction takes M and V for what n steps have shown. Only r and c cross. The move a client
knows by itself, from the start that it had when it last took part.

Source: ours; V is kept as Adafactor keeps it (arXiv 1804.04235). FedAdamW (arXiv 2510.27486) averages block means of
the second moments and starts the first anew. Deviation from a move per round: of a client that was away it is the mean
over the rounds that it missed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.lora.pair import Adapter, Pair

ROWS, COLUMNS = ".rows", ".columns"
_PARAMETERS = {"a": "a_RI", "b": "bt_RO"}
"""A slot's parameters by factor; both have the slots first, and ``bt_RO`` is ``bᵀ`` over the scale."""

Means = Mapping[str, Tensor]
"""``<module>.<factor>.rows`` (R,) and ``.columns`` (N,) of second moments of the effective factors, slots first."""


@dataclass(frozen=True, eq=False)
class Prior:
    """What a client starts its moments from.

    Attributes:
        second: the shared second moments.
        move: by how much the shared start moved in a round; None: not known.
        num_steps: steps that the prior counts for.
    """

    second: Means
    move: Adapter | None
    num_steps: int


def moved_by(start: Adapter, before: Adapter, num_rounds: int) -> Adapter:
    """Return how far every factor moved in a round, on average over ``num_rounds``."""
    pairs = {}
    for name, pair in start.items():
        old = before[name]
        pairs[name] = Pair((pair.b_OR - old.b_OR) / num_rounds, (pair.a_RI - old.a_RI) / num_rounds)
    return Adapter(pairs)


def means_of(state: Mapping[str, Tensor], scale: float, beta2: float) -> dict[str, Tensor]:
    """Return the row and column means of a client's second moments, from its optimiser's state."""
    found: dict[str, Tensor] = {}
    for factor, parameter in _PARAMETERS.items():
        ending = f".{parameter}.exp_avg_sq"
        for key in [key for key in state if key.endswith(ending)]:
            module, steps = key.removesuffix(ending), float(state[f"{key.removesuffix('exp_avg_sq')}step"])
            # The gradient of an effective B is that of the parameter over the scale.
            size = (scale**2 if factor == "b" else 1.0) * (1.0 - beta2**steps)
            second_RN = state[key].double() / size
            found[f"{module}.{factor}{ROWS}"] = second_RN.mean(dim=1).float()
            found[f"{module}.{factor}{COLUMNS}"] = second_RN.mean(dim=0).float()
    return found


def state_of(
    prior: Prior,
    ranks: Mapping[str, int],
    scale: float,
    *,
    betas: tuple[float, float],
    learning_rate: float,
    num_steps: int,
) -> dict[str, Tensor]:
    """Return an optimiser's state, as ``ClientOptimiser`` takes it, for a client's first slots."""
    state: dict[str, Tensor] = {}
    first, second = (1.0 - beta**prior.num_steps for beta in betas)
    for module, rank in ranks.items():
        for factor, parameter in _PARAMETERS.items():
            rows_R, columns_N = (prior.second.get(f"{module}.{factor}{end}") for end in (ROWS, COLUMNS))
            if rows_R is None or columns_N is None:
                continue
            size = scale**2 if factor == "b" else 1.0
            whole = columns_N.double().mean().clamp_min(torch.finfo(torch.float32).tiny)
            second_RN = rows_R[:rank].double()[:, None] * columns_N.double()[None, :] / whole * size
            first_RN = torch.zeros_like(second_RN)
            if prior.move is not None:
                pair = prior.move[module]
                move_RN = pair.a_RI if factor == "a" else pair.b_OR.T / scale
                first_RN = -(move_RN[:rank].double() / (num_steps * learning_rate)) * second_RN.sqrt()
            name = f"{module}.{parameter}"
            state |= {
                f"{name}.step": torch.tensor(float(prior.num_steps)),
                f"{name}.exp_avg": (first_RN * first).float(),
                f"{name}.exp_avg_sq": (second_RN * second).float(),
            }
    return state
