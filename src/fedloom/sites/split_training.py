"""A split run at a site: its part of the base, its rows, and an answer to every frame of a period.

The site loads its own blocks and no others. It knows from the sheet which rows every step reads, so none is named; and
it does nothing that is not the next thing: a step follows the step before, a micro-batch is asked for once, gradients
belong to activations that wait for them. Anything else ends its part in the period.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, assert_never

import numpy as np
import torch

from fedloom.clients.memory import Memory
from fedloom.data.tokenizer import fingerprint
from fedloom.data.tokens import TokenSet
from fedloom.errors import FedloomError, UpdateError
from fedloom.federation.blob import Message
from fedloom.federation.broadcasts import decode_broadcast
from fedloom.federation.messages import encode_update
from fedloom.lora.layer import Slot
from fedloom.lora.pair import Adapter
from fedloom.methods.state import Broadcast, Failure, Update
from fedloom.sites import policy
from fedloom.sites.frame_parts import Refusal
from fedloom.sites.frames import Body, Ready, parts_of
from fedloom.sites.sheet import Sheet
from fedloom.sites.site_cut import own_part, plan_of, segments_of
from fedloom.sites.site_inputs import divided, encoded_rows, find_site_base
from fedloom.sites.site_settings import SiteSettings
from fedloom.sites.site_training import (
    RefusedError,
    SiteTraining,
    check_allowed,
    check_asked,
    refusal_of,
)
from fedloom.sites.split_frames import (
    Activations,
    Begin,
    Begun,
    Collect,
    Failed,
    Finish,
    Gradients,
    Hidden,
    Request,
    SplitToServer,
    SplitToSite,
    TailGradients,
    Updates,
)
from fedloom.sites.store import Recall, Store
from fedloom.split.client_halves import LocalSplitClients
from fedloom.split.codecs import WireDtype
from fedloom.split.cut_messages import MessageKind, SplitMessage
from fedloom.split.message_checks import Expected, check_message
from fedloom.split.party import adamw
from fedloom.split.plan import Segment
from fedloom.training.output_head import read_output_head

Answer = tuple[SplitToServer, bytes]
Note = Callable[[str], None]


class SplitTraining:
    """A split run that a site takes part in, or why it does not (``refusal``)."""

    def __init__(self, site: SiteSettings, sheet: Sheet, sheet_sha256: str, note: Note) -> None:
        assert sheet.split is not None
        self.site, self.sheet, self._cut, self._sheet_sha256, self._note = site, sheet, sheet.split, sheet_sha256, note
        self.refusal: Refusal | None = None
        self._recall, self._rows = Recall(), TokenSet.from_rows([])
        self._begun: Begin | None = None
        self._step, self._since = 0, 0.0
        self._asked: set[int] = set()
        self._waiting: dict[int, int] = {}
        try:
            self._open()
        except (FedloomError, torch.OutOfMemoryError, MemoryError) as error:
            self.refusal = refusal_of(error, note)

    def ready(self) -> Ready:
        """Return what the server is told of this site."""
        recall = self._recall
        return Ready(
            run=self.sheet.run,
            sheet=self._sheet_sha256,
            rows=self.num_rows,
            kept_version=recall.version,
            last_round=recall.round,
            last_version=recall.version,
            refusal=self.refusal,
        )

    @property
    def num_rows(self) -> int:
        """Rows that the site trains on: those that the server is told of, since it draws the steps' rows."""
        return len(self._rows)

    def answer(self, head: SplitToSite, body: Body) -> Answer | None:
        """Do what is asked, and return what is sent back; what goes wrong ends this site's part in the period."""
        if head.run != self.sheet.run:
            return None
        if not isinstance(head, Begin) and (self._begun is None or head.period != self._begun.period):
            return None  # of a part that has ended, with its reason
        try:
            if self.refusal is not None:
                raise RefusedError(self.refusal)
            return self._answered(head, body)
        except (FedloomError, torch.OutOfMemoryError, MemoryError) as error:
            self._begun = None
            return Failed(**_place(head), refusal=refusal_of(error, self._note)), b""

    def _answered(self, head: SplitToSite, body: Body) -> Answer | None:
        match head:
            case Begin():
                return self._begin(head, body)
            case Request():
                return self._request(head)
            case Hidden():
                return self._hidden(head, body)
            case Gradients():
                self._gradients(head, body)
                return None
            case Finish():
                self._finish(head)
                return None
            case Collect():
                return self._collect(head)
            case _:
                assert_never(head)

    def _open(self) -> None:
        sheet, own = self.sheet, self.site.policy
        check_allowed(self.site, sheet, self._sheet_sha256)
        found = find_site_base(self.site)
        if (refusal := policy.of_base(sheet, found.revision_hash, fingerprint(found.tokenizer))) is not None:
            raise RefusedError(refusal)
        rows, _ = divided(
            encoded_rows(self.site, sheet, found.tokenizer, found.config), self.site.data.eval_fraction, sheet.seed
        )
        if (refusal := policy.of_inputs(own, sheet, len(rows), int(rows.lengths.max()))) is not None:
            raise RefusedError(refusal)
        self._rows = rows.select(np.arange(min(len(rows), policy.told_rows(own, len(rows)))))
        self._lora = own_part(found, self.site.model, sheet, self._cut)
        self._segments = segments_of(self._cut, self._lora, sheet.client)
        self._plan = plan_of(sheet, self._cut, self.num_rows)
        head = None if self._cut.tail_blocks is None else read_output_head(self._lora.model)
        self._clients = LocalSplitClients(
            self._lora, head, self._plan, self._segments, {sheet.client: self._rows}, adamw
        )
        self._store = Store(self.site.folder, sheet.run)
        self._recall = self._store.read()
        held = self._recall.side
        sides = [Adapter({name: held[name] for name in part.shapes if name in held}) for part in self._segments]
        self._clients.restore(self._recall.version, sides)

    def _begin(self, head: Begin, body: Body) -> Answer:
        blobs = parts_of(body, head.sizes)
        if len(blobs) != len(self._segments) or not self._plan.steps(head.round):
            raise UpdateError(
                f"expected a period of {self._cut.num_periods} and {len(self._segments)} broadcasts, got period "
                f"{head.round} and {len(blobs)}; send what the sheet says"
            )
        client, kept = self.sheet.client, self._recall.settled(head.counted).kept
        parts = zip(blobs, self._segments, strict=True)
        broadcasts = [self._broadcast(blob, segment, head.round) for blob, segment in parts]
        self._lora.open([Slot(self.sheet.rank, self.sheet.scale)] if self._segments else [])
        self._clients.begin(head.round, {client: broadcasts}, {client: {**kept.moments, **kept.owed}})
        self._recall = self._recall.settled(head.counted)
        self._begun, self._step, self._since = head, self._plan.steps(head.round).start, time.perf_counter()
        self._asked, self._waiting = set(), {}
        return Begun(**_place(head), memory_of=kept.version), b""

    def _broadcast(self, blob: Message, segment: Segment, round: int) -> Broadcast:
        received = decode_broadcast(blob, segment.shapes)
        check_asked(received, self.sheet, round)
        if received.news.version != round - 1:
            raise UpdateError(f"expected news to version {round - 1}, got {received.news.version}; send the period's")
        start = Adapter.from_tensors(received.sent) if received.draw is None else received.draw
        return Broadcast(round, self.sheet.client, received.rank, received.scale, received.news, start)

    def _request(self, head: Request) -> Answer:
        plan, client = self._plan, self.sheet.client
        is_fresh = head.step == self._step and head.micro_batch not in self._asked
        if not is_fresh or head.micro_batch >= plan.micro_batches or (head.rows is None) is plan.is_frozen:
            raise UpdateError(self._out_of_turn(head.step, head.micro_batch))
        rows = plan.rows(client, head.step, head.micro_batch).tolist()
        if head.rows is not None:
            rows, allowed = list(head.rows), set(plan.all_rows(client, head.step).tolist())
            if not rows or len(set(rows)) < len(rows) or not set(rows) <= allowed:
                raise UpdateError(f"expected rows of step {head.step}, each once, got others; send the step's own")
        self._asked.add(head.micro_batch)
        self._clients.request(head.step, head.micro_batch, {client: rows})
        (message,) = self._clients.activations(head.step, head.micro_batch)
        assert isinstance(message, SplitMessage)
        self._waiting[head.micro_batch] = message.num_tokens
        return Activations(**_place(head)), message.to_bytes()

    def _hidden(self, head: Hidden, body: Body) -> Answer:
        if self._cut.tail_blocks is None:
            raise UpdateError(self._out_of_turn(head.step, head.micro_batch))
        message = self._received(head, body)
        rows = self._plan.rows(self.sheet.client, head.step, head.micro_batch)
        self._check(message, self._plan.wire_dtype, int(self._rows.lengths[rows].sum()))
        (found,) = self._clients.tails([message])
        assert isinstance(found, SplitMessage)
        return TailGradients(**_place(head)), found.to_bytes()

    def _gradients(self, head: Gradients, body: Body) -> None:
        message = self._received(head, body)
        tokens = self._waiting.pop(head.micro_batch, None)
        if tokens is None:
            raise UpdateError(self._out_of_turn(head.step, head.micro_batch))
        self._check(message, self._plan.gradient_wire_dtype, tokens)
        self._clients.gradients([message])

    def _check(self, message: SplitMessage, dtype: WireDtype, tokens: int) -> None:
        width: int = self._lora.model.config.hidden_size  # type: ignore[union-attr, assignment]
        kind: MessageKind = "hidden" if message.kind == "hidden" else "gradients"
        place = (self.sheet.client, message.step, message.micro_batch)
        most = tokens if kind == "gradients" else 0
        check_message(message, Expected(kind, *place, width, dtype, num_tokens=tokens, max_loss_tokens=most))

    def _received(self, head: Hidden | Gradients, body: Body) -> SplitMessage:
        """Return a message of this step, which says of itself what the frame says of it."""
        message = SplitMessage.from_bytes(body)
        plan = self._plan
        is_asked = head.micro_batch in (range(plan.micro_batches) if plan.is_frozen else self._asked)
        named = (message.step, message.micro_batch)
        if head.step != self._step or not is_asked or named != (head.step, head.micro_batch):
            raise UpdateError(self._out_of_turn(*named))
        return message

    def _finish(self, head: Finish) -> None:
        if head.step != self._step:
            raise UpdateError(self._out_of_turn(head.step, 0))
        self._step, self._asked, self._waiting = self._step + 1, set(), {}
        for failure in self._clients.finish(head.step, [self.sheet.client]):
            raise RefusedError(Refusal(code="diverged"), failure.reason)

    def _collect(self, head: Collect) -> Answer:
        assert self._begun is not None
        sheet, round = self.sheet, self._begun.round
        if self._step != self._plan.steps(round).stop:
            raise UpdateError(self._out_of_turn(self._step, 0))
        updates = [update for found in self._clients.end([sheet.client]) for update in _updates_of(found)]
        blobs = [encode_update(update, update.adapter.as_tensors(), sheet.wire) for update in updates]
        carried = dict(self._clients.memory().get(sheet.client, {}))
        owed = {"residual": carried.pop("residual")} if "residual" in carried else {}
        side = Adapter({name: pair for part in self._clients.sides() for name, pair in part.items()})
        self._recall = Recall(
            version=round - 1,
            side=side,
            kept=self._recall.kept,
            last=Memory(version=round, moments=carried, owed=owed),
            round=round,
        )
        self._store.write(self._recall, [])
        sizes, seconds = tuple(len(blob) for blob in blobs), time.perf_counter() - self._since
        return Updates(**_place(head), sizes=sizes, seconds=seconds), b"".join(blobs)

    def _out_of_turn(self, step: int, micro_batch: int) -> str:
        return (
            f"expected what follows step {self._step} and micro-batches {sorted(self._asked)} of it, got step {step}, "
            f"micro-batch {micro_batch}; send each once and in order"
        )


def opened_run(
    site: SiteSettings, sheet: Sheet, sheet_sha256: str, newest: Callable[[], int], note: Note
) -> SiteTraining | SplitTraining:
    """Return the run of a sheet at a site: of whole models, or of one that is cut."""
    if sheet.split is not None:
        return SplitTraining(site, sheet, sheet_sha256, note)
    return SiteTraining(site, sheet, sheet_sha256, newest, note)


def _place(head: SplitToSite) -> dict[str, Any]:
    return {"run": head.run, "period": head.period, "number": head.number}


def _updates_of(found: tuple[int, list[Update]] | Failure) -> list[Update]:
    if isinstance(found, Failure):
        raise RefusedError(Refusal(code="diverged"), found.reason)
    return found[1]
