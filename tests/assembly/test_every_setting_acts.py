"""Every setting acts or is refused, for every method: the whole schema times the whole table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

import fedloom
from fedloom.assembly import divided_rows
from fedloom.assembly import inputs as assembly_inputs
from fedloom.assembly.engine_choice import Surroundings, engine_of
from fedloom.assembly.inputs import Workshop
from fedloom.assembly.round_plan import plan_of, population_of, rules_of, training_of
from fedloom.assembly.split_run import segment_strategy, split_plan
from fedloom.config import Settings, checks, every_setting, with_method
from fedloom.config.conduct import Engine as EngineSettings
from fedloom.methods import table
from fedloom.methods.state import ServerState
from fedloom.methods.strategy import Cohort
from fedloom.preview.cut_table import devices_of
from fedloom.results.suites import suite_choice_of

Document = dict[str, dict[str, Any]]
SHAPES = {"layer": (6, 5)}
ROWS = [40, 24, 16]

# A value other than the default for every setting, and what has to be set besides for it to have a meaning at all.
OTHER: dict[str, tuple[Any, dict[str, Any]]] = {
    "model.base": ("org/other", {}),
    "model.tokenizer": ("bytes", {}),
    "model.dtype": ("float32", {}),
    "model.device": ("cpu", {}),
    "model.quantization": ("8bit", {}),
    "model.revision": ("main", {}),
    "model.trust_remote_code": (True, {}),
    "model.attention": ("padded", {}),
    "model.adapter": ("an/adapter", {}),
    "model.train_adapter": (True, {"model.adapter": "an/adapter"}),
    "model.target_modules": (("q_proj",), {}),
    "data.path": ("org/rows", {"data.template": "plain"}),
    "data.split": ("test", {}),
    "data.subset": ("one", {}),
    "data.revision": ("main", {}),
    "data.shape": ("dolly", {}),
    "data.columns": ({"instruction": "question"}, {}),
    "data.template": ("alpaca", {}),
    "data.date": ("2025-01-31", {}),
    "data.max_length": (64, {}),
    "data.overlong": ("drop", {}),
    "data.unanswered": ("drop", {}),
    "data.loss_on": ("all", {}),
    "data.eval_path": ("org/rows", {}),
    "data.eval_rows": (4, {}),
    "data.eval_fraction": (0.25, {}),
    "data.validation_fraction": (0.25, {}),
    "data.scored_seeds": ((2, 3), {"data.validation_fraction": 0.25, "data.eval_rows": 4}),
    "data.max_rows": (20, {}),
    "data.unit_column": ("patient", {"privacy.unit": "row"}),
    "data.canaries": (2, {}),
    "data.canary_clients": (("0",), {"data.canaries": 2}),
    "data.canary_repetitions": (3, {"data.canaries": 2}),
    "partition.scheme": ("natural", {"partition.column": "category"}),
    "partition.column": ("subject", {"partition.scheme": "natural"}),
    "partition.exponent": (2.0, {"partition.scheme": "power-law"}),
    "partition.concentration": (0.1, {"partition.scheme": "size"}),
    "partition.shards_per_client": (3, {"partition.scheme": "shards", "partition.column": "category"}),
    "partition.categories_per_client": (3, {"partition.scheme": "category", "partition.column": "category"}),
    "partition.min_rows": (2, {}),
    "partition.empty": ("drop", {"partition.scheme": "natural", "partition.column": "category"}),
    "partition.path": ("partition.json", {}),
    "method.ranks": (4, {}),
    "method.alpha": (3.0, {}),
    "method.scaling": ("rslora", {}),
    "method.weighting": ("tokens", {}),
    "method.initialisation": ("shared", {}),
    "method.broadcast": ("compressed", {}),
    "method.tolerance": (0.1, {"method.broadcast": "compressed"}),
    "method.broadcast_max_bytes": (0.5, {"method.broadcast": "compressed"}),
    "server.step": ("momentum", {}),
    "server.learning_rate": (2.0, {}),
    "server.momentum": (0.9, {"server.step": "momentum"}),
    "server.fedexp_cap": (3.0, {"server.step": "fedexp"}),
    "server.beta1": (0.5, {"server.step": "fedadam"}),
    "server.beta2": (0.5, {"server.step": "fedyogi"}),
    "server.epsilon": (0.5, {"server.step": "fedadagrad"}),
    "server.robust": ("clip", {}),
    "server.hostile_fraction": (0.2, {"server.robust": "krum"}),
    "federation.num_rounds": (7, {}),
    "federation.num_clients": (4, {}),
    "federation.sampling": ("rows", {"federation.clients_per_round": 2, "method.weighting": "uniform"}),
    "federation.clients_per_round": (2, {}),
    "federation.participation": ("runs/other", {}),
    "federation.min_clients": (2, {}),
    "federation.max_norm_ratio": (5.0, {}),
    "federation.max_weight": (0.5, {}),
    "training.local_steps": (9, {}),
    "training.local_epochs": (2.0, {"training.local_steps": None}),
    "training.batch_size": (3, {}),
    "training.micro_batch_size": (2, {}),
    "training.learning_rate": (0.01, {}),
    "training.schedule": ("linear", {}),
    "training.warmup_steps": (3, {}),
    "training.schedule_span": ("run", {}),
    "training.weight_decay": (0.1, {}),
    "training.beta1": (0.8, {}),
    "training.beta2": (0.99, {}),
    "training.moments": ("shared", {}),
    "training.moments_prior": (3, {"training.moments": "shared"}),
    "training.max_grad_norm": (0.5, {}),
    "training.dropout": (0.1, {}),
    "training.label_smoothing": (0.1, {}),
    "training.proximal": (0.1, {}),
    "training.control_variates": (True, {}),
    "training.token_budget": (100, {}),
    "training.checkpoint_activations": (True, {}),
    "privacy.unit": ("row", {}),
    "privacy.clip": (0.5, {"privacy.unit": "row"}),
    "privacy.noise_multiplier": (2.0, {"privacy.unit": "row"}),
    "privacy.delta": (1e-6, {"privacy.unit": "row"}),
    "privacy.rows_per_unit": (2, {"privacy.unit": "row"}),
    "privacy.max_epsilon": (3.0, {"privacy.unit": "row"}),
    "privacy.sum": ("masked", {}),
    "privacy.sketch_rank": (1, {"privacy.sum": "sketch"}),
    "privacy.noise": (
        "clients",
        {
            "privacy.unit": "client",
            "privacy.sum": "masked",
            "method.ranks": 4,
            "method.weighting": "uniform",
            "federation.num_clients": 4,
        },
    ),
    "privacy.threshold": (3, {"privacy.sum": "masked", "federation.num_clients": 4}),
    "split.cut_layer": (2, {}),
    "split.aggregation": ("flora", {}),
    "split.aggregate_every": (3, {}),
    "split.server_update": ("sequential", {}),
    "split.labels": ("client", {}),
    "split.tail_blocks": (2, {"split.labels": "client"}),
    "split.client_half": ("frozen", {}),
    "split.client_rank": (3, {}),
    "split.server_rank": (3, {}),
    "split.wire_dtype": ("int8", {}),
    "split.gradient_wire_dtype": ("int8", {}),
    "split.error_feedback": ("on", {}),
    "split.micro_batches": (2, {}),
    "devices.client_flops": (1e12, {}),
    "devices.client_memory_gib": (4.0, {}),
    "devices.uplink_mbit_per_second": (1.0, {}),
    "devices.downlink_mbit_per_second": (1.0, {}),
    "devices.latency_ms": (1.0, {}),
    "devices.server_flops": (1e12, {}),
    "devices.utilisation": (0.1, {}),
    "wire.dtype": ("bf16", {}),
    "evaluation.every": (2, {}),
    "evaluation.patience": (3, {"data.validation_fraction": 0.1}),
    "evaluation.clients": (0.1, {}),
    "evaluation.batch_tokens": (100, {}),
    "evaluation.suites": (("exact-match",), {}),
    "evaluation.paths": ({"e2e": "x"}, {"evaluation.suites": ("e2e",)}),
    "evaluation.shots": (2, {}),
    "evaluation.answering": ("text", {}),
    "evaluation.limit": (3, {}),
    "evaluation.beams": (2, {}),
    "evaluation.length_penalty": (1.0, {}),
    "evaluation.no_repeat_ngram": (0, {}),
    "evaluation.max_new_tokens": (10, {}),
    "engine.name": ("ray", {}),
    "engine.workers": (3, {"engine.name": "ray"}),
    "engine.gpus_per_worker": (0.5, {"engine.name": "ray"}),
    "engine.cpus_per_worker": (2.0, {"engine.name": "ray"}),
    "engine.address": ("auto", {"engine.name": "ray"}),
    "engine.retries": (1, {"engine.name": "ray"}),
    "engine.clients_at_once": (3, {}),
    "engine.cores": (3, {}),
    "engine.threads": (2, {}),
    "run.seed": (2, {}),
    "run.keep_updates": (True, {}),
    "run.keep_states": ("all", {}),
    "run.trackers": (("wandb",), {}),
    "run.project": ("lab", {"run.trackers": ("wandb",)}),
    "run.group": ("ablation", {"run.trackers": ("wandb",)}),
    "run.tags": (("first",), {"run.trackers": ("wandb",)}),
}
# The run's inputs are made alike for every method, those of the controls and of the base too: a run writes its
# partition and holdings, its held-out rows and their groups depend on them, and target modules are looked for in every
# base.
INPUTS = ("model.", "data.", "partition.")
# Read where it is used instead of being handed over: the line that reads it.
READ_IN = {
    "federation.participation": ("assembly/round_plan.py", "participation_of(Path(settings.federation.participation)"),
    "federation.num_clients": ("assembly/divided_rows.py", 'table.scheme == "natural" else wanted'),
    "run.seed": ("assembly/divided_rows.py", 'stream(settings.run.seed, "hold-out")'),
    "privacy.delta": ("assembly/private_rounds.py", "Budget(settings.privacy.delta, settings.privacy.max_epsilon)"),
    "privacy.max_epsilon": ("assembly/private_rounds.py", "Budget(settings.privacy.delta, settings.privacy.max"),
    "engine.name": ("assembly/engine_choice.py", 'if settings.engine.name == "ray"'),
    "engine.workers": ("assembly/engine_choice.py", "Resources(chosen.cpus_per_worker, gpus, chosen.workers)"),
    "engine.gpus_per_worker": ("assembly/engine_choice.py", "gpus = chosen.gpus_per_worker"),
    "engine.cpus_per_worker": ("assembly/engine_choice.py", "Resources(chosen.cpus_per_worker, gpus, chosen.workers)"),
    "engine.address": ("assembly/engine_choice.py", "running_ray(chosen.address, resources)"),
    "engine.retries": ("assembly/engine_choice.py", "Crew(hiring, size, welcome, chosen.retries, around.note)"),
    "engine.clients_at_once": ("assembly/clients_at_once.py", "return settings.engine.clients_at_once"),
    "engine.cores": ("assembly/cores.py", "engine.cores"),
    "engine.threads": ("assembly/inputs.py", "compute_with(settings.engine.threads)"),
    "evaluation.clients": ("assembly/client_rows.py", "share, seed = settings.evaluation.clients, settings.run.seed"),
    "evaluation.patience": ("experiment/session.py", "is_over(records, self.settings.evaluation.patience)"),
    "evaluation.suites": ("experiment/session.py", "chosen.suites"),
    "run.keep_updates": ("experiment/loop.py", "if settings.run.keep_updates"),
    "run.keep_states": ("experiment/session.py", "keep = self.settings.run.keep_states"),
    "run.trackers": ("experiment/session.py", "in chosen.trackers"),
    "run.project": ("experiment/session.py", "project=chosen.project"),
    "run.group": ("experiment/session.py", "group=chosen.group"),
    "run.tags": ("experiment/session.py", "tags=chosen.tags"),
    "devices.server_flops": ("preview/cut_table.py", "settings.devices.server_flops"),
}
UNREAD_BY_A_CUT = {
    "steps": None,
    "epochs": None,
    "total_rounds": 1,
    "token_budget": 1,
    "micro_batch_size": None,
    "checkpoint_activations": False,
}
"""What of ``LocalTraining`` a cut model's parties do not read, as ``SplitPlan`` says."""


