"""What a site makes of a version of a study: the signature, the order of versions, and a person's yes again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from memory_link import Hub

from fedloom.errors import RunError
from fedloom.sites import policy
from fedloom.sites.frame_parts import Members, Refusal
from fedloom.sites.frames import FORMAT, TO_SERVER, Ready, SheetSent, frame, unframe
from fedloom.sites.link import SERVER
from fedloom.sites.members import ROOT_KEY, is_signed, read_members, refusal_of, with_signature
from fedloom.sites.sheet import Sheet, sheet_of
from fedloom.sites.site_settings import resolve_site
from fedloom.sites.site_worker import SiteWorker
from fedloom.sites.store import Ledger, confirm, confirmation, unconfirmed
from fedloom.sites.study import resolve_study
from fedloom.sites.throwaway_certificates import ThrowawayRoot

pytestmark = pytest.mark.extra("sites")
RUN, SHA, NAMES = "0" * 32, "ab" * 32, ("berlin", "oslo")
Make = Callable[..., Members]


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """Return the folder of a root's key, whose certificate is in the kit of berlin."""
    from cryptography.hazmat.primitives import serialization

    root, folder = ThrowawayRoot(), tmp_path / "ca"
    root.write(tmp_path / "kit", "client", "berlin")
    folder.mkdir()
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / ROOT_KEY).write_bytes(root._key.private_bytes(*form))
    return folder


@pytest.fixture
def signed(authority: Path) -> Make:
    """Return a function that makes a signed version."""

    def make(version: int, names: Iterable[str] = NAMES, withdrawn: Iterable[str] = ()) -> Members:
        members = Members(version=version, names=tuple(names), withdrawn=tuple(withdrawn), settings_sha256=SHA)
        return with_signature(members, authority)

    return make


@pytest.fixture
def root_pem(tmp_path: Path, authority: Path) -> bytes:
    assert authority.is_dir()
    return (tmp_path / "kit" / "rootCA.pem").read_bytes()


CHANGES: tuple[dict[str, Any], ...] = (
    {"version": 3},
    {"names": (*NAMES, "rome")},
    {"withdrawn": ("oslo",)},
    {"settings_sha256": "cd" * 32},
    {"signature": ""},
    {"signature": "00" * 70},
)


def test_a_signature_is_of_every_part_of_a_version(signed: Make, root_pem: bytes) -> None:
    members = signed(2)
    assert is_signed(members, root_pem)
    assert not [change for change in CHANGES if is_signed(members.model_copy(update=change), root_pem)]


def test_another_projects_root_signs_nothing_here(signed: Make, tmp_path: Path) -> None:
    ThrowawayRoot().write(tmp_path / "other", "client", "berlin")
    assert not is_signed(signed(2), (tmp_path / "other" / "rootCA.pem").read_bytes())


@pytest.mark.parametrize(("what", "told"), [(None, "no such file"), (b"no key", "no such key")])
def test_a_folder_without_the_roots_key_is_one_line(what: bytes | None, told: str, tmp_path: Path) -> None:
    if what is not None:
        (tmp_path / ROOT_KEY).write_bytes(what)
    members = Members(version=2, names=NAMES, settings_sha256=SHA)
    with pytest.raises(RunError, match=rf"rootCA.key: expected the key .* {told}.*; name the certificate authority"):
        with_signature(members, tmp_path)


def code(found: Refusal | None) -> str | None:
    assert found is None or "it refuses" not in policy.in_words(found), "every code has its words"
    return None if found is None else found.code


def test_a_site_takes_versions_that_go_on_and_are_signed_and_no_others(signed: Make, root_pem: bytes) -> None:
    unsigned = signed(1).model_copy(update={"signature": ""})

    def found(asked: Members | None, known: Members | None, name: str = "berlin", client: int = 0) -> str | None:
        return code(refusal_of(asked, known, name, client, lambda: root_pem))

    three = (*NAMES, "rome")
    assert found(None, None) is None, "a server that says nothing of versions"
    assert found(unsigned, None) is None, "the first version is what a site agrees to"
    assert found(signed(2, three), unsigned) is None
    assert found(signed(3, three, ["oslo"]), signed(2, three)) is None
    assert found(signed(4, three), signed(3, three, ["oslo"])) is None, "and back again"
    assert found(signed(2, three), None, "rome", 2) is None, "it joins by that version"
    assert found(signed(2).model_copy(update={"signature": ""}), None) == "members-unsigned"
    assert found(signed(2, three).model_copy(update={"names": NAMES}), unsigned) == "members-unsigned"
    assert found(unsigned, signed(2)) == "members-older"
    assert found(None, signed(2)) == "members-older"
    assert found(signed(2, three), signed(2)) == "members-other", "another list under the same number"
    assert found(signed(3, ("berlin", "rome")), signed(2)) == "members-other", "numbers of sites would change"
    other = with_other_settings(signed(3))
    assert found(other, signed(2)) == "members-other", "a version of another study"
    assert found(signed(2), None, "berlin", 1) == "members-number"
    assert found(signed(2, NAMES, ["berlin"]), None) == "members-number"


