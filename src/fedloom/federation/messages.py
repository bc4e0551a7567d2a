"""What crosses between server and clients, as bytes: one safetensors blob and its hash, its numbers in the header.

The wire's dtype applies to every tensor that crosses, and only there: what arrives is fp32 again. The whole side keeps
fp32 where the wire's dtype cannot hold its numbers exactly: a compacted side would be rounded otherwise, and server and
client would train on different bases. A message's length is that of blob and hash; nothing else is counted and nothing
else is sent.

Nothing is believed unread: the hash is checked before anything is parsed, the header against a schema, names, shapes
and dtypes against what is expected, before a tensor is made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Le, MaxLen
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from torch import Tensor

from fedloom.errors import AdapterError, UpdateError
from fedloom.federation.blob import (
    MAX_ENTRY_BYTES,
    SAFETENSORS_NAMES,
    Message,
    WireDtype,
    blob_in,
    check_entries,
    check_size,
    largest_message,
    pack,
    packed,
    read_head,
    read_tensors,
    without_loss,
)
from fedloom.federation.buffers import Buffer, Buffers
from fedloom.lora.initial import Draw
from fedloom.lora.layer import check_covers
from fedloom.lora.pair import BOTH, Adapter, Factors, rank_in
from fedloom.methods.client_half import Payload, Work
from fedloom.methods.state import Broadcast, Failure, News, Update
from fedloom.training.stats import TrainingStats
from fedloom.wording import one_line

MAX_PARTS = 1 << 16
MAX_REASON = 2000
"""Characters of a client's reason, and of what is wrong with its message."""
_MAX_COUNT = 1 << 53

Count = Annotated[int, Ge(0), Le(_MAX_COUNT)]
Shapes = Mapping[str, tuple[int, int]]


class _Head(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class _DrawHead(_Head):
    name: tuple[str | int, ...]
    rank: Annotated[int, Ge(1)] | None


class _BroadcastHead(_Head):
    kind: Literal["broadcast"] = "broadcast"
    round: Annotated[int, Ge(1), Le(_MAX_COUNT)]
    client: Annotated[int, Ge(-1), Le(_MAX_COUNT)]
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


class _UpdateHead(_Head):
    kind: Literal["update"] = "update"
    round: Annotated[int, Ge(1), Le(_MAX_COUNT)]
    client: Annotated[int, Ge(-1), Le(_MAX_COUNT)]
    held: Count
    num_rows: Count
    num_tokens: Count
    num_loss_tokens: Count
    num_steps: Count
    loss_nats: float
    loss_last_nats: float
    seconds: Annotated[float, Ge(0)]


class _FailureHead(_Head):
    kind: Literal["failure"] = "failure"
    client: Annotated[int, Ge(-1), Le(_MAX_COUNT)]
    reason: Annotated[str, MaxLen(MAX_REASON)]
    held: Count | None


_ENTRY_BESIDE_NAME, _PARTS_WITHOUT_BYTES = 160, 8
_BROADCAST: TypeAdapter[_BroadcastHead] = TypeAdapter(_BroadcastHead)
_ANSWER: TypeAdapter[_UpdateHead | _FailureHead] = TypeAdapter(
    Annotated[_UpdateHead | _FailureHead, Field(discriminator="kind")]
)


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
        for key, tensor in part.as_tensors().items():
            tensors[f"news/{position}/{key}"] = without_loss(tensor, dtype)
    if isinstance(start, Adapter):
        sent = start.as_tensors(broadcast.crossing)
        tensors |= {f"start/{key}": tensor.to(dtype.torch) for key, tensor in sent.items()}
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
    )
    return tensors, head


class Received:
    """What a client knows of a broadcast: no more than what its bytes say."""

    def __init__(self, head: Any, news: News, start: Mapping[str, Tensor]) -> None:
        self.round, self.client, self.rank, self.scale = head.round, head.client, head.rank, head.scale
        self.news, self.sent = news, start
        self.draw = None if head.draw is None else Draw(head.draw.name, head.draw.rank)
        self.origin = None if head.origin is None else Draw(head.origin.name, head.origin.rank)


