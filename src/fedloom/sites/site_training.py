"""A run at a site: its sheet read, base and rows loaded, and each task answered by the one client that lives there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fedloom.assembly.inputs import lora_of
from fedloom.clients.client import Assignment, Client
from fedloom.clients.held_sides import HeldSides
from fedloom.data.tokenizer import fingerprint
from fedloom.data.tokens import TokenSet
from fedloom.errors import (
    BehindError,
    DataError,
    FedloomError,
    MethodError,
    MissingExtraError,
    RunError,
    UpdateError,
)
from fedloom.federation.blob import read_tensors
from fedloom.federation.broadcasts import Received, decode_broadcast
from fedloom.federation.buffers import Buffers
from fedloom.federation.messages import answer_dtype, update_buffers
from fedloom.lora.layer import check_covers
from fedloom.lora.pair import Adapter
from fedloom.methods.state import Failure
from fedloom.models.row_attention import choose_attention
from fedloom.privacy.draws import SystemDraws
from fedloom.privacy.secure_sum.masks import check_masks
from fedloom.sites import policy
from fedloom.sites.frame_parts import Refusal
from fedloom.sites.frames import Body, Ready, Result, Score, Scored, Task
from fedloom.sites.sheet import Sheet
from fedloom.sites.site_books import SiteBooks
from fedloom.sites.site_inputs import divided, encoded_rows, load_site_base
from fedloom.sites.site_settings import SiteSettings
from fedloom.sites.site_sum import SiteSums
from fedloom.sites.store import Recall, Store, confirmation
from fedloom.sites.sum_frames import SumAnswered, SumAsked
from fedloom.training.cohort_round import ClientResult, StepReport, train_cohort
from fedloom.training.row_losses import row_losses_of
from fedloom.training.verified_head import output_head

Note = Callable[[str], None]
Take = Callable[[], Body]
"""Hands over a frame's body, and keeps nothing of it."""


class _SupersededError(Exception):
    """A newer round was asked for while this one was at work."""


class RefusedError(FedloomError):
    """The site does not take part; the text stays at the site."""

    def __init__(self, refusal: Refusal, text: str = "") -> None:
        super().__init__(text or policy.in_words(refusal))
        self.refusal = refusal


