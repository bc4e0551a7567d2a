"""The demo: a server and three sites in processes of their own, over gRPC, one killed and back."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedloom.errors import RunError
from fedloom.sites import sites_demo


@pytest.mark.slow
def test_the_demo_gives_the_adapter_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"local_steps": 2, "batch_size": 4, "learning_rate": 3e-3}
    monkeypatch.setattr(sites_demo, "_RECIPE", {**sites_demo._RECIPE, "training": small})
    told: list[str] = []
    result = sites_demo.run_demo(tmp_path / "demo", told.append)
    assert result.is_equal
    assert result.loss_after < result.loss_before
    assert any("killed oslo" in line for line in told)
    assert "equal to that of one process" in "\n".join(result.lines())


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="it holds other files"):
        sites_demo.run_demo(tmp_path, lambda line: None)
    assert (tmp_path / "mine.txt").read_text() == "mine"