def settings_of(method: str, **values: Any) -> Settings:
    """Return the least that is valid for a method, with other values for settings by their full names."""
    document: Document = {"method": {"name": method}, "federation": {"num_clients": 3}}
    if table.traits_of(method).is_trained:
        document["training"] = {"local_steps": 4, "batch_size": 4}
    for name, value in values.items():
        part, _, key = name.partition(".")
        document.setdefault(part, {})[key] = value
    return Settings.model_validate(document)


def default_and_other(method: str, name: str) -> tuple[Settings, Settings]:
    value, company = OTHER[name]
    needed = {other: one for other, one in company.items() if one is not None}
    return settings_of(method, **needed), settings_of(method, **{**company, name: value})


def without_functions(record: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if not callable(value)}


def in_rounds(settings: Settings) -> list[object]:
    """Return everything that a loop of rounds is made of."""
    names = tuple(map(str, range(settings.federation.num_clients)))
    inputs: Any = SimpleNamespace(
        tokens=(), rows_of=None, partition=SimpleNamespace(names=names, sizes=np.ones(len(names), int))
    )
    model: Any = nn.Linear(1, 1)
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=64))
    lora: Any = SimpleNamespace(shapes=SHAPES, model=model, check_rank=lambda rank: None)
    population = population_of(settings, inputs)
    plan = plan_of(settings, population, lora)
    strategy: Any = plan.strategy
    nobody: Any = lambda told: None  # noqa: E731
    local = settings.model_copy(update={"engine": EngineSettings()})
    around = Surroundings(inputs, lora, inputs, population, nobody, nobody)
    with engine_of(local, around, strategy.client, ServerState(), {}) as running:
        engine: Any = running
    return [
        {**without_functions(population), "rows_of": None},
        {**without_functions(plan), "strategy": None, "sample": None},
        [plan.sample(round) for round in range(1, 6)],
        {**without_functions(strategy), "cohort": (strategy.cohort.max_rank, strategy.cohort.seed)},
        (engine.training, engine.seed, engine.wire),
        devices_of(settings),  # what describe simulates
    ]


