"""How long a run would take: here, by this machine's rate of products, and simulated on the devices of the recipe.

Both count the operations of the steps (:mod:`fedloom.split.cost_model`) and take the same share of the peak rate
(``devices.utilisation``). Loading, scoring and the server's own work are left out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch

from fedloom.config import Settings
from fedloom.errors import ModelError
from fedloom.lora.layer import LoRAModel
from fedloom.lora.products import product
from fedloom.methods.traits import Kind
from fedloom.models.load import choose_device
from fedloom.preview.cut_table import devices_of
from fedloom.preview.message_sizes import MessageSizes
from fedloom.preview.planned_memory import kind_of_device
from fedloom.preview.planned_passes import pass_limits
from fedloom.preview.row_sample import RowSample
from fedloom.split.cost_model import centralised_seconds, local_step_flops, shape_of
from fedloom.wording import written_seconds

_PROBE = 1024
"""Rows and columns of the matrices whose product says how fast this machine is."""


@dataclass(frozen=True)
class PlannedTime:
    """Seconds of training in the whole run, and what they assume.

    ``here_seconds`` are in one process on this machine, None where the device is not here; ``simulated_seconds`` those
    of clients with the recipe's devices and links, None where a table of cuts says it, or nothing is trained.
    ``why_not`` says why there is no estimate.
    """

    num_steps: int | None
    flops: float | None
    here_seconds: float | None
    simulated_seconds: float | None
    assumptions: tuple[str, ...]
    why_not: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate as plain values."""
        return dict(self.__dict__)

    def lines(self) -> list[str]:
        """Return the estimate for people."""
        if self.why_not is not None:
            return [f"time: {self.why_not}"]
        told = []
        if self.here_seconds is not None:
            told.append(f"about {written_seconds(self.here_seconds)} of training in one process here")
        if self.simulated_seconds is not None:
            told.append(f"simulated {written_seconds(self.simulated_seconds)} on clients of the recipe's devices")
        return [f"time: {'; '.join(told or ['see the table of cuts'])} ({'; '.join(self.assumptions)})"]


def planned_time(settings: Settings, lora: LoRAModel, sample: RowSample, sizes: MessageSizes) -> PlannedTime:
    """Return the estimate for any method; its base may be on the meta device."""
    if not settings.traits.is_trained:
        return PlannedTime(0, 0.0, 0.0, None, (), "nothing is trained; scoring is not estimated")
    steps = _steps(settings, sample)
    if steps is None:
        told = "not estimated: training.local_epochs needs the number of rows, which are not on this machine"
        return PlannedTime(None, None, None, None, (), told)
    try:
        shape = shape_of(lora.model, lora.shapes)
    except ModelError as error:
        return PlannedTime(steps, None, None, None, (), f"not estimated: {error}")
    work, rounds, ranks = (
        sample.work(settings.training.batch_size),
        settings.federation.num_rounds,
        settings.client_ranks,
    )
    of_rank = {rank: local_step_flops(shape, rank, work) for rank in set(ranks)}
    flops = rounds * settings.cohort_size * steps * fmean(of_rank[rank] for rank in ranks)
    used, rate = settings.devices.utilisation, _rate(settings, lora)
    is_joint = settings.traits.is_cut and settings.split.server_update == "joint"
    busy = _busy_cores(settings, lora, work.tokens_per_step * (settings.cohort_size if is_joint else 1))
    here = None if rate is None else flops / (rate * busy * used)
    simulated = _simulated(settings, of_rank, steps, sizes)
    if settings.traits.pools_rows:
        at_one = devices_of(settings)[0].flops
        simulated = centralised_seconds(shape, max(ranks), [work] * settings.cohort_size, at_one, rounds * steps)
    table = settings.devices
    assumed = [
        f"{rounds * settings.cohort_size * steps:,} steps of {work.tokens_per_step:.0f} tokens, {flops:.1e} operations",
        "" if rate is None else f"products run at {rate / 1e9:,.0f} GFLOP/s here just now",
        "" if rate is None or busy == 1.0 else f"{busy:.3g} cores busy in a step",
        f"{used:.0%} of the peak reached",
    ]
    if simulated is not None:
        assumed.append(
            f"devices: {_told(table.client_flops, 1e12)} TFLOP/s, {_told(table.uplink_mbit_per_second)} Mbit/s up, "
            f"{_told(table.downlink_mbit_per_second)} down, {_told(table.latency_ms)} ms"
        )
    assumed.append("without loading, scoring and the server's work")
    return PlannedTime(rounds * settings.cohort_size * steps, flops, here, simulated, tuple(filter(None, assumed)))


def _told(value: Any, unit: float = 1.0) -> str:
    if isinstance(value, int | float):
        return f"{value / unit:g}"
    values = list(value.values() if isinstance(value, Mapping) else value)
    return f"{min(values) / unit:g} to {max(values) / unit:g}"


def _steps(settings: Settings, sample: RowSample) -> int | None:
    """Return the steps of a client and round, on average."""
    training, clients = settings.training, settings.federation.num_clients
    if training.local_steps is not None:
        return training.local_steps
    if sample.num_rows is None:
        return None
    rows = min(sample.num_rows, settings.data.max_rows or sample.num_rows)
    return max(1, round((training.local_epochs or 0.0) * math.ceil(rows / clients / training.batch_size)))


def _simulated(settings: Settings, of_rank: Mapping[int, float], steps: int, sizes: MessageSizes) -> float | None:
    """Return the seconds of a federated run in which every round waits for its slowest client."""
    if settings.traits.kind is Kind.SPLIT:
        return None
    seconds = []
    for rank, device in set(zip(settings.client_ranks, devices_of(settings), strict=True)):
        up, down = sizes.by_rank[rank].up, sizes.by_rank[rank].later_down
        link = up / device.upload_bytes_per_second + down / device.download_bytes_per_second
        delay = 2 * device.latency_seconds if up or down else 0.0
        seconds.append(steps * of_rank[rank] / device.flops + link + delay)
    return settings.federation.num_rounds * max(seconds)


def _busy_cores(settings: Settings, lora: LoRAModel, tokens_per_step: float) -> float:
    """Return how many cores of this process have work in a step, on average: its parts go out in turns."""
    tokens, at_once = pass_limits(settings, lora, kind_of_device(settings.model.device))
    turns = math.ceil(math.ceil(tokens_per_step / tokens) / at_once)
    return max(1.0, tokens_per_step / (turns * tokens))


def _rate(settings: Settings, lora: LoRAModel) -> float | None:
    """Return the operations per second of a product in the base's type on the run's device; None where it is absent."""
    try:
        device = choose_device(settings.model.device)
    except ModelError:
        return None
    threads, seconds = torch.get_num_threads(), []
    torch.set_num_threads(settings.engine.threads)
    try:
        x = torch.ones(_PROBE, _PROBE, dtype=lora.base_weight.dtype, device=device)
        for _ in range(3):
            begun = time.perf_counter()
            float(product(x, x)[0, 0])  # reading a number waits for the device
            seconds.append(time.perf_counter() - begun)
    finally:
        torch.set_num_threads(threads)
    return 2.0 * _PROBE**3 / median(seconds)
