"""A site: it greets the server, passes its frames to the process that trains, and sends what comes back.

One thread takes one event after another: frames of the server, frames of the trainer, the trainer's end. Whatever is
lost on the way is asked for again by the server, which a greeting tells what the site is at; so nothing here waits for
an answer. The trainer keeps the last answer on disk and sends it again for the same task.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import version

from fedloom.errors import RunError, UpdateError
from fedloom.federation.blob import Checked
from fedloom.sites import policy
from fedloom.sites.dropped import Dropped
from fedloom.sites.frame_parts import Members, Refusal
from fedloom.sites.frames import (
    FORMAT,
    TO_SERVER,
    TO_SITE,
    End,
    Hello,
    Ready,
    Result,
    Score,
    Scored,
    SheetSent,
    Task,
    frame,
    unframe,
    unframe_here,
)
from fedloom.sites.kit import read_kit
from fedloom.sites.link import CONNECTED, SERVER, Frame, Link, size_of
from fedloom.sites.members import joined, keep_members, read_members, refusal_of, shown
from fedloom.sites.sheet import Sheet, read_sheet
from fedloom.sites.site_ledger import SiteLedger
from fedloom.sites.site_period import SitePeriod
from fedloom.sites.site_settings import SiteSettings
from fedloom.sites.split_frames import Begin, Failed, SplitToServer, SplitToSite, Updates
from fedloom.sites.store import Store, confirmation, keep_asked, unconfirm
from fedloom.sites.sum_frames import SumAnswered, SumAsked
from fedloom.sites.trainer import TrainerHandle

HELLO_SECONDS = 5.0
_TRAINER, _ENDED = "(trainer)", "(trainer ended)"
"""Senders inside the site; a link's names have no brackets, and at a site it names the server alone."""
_DEATHS_WHILE_LOADING = 3

Start = Callable[[Callable[[Frame], None], Callable[[int], None]], TrainerHandle]
"""Starts a trainer, given what takes its frames and what is told its exit code."""