def in_a_cut(settings: Settings) -> list[object]:
    """Return everything that a split run is made of."""
    plan = split_plan(settings, [*ROWS, 8][: settings.federation.num_clients])
    strategy: Any = segment_strategy(settings, Cohort(SHAPES, 2, lambda client: 2, plan.seed))
    return [
        replace(plan, training=replace(training_of(settings), **UNREAD_BY_A_CUT)),
        (type(strategy), strategy.name, strategy.weighting),
        rules_of(settings, SHAPES),
        settings.evaluation.every,  # SplitRun.evaluate_every
        devices_of(settings),
    ]


def built(settings: Settings) -> list[object]:
    made: list[object] = [suite_choice_of(settings)]
    if settings.traits.runs_rounds:
        made += in_rounds(settings)
    if settings.traits.is_cut:
        made += in_a_cut(settings)
    return made


@cache
def source(place: str) -> str:
    return (Path(fedloom.__file__).parent / place).read_text(encoding="utf-8")


class Recorder:
    """Stands in for what inputs are made of, and keeps what it was called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[object] = []
        self.num_clients = 0
        tokens: Any = SimpleNamespace(select=lambda chosen: tokens, sha256=lambda: "")
        split = SimpleNamespace(kept=np.arange(36), held=np.arange(36, 40))
        found: dict[str, Any] = {
            "load_base": SimpleNamespace(model=SimpleNamespace(config=None), tokenizer=None, revision_hash=""),
            "resolve_targets": None,
            "lay_start": None,
            "targets_of": None,
            "LoRAModel": SimpleNamespace(close=lambda: None, set_side=lambda side: None, model=None),
            "output_head": None,
            "longest_row": 128,
            "context_of": 256,
            "emptied": ("a client without a row",),
            "load_rows": Rowlike(40),
            "by_unit": Rowlike(40),
            "read_records": None,
            "encode": SimpleNamespace(tokens=tokens, kept=np.arange(40), counts=SimpleNamespace(told="")),
            "hold_out_units": split,
            "hold_out_by_category": split,
            "set_aside": (split, None),
            "plant": (tokens, None, ()),
        }
        for name, result in found.items():
            home = (
                divided_rows if hasattr(divided_rows, name) and not hasattr(assembly_inputs, name) else assembly_inputs
            )
            monkeypatch.setattr(home, name, self._standing_in(name, lambda result=result: result))
        monkeypatch.setattr(divided_rows, "divide", self._standing_in("divide", self._partition))
        monkeypatch.setattr(assembly_inputs, "without_emptied", self._with_all)
        load = self._standing_in("Partition.load", self._partition)
        for home in (assembly_inputs, divided_rows):
            monkeypatch.setattr(home, "Partition", SimpleNamespace(load=load))

    def _partition(self) -> Any:
        return SimpleNamespace(num_clients=self.num_clients)

    def _with_all(self, settings: Settings, *_: Any) -> Settings:
        self.calls.append(("what becomes of empty clients", settings.partition.empty))
        return settings

    def _standing_in(self, name: str, result: Callable[[], Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            told = [f"a draw that begins with {one.random()}" if hasattr(one, "random") else repr(one) for one in args]
            self.calls.append((name, told, repr(sorted(named.items()))))
            return result()

        return call

    def of(self, settings: Settings) -> list[object]:
        """Return the calls that the inputs of the settings are made of."""
        self.calls, self.num_clients = [], settings.federation.num_clients
        workshop = Workshop()
        base, _ = workshop.base(settings)
        workshop.inputs(settings, base)
        return self.calls


class Rowlike:
    """Rows that only count."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        return f"{self.size} rows"

    @property
    def units(self) -> Any:
        return np.arange(self.size)

    def distinct(self) -> Rowlike:
        return self

    def one_of_each_unit(self) -> Rowlike:
        return self

    def select(self, chosen: Any) -> Rowlike:
        return Rowlike(len(chosen))


