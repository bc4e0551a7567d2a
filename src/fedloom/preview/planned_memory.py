"""The memory of a run, before it: the base, what clients hold, and the largest pass that the engine would make.

The passes are cut by the engine's own rules; what one holds is watched on shapes (:mod:`fedloom.preview.held_bytes`).
A CPU's allocator holds more than the tensors do: freed blocks of other sizes stay between those in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from fedloom.assembly.clients_at_once import CLIENT_BYTES, client_bytes, clients_at_once
from fedloom.assembly.free_memory import free_on
from fedloom.assembly.round_plan import strategy_of, training_of
from fedloom.config import Settings
from fedloom.errors import ModelError
from fedloom.lora.layer import LoRAModel
from fedloom.lora.linear import is_worth_folding
from fedloom.lora.pair import rank_in
from fedloom.lora.products import is_half_on_cpu, meta_is, product_type
from fedloom.methods.masked_sums import MaskedSums
from fedloom.methods.strategy import Cohort
from fedloom.models.discovery import num_blocks_of
from fedloom.models.families import decoder_blocks
from fedloom.models.row_attention import choose_attention
from fedloom.preview.held_bytes import PlannedPass, bottom_bytes, scoring_bytes, top_bytes, training_bytes
from fedloom.preview.planned_passes import largest_pass, pass_limits, ranks_of, scoring_pass, training_pass
from fedloom.preview.row_sample import RowSample
from fedloom.privacy.secure_sum.fixed_point import WORD_BYTES
from fedloom.training.output_head import read_output_head
from fedloom.training.row_passes import row_passes
from fedloom.wording import counted, written_bytes

_HELD_PER_TENSOR_BYTE, _HELD_BY_THREADS = 1.15, 1.45
"""What glibc's allocator holds for a byte of a pass's tensors, measured on three shapes: 0.95 to 1.35; by two threads,
which have memory of their own and do not always hold most at the same time: 1.1 to 1.75."""
_WORK_SPACE = 20 << 20
"""Libraries' code and buffers that the first passes bring in."""
_QUANTIZED_BYTES = {"8bit": 1.0, "4bit": 0.5625}
"""Bytes a weight in bitsandbytes' layers; nf4 has one fp32 scale for 64 weights."""
_WIDTHS = 18
"""Widths that a block keeps of a token, where a forward needs numbers and cannot be watched."""
_UPDATE_BYTES = 4
"""Bytes of a number of an update, which waits for the sum."""
_COPIES = 5
"""How often one member's numbers are there while they are masked: as floats, whole, under a mask, and as bytes."""
Watch = Callable[[LoRAModel, PlannedPass, str], int]
"""Says what a pass holds on a kind of device."""


@dataclass(frozen=True)
class PlannedMemory:
    """Bytes of a run at its peak, on a kind of device.

    ``pass_bytes`` are the most that tensors of a training pass, or of one that scores, hold beside the base;
    ``held_bytes`` what the device's allocator holds for them. ``sum_bytes`` are those of a secure sum, which comes when
    the clients have trained: their updates, their masked numbers, and those of one of them several times. The
    interpreter and its libraries are not counted.
    """

    device: str
    base_bytes: int
    side_bytes: int
    client_bytes: int
    pass_bytes: int
    held_bytes: int
    sum_bytes: int
    pass_tokens: int
    pass_rows: int
    clients_at_once: int
    rows: str

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.base_bytes + self.side_bytes + self.client_bytes + max(self.held_bytes, self.sum_bytes)

    def as_dict(self) -> dict[str, Any]:
        """Return the parts as plain values."""
        return {**self.__dict__, "total_bytes": self.total_bytes}

    def lines(self) -> list[str]:
        """Return the parts for people."""
        side = f", {written_bytes(self.side_bytes)} of adapted weights" if self.side_bytes else ""
        at_once = counted(self.clients_at_once, "client")
        summed = f", or then {written_bytes(self.sum_bytes)} for the sum of the clients" if self.sum_bytes else ""
        return [
            f"memory: about {written_bytes(self.total_bytes)} on {self.device}, beside Python and its libraries: "
            f"{written_bytes(self.base_bytes)} of the base{side}, {written_bytes(self.client_bytes)} of adapters and "
            f"moments, {written_bytes(self.held_bytes)} for a pass of {self.pass_tokens:,} tokens "
            f"({counted(self.pass_rows, 'row')} of {at_once} at once; {self.rows}){summed}",
        ]


