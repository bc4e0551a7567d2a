"""What clients are sent, as bytes: news of the side, the start to train from, and numbers.

Like an answer (:mod:`.messages`) it is one safetensors blob and its hash, and nothing of it is believed unread.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, MaxLen
from pydantic import BaseModel, TypeAdapter
from torch import Tensor

from fedloom.errors import AdapterError, UpdateError
from fedloom.federation.blob import (
    CODES_NAME,
    SAFETENSORS_NAMES,
    Message,
    WireDtype,
    blob_in,
    pack,
    packed,
    read_head,
    read_tensors,
)
from fedloom.federation.buffers import Buffer, Buffers
from fedloom.federation.coding import SCALE, entries_of, read, read_exactly, written, written_exactly
from fedloom.federation.messages import (
    CONTROL,
    MAX_COUNT,
    MOMENTS,
    Count,
    Head,
    Shapes,
    control_entries,
    control_read,
    exact_dtype,
    expected_tensors,
    moments_entries,
    moments_read,
    moments_written,
)
from fedloom.lora.initial import Draw
from fedloom.lora.layer import check_covers
from fedloom.lora.pair import Adapter
from fedloom.methods.state import Broadcast, News

MAX_PARTS = 1 << 16


class _DrawHead(Head):
    name: tuple[str | int, ...]
    rank: Annotated[int, Ge(1)] | None
    random: Literal["a", "b"] = "a"


class _BroadcastHead(Head):
    kind: Literal["broadcast"] = "broadcast"
    round: Annotated[int, Ge(1), Le(MAX_COUNT)]
    client: Annotated[int, Ge(-1), Le(MAX_COUNT)]
    rank: Annotated[int, Ge(1), Le(1 << 20)]
    scale: Annotated[float, Ge(0)]
    since: Count
    version: Count
    num_parts: Count
    is_whole: bool
    sha256: str
    draw: _DrawHead | None
    origin: _DrawHead | None
    crossing: Literal["", "a", "b", "ab"]
    start_rank: Annotated[int, Ge(1), Le(1 << 20)]
    wire: WireDtype
    holds: Annotated[str, MaxLen(64)] | None
    moments: Literal["", "a", "b", "ab"] = ""
    control: Literal["", "a", "b", "ab"] = ""


_ENTRY_BESIDE_NAME, _PARTS_WITHOUT_BYTES = 160, 8
_BROADCAST: TypeAdapter[_BroadcastHead] = TypeAdapter(_BroadcastHead)


def encode_broadcast(broadcast: Broadcast, dtype: WireDtype) -> bytes:
    """Serialise what crosses of a broadcast: its news, the factors of its start that cross, and its numbers."""
    return pack(*_sent_of(broadcast, dtype))


def broadcast_buffers(broadcast: Broadcast, dtype: WireDtype) -> Buffers:
    """Return :func:`encode_broadcast` in several buffers, most of them the server's own tensors."""
    return packed(*_sent_of(broadcast, dtype))


def _sent_of(broadcast: Broadcast, dtype: WireDtype) -> tuple[dict[str, Tensor], BaseModel]:
    news, start = broadcast.news, broadcast.start
    tensors: dict[str, Tensor] = {}
    for position, part in enumerate(news.parts):
        exact = written_exactly(part.as_tensors(), dtype)
        tensors |= {f"news/{position}/{key}": tensor for key, tensor in exact.items()}
    if isinstance(start, Adapter):
        tensors |= {f"start/{key}": tensor for key, tensor in _start_sent(broadcast, start, dtype).items()}
    tensors |= moments_written(broadcast.moments)
    tensors |= {f"{CONTROL}{key}": one for key, one in written(broadcast.control, exact_dtype(dtype)).items()}
    head = _BroadcastHead(
        round=broadcast.round,
        client=broadcast.client,
        rank=broadcast.rank,
        scale=broadcast.scale,
        since=news.since,
        version=news.version,
        num_parts=len(news.parts),
        is_whole=news.is_whole,
        sha256=news.sha256,
        draw=_draw_head(start) if isinstance(start, Draw) else None,
        origin=None if broadcast.origin is None else _draw_head(broadcast.origin),
        crossing="".join(sorted(broadcast.crossing)),  # type: ignore[arg-type]
        start_rank=_rank_of_start(broadcast),
        wire=dtype,
        holds=None if broadcast.difference is None else broadcast.difference.since,
        moments="".join(sorted({key.rpartition(".")[0][-1] for key in broadcast.moments})),  # type: ignore[arg-type]
        control="".join(sorted({key[-1] for key in broadcast.control})),  # type: ignore[arg-type]
    )
    return tensors, head


