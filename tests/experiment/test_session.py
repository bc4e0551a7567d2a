"""A run from settings to its folder: complete, resumable anywhere, recomputable by anybody."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from fedloom.assembly.inputs import Workshop
from fedloom.assembly.round_state import CLIENTS
from fedloom.clients.memory import decode_memories, encode_memories
from fedloom.config import Settings
from fedloom.errors import DataError, FedloomError, PartitionError, RunError, SettingsError
from fedloom.experiment import compare, describe, run
from fedloom.experiment.run_summary import RunSummary
from fedloom.methods.state_codec import NUMBERS, TENSORS, read_state, state_files
from fedloom.reporting.progress import PlainProgress
from fedloom.training import cores
from fedloom.training import row_losses as row_losses_module
from fedloom.training.row_losses import row_losses

Make = Callable[..., Settings]
METHODS = ("fedit", "zero-padding", "flora", "fedsa-lora", "centralised", "standalone")


def of_method(make: Make, method: str, **overrides: object) -> Settings:
    ranks: object = 2 if method in ("fedit", "fedsa-lora", "centralised") else [4, 2, 1]
    return make(method__name=method, method__ranks=ranks, **overrides)


def adapter_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted((folder / "adapter").rglob("*.safetensors"))}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_reports_and_leaves_an_adapter(method: str, settings_for: Make, tmp_path: Path) -> None:
    summary = run(of_method(settings_for, method), tmp_path / "run")
    assert summary.eval["loss_nats"] < summary.base_eval["loss_nats"]
    assert adapter_bytes(tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["round"] for record in records] == [1, 2]
    sends = method not in ("centralised", "standalone")
    assert (summary.upload_bytes > 0) is sends
    assert (summary.download_bytes > 0) is sends
    noise = records[-1]["aggregation_noise"]
    assert noise is None if not sends or method == "fedsa-lora" else (noise < 1e-6) is (method == "flora")


def test_the_base_method_scores_the_untouched_base(settings_for: Make, tmp_path: Path) -> None:
    summary = run(settings_for(method__name="base", method__ranks=1), tmp_path / "run")
    assert summary.eval == summary.base_eval
    assert summary.num_rounds == 0
    assert not (tmp_path / "run/adapter").exists()


@pytest.mark.parametrize("chosen", [1, 3, None])
def test_a_run_scores_on_the_cores_that_it_was_given(
    chosen: int | None, settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base and every evaluation, by default on all four that there are."""
    monkeypatch.setattr(cores, "_usable", lambda: 4)
    monkeypatch.setattr(cores, "PART_TOKENS", 20)
    seen = set[int]()

    def in_threads(work: Any, items: Any, number: int) -> Any:
        seen.add(number)
        return map(work, items)

    monkeypatch.setattr(row_losses_module, "in_threads", in_threads)
    run(settings_for(federation__num_rounds=1, engine__cores=chosen), tmp_path / "run")
    assert seen == {chosen or 4}