def decode_broadcast(message: Message, shapes: Shapes) -> Received:
    """Read a broadcast at a client whose target modules have these shapes.

    Raises:
        UpdateError: if it is not a whole message of this form, or of another base.
    """
    blob = blob_in(message)
    head, entries = read_head(blob, _BROADCAST, _room_for_entries(blob, shapes))
    for key, (dtype, _) in entries.items():
        if dtype not in SAFETENSORS_NAMES.values():
            known = ", ".join(SAFETENSORS_NAMES.values())
            raise UpdateError(
                f"{key}: expected a tensor of {known}, got {dtype[:20]}; run the same version of fedloom on both sides"
            )
    tensors = read_tensors(blob)
    start = {key.removeprefix("start/"): tensor for key, tensor in tensors.items() if key.startswith("start/")}
    _check_start(start, head, shapes)
    parts = _parts(tensors, head.num_parts, shapes)
    return Received(head, News(head.since, head.version, parts, head.is_whole, head.sha256), start)


def _room_for_entries(blob: Buffer, shapes: Shapes) -> int:
    """Return how long the entries of a broadcast's tensors can be: each stands for a row or column at least.

    Without a limit a header that describes nothing would be parsed into many times its size.
    """
    smallest = min((min(shape) for shape in shapes.values()), default=1)
    num_bytes = max(0, len(blob) - 8 - int.from_bytes(blob[:8], "little"))
    longest = max(map(len, shapes), default=0) + _ENTRY_BESIDE_NAME
    return longest * (num_bytes // smallest + _PARTS_WITHOUT_BYTES * len(shapes))


def as_sent(broadcast: Broadcast) -> Received:
    """Return what a client knows of a broadcast where nothing is encoded: in this process, for the controls."""
    start = broadcast.start
    head = _BroadcastHead.model_construct(
        round=broadcast.round,
        client=broadcast.client,
        rank=broadcast.rank,
        scale=broadcast.scale,
        draw=_draw_head(start) if isinstance(start, Draw) else None,
        origin=None if broadcast.origin is None else _draw_head(broadcast.origin),
    )
    sent = start.as_tensors(broadcast.crossing) if isinstance(start, Adapter) else {}
    return Received(head, broadcast.news, sent)


def encode_update(update: Update, tensors: Mapping[str, Tensor], dtype: WireDtype) -> bytes:
    """Serialise an update: ``tensors`` are what the client half sends of it."""
    return b"".join(update_buffers(update, tensors, dtype))


def update_buffers(update: Update, tensors: Mapping[str, Tensor], dtype: WireDtype) -> Buffers:
    """Return :func:`encode_update` in several buffers, most of them the tensors' own memory."""
    head = _UpdateHead(round=update.round, client=update.client, held=update.held, **asdict(update.stats))
    return packed({key: tensor.to(dtype.torch) for key, tensor in tensors.items()}, head)


def encode_failure(failure: Failure) -> bytes:
    """Serialise a client's word that it has no update."""
    return pack({}, _FailureHead(client=failure.client, reason=failure.reason[:MAX_REASON], held=failure.held))


def decode_answer(
    message: Message,
    broadcast: Broadcast,
    work: Work,
    shapes: Shapes,
    dtype: WireDtype,
    start_of: Callable[[Draw], Adapter],
) -> Update | Failure:
    """Read a client's answer to a broadcast; whatever does not fit makes a failure of this client, never an error.

    A factor that does not cross is the one that the client was sent; ``start_of`` draws a start that was named.
    """
    client = broadcast.client
    expected = expected_tensors(shapes, broadcast.rank, work.sends)
    try:
        check_size(message, largest_answer(broadcast, work, shapes, dtype))
        blob = blob_in(message)
        head, entries = read_head(blob, _ANSWER, len(expected) * MAX_ENTRY_BYTES)
        _check_sender(head.client, client)
        if isinstance(head, _FailureHead):
            held = None if head.held is None or head.held > broadcast.news.version else head.held
            return Failure(client, one_line(head.reason), held)
        check_entries(entries, expected, SAFETENSORS_NAMES[dtype])
        tensors = read_tensors(blob)
    except UpdateError as error:
        return Failure(client, one_line(str(error)[:MAX_REASON]))
    stats = TrainingStats(**head.model_dump(include=set(TrainingStats.__dataclass_fields__)))
    adapter = _whole(tensors, broadcast.start, work, shapes, broadcast.rank, start_of)
    return Update(head.round, client, adapter, stats, head.held)


def largest_answer(broadcast: Broadcast, work: Work, shapes: Shapes, dtype: WireDtype) -> int:
    """Return the most bytes that an answer to a broadcast can have: a transport need not take in more."""
    expected = expected_tensors(shapes, broadcast.rank, work.sends)
    numbers = sum(rows * columns for rows, columns in expected.values())
    return largest_message(len(expected), numbers * dtype.torch.itemsize)


def expected_tensors(shapes: Shapes, rank: int, factors: Factors) -> dict[str, tuple[int, int]]:
    """Return the shape of every tensor that an update of this rank holds."""
    expected: dict[str, tuple[int, int]] = {}
    for name, shape in shapes.items():
        (num_out, num_in), own = shape, rank_in(shape, rank)
        both = {"b": (num_out, own), "a": (own, num_in)}
        expected |= {f"{name}.{factor}": both[factor] for factor in sorted(factors)}
    return expected


def numbers_of(update: Update) -> dict[str, Any]:
    """Return an update's numbers without its tensors."""
    return {"round": update.round, "client": update.client, **asdict(update.stats)}


def _whole(
    sent: Mapping[str, Tensor],
    start: Adapter | Draw,
    work: Work,
    shapes: Shapes,
    rank: int,
    start_of: Callable[[Draw], Adapter],
) -> Adapter:
    """Complete what was sent: by the start, or by zeros where it is a gradient."""
    if work.payload is Payload.FACTORS and work.sends == BOTH:
        return Adapter.from_tensors(sent)
    if work.payload is Payload.GRADIENT:
        zeros = {key: torch.zeros(size) for key, size in expected_tensors(shapes, rank, BOTH).items()}
        return Adapter.from_tensors({**zeros, **sent})
    whole = start_of(start) if isinstance(start, Draw) else start
    if work.payload is Payload.CHANGE:
        before = whole.as_tensors(work.sends)
        sent = {key: before[key] + tensor for key, tensor in sent.items()}
    return whole.with_factors(sent)


def _draw_head(draw: Draw) -> _DrawHead:
    return _DrawHead(name=draw.name, rank=draw.rank)


def _check_sender(named: int, client: int) -> None:
    if named != client:
        raise UpdateError(f"expected an answer of client {client}, got one of client {named}; send it as that client")


def _parts(tensors: Mapping[str, Tensor], num_parts: int, shapes: Shapes) -> tuple[Adapter, ...]:
    """Return the parts of a broadcast's news; a part that adds nothing has no tensors."""
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
        found = tuple(Adapter.from_tensors(part) for part in parts)
        for part in found:
            check_covers(part, shapes)
    except AdapterError as error:
        raise UpdateError(f"expected the parts of a broadcast, got {error}; send it again") from error
    return found


def _check_start(start: Mapping[str, Tensor], head: Any, shapes: Shapes) -> None:
    expected = {} if head.draw is not None else expected_tensors(shapes, head.rank, frozenset(head.crossing))
    wrong = sorted(start.keys() ^ expected.keys())
    if wrong or any(tuple(start[key].shape) != size for key, size in expected.items()):
        name = wrong[0] if wrong else next(k for k, size in expected.items() if tuple(start[k].shape) != size)
        raise UpdateError(
            f"{name}: expected a start of this base's modules at rank {head.rank}, got another base's; use the run's "
            "own base"
        )
