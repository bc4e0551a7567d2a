"""What a client does in a round: the plain values that the settings of training become."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedloom.training.optimiser import AdamWSettings, Schedule, ScheduleSpan
from fedloom.training.private_rows import UNITS_AT_ONCE, RowPrivacy

SKETCH_ROWS = 4
"""Rows of a client on which the gradient of the weights is sketched, or all where it has fewer."""


@dataclass(frozen=True)
class LocalTraining:
    """What a client does in a round. Exactly one of ``steps`` and ``epochs`` is given.

    A pass holds at most ``micro_batch_size`` rows of a client (None: the whole batch) and ``token_budget`` tokens of
    all clients; a batch beyond either is accumulated over several passes, which changes the result by rounding only: a
    row's dropout mask is its own. Draws and schedule count from the round after the first ``start_rounds``, which train
    nothing. With ``privacy`` no single row shows in what a client trains. On a CPU a step's passes are small and spread
    over ``cores`` threads, whose number changes no bit; private steps are not spread. With ``checkpoint_activations`` a
    pass keeps what enters its blocks, and backward runs them once more.
    """

    learning_rate: float
    batch_size: int
    steps: int | None = None
    epochs: float | None = None
    micro_batch_size: int | None = None
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    schedule_span: ScheduleSpan = "round"
    total_rounds: int = 1
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float | None = None
    dropout: float = 0.0
    label_smoothing: float = 0.0
    proximal: float = 0.0
    token_budget: int = 8192
    start_rounds: int = 0
    privacy: RowPrivacy | None = None
    cores: int = 1
    checkpoint_activations: bool = False

    @property
    def num_unit_slots(self) -> int:
        """Slots that a client needs beside its own: one for each unit of a private pass."""
        return 0 if self.privacy is None else min(self.micro_batch_size or UNITS_AT_ONCE, self.batch_size)

    @property
    def most_at_once(self) -> int | None:
        """Rows, or units of private steps, that a pass holds of a client at most."""
        return self.micro_batch_size if self.privacy is None else self.num_unit_slots

    def for_sketch(self) -> LocalTraining:
        """Return what a client does to sketch a gradient: one batch at the base, without dropout."""
        return replace(self, batch_size=SKETCH_ROWS, steps=1, epochs=None, dropout=0.0, schedule_span="round")

    @property
    def adamw(self) -> AdamWSettings:
        """AdamW's part of the settings."""
        return AdamWSettings(self.learning_rate, self.betas, self.weight_decay, self.max_grad_norm)
