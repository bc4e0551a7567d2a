"""A side that has grown beyond its matrices is compacted once a version, although server and clients both need it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedloom.config import Settings
from fedloom.experiment import run
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods import side


def test_one_process_compacts_each_version_of_the_side_once(
    settings_for: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compacted: list[str] = []
    compress = side.compress

    def counted(adapter: Adapter) -> object:
        compacted.append(side.digest(adapter))
        return compress(adapter)

    monkeypatch.setattr(side, "compress", counted)
    run(settings_for(federation__num_rounds=4), tmp_path / "run")
    assert len(compacted) >= 3
    assert len(set(compacted)) == len(compacted)


def test_a_compacted_side_that_nobody_holds_is_let_go() -> None:
    pair = Pair(torch.ones(2, 3), torch.arange(6.0).reshape(3, 2))
    first = side.compacted(Adapter({"q": pair}))
    assert side.compacted(Adapter({"q": pair})) is first
    assert side.compacted(Adapter({"q": pair.to(torch.float64)})) is not first
    number = len(side._COMPACTED)
    del first
    gc.collect()
    assert len(side._COMPACTED) == number - 1
