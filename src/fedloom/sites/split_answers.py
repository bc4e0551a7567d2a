"""What a site sends within a period, read: it is of that site, or its failure."""

from __future__ import annotations

from collections.abc import Sequence

from fedloom.errors import UpdateError
from fedloom.federation.blob import Message, WireDtype
from fedloom.federation.messages import Shapes, decode_answer
from fedloom.methods.client_half import Work
from fedloom.methods.state import Broadcast, Failure, Update
from fedloom.sites.frames import Body, parts_of
from fedloom.split.cut_messages import SplitMessage


def message_of(client: int, name: str, body: Body) -> SplitMessage | Failure:
    """Return a split message of a site, which the link has named; what the message says of its sender must be that."""
    try:
        message = SplitMessage.from_bytes(body)
    except UpdateError as error:
        return Failure(client, str(error))
    if message.client != client:
        return Failure(
            client,
            f"expected a message of client {client}, {name}, got one that names client {message.client}; send it as "
            "that client",
        )
    return message


def updates_of(
    client: int,
    sizes: Sequence[int],
    body: Body,
    parts: Sequence[tuple[Broadcast, Shapes, Work]],
    wire: WireDtype,
    seed: int,
) -> list[Update] | Failure:
    """Return a site's updates, one for each segment, of which ``parts`` are what was sent, its modules and its work."""
    try:
        blobs = parts_of(body, sizes)
    except UpdateError as error:
        return Failure(client, str(error))
    if len(blobs) != len(parts):
        return Failure(client, f"expected {len(parts)} updates, one a segment, got {len(blobs)}; run the same version")
    found = [_update(blob, *part, wire, seed) for blob, part in zip(blobs, parts, strict=True)]
    updates = [one for one in found if isinstance(one, Update)]
    return updates if len(updates) == len(found) else next(one for one in found if isinstance(one, Failure))


def _update(blob: Message, sent: Broadcast, shapes: Shapes, work: Work, wire: WireDtype, seed: int) -> Update | Failure:
    return decode_answer(blob, sent, work, shapes, wire, lambda draw: draw.adapter(shapes, sent.rank, seed))
