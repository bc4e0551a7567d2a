"""A run that starts from an adapter: beside the base for everybody, or where training begins; checked wherever read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.config import Settings
from fedloom.errors import AdapterError, FedloomError, RunError, SettingsError
from fedloom.experiment import describe, run
from fedloom.experiment.session import Session
from fedloom.lora.algebra import distance, norm, truncate
from fedloom.lora.peft_files import load_peft, save_peft
from fedloom.results.export import export_adapter
from fedloom.results.held_out import evaluate
from fedloom.results.opened_result import find_result, open_result

Make = Callable[..., Settings]
ONE_RANK = ("fedit", "fedsa-lora", "centralised")
CONTINUES = ("fedit", "zero-padding", "weave", "ffa-lora", "rolora", "fedsa-lora", "centralised", "standalone")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("start") / "run"


@pytest.fixture
def adapter(trained: Path, settings_for: Make) -> Path:
    """Return the folder of an adapter of rank 2 that a run has trained."""
    if not trained.exists():
        run(settings_for(method__name="fedit", method__ranks=2, federation__num_rounds=1), trained)
    return trained / "adapter"


def starting(make: Make, adapter: Path, method: str, **changes: Any) -> Settings:
    ranks: object = 2 if method in ONE_RANK else [2, 2, 1]
    given = {"method__name": method, "method__ranks": ranks, "federation__num_rounds": 1}
    return make(**given | {"model__adapter": str(adapter)} | changes)


def end_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "finished.json").read_text())
    return found


@pytest.mark.parametrize("method", ["fedit", "flora", "fedsa-lora", "standalone"])
def test_base_and_released_adapter_are_what_was_scored(
    method: str, adapter: Path, settings_for: Make, tmp_path: Path
) -> None:
    run(starting(settings_for, adapter, method), tmp_path / "run")
    measured, ended = evaluate(open_result(tmp_path / "run")), end_of(tmp_path / "run")
    assert measured.mean_nats == pytest.approx(ended["eval"]["loss_nats"], rel=1e-4)
    begun = evaluate(open_result(adapter.parent))
    assert ended["base_eval"]["loss_nats"] == pytest.approx(begun.mean_nats, rel=1e-4)
    after = find_result(tmp_path / "run", 1).adapters
    for name, found in find_result(tmp_path / "run").adapters.items():
        assert distance(found, after[name]) < 1e-5 * norm(found)


def test_without_training_the_result_is_the_adapter(adapter: Path, settings_for: Make, tmp_path: Path) -> None:
    run(settings_for(method__name="base", model__adapter=str(adapter)), tmp_path / "run")
    found = find_result(tmp_path / "run").adapters["result"]
    assert distance(found, load_peft(adapter)) < 1e-5 * norm(found)


@pytest.mark.parametrize("method", CONTINUES)
def test_an_adapter_that_is_continued_is_where_training_begins(
    method: str, adapter: Path, settings_for: Make, tmp_path: Path
) -> None:
    """With next to no learning rate the result is next to the adapter: of the first slots, where a client has fewer."""
    ranks: object = [2, 2, 1] if method == "standalone" else 2
    continued = {"model__train_adapter": True, "training__learning_rate": 1e-6, "method__ranks": ranks}
    run(starting(settings_for, adapter, method, **continued), tmp_path / "still")
    start, found = load_peft(adapter), find_result(tmp_path / "still").adapters
    assert {max(one.ranks.values()) for one in found.values()} == ({1, 2} if method == "standalone" else {2})
    for one in found.values():
        wanted = truncate(start, max(one.ranks.values()))
        assert distance(one, wanted) < 1e-2 * norm(wanted)


def test_continuing_lowers_the_loss_from_where_it_was(adapter: Path, settings_for: Make, tmp_path: Path) -> None:
    run(starting(settings_for, adapter, "fedit", model__train_adapter=True), tmp_path / "run")
    assert end_of(tmp_path / "run")["eval"]["loss_nats"] < end_of(adapter.parent)["eval"]["loss_nats"]
    assert max(find_result(tmp_path / "run").adapters["result"].ranks.values()) == 2


def test_a_killed_run_goes_on_to_the_same_bits_and_another_adapter_is_refused(
    adapter: Path, settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    shutil.copytree(adapter, own)
    settings = starting(settings_for, own, "flora", federation__num_rounds=2)
    run(settings, tmp_path / "whole")
    real = Session._prune

    def killed(self: Session, *given: Any) -> None:
        real(self, *given)
        if self.folder.last_round() == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Session, "_prune", killed)
        with pytest.raises(KeyboardInterrupt):
            run(settings, tmp_path / "cut")
    save_peft(load_peft(own).scaled(2.0), own, base_name=str(settings.model.base))
    with pytest.raises(RunError, match="adapter_sha256"):
        run(settings, tmp_path / "cut")
    with pytest.raises(RunError, match="expected the adapter that the run started from"):
        find_result(tmp_path / "cut")
    shutil.rmtree(own)
    shutil.copytree(adapter, own)
    run(settings, tmp_path / "cut")
    files = [tmp_path / name / "adapter/adapter_model.safetensors" for name in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_modules_are_the_adapters_own_by_default(adapter: Path, settings_for: Make) -> None:
    assert set(describe(starting(settings_for, adapter, "fedit")).target_modules) == set(load_peft(adapter))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__target_modules": ["q_proj"]}, "set model.target_modules to all of"),
        ({"model__train_adapter": True, "method__ranks": 3}, "set method.ranks to the adapter's"),
        ({"model__train_adapter": True, "model__target_modules": ["q_proj", "k_proj", "v_proj"]}, "it lacks"),
    ],
)
def test_an_adapter_that_does_not_fit_is_named_and_leaves_nothing(
    changes: dict[str, Any], said: str, adapter: Path, settings_for: Make, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=said):
        run(starting(settings_for, adapter, "fedit", **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_another_base_is_refused_by_hash(adapter: Path, settings_for: Make, tmp_path: Path) -> None:
    export_adapter(adapter, tmp_path / "other")
    weights = tmp_path / "other/adapter_model.safetensors"
    sha256 = json.loads((adapter.parent / "manifest.json").read_text())["identity"]["base_sha256"]
    weights.write_bytes(weights.read_bytes().replace(sha256.encode(), b"0" * 64))
    with pytest.raises(FedloomError, match=r"set model\.base to its own base"):
        run(starting(settings_for, tmp_path / "other", "fedit"), tmp_path / "run")


@pytest.mark.parametrize(
    ("method", "changes", "said"),
    [
        ("flora", {"model__train_adapter": True}, "model.train_adapter only with method.name"),
        ("fedit", {"model__train_adapter": True, "model__adapter": None}, "set model.adapter to a PEFT folder"),
        ("fedit", {"model__train_adapter": True, "method__initialisation": "gradient"}, "start from the gradient"),
        ("splitlora", {"split__cut_layer": 1, "method__ranks": 2}, "model.adapter only with method.name"),
    ],
)
def test_settings_that_go_against_it_are_refused(
    method: str, changes: dict[str, Any], said: str, adapter: Path, settings_for: Make
) -> None:
    with pytest.raises(SettingsError, match=said):
        starting(settings_for, adapter, method, **changes)


def test_a_frozen_adapter_moves_no_message(adapter: Path, settings_for: Make, tmp_path: Path) -> None:
    """It is beside the base at every client: what crosses is what would cross without it."""
    run(starting(settings_for, adapter, "fedit"), tmp_path / "with")
    records = [
        json.loads((tmp_path / "with/metrics.jsonl").read_text()),
        json.loads((adapter.parent / "metrics.jsonl").read_text()),
    ]
    assert records[0]["upload_bytes"] == records[1]["upload_bytes"]
    assert records[0]["download_bytes"] == records[1]["download_bytes"]
    assert not torch.equal(torch.tensor(records[0]["train_loss_nats"]), torch.tensor(records[1]["train_loss_nats"]))