class SiteTraining:
    """A run that a site takes part in, or why it does not (``refusal``).

    ``newest`` gives the newest round that was asked for: a task of an older one stops between two steps.
    """

    def __init__(
        self, site: SiteSettings, sheet: Sheet, sheet_sha256: str, newest: Callable[[], int], note: Note
    ) -> None:
        self.site, self.sheet, self._sheet_sha256 = site, sheet, sheet_sha256
        self.refusal: Refusal | None = None
        self._newest, self._note = newest, note
        self._recall, self._rows_told, self._rows = Recall(), 0, TokenSet.from_rows([])
        self._held_out: TokenSet | None = None
        self._is_stored = False
        self._books: SiteBooks | None = None
        self._sums: SiteSums | None = None
        try:
            self._open()
        except (FedloomError, torch.OutOfMemoryError, MemoryError) as error:
            self.refusal = refusal_of(error, self._note)

    def ready(self) -> Ready:
        """Return what the server is told of this site."""
        recall = self._recall
        return Ready(
            run=self.sheet.run,
            sheet=self._sheet_sha256,
            rows=self._rows_told,
            held_out_rows=0 if self._held_out is None else policy.told_rows(self.site.policy, len(self._held_out)),
            kept_version=recall.kept.version,
            last_round=recall.round,
            last_version=recall.last.version,
            refusal=self.refusal,
        )

    @property
    def num_rows(self) -> int:
        """Rows that the site trains on, for its owner alone."""
        return len(self._rows)

    def answer(self, task: Task, take: Take) -> tuple[Result, Buffers]:
        """Train, or send the last answer again where this task is the one it answered; what is summed stays here."""
        begun, self._is_stored = time.perf_counter(), False
        self._recall = self._recall.settled(task.counted)
        head = Result(run=task.run, round=task.round, task=task.task, epsilon=self._epsilon())
        if task.task == self._recall.task and self.refusal is None:
            kept = self._store.answer(task.task)
            if kept is not None:
                return head.model_copy(update={"again": True}), [kept] if self._sums is None else []
        try:
            if self.refusal is not None:
                raise RefusedError(self.refusal)
            answer = self._trained(task, take)
        except (FedloomError, _SupersededError, torch.OutOfMemoryError, MemoryError) as error:
            return head.model_copy(update={"refusal": refusal_of(error, self._note)}), []
        told = {"seconds": time.perf_counter() - begun, "epsilon": self._epsilon()}
        return head.model_copy(update=told), answer if self._sums is None else []

    def summed(self, asked: SumAsked, take: Take) -> tuple[SumAnswered, bytes]:
        """Answer a message of a masked sum of what the last task came to."""
        if self._sums is None:
            place = asked.model_dump(include=set(SumAnswered.model_fields) - {"kind", "refusal"})
            return SumAnswered(**place, refusal=self.refusal or Refusal(code="sum")), b""
        return self._sums.answer(asked, bytes(take()))

    def _epsilon(self) -> float | None:
        """Return what the study has cost the site's rows, where it hides them."""
        return None if self._books is None else self._books.of_study

    def stored(self) -> tuple[int, int] | None:
        """Return the open file in which the last answer lies, and from where on; None where it was not written now."""
        return self._store.opened() if self._is_stored else None

    def score(self, asked: Score, take: Take) -> Scored:
        """Score an adapter on the site's held-out rows: two sums and a count cross."""
        head = Scored(run=asked.run, round=asked.round)
        try:
            if self.refusal is not None or not self.sheet.scores or self._held_out is None:
                raise RefusedError(self.refusal or Refusal(code="held-out"))
            body = take()
            assert isinstance(body, memoryview)  # it is no message of the rounds
            adapter = Adapter.from_tensors(read_tensors(body))
            del body
            check_covers(adapter, self._lora.shapes)
            losses = row_losses_of(self._lora, adapter, self._held_out, token_budget=self.sheet.batch_tokens)
        except (FedloomError, torch.OutOfMemoryError, MemoryError) as error:
            return head.model_copy(update={"refusal": refusal_of(error, self._note)})
        sums = {"sum_nats": float(losses.sum_nats.sum()), "num_loss_tokens": int(losses.num_loss_tokens.sum())}
        rows = policy.told_rows(self.site.policy, len(self._held_out))
        return head.model_copy(update={**sums, "num_rows": rows})

    def _open(self) -> None:
        sheet, own = self.sheet, self.site.policy
        check_allowed(self.site, sheet, self._sheet_sha256)
        base = load_site_base(self.site)
        if (refusal := policy.of_base(sheet, base.revision_hash, fingerprint(base.tokenizer))) is not None:
            raise RefusedError(refusal)
        choose_attention(base.model, sheet.attention)
        self._lora = lora_of(base.model, sheet.target_modules)
        self._lora.check_rank(sheet.rank)
        output_head(self._lora.model)
        rows = encoded_rows(self.site, sheet, base.tokenizer, base.model.config)
        self._rows, self._held_out = divided(rows, self.site.data.eval_fraction, sheet.seed)
        longest = int(rows.tokens.lengths.max())
        if (refusal := policy.of_inputs(own, sheet, len(self._rows), longest)) is not None:
            raise RefusedError(refusal)
        self._rows_told = policy.told_rows(own, len(self._rows))
        self._books = SiteBooks.of(self.site, sheet, self._rows)
        self._half = sheet.half(dict(self._lora.shapes))
        self._store = Store(self.site.folder, sheet.run)
        self._recall = self._store.read()
        self._sides = HeldSides(self._recall.version, self._recall.side)
        if sheet.sum is not None:
            check_masks()
            shapes = dict(self._lora.shapes)
            self._sums = SiteSums(self.site, sheet, shapes, self._rows_told, self._kept_of, self._note)

    def _kept_of(self, task: str, round: int) -> bytes | None:
        """Return the stored answer to a task, where it is the one of this round."""
        return self._store.answer(task) if self._recall.round == round else None

    def _trained(self, task: Task, take: Take) -> Buffers:
        sheet = self.sheet
        received = decode_broadcast(take(), self._lora.shapes)
        check_asked(received, sheet, task.round)
        client = Client(
            sheet.client, self._half, self._lora.shapes, sheet.seed, lambda: self._rows, self._sides, self._recall.kept
        )
        assignment = client.prepare(received)
        if self._books is not None and (refusal := self._books.book(task.round)) is not None:
            raise RefusedError(refusal)
        result = self._train(assignment, task.round)
        stats = replace(result.stats, num_rows=self._rows_told)
        outcome, tensors = client.conclude(assignment, replace(result, stats=stats), sheet.wire)
        if isinstance(outcome, Failure):
            raise RefusedError(Refusal(code="diverged"), outcome.reason)
        try:
            dtype = answer_dtype(assignment.work, sheet.wire)
            sums = self._sums
            answer = update_buffers(outcome, tensors, dtype) if sums is None else sums.kept(outcome, assignment)
        except UpdateError as error:
            raise RefusedError(Refusal(code="unusable"), str(error)) from error
        recall = Recall(
            version=client.memory.version,
            side=assignment.side,
            kept=self._recall.kept,
            last=client.memory,
            round=task.round,
            task=task.task,
        )
        self._store.write(recall, answer)
        self._recall, self._is_stored = recall, True
        return answer

    def _train(self, assignment: Assignment, round: int) -> ClientResult:
        def stop_between_steps(_: StepReport) -> None:
            if self._newest() > round:
                raise _SupersededError

        self._lora.set_side(assignment.side)
        training, seed = self.sheet.local_training, self.sheet.seed
        told = {"seed": seed, "round": round, "on_step": stop_between_steps}
        (result,) = train_cohort(self._lora, [assignment.task], training, **told, draws=SystemDraws)  # type: ignore[arg-type]
        return result


