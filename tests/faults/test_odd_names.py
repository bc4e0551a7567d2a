"""What lies in a run folder under a name that no run gives is no round."""

from __future__ import annotations

from pathlib import Path

from fedloom.run_folder.claim import rounds_done


def test_a_folder_that_only_looks_like_a_number_is_no_round(tmp_path: Path) -> None:
    for name in ("1", "10", "2", "²", "٣", "007", "0", "-1", "1.5", "x", "9" * 200):
        (tmp_path / "rounds" / name).mkdir(parents=True)
    assert rounds_done(tmp_path) == [1, 2, 10]
