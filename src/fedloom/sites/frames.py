"""A message between server and site: one frame of a length, a digest, a JSON head and a body.

    4 bytes   length of the head, little-endian
    32 bytes  SHA-256 of length, head and body; of a body that ends with its own hash, of length, head and that hash
    head      JSON, of one of the kinds below
    body      a sheet, a broadcast, an update, an adapter, a split message, or nothing

Nothing of a frame is believed unread: the digest first, then the head by its kind's schema, which knows no other
entries, then the body by its own hash: each byte is hashed once where it is sent and once where it comes in. What a
receiver does not expect (another way's kind, another run, a body where none belongs) is :class:`~.dropped.Dropped`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, MaxLen
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from fedloom.errors import UpdateError
from fedloom.federation.blob import SEAL_BYTES, Checked, checked
from fedloom.federation.buffers import Buffer, Buffers

FORMAT = 2
"""Version of the frames and of what they mean: both ends must have the same."""
MAX_HEAD_BYTES = 1 << 16
MAX_SHEET_BYTES = 1 << 20
_LENGTH_BYTES, _DIGEST_BYTES = 4, 32
PREFIX_BYTES = _LENGTH_BYTES + _DIGEST_BYTES

Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
RunId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Code = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z-]{0,31}$")]
SiteName = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Version = Annotated[str, StringConstraints(pattern=r"^[\w.+-]{1,40}$")]
Count = Annotated[int, Ge(0), Le(1 << 53)]
Round = Annotated[int, Ge(1), Le(1 << 53)]


class Part(BaseModel):
    """A part of a head: frozen, strict about types, closed to unknown entries, its numbers finite."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Members(Part):
    """Who takes part in a study, by one of its versions; the coordinator signs every version after the first.

    A site's position in ``names`` is its client number; ``settings_sha256`` is of what no version changes.
    """

    version: Annotated[int, Ge(1), Le(1 << 31)]
    names: Annotated[tuple[SiteName, ...], MaxLen(4096)]
    withdrawn: Annotated[tuple[SiteName, ...], MaxLen(4096)] = ()
    settings_sha256: Hash
    signature: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]*$", max_length=2048)] = ""

    @property
    def present(self) -> tuple[str, ...]:
        """The sites that have not withdrawn."""
        return tuple(name for name in self.names if name not in self.withdrawn)


class Refusal(Part):
    """Why a site does not do what it is asked: a code, numbers, and hashes. Words stay at the site."""

    code: Code
    numbers: Annotated[dict[Code, int | float], MaxLen(8)] = {}
    hashes: Annotated[dict[Code, Hash], MaxLen(4)] = {}


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
    """Site: the answer to a task; without a body where it has no update, and then with the reason."""

    kind: Literal["result"] = "result"
    run: RunId
    round: Round
    task: Hash
    refusal: Refusal | None = None
    again: bool = False
    seconds: Annotated[float, Ge(0)] = 0.0


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


class InPeriod(Part):
    """A message of split training: of which attempt at which period (``period`` is drawn anew for each), and its place.

    The server numbers what it sends to a site within a period from 0, and the site does one after the other: what comes
    twice is not done again, and what comes after a gap waits until the gap is sent again. An answer has the number of
    what it answers.
    """

    run: RunId
    period: RunId
    number: Count


class Begin(InPeriod):
    """Server: a period begins; the body are broadcasts of these sizes, one for each segment that the site trains.

    ``counted`` is the last period that the site took part in to its end.
    """

    kind: Literal["begin"] = "begin"
    round: Round
    counted: Count
    sizes: Annotated[tuple[Count, ...], MaxLen(1 << 12)]


class Request(InPeriod):
    """Server: send the activations of this micro-batch; of these rows of its step, where each crosses only once."""

    kind: Literal["request"] = "request"
    step: Count
    micro_batch: Count
    rows: Annotated[tuple[Count, ...], MaxLen(1 << 12)] | None = None


class Hidden(InPeriod):
    """Server: what the site's last blocks go on from (U-shape); the body is a split message."""

    kind: Literal["hidden"] = "hidden"
    step: Count
    micro_batch: Count


