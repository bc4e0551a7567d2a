"""Runs side by side fit into what is free, on every memory that they share, or fewer begin and a line says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fedloom.config import Settings
from fedloom.errors import ModelError
from fedloom.preview import runs_at_once as module
from fedloom.preview.description import describe, memory_of
from fedloom.preview.planned_memory import PlannedMemory
from fedloom.preview.row_sample import rows_here
from fedloom.preview.runs_at_once import PROCESS_BYTES, SHARE_OF_FREE, runs_at_once

Make = Callable[..., Settings]
GB = 10**9
EACH = PROCESS_BYTES + 2 * GB
"""Of a run whose plan is 2 GB, half of it the base's."""


def plan_of(total: int, device: str = "cpu") -> PlannedMemory:
    half = total // 2
    return PlannedMemory(
        device=device,
        base_bytes=half,
        side_bytes=0,
        client_bytes=0,
        pass_bytes=0,
        held_bytes=total - half,
        sum_bytes=0,
        pass_tokens=1,
        pass_rows=1,
        clients_at_once=1,
        rows="no rows",
    )


def free(monkeypatch: pytest.MonkeyPatch, **of_device: float) -> None:
    """Fake what is free, which has to be a little more than what is asked for: runs take a share of it."""
    monkeypatch.setattr(module, "free_on", lambda device: int(of_device[device.type] / SHARE_OF_FREE) + 2)


def plans(monkeypatch: pytest.MonkeyPatch, plan: Callable[[Settings], PlannedMemory]) -> None:
    monkeypatch.setattr(module, "memory_of", lambda one, _rows: plan(one))


@pytest.mark.parametrize(
    ("bytes_free", "wanted", "expected"),
    [(3 * EACH, 3, 3), (3 * EACH, 8, 3), (3 * EACH - 9, 3, 2), (EACH, 2, 1), (0, 2, 1), (9 * EACH, 2, 2)],
)
def test_as_many_run_as_fit_and_one_at_least(
    settings_for: Make, monkeypatch: pytest.MonkeyPatch, bytes_free: int, wanted: int, expected: int
) -> None:
    plans(monkeypatch, lambda _: plan_of(2 * GB))
    free(monkeypatch, cpu=bytes_free)
    chosen, told = runs_at_once([settings_for()], wanted)
    assert chosen == expected
    assert (told is None) == (chosen == wanted)


def test_fewer_are_told_with_what_was_expected_what_is_free_and_what_to_do(
    settings_for: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans(monkeypatch, lambda _: plan_of(2 * GB))
    monkeypatch.setattr(module, "free_on", lambda _: 7 * GB)
    assert runs_at_once([settings_for()], 4)[1] == (
        "--parallel: expected memory for 4 runs at once, 2.63 GB each, found 85% of 7 GB free on this machine; 2 runs "
        "at once; for more lower training.token_budget, or free memory"
    )


def test_the_largest_run_counts(settings_for: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    plans(monkeypatch, lambda one: plan_of(2 * GB if one.method.name == "flora" else GB))
    free(monkeypatch, cpu=3 * EACH)
    assert runs_at_once([settings_for(method__name=name) for name in ("zero-padding", "flora")], 9)[0] == 3


def test_on_a_gpu_its_memory_and_the_machines_both_limit(settings_for: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    plans(monkeypatch, lambda _: plan_of(2 * GB, "cuda"))
    base = PROCESS_BYTES + GB
    for cpu, cuda, expected, place in ((9, 4, 4, "cuda:1"), (3, 4, 3, "this machine"), (9, 9, 9, "")):
        free(monkeypatch, cpu=cpu * base, cuda=cuda * 2 * GB)
        chosen, told = runs_at_once([settings_for(model__device="cuda:1")], 9)
        assert chosen == expected
        assert f"free on {place}" in (told or "free on ")


def test_one_plan_stands_for_all_seeds_and_learning_rates(settings_for: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def plan(one: Settings) -> PlannedMemory:
        asked.append(one.training.batch_size)
        return plan_of(GB)

    plans(monkeypatch, plan)
    free(monkeypatch, cpu=99 * EACH)
    same = [settings_for(run__seed=seed, training__learning_rate=rate) for seed in (1, 2) for rate in (0.1, 0.2)]
    assert runs_at_once([*same, settings_for(training__batch_size=7)], 9) == (9, None)
    assert sorted(asked) == [4, 7]


def test_what_cannot_be_planned_is_left_to_the_runs(settings_for: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(_: Settings) -> PlannedMemory:
        raise ModelError("no such base")

    plans(monkeypatch, plan)
    assert runs_at_once([settings_for()], 3) == (3, None)


def test_nothing_is_planned_for_one_at_a_time(settings_for: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    plans(monkeypatch, lambda _: pytest.fail("planned"))
    assert runs_at_once([settings_for()], 1) == (1, None)


def test_the_plan_is_the_one_that_describe_prints(settings_for: Make) -> None:
    settings = settings_for()
    assert memory_of(settings, rows_here(settings)) == describe(settings).memory


def test_the_same_rows_are_read_once_for_all_runs(settings_for: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(module, "rows_here", lambda one: read.append(one.data.path))
    plans(monkeypatch, lambda _: plan_of(GB))
    free(monkeypatch, cpu=99 * EACH)
    runs_at_once([settings_for(method__name=name) for name in ("zero-padding", "flora", "weave")], 3)
    assert len(read) == 1
