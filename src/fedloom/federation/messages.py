"""What clients answer, as bytes: one safetensors blob and its hash, its numbers in the header.

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

from fedloom.errors import UpdateError
from fedloom.federation.blob import (
    MAX_ENTRY_BYTES,
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
)
from fedloom.federation.buffers import Buffers
from fedloom.federation.coding import Entries, entries_of, num_bytes_of, read, written
from fedloom.lora.initial import Draw
from fedloom.lora.pair import BOTH, Adapter, Factors, rank_in
from fedloom.methods.client_half import Moments, Payload, Work
from fedloom.methods.state import Broadcast, Failure, Update
from fedloom.training.moments import COLUMNS, ROWS
from fedloom.training.stats import TrainingStats
from fedloom.wording import one_line

MAX_REASON = 2000
"""Characters of a client's reason, and of what is wrong with its message."""
MAX_COUNT = 1 << 53

Count = Annotated[int, Ge(0), Le(MAX_COUNT)]
Shapes = Mapping[str, tuple[int, int]]


class Head(BaseModel):
    """The numbers of a message."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class _UpdateHead(Head):
    kind: Literal["update"] = "update"
    round: Annotated[int, Ge(1), Le(MAX_COUNT)]
    client: Annotated[int, Ge(-1), Le(MAX_COUNT)]
    held: Count
    num_rows: Count
    num_tokens: Count
    num_loss_tokens: Count
    num_steps: Count
    loss_nats: float
    loss_last_nats: float
    began: Annotated[str, MaxLen(64)] = ""
    seconds: Annotated[float, Ge(0)]


class _FailureHead(Head):
    kind: Literal["failure"] = "failure"
    client: Annotated[int, Ge(-1), Le(MAX_COUNT)]
    reason: Annotated[str, MaxLen(MAX_REASON)]
    held: Count | None


MOMENTS, CONTROL = "moments/", "control/"
"""Begin the names of second moments and of control variates in a message."""
_ANSWER: TypeAdapter[_UpdateHead | _FailureHead] = TypeAdapter(
    Annotated[_UpdateHead | _FailureHead, Field(discriminator="kind")]
)


def exact_dtype(wire: WireDtype) -> WireDtype:
    """Return the type of what crosses but once, with no later message to mend it: fp32 on such a wire, else bf16.

    The range of bf16 is that of fp32: gradients and moves are small.
    """
    return wire if wire is WireDtype.FP32 else WireDtype.BF16


def answer_dtype(work: Work, wire: WireDtype) -> WireDtype:
    """Return the type in which the factors of an answer cross: the wire's, but for a sketch."""
    return exact_dtype(wire) if work.payload is Payload.SKETCH else wire


def encode_update(update: Update, tensors: Mapping[str, Tensor], dtype: WireDtype) -> bytes:
    """Serialise an update: ``tensors`` are what the client half sends of it."""
    return b"".join(update_buffers(update, tensors, dtype))


def update_buffers(update: Update, tensors: Mapping[str, Tensor], dtype: WireDtype) -> Buffers:
    """Return :func:`encode_update` in several buffers, most of them the tensors' own memory."""
    named = {"round": update.round, "client": update.client, "held": update.held, "began": update.began_sha256}
    head = _UpdateHead.model_validate({**named, **asdict(update.stats)})
    return packed({**written(tensors, dtype), **moments_written(update.moments)}, head)


