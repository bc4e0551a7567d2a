"""Costs of a round."""

from __future__ import annotations

from itertools import count

import pytest

from fedloom.reporting.ledger import Ledger, peak_memory_bytes, total_cost


def test_bytes_by_client_and_by_kind_both_sum_to_the_totals() -> None:
    ledger = Ledger()
    ledger.upload(3, len(b"12345"))
    ledger.upload(3, 100, kind="activations")
    ledger.upload(1, 7)
    ledger.download(1, 11)
    assert ledger.client_bytes(3, "upload") == 105
    cost = ledger.close_round()
    assert (cost.upload_bytes, cost.download_bytes) == (112, 11)
    assert cost.bytes_by_client == {1: (7, 11), 3: (105, 0)}
    assert cost.bytes_by_kind == {"activations": (100, 0), "adapter": (12, 11)}


def test_a_round_starts_from_zero() -> None:
    ledger = Ledger()
    ledger.upload(0, 5)
    ledger.trained(100)
    assert ledger.close_round().num_trained_parameters == 100
    cost = ledger.close_round()
    assert (cost.upload_bytes, cost.num_trained_parameters, cost.seconds) == (0, 0, {})


def test_nested_phases_count_every_second_once() -> None:
    ticks = count()
    ledger = Ledger(clock=lambda: float(next(ticks)))
    with ledger.phase("round"):
        with ledger.phase("train"):
            pass
        with ledger.phase("train"):
            pass
    # Readings: 1 round on, 2-3 train, 4-5 train, 6 round off.
    assert ledger.close_round().seconds == {"round": 3.0, "train": 2.0}


def test_a_phase_that_fails_is_counted_and_closed() -> None:
    ticks = count()
    ledger = Ledger(clock=lambda: float(next(ticks)))
    with pytest.raises(KeyError), ledger.phase("train"):
        raise KeyError
    assert ledger.close_round().seconds == {"train": 1.0}


def test_peak_memory_is_that_of_this_process() -> None:
    assert 10_000_000 < peak_memory_bytes() < 1e12
    assert Ledger().close_round().peak_memory_bytes == pytest.approx(peak_memory_bytes(), rel=0.1)


def test_records_add_up_to_the_run() -> None:
    ledger = Ledger(clock=iter(range(100)).__next__)
    records = []
    for _ in range(2):
        ledger.upload(0, 5)
        with ledger.phase("train"):
            pass
        records.append(ledger.close_round().to_record())
    total = total_cost([*records, {"round": 3, "seconds": None}])
    assert (total.num_rounds, total.upload_bytes, total.download_bytes, total.seconds) == (3, 10, 0, 2.0)
    assert records[0]["bytes_by_kind"] == {"adapter": {"upload_bytes": 5, "download_bytes": 0}}
