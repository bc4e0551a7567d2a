"""Four sites of the embedded model over gRPC: rows or sites hidden, sums masked, a site drops out at each message."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from four_sites import FOUR, Four, alone
from memory_link import SiteThread, adapter_of, joined, records_of

from fedloom.config import Settings
from fedloom.data.sources import Split, load_rows
from fedloom.methods import private_clients
from fedloom.privacy.accountant import PrivateStep, epsilon
from fedloom.privacy.draws import SeededDraws
from fedloom.privacy.secure_sum.steps import Step
from fedloom.reporting.metrics import CLIENT_FIGURES
from fedloom.reporting.report import write_report
from fedloom.sites import site_training
from fedloom.sites.frames import MAX_HEAD_BYTES, TO_SERVER, unframe
from fedloom.sites.grpc_link import GrpcServerLink, GrpcSiteLink
from fedloom.sites.kit import read_kit
from fedloom.sites.link import Frame, Link
from fedloom.sites.serving import serve
from fedloom.sites.sites_engine import Attendance
from fedloom.wording import written

pytestmark = [pytest.mark.extra("sites"), pytest.mark.slow]
LARGEST = MAX_HEAD_BYTES + (64 << 20)
STEPS = tuple(Step)


class Dropping:
    """A site's link which in round n loses its answers from the n-th message of the sum on."""

    def __init__(self, link: Link) -> None:
        self.link, self.inbox, self.connections, self.close = link, link.inbox, link.connections, link.close
        self.lost: list[tuple[int, Step]] = []

    def send(self, to: str, frame: Frame) -> bool:
        data = joined(frame)
        if b'"sum-answer"' in data[:400]:
            head, _ = unframe(data, TO_SERVER, LARGEST)
            if STEPS.index(Step(head.step)) >= head.round - 1:
                self.lost.append((head.round, Step(head.step)))
                return True
        return self.link.send(to, frame)


ROWS = {"privacy__unit": "row", "privacy__noise_multiplier": 1.0, "method__ranks": [8, 4, 4, 2]}
SITES = {"privacy__unit": "client", "privacy__noise": "clients", "method__ranks": 4, "method__weighting": "uniform"}


@pytest.mark.parametrize(
    ("method", "sum", "hidden"),
    [("ffa-lora", "masked", ROWS), ("flora", "sketch", ROWS), ("ffa-lora", "masked", SITES)],
    ids=["rows-masked", "rows-sketch", "sites-add-noise"],
)
def test_rows_or_sites_are_hidden_sums_are_masked_and_a_site_drops_out_at_each_message(
    recipe: Callable[..., Settings],
    base_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    sum: str,
    hidden: dict[str, Any],
) -> None:
    """With the noise of a simulation in place of the systems' the adapter is that of one process, bit for bit."""
    four = Four(recipe, base_folder, tmp_path)
    every = list(load_rows("embedded", Split.TRAIN).rows)
    sizes = (160, 120, 140, 100)
    starts = [0, *accumulate(sizes)]
    for number, (start, size) in enumerate(zip(starts, sizes, strict=False)):
        (four.rows / f"local_training_{number}.json").write_text(json.dumps(every[start : start + size]))
    settings = four.settings(
        model__base="embedded",
        model__tokenizer=None,
        data__shape="auto",
        data__eval_path="embedded",
        data__overlong="drop",
        method__name=method,
        federation__num_rounds=len(STEPS) + 1,
        training__batch_size=8,
        training__local_steps=1,
        training__dropout=0.0,
        privacy__sum=sum,
        evaluation__every=6,
        **hidden,
    )
    wanted = alone(settings, tmp_path / "alone", {round: (1, step) for round, step in enumerate(STEPS, 1)})
    monkeypatch.setattr(site_training, "SystemDraws", SeededDraws)
    monkeypatch.setattr(private_clients, "SystemDraws", SeededDraws)
    server = GrpcServerLink("127.0.0.1:0", read_kit(four.kit, "server"), tuple(FOUR), LARGEST)
    links: dict[str, Dropping | GrpcSiteLink] = {}

    class Dialling:
        """In place of the hub: sites dial the server."""

        @staticmethod
        def end(name: str) -> Dropping | GrpcSiteLink:
            kit = read_kit(tmp_path / "kits" / name, "client")
            link = GrpcSiteLink(f"127.0.0.1:{server.port}", kit, LARGEST, print, print)
            links[name] = Dropping(link) if name == FOUR[1] else link
            return links[name]

    sites: list[SiteThread] = []
    try:
        for number in range(4):
            site = four.site(number, sum="masked", **({"max_epsilon": 50.0} if hidden is ROWS else {}))
            model = site.model.model_copy(update={"base": "embedded", "tokenizer": None})
            sites.append(SiteThread(site.model_copy(update={"model": model}), Dialling(), hello_seconds=0.5))  # type: ignore[arg-type]
        # The site whose messages are lost must be there from the start, however late it greets.
        waits = Attendance.wait_for
        monkeypatch.setattr(Attendance, "wait_for", lambda self, quorum, seconds: waits(self, len(FOUR), seconds))
        study = four.study(settings, grace_s=4.0)
        serve(study, tmp_path / "served", lambda study, largest: server)
    finally:
        for thread in sites:
            thread.end()
    dropping = links[FOUR[1]]
    assert isinstance(dropping, Dropping)
    assert [*dict.fromkeys(dropping.lost)] == [*enumerate(STEPS, 1)]
    records = records_of(tmp_path / "served")
    for record in records:
        gone = [client["name"] for client in record["clients"] if client["reason"] is not None]
        assert gone == ([FOUR[1]] if record["round"] <= 3 else []), "its numbers had come before rounds 4 and 5 lost it"
    assert adapter_of(tmp_path / "served") == wanted
    if hidden is SITES:
        told = records[-1]["privacy"]
        assert (told["unit"], told["noise"], told["draws"]) == ("client", "clients", "system")
        return
    spent = [client["epsilon"] for client in records[-1]["clients"]]
    assert spent == [pytest.approx(epsilon({PrivateStep(8 / size, 1.0): len(records)}, 1e-5)) for size in sizes]
    write_report([tmp_path / "served"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    of_site = next(metric for metric in CLIENT_FIGURES if metric.key == "epsilon")
    for name, one in zip(FOUR, spent, strict=True):
        shown = written(one, of_site.unit, of_site.digits)
        assert re.search(rf"<th[^>]*>{name}</th>\s*<td[^>]*>{re.escape(shown)}</td>", page), (name, shown)
