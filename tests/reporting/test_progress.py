"""Progress."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console

from fedloom.reporting.progress import (
    LiveProgress,
    PlainProgress,
    Progress,
    SilentProgress,
    clock_time,
    figures,
    progress_for,
)

RECORD = {
    "round": 3,
    "train_loss_nats": 2.5,
    "eval": {"loss_nats": 2.25},
    "clients": [{"client": 0, "reason": None}, {"client": 4, "reason": "not finite"}],
    "upload_bytes": 1000,
    "download_bytes": 500,
    "seconds": {"train": 2.0, "evaluate": 0.5},
}


def play(progress: Progress) -> None:
    with progress:
        progress.run_started("flora", 4, 2)
        progress.round_started(3, 2)
        progress.step_done(0, 1, 5, 2.5)
        progress.client_done(0, 2.5)
        progress.client_done(4, None)
        progress.round_done(RECORD)
        progress.note("done [1]")


def test_plain_lines_tell_figures_and_time_left() -> None:
    stream = io.StringIO()
    now = [0.0]
    progress = PlainProgress(stream, clock=lambda: now[0])
    progress.run_started("flora", 4, 2)
    now[0] = 65.0
    progress.round_done(RECORD)
    progress.note("done [1]")
    assert stream.getvalue().splitlines() == [
        "flora: 4 rounds, resuming after round 2",
        "round 3/4  train loss 2.5000  held-out loss 2.2500  1 client (1 dropped)  1.5 kB  2.5 s  1:05 left",
        "done [1]",
    ]


def test_plain_lines_tell_how_far_scoring_is_where_nothing_was_said_for_a_while() -> None:
    stream, now = io.StringIO(), [0.0]
    progress = PlainProgress(stream, clock=lambda: now[0])
    for now[0] in (4.0, 11.0, 12.0, 30.0):
        progress.scored("e2e", int(now[0]), 40, 61.0)
    assert stream.getvalue().splitlines() == ["e2e: 11 of 40  1:01 left", "e2e: 30 of 40  1:01 left"]


def test_the_live_view_shows_items_while_some_are_left() -> None:
    progress = LiveProgress(Console(file=io.StringIO(), force_terminal=True))
    items = progress._bars.tasks[3]
    progress.scored("e2e of client 1", 16, 40, 9.0)
    assert (items.completed, items.total, items.fields["detail"], items.visible) == (16, 40, "e2e of client 1", True)
    progress.scored("e2e of client 1", 40, 40, 0.0)
    assert not items.visible


def test_the_live_view_leaves_a_line_per_round_and_no_bars_behind() -> None:
    stream = io.StringIO()
    play(LiveProgress(Console(file=stream, force_terminal=True, width=100, color_system=None)))
    text = stream.getvalue()
    assert "round 3  train loss 2.5000  held-out loss 2.2500" in text
    assert "done [1]" in text
    assert text.count("\x1b[?25h") == 1  # the cursor is shown again


def test_the_live_view_counts_steps_of_all_clients() -> None:
    progress = LiveProgress(Console(file=io.StringIO(), force_terminal=True))
    progress.round_started(1, 2)
    progress.step_done(0, 5, 5, 2.0)
    progress.step_done(1, 2, 5, 1.0)
    steps = progress._bars.tasks[2]
    assert (steps.completed, steps.total, steps.fields["detail"]) == (7, 10, "client 1  loss 1.000")


def test_a_stream_that_is_no_terminal_gets_plain_lines() -> None:
    assert isinstance(progress_for(io.StringIO()), PlainProgress)


def test_silence_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    play(SilentProgress())
    assert capsys.readouterr() == ("", "")


def test_what_a_record_lacks_is_left_out() -> None:
    assert figures({"round": 1}) == "0.0 s"
    assert figures({"round": 1, "eval": None, "train_loss_nats": None, "seconds": {"train": 1}}) == "1.0 s"


@pytest.mark.parametrize(("seconds", "text"), [(7, "0:07"), (725, "12:05"), (10800, "3:00:00"), (59.6, "1:00")])
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert clock_time(seconds) == text


def test_reporting_does_not_load_torch() -> None:
    code = (
        "import sys, fedloom.reporting.progress, fedloom.run_folder.writer, fedloom.reporting.tables, "
        "fedloom.reporting.peak_memory, fedloom.reporting.metrics, fedloom.reporting.trackers\n"
        "assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