@pytest.mark.parametrize("method", METHODS)
def test_stopping_after_a_round_and_going_on_gives_the_same_bits(
    method: str, settings_for: Make, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(of_method(settings_for, method, federation__num_rounds=2), whole)
    for rounds in (1, 2):
        run(of_method(settings_for, method, federation__num_rounds=rounds), parts)
    assert adapter_bytes(whole) == adapter_bytes(parts)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(settings_for: Make, tmp_path: Path) -> None:
    settings = settings_for(federation__num_rounds=6, run__keep_updates=True)
    run(settings, tmp_path / "whole")
    recipe, killed = tmp_path / "recipe.json", tmp_path / "killed"
    recipe.write_text(json.dumps(settings.as_dict()))
    command = [sys.executable, "-m", "fedloom", "run", str(recipe), "--out", str(killed)]
    for wanted in (1, 3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (killed / "rounds" / str(wanted)).exists():
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, capture_output=True)
    assert adapter_bytes(killed) == adapter_bytes(tmp_path / "whole")
    assert len((killed / "metrics.jsonl").read_text().splitlines()) == 6


def test_anybody_can_recompute_floras_aggregate_from_the_kept_updates(settings_for: Make, tmp_path: Path) -> None:
    run(settings_for(run__keep_updates=True, method__weighting="rows"), tmp_path / "run")
    folder = tmp_path / "run/rounds/2"

    def deltas(adapter: Path) -> dict[str, np.ndarray]:
        config = json.loads((adapter / "adapter_config.json").read_text())
        tensors = load_file(adapter / "adapter_model.safetensors")
        modules = {key.split(".lora_")[0] for key in tensors}
        scale = config["lora_alpha"] / config["r"]
        return {m: scale * tensors[f"{m}.lora_B.weight"] @ tensors[f"{m}.lora_A.weight"] for m in modules}

    updates = [json.loads((c / "update.json").read_text()) for c in sorted((folder / "clients").iterdir())]
    clients = [deltas(c) for c in sorted((folder / "clients").iterdir())]
    total = sum(update["num_rows"] for update in updates)
    for module, ours in deltas(folder / "global").items():
        expected = sum(u["num_rows"] / total * c[module] for u, c in zip(updates, clients, strict=True))
        assert np.abs(ours - expected).max() < 1e-6 * np.abs(expected).max()


def test_the_adapter_on_the_stock_base_gives_the_runs_own_loss(settings_for: Make, tmp_path: Path) -> None:
    settings = settings_for()
    summary = run(settings, tmp_path / "run")
    workshop = Workshop()
    base, _ = workshop.base(settings)
    held_out = workshop.inputs(settings, base).held_out
    assert held_out is not None
    stock = AutoModelForCausalLM.from_pretrained(settings.model.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(stock, tmp_path / "run/adapter").merge_and_unload().eval()
    assert row_losses(model, held_out, token_budget=4096).mean_nats == pytest.approx(
        summary.eval["loss_nats"], abs=1e-5
    )


def test_the_cadence_of_evaluation_changes_no_result(settings_for: Make, tmp_path: Path) -> None:
    for every in (0, 1):
        run(settings_for(evaluation__every=every), tmp_path / str(every))
    assert adapter_bytes(tmp_path / "0") == adapter_bytes(tmp_path / "1")


def test_the_seed_changes_rows_clients_and_result(settings_for: Make, tmp_path: Path) -> None:
    for seed in (1, 2):
        run(settings_for(run__seed=seed, federation__clients_per_round=2), tmp_path / str(seed))
    assert adapter_bytes(tmp_path / "1") != adapter_bytes(tmp_path / "2")
    one, two = ((tmp_path / s / "partition.json").read_bytes() for s in "12")
    assert one != two


def test_a_run_gets_more_rounds_but_never_fewer(settings_for: Make, tmp_path: Path) -> None:
    run(settings_for(federation__num_rounds=2), tmp_path / "run")
    before = (tmp_path / "run/config.json").read_bytes()
    with pytest.raises(RunError, match="expected at least the 2 rounds it has completed, got 1"):
        run(settings_for(federation__num_rounds=1), tmp_path / "run")
    assert (tmp_path / "run/config.json").read_bytes() == before


def test_a_run_that_failed_in_its_first_round_gives_way_to_other_settings(settings_for: Make, tmp_path: Path) -> None:
    with pytest.raises(FedloomError, match=r"mend the cause and run again$"):
        run(settings_for(training__learning_rate=1e-300), tmp_path / "run")
    summary = run(settings_for(partition__categories_per_client=1), tmp_path / "run")
    assert summary.num_rounds == 2


def test_a_damaged_state_is_named_with_the_way_on(settings_for: Make, tmp_path: Path) -> None:
    run(settings_for(federation__num_rounds=2), tmp_path / "run")
    whole = (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()
    state = tmp_path / "run/rounds/2/state/server.safetensors"
    state.write_bytes(state.read_bytes()[:30])
    with pytest.raises(RunError, match=r"server\.safetensors: expected what .*; remove .*rounds/2 to resume from"):
        run(settings_for(federation__num_rounds=2), tmp_path / "run")
    shutil.rmtree(tmp_path / "run/rounds/2")
    run(settings_for(federation__num_rounds=2), tmp_path / "run")
    assert (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes() == whole


def test_a_run_whose_schedule_spans_it_is_not_extended(settings_for: Make, tmp_path: Path) -> None:
    spanning = {"training__schedule": "linear", "training__schedule_span": "run"}
    run(settings_for(**spanning), tmp_path / "run")
    with pytest.raises(RunError, match="num_rounds"):
        run(settings_for(**spanning, federation__num_rounds=3), tmp_path / "run")


def test_the_folder_tells_who_holds_what(settings_for: Make, tmp_path: Path) -> None:
    run(settings_for(federation__num_rounds=1), tmp_path / "run")
    holdings = json.loads((tmp_path / "run/holdings.json").read_text())
    assert holdings["group"] == "category"
    assert [len(client["rows_by_group"]) for client in holdings["clients"]] == [2, 2, 2]
    assert sum(client["num_rows"] for client in holdings["clients"]) == 42


def test_a_16_bit_wire_halves_the_bytes(settings_for: Make, tmp_path: Path) -> None:
    full = run(settings_for(), tmp_path / "fp32")
    half = run(settings_for(wire__dtype="bf16"), tmp_path / "bf16")
    assert half.upload_bytes < 0.8 * full.upload_bytes
    assert half.eval["loss_nats"] == pytest.approx(full.eval["loss_nats"], abs=0.05)


def test_described_bytes_are_the_bytes_that_cross(settings_for: Make, tmp_path: Path) -> None:
    for method in ("flora", "zero-padding"):
        settings = of_method(settings_for, method)
        described = describe(settings)
        summary = run(settings, tmp_path / method)
        assert described.run_bytes == (summary.upload_bytes, summary.download_bytes)
        last = json.loads((tmp_path / method / "metrics.jsonl").read_text().splitlines()[-1])
        for client in last["clients"]:
            assert client["upload_bytes"] == described.upload_bytes[client["client"]]
            assert client["download_bytes"] == described.download_bytes[client["client"]]


def test_another_recipes_folder_is_refused_before_the_base_is_loaded(settings_for: Make, tmp_path: Path) -> None:
    run(settings_for(federation__num_rounds=1), tmp_path)
    (tmp_path / "partition.json").unlink()
    with pytest.raises(RunError, match=r"with others \(model.base is .* there, 'absent' asked"):
        run(settings_for(federation__num_rounds=1, model__base="absent"), tmp_path)


def test_a_description_names_the_settings_that_differ_from_their_defaults(settings_for: Make) -> None:
    described = describe(settings_for(federation__num_rounds=7))
    assert described.chosen["federation.num_rounds"] == 7
    assert "federation.num_rounds = 7" in described.lines()
    assert "wire.dtype" not in described.chosen
    assert described.as_dict()["settings"]["wire"]["dtype"] == "fp32"


def test_a_compressed_broadcast_is_described_at_the_highest_rank_its_modules_can_have(settings_for: Make) -> None:
    ranks = {"method__name": "flora", "method__ranks": [8, 8, 8]}
    stacked, compressed = (describe(settings_for(**ranks, method__broadcast=kind)) for kind in ("stack", "compressed"))
    assert compressed.download_bytes[0] < stacked.download_bytes[0]


def test_a_comparison_runs_every_method_on_the_same_rows_and_resumes(settings_for: Make, tmp_path: Path) -> None:
    settings = settings_for(federation__num_rounds=1)
    first = compare(settings, ["fedit", "flora"], [1, 2], tmp_path)
    again = compare(settings, ["fedit", "flora", "standalone"], [1, 2], tmp_path)
    hashes = {
        json.loads((s.folder / "manifest.json").read_text())["identity"]["data_sha256"]
        for s in again.runs
        if s.seed == 1
    }
    assert len(hashes) == 1
    kept = [s for s in again.runs if s.method != "standalone"]
    assert [s.eval for s in kept] == [s.eval for s in first.runs]
    assert set(again.table.cells) == {"fedit", "flora", "standalone"}
    assert json.loads((tmp_path / "comparison.json").read_text())["runs"]


@pytest.mark.parametrize(
    ("methods", "seeds", "problem"),
    [
        (["fedit", "flroa"], [1], "methods: expected names from .*, got 'flroa'; did you mean flora"),
        (["fedit", "fedit"], [1], "methods: expected each value once, got fedit twice"),
        ("fedit,flora", [1], "methods: expected a list of names, got the text 'fedit,flora'"),
        ([], [1], "methods: expected names"),
        (["fedit"], [-1], r"seeds: expected integers ≥ 0, got \[-1\]"),
        (["fedit"], "1", "seeds: expected integers ≥ 0, got '1'"),
        (["fedit"], [], "seeds: expected integers"),
    ],
)
def test_a_comparison_that_cannot_be_run_whole_runs_nothing(
    methods: Any, seeds: Any, problem: str, settings_for: Make, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=problem):
        compare(settings_for(), methods, seeds, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["comparison.json", "demo.json"])
def test_a_comparison_replaces_nobodys_file_and_goes_into_no_run(name: str, settings_for: Make, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(RunError, match=f"{name}: expected a file that fedloom wrote"):
        compare(settings_for(), ["base"], [1], tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    run(settings_for(method__name="base", method__ranks=1), tmp_path / "run")
    with pytest.raises(RunError, match="expected a folder for several runs, got a run"):
        compare(settings_for(), ["base"], [1], tmp_path / "run")


def test_dropped_rows_and_the_lack_of_held_out_ones_are_said(
    settings_for: Make, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads(rows_file.read_text())
    (tmp_path / "held.json").write_text(json.dumps([*rows[:5], {**rows[5], "response": "x" * 300}]))
    few = {"data__overlong": "drop", "data__max_length": 60, "federation__num_rounds": 1}
    from_file = settings_for(**few, data__eval_rows=None, data__eval_path=str(tmp_path / "held.json"))
    run(from_file, tmp_path / "run", progress=PlainProgress(sys.stderr))
    assert "5 of 6 rows kept; dropped: 1 too long" in capsys.readouterr().err
    identity = json.loads((tmp_path / "run/manifest.json").read_text())["identity"]
    assert identity["held_out_row_counts"]["num_overlong_dropped"] == 1
    run(settings_for(**few, data__eval_rows=None), tmp_path / "none", progress=PlainProgress(sys.stderr))
    assert "no rows are held out" in capsys.readouterr().err


def test_centralised_takes_as_many_steps_as_all_clients_together(settings_for: Make, tmp_path: Path) -> None:
    def rows_seen(summary: RunSummary) -> int:
        lines = (summary.folder / "metrics.jsonl").read_text().splitlines()
        return sum(client["num_steps"] for line in lines for client in json.loads(line)["clients"])

    runs = [run(of_method(settings_for, m), tmp_path / m) for m in ("fedit", "centralised", "standalone")]
    assert {rows_seen(summary) for summary in runs} == {12}


MISTAKES = {
    "more clients than rows": (
        {"partition__scheme": "iid", "partition__column": None, "federation__num_clients": 60, "method__ranks": 1},
        "60",
    ),
    "an absent column": ({"partition__column": "topic"}, "topic"),
    "a row longer than allowed": ({"data__max_length": 10}, "10"),
    "another template": ({"data__template": "nothing-like-it"}, "nothing-like-it"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_and_leaves_nothing_behind(mistake: str, settings_for: Make, tmp_path: Path) -> None:
    overrides, named = MISTAKES[mistake]
    with pytest.raises(FedloomError, match=named):
        run(settings_for(**overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_other_settings_rows_or_base_is_refused(
    settings_for: Make, rows_file: Path, tmp_path: Path
) -> None:
    run(settings_for(), tmp_path / "run")
    with pytest.raises(RunError, match=r"training\.learning_rate"):
        run(settings_for(training__learning_rate=0.5), tmp_path / "run")
    before = rows_file.read_text()
    try:
        rows_file.write_text(before.replace("cat", "cow"))
        with pytest.raises((RunError, PartitionError, DataError)):
            run(settings_for(), tmp_path / "run")
    finally:
        rows_file.write_text(before)


def test_a_state_survives_its_files_to_the_last_bit(settings_for: Make, tmp_path: Path) -> None:
    run(settings_for(server__step="momentum", method__broadcast="compressed", method__tolerance=0.1), tmp_path / "run")
    folder = tmp_path / "run/rounds/2"
    files = {name: (folder / name).read_bytes() for name in (TENSORS, NUMBERS)}
    assert state_files(read_state(files[TENSORS], files[NUMBERS])) == files
    run(of_method(settings_for, "standalone"), tmp_path / "alone")
    round_folder = tmp_path / "alone/rounds/2"
    memories = decode_memories((round_folder / CLIENTS).read_bytes())
    assert sorted(memories) == [0, 1, 2]
    assert all(memory.own and memory.moments for memory in memories.values())
    assert encode_memories(memories) == (round_folder / CLIENTS).read_bytes()


def write_sites(folder: Path, rows: Path) -> None:
    """Write one file per site, the later name in the alphabet with fewer rows."""
    folder.mkdir()
    given = json.loads(rows.read_text())
    (folder / "site10.json").write_text(json.dumps(given[:20]))
    (folder / "site9.json").write_text(json.dumps(given[20:]))


def test_named_clients_get_their_own_rank_and_the_config_stays_as_written(
    settings_for: Make, rows_file: Path, tmp_path: Path
) -> None:
    write_sites(tmp_path / "sites", rows_file)
    shared = {
        "data__path": str(tmp_path / "sites"),
        "partition__scheme": "natural",
        "partition__column": None,
        "partition__categories_per_client": 2,
        "federation__num_clients": 2,
    }
    named = settings_for(**shared, method__ranks={"site10": 1, "site9": 4})
    listed = settings_for(**shared, method__ranks=[4, 1])
    assert describe(named).names == ("site9", "site10")
    assert describe(named).client_ranks == (4, 1)
    assert describe(named).upload_bytes == describe(listed).upload_bytes
    run(named, tmp_path / "named")
    run(listed, tmp_path / "listed")
    assert adapter_bytes(tmp_path / "named") == adapter_bytes(tmp_path / "listed")
    config = json.loads((tmp_path / "named/config.json").read_text())
    assert config["method"]["ranks"] == {"site10": 1, "site9": 4}
    run(named, tmp_path / "named")
    wrong = settings_for(**shared, method__ranks={"site10": 1, "site8": 4})
    for refused in (lambda: run(wrong, tmp_path / "wrong"), lambda: describe(wrong)):
        with pytest.raises(SettingsError, match='one for "site8", which is not a client; did you mean site9'):
            refused()
    assert not (tmp_path / "wrong").exists()


def test_a_saved_partition_of_another_order_is_asked_for_the_names(
    settings_for: Make, rows_file: Path, tmp_path: Path
) -> None:
    write_sites(tmp_path / "sites", rows_file)
    shared = {"data__path": str(tmp_path / "sites"), "partition__scheme": "natural", "partition__column": None}
    settings = settings_for(**shared, federation__num_clients=2, method__ranks={"site10": 1, "site9": 4})
    workshop = Workshop()
    partition = workshop.inputs(settings, workshop.base(settings)[0]).partition
    owner = 1 - partition.owner_of_row()
    saved = type(partition).from_owners(owner, ["site10", "site9"])
    saved.save(tmp_path / "saved.json", workshop.inputs(settings, workshop.base(settings)[0]).data_sha256)
    again = settings_for(
        **shared,
        partition__path=str(tmp_path / "saved.json"),
        federation__num_clients=2,
        method__ranks={"site10": 1, "site9": 4},
    )
    run(again, tmp_path / "run")
    holdings = json.loads((tmp_path / "run/holdings.json").read_text())
    assert [(client["name"], client["rank"]) for client in holdings["clients"]] == [("site10", 1), ("site9", 4)]
