"""A message between server and site: one frame of a length, a digest, a JSON head and a body.

    4 bytes   length of the head, little-endian
    32 bytes  SHA-256 of length, head and body; of a body that ends with its own hash, of length, head and that hash
    head      JSON, of one of the kinds below, of split training (``split_frames``), or of a masked sum (``sum_frames``)
    body      a sheet, a broadcast, an update, an adapter, a split message, one of a masked sum, or nothing

Nothing of a frame is believed unread: the digest first, then the head by its kind's schema, which knows no other
entries, then the body by its own hash: each byte is hashed once where it is sent and once where it comes in. What a
receiver does not expect (another way's kind, another run, a body where none belongs) is :class:`~.dropped.Dropped`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, Any, Literal

from annotated_types import Ge
from pydantic import Field, TypeAdapter, ValidationError

from fedloom.errors import UpdateError
from fedloom.federation.blob import SEAL_BYTES, Checked, checked
from fedloom.federation.buffers import Buffer, Buffers
from fedloom.sites.frame_parts import Count, Hash, Members, Part, Refusal, Round, RunId, Version
from fedloom.sites.split_frames import SplitToServer, SplitToSite
from fedloom.sites.sum_frames import SumAnswered, SumAsked

FORMAT = 4
"""Version of the frames and of what they mean: both ends must have the same."""
MAX_HEAD_BYTES = 1 << 16
MAX_SHEET_BYTES = 1 << 20
LARGE_BYTES = 1 << 20
"""From this size on a frame is worth some care: it is neither hashed nor copied where that is not needed."""
_LENGTH_BYTES, _DIGEST_BYTES = 4, 32
PREFIX_BYTES = _LENGTH_BYTES + _DIGEST_BYTES


class Hello(Part):
    """Site: here I am, and this is what I am at; after every connection and every few seconds.

    Within a period of split training it says which, and the number of the frame that it waits for.
    """

    kind: Literal["hello"] = "hello"
    format: Count
    fedloom: Version
    torch: Version
    run: RunId | None = None
    state: Literal["waiting", "loading", "ready", "training", "scoring"]
    task: Hash | None = None
    period: RunId | None = None
    number: Count = 0


class Ready(Part):
    """Site: the sheet is read, base and rows are loaded, or refused; ``kept`` and ``last`` are of its memory.

    A site that has answered a round which it does not yet know to be counted holds two memories: the one before
    (``kept``) and the one after (of round ``last_round``).
    """

    kind: Literal["ready"] = "ready"
    run: RunId
    sheet: Hash
    rows: Count = 0
    held_out_rows: Count = 0
    kept_version: Count = 0
    last_round: Count = 0
    last_version: Count = 0
    refusal: Refusal | None = None


class Result(Part):
    """Site: the answer to a task; without a body where it has no update, and then with the reason.

    In a masked round it says that the site has trained, and has no body: what it came to crosses in the sum alone.
    ``epsilon`` is what the study has cost its rows so far, where they are hidden.
    """

    kind: Literal["result"] = "result"
    run: RunId
    round: Round
    task: Hash
    refusal: Refusal | None = None
    again: bool = False
    seconds: Annotated[float, Ge(0)] = 0.0
    epsilon: Annotated[float, Ge(0)] | None = None


class Scored(Part):
    """Site: how well the adapter does on its held-out rows: two sums and a count."""

    kind: Literal["scored"] = "scored"
    run: RunId
    round: Count
    sum_nats: Annotated[float, Ge(0)] = 0.0
    num_loss_tokens: Count = 0
    num_rows: Count = 0
    refusal: Refusal | None = None


class SheetSent(Part):
    """Server: what the run is; the body is the sheet. A site that knows ``members`` of the run wants them again."""

    kind: Literal["sheet"] = "sheet"
    run: RunId
    format: Count
    members: Members | None = None


class Task(Part):
    """Server: a round's work; the body is a broadcast. ``counted`` is the last round that the site's update counted in.

    ``task`` names the work itself and not the bytes that say it: the same for a site that holds another version.
    """

    kind: Literal["task"] = "task"
    run: RunId
    round: Round
    task: Hash
    counted: Count


class Score(Part):
    """Server: score this adapter, the body, after this round."""

    kind: Literal["score"] = "score"
    run: RunId
    round: Count


class End(Part):
    """Server: the run is complete."""

    kind: Literal["end"] = "end"
    run: RunId


ToServer = Hello | Ready | Result | Scored | SumAnswered | SplitToServer
ToSite = SheetSent | Task | Score | End | SumAsked | SplitToSite
TO_SERVER: TypeAdapter[ToServer] = TypeAdapter(Annotated[ToServer, Field(discriminator="kind")])
TO_SITE: TypeAdapter[ToSite] = TypeAdapter(Annotated[ToSite, Field(discriminator="kind")])
_WITH_BODY = (
    *("result", "sheet", "task", "score", "sum", "sum-answer"),
    *("begin", "hidden", "gradients", "activations", "tail-gradients", "updates"),
)
_SEALED = tuple(
    f'{{"kind":"{kind}"'.encode() for kind in ("result", "task", "hidden", "gradients", "activations", "tail-gradients")
)
"""How heads begin whose body is one message, which ends with its own hash."""

Body = memoryview | Checked


def parts_of(body: Body, sizes: Sequence[int]) -> list[memoryview]:
    """Return the parts of a body that have these sizes.

    Raises:
        UpdateError: the sizes are not those of the whole body.
    """
    if isinstance(body, Checked) or sum(sizes) != len(body):
        raise UpdateError(f"expected a body of {sum(sizes)} bytes, as its head says, got {len(body)}; send it again")
    ends = list(accumulate(sizes))
    return [body[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def frame(head: ToServer | ToSite, body: Buffer | Checked = b"") -> bytes:
    """Return a message as bytes."""
    return b"".join(framed(head, [bytes(body)]))


def framed(head: ToServer | ToSite, body: Buffers) -> Buffers:
    """Return a message in several buffers, those of the body among them as they are."""
    text = head.model_dump_json().encode()
    return [len(text).to_bytes(_LENGTH_BYTES, "little") + _digest(text, body) + text, *body]


def unframe(data: Buffer | Buffers | Checked, kinds: TypeAdapter[Any], max_body: int) -> tuple[Any, Body]:
    """Return a message's head, and its body where it lies; ``kinds`` are those that the receiver takes.

    Raises:
        UpdateError: it is damaged, of no such kind, or longer than it can be.
    """
    if isinstance(data, Checked):
        return unframe_here(data.message, kinds, max_body)
    head, body = unframe_here(data, kinds, max_body)
    return head, checked(body.message) if isinstance(body, Checked) else body


def compared(data: Buffer) -> Buffer | Checked:
    """Compare a large frame with its hashes where it comes in, so that those of several senders are hashed at once.

    Return it as checked where it fits; whatever else it is, its reader finds out.
    """
    if len(data) < LARGE_BYTES:
        return data
    try:
        text, body = _parts(data, len(data))
        if not text.startswith(_SEALED):
            return data
        checked(body)
    except UpdateError:
        return data
    return Checked(data)


def unframe_here(data: Buffer | Buffers, kinds: TypeAdapter[Any], max_body: int) -> tuple[Any, Body]:
    """Do what :func:`unframe` does for a frame whose body's hash was compared before, in this process or another one.

    Such a frame may lie in two buffers: all that is before the body, and the body.

    Raises:
        UpdateError: it is damaged elsewhere, of no such kind, or longer than it can be.
    """
    text, body = _parts(data, max_body)
    try:
        head = kinds.validate_json(text)
    except (ValidationError, RecursionError) as error:
        raise UpdateError(
            "expected a head of a known kind, got another; run the same version of fedloom on both sides"
        ) from error
    if body and head.kind not in _WITH_BODY:
        raise UpdateError(f"expected no body in a frame of kind {head.kind}, got {len(body)} bytes; leave it out")
    return head, Checked(body) if body and text.startswith(_SEALED) else body


def _parts(data: Buffer | Buffers, max_body: int) -> tuple[bytes, memoryview]:
    """Return a frame's head, as text that nobody has parsed, and its body, once they fit the digest."""
    first, *others = data if isinstance(data, list) else [data]
    size, length = len(first) + sum(map(len, others)), int.from_bytes(first[:_LENGTH_BYTES], "little")
    end = PREFIX_BYTES + length
    is_cut = len(first) != end if others else len(first) < end
    if length > MAX_HEAD_BYTES or is_cut or size - end > max_body:
        raise UpdateError(
            f"expected a whole frame with at most {max_body} bytes of body, got {size} bytes; send it again"
        )
    text, body = bytes(first[PREFIX_BYTES:end]), memoryview(others[0]) if others else memoryview(first)[end:]
    if _digest(text, [body]) != first[_LENGTH_BYTES:PREFIX_BYTES]:
        raise UpdateError(f"expected a frame that fits its digest, got {size} bytes that do not; send it again")
    return text, body


def _digest(text: bytes, body: Buffers) -> bytes:
    """Return the hash of head and body, and of where one ends: a head may end in blanks, and a body begin with them."""
    found = hashlib.sha256(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
    for part in [memoryview(body[-1])[-SEAL_BYTES:]] if body and text.startswith(_SEALED) else body:
        found.update(part)
    return found.digest()