def planned_memory(settings: Settings, lora: LoRAModel, sample: RowSample) -> PlannedMemory:
    """Return the memory of a run whose base is on the meta device in the type it would have."""
    model, device = lora.model, kind_of_device(settings.model.device)
    choose_attention(model, settings.model.attention)
    weight = lora.base_weight
    with meta_is(device):  # a CPU that multiplies 16 bits as they are holds all scores
        merges = row_passes(model).attends_by_mask and not is_half_on_cpu(weight.to(product_type(weight)))
    at_once = _clients_at_once(settings, lora, device)
    parts = largest_pass(settings, lora, sample, at_once, device)
    lengths = [int(sample.lengths_N[row]) for part in parts for row in part.rows]
    trained = settings.traits.is_trained
    training, open_bytes = 0, 0
    depth = num_blocks_of(model)
    if trained:
        planned = training_pass(settings, sample, parts, merges=merges)
        training = _watched(lora, planned, device, training_bytes, depth)
        open_bytes = client_bytes(lora.shapes, max(ranks_of(settings))) * at_once
    scoring = _watched(lora, scoring_pass(settings, model, sample, device, merges=merges), device, scoring_bytes, 1)
    most = max(training, scoring) + _dequantized(settings, model)
    return PlannedMemory(
        device=device,
        base_bytes=_weight_bytes(settings, model, model.parameters()) + _aligned_bytes(model, device),
        side_bytes=_side_bytes(settings, lora, lora.shapes),
        client_bytes=open_bytes,
        pass_bytes=most,
        held_bytes=_held(most, device, in_threads=trained and pass_limits(settings, lora, device)[1] > 1),
        sum_bytes=_sum_bytes(settings, lora),
        pass_tokens=sum(lengths),
        pass_rows=len(lengths),
        clients_at_once=at_once,
        rows=sample.told,
    )


def planned_client_memory(settings: Settings, lora: LoRAModel, sample: RowSample, rank: int) -> list[int]:
    """Return the bytes that one client of a cut model holds at its peak, for every cut from one block on.

    Its part of the base (embeddings and first blocks; the last ones and the head too where it keeps the labels), its
    adapter and moments, and the largest pass of a step of its own. A frozen half reads row by row, keeps nothing for a
    way back and trains nothing.
    """
    model, device, split = lora.model, kind_of_device(settings.model.device), settings.split
    choose_attention(model, settings.model.attention)
    family, depth = decoder_blocks(model), num_blocks_of(model)
    blocks, keeps_labels = list(model.get_submodule(family.blocks).children()), split.labels == "client"
    last = depth - (split.tail_blocks if keeps_labels else 0)
    largest = largest_pass(settings, lora, sample, 1, device)
    whole = replace(training_pass(settings, sample, largest, merges=False), ranks=(rank,))
    bottom = whole
    if split.client_half == "frozen":
        bottom = replace(whole, lengths=(max(whole.lengths),), ranks=(), owners=())
    found = []
    for cut_layer in range(1, last):
        held = _watched(lora, bottom, device, partial(bottom_bytes, num_blocks=cut_layer), cut_layer)
        parts = [*map(model.get_submodule, family.before), *blocks[:cut_layer]]
        if keeps_labels:
            held += _watched(lora, whole, device, partial(top_bytes, num_blocks=depth - last), depth - last)
            parts += [*blocks[last:], *map(model.get_submodule, (*family.after, family.head))]
        own = {id(module) for part in parts for module in part.modules()}
        shapes = {name: shape for name, shape in lora.shapes.items() if id(lora.layers[name]) in own}
        trained = 0 if split.client_half == "frozen" else sum(rank_in(s, rank) * sum(s) for s in shapes.values())
        weights = _weight_bytes(settings, model, [weight for part in parts for weight in part.parameters()])
        side = _side_bytes(settings, lora, shapes)
        found.append(weights + side + CLIENT_BYTES * trained + _held(held + _dequantized(settings, model), device))
    return found


def kind_of_device(name: str) -> str:
    """Return the kind of a device by its name, which need not be here; ``auto`` is what this machine has."""
    if name != "auto":
        return name.partition(":")[0]
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def _held(pass_bytes: int, device: str, *, in_threads: bool = False) -> int:
    """Return what the device's allocator holds for a pass of so many bytes, or for several in as many threads."""
    if device != "cpu":
        return pass_bytes
    return round(pass_bytes * (_HELD_BY_THREADS if in_threads else _HELD_PER_TENSOR_BYTE)) + _WORK_SPACE