@dataclass
class SiteWorker:
    """A site's part of a link: give it events by :meth:`run`."""

    site: SiteSettings
    link: Link
    start: Start
    note: Callable[[str], None]
    hello_seconds: float = HELLO_SECONDS
    dropped: Dropped = field(default_factory=Dropped)

    def __post_init__(self) -> None:
        self._ledger = SiteLedger(self.site.folder, self.note)
        self._trainer: TrainerHandle | None = None
        self._sheet: tuple[str, SheetSent, Frame] | None = None
        self._ready: Ready | None = None
        self._is_asked, self._scoring, self._deaths = False, False, 0
        self._task: Task | None = None
        self._period: SitePeriod | None = None
        self._sum: SumAsked | None = None
        self._versions = {"fedloom": version("fedloom"), "torch": version("torch")}

    def run(self, stop: threading.Event) -> None:
        """Take part until ``stop`` is set, and then to the end of the task in progress."""
        greeted = -self.hello_seconds
        try:
            while not (stop.is_set() and self._may_leave()):
                if (now := time.monotonic()) - greeted >= self.hello_seconds:
                    greeted = now
                    self._confirm()
                    self.greet()
                try:
                    event = self.link.inbox.get(timeout=min(self.hello_seconds, 0.5))
                except queue.Empty:
                    continue
                self.take(*event)
                del event  # while the next one is waited for, a large frame is not held
        finally:
            if self._trainer is not None:
                self._trainer.close()

    @property
    def _is_at_work(self) -> bool:
        return self._task is not None or self._sum is not None or (self._period is not None and self._period.is_at_work)

    def _may_leave(self) -> bool:
        """Tell whether nothing is under way, or only a period in which the server goes on without this site."""
        is_over = self._period is None or time.monotonic() - self._period.heard > 2 * self.hello_seconds
        return self._task is None and self._sum is None and (is_over or not self._is_at_work)

    def greet(self) -> None:
        """Tell the server what the site is at."""
        state = "waiting"
        if self._sheet is not None:
            at_work = "training" if self._is_at_work else "scoring" if self._scoring else "ready"
            state = "loading" if self._ready is None else at_work
        run = None if self._sheet is None else self._sheet[1].run
        task = None if self._task is None else self._task.task
        period = {} if self._period is None else {"period": self._period.begin.period, "number": self._period.next}
        self._send(Hello(format=FORMAT, run=run, state=state, task=task, **period, **self._versions))  # type: ignore[arg-type]

    def take(self, sender: str, data: Frame | Checked) -> None:
        """Take one event; what is not expected is dropped and counted."""
        if isinstance(data, Checked):
            data = data.message
        if sender == _ENDED:
            assert isinstance(data, bytes)
            self._trainer_ended(int(data))
            return
        if sender == SERVER and data == CONNECTED:
            self.greet()
            return
        try:
            largest = self.site.policy.max_message_mib << 20
            of_trainer = sender == _TRAINER
            head, body = unframe_here(data, TO_SERVER, largest) if of_trainer else unframe(data, TO_SITE, largest)
        except UpdateError as error:
            self.dropped.add(sender, "damaged")
            self.note(f"dropped a message of the server: {error}")
            return
        if of_trainer:
            self._of_trainer(head, data)
        elif sender != SERVER:
            self.dropped.add(sender, "stranger")
        elif isinstance(head, SheetSent):
            self._take_sheet(head, bytes(body))
        elif self._sheet is None or head.run != self._sheet[1].run or self._trainer is None:
            self.dropped.add(sender, "run")
            self.greet()
        elif isinstance(head, End):
            self._end()
        elif isinstance(head, SplitToSite):
            self._take_split(head, data)
        elif isinstance(head, SumAsked):
            self._sum = head
            self._trainer.send(data)
        elif isinstance(head, Score):
            if not self._scoring:
                self._scoring = True
                self._trainer.send(data)
        elif self._task is None or self._task.task != head.task:
            self._task = head
            self._trainer.send(data)

    def _take_split(self, head: SplitToSite, data: Frame) -> None:
        """Pass on what is next in the period under way; of another period nothing is known here."""
        assert self._trainer is not None
        if isinstance(head, Begin) and (self._period is None or self._period.begin.period != head.period):
            self._period = SitePeriod(head)
        if self._period is None or self._period.begin.period != head.period:
            self._send(Failed(run=head.run, period=head.period, number=head.number, refusal=policy.lost()))
            return
        is_next, again = self._period.take(head.number)
        if is_next:
            self._trainer.send(data)
        elif again is not None:
            self.link.send(SERVER, again)

    def _split_answered(self, head: SplitToServer, data: Frame) -> None:
        """Send an answer on, and keep it."""
        if self._period is None or head.period != self._period.begin.period:
            return
        if isinstance(head, Updates):
            entry = self._period.book(head, size_of(data))
            self.note(f"round {self._period.begin.round}: trained in {head.seconds:.1f} s")
            if not self._ledger.enter(event="task", **entry, again=False):
                unbooked = Refusal(code=policy.DISK)
                data = frame(Failed(run=head.run, period=head.period, number=head.number, refusal=unbooked))
        elif isinstance(head, Failed):
            self._period.is_at_work = False
            why, round = policy.in_words(head.refusal), self._period.begin.round
            self._ledger.enter(event="task", run=head.run, round=round, code=head.refusal.code, why=why)
            self.note(f"round {round}: no update: {why}")
        self._period.answered(head.number, data)
        self.link.send(SERVER, data)

    def _take_sheet(self, head: SheetSent, body: bytes) -> None:
        found = sha256(body).hexdigest()
        refusal = policy.of_format(head.format)
        if refusal is not None:
            self._send(Ready(run=head.run, sheet=found, refusal=refusal))
            return
        self._is_asked = True
        if self._sheet is not None and self._sheet[:2] == (found, head):
            self._tell_ready()
            return
        former = self._sheet
        is_same = former is not None and former[0] == found and self._trainer is not None
        try:
            sheet = read_sheet(body, head.run)
            known = read_members(self.site.folder, sheet.run)
            refusal = self._checked_members(sheet, head.members, known)
            if refusal is None and not is_same:
                self.note(sheet.line)
                keep_asked(self.site.folder, found, body)
                self._ledger.introduce(sheet)
            is_asked_anew = self.site.policy.confirm == "always" and not is_same
            if refusal is None and (is_asked_anew or joined(head.members, known)):
                unconfirm(self.site.folder, found)
                is_same = False
        except (UpdateError, RunError) as error:
            self.note(str(error))
            code = "sheet" if isinstance(error, UpdateError) else policy.DISK
            self._send(Ready(run=head.run, sheet=found, refusal=Refusal(code=code)))
            return
        self._sheet, self._deaths = (found, head, frame(head, body)), 0
        if refusal is not None:
            self._close_trainer()
            self._take_ready(Ready(run=head.run, sheet=found, refusal=refusal))
        elif is_same:
            self._tell_ready()
        else:
            self._restart()

    def _checked_members(self, sheet: Sheet, asked: Members | None, known: Members | None) -> Refusal | None:
        """Return why the site does not take this version of the study; keep one that it takes."""
        own = self.site.site
        refusal = refusal_of(asked, known, own.name, sheet.client, lambda: read_kit(own.kit, "client").root)
        if refusal is None and asked is not None and asked != known:
            keep_members(self.site.folder, sheet.run, asked)
            self.note(shown(asked))
            changed = {"joined": list(joined(asked, known)), "withdrawn": list(asked.withdrawn)}
            self._ledger.add(event="members", run=sheet.run, version=asked.version, **changed)
        return refusal

    def _restart(self) -> None:
        """Start a trainer for the sheet; another run's gives its memory back."""
        self._close_trainer()
        inbox = self.link.inbox
        self._trainer = self.start(
            lambda data: inbox.put((_TRAINER, data)), lambda code: inbox.put((_ENDED, str(code).encode()))
        )
        assert self._sheet is not None
        self._trainer.send(self._sheet[2])

    def _close_trainer(self) -> None:
        if self._trainer is not None:
            self._trainer.close()
        self._trainer, self._ready, self._task, self._period, self._scoring = None, None, None, None, False
        self._sum = None

    def _of_trainer(self, head: object, data: Frame) -> None:
        if self._sheet is None or getattr(head, "run", None) != self._sheet[1].run:
            return
        if isinstance(head, Ready):
            self._take_ready(head)
        elif isinstance(head, Result):
            if self._task is not None and head.task == self._task.task:
                self._task = None
            unbooked = {"refusal": head.refusal or Refusal(code=policy.DISK), "again": False}
            is_booked = self._ledger.book(head, size_of(data))
            self.link.send(SERVER, data if is_booked else frame(head.model_copy(update=unbooked)))
        elif isinstance(head, SumAnswered):
            self._sum_answered(head, data)
        elif isinstance(head, SplitToServer):
            self._split_answered(head, data)
        elif isinstance(head, Scored):
            self._scoring = False
            self.link.send(SERVER, data)

    def _sum_answered(self, head: SumAnswered, data: Frame) -> None:
        """Send an answer on; masked numbers leave only once that is written down."""
        self._sum = None
        if not self._ledger.summed(head, size_of(data)):
            place = {"refusal": head.refusal or Refusal(code=policy.DISK)}
            data = frame(head.model_copy(update=place))
        self.link.send(SERVER, data)

    def _take_ready(self, head: Ready) -> None:
        self._deaths, is_news = 0, self._ready is None
        self._ready = head
        if is_news and head.refusal is not None:
            words = policy.in_words(head.refusal)
            self._ledger.enter(event="refused", run=head.run, code=head.refusal.code, why=words)
            self.note(f"run {head.run} is refused: {words}")
        self._tell_ready()

    def _tell_ready(self) -> None:
        if self._is_asked and self._ready is not None:
            self._is_asked = False
            self._send(self._ready)

    def _trainer_ended(self, code: int) -> None:
        """Tell the server at once, and start another."""
        refusal, task = Refusal(code=policy.ENDED, numbers={"code": code}), self._task
        if self._sheet is None:
            return
        if (period := self._period) is not None and period.is_at_work:
            number = max(0, period.next - 1)
            failed = Failed(run=period.begin.run, period=period.begin.period, number=number, refusal=refusal)
            self._split_answered(failed, frame(failed))
        elif task is not None:
            answer = Result(run=task.run, round=task.round, task=task.task, refusal=refusal)
            self._ledger.book(answer, 0)
            self._send(answer)
        elif (asked := self._sum) is not None:
            place = asked.model_dump(include=set(SumAnswered.model_fields) - {"kind", "refusal"})
            gone = SumAnswered(**place, refusal=refusal)
            self._sum_answered(gone, frame(gone))
        elif self._ready is None:
            self._deaths += 1
            if self._deaths >= _DEATHS_WHILE_LOADING:
                self._take_ready(Ready(run=self._sheet[1].run, sheet=self._sheet[0], refusal=refusal))
                return
        self._restart()

    def _confirm(self) -> None:
        """Load a run to which a person has agreed meanwhile, or for which there is room now."""
        if self._ready is None or self._ready.refusal is None or self._sheet is None:
            return
        code, folder = self._ready.refusal.code, self.site.folder
        is_agreed = code == policy.UNCONFIRMED and confirmation(folder, self._sheet[0]).exists()
        if is_agreed or (code == policy.DISK and Store.has_room(folder, self._sheet[1].run)):
            self._is_asked = True
            self._restart()

    def _end(self) -> None:
        assert self._sheet is not None
        self.note(f"run {self._sheet[1].run} is complete")
        self._ledger.enter(event="complete", run=self._sheet[1].run)
        self._close_trainer()
        self._sheet = None

    def _send(self, head: Hello | Ready | Result | Failed) -> None:
        self.link.send(SERVER, frame(head))
