"""The kinds of frames of a masked round: its steps, one message of the server and one answer each.

The body of both is a message of :mod:`fedloom.privacy.secure_sum`, which is read there, by the session that both ends
know; so the head only says to which sum and step it belongs.
"""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Gt, Le, MaxLen

from fedloom.sites.frame_parts import Count, Hash, Part, Refusal, Round, RunId

StepName = Literal["keys", "shares", "masked", "agreed", "told"]


class Terms(Part):
    """What all members of a sum must be told alike: its members by client number, and what gives their shares."""

    members: Annotated[tuple[Count, ...], MaxLen(4096)]
    threshold: Count
    unit_share: Annotated[float, Gt(0), Le(1)]
    largest_share: Annotated[float, Gt(0), Le(1)]


class OfSum(Part):
    """A message of one attempt at a round's sum (``token`` is drawn anew for each), and its step."""

    run: RunId
    round: Round
    token: RunId
    step: StepName


class SumAsked(OfSum):
    """Server: the next message of a sum, of the numbers that the site's answer to ``task`` came to.

    ``terms`` come with the first step alone.
    """

    kind: Literal["sum"] = "sum"
    task: Hash
    terms: Terms | None = None


class SumAnswered(OfSum):
    """Site: its answer; without a body where it takes no further part, and then with the reason."""

    kind: Literal["sum-answer"] = "sum-answer"
    refusal: Refusal | None = None
