"""The settings of a run that make a strategy, as plain values. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ServerAdamW:
    """The AdamW with which a server takes one step a round on the clients' mean gradient of the factors.

    Attributes:
        learning_rate, betas, weight_decay, max_grad_norm: AdamW's; None: do not clip.
        schedule, warmup_steps, total_steps: of the learning rate, over the whole run.
        scale: factor on ``B A`` at the largest rank; AdamW moves the factors without it, as it does at a client.
    """

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    schedule: str = "constant"
    warmup_steps: int = 0
    total_steps: int = 1
    scale: float = 1.0


@dataclass(frozen=True)
class ClientPrivacy:
    """How a server hides whole clients.

    Attributes:
        clip: largest norm of one client's change of the product, over all modules.
        noise_multiplier: standard deviation of the noise, in multiples of the clip.
        expected_clients: what the noised sum is divided by, whoever came.
        draws: where the noise comes from: the run's seed (a simulation), or the operating system.
        shares: the clients whose shares of noise make up the whole; None: the server adds it.
    """

    clip: float
    noise_multiplier: float
    expected_clients: float
    draws: Literal["seed", "system"] = "seed"
    shares: int | None = None


@dataclass(frozen=True)
class MethodOptions:
    """What of a run's settings makes a strategy.

    Attributes:
        weighting: ``method.weighting``.
        initialisation: ``method.initialisation``.
        adamw: the server's optimiser where clients send gradients (``server.step = adamw``).
        few_bits: whether updates cross as codes of few bits.
        moments, moments_prior: ``training.moments`` and ``training.moments_prior``.
        control_clients: clients of the population, where ``training.control_variates`` is on; 0: it is not.
        masked: whether the server sees sums alone (``privacy.sum``).
        sketch_rank: the rank of a sum of products that sketches give exactly; None: sums are of factors.
        sketch_is_whole: whether no round's sum can have a higher rank.
        client_privacy: how the server hides whole clients (``privacy.unit = client``).
    """

    weighting: str = "rows"
    initialisation: str = "independent"
    adamw: ServerAdamW | None = None
    few_bits: bool = False
    moments: str = "fresh"
    moments_prior: int = 2
    control_clients: int = 0
    client_privacy: ClientPrivacy | None = None
    masked: bool = False
    sketch_rank: int | None = None
    sketch_is_whole: bool = True
