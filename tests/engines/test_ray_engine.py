"""Ray as an engine: the same bits as in one process, whoever dies, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedloom.assembly import cluster_worker
from fedloom.assembly.engine_choice import engine_of
from fedloom.cli.app import exit_code
from fedloom.config import Settings
from fedloom.engines import ray_cluster
from fedloom.engines.crew import TaskRaisedError
from fedloom.errors import MethodError, MissingExtraError, ModelError, RunError
from fedloom.experiment import loop, run
from fedloom.methods import table
from fedloom.reporting.progress import PlainProgress

Make = Callable[..., Settings]


def kept(folder: Path) -> dict[str, bytes]:
    """Return all tensors that a run left: adapter, server's state, clients' memories."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def figures(folder: Path) -> list[Any]:
    """Return what the rounds came to, without what depends on the clock."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("eval", "train_loss_nats", "upload_bytes", "download_bytes", "aggregation_noise", "change_norm")
    return [[record[name] for name in names] for record in records]


def of_method(make: Make, method: str, **overrides: object) -> Settings:
    ranks: object = 2 if table.traits_of(method).needs_one_rank else [4, 2, 1]
    return make(method__name=method, method__ranks=ranks, federation__num_rounds=3, **overrides)


def ray_processes() -> list[psutil.Process]:
    return [one for one in psutil.Process().children(recursive=True) if "ray" in " ".join(one.cmdline())]


@pytest.fixture(scope="class")
def ray_session() -> Iterator[None]:
    """Start one Ray for the tests of a class; afterwards none of its processes is left."""
    with ray_cluster.running_ray(None, ray_cluster.Resources(1.0, 0.0, 4)):
        assert ray_processes()
        yield
    assert not ray_processes()


def on_ray(workers: int = 2, **more: object) -> dict[str, object]:
    return {"engine__name": "ray", "engine__workers": workers, **more}


def test_without_ray_the_error_names_the_extra_before_anything_is_loaded(
    settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"'cluster'.*pip install 'fedloom\[cluster\]'"):
        run(settings_for(**on_ray()), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_method_of_this_process_alone_is_refused(
    settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "ray_module", lambda address: None)
    own = replace(table.get("zero-padding"), traits=replace(table.traits_of("zero-padding"), name="own"))
    table.register_method(own)
    try:
        with pytest.raises(MethodError, match="expected a method of an installed package"):
            run(settings_for(method__name="own", **on_ray()), tmp_path / "run")
    finally:
        table.unregister_method("own")


@pytest.mark.extra("cluster")
@pytest.mark.parametrize("method", ["centralised", "splitlora"])
def test_a_method_that_has_no_clients_to_deal_out_says_that_it_trains_here(
    method: str, settings_for: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut: dict[str, object] = {"split__cut_layer": 1} if method == "splitlora" else {}
    ranks = {"method__name": method, "method__ranks": 2}
    run(settings_for(**ranks, **cut, **on_ray()), tmp_path / "ray", progress=PlainProgress(sys.stderr))
    assert f"{method} trains in this process: engine.name = ray deals out" in capsys.readouterr().err
    run(settings_for(**ranks, **cut), tmp_path / "local")
    assert kept(tmp_path / "ray") == kept(tmp_path / "local")


def test_what_differs_at_a_worker_is_named_with_both_values() -> None:
    here = {"base_sha256": "a" * 64, "device": "cpu", "torch": "2.9"}
    assert cluster_worker.difference(here, {**here, "node": "n1"}) is None
    told = cluster_worker.difference(here, {**here, "base_sha256": "b" * 64, "node": "n1"})
    assert told == f"a worker on n1: expected base_sha256 {'a' * 12}, as here, got {'b' * 12}"
    assert "torch 2.9" in str(cluster_worker.difference(here, {**here, "torch": "2.8", "node": "n1"}))


@pytest.mark.slow
@pytest.mark.extra("cluster")
@pytest.mark.usefixtures("ray_session")
class TestOnRay:
    """All with one Ray."""

    def test_every_part_of_it_listens_on_the_loopback_address_alone(self) -> None:
        for process in [psutil.Process(), *ray_processes()]:
            heard = [one.laddr.ip for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN]
            assert {ip.removeprefix("::ffff:") for ip in heard} <= {"127.0.0.1", "::1"}, process.cmdline()

    @pytest.mark.parametrize("workers", [1, 3])
    def test_the_number_of_workers_changes_nothing(self, workers: int, settings_for: Make, tmp_path: Path) -> None:
        own = {"wire__dtype": "bf16", "evaluation__batch_tokens": 40}
        run(of_method(settings_for, "flora", **own), tmp_path / "local")
        run(of_method(settings_for, "flora", **own, **on_ray(workers)), tmp_path / "ray")
        assert kept(tmp_path / "ray") == kept(tmp_path / "local")
        assert figures(tmp_path / "ray") == figures(tmp_path / "local")

    @pytest.mark.parametrize("seed", [1, 2])
    def test_a_worker_killed_at_any_moment_changes_nothing(
        self, seed: int, settings_for: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        settings = {"federation__num_rounds": 12, "training__local_steps": 6}
        run(settings_for(**settings), tmp_path / "local")
        stop = threading.Event()

        def kill() -> None:
            while not (tmp_path / "ray/rounds" / str(2 * seed)).exists() and not stop.is_set():
                time.sleep(0.001)
            time.sleep(0.037 * seed)
            workers = [one for one in ray_processes() if "ray::Worker" in " ".join(one.cmdline())]
            if workers:
                workers[0].kill()

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            run(settings_for(**settings, **on_ray()), tmp_path / "ray", progress=PlainProgress(sys.stderr))
        finally:
            stop.set()
            killer.join()
        assert kept(tmp_path / "ray") == kept(tmp_path / "local")
        assert figures(tmp_path / "ray") == figures(tmp_path / "local")
        assert "a worker was lost" in capsys.readouterr().err

    def test_a_run_goes_on_with_another_engine_to_the_same_bits(self, settings_for: Make, tmp_path: Path) -> None:
        run(of_method(settings_for, "rolora", training__dropout=0.1), tmp_path / "whole")
        for rounds, engine in ((1, {}), (2, on_ray()), (3, {})):
            settings = settings_for(
                method__name="rolora",
                method__ranks=2 if table.traits_of("rolora").needs_one_rank else [4, 2, 1],
                federation__num_rounds=rounds,
                training__dropout=0.1,
                **engine,
            )
            run(settings, tmp_path / "parts")
        assert kept(tmp_path / "parts") == kept(tmp_path / "whole")

    def test_a_worker_with_another_base_is_one_line(
        self, settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        proof = cluster_worker.proof_of
        monkeypatch.setattr(cluster_worker, "proof_of", lambda *_: {**proof(*_), "base_sha256": "f" * 64})
        with pytest.raises(ModelError, match="expected base_sha256 ffffffffffff, as here, got") as caught:
            run(settings_for(**on_ray(1)), tmp_path / "run")
        assert "\n" not in str(caught.value)

    def test_a_base_that_cannot_be_trained_ends_the_run_in_one_line(
        self, settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def furnished(*given: Any) -> Any:  # goes to the workers as it is
            from fedloom.assembly.cluster_worker import furnish
            from fedloom.errors import ModelError

            def unsuitable(*_: object) -> None:
                raise ModelError("model.base: unsuitable")

            station = furnish(*given)
            station.base.train = unsuitable  # type: ignore[method-assign, assignment]
            return station

        monkeypatch.setattr(cluster_worker, "furnish", furnished)
        with pytest.raises(ModelError, match=r"^model\.base: unsuitable$"):
            run(settings_for(**on_ray(1)), tmp_path / "run")

    def test_more_workers_than_there_is_room_for_is_one_line(self, settings_for: Make, tmp_path: Path) -> None:
        with pytest.raises(RunError, match=r"engine\.workers: expected at most 4 .* got 9"):
            run(settings_for(**on_ray(9)), tmp_path / "run")

    def test_what_no_worker_scores_this_process_does(
        self, settings_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run(settings_for(evaluation__batch_tokens=40), tmp_path / "local")
        monkeypatch.setattr(loop, "engine_of", _without_scores)
        run(settings_for(evaluation__batch_tokens=40, **on_ray(1)), tmp_path / "ray")
        assert figures(tmp_path / "ray") == figures(tmp_path / "local")


def _without_scores(*given: Any) -> Any:
    """Return an engine whose workers' scores do not arrive."""

    def refusing(answer: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def answered(call: Any) -> Any:
            found = answer(call)
            if isinstance(found, list) and isinstance(found[0], tuple) and len(found[0]) == 2:
                raise TaskRaisedError("no scores today")
            return found

        return answered

    @contextmanager
    def broken() -> Iterator[Any]:
        with engine_of(*given) as engine:
            engine.crew.hiring.answer = refusing(engine.crew.hiring.answer)  # type: ignore[attr-defined]
            yield engine

    return broken()


@pytest.mark.slow
@pytest.mark.extra("cluster")
def test_a_driver_that_is_killed_leaves_no_process_and_goes_on_to_the_same_bits(
    settings_for: Make, tmp_path: Path
) -> None:
    settings = settings_for(federation__num_rounds=6, training__local_steps=6)
    run(settings, tmp_path / "whole")
    recipe, killed = tmp_path / "recipe.json", tmp_path / "killed"
    recipe.write_text(json.dumps(settings.as_dict()))
    command = [sys.executable, "-m", "fedloom", "run", str(recipe), "--out", str(killed)]
    driver = subprocess.Popen([*command, "--set", "engine.name=ray", "--set", "engine.workers=2"])
    while driver.poll() is None and not (killed / "rounds/2").exists():
        time.sleep(0.005)
    theirs = psutil.Process(driver.pid).children(recursive=True)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs(theirs, timeout=120)  # Ray's agents look for their parent now and then
    assert not alive
    assert exit_code(["run", str(recipe), "--out", str(killed)]) == 0
    assert kept(killed / "adapter") == kept(tmp_path / "whole/adapter")


@pytest.mark.slow
@pytest.mark.extra("cluster")
def test_an_address_where_nothing_answers_is_one_line(settings_for: Make, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(settings_for().as_dict()))
    is_there_one = any("gcs_server" in one.name() for one in psutil.process_iter())  # somebody's, which auto would find
    for address in ("127.0.0.1:9", "nonsense", *([] if is_there_one else ["auto"])):
        command = [sys.executable, "-m", "fedloom", "run", str(recipe), "--out", str(tmp_path / "run")]
        found = subprocess.run(
            [*command, "--set", "engine.name=ray", "--set", f"engine.address={address}"],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert found.returncode == 2, found.stderr
        lines = [line for line in found.stderr.splitlines() if line.startswith("error:")]
        assert len(lines) == 1, found.stderr
        assert f"engine.address: expected a running Ray cluster at '{address}'" in lines[0]
        assert "Traceback" not in found.stderr
