"""What a cut costs on given devices and links: operations, bytes and seconds, before anything is run.

Per token and block ``F = 2 N + 2 T d`` operations (N frozen weights, T tokens of a sample, d width, causal attention),
the adapter ``2 Σ r (m + n)`` more; backward costs as much again, since the base needs no gradient of its own, and the
adapter twice. The head works on supervised tokens only. A step of M micro-batches in a pipeline of stages t_i takes
``Σ t_i / M + (M − 1) max t_i / M``.

Source: the shape of SplitLoRA's and SflLLM's latency models (arXiv 2407.00952, 2504.14667). Deviations: real tokens
instead of padded ones, no keys or values on the wire, a utilisation factor instead of peak rates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from fedloom.errors import CutError
from fedloom.models.cut import cuttable_parts
from fedloom.split.codecs import bytes_per_token
from fedloom.split.plan import SERVER, SplitPlan, block_of, owners_of


@dataclass(frozen=True)
class Device:
    """A client's computer and link, in operations, bytes and seconds."""

    flops: float
    memory_bytes: float
    upload_bytes_per_second: float
    download_bytes_per_second: float
    latency_seconds: float = 0.0


@dataclass(frozen=True)
class ModelShape:
    """What the cost of a decoder depends on; ``adapter_sides`` is ``Σ (m + n)`` over a block's adapted modules."""

    width: int
    block_parameters: tuple[int, ...]
    adapter_sides: tuple[int, ...]
    embedding_parameters: int
    head_parameters: int

    @property
    def num_blocks(self) -> int:
        """Blocks of the decoder."""
        return len(self.block_parameters)

    def forward_flops(self, start: int, stop: int, length: float, rank: float) -> float:
        """Return the operations of one token's forward pass through some blocks, adapters included."""
        base = sum(2 * n + 2 * length * self.width for n in self.block_parameters[start:stop])
        return base + 2 * rank * sum(self.adapter_sides[start:stop])

    def backward_flops(self, start: int, stop: int, length: float, rank: float) -> float:
        """Return the operations of one token's backward pass through some blocks."""
        return self.forward_flops(start, stop, length, rank) + 2 * rank * sum(self.adapter_sides[start:stop])


