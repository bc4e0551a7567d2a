"""Every client on its own held-out rows: which rows, under which adapter, and the figures over clients."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedloom.assembly.inputs import Inputs, Workshop
from fedloom.config import Settings
from fedloom.data.holdout import hold_out_of_clients
from fedloom.data.own_rows import OwnRows
from fedloom.data.partition import Partition
from fedloom.data.tokens import TokenSet
from fedloom.experiment import compare, run
from fedloom.lora.pair import Adapter, Pair
from fedloom.methods.state import Standing
from fedloom.reporting.report import write_report
from fedloom.results.client_scores import exceeded_by, score_clients
from fedloom.seeding import stream
from fedloom.training.row_losses import RowLosses

Make = Callable[..., Settings]
OWNER = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 2])


def draw(client: int) -> np.random.Generator:
    return stream(1, "own", client)


# ---- which rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "counts"), [(0.5, [3, 2, 0]), (0.01, [1, 1, 0]), (0.99, [5, 2, 0])])
def test_each_client_gives_its_share_at_least_one_row_and_never_all(share: float, counts: list[int]) -> None:
    split = hold_out_of_clients(Partition.from_owners(OWNER, 3), np.arange(10), share, draw)
    assert np.bincount(OWNER[split.held], minlength=3).tolist() == counts
    assert sorted([*split.kept, *split.held]) == list(range(10))


def test_the_answers_of_one_dialogue_are_held_out_together() -> None:
    units = np.array([0, 0, 0, 1, 1, 1, 2, 2, 3, 4])
    split = hold_out_of_clients(Partition.from_owners(OWNER, 3), units, 0.5, draw)
    assert not set(units[split.kept]) & set(units[split.held])


def test_what_a_client_gives_depends_on_its_own_rows_and_draw_alone() -> None:
    owners = (OWNER, np.array([0, 0, 0, 0, 0, 0, 1, 1, 2, 2]))
    held = [hold_out_of_clients(Partition.from_owners(one, 3), np.arange(10), 0.5, draw).held for one in owners]
    assert set(held[0][held[0] < 6]) == set(held[1][held[1] < 6])


def inputs_of(settings: Settings) -> Inputs:
    workshop = Workshop()
    return workshop.inputs(settings, workshop.base(settings)[0])


def listed(rows: TokenSet) -> list[bytes]:
    return sorted(rows.row(index)[0].tobytes() for index in range(len(rows)))


def test_nobody_trains_on_the_rows_it_is_scored_on(settings_for: Make) -> None:
    whole, split = inputs_of(settings_for()), inputs_of(settings_for(evaluation__clients=0.25))
    assert split.own.tokens is not None
    assert len(split.tokens) + len(split.own.tokens) == len(whole.tokens)
    assert split.data_sha256 == whole.data_sha256
    for client in range(3):
        own = split.own.tokens.select(split.own.members[client])
        assert len(own) == round(0.25 * len(whole.rows_of(client)))
        assert sorted(listed(split.rows_of(client)) + listed(own)) == listed(whole.rows_of(client))


# ---- which adapter, which figures ----------------------------------------------------------------------------------


LOSSES = np.array([1.0, 3.0, 5.0, 2.0])
OWNERS = np.array([0, 0, 1, 2])


def own_rows() -> OwnRows:
    tokens = TokenSet.from_rows([(np.array([1, 2 + k]), np.array([False, True])) for k in range(4)])
    return OwnRows.of(tokens, OWNERS, ["north", "south", "west"])


def adapter_of(client: int) -> Adapter:
    return Adapter({str(client): Pair(torch.ones(1, 1), torch.ones(1, 1))})


def scripted(adapter: Adapter, rows: TokenSet, _: int) -> RowLosses:
    """Score rows by their last token; under a client's adapter, named by its module, its own rows at half."""
    places = np.array([int(rows.row(index)[0][1]) - 2 for index in range(len(rows))])
    factor = np.where(OWNERS[places] == int(next(iter(adapter))), 0.5, 9.0) if adapter else 1.0
    return RowLosses(LOSSES[places] * factor, np.ones(len(rows), np.int64))


