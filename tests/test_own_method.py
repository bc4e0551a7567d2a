"""The page on adding a method: its code, as it stands there, is a method like a shipped one."""

from __future__ import annotations

import importlib
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fedloom
from fedloom.cli.app import exit_code
from fedloom.config import Settings
from fedloom.methods import table

Make = Callable[..., Settings]
PAGE = Path(__file__).parents[1] / "docs" / "adding-a-method.md"
FEDEX, FFA, NOTEBOOK = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
ENTRY = re.search(r'\[project\.entry-points\."fedloom\.methods"\]\n(.+)', PAGE.read_text(encoding="utf-8"))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Register the page's two methods, each saved under the page's name, in a folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for module, code in (("my_fedex", FEDEX), ("my_ffa", FFA)):
        (tmp_path / f"{module}.py").write_text(code, encoding="utf-8")
        fedloom.register_method(importlib.import_module(module).METHOD)
    yield tmp_path
    for module, name in (("my_fedex", "my-fedex"), ("my_ffa", "my-ffa")):
        del sys.modules[module]
        if name in table.names():
            fedloom.unregister_method(name)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_the_method_of_the_page_is_under_thirty_lines() -> None:
    assert len([line for line in FEDEX.splitlines() if line.strip()]) < 30


@pytest.mark.parametrize(
    ("mine", "shipped", "plain", "ranks"),
    [("my-fedex", "fedex-lora", "fedit", 2), ("my-ffa", "ffa-lora", "zero-padding", [4, 2, 1])],
)
def test_a_method_of_the_page_trains_to_the_shipped_ones_adapter(
    mine: str, shipped: str, plain: str, ranks: object, own: Path, settings_for: Make
) -> None:
    for name in (mine, shipped, plain):
        fedloom.run(settings_for(method__name=name, method__ranks=ranks, method__weighting="rows"), own / name)
    assert equal(tensors(own / mine), tensors(own / shipped))
    assert not equal(tensors(own / mine), tensors(own / plain))


def test_the_method_of_the_page_is_described_compared_reported_and_exported(own: Path, settings_for: Make) -> None:
    settings = settings_for(method__name="my-fedex", method__ranks=2)
    theirs = settings_for(method__name="fedex-lora", method__ranks=2)
    ours, shipped = fedloom.describe(settings), fedloom.describe(theirs)
    assert ours.upload_bytes == shipped.upload_bytes
    both = fedloom.compare(settings, ["fedit", "my-fedex"], [1], own / "both")
    assert "my-fedex" in both.table.to_markdown()
    assert exit_code(["report", str(own / "both"), "--out", "report.html"]) == 0
    assert "my-fedex" in (own / "report.html").read_text(encoding="utf-8")
    exported = fedloom.export_adapter(own / "both/my-fedex-seed1", own / "exported", rank=2)
    assert set(exported.ranks.values()) == {2}


@pytest.mark.usefixtures("own")
def test_the_method_of_the_page_combines_adapters_at_hand_to_their_exact_mean() -> None:
    def client(seed: int) -> fedloom.Adapter:
        draw = torch.Generator().manual_seed(seed)
        return fedloom.Adapter(
            {"layer": fedloom.Pair(torch.randn(6, 2, generator=draw), torch.randn(2, 5, generator=draw))}
        )

    one, two = client(1), client(2)
    mean = 0.75 * one["layer"].delta() + 0.25 * two["layer"].delta()
    together = fedloom.aggregate([one, two], [3, 1], method="my-fedex")
    torch.testing.assert_close(together["layer"].delta(), mean, rtol=1e-5, atol=1e-5)
    with pytest.raises(fedloom.FedloomError, match="got 'my-ffa'"):
        fedloom.aggregate([one, two], method="my-ffa")


def test_the_method_of_the_page_aggregates_the_clients_half_of_a_cut_model(own: Path, settings_for: Make) -> None:
    def split(aggregation: str) -> Settings:
        return settings_for(
            method__name="splitlora",
            method__ranks=2,
            split__aggregation=aggregation,
            split__cut_layer=1,
            split__aggregate_every=2,
        )

    for name in ("my-fedex", "fedex-lora"):
        fedloom.run(split(name), own / name)
    assert equal(tensors(own / "my-fedex"), tensors(own / "fedex-lora"))


@pytest.mark.slow
def test_the_program_of_the_page_runs_as_written(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fedloom.unregister_method("my-fedex")
    (own / "notebook.py").write_text(NOTEBOOK, encoding="utf-8")
    runpy.run_path(str(own / "notebook.py"))
    assert "| my-fedex" in capsys.readouterr().out
    assert (own / "my-adapter/adapter_model.safetensors").is_file()


def test_a_process_without_the_method_reports_its_runs_and_says_to_register_it_for_the_rest(
    own: Path, settings_for: Make
) -> None:
    fedloom.run(settings_for(method__name="my-fedex", method__ranks=2), own / "mine")
    fedloom.unregister_method("my-fedex")
    assert exit_code(["report", str(own / "mine"), "--out", "report.html"]) == 0
    advice = "got .my-fedex.*must be registered or installed first"
    for use in (
        lambda: fedloom.load_settings("demo", ["method.name=my-fedex"]),
        lambda: fedloom.export_adapter(own / "mine", own / "exported"),
        lambda: fedloom.compare(fedloom.load_settings("demo"), ["my-fedex"], [1], own / "both"),
        lambda: fedloom.aggregate([fedloom.Adapter()], method="my-fedex"),
    ):
        with pytest.raises(fedloom.FedloomError, match=advice):
            use()


@pytest.mark.slow
def test_the_installed_method_of_the_page_works_on_the_command_line(
    install: Callable[..., None], tmp_path: Path
) -> None:
    assert ENTRY is not None
    install("my_fedex", FEDEX, ENTRY[1].replace('"', ""))
    chosen = ["demo", "--set", "method.name=my-fedex", "--set", "method.ranks=8"]
    program = (
        "from fedloom.cli.app import exit_code\n"
        f"print([exit_code([word, *{chosen}]) for word in ('validate', 'describe')])"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert ran.stdout.splitlines()[-1] == "[0, 0]", ran.stderr
    assert 'method.name = "my-fedex"' in ran.stdout
