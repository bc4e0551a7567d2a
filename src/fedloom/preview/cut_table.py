"""What every cut of a base would cost on the recipe's devices and links, and how long the methods would take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from fedloom.assembly.split_run import split_plan
from fedloom.config import Settings
from fedloom.errors import CutError
from fedloom.lora.layer import LoRAModel
from fedloom.methods import table
from fedloom.preview.planned_memory import planned_client_memory
from fedloom.preview.row_sample import SAMPLED_ROWS, sampled_rows
from fedloom.split.cost_model import (
    CutEstimate,
    Device,
    ModelShape,
    Work,
    centralised_seconds,
    estimate_cut,
    federated_seconds,
    shape_of,
    split_seconds,
    suggest_cut,
)
from fedloom.split.plan import SplitPlan
from fedloom.wording import written_bytes

GIB, MEGABIT = 2**30, 125_000


@dataclass(frozen=True)
class CutTable:
    """Estimates of every cut for the slowest client, the suggested one, and the whole run at the cuts of the recipe.

    ``upload_bytes`` and ``download_bytes`` are of all clients, activations and adapters; a frozen half that keeps what
    it sent needs less. ``seconds`` are simulated, by method.
    """

    work: Work
    estimates: tuple[CutEstimate, ...]
    suggested: int | None
    upload_bytes: int
    download_bytes: int
    seconds: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Return the estimates as plain values."""
        cuts = [
            {**asdict(e), "stages": dict(e.stages), "suggested": e.cut_layer == self.suggested} for e in self.estimates
        ]
        totals = {"upload_bytes": self.upload_bytes, "download_bytes": self.download_bytes}
        return {"cuts": cuts, **totals, "simulated_seconds": dict(self.seconds)}

    def lines(self) -> list[str]:
        """Return the table for people."""
        w = self.work
        lines = [
            f"a client's step: {w.tokens_per_step:.0f} tokens, {w.loss_tokens_per_step:.0f} of them supervised "
            f"(mean of {SAMPLED_ROWS} rows at most)",
            f"{'cut':>4} {'parameters':>12} {'memory':>10} {'GFLOP/step':>11} {'up/step':>10} {'down/step':>10} "
            f"{'aggregation':>12} {'s/step':>8}",
        ]
        for e in self.estimates:
            mark = " suggested" if e.cut_layer == self.suggested else "" if e.fits else " does not fit"
            lines.append(
                f"{e.cut_layer:>4} {e.client_parameters:>12,} {e.client_memory_bytes / 1e6:>7.0f} MB "
                f"{e.client_flops_per_step / 1e9:>11.2f} {e.upload_bytes_per_step / 1e3:>7.0f} kB "
                f"{e.download_bytes_per_step / 1e3:>7.0f} kB {e.aggregation_bytes / 1e3:>9.0f} kB "
                f"{e.step_seconds:>8.4f}{mark}"
            )
        up, down = map(written_bytes, (self.upload_bytes, self.download_bytes))
        lines.append(f"the whole run: about {up} up and {down} down, over all clients")
        return [*lines, *(f"the whole run, {name}: about {s:,.1f} simulated s" for name, s in self.seconds.items())]


def cut_table(settings: Settings, lora: LoRAModel) -> CutTable:
    """Estimate every cut of a base on the meta device, on the recipe's devices.

    Tokens per step are the mean of a sample of the recipe's rows; memory is that of the largest step, by the rules of
    the run's own plan (:mod:`fedloom.preview.planned_memory`).

    Raises:
        DataError: if the rows cannot be read.
        CutError: if the base cannot be cut.
    """
    num_clients = settings.federation.num_clients
    sample = sampled_rows(settings)
    num_rows, work = sample.num_rows or 0, sample.work(settings.training.batch_size)
    shape, plan = (
        shape_of(lora.model, lora.shapes),
        split_plan(settings, [max(1, num_rows // num_clients)] * num_clients),
    )
    devices = devices_of(settings)
    lowest = min(range(num_clients), key=lambda k: devices[k].flops)
    flops = settings.devices.server_flops
    estimates = tuple(
        estimate_cut(shape, at_cut(plan, cut), lowest, work, devices[lowest], flops, num_clients, held)
        for cut, held in enumerate(planned_client_memory(settings, lora, sample, plan.ranks[lowest]), start=1)
    )
    try:
        suggested: int | None = suggest_cut(estimates).cut_layer
    except CutError:
        suggested = None
    own = own_estimates(settings, shape, plan, work, devices)
    adapters = sum(e.aggregation_bytes for e in own) // 2 * (plan.num_steps // plan.aggregate_every)
    return CutTable(
        work,
        estimates,
        suggested,
        upload_bytes=sum(e.upload_bytes_per_step for e in own) * plan.num_steps + adapters,
        download_bytes=sum(e.download_bytes_per_step for e in own) * plan.num_steps + adapters,
        seconds=simulated_seconds(settings, shape, plan, work, devices, own),
    )


def at_cut(plan: SplitPlan, cut_layer: int) -> SplitPlan:
    """Return the plan with every client cut at one block."""
    return replace(plan, cut_layers=(cut_layer,) * plan.num_clients)


def own_estimates(
    settings: Settings, shape: ModelShape, plan: SplitPlan, work: Work, devices: Sequence[Device]
) -> list[CutEstimate]:
    """Return every client's estimate at the cut that the recipe gives it."""
    flops, num_clients = settings.devices.server_flops, plan.num_clients
    return [estimate_cut(shape, plan, k, work, devices[k], flops, num_clients) for k in range(num_clients)]


def simulated_seconds(
    settings: Settings,
    shape: ModelShape,
    plan: SplitPlan,
    work: Work,
    devices: Sequence[Device],
    own: Sequence[CutEstimate],
) -> dict[str, float]:
    """Return the simulated seconds of the recipe's budget by method, as in the paper's latency figure."""
    rounds, steps, works = settings.federation.num_rounds, plan.num_steps, [work] * plan.num_clients
    centralised = table.shipped("pools_rows")[0]
    return {
        settings.method.name: split_seconds(own, steps, plan.aggregate_every),
        table.BASELINE: federated_seconds(shape, plan.ranks, works, devices, steps // rounds, rounds),
        centralised: centralised_seconds(shape, plan.server_rank, works, devices[0].flops, steps),
    }


def devices_of(settings: Settings) -> list[Device]:
    """Return every client's device and link, at the share of their peak that a real step reaches."""
    table = settings.devices
    rows = zip(
        settings.per_client(table.client_flops),
        settings.per_client(table.client_memory_gib),
        settings.per_client(table.uplink_mbit_per_second),
        settings.per_client(table.downlink_mbit_per_second),
        settings.per_client(table.latency_ms),
        strict=True,
    )

    @cache  # clients may be a million, their devices are few
    def device(flops: float, memory: float, up: float, down: float, latency: float) -> Device:
        return Device(flops * table.utilisation, memory * GIB, up * MEGABIT, down * MEGABIT, latency / 1e3)

    return [device(*row) for row in rows]
