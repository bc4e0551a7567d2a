"""The table of methods: three ways in, one way to make a strategy, and nobody's fault harms another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from fedloom import config
from fedloom.config import Settings, with_method
from fedloom.errors import MethodError, SettingsError
from fedloom.methods import table
from fedloom.methods.strategy import Cohort
from fedloom.methods.table import Method, MethodOptions
from fedloom.methods.traits import Kind, Traits

COHORT = Cohort({"layer": (5, 4)}, 2, lambda client: 2, 1)
ENOUGH = {"training": {"local_steps": 1}}
MINE = Method(Traits("mine", "a method of one's own", needs_one_rank=True), "fedloom.methods.makers:fedit")
CONTROL = {"kind": Kind.CONTROL, "aggregates_split": False, "combines": False}


@pytest.fixture
def registered() -> Iterator[str]:
    table.register_method(MINE)
    yield "mine"
    table.unregister_method("mine")


def written(name: str, traits: str = "") -> str:
    return (
        "from fedloom.methods.table import Method\nfrom fedloom.methods.traits import Traits\n"
        f"METHOD = Method(Traits({name!r}, 'from a package'{traits}), 'fedloom.methods.makers:flora')\n"
    )


@pytest.mark.parametrize("name", table.shipped("runs_rounds"))
def test_a_strategy_bears_the_name_of_its_method(name: str) -> None:
    assert table.make(name, COHORT).name == name


@pytest.mark.parametrize("name", table.shipped("aggregates"))
def test_a_strategy_takes_every_weighting_of_its_method(name: str) -> None:
    for weighting in table.traits_of(name).weightings:
        assert table.make(name, COHORT, MethodOptions(weighting=weighting)).weighting == weighting


def test_a_method_without_a_strategy_says_so() -> None:
    with pytest.raises(MethodError, match=r"expected a method that runs in rounds of adapters \(.*\), got 'base'"):
        table.make("base", COHORT)


def test_tables_show_federated_methods_first_and_the_base_last(registered: str) -> None:
    kinds = [table.traits_of(name).kind for name in table.names()]
    assert kinds == sorted(kinds, key=list(Kind).index)
    assert table.names("aggregates") == (*table.shipped("aggregates"), registered)
    assert table.place(registered) < table.place("base") < table.place("a method of another machine")


def test_a_registered_method_is_a_method_everywhere_in_this_process(registered: str) -> None:
    settings = config.resolve({**ENOUGH, "method": {"name": "mine"}, "split": {}}, "a test")
    assert settings.traits.title == "a method of one's own"
    assert table.get(registered).is_local
    hetero = Settings.model_validate(
        {**ENOUGH, "method": {"name": "flora", "ranks": (4, 2)}, "federation": {"num_clients": 2}}
    )
    assert with_method(hetero, "mine").method.ranks == 3
    cut = {"method": {"name": "splitlora"}, "split": {"aggregation": "mine"}}
    assert config.resolve({**ENOUGH, **cut}, "a test").split.aggregation == "mine"
    with pytest.raises(SettingsError, match=r'"fedsa-lora", "mine", "splitlora".*got "floara".*did you mean flora\?'):
        config.resolve({**ENOUGH, "method": {"name": "floara"}}, "a test")


def test_other_names_of_a_method_lead_to_it_and_to_nothing_else() -> None:
    assert set(table.OTHER_NAMES.values()) <= set(table.names())
    assert "did you mean fedit?" in table.remedy("FedAvg", table.names())
    assert "name one of them" in table.remedy("FedAvg", ["flora", "weave"])


@pytest.mark.usefixtures("registered")
def test_a_name_is_given_once() -> None:
    with pytest.raises(MethodError, match=r"registered already: call unregister_method\('mine'\) first"):
        table.register_method(MINE)
    with pytest.raises(MethodError, match="method fedit: expected a new name"):
        table.register_method(replace(MINE, traits=replace(MINE.traits, name="fedit")))
    with pytest.raises(MethodError, match="expected one registered in this process"):
        table.unregister_method("fedit")


def test_what_is_no_method_is_refused() -> None:
    with pytest.raises(MethodError, match=r"expected a Method\(traits, make\) to register, got str"):
        table.register_method("mine")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "My Method"}, "a name of small letters"),
        ({"title": " "}, "expected a title"),
        ({"weightings": ("rows", "luck")}, "weightings of rows, tokens, uniform, norm, work, got 'luck'"),
        ({"weightings": ("rows",)}, "weightings with work, the default of method.weighting"),
        ({"pools_rows": True}, "pools_rows with kind = control only"),
        ({**CONTROL, "starts_fresh": True}, "starts_fresh with kind = federated only"),
        ({**CONTROL, "combines": True}, "combines with kind = federated only"),
        ({"is_personal": True}, "aggregates_split=False with is_personal"),
        ({**CONTROL, "weightings": (), "is_personal": True}, "is_personal with kind = federated only"),
    ],
    ids=str,
)
def test_traits_that_contradict_each_other_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        replace(MINE.traits, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [None, "fedloom.methods.makers", ":fedit"])
def test_a_method_that_runs_in_rounds_says_what_makes_it(make: str | None) -> None:
    with pytest.raises(MethodError, match="method mine: expected "):
        Method(MINE.traits, make)


@pytest.mark.parametrize("make", ["no_such_module:make", "fedloom.methods.makers:no_such_name"])
def test_what_makes_a_method_is_looked_for_when_one_is_run(make: str) -> None:
    table.register_method(replace(MINE, make=make))
    try:
        with pytest.raises(MethodError, match=f"method mine: expected {make} to make its strategy"):
            table.make("mine", COHORT)
    finally:
        table.unregister_method("mine")


def test_an_installed_method_is_found_by_its_entry_point(install: Callable[..., None]) -> None:
    install("foreign_good", written("theirs"), "theirs = foreign_good:METHOD")
    assert "theirs" in table.names("aggregates")
    assert "theirs" not in table.shipped()
    assert not table.get("theirs").is_local
    assert table.make("theirs", COHORT).name == "flora"


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("raise RuntimeError('no luck')", "RuntimeError: no luck"),
        ("METHOD = 3", "expected foreign_bad:METHOD to be a Method, got int"),
        (written("other"), "expected the entry point's name to be the method's, got other"),
        (written("theirs", ", pools_rows=True"), "MethodError: method theirs: expected pools_rows"),
    ],
    ids=["raises", "no method", "another name", "contradiction"],
)
def test_a_broken_package_is_named_and_harms_no_other_method(
    install: Callable[..., None], code: str, fault: str
) -> None:
    install("foreign_bad", code, "theirs = foreign_bad:METHOD")
    install("foreign_good", written("good"), "good = foreign_good:METHOD")
    assert table.get("good").traits.name == "good"
    assert "theirs" not in table.names()
    with pytest.raises(MethodError, match=f"method theirs of the package foreign_bad cannot be used: {fault}"):
        table.get("theirs")
    assert len(table.faults()) == 1
    with pytest.raises(SettingsError, match=f"method.name: .* of the package foreign_bad cannot be used: {fault}"):
        config.resolve({**ENOUGH, "method": {"name": "theirs"}}, "a test")


def test_a_package_cannot_take_the_name_of_a_shipped_method(install: Callable[..., None]) -> None:
    install("foreign_bad", written("fedit"), "fedit = foreign_bad:METHOD")
    assert table.make("fedit", COHORT).name == "fedit"
    assert "another method has that name" in table.faults()[0]
