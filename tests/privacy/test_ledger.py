"""The ledger equals an independent composition over any schedules and restarts, and its budget outlives both."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fedloom.errors import PrivacyError, RunError
from fedloom.privacy.accountant import PrivateStep, epsilon
from fedloom.privacy.ledger import LEDGER, Booking, Budget, Ledger
from fedloom.run_folder import durable

DELTA = 1e-5
KINDS = [(0.02, 1.5), (0.1, 2.0), (1.0, 20.0), (0.02, 3.0)]
SCHEDULES = [(*KINDS[n % 4], steps) for n, steps in enumerate([40, 7, 3, 100, 1, 12, 2, 9, 60, 5])]
ONE = Booking("r", 3, 1, 10, 0.02, 2.0, "seed")
LINE = durable.encode_json(asdict(ONE)).encode()


def ledger(tmp_path: Path, max_epsilon: float | None = None) -> Ledger:
    return Ledger(tmp_path / LEDGER, Budget(DELTA, max_epsilon))


@pytest.mark.extra("privacy")
def test_ten_schedules_with_restarts_in_between_are_one_composition_by_dp_accounting(tmp_path: Path) -> None:
    import dp_accounting
    from dp_accounting import pld

    independent = pld.PLDAccountant()
    for round, (rate, noise, steps) in enumerate(SCHEDULES, 1):
        event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
        independent.compose(event, steps)
        restarted = ledger(tmp_path)
        restarted.book(Booking("r", 0, round, steps, rate, noise, "system"))
    assert ledger(tmp_path).epsilon(0) == pytest.approx(independent.get_epsilon(DELTA), abs=1e-6)
    ledger(tmp_path).book(Booking("r", 1, 1, 1, *KINDS[0], "system"))
    assert ledger(tmp_path).epsilon(1) < ledger(tmp_path).epsilon(0) == ledger(tmp_path).most()


@pytest.mark.extra("privacy")
def test_the_refusal_at_the_budget_survives_a_restart_and_books_nothing(tmp_path: Path) -> None:
    limit = epsilon({ONE.step: 25}, DELTA)
    for round in (1, 2):
        assert ledger(tmp_path, limit).book(replace(ONE, round=round)) <= limit
    before = (tmp_path / LEDGER).read_bytes()
    for _ in range(2):
        with pytest.raises(PrivacyError, match=r"client 3: expected at most privacy\.max_epsilon"):
            ledger(tmp_path, limit).book(replace(ONE, round=3))
    assert (tmp_path / LEDGER).read_bytes() == before
    ledger(tmp_path, limit).book(replace(ONE, client=4))
    assert ledger(tmp_path, limit).book(replace(ONE, round=3, steps=5)) == pytest.approx(limit)


@pytest.mark.extra("privacy")
def test_a_seeded_round_counts_once_and_a_sites_as_often_as_it_was_begun(tmp_path: Path) -> None:
    for draws, times in (("seed", 1), ("system", 3)):
        own = replace(ONE, draws=draws, client=times)
        for _ in range(3):
            ledger(tmp_path).book(own)
        assert ledger(tmp_path).epsilon(times) == epsilon({ONE.step: 10 * times}, DELTA)


@pytest.mark.extra("privacy")
def test_a_line_that_was_cut_off_is_of_steps_that_were_not_taken(tmp_path: Path) -> None:
    ledger(tmp_path).book(ONE)
    whole = (tmp_path / LEDGER).read_bytes()
    (tmp_path / LEDGER).write_bytes(whole + whole[:20])
    assert ledger(tmp_path).epsilon(3) == epsilon({ONE.step: 10}, DELTA)
    ledger(tmp_path).book(replace(ONE, round=2))
    assert ledger(tmp_path).epsilon(3) == epsilon({ONE.step: 20}, DELTA)


@pytest.mark.extra("privacy")
def test_what_one_run_cost_is_told_apart_from_what_all_did(tmp_path: Path) -> None:
    ledger(tmp_path).book(ONE)
    ledger(tmp_path).book(replace(ONE, run="other"))
    assert ledger(tmp_path).epsilon(3, "r") == epsilon({ONE.step: 10}, DELTA) < ledger(tmp_path).epsilon(3)


def test_nothing_costs_nothing_and_steps_without_noise_cost_everything() -> None:
    assert epsilon({}, DELTA) == epsilon({PrivateStep(0.1, 0.0): 0}, DELTA) == 0.0
    assert epsilon({PrivateStep(0.1, 0.0): 1}, DELTA) == float("inf")


def test_a_line_that_a_crash_cut_off_was_of_steps_never_taken(tmp_path: Path) -> None:
    for cut in range(len(LINE)):
        (tmp_path / LEDGER).write_bytes(LINE + b"\n" + LINE[:cut])
        durable.append_line(tmp_path / LEDGER, asdict(replace(ONE, round=2)))
        assert ledger(tmp_path)._spent_by(3) == {ONE.step: 20}


@pytest.mark.parametrize(
    "line", [LINE[1:], LINE.replace(b"10", b"0"), LINE.replace(b"10", b'"10"'), LINE[:20] + b"\x00" + LINE[21:], b"{}"]
)
def test_a_damaged_line_is_refused_since_what_was_spent_would_be_forgotten(tmp_path: Path, line: bytes) -> None:
    (tmp_path / LEDGER).write_bytes(LINE + b"\n" + line + b"\n")
    with pytest.raises(RunError, match=r"line 2: expected a booking of this version"):
        ledger(tmp_path)
