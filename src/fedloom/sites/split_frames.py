"""The kinds of frames of split training: what crosses within a period, each with its place in it."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, MaxLen

from fedloom.sites.frame_parts import Count, Part, Refusal, Round, RunId


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
