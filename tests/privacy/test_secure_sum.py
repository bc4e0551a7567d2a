"""A masked sum is the plain one, bit for bit, whoever leaves at whichever message, and an upload shows nothing."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from fedloom.errors import TooFewClientsError, UpdateError
from fedloom.privacy.secure_sum import keys, member, server, wire
from fedloom.privacy.secure_sum.fixed_point import Ring, from_ring, largest, to_ring
from fedloom.privacy.secure_sum.identities import Identity, local_identities
from fedloom.privacy.secure_sum.keys import Entropy
from fedloom.privacy.secure_sum.masks import mask
from fedloom.privacy.secure_sum.shares import PRIME, secret_of, shares_of
from fedloom.privacy.secure_sum.steps import Answers, Member, Step, secure_sum
from fedloom.privacy.secure_sum.wire import Session, context_of
from fedloom.seeding import stream

pytestmark = pytest.mark.extra("privacy")

LENGTH = 6
STEPS = tuple(Step)


def entropy_of(seed: int) -> Entropy:
    """Return bytes that repeat, in place of the operating system's: one stream for two keys, another for shares."""
    keys, others, calls = stream(seed, "entropy"), stream(100 + seed, "entropy"), itertools.count()
    return lambda size: (keys if next(calls) < 2 else others).bytes(size)


def session_of(num_members: int, threshold: int, length: int = LENGTH) -> Session:
    return Session(context_of("a test", 1), tuple(range(3, 3 + num_members)), threshold, length)


def numbers_of(session: Session) -> dict[int, NDArray[np.float64]]:
    return {k: stream(k, "numbers").normal(size=session.length) * 10.0 for k in session.members}


def no_change(_step: str, _sender: int, message: bytes) -> bytes:
    return message


def signature_of(member: int, text: bytes) -> bytes:
    """Return bytes that stand for a signature, and repeat."""
    return hashlib.sha256(b"a member's own %d " % member + text).digest()


def identity_of(member: int) -> Identity:
    return Identity(
        lambda text: signature_of(member, text), lambda other, text, given: given == signature_of(other, text)
    )


@dataclass
class Sum:
    """A whole sum; ``leaves`` says before which message a member leaves, ``seen`` keeps what the server was sent."""

    session: Session
    leaves: Mapping[int, str] = field(default_factory=dict)
    change: Callable[[str, int, bytes], bytes] = no_change
    seen: dict[str, dict[int, bytes]] = field(default_factory=dict)
    sent: dict[str, dict[int, bytes]] = field(default_factory=dict)
    members: dict[int, Member] = field(default_factory=dict)

    def run(self) -> tuple[tuple[int, ...], Ring]:
        session, numbers = self.session, numbers_of(self.session)
        for k in session.members:
            words = to_ring(numbers[k], len(session.members))
            self.members[k] = Member(session, k, identity_of(k), lambda words=words: words, entropy=entropy_of(k))  # type: ignore[misc]
        opened = secure_sum(session, session.members, self._ask, identity_of(0).verify)
        return opened.members, opened.words

    def _ask(self, step: Step, messages: Mapping[int, bytes]) -> Answers:
        self.sent[step] = dict(messages)
        kept, left = self.seen.setdefault(step, {}), dict[int, str]()
        for k, message in messages.items():
            leaves = self.leaves.get(k)
            if leaves is not None and STEPS.index(step) >= STEPS.index(Step(leaves)):
                continue
            try:
                kept[k] = self.change(step, k, self.members[k].answer(step, message))
            except UpdateError as error:
                left[k] = str(error)
        return Answers(kept, left)


def plain(session: Session, members: tuple[int, ...]) -> Ring:
    numbers = numbers_of(session)
    return sum((to_ring(numbers[k], len(session.members)) for k in members), np.zeros(session.length, np.uint64))


def check(session: Session, leaves: Mapping[int, str]) -> None:
    members, words = Sum(session, leaves).run()
    assert members == tuple(k for k in session.members if leaves.get(k, "told") in ("agreed", "told"))
    assert np.array_equal(words, plain(session, members)), leaves
    exact = sum((numbers_of(session)[k] for k in members), np.zeros(session.length))
    assert np.abs(from_ring(words) - exact).max() <= len(members) * 2.0**-41 + 1e-13


