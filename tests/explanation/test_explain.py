"""``fedloom explain`` on runs of every method: what it says is what the run did; what it cannot say names a setting."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.cli.app import exit_code
from fedloom.config import Settings
from fedloom.errors import RunError
from fedloom.experiment.session import run
from fedloom.explanation.explain import Explanation, explain
from fedloom.explanation.kept import state_after
from fedloom.explanation.page import html_of, short_names
from fedloom.lora.peft_files import load_peft
from fedloom.methods import table
from fedloom.methods.table import traits_of
from fedloom.run_folder.reader import read_run

KEEP = {"run__keep_updates": True, "run__keep_states": "all"}
WEAVE_ROUNDS = {"server__step": "plain", "training__moments": "shared"}
RUNS: dict[str, tuple[str, dict[str, object]]] = {
    **{name: (name, {}) for name in table.names("is_trained") if not traits_of(name).is_cut},
    "weave in short rounds": ("weave", WEAVE_ROUNDS),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run_of(runs: Path, settings_for: Callable[..., Settings]) -> Callable[[str], Path]:
    """Return a function that runs a named case once, and returns its folder; do not change it."""

    def ran(case: str) -> Path:
        name, more = RUNS[case]
        folder = runs / case.replace(" ", "-")
        if not folder.exists():
            wanted: dict[str, object] = {"method__name": name, **more}
            if name == "weave" and not more:
                wanted["training__local_steps"] = 1
            if traits_of(name).needs_one_rank:
                wanted["method__ranks"] = 2
            keeps = KEEP if traits_of(name).runs_rounds else {}
            run(settings_for(**wanted, **keeps), folder)
        return folder

    return ran


def product(folder: Path, module: str) -> torch.Tensor:
    return load_peft(folder)[module].to(torch.float64).delta()


@pytest.mark.parametrize("case", RUNS)
def test_every_method_is_explained(case: str, run_of: Callable[[str], Path]) -> None:
    folder = run_of(case)
    found, traits = explain(folder), traits_of(RUNS[case][0])
    assert (found.round, len(found.rounds)) == (2, 2)
    for one in found.modules:
        assert one.shape is not None
        assert 0.0 < one.shape.stable_rank <= one.shape.effective_rank + 1e-6
        assert one.shape.effective_rank <= one.shape.numerical_rank + 1e-6
        if traits.aggregates:
            assert 0.0 <= one.agreement <= 1.0  # type: ignore[operator]
            assert -1.0 <= one.cosine <= 1.0  # type: ignore[operator]
    assert (found.pairs is not None) == traits.aggregates
    assert found.missing == ()
    assert found.notes == ()
    text = "\n".join(found.lines())
    assert all(one.module in text for one in found.modules)
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["round"] == 2
    assert "<svg" in html_of(found)


def test_the_spectrum_and_the_change_are_those_of_the_adapters_on_disk(run_of: Callable[[str], Path]) -> None:
    folder = run_of("zero-padding")
    one = explain(folder).modules[0]
    assert one.shape is not None
    after, before = (product(folder / "rounds" / n / "global", one.module) for n in ("2", "1"))
    expected = torch.linalg.svdvals(after)[: len(one.shape.singular_values)]
    assert one.shape.singular_values == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-9)
    assert one.change_norm == pytest.approx(float((after - before).norm()), rel=1e-5)


def test_noise_and_agreement_are_those_of_the_uploads_on_disk(run_of: Callable[[str], Path]) -> None:
    folder = run_of("zero-padding")
    found = explain(folder, module="layers.0.self_attn.q_proj")
    (one,) = found.modules
    first = read_run(folder)
    start = state_after(first, 1, traits_of("zero-padding")).server.start[one.module].to(torch.float64)  # type: ignore[union-attr,index]
    mean, squares, mean_change, changes = 0.0, 0.0, 0.0, []
    for client in first.records[1]["clients"]:
        ended = load_peft(folder / "rounds/2/clients" / str(client["client"]))[one.module].to(torch.float64)
        change = ended.delta() - start.b_OR[:, : ended.rank] @ start.a_RI[: ended.rank]
        mean, mean_change = mean + client["weight"] * ended.delta(), mean_change + client["weight"] * change
        squares += client["weight"] * float(change.square().sum())
        changes.append(change.flatten())
    applied = product(folder / "rounds/2/global", one.module)
    assert one.aggregation_noise == pytest.approx(float((applied - mean).norm() / mean.norm()), rel=1e-4)
    assert one.agreement == pytest.approx(float(mean_change.square().sum()) / squares, rel=1e-4)
    assert found.rounds[1].agreement == pytest.approx(one.agreement, rel=1e-4)
    assert found.pairs is not None
    expected = torch.cosine_similarity(changes[0], changes[1], dim=0)
    assert found.pairs.of_module[one.module][0][1] == pytest.approx(float(expected), abs=1e-5)


def test_figures_of_a_run_that_did_not_record_them_come_from_its_states(
    run_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_of("fedit")
    recorded = explain(folder)
    whole = read_run(folder)
    bare = [{key: value for key, value in record.items() if key != "modules"} for record in whole.records]
    object.__setattr__(whole, "records", tuple(bare))
    monkeypatch.setattr("fedloom.explanation.explain.read_run", lambda path: whole)
    found = explain(folder)
    changes = [one.change_norm for one in recorded.modules]
    assert [one.change_norm for one in found.modules] == pytest.approx(changes, rel=1e-4)
    assert [one.agreement for one in found.modules] == [None] * len(changes)
    assert "earlier version" in found.notes[0]


def test_moments_are_shown_where_there_are_any(run_of: Callable[[str], Path]) -> None:
    for case, whose in (("weave", "server"), ("weave in short rounds", "shared"), ("centralised", "own")):
        found = explain(run_of(case))
        assert whose in found.moments
        for one in found.modules:
            assert all(factor.step is not None and factor.step > 0.0 for factor in one.moments.values())
            assert one.moments.keys() == {"a", "b"}
    assert explain(run_of("flora")).moments == ""


def test_a_split_run_is_explained_as_far_as_it_goes(settings_for: Callable[..., Settings], tmp_path: Path) -> None:
    settings = settings_for(method__name="splitlora", split__cut_layer=1, method__ranks=2, run__keep_states="all")
    run(settings, tmp_path / "cut")
    found = explain(tmp_path / "cut")
    assert all(one.shape is not None and one.agreement is None for one in found.modules)
    assert all(one.change_norm is not None for one in found.modules)
    assert "cut model" in found.notes[0]
    assert found.pairs is None
    assert found.lines()


@pytest.fixture
def bare(settings_for: Callable[..., Settings], tmp_path: Path) -> Path:
    """Return the folder of a run of three rounds that keeps what runs keep by default."""
    run(settings_for(method__name="zero-padding", federation__num_rounds=3), tmp_path / "bare")
    return tmp_path / "bare"


def test_what_is_not_kept_names_the_setting_that_keeps_it(bare: Path) -> None:
    found = explain(bare)
    assert [one.rpartition("; ")[2] for one in found.missing] == [
        'set run.keep_states = "all"',
        "set run.keep_updates = true",
    ]
    assert [one.effective_rank is None for one in found.rounds] == [True, False, False]
    assert all(one.agreement is not None for one in found.rounds)
    first = explain(bare, round=1)
    assert all(one.shape is None and one.agreement is not None for one in first.modules)
    assert "the state after round 1" in first.missing[0]
    assert first.lines()
    assert html_of(first)


def test_a_run_that_stopped_is_explained_and_said_to_be_unfinished(bare: Path) -> None:
    shutil.rmtree(bare / "rounds/3")
    (bare / "finished.json").unlink()
    shutil.rmtree(bare / "adapter")
    found = explain(bare)
    assert found.round == 2
    assert "has not finished (round 2 of 3)" in found.notes[0]


WRONG: dict[str, tuple[Callable[[Path], Any], list[str], str]] = {
    "no folder": (lambda path: shutil.rmtree(path), [], "found no folder"),
    "no run": (lambda path: (path / "manifest.json").unlink(), [], "without manifest.json"),
    "another version": (lambda path: _renumber(path), [], "format"),
    "a damaged record": (lambda path: (path / "rounds/2/record.json").write_text("{}"), [], "sha256"),
    "a damaged state": (lambda path: (path / "rounds/3/state/server.safetensors").write_bytes(b"x"), [], "sha256"),
    "a missing state": (lambda path: (path / "rounds/3/state/server.safetensors").unlink(), [], "expected a file"),
    "no such round": (lambda path: None, ["--round", "9"], "expected a round from 1 to 3, got 9"),
    "no such module": (lambda path: None, ["--module", "nothing"], "expected a module of this run, such as"),
    "another file": (lambda path: (path / "x").write_text("mine"), ["--html", "x"], "found another file"),
}


def _renumber(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_explained_is_one_line(case: str, bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, options, message = WRONG[case]
    spoil(bare)
    options = [str(bare / one) if one == "x" else one for one in options]
    assert exit_code(["explain", str(bare), *options]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error


def test_the_untrained_base_has_nothing_to_explain(settings_for: Callable[..., Settings], tmp_path: Path) -> None:
    run(settings_for(method__name="base"), tmp_path / "base")
    with pytest.raises(RunError, match="expected a run that trains adapters, got method base"):
        explain(tmp_path / "base")


def test_the_command_prints_tables_json_and_a_page(
    run_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, page = run_of("flora"), tmp_path / "flora.html"
    for _ in range(2):  # an earlier page of the same kind is replaced
        assert exit_code(["explain", str(folder), "--module", "q_proj", "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "q_proj" in shown
    assert "v_proj" not in shown
    assert "<title>fedloom explain" in page.read_text()
    assert exit_code(["explain", str(folder), "--json", "--module", "*.0.*.q_proj"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["modules"]) == 1
    assert found["reading"]


def test_ranks_given_by_name_are_those_of_the_clients_of_that_name(
    settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    ranks = {"2": 1, "0": 4, "1": 2}
    settings = settings_for(method__name="zero-padding", method__ranks=ranks)
    run(settings, tmp_path / "named")
    names = {client["client"]: client["name"] for client in read_run(tmp_path / "named").records[-1]["clients"]}
    found = explain(tmp_path / "named")
    norms = {ranks[names[one["client"]]]: one["norm"] for one in read_run(tmp_path / "named").records[-1]["clients"]}
    assert {one.rank: one.client_norm for one in found.scales} == pytest.approx(norms)


def test_labels_tell_modules_apart() -> None:
    names = ["model.layers.1.self_attn.q_proj", "model.layers.2.self_attn.q_proj", "h.1.a.proj", "h.1.b.proj"]
    assert list(short_names(names).values()) == ["1.q_proj", "2.q_proj", "h.1.a.proj", "h.1.b.proj"]


def test_nothing_in_the_folder_changes(run_of: Callable[[str], Path]) -> None:
    folder = run_of("fedit")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert isinstance(explain(folder), Explanation)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
