"""Runs whose first A comes from the gradient: one round more, counted, resumed anywhere, in any form."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from fedloom.config import Settings
from fedloom.experiment.session import run
from fedloom.preview.description import describe
from fedloom.reporting.progress import SilentProgress

Make = Callable[..., Settings]
FORMS: dict[str, dict[str, object]] = {
    "fedit, everybody": {"method__name": "fedit", "method__ranks": 2},
    "ffa-lora": {"method__name": "ffa-lora"},
    "rolora in 16 bits": {"method__name": "rolora", "wire__dtype": "bf16"},
    "fedsa-lora": {"method__name": "fedsa-lora", "method__ranks": 2},
    "synchronised": {"method__name": "weave", "training__local_steps": 1},
    "short rounds": {"method__name": "weave", "training__moments": "shared"},
}


class Stopped(SilentProgress):
    """Ends the process after the first round, as a kill would."""

    def round_done(self, record: Mapping[str, Any]) -> None:
        raise KeyboardInterrupt


def records_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def kept(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


@pytest.mark.parametrize("form", FORMS)
def test_a_run_that_is_killed_after_the_sketch_goes_on_to_the_same_bits_and_all_bytes_are_those_described(
    form: str, settings_for: Make, tmp_path: Path
) -> None:
    settings = settings_for(**FORMS[form], method__initialisation="gradient", federation__num_rounds=2)
    summary = run(settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "parts", progress=Stopped())
    assert len(records_of(tmp_path / "parts")) == 1
    run(settings, tmp_path / "parts")
    assert kept(tmp_path / "parts") == kept(tmp_path / "whole")
    records, described = records_of(tmp_path / "whole"), describe(settings)
    assert [record["round"] for record in records] == [1, 2, 3]
    assert [record["eval"] is None for record in records] == [True, False, False]
    for client in records[0]["clients"]:
        assert (client["upload_bytes"], client["download_bytes"]) == described.start_bytes
        assert (client["reason"], client["num_steps"]) == (None, 0)
    ups = zip(*([c["upload_bytes"] for c in record["clients"]] for record in records[1:]), strict=True)
    assert [round(fmean(up)) for up in ups] == list(described.upload_bytes)
    assert [c["download_bytes"] for c in records[1]["clients"]] == list(described.first_download_bytes)
    if "weave" not in FORMS[form].values() and form != "rolora in 16 bits":
        assert (summary.upload_bytes, summary.download_bytes) == described.run_bytes
    assert "one round trip more" in "\n".join(described.lines())
    for lines in (described.lines(), summary.lines()):
        assert "1 round for the start and 2 of training" in "\n".join(lines)


def test_after_the_sketch_the_same_clients_read_the_same_rows_as_from_a_random_start(
    settings_for: Make, tmp_path: Path
) -> None:
    changes = {"method__name": "fedit", "method__ranks": 2, "federation__clients_per_round": 2}
    for name in ("independent", "gradient"):
        run(settings_for(**changes, method__initialisation=name, federation__num_rounds=3), tmp_path / name)
    random, sketched = (records_of(tmp_path / name) for name in ("independent", "gradient"))
    assert [client["client"] for client in sketched[0]["clients"]] == [0, 1, 2], "all are asked"
    read = [[(c["client"], c["num_tokens"], c["num_steps"]) for c in record["clients"]] for record in sketched[1:]]
    assert read == [[(c["client"], c["num_tokens"], c["num_steps"]) for c in record["clients"]] for record in random]
    losses = [record["eval"]["loss_nats"] for record in (random[-1], sketched[-1])]
    assert losses[0] != losses[1]


def test_a_server_step_takes_no_notice_of_the_sketch(settings_for: Make, tmp_path: Path) -> None:
    """Its memory is of changes of the product; a sketch changes none, and is not what later norms are held against."""
    for step in ("fedadam", "fedexp", "momentum"):
        changes = {"method__name": "zero-padding", "server__step": step, "federation__max_norm_ratio": 5.0}
        run(settings_for(**changes, method__initialisation="gradient", run__keep_states="all"), tmp_path / step)
        numbers = json.loads((tmp_path / step / "rounds" / "1" / "state" / "server.json").read_text())
        assert numbers["typical_norm"] is None
        records = records_of(tmp_path / step)
        assert [record["change_norm"] > 0 for record in records] == [False, True, True]
        assert not [c["reason"] for record in records for c in record["clients"] if c["reason"]]


@pytest.mark.parametrize("rule", ["clip", "cosine", "median"])
def test_a_robust_rule_judges_sketches_too(rule: str, settings_for: Make, tmp_path: Path) -> None:
    changes = {"method__name": "weave", "server__robust": rule, "federation__num_rounds": 1}
    run(settings_for(**changes, method__initialisation="gradient"), tmp_path)
    assert [client["norm"] > 0 for client in records_of(tmp_path)[0]["clients"]] == [True] * 3