def moments_written(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a message that stand for second moments: bf16, whose range is that of fp32."""
    return {f"{MOMENTS}{key}": tensor.to(torch.bfloat16) for key, tensor in moments.items()}


def moments_entries(shapes: Shapes, rank: int, factors: Factors) -> Entries:
    """Return (dtype, shape) of every tensor that stands for the second moments of so many slots."""
    found: Entries = {}
    for key, size in expected_tensors(shapes, rank, factors).items():
        slots, length = size if key.endswith(".a") else size[::-1]
        found |= {f"{MOMENTS}{key}{ROWS}": ("BF16", (slots,)), f"{MOMENTS}{key}{COLUMNS}": ("BF16", (length,))}
    return found


def moments_read(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the second moments of a message, whose entries have been checked.

    Raises:
        UpdateError: one is negative or not finite.
    """
    found = {key.removeprefix(MOMENTS): tensor for key, tensor in tensors.items() if key.startswith(MOMENTS)}
    for key, tensor in found.items():
        if not bool((torch.isfinite(tensor) & (tensor >= 0)).all()):
            raise UpdateError(f"{key}: expected finite second moments of 0 or more, got others; check the client")
    return found


def control_entries(shapes: Shapes, rank: int, factors: Factors, wire: WireDtype) -> Entries:
    """Return (dtype, shape) of every tensor that stands for control variates of so many slots."""
    expected = {f"{CONTROL}{key}": size for key, size in expected_tensors(shapes, rank, factors).items()}
    return entries_of(expected, exact_dtype(wire))


def control_read(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the control variates of a message, whose entries have been checked.

    Raises:
        UpdateError: one is not finite.
    """
    found = {key.removeprefix(CONTROL): t.float() for key, t in tensors.items() if key.startswith(CONTROL)}
    for key, tensor in found.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UpdateError(f"{key}: expected finite control variates, got others; check the server")
    return found


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
    client, largest = broadcast.client, largest_answer(broadcast, work, shapes, dtype)
    expected, dtype = expected_tensors(shapes, broadcast.rank, work.sends), answer_dtype(work, dtype)
    try:
        check_size(message, largest)
        blob = blob_in(message)
        wanted = entries_of(expected, dtype)
        if work.moments is Moments.SHARED:
            wanted |= moments_entries(shapes, broadcast.rank, work.trains)
        head, entries = read_head(blob, _ANSWER, len(wanted) * MAX_ENTRY_BYTES)
        _check_sender(head.client, client)
        if isinstance(head, _FailureHead):
            held = None if head.held is None or head.held > broadcast.news.version else head.held
            return Failure(client, one_line(head.reason), held)
        check_entries(entries, wanted)
        crossed = read_tensors(blob)
        tensors, moments = read(crossed, expected, dtype), moments_read(crossed)
    except UpdateError as error:
        return Failure(client, one_line(str(error)[:MAX_REASON]))
    stats = TrainingStats(**head.model_dump(include=set(TrainingStats.__dataclass_fields__)))
    adapter = _whole(tensors, broadcast.trained, work, shapes, broadcast.rank, start_of)
    return Update(head.round, client, adapter, stats, head.held, began_sha256=head.began, moments=moments)


def largest_answer(broadcast: Broadcast, work: Work, shapes: Shapes, dtype: WireDtype) -> int:
    """Return the most bytes that an answer to a broadcast can have: a transport need not take in more."""
    expected, dtype = expected_tensors(shapes, broadcast.rank, work.sends), answer_dtype(work, dtype)
    extra = moments_entries(shapes, broadcast.rank, work.trains) if work.moments is Moments.SHARED else {}
    num_bytes = num_bytes_of(expected, dtype) + sum(2 * shape[0] for _, shape in extra.values())
    return largest_message(len(entries_of(expected, dtype)) + len(extra), num_bytes)


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
    if work.is_gradient:
        zeros = {key: torch.zeros(size) for key, size in expected_tensors(shapes, rank, BOTH).items()}
        return Adapter.from_tensors({**zeros, **sent})
    whole = start_of(start) if isinstance(start, Draw) else start
    if work.payload is Payload.CHANGE:
        before = whole.as_tensors(work.sends)
        sent = {key: before[key] + tensor for key, tensor in sent.items()}
    return whole.with_factors(sent)


def _check_sender(named: int, client: int) -> None:
    if named != client:
        raise UpdateError(f"expected an answer of client {client}, got one of client {named}; send it as that client")
