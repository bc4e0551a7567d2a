"""A site's own commands: take part, or look whether it could."""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from typing import Any

from fedloom.data.tokenizer import fingerprint
from fedloom.errors import RunError, UpdateError
from fedloom.federation.buffers import room_for
from fedloom.run_folder import claim, durable
from fedloom.sites import policy
from fedloom.sites.flare_link import FlareSiteLink
from fedloom.sites.frames import FORMAT, MAX_HEAD_BYTES, TO_SITE, Hello, SheetSent, frame, unframe
from fedloom.sites.grpc_link import GrpcSiteLink
from fedloom.sites.handover import SharedRoom
from fedloom.sites.kit import Kit, read_kit
from fedloom.sites.kit_check import check_kit, is_flare_kit
from fedloom.sites.link import SERVER, Link
from fedloom.sites.members import read_members, refusal_of, shown
from fedloom.sites.sheet import read_sheet
from fedloom.sites.site_inputs import find_site_base
from fedloom.sites.site_settings import SiteSettings
from fedloom.sites.site_worker import SiteWorker
from fedloom.sites.split_training import opened_run
from fedloom.sites.trainer import TrainerProcess

_SECONDS_FOR_A_SHEET = 15.0
_SECONDS_FOR_FLARE = 60.0


def run_site(site: SiteSettings, note: Callable[[str], None]) -> None:
    """Take part until a person ends it: the first ctrl-c leaves after the task in progress, a second one at once.

    Raises:
        RunError: the kit does not fit, the server turns this site away, or the folder is in use.
    """
    kit = _own_kit(site)
    stop, refusals = threading.Event(), list[str]()

    def refused(why: str) -> None:
        refusals.append(why)
        stop.set()

    with _held(site), _left_between_tasks(stop, note):
        room = SharedRoom()
        link = _dialled(site, kit, note, refused, room)
        try:
            note(f"{site.site.name}: dialling {site.site.server}; ctrl-c leaves between tasks")
            worker = SiteWorker(site, link, lambda reply, ended: TrainerProcess(site, reply, ended, room), note)
            worker.run(stop)
        finally:
            link.close()
    if refusals:
        raise _turned_away(refusals[0])


@dataclass(frozen=True)
class SiteCheck:
    """What a look at a site found."""

    name: str
    base_sha256: str
    tokenizer_sha256: str
    study: str | None
    num_rows: int | None
    refusal: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return dict(self.__dict__)

    def lines(self) -> list[str]:
        """Return it for people."""
        lines = [f"site {self.name}: kit and certificate fit"]
        lines += [f"base sha256:{self.base_sha256}", f"tokenizer sha256:{self.tokenizer_sha256}"]
        if self.study is None:
            return [*lines, "no study is being served now: rows and policy were not looked at"]
        lines.append(self.study)
        if self.refusal is not None:
            return [*lines, f"the site refuses this study: {self.refusal}"]
        return [*lines, f"{self.num_rows:,} rows are usable; the site would take part"]


def check_site(site: SiteSettings, note: Callable[[str], None]) -> SiteCheck:
    """Look at kit, base, and, where a study is being served, at rows and policy; train nothing.

    Raises:
        FedloomError: the kit does not fit, the base cannot be loaded, or the server turns this site away.
    """
    kit = _own_kit(site)
    with _held(site):
        base = find_site_base(site)
        found = (site.site.name, base.revision_hash, fingerprint(base.tokenizer))
        sent = _sheet_now(site, kit, note)
        if sent is None:
            return SiteCheck(*found, None, None, None)
        head, body = sent
        sheet = read_sheet(body, head.run)
        known, own_name = read_members(site.folder, head.run), site.site.name
        members = refusal_of(head.members, known, own_name, sheet.client, lambda: kit.root)
        asked = sheet.line if head.members is None else f"{sheet.line}; {shown(head.members)}"
        if members is not None:
            return SiteCheck(*found, asked, None, policy.in_words(members))
        own = site.policy.model_copy(update={"confirm": "never"})
        agreed = site.model_copy(update={"policy": own})
        training = opened_run(agreed, sheet, sha256(body).hexdigest(), lambda: 0, note)
        refusal = None if training.refusal is None else policy.in_words(training.refusal)
        return SiteCheck(*found, asked, training.num_rows, refusal)


def _sheet_now(site: SiteSettings, kit: Kit, note: Callable[[str], None]) -> tuple[SheetSent, bytes] | None:
    refusals: list[str] = []
    link = _dialled(site, kit, note, refusals.append)
    hello = Hello(format=FORMAT, fedloom=version("fedloom"), torch=version("torch"), state="loading")
    is_flare = is_flare_kit(site.site.kit, "client")
    until = time.monotonic() + (_SECONDS_FOR_FLARE if is_flare else _SECONDS_FOR_A_SHEET)
    try:
        while time.monotonic() < until and not refusals:
            link.send(SERVER, frame(hello))
            try:
                _, data = link.inbox.get(timeout=1.0)
                head, body = unframe(data, TO_SITE, site.policy.max_message_mib << 20)
            except (queue.Empty, UpdateError):
                continue
            if isinstance(head, SheetSent):
                return head, bytes(body)
    finally:
        link.close()
    if refusals:
        raise _turned_away(refusals[0])
    return None


def _turned_away(why: str) -> RunError:
    return RunError(f"{why}; ask the coordinator to add the site, or install the kit of this project")


def _dialled(
    site: SiteSettings,
    kit: Kit,
    note: Callable[[str], None],
    refused: Callable[[str], None],
    room: Callable[[int], memoryview] = room_for,
) -> Link:
    """Dial over what the kit is made for: FLARE, or with certificates alone gRPC, which puts frames into ``room``."""
    largest = MAX_HEAD_BYTES + (site.policy.max_message_mib << 20)
    if is_flare_kit(site.site.kit, "client"):
        return FlareSiteLink(check_kit(site.site.kit, "client"), largest, note, refused)
    return GrpcSiteLink(site.site.server, kit, largest, note, refused, room)


def _own_kit(site: SiteSettings) -> Kit:
    kit = read_kit(site.site.kit, "client")
    if kit.name != site.site.name:
        raise RunError(
            f"{site.site.kit}: expected a certificate of {site.site.name} (site.name), got one of {kit.name}; correct "
            "site.name, or install the site's own kit"
        )
    if is_flare_kit(site.site.kit, "client"):
        address = check_kit(site.site.kit, "client").address
        if address != site.site.server:
            raise RunError(
                f"site.server: expected the address of the kit in {site.site.kit}, {address}, got {site.site.server}; "
                "correct it"
            )
    return kit


@contextmanager
def _held(site: SiteSettings) -> Iterator[None]:
    """Hold the site's folder for this process."""
    with durable.explained(site.site.folder, "choose another folder (site.folder)"):
        site.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = claim.lock(site.folder)
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _left_between_tasks(stop: threading.Event, note: Callable[[str], None]) -> Iterator[None]:
    """Let ctrl-c, and a service that is stopped, end the site after the task in progress; again: at once."""

    def leave(_number: int, _frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        note("leaving after the task in progress; once more: at once")
        stop.set()

    former = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def shown_entry(entry: Any) -> str:
    """Return a line of the ledger for people."""
    known = ("time", "event", "run", "round")
    head = [str(entry.get("time", "")), str(entry.get("event", "")), str(entry.get("run", ""))[:8]]
    if "round" in entry:
        head.append(f"round {entry['round']}")
    rest = [f"{key} {json.dumps(value)}" for key, value in entry.items() if key not in known]
    return "  ".join([*head, ", ".join(rest)])