def shape_of(model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> ModelShape:
    """Read a model's shape; its weights may be on the meta device, its targets already wrapped."""
    family = cuttable_parts(model)
    blocks = model.get_submodule(family.blocks)
    frozen = [
        sum(p.numel() for name, p in block.named_parameters() if not name.endswith(("a_RI", "bt_RO")))
        for block in blocks.children()
    ]
    sides = [0] * len(frozen)
    for module, (num_out, num_in) in shapes.items():
        sides[block_of(model, module)] += num_out + num_in
    embeddings = [p for name in family.before for p in model.get_submodule(name).parameters()]
    head = sum(p.numel() for p in model.get_submodule(family.head).parameters())
    width: int = model.config.hidden_size  # type: ignore[union-attr, assignment]
    return ModelShape(width, tuple(frozen), tuple(sides), sum(p.numel() for p in embeddings), head)


@dataclass(frozen=True)
class Work:
    """What one client's step consists of: tokens, those supervised, and the mean length of a sample."""

    tokens_per_step: float
    loss_tokens_per_step: float
    tokens_per_sample: float


@dataclass(frozen=True)
class CutEstimate:
    """What a cut costs one client, and how long a step and an aggregation take; ``stages`` are seconds in order."""

    cut_layer: int
    client_parameters: int
    client_memory_bytes: int
    client_flops_per_step: float
    upload_bytes_per_step: int
    download_bytes_per_step: int
    aggregation_bytes: int
    step_seconds: float
    aggregation_seconds: float
    stages: Mapping[str, float]
    fits: bool


def estimate_cut(
    shape: ModelShape,
    plan: SplitPlan,
    client: int,
    work: Work,
    device: Device,
    server_flops: float,
    num_clients: int,
    memory_bytes: int = 0,
) -> CutEstimate:
    """Estimate one client's step and aggregation at its cut, with ``num_clients`` alike sharing the server.

    ``memory_bytes`` are what the client holds there, as planned elsewhere. A frozen client is charged for a step in
    which its rows cross; once all have, only the server's stage remains.
    """
    c, rank = plan.cut_layers[client], 0 if plan.is_frozen else plan.ranks[client]
    tail = plan.tail_blocks or 0
    last = shape.num_blocks - tail
    tokens, length = work.tokens_per_step, work.tokens_per_sample
    forward = tokens * shape.forward_flops(0, c, length, rank)
    backward = 0.0 if plan.is_frozen else tokens * shape.backward_flops(0, c, length, rank)
    head = 4.0 * shape.head_parameters * work.loss_tokens_per_step
    tail_flops = 0.0
    if plan.labels == "client":
        tail_flops = head + tokens * (
            shape.forward_flops(last, shape.num_blocks, length, rank)
            + shape.backward_flops(last, shape.num_blocks, length, rank)
        )
    server = tokens * num_clients * sum(
        way(c, last, length, plan.server_rank) for way in (shape.forward_flops, shape.backward_flops)
    ) + (head * num_clients if plan.labels == "server" else 0.0)
    up, down = _bytes_per_step(shape, plan, work)
    stages = {
        "client forward": forward / device.flops,
        "up": up / device.upload_bytes_per_second + device.latency_seconds,
        "server": server / server_flops,
        "tail": tail_flops / device.flops + (2 * device.latency_seconds if plan.labels == "client" else 0.0),
        "down": down / device.download_bytes_per_second + device.latency_seconds if down else 0.0,
        "client backward": backward / device.flops,
    }
    adapter_bytes = 4 * rank * (sum(shape.adapter_sides[:c]) + sum(shape.adapter_sides[last:]))
    links = adapter_bytes / device.upload_bytes_per_second + adapter_bytes / device.download_bytes_per_second
    return CutEstimate(
        cut_layer=c,
        client_parameters=_client_parameters(shape, plan, c, last),
        client_memory_bytes=memory_bytes,
        client_flops_per_step=forward + backward + tail_flops,
        upload_bytes_per_step=up,
        download_bytes_per_step=down,
        aggregation_bytes=2 * adapter_bytes,
        step_seconds=pipelined(list(stages.values()), plan.micro_batches),
        aggregation_seconds=links + (2 * device.latency_seconds if adapter_bytes else 0.0),
        stages=stages,
        fits=memory_bytes <= device.memory_bytes,
    )


def pipelined(stages: Sequence[float], micro_batches: int) -> float:
    """Return how long stages take when a step goes through them in ``micro_batches`` parts."""
    return sum(stages) / micro_batches + (micro_batches - 1) * max(stages) / micro_batches


def suggest_cut(estimates: Sequence[CutEstimate], lowest_cut: int = 1) -> CutEstimate:
    """Return the fastest cut that fits the client's memory and is not below the privacy floor.

    Raises:
        CutError: if none is left.
    """
    possible = [e for e in estimates if e.fits and e.cut_layer >= lowest_cut]
    if not possible:
        least = min(estimates, key=lambda e: e.client_memory_bytes)
        raise CutError(
            f"split.cut_layer: expected a cut of {lowest_cut} or more that fits devices.client_memory_gib, found none; "
            f"the smallest part, at {least.cut_layer}, needs {least.client_memory_bytes / 2**30:.2f} GiB; raise "
            "devices.client_memory_gib, or lower training.batch_size or data.max_length"
        )
    return min(possible, key=lambda e: e.step_seconds)


def split_seconds(estimates: Sequence[CutEstimate], num_steps: int, aggregate_every: int) -> float:
    """Return the simulated seconds of a split run: every step and every aggregation waits for its slowest client."""
    step, aggregation = max(e.step_seconds for e in estimates), max(e.aggregation_seconds for e in estimates)
    return num_steps * step + num_steps / aggregate_every * aggregation


def federated_seconds(
    shape: ModelShape,
    ranks: Sequence[int],
    works: Sequence[Work],
    devices: Sequence[Device],
    steps: int,
    num_rounds: int,
) -> float:
    """Return the simulated seconds of FedLoRA: whole model on every client, adapters both ways each round."""
    slowest = max(
        steps * local_step_flops(shape, rank, work) / device.flops + _exchange(shape, rank, device)
        for rank, work, device in zip(ranks, works, devices, strict=True)
    )
    return num_rounds * slowest


def centralised_seconds(shape: ModelShape, rank: int, works: Sequence[Work], flops: float, num_steps: int) -> float:
    """Return the simulated seconds of training on all clients' rows in one place, which has ``flops``.

    Source: SplitLoRA's CenLoRA, whose latency is 4.7 times SplitLoRA's only if one client-grade device does it all.
    """
    return num_steps * sum(local_step_flops(shape, rank, work) for work in works) / flops


def local_step_flops(shape: ModelShape, rank: float, work: Work) -> float:
    """Return the operations of an uncut step."""
    ways = (shape.forward_flops, shape.backward_flops)
    both = [way(0, shape.num_blocks, work.tokens_per_sample, rank) for way in ways]
    return work.tokens_per_step * sum(both) + 4.0 * shape.head_parameters * work.loss_tokens_per_step


def _exchange(shape: ModelShape, rank: int, device: Device) -> float:
    adapter_bytes = 4 * rank * sum(shape.adapter_sides)
    seconds = adapter_bytes / device.upload_bytes_per_second + adapter_bytes / device.download_bytes_per_second
    return seconds + 2 * device.latency_seconds


def _bytes_per_step(shape: ModelShape, plan: SplitPlan, work: Work) -> tuple[int, int]:
    """Return bytes up and down of a step without message headers: activations, labels (8 bytes each), gradients."""
    tokens = work.tokens_per_step
    activations = tokens * bytes_per_token(shape.width, plan.wire_dtype)
    gradients = tokens * bytes_per_token(shape.width, plan.gradient_wire_dtype)
    lengths = 4 * tokens / work.tokens_per_sample
    to_client = 0.0 if plan.is_frozen else gradients
    if plan.labels == "client":
        return round(activations + lengths + gradients), round(activations + to_client)
    return round(activations + lengths + 8 * work.loss_tokens_per_step), round(to_client)


def _client_parameters(shape: ModelShape, plan: SplitPlan, cut_layer: int, last: int) -> int:
    own = shape.embedding_parameters + sum(shape.block_parameters[:cut_layer])
    if plan.labels == "client":
        own += sum(shape.block_parameters[last:]) + shape.head_parameters
    return own


def trained_parameters(plan: SplitPlan, model: nn.Module, shapes: Mapping[str, tuple[int, int]], owner: int) -> int:
    """Count the numbers that a client, or the server (``SERVER``), trains."""
    rank = plan.server_rank if owner == SERVER else plan.ranks[owner]
    return sum(rank * sum(shape) for module, shape in shapes.items() if owner in owners_of(plan, model, module))