def _start_sent(broadcast: Broadcast, start: Adapter, dtype: WireDtype) -> dict[str, Tensor]:
    """Return what crosses of a start: its difference to what the client holds, or as much of it as it lacks."""
    if broadcast.difference is not None:
        return written(broadcast.difference.step.as_tensors(broadcast.crossing), dtype)
    whole = start.as_tensors(broadcast.crossing)
    return whole if dtype.is_coded else written(whole, dtype)


def _rank_of_start(broadcast: Broadcast) -> int:
    start = broadcast.start
    return broadcast.rank if isinstance(start, Draw) else max(broadcast.rank, *start.ranks.values())


class Received:
    """What a client knows of a broadcast: no more than what its bytes say."""

    def __init__(
        self,
        head: Any,
        news: News,
        start: Mapping[str, Tensor],
        moments: Mapping[str, Tensor] | None = None,
        control: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.round, self.client, self.rank, self.scale = head.round, head.client, head.rank, head.scale
        self.news, self.sent, self.start_rank, self.holds = news, start, head.start_rank, head.holds
        self.is_coded, self.moments, self.control = head.wire.is_coded, moments or {}, control or {}
        self.is_kept = head.origin is not None or (head.wire.is_coded and head.draw is None)
        self.draw = None if head.draw is None else _draw_of(head.draw)
        self.origin = None if head.origin is None else _draw_of(head.origin)


def decode_broadcast(message: Message, shapes: Shapes) -> Received:
    """Read a broadcast at a client whose target modules have these shapes.

    Raises:
        UpdateError: if it is not a whole message of this form, or of another base.
    """
    blob = blob_in(message)
    head, entries = read_head(blob, _BROADCAST, _room_for_entries(blob, shapes))
    known_dtypes = [*SAFETENSORS_NAMES.values(), *([CODES_NAME] if head.wire.is_coded else [])]
    for key, (dtype, _) in entries.items():
        if dtype not in known_dtypes:
            known = ", ".join(known_dtypes)
            raise UpdateError(
                f"{key}: expected a tensor of {known}, got {dtype[:20]}; run the same version of fedloom on both sides"
            )
    tensors = read_tensors(blob)
    start = _read_start(entries, tensors, head, shapes)
    wanted = moments_entries(shapes, head.rank, frozenset(head.moments)) if head.moments else {}
    if {key: entry for key, entry in entries.items() if key.startswith(MOMENTS)} != wanted:
        raise UpdateError("expected second moments of this client's slots, got others; use the run's own base")
    variates = control_entries(shapes, head.rank, frozenset(head.control), head.wire) if head.control else {}
    if {key: entry for key, entry in entries.items() if key.startswith(CONTROL)} != variates:
        raise UpdateError("expected control variates of this client's slots, got others; use the run's own base")
    moments, control = moments_read(tensors), control_read(tensors)
    others = {key: tensor for key, tensor in tensors.items() if key not in wanted and key not in variates}
    parts = _parts(others, head, shapes)
    return Received(head, News(head.since, head.version, parts, head.is_whole, head.sha256), start, moments, control)


def _room_for_entries(blob: Buffer, shapes: Shapes) -> int:
    """Return how long the entries of a broadcast's tensors can be: each stands for a row or column at least.

    In 2 bits a row is a quarter of a byte a number, and has two entries, its codes and its scale of four bytes.

    Without a limit a header that describes nothing would be parsed into many times its size.
    """
    smallest = min((min(shape) for shape in shapes.values()), default=1) // 8 + 1
    num_bytes = max(0, len(blob) - 8 - int.from_bytes(blob[:8], "little"))
    longest = max(map(len, shapes), default=0) + _ENTRY_BESIDE_NAME
    return longest * (num_bytes // smallest + _PARTS_WITHOUT_BYTES * len(shapes))


def as_sent(broadcast: Broadcast) -> Received:
    """Return what a client knows of a broadcast where nothing is encoded: in this process, for the controls."""
    start = broadcast.start
    head = _BroadcastHead.model_construct(
        wire=WireDtype.FP32,
        holds=None,
        start_rank=_rank_of_start(broadcast),
        round=broadcast.round,
        client=broadcast.client,
        rank=broadcast.rank,
        scale=broadcast.scale,
        draw=_draw_head(start) if isinstance(start, Draw) else None,
        origin=None if broadcast.origin is None else _draw_head(broadcast.origin),
    )
    sent = start.as_tensors(broadcast.crossing) if isinstance(start, Adapter) else {}
    return Received(head, broadcast.news, sent, broadcast.moments, broadcast.control)


def _draw_head(draw: Draw) -> _DrawHead:
    return _DrawHead(name=draw.name, rank=draw.rank, random=draw.random)


def _draw_of(head: _DrawHead) -> Draw:
    return Draw(head.name, head.rank, head.random)


def _parts(tensors: Mapping[str, Tensor], head: Any, shapes: Shapes) -> tuple[Adapter, ...]:
    """Return the parts of a broadcast's news; a part that adds nothing has no tensors."""
    num_parts = head.num_parts
    named = {key: key.split("/", 2) for key in tensors if not key.startswith("start/")}
    known = {str(position) for position in range(min(num_parts, MAX_PARTS))}
    foreign = [key for key, words in named.items() if len(words) < 3 or words[0] != "news" or words[1] not in known]
    if foreign or num_parts > MAX_PARTS:
        what = f"the unknown tensor {foreign[0][:100]}" if foreign else f"{num_parts} parts"
        raise UpdateError(f"expected the news and start of a broadcast, got {what}; send it again")
    parts: list[dict[str, Tensor]] = [{} for _ in range(num_parts)]
    for key, (_, position, name) in named.items():
        parts[int(position)][name] = tensors[key]
    try:
        found = tuple(Adapter.from_tensors(_read_part(part, head.wire, shapes)) for part in parts)
        for part in found:
            check_covers(part, shapes)
    except AdapterError as error:
        raise UpdateError(f"expected the parts of a broadcast, got {error}; send it again") from error
    return found


def _read_part(part: Mapping[str, Tensor], wire: WireDtype, shapes: Shapes) -> dict[str, Tensor]:
    """Return the factors of a part of the news; its rank is its own, which only its tensors say."""
    sizes: dict[str, tuple[int, int]] = {}
    for key, tensor in part.items():
        module, is_a = key[:-2], key.endswith(".a")
        if key.endswith(SCALE):
            continue
        if module not in shapes or tensor.ndim != 2 or key[-2:] not in (".a", ".b"):
            raise AdapterError(f"expected factors of this base's modules, got {key[:100]}; use the run's own base")
        num_out, num_in = shapes[module]
        is_coded = key + SCALE in part
        rank = tensor.shape[0] if is_a or is_coded else tensor.shape[1]
        sizes[key] = (rank, num_in) if is_a else (num_out, rank)
        expected = {name: size for name, (_, size) in entries_of({key: sizes[key]}, wire).items()} if is_coded else {}
        if any(tuple(part[name].shape) != size for name, size in expected.items()):
            raise AdapterError(f"{key[:100]}: expected codes of its module's size, got others; send it again")
    return read_exactly(part, sizes, wire)


def _read_start(
    entries: Mapping[str, tuple[str, tuple[int, ...]]], tensors: Mapping[str, Tensor], head: Any, shapes: Shapes
) -> dict[str, Tensor]:
    """Return the factors of a start that were sent, or of the difference to it."""
    shapes_sent = {} if head.draw is not None else expected_tensors(shapes, head.start_rank, frozenset(head.crossing))
    is_whole = head.wire.is_coded and head.holds is None
    wanted = entries_of(shapes_sent, WireDtype.FP32 if is_whole else head.wire)
    found = {k.removeprefix("start/"): shape for k, (_, shape) in entries.items() if k.startswith("start/")}
    wrong = sorted(found.keys() ^ wanted.keys()) or [k for k, (_, shape) in wanted.items() if found[k] != shape]
    if wrong:
        raise UpdateError(
            f"{wrong[0][:100]}: expected a start of this base's modules at rank {head.start_rank}, got another base's; "
            "use the run's own base"
        )
    sent = {key: tensors[f"start/{key}"] for key in wanted}
    return read(sent, shapes_sent, WireDtype.FP32 if is_whole else head.wire)