def _clients_at_once(settings: Settings, lora: LoRAModel, device: str) -> int:
    traits = settings.traits
    if traits.is_cut:
        return settings.federation.num_clients
    if traits.pools_rows or training_of(settings).privacy is not None:
        return 1
    free = None
    if device == "cuda" and torch.cuda.is_available():
        free = free_on(torch.device(device)) - _weight_bytes(settings, lora.model, lora.model.parameters())
    return min(settings.cohort_size, clients_at_once(settings, device, lora.shapes, free))


def _watched(lora: LoRAModel, planned: PlannedPass, device: str, watch: Watch, num_blocks: int) -> int:
    """Return the bytes that a pass holds, or of its widths in so many blocks where its forward cannot be watched."""
    try:
        return watch(lora, planned, device)
    except ModelError:  # its forward needs numbers
        text: Any = lora.model.config.get_text_config()  # type: ignore[operator, union-attr]
        return int(planned.num_tokens * text.hidden_size * num_blocks * _WIDTHS * lora.base_weight.element_size())


def _sum_bytes(settings: Settings, lora: LoRAModel) -> int:
    """Return the bytes of a round's secure sum in this process, of which all members are."""
    if settings.privacy.sum == "plain":
        return 0
    ranks = settings.client_ranks
    cohort = Cohort(lora.shapes, max(ranks), ranks.__getitem__, settings.run.seed)
    strategy = strategy_of(settings, cohort)
    assert isinstance(strategy, MaskedSums)
    of_rank = {rank: sum(rank_in(shape, rank) * sum(shape) for shape in lora.shapes.values()) for rank in set(ranks)}
    updates = settings.cohort_size * sum(of_rank[rank] for rank in ranks) // len(ranks)
    return _UPDATE_BYTES * updates + WORD_BYTES * strategy.num_numbers * (settings.cohort_size + _COPIES)


def _weight_bytes(settings: Settings, model: Any, chosen: Iterable[nn.Parameter]) -> int:
    """Return the bytes of some of the base's weights; quantised ones are those of linear layers other than the head."""
    narrow = _QUANTIZED_BYTES.get(settings.model.quantization) or _stored_bytes(model)
    quantized = {id(layer.weight) for layer in _linears(model)} if narrow else set[int]()
    weights = {id(weight): weight for weight in chosen}
    held = (w.numel() * ((narrow or 0.0) if id(w) in quantized else w.element_size()) for w in weights.values())
    total: float = sum(held)
    return round(total)


def _aligned_bytes(model: Any, device: str) -> int:
    """Return the bytes of the padded copy of the head's weight, where the device multiplies by one."""
    head = read_output_head(model)
    aligned = head.aligned(device)
    return 0 if aligned is head else aligned.weight_VD.nbytes


def _stored_bytes(model: Any) -> float | None:
    """Return the bytes a weight of a base that is stored quantised, where its configuration says so."""
    stored = getattr(model.config, "quantization_config", None)
    stored = stored if isinstance(stored, dict) else getattr(stored, "__dict__", {})
    if stored.get("load_in_4bit") or stored.get("bits") == 4:
        return _QUANTIZED_BYTES["4bit"]
    return _QUANTIZED_BYTES["8bit"] if stored.get("load_in_8bit") or stored.get("bits") == 8 else None


def _linears(model: Any) -> Iterator[nn.Linear]:
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield module


def _dequantized(settings: Settings, model: Any) -> int:
    """Return the bytes of the largest weight once more, which a quantised layer makes for its product."""
    if settings.model.quantization == "none" and _stored_bytes(model) is None:
        return 0
    return max((w.numel() * w.element_size() for w in (layer.weight for layer in _linears(model))), default=0)


def _side_bytes(settings: Settings, lora: LoRAModel, shapes: Mapping[str, tuple[int, int]]) -> int:
    """Return the bytes of the side of some modules at the end of a run: factors, or working copies of the weights."""
    if not settings.traits.is_trained:
        return 0
    ranks, rank = settings.client_ranks, max(ranks_of(settings))
    if settings.traits.grows_side and settings.server.step != "adamw":
        rank = round(sum(ranks) * settings.cohort_size / len(ranks)) * settings.federation.num_rounds
    size, total = lora.base_weight.element_size(), 0
    for shape in shapes.values():
        numbers = rank_in(shape, rank) * sum(shape)
        folded = size >= 4 and is_worth_folding(numbers, shape)
        total += shape[0] * shape[1] * size if folded else numbers * size
    return total