def with_other_settings(members: Members) -> Members:
    return members.model_copy(update={"settings_sha256": "cd" * 32})


class SilentTrainer:
    """A trainer that takes everything and answers nothing."""

    def __init__(self, started: list[SilentTrainer]) -> None:
        started.append(self)

    def send(self, data: bytes) -> None:
        """Take it."""

    def close(self) -> None:
        """End."""


class Berlin:
    """A site whose trainers are counted, and what it says to the server."""

    def __init__(self, folder: Path, confirm: str) -> None:
        own = {"name": "berlin", "server": "localhost:1", "kit": str(folder / "kit"), "folder": str(folder / "state")}
        document = {"site": own, "data": {"path": "embedded"}, "policy": {"confirm": confirm}}
        hub, self.folder = Hub(), folder / "state"
        self.server, self.started, self.notes = hub.end(SERVER), list[SilentTrainer](), list[str]()
        self.hub, self.settings = hub, resolve_site(document, "site.toml")
        self.begin()

    def begin(self) -> None:
        link = self.hub.end("berlin")
        self.worker = SiteWorker(
            self.settings, link, lambda reply, ended: SilentTrainer(self.started), self.notes.append
        )

    def asked(self, members: Members | None, seed: int = 1) -> int:
        """Send it the sheet with a version; return how many trainers that started."""
        before = len(self.started)
        body = sheet_body(seed)
        self.worker.take(SERVER, frame(SheetSent(run=RUN, format=FORMAT, members=members), body))
        return len(self.started) - before

    def told(self) -> Ready:
        found = [unframe(self.server.inbox.get_nowait()[1], TO_SERVER, 0)[0] for _ in range(self.server.inbox.qsize())]
        return next(head for head in found if isinstance(head, Ready))


def sheet_body(seed: int = 1) -> bytes:
    document: dict[str, Any] = {
        "sites": {"names": list(NAMES)},
        "federation": {"num_rounds": 2},
        "training": {"local_steps": 2},
        "run": {"seed": seed},
    }
    sheet: Sheet = sheet_of(resolve_study(document, "study.toml").settings, 0, RUN, SHA, SHA, scores=False)
    return sheet.model_dump_json().encode()


def test_a_person_agrees_again_where_a_site_joins_and_not_where_one_withdraws(signed: Make, tmp_path: Path) -> None:
    site, sheet, three = Berlin(tmp_path, "first"), sha256(sheet_body()).hexdigest(), (*NAMES, "rome")
    first = signed(1)
    assert site.asked(first) == 1
    confirm(site.folder, sheet)
    assert site.asked(first) == 0, "the same again"
    assert site.asked(signed(2, NAMES, ["oslo"])) == 0
    assert confirmation(site.folder, sheet).exists()
    assert site.asked(signed(3, three, ["oslo"])) == 1
    assert [found for found, _ in unconfirmed(site.folder)] == [sheet]
    confirm(site.folder, sheet)
    assert site.asked(signed(4, three)) == 1, "oslo is back: it joins"
    assert not confirmation(site.folder, sheet).exists()
    entries = [(entry["version"], entry["joined"]) for entry in Ledger(site.folder).entries() if "version" in entry]
    assert entries == [(1, []), (2, []), (3, ["rome"]), (4, ["oslo"])]
    assert any("version 3 of the study: berlin, rome; withdrawn: oslo" in note for note in site.notes)


def test_always_asks_each_time_that_a_run_is_taken_up_and_never_asks_nobody(signed: Make, tmp_path: Path) -> None:
    site, sheet = Berlin(tmp_path, "always"), sha256(sheet_body()).hexdigest()
    site.asked(signed(1))
    confirm(site.folder, sheet)
    assert site.asked(signed(1)) == 0
    assert confirmation(site.folder, sheet).exists(), "within one session a yes stands"
    site.begin()  # the program ends and starts
    assert site.asked(signed(1)) == 1
    assert not confirmation(site.folder, sheet).exists()


def test_a_version_that_is_refused_is_told_once_and_the_site_keeps_what_it_knew(signed: Make, tmp_path: Path) -> None:
    site = Berlin(tmp_path, "never")
    old = signed(1)
    site.asked(signed(2))
    assert site.asked(old) == 0
    assert (site.told().refusal, site.worker._trainer) == (
        Refusal(code="members-older", numbers={"seen": 2, "asked": 1}),
        None,
    )
    known = read_members(site.folder, RUN)
    assert known is not None
    assert known.version == 2
    site.asked(old)
    refusals = [entry for entry in Ledger(site.folder).entries() if entry["event"] == "refused"]
    assert [entry["why"] for entry in refusals] == ["it has seen version 2 of the study, and is served version 1"]
    assert site.asked(signed(3)) == 1, "a version that fits is taken"
