"""What one setting demands of another."""

from __future__ import annotations

import pytest

from fedloom.config import Settings, with_method, with_seed
from fedloom.config.checks import problems
from fedloom.config.schema import every_setting
from fedloom.config.setting import choices, conditions
from fedloom.methods import table

ENOUGH = {"training": {"local_steps": 1}}
FROZEN, GRADIENT = {"client_half": "frozen"}, {"gradient_wire_dtype": "int8"}


def found(**tables: object) -> list[str]:
    return [problem.setting for problem in problems(Settings.model_validate(ENOUGH | tables))]


def test_the_defaults_with_a_duration_fit_together() -> None:
    assert found() == []


@pytest.mark.parametrize("method", table.shipped())
def test_every_method_is_accepted_with_one_rank(method: str) -> None:
    training = ENOUGH["training"] if table.traits_of(method).is_trained else {}
    assert found(method={"name": method}, training=training) == []


def test_fedit_refuses_different_ranks_and_names_the_methods_that_take_them() -> None:
    settings = Settings.model_validate({**ENOUGH, "method": {"ranks": (4, 2)}, "federation": {"num_clients": 2}})
    (problem,) = problems(settings)
    assert "zero-padding, flora, weave, carry, flexlora" in problem.action


def test_an_empty_list_is_not_answered_with_no_clients() -> None:
    (problem,) = problems(Settings.model_validate({**ENOUGH, "method": {"ranks": ()}}))
    assert (problem.got, problem.action) == ("0 values", "give one value, or 10")


def test_fedit_accepts_a_list_of_equal_ranks() -> None:
    assert found(method={"ranks": (4, 4)}, federation={"num_clients": 2}) == []


@pytest.mark.parametrize(
    "tables",
    [
        {"method": {"name": "flora", "ranks": (4, 2)}},
        {"method": {"alpha": (4.0, 2.0)}},
        {"method": {"name": "splitlora"}, "devices": {"client_flops": (1.0, 2.0)}},
        {"method": {"name": "splitlora"}, "split": {"cut_layer": (1, 2)}},
    ],
    ids=str,
)
def test_a_list_per_client_is_as_long_as_there_are_clients(tables: dict[str, object]) -> None:
    assert len(found(**tables)) == 1
    assert found(**tables, federation={"num_clients": 2}) == []