def test_the_sum_is_the_plain_one_with_everybody_and_without_any_one_from_any_message_on() -> None:
    session = session_of(4, 3)
    check(session, {})
    for step, leaver in itertools.product(STEPS, session.members):
        check(session, {leaver: step})


def test_the_sum_is_the_plain_one_without_any_two_of_seven_from_any_messages_on() -> None:
    session = session_of(7, 5)
    for turn, steps in enumerate(itertools.product(STEPS, STEPS)):
        pair = stream(turn, "pair").choice(7, 2, replace=False)
        check(session, {session.members[int(k)]: step for k, step in zip(pair, steps, strict=True)})


@pytest.mark.parametrize("step", STEPS)
def test_one_more_than_may_leave_ends_the_sum_with_nothing_known(step: str) -> None:
    session = session_of(4, 3)
    with pytest.raises(TooFewClientsError, match=r"expected at least 3 of 4 clients \(privacy.threshold\), got 2"):
        Sum(session, {3: step, 5: step}).run()


def test_a_single_upload_looks_uniform_and_an_unmasked_one_does_not() -> None:
    session = session_of(4, 3, length=8192)
    whole = Sum(session)
    whole.run()
    uploads = [wire.masked_read(whole.seen["masked"][k], session, k) for k in session.members]

    def chi_square(words: Ring) -> float:
        counts = np.bincount(words.view(np.uint8), minlength=256)
        return float(((counts - counts.mean()) ** 2 / counts.mean()).sum())

    for words in (*uploads, uploads[0] - uploads[1], uploads[0] + uploads[1] + uploads[2]):
        assert 170.0 < chi_square(words) < 360.0  # of 255 degrees of freedom: beyond by chance once in 10⁵
    assert chi_square(to_ring(numbers_of(session)[3], 4)) > 1e4
    assert chi_square(np.asarray(sum(uploads), np.uint64) - plain(session, session.members)) > 100.0


def test_whatever_lists_a_server_shows_members_tell_for_one_list_of_enough_or_for_none() -> None:
    session = session_of(4, 3)
    whole = Sum(session)
    whole.run()
    masked = at_masked(whole)
    lists = [m for n in (3, 4) for m in itertools.combinations(session.members, n)]
    signed = {}
    for k, chosen in itertools.product(session.members, lists):
        if k in chosen:
            knows, message = member.agreed(masked[k], wire.survivors_written(session, chosen), identity_of(k).sign)
            signed[k, chosen] = knows, wire.agreement_read(message, session, k)
    opened = 0
    for given in itertools.product(lists, repeat=4):
        shown = {k: chosen for k, chosen in zip(session.members, given, strict=True) if k in chosen}
        told = set()
        if len(shown) >= session.threshold:
            all_signatures = wire.agreements_written(session, {k: signed[k, chosen][1] for k, chosen in shown.items()})
            for k, chosen in shown.items():
                try:
                    member.told(signed[k, chosen][0], all_signatures, identity_of(k).verify)
                except UpdateError:
                    continue
                told.add(chosen)
        enough = {chosen for chosen in lists if list(shown.values()).count(chosen) >= session.threshold}
        assert told == enough
        assert len(told) <= 1
        opened += len(told)
    assert opened > 0
    for bad in [(3, 4), (3, 4, 9), (4, 5, 6)]:
        with pytest.raises(UpdateError, match="survivors"):
            member.agreed(masked[3], wire.survivors_written(session, bad), identity_of(3).sign)


def at_masked(whole: Sum) -> dict[int, member.Masked]:
    """Return what members know after the third message, from what a whole sum sent them."""
    session, found = whole.session, {}
    for k in session.members:
        entropy = entropy_of(k)
        begun, _ = member.begin(session, k, identity_of(k).sign, entropy=entropy)
        shared, _ = member.shared(begun, whole.sent["shares"][k], identity_of(k).verify, entropy=entropy)
        found[k], _ = member.masked(shared, whole.sent["masked"][k], np.zeros(LENGTH, np.uint64))
    return found