def test_the_figures_over_clients_under_the_one_adapter() -> None:
    found = score_clients(scripted, Standing(1), own_rows(), 10)["clients"]
    assert found["adapter"] == "global"
    assert found["loss_nats_of_client"] == {"north": 2.0, "south": 5.0, "west": 2.0}
    assert found["loss_nats"] == pytest.approx(3.0)
    assert found["loss_nats_by_rows"] == pytest.approx((2 * 2.0 + 5.0 + 2.0) / 4)
    assert (found["loss_nats_worst"], found["loss_nats_worst_tenth"]) == (5.0, 5.0)
    assert (found["num_clients"], found["num_rows"]) == (3, 4)


def test_a_client_with_an_adapter_of_its_own_is_scored_under_that_one_and_others_are_left_out() -> None:
    state = Standing(1, shared=adapter_of(7), own={0: adapter_of(0), 2: adapter_of(2)})
    found = score_clients(scripted, state, own_rows(), 10)["clients"]
    assert found["adapter"] == "own"
    assert found["loss_nats_of_client"] == {"north": 1.0, "west": 1.0}


def test_where_nothing_is_held_out_nothing_is_scored() -> None:
    assert score_clients(scripted, Standing(1), OwnRows(), 10) == {}


@pytest.mark.parametrize(
    ("losses", "weights", "expected"),
    [
        (list(range(1, 21)), [1] * 20, 19),
        (list(range(1, 11)), [1] * 10, 10),
        ([3.0, 1.0, 2.0], [1, 98, 1], 1.0),
        ([3.0, 1.0, 2.0], [9, 90, 1], 2.0),
        ([4.0], [7], 4.0),
    ],
)
def test_the_worst_tenth_is_the_loss_that_a_tenth_of_the_weight_has_or_exceeds(
    losses: list[float], weights: list[float], expected: float
) -> None:
    assert exceeded_by(losses, weights) == expected


# ---- in runs -------------------------------------------------------------------------------------------------------


ADAPTERS = {
    **dict.fromkeys(("fedit", "centralised", "splitlora", "base"), "global"),
    **dict.fromkeys(("fedsa-lora", "standalone"), "own"),
}


@pytest.mark.parametrize("method", ADAPTERS)
def test_every_method_says_how_its_clients_fare(method: str, settings_for: Make, tmp_path: Path) -> None:
    summary = run(settings_for(method__name=method, method__ranks=2, evaluation__clients=0.25), tmp_path / "run")
    found = summary.eval["clients"]
    assert found["adapter"] == ADAPTERS[method]
    assert list(found["loss_nats_of_client"]) == ["0", "1", "2"]
    assert found["loss_nats_worst"] == max(found["loss_nats_of_client"].values())
    assert summary.base_eval["clients"]["adapter"] == "global"
    assert any(line.startswith("on own rows of 3 clients") for line in summary.lines())
    if method != "base":
        assert found["loss_nats"] < summary.base_eval["clients"]["loss_nats"]


def test_a_stopped_run_holds_the_same_rows_out_again(settings_for: Make, tmp_path: Path) -> None:
    for name, rounds in (("whole", (3,)), ("parts", (1, 3))):
        for number in rounds:
            run(settings_for(evaluation__clients=0.25, federation__num_rounds=number), tmp_path / name)
    whole, parts = (tmp_path / f"{name}/metrics.jsonl" for name in ("whole", "parts"))
    evaluations = [[json.loads(line)["eval"] for line in path.read_text().splitlines()] for path in (whole, parts)]
    assert evaluations[0] == evaluations[1]


def test_a_comparison_sets_personal_and_standalone_adapters_beside_the_global_one(
    settings_for: Make, tmp_path: Path
) -> None:
    settings = settings_for(method__ranks=2, evaluation__clients=0.25)
    table = compare(settings, ["fedit", "fedsa-lora", "standalone"], [1], tmp_path).table
    keys = [metric.key for metric in table.metrics if metric.key.startswith("client_")]
    assert keys == ["client_loss_nats", "client_loss_nats_worst_tenth", "client_loss_nats_worst"]
    assert all(table.cells[method][key] is not None for method in table.cells for key in keys)
    write_report([tmp_path / f"{method}-seed1" for method in table.cells], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "clients&#x27; own rows: loss [nats], by client" in page
