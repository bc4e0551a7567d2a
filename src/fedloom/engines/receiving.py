"""What a client's answer becomes at the server, whichever engine carried it."""

from __future__ import annotations

from collections.abc import Mapping

from fedloom.federation.blob import Message, WireDtype
from fedloom.federation.intake import Arrival
from fedloom.federation.messages import decode_answer
from fedloom.lora.initial import Draw
from fedloom.lora.pair import Adapter
from fedloom.methods.client_half import Work
from fedloom.methods.state import Broadcast


def arrival_of(
    answer: Message,
    broadcast: Broadcast,
    download_bytes: int,
    *,
    work: Work,
    shapes: Mapping[str, tuple[int, int]],
    wire: WireDtype,
    seed: int,
) -> Arrival:
    """Read an answer to a broadcast; what does not fit makes a failure of its client."""

    def drawn(draw: Draw) -> Adapter:
        return draw.adapter(shapes, broadcast.rank, seed)

    outcome = decode_answer(answer, broadcast, work, shapes, wire, drawn)
    return Arrival(outcome, download_bytes, len(answer))