def refusal_of(error: BaseException, note: Note) -> Refusal:
    """Write down at the site why it does not do what it is asked, and return what may cross of it."""
    if isinstance(error, RefusedError):
        note(str(error))
        return error.refusal
    refusal = Refusal(code=_code_of(error))
    note(f"{refusal.code}: {str(error) or policy.in_words(refusal)}")
    return refusal


def check_allowed(site: SiteSettings, sheet: Sheet, sheet_sha256: str) -> None:
    """Refuse what the site's policy does not allow, or nobody has agreed to, before anything is loaded.

    Raises:
        RefusedError: saying which line.
    """
    if (refusal := policy.of_sheet(site.policy, sheet)) is not None:
        raise RefusedError(refusal)
    if site.policy.confirm != "never" and not confirmation(site.folder, sheet_sha256).exists():
        raise RefusedError(Refusal(code=policy.UNCONFIRMED))


def check_asked(received: Received, sheet: Sheet, round: int) -> None:
    """Refuse a broadcast that is not this round's and this site's.

    Raises:
        UpdateError: naming what differs.
    """
    for what in ("round", "client", "rank", "scale"):
        found = getattr(received, what)
        expected = {"round": round, "rank": sheet.rank_asked(round)}.get(what) or getattr(sheet, what)
        if found != expected:
            raise UpdateError(f"expected a task for {what} {expected}, as the sheet says, got {found}; send that")


def _code_of(error: Any) -> str:
    match error:
        case _SupersededError():
            return policy.SUPERSEDED
        case BehindError():
            return policy.BEHIND
        case UpdateError():
            return "message"
        case MethodError():
            return "method-missing"
        case MissingExtraError():
            return "extra"
        case DataError():
            return "data"
        case RunError():
            return policy.DISK
        case FedloomError():
            return "model"
        case _:
            return "memory"
