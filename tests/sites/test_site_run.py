"""A site's own commands over gRPC: the look before it takes part, and who is turned away."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from memory_link import study_of

from fedloom.config import Settings
from fedloom.data.tokenizer import fingerprint
from fedloom.errors import RunError
from fedloom.models.load import load_base
from fedloom.sites import site_run
from fedloom.sites.frames import FORMAT, SheetSent, frame
from fedloom.sites.grpc_link import GrpcServerLink
from fedloom.sites.kit import read_kit
from fedloom.sites.sheet import sheet_of
from fedloom.sites.site_run import check_site, run_site
from fedloom.sites.site_settings import SiteSettings, resolve_site
from fedloom.sites.throwaway_certificates import ThrowawayRoot

RUN = "0" * 32


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Callable[..., GrpcServerLink]]:
    """Return a function that listens for the names given."""
    root, links = ThrowawayRoot(), []
    root.write(tmp_path / "kit", "client", "berlin")
    kit = read_kit(root.write(tmp_path / "server", "server", "server"), "server")

    def listen(*names: str) -> GrpcServerLink:
        links.append(GrpcServerLink("127.0.0.1:0", kit, names, 1 << 20))
        return links[-1]

    yield listen
    for link in links:
        link.close()


@pytest.fixture
def site_at(tmp_path: Path, base_folder: Path, site_rows: Path) -> Callable[..., SiteSettings]:
    def make(port: int, **policy: object) -> SiteSettings:
        own = {
            "name": "berlin",
            "server": f"127.0.0.1:{port}",
            "kit": str(tmp_path / "kit"),
            "folder": str(tmp_path / "state"),
        }
        document = {
            "site": own,
            "data": {"path": str(site_rows / "training" / "local_training_0.json")},
            "model": {"base": str(base_folder), "tokenizer": "bytes"},
            "policy": policy,
        }
        return resolve_site(document, "site.toml")

    return make


def answer_with_sheet(link: GrpcServerLink, recipe: Callable[..., Settings], base_folder: Path) -> None:
    """Answer greetings with a sheet until the link closes."""
    base = load_base(base_folder, tokenizer="bytes")
    settings = study_of(recipe(), ["berlin", "oslo", "rome"]).settings
    sheet = sheet_of(settings, 0, RUN, base.revision_hash, fingerprint(base.tokenizer), scores=False)
    data = frame(SheetSent(run=RUN, format=FORMAT), sheet.model_dump_json().encode())

    def answer() -> None:
        while True:
            try:
                name, _ = link.inbox.get(timeout=20)
            except queue.Empty:
                return
            link.send(name, data)

    threading.Thread(target=answer, daemon=True).start()


@pytest.mark.parametrize(
    ("policy", "told"), [({}, "20 rows are usable; the site would take part"), ({"max_rank": 2}, "policy.max_rank")]
)
def test_a_check_looks_at_base_rows_and_policy_and_trains_nothing(
    policy: dict[str, object],
    told: str,
    server: Callable[..., GrpcServerLink],
    site_at: Callable[..., SiteSettings],
    recipe: Callable[..., Settings],
    base_folder: Path,
) -> None:
    link = server("berlin")
    answer_with_sheet(link, recipe, base_folder)
    found = check_site(site_at(link.port, **policy), lambda text: None)
    lines = "\n".join(found.lines())
    assert told in lines
    assert f"sha256:{found.base_sha256}" in lines
    assert "rank 4, 3 rounds of 2 steps" in lines


def test_a_check_without_a_server_looks_at_the_base_alone(
    server: Callable[..., GrpcServerLink], site_at: Callable[..., SiteSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site_run, "_SECONDS_FOR_A_SHEET", 1.0)
    link = server("berlin")
    assert "no study is being served now" in "\n".join(check_site(site_at(link.port), lambda text: None).lines())


def test_a_site_that_the_study_does_not_have_ends_with_one_line(
    server: Callable[..., GrpcServerLink], site_at: Callable[..., SiteSettings]
) -> None:
    link = server("oslo")
    for command in (run_site, check_site):
        with pytest.raises(RunError, match="berlin is not a site of this study; ask the coordinator"):
            command(site_at(link.port), lambda text: None)