def test_every_setting_has_another_value_here() -> None:
    """A new setting is asked at once where it acts."""
    names = {name for name, _ in every_setting()}
    assert OTHER.keys() == names - {"method.name"}
    for name, field in every_setting():
        assert name == "method.name" or OTHER[name][0] != field.get_default(), name


@pytest.mark.parametrize("name", [name for name in OTHER if not name.startswith(INPUTS)])
def test_a_setting_acts_or_is_refused(name: str) -> None:
    ignored = [method for method in table.shipped() if not acts_or_is_refused(name, method)]
    assert not ignored, f"{name} is accepted and ignored by these: let it act, or give it a when="


def acts_or_is_refused(name: str, method: str) -> bool:
    before, after = default_and_other(method, name)
    problems = checks.problems(after)
    if problems:
        return {problem.setting for problem in problems} <= {name, *OTHER[name][1]}
    if name in READ_IN:
        place, line = READ_IN[name]
        return line in source(place)
    return built(before) != built(after)


@pytest.mark.parametrize("name", [*(name for name in OTHER if name.startswith(INPUTS)), "federation.num_clients"])
def test_a_setting_of_the_inputs_reaches_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    before, after = default_and_other(table.BASELINE, name)
    assert checks.problems(after) == []
    assert recorder.of(before) != recorder.of(after)


@pytest.mark.parametrize("name", list(OTHER))
def test_a_variant_of_another_method_drops_what_that_method_cannot_use(name: str) -> None:
    """Whatever an experiment sets, its comparison runs: nothing is handed on that would be refused."""
    handed_on = list[tuple[object, Document]]()
    for former in table.shipped("is_trained"):
        settings = default_and_other(former, name)[1]
        rest = settings.as_dict()
        del rest["method"]["name"]
        if (settings.traits.defaults, rest) in handed_on or checks.problems(settings):
            continue  # most methods hand on the same
        handed_on.append((settings.traits.defaults, rest))
        for method in table.shipped():
            assert checks.problems(with_method(settings, method)) == [], (former, method)


def test_a_refused_setting_says_with_which_methods_it_acts() -> None:
    (problem,) = checks.problems(settings_of("splitlora", **{"training.token_budget": 100}))
    assert problem.expected == "training.token_budget only with method.name = any but splitlora or base"
    (problem,) = checks.problems(settings_of("standalone", **{"wire.dtype": "bf16"}))
    assert problem.setting == "wire.dtype"