class Gradients(InPeriod):
    """Server: the gradients of a micro-batch's activations; the body is a split message."""

    kind: Literal["gradients"] = "gradients"
    step: Count
    micro_batch: Count


class Finish(InPeriod):
    """Server: take the optimiser's step. It is not answered: a site that cannot says so instead of its next answer."""

    kind: Literal["finish"] = "finish"
    step: Count


class Collect(InPeriod):
    """Server: the period is complete, send the updates."""

    kind: Literal["collect"] = "collect"


class Begun(InPeriod):
    """Site: ready for the first step; ``memory_of`` is the period that left the optimiser's state, 0 for none."""

    kind: Literal["begun"] = "begun"
    memory_of: Count


class Activations(InPeriod):
    """Site: the activations of a micro-batch; the body is a split message."""

    kind: Literal["activations"] = "activations"


class TailGradients(InPeriod):
    """Site: the gradients at the input of its last blocks (U-shape); the body is a split message."""

    kind: Literal["tail-gradients"] = "tail-gradients"


class Updates(InPeriod):
    """Site: the period's updates; the body are these, of these sizes, one for each segment."""

    kind: Literal["updates"] = "updates"
    sizes: Annotated[tuple[Count, ...], MaxLen(1 << 12)]
    seconds: Annotated[float, Ge(0)] = 0.0


class Failed(InPeriod):
    """Site: no part in what is left of this period."""

    kind: Literal["failed"] = "failed"
    refusal: Refusal


SplitToServer = Begun | Activations | TailGradients | Updates | Failed
SplitToSite = Begin | Request | Hidden | Gradients | Finish | Collect
ToServer = Hello | Ready | Result | Scored | SplitToServer
ToSite = SheetSent | Task | Score | End | SplitToSite
TO_SERVER: TypeAdapter[ToServer] = TypeAdapter(Annotated[ToServer, Field(discriminator="kind")])
TO_SITE: TypeAdapter[ToSite] = TypeAdapter(Annotated[ToSite, Field(discriminator="kind")])
_WITH_BODY = (
    *("result", "sheet", "task", "score"),
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


def unframe(data: Buffer, kinds: TypeAdapter[Any], max_body: int) -> tuple[Any, Body]:
    """Return a message's head, and its body where it lies; ``kinds`` are those that the receiver takes.

    Raises:
        UpdateError: it is damaged, of no such kind, or longer than it can be.
    """
    head, body = unframe_here(data, kinds, max_body)
    return head, checked(body.message) if isinstance(body, Checked) else body


def unframe_here(data: Buffer, kinds: TypeAdapter[Any], max_body: int) -> tuple[Any, Body]:
    """Do what :func:`unframe` does for a frame of another process of this machine, which has checked the body's hash.

    Raises:
        UpdateError: it is damaged elsewhere, of no such kind, or longer than it can be.
    """
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    end = PREFIX_BYTES + length
    if length > MAX_HEAD_BYTES or len(data) < end or len(data) - end > max_body:
        raise UpdateError(
            f"expected a whole frame with at most {max_body} bytes of body, got {len(data)} bytes; send it again"
        )
    text, body = bytes(data[PREFIX_BYTES:end]), memoryview(data)[end:]
    if _digest(text, [body]) != data[_LENGTH_BYTES:PREFIX_BYTES]:
        raise UpdateError(f"expected a frame that fits its digest, got {len(data)} bytes that do not; send it again")
    try:
        head = kinds.validate_json(text)
    except (ValidationError, RecursionError) as error:
        raise UpdateError(
            "expected a head of a known kind, got another; run the same version of fedloom on both sides"
        ) from error
    if body and head.kind not in _WITH_BODY:
        raise UpdateError(f"expected no body in a frame of kind {head.kind}, got {len(body)} bytes; leave it out")
    return head, Checked(body) if body and text.startswith(_SEALED) else body


def _digest(text: bytes, body: Buffers) -> bytes:
    """Return the hash of head and body, and of where one ends: a head may end in blanks, and a body begin with them."""
    found = hashlib.sha256(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
    for part in [memoryview(body[-1])[-SEAL_BYTES:]] if body and text.startswith(_SEALED) else body:
        found.update(part)
    return found.digest()