def test_a_member_answers_each_step_once_and_in_order_and_its_last_answer_again() -> None:
    session = session_of(4, 3)
    whole = Sum(session, {6: "masked"})
    whole.run()
    told = whole.sent["told"][3]
    assert whole.members[3].answer(Step.TOLD, told) == whole.seen["told"][3]
    for step in STEPS:
        with pytest.raises(UpdateError, match="expected a message of step none"):
            whole.members[3].answer(step, told + b"other")
    with pytest.raises(UpdateError, match="expected a message of step masked, got one of agreed"):
        whole.members[6].answer(Step.AGREED, whole.sent["agreed"][3])
    fresh = Member(session, 3, identity_of(3), lambda: np.zeros(LENGTH, np.uint64), entropy=entropy_of(3))
    first = fresh.answer(Step.KEYS, b"")
    assert fresh.answer(Step.KEYS, b"") == first
    with pytest.raises(UpdateError, match="roster"):
        fresh.answer(Step.SHARES, b"nonsense")
    with pytest.raises(UpdateError, match="expected a message of step none"):  # who refuses once is out
        fresh.answer(Step.SHARES, whole.sent["shares"][3])


def test_what_a_member_promised_is_asked_before_it_signs_a_list() -> None:
    session, lists = session_of(4, 3), list[tuple[int, ...]]()

    def refuse(members: tuple[int, ...]) -> None:
        lists.append(members)
        raise UpdateError("another list was signed before")

    whole, made = Sum(session), Member.__init__

    def with_promise(self: Member, session: Session, number: int, *args: object, **more: object) -> None:
        made(self, session, number, *args, **more, **({"promise": refuse} if number == 4 else {}))  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Member, "__init__", with_promise)
        members, words = whole.run()
    assert members == session.members  # its numbers are in; it helps to open nothing
    assert 4 not in whole.sent["told"]
    assert lists == [session.members]
    assert np.array_equal(words, plain(session, members))