@pytest.mark.parametrize(
    ("tables", "setting"),
    [
        ({"method": {"name": "flora", "weighting": "norm"}}, "method.weighting"),
        ({"method": {"broadcast": "compressed"}}, "method.broadcast"),
        ({"method": {"name": "flora", "tolerance": 0.1}}, "method.tolerance"),
        ({"method": {"name": "centralised"}, "server": {"learning_rate": 2.0}}, "server.learning_rate"),
        ({"server": {"momentum": 0.9}}, "server.momentum"),
        ({"method": {"name": "base"}}, "training.local_steps"),
        ({"training": {}}, "training.local_steps"),
        ({"method": {"name": "splitlora"}, "split": {**FROZEN, "aggregation": "flora"}}, "split.aggregation"),
        ({"method": {"name": "splitlora"}, "split": {**FROZEN, "client_rank": 2}}, "split.client_rank"),
        ({"method": {"name": "splitlora"}, "split": {**FROZEN, "error_feedback": "on"}}, "split.error_feedback"),
        ({"method": {"name": "splitlora"}, "split": {**FROZEN, **GRADIENT}}, "split.gradient_wire_dtype"),
        ({"server": {"step": "momentum", "fedexp_cap": 3.0}}, "server.fedexp_cap"),
        ({"split": {"cut_layer": 2}}, "split.cut_layer"),
        ({"partition": {"concentration": 0.1}}, "partition.concentration"),
        ({"partition": {"scheme": "dirichlet"}}, "partition.column"),
        ({"federation": {"clients_per_round": 11}}, "federation.clients_per_round"),
        ({"federation": {"clients_per_round": 0.5, "min_clients": 6}}, "federation.min_clients"),
        ({"data": {"max_rows": 9}}, "data.max_rows"),
        ({"data": {"max_rows": 19, "eval_rows": 10}}, "data.max_rows"),
        ({"data": {"eval_rows": 10, "eval_fraction": 0.1}}, "data.eval_rows"),
        ({"training": {"local_steps": 1, "batch_size": 4, "micro_batch_size": 8}}, "training.micro_batch_size"),
        ({"evaluation": {"paths": {"e2e": "x"}}}, "evaluation.paths"),
        ({"model": {"device": "gpu"}}, "model.device"),
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_refused(tables: dict[str, object], setting: str) -> None:
    assert found(**tables) == [setting]


def test_gradients_come_back_from_the_tails_of_frozen_clients() -> None:
    assert found(method={"name": "splitlora"}, split={**FROZEN, **GRADIENT, "labels": "client"}) == []


def test_split_ranks_follow_the_method_that_aggregates_the_client_half() -> None:
    ranks = {"name": "splitlora", "ranks": (4, 2)}
    assert found(method=ranks, federation={"num_clients": 2}) == ["method.ranks"]
    assert found(method=ranks, federation={"num_clients": 2}, split={"aggregation": "flora"}) == []


def test_conditions_name_settings_and_values_that_exist() -> None:
    fields = dict(every_setting())
    for name, field in fields.items():
        for other, values in conditions(field).items():
            assert set(values) <= set(choices(fields[other])), name


HETERO = Settings.model_validate(
    {
        **ENOUGH,
        "method": {
            "name": "flora",
            "ranks": (64, 32, 16, 16, 8, 8, 4, 4, 4, 4),
            "broadcast": "compressed",
            "tolerance": 0.1,
        },
        "server": {"step": "momentum", "momentum": 0.7},
    }
)


@pytest.mark.parametrize("method", table.shipped())
def test_an_experiment_stays_valid_under_every_method(method: str) -> None:
    assert problems(with_method(HETERO, method)) == []


def test_a_recipe_of_the_untrained_base_has_no_duration_for_another_method() -> None:
    base = with_method(HETERO, "base")
    assert base.training == Settings().training
    assert [problem.setting for problem in problems(with_method(base, "fedit"))] == ["training.local_steps"]


def test_methods_of_one_rank_get_the_mean_rank_so_that_as_much_is_sent() -> None:
    changed = with_method(HETERO, "fedit")
    assert changed.method.ranks == 16
    assert sum(changed.client_ranks) == sum(HETERO.client_ranks)


def test_a_method_keeps_what_it_can_use_and_drops_the_rest() -> None:
    fedit, centralised = with_method(HETERO, "fedit"), with_method(HETERO, "centralised")
    assert (fedit.server.step, fedit.server.momentum, fedit.method.broadcast) == ("momentum", 0.7, "stack")
    assert centralised.server == Settings().server


def test_norm_weights_fall_back_to_work_outside_zero_padding() -> None:
    padded = Settings.model_validate({**ENOUGH, "method": {"name": "zero-padding", "weighting": "norm"}})
    assert with_method(padded, "flora").method.weighting == "work"
    assert with_method(padded, "zero-padding") == padded


def test_a_seed_changes_only_the_seed() -> None:
    changed = with_seed(HETERO, 7)
    assert changed.run.seed == 7
    assert with_seed(changed, HETERO.run.seed) == HETERO


def test_multi_krum_needs_enough_clients_and_the_cosine_filter_a_common_direction() -> None:
    krum, cosine = {"robust": "krum"}, {"robust": "cosine"}
    assert found(server=krum) == []
    assert found(server=krum, federation={"num_clients": 4}) == ["server.robust"]
    assert found(server=krum | {"hostile_fraction": 0.4}, federation={"num_clients": 10}) == ["server.robust"]
    assert found(server=cosine) == []
    assert found(server=cosine, method={"name": "flora"}) == ["server.robust"]
    assert found(server=cosine, method={"name": "flora", "initialisation": "shared"}) == []
    assert found(server=cosine, method={"name": "splitlora"}, split={"aggregation": "flora"}) == ["server.robust"]
    assert found(server={"hostile_fraction": 0.2}) == ["server.hostile_fraction"]


def test_a_start_from_the_gradient_is_for_methods_whose_clients_share_one() -> None:
    for method in table.shipped("is_trained"):
        chosen = {"name": method, "initialisation": "gradient"}
        assert found(method=chosen) == [] if table.traits_of(method).continues else ["method.initialisation"], method
    assert found(method={"name": "fedit", "initialisation": "shared"}) == ["method.initialisation"]
    norm = {"name": "zero-padding", "weighting": "norm", "initialisation": "gradient"}
    (problem,) = problems(Settings.model_validate({**ENOUGH, "method": norm}))
    assert (problem.setting, problem.got) == ("method.weighting", "norm")
    chosen = Settings.model_validate({**ENOUGH, "method": {"name": "weave", "initialisation": "gradient"}})
    assert with_method(chosen, "fedit").method.initialisation == "gradient"
    assert with_method(chosen, "flora").method.initialisation == "independent"
    assert (chosen.start_rounds, with_method(chosen, "flora").start_rounds) == (1, 0)


@pytest.mark.parametrize(
    ("clients", "drawn", "asked"), [(10, 3, 10), (1000, 3, 32), (1000, 50, 50), (1000, None, 1000)]
)
def test_of_many_clients_some_sketch_the_gradient(clients: int, drawn: int | None, asked: int) -> None:
    federation = {"num_clients": clients, "clients_per_round": drawn}
    assert Settings.model_validate({**ENOUGH, "federation": federation}).sketch_cohort_size == asked


def test_control_variates_need_a_second_step_and_slots_that_all_clients_move() -> None:
    drift = {"local_steps": 4, "control_variates": True}
    assert found(training={**drift, "local_steps": 1}) == ["training.control_variates"]
    mixed = {"name": "zero-padding", "ranks": (4, 2, 2)}
    clients = {"num_clients": 3}
    assert found(training=drift, method=mixed, federation=clients) == ["training.control_variates"]
    short = {"name": "weave", "ranks": (4, 2, 2)}
    assert found(training=drift, method=short, federation=clients, server={"step": "plain"}) == []
    assert found(training=drift, method={"name": "flora", "ranks": 4}) == ["training.control_variates"]


def test_what_goes_slot_by_slot_is_refused_where_slots_turn() -> None:
    method = {"name": "carry", "ranks": 4}
    refused: dict[str, object] = {"wire.dtype": "int4", "training.moments": "own", "training.control_variates": True}
    for name, value in refused.items():
        table_name, setting = name.split(".")
        tables: dict[str, dict[str, object]] = {"training": {"local_steps": 4}}
        tables.setdefault(table_name, {})[setting] = value
        assert found(method=method, **tables) == [name]
    assert "server.step" in found(method=method, server={"step": "adamw"})
    (problem,) = problems(Settings.model_validate({**ENOUGH, "method": method, "wire": {"dtype": "int4"}}))
    assert "whose slots are other directions every round" in problem.expected
    assert found(method=method, wire={"dtype": "bf16"}, server={"step": "fedadam"}) == []


def test_a_variant_whose_slots_turn_drops_what_goes_slot_by_slot() -> None:
    own = {"training": {"local_steps": 4, "moments": "own"}, "wire": {"dtype": "int8"}}
    settings = Settings.model_validate(own)
    carry = with_method(settings, "carry")
    assert (carry.training.moments, carry.wire.dtype, carry.method.broadcast) == ("fresh", "fp32", "compressed")
    assert with_method(settings, "zero-padding").training.moments == "own"
    assert with_method(carry, "flora").method.broadcast == "stack"


def test_a_proximal_term_needs_a_second_step() -> None:
    once = {"local_steps": 1, "proximal": 0.1}
    assert found(training=once) == ["training.proximal"]
    assert found(training=once | {"local_steps": 2}) == []
    assert found(training={"local_epochs": 1.0, "proximal": 0.1}) == []


def test_a_variant_whose_clients_have_no_common_direction_drops_the_cosine_filter() -> None:
    settings = Settings.model_validate({**ENOUGH, "server": {"robust": "cosine"}})
    assert with_method(settings, "flora").server.robust == "none"
    assert with_method(settings, "zero-padding").server.robust == "cosine"
