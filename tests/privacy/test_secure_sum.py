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
from fedloom.privacy.secure_sum.keys import Entropy
from fedloom.privacy.secure_sum.masks import mask
from fedloom.privacy.secure_sum.shares import PRIME, secret_of, shares_of
from fedloom.privacy.secure_sum.wire import Session, context_of
from fedloom.seeding import stream

pytestmark = pytest.mark.extra("privacy")

LENGTH = 6
STEPS = ("keys", "shares", "masked", "told")


def entropy_of(seed: int) -> Entropy:
    """Return bytes that repeat, in place of the operating system's."""
    return stream(seed, "entropy").bytes


def session_of(num_members: int, threshold: int, length: int = LENGTH) -> Session:
    return Session(context_of("a test", 1), tuple(range(3, 3 + num_members)), threshold, length)


def numbers_of(session: Session) -> dict[int, NDArray[np.float64]]:
    return {k: stream(k, "numbers").normal(size=session.length) * 10.0 for k in session.members}


def no_change(_step: str, _sender: int, message: bytes) -> bytes:
    return message


@dataclass
class Sum:
    """A whole sum; ``leaves`` says before which message a member leaves, ``seen`` keeps what the server was sent."""

    session: Session
    leaves: Mapping[int, str] = field(default_factory=dict)
    change: Callable[[str, int, bytes], bytes] = no_change
    seen: dict[str, dict[int, bytes]] = field(default_factory=dict)
    masked: dict[int, member.Masked] = field(default_factory=dict)
    summed: server.Summed | None = None

    def run(self) -> tuple[tuple[int, ...], Ring]:
        session, begun, shared = self.session, {}, {}
        for k in session.members:
            begun[k], message = member.begin(session, k, entropy=entropy_of(k))
            self._send("keys", k, message)
        roster, told = server.roster(session, self.seen["keys"])
        for k in roster.known:
            shared[k], message = member.shared(begun[k], told, entropy=entropy_of(100 + k))
            self._send("shares", k, message)
        delivered, posted = server.delivered(roster, self.seen["shares"])
        numbers = numbers_of(session)
        for k, delivery in posted.items():
            words = to_ring(numbers[k], len(session.members))
            self.masked[k], message = member.masked(shared[k], delivery, words)
            self._send("masked", k, message)
        self.summed, survivors = server.summed(delivered, self.seen["masked"])
        for k in self.summed.members:
            self._send("told", k, member.told(self.masked[k], survivors))
        return self.summed.members, server.unmasked(self.summed, self.seen["told"])

    def _send(self, step: str, sender: int, message: bytes) -> None:
        kept = self.seen.setdefault(step, {})
        leaves = self.leaves.get(sender)
        if leaves is None or STEPS.index(step) < STEPS.index(leaves):
            kept[sender] = self.change(step, sender, message)


def plain(session: Session, members: tuple[int, ...]) -> Ring:
    numbers = numbers_of(session)
    return sum((to_ring(numbers[k], len(session.members)) for k in members), np.zeros(session.length, np.uint64))


def check(session: Session, leaves: Mapping[int, str]) -> None:
    members, words = Sum(session, leaves).run()
    assert members == tuple(k for k in session.members if leaves.get(k, "told") == "told")
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


def test_no_lists_of_survivors_make_members_tell_enough_of_both_secrets_of_one() -> None:
    session = session_of(4, 3)
    whole = Sum(session)
    whole.run()
    lists = [m for n in (3, 4) for m in itertools.combinations(session.members, n)]
    told = {
        (k, chosen): wire.told_read(member.told(whole.masked[k], wire.survivors_written(session, chosen)), session, k)
        for k, chosen in itertools.product(session.members, lists)
        if k in chosen
    }
    for given in itertools.product(lists, repeat=4):
        answers = [told[k, chosen] for k, chosen in zip(session.members, given, strict=True) if (k, chosen) in told]
        for victim in session.members:
            seeds, of_key = (
                sum(victim in part for part in parts)
                for parts in ([one.seeds for one in answers], [one.keys for one in answers])
            )
            assert min(seeds, of_key) < session.threshold
    for chosen in [(3, 4), (3, 4, 9), (4, 5, 6)]:
        with pytest.raises(UpdateError, match="survivors"):
            member.told(whole.masked[3], wire.survivors_written(session, chosen))


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
        assert (4 in members) is (step == "told")
        assert np.array_equal(words, plain(session, members))


def test_keys_that_the_server_changed_are_found_by_the_members_signatures() -> None:
    session = session_of(3, 3)

    def sign(text: bytes) -> bytes:
        return hashlib.sha256(b"a member's own" + text).digest()

    def verify(_: int, text: bytes, signature: bytes) -> bool:
        return sign(text) == signature

    begun = {k: member.begin(session, k, sign=sign) for k in session.members}
    known, roster = server.roster(session, {k: message for k, (_, message) in begun.items()})
    member.shared(begun[3][0], roster, verify=verify)
    own, _ = member.begin(session, 4)
    forged = dict(known.known) | {4: wire.PublicKeys(keys.public_of(own.envelopes), keys.public_of(own.masks), b"no")}
    with pytest.raises(UpdateError, match="expected keys that member 4 signed"):
        member.shared(begun[3][0], wire.roster_written(session, forged), verify=verify)
    with pytest.raises(UpdateError, match="expected a roster with the keys of member 4"):
        member.shared(begun[4][0], wire.roster_written(session, forged))


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
        "keys": "0d7c239a601d9a9d478089ce699822cacda2f1eb671ae34950753f44541dc061",
        "shares": "67e0943746cd91b5a7d3c873295fce4acdd9db1d93f6289c2d603ff3c8331345",
        "masked": "dc8b0dcd997083e65bbddca6a44e499f832dcf3f9fe9cbcf1cb7eeeefa5c4e8c",
        "told": "bf1b600c347f0964942fded6aee242e85216ca37ef43c93a740c639a352a7371",
    }