@pytest.mark.parametrize("step", STEPS)
def test_a_message_that_was_changed_anywhere_counts_as_none_or_ends_the_sum(step: str) -> None:
    session = session_of(4, 3)
    whole = Sum(session)
    whole.run()
    length = len(whole.seen[step][4])
    for place in sorted({0, 4, 5, 37, 41, 45, length // 2, length - 1}):

        def change(at: str, sender: int, message: bytes, place: int = place) -> bytes:
            is_meant = (at, sender) == (step, 4)
            return bytes(byte ^ (is_meant and n == place) for n, byte in enumerate(message))

        try:
            members, words = Sum(session, change=change).run()
        except UpdateError:
            continue
        if step == "masked" and place >= 41:  # one who sends other numbers under its masks may do so
            assert not np.array_equal(words, plain(session, members))
        else:
            assert np.array_equal(words, plain(session, members))
    for broken in (b"", whole.seen[step][4][:-1], whole.seen[step][4] + b"\0", whole.seen[step][5]):
        members, words = Sum(session, change=lambda at, k, m, b=broken: b if (at, k) == (step, 4) else m).run()
        assert (4 in members) is (step in ("agreed", "told"))
        assert np.array_equal(words, plain(session, members))


def test_one_member_that_tells_wrong_shares_is_left_out_where_two_more_than_the_threshold_tell() -> None:
    session = session_of(7, 5)
    for liar, leaver in itertools.permutations(session.members[:3], 2):

        def lie(step: str, sender: int, message: bytes, liar: int = liar) -> bytes:
            return message[:-1] + bytes([message[-1] ^ 1]) if (step, sender) == ("told", liar) else message

        members, words = Sum(session, change=lie).run()
        assert members == session.members
        assert np.array_equal(words, plain(session, members))
        with pytest.raises(UpdateError, match=r"a member sent a wrong one|expected shares of the key"):
            Sum(session, {leaver: "masked"}, change=lie).run()


def test_keys_that_the_server_changed_are_found_by_the_members_signatures() -> None:
    session = session_of(3, 3)
    begun = {k: member.begin(session, k, identity_of(k).sign) for k in session.members}
    verify = identity_of(3).verify
    known, roster = server.roster(session, {k: message for k, (_, message) in begun.items()}, verify)
    member.shared(begun[3][0], roster, verify)
    own, _ = member.begin(session, 4, identity_of(5).sign)
    forged = dict(known.known) | {4: wire.PublicKeys(keys.public_of(own.envelopes), keys.public_of(own.masks), b"no")}
    with pytest.raises(UpdateError, match="expected keys that member 4 signed"):
        member.shared(begun[3][0], wire.roster_written(session, forged), verify)
    with pytest.raises(UpdateError, match="expected a roster with the keys of member 4"):
        member.shared(begun[4][0], wire.roster_written(session, forged), verify)
    with pytest.raises(TooFewClientsError, match="expected keys that member 4 signed"):
        server.roster(session, {k: wire.keys_written(session, k, forged[k]) for k in forged}, verify)


def test_members_of_one_process_know_each_others_signatures() -> None:
    identities = local_identities((3, 4))
    signature = identities[3].sign(b"text")
    assert identities[4].verify(3, b"text", signature)
    for member_, text, given in (
        (4, b"text", signature),
        (3, b"other", signature),
        (3, b"text", b""),
        (5, b"text", b""),
    ):
        assert not identities[4].verify(member_, text, given)


def test_shares_of_fewer_than_the_threshold_fit_every_secret_and_a_wrong_one_is_found() -> None:
    secret = bytes(range(32))
    shares = dict(enumerate(shares_of(secret, 5, 3, entropy_of(1)), 1))
    for chosen in itertools.combinations(shares, 3):
        assert secret_of({place: shares[place] for place in chosen}, 3) == secret
    assert secret_of(shares, 3) == secret
    with pytest.raises(UpdateError, match="expected 3 shares"):
        secret_of({1: shares[1], 4: shares[4]}, 3)
    with pytest.raises(UpdateError, match="expected shares of one secret"):
        secret_of({**shares, 5: shares[4]}, 3)
    # Two shares and any secret at all are on one parabola: two of three say nothing.
    first, second = (int.from_bytes(shares[place], "big") for place in (1, 2))
    for other in (bytes(32), b"\xff" * 32):
        zero = int.from_bytes(other, "big")
        third = (zero - 3 * first + 3 * second) % PRIME  # the value at 3 of that parabola
        assert secret_of({1: shares[1], 2: shares[2], 3: third.to_bytes(66, "big")}, 3) == other


def test_fixed_point_is_exact_in_sums_and_refuses_what_could_overflow() -> None:
    limit = largest(4)
    assert limit == 2.0**21
    edge = np.array([np.nextafter(limit, 0.0), -np.nextafter(limit, 0.0), 2.0**-40, 0.3])
    total = sum((to_ring(edge, 4) for _ in range(4)), np.zeros(4, np.uint64))
    assert from_ring(total) == pytest.approx(4 * edge, abs=4 * 2.0**-41 + 1e-9)
    for bad in (limit, -limit, np.nan, np.inf):
        with pytest.raises(UpdateError, match="expected numbers below"):
            to_ring(np.array([0.0, bad]), 4)


@pytest.mark.parametrize(
    ("members", "threshold"), [((1, 2), 2), ((1, 2, 3), 4), ((1, 2, 3, 4), 2), ((2, 1, 3), 3), ((1, 1, 2), 3)]
)
def test_a_session_that_could_not_hide_is_refused(members: tuple[int, ...], threshold: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        Session(context_of(), members, threshold, 1)


def test_vectors_of_the_standards_and_of_a_whole_sum() -> None:
    """RFC 8439, appendix A.1, vector 1; RFC 7748, section 5.2, vector 1; the messages of one sum by their hashes."""
    from cryptography.hazmat.primitives.asymmetric import x25519

    assert mask(bytes(32), 2).astype("<u8").tobytes().hex() == "76b8e0ada0f13d90405d6ae55386bd28"
    scalar, point = (
        bytes.fromhex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4"),
        bytes.fromhex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c"),
    )
    agreed = x25519.X25519PrivateKey.from_private_bytes(scalar).exchange(
        x25519.X25519PublicKey.from_public_bytes(point)
    )
    assert agreed.hex() == "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"
    whole = Sum(session_of(4, 3), {5: "masked"})
    assert whole.run()[0] == (3, 4, 6)
    found = {
        step: hashlib.sha256(b"".join(sent[k] for k in sorted(sent))).hexdigest() for step, sent in whole.seen.items()
    }
    assert found == {
        "keys": "b38201bd51d30bf56c21229bb54e408fac693f50da58ec92af3f000be0df00e5",
        "shares": "67e0943746cd91b5a7d3c873295fce4acdd9db1d93f6289c2d603ff3c8331345",
        "masked": "dc8b0dcd997083e65bbddca6a44e499f832dcf3f9fe9cbcf1cb7eeeefa5c4e8c",
        "agreed": "78c3203a3cabb35a9806cd61cdf13ef7584c929c46cd589ad5f15c4cd2655afb",
        "told": "bf1b600c347f0964942fded6aee242e85216ca37ef43c93a740c639a352a7371",
    }
