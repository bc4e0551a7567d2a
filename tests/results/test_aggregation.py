"""Adapters merged from folders: the exact mean, of one base only, and nothing written where something does not fit."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_model

from fedloom.cli.app import exit_code
from fedloom.errors import AdapterError
from fedloom.lora.base_reference import BaseReference
from fedloom.lora.pair import Adapter, Pair
from fedloom.lora.peft_files import load_peft, save_peft
from fedloom.results.aggregation import aggregate_adapters
from fedloom.run_folder.durable import file_sha256
from fedloom.seeding import torch_stream

SHAPES = {"m.0.q_proj": (6, 5), "m.0.v_proj": (4, 5)}
Write = Callable[..., Path]


@pytest.fixture
def site(tmp_path: Path) -> Write:
    """Return a function that writes a random adapter of a rank and scale."""

    def write(
        name: str, rank: int, scale: float = 1.0, modules: tuple[str, ...] = tuple(SHAPES), base: Any = "org/base"
    ) -> Path:
        draw = torch_stream(1, name)
        pairs = {
            module: Pair(torch.randn(num_out, rank, generator=draw), torch.randn(rank, num_in, generator=draw))
            for module, (num_out, num_in) in SHAPES.items()
            if module in modules
        }
        save_peft(Adapter(pairs), tmp_path / name, base_name=base, scale=scale)
        return tmp_path / name

    return write


def mean_of(folders: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    """Return the weighted mean of the dense updates as the files state them: alpha over rank, and zero if absent."""
    total = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for folder, weight in zip(folders, weights, strict=True):
        for name, pair in load_peft(folder).items():
            total[name] += weight / sum(weights) * pair.to(torch.float64).delta()
    return total


def test_ranks_scales_and_modules_may_differ_and_the_mean_is_exact(site: Write, tmp_path: Path) -> None:
    folders = [site("a", 1, 2.0), site("b", 2, 0.25), site("c", 1, modules=("m.0.q_proj",))]
    written = aggregate_adapters(folders, tmp_path / "out", weights=[1, 2, 5])
    for name, delta in mean_of(folders, [1, 2, 5]).items():
        torch.testing.assert_close(load_peft(tmp_path / "out")[name].delta().double(), delta, rtol=1e-5, atol=1e-6)
    assert written.exported.ranks == {"m.0.q_proj": 4, "m.0.v_proj": 3}
    assert written.exported.is_exact
    assert [source.weight for source in written.sources] == [1 / 8, 2 / 8, 5 / 8]


def test_weights_are_equal_by_default(site: Write, tmp_path: Path) -> None:
    folders = [site("a", 1), site("b", 2)]
    aggregate_adapters(folders, tmp_path / "out")
    for name, delta in mean_of(folders, [1, 1]).items():
        torch.testing.assert_close(load_peft(tmp_path / "out")[name].delta().double(), delta, rtol=1e-5, atol=1e-6)


def test_a_rank_states_the_error_of_every_module_and_of_all(site: Write, tmp_path: Path) -> None:
    folders = [site("a", 2), site("b", 2), site("c", 1, modules=("m.0.v_proj",))]
    written = aggregate_adapters(folders, tmp_path / "out", rank=2)
    kept, exact = load_peft(tmp_path / "out"), mean_of(folders, [1, 1, 1])
    missed = {name: float((kept[name].delta().double() - delta).norm()) for name, delta in exact.items()}
    for name, share in written.relative_errors().items():
        assert share == pytest.approx(missed[name] / float(exact[name].norm()), rel=1e-4)
    everything = math.hypot(*(float(delta.norm()) for delta in exact.values()))
    assert written.as_dict()["relative_rank_error"] == pytest.approx(
        math.hypot(*missed.values()) / everything, rel=1e-4
    )
    assert written.exported.ranks == dict.fromkeys(SHAPES, 2)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"], config["lora_alpha"]) == ({}, {}, 2)


def test_card_and_record_name_sources_by_hash_and_share_and_no_place(site: Write, tmp_path: Path) -> None:
    folders = [site("one/adapter", 1), site("two/adapter", 2)]
    aggregate_adapters(folders, tmp_path / "out", weights=[3, 1], rank=1)
    record = json.loads((tmp_path / "out/sources.json").read_text())
    assert [(one["name"], one["weight"]) for one in record["sources"]] == [("one/adapter", 0.75), ("two/adapter", 0.25)]
    for folder, one in zip(folders, record["sources"], strict=True):
        assert one["sha256"] == {name: file_sha256(folder / name) for name in one["sha256"]}
        assert one["sha256"]["adapter_model.safetensors"][:12] in (tmp_path / "out/README.md").read_text()
    written = "".join(path.read_text(errors="replace") for path in (tmp_path / "out").iterdir())
    assert str(tmp_path) not in written
    assert record["relative_rank_error_of_module"].keys() == SHAPES.keys()


def hashed(name: str, sha256: str | None = None) -> BaseReference:
    return BaseReference(name, is_folder=True, sha256=sha256)


@pytest.mark.parametrize(
    ("first", "second", "base", "agrees"),
    [
        ("org/one", "org/two", None, False),
        ("org/one", "org/two", "org/two", True),
        (hashed("x", "a" * 64), hashed("x", "b" * 64), None, False),
        (hashed("x", "a" * 64), hashed("x", "b" * 64), "org/two", False),
        (hashed("x", "a" * 64), hashed("y", "a" * 64), None, True),
        (hashed("x", "a" * 64), hashed("x"), None, True),
        (hashed("x", "a" * 64), hashed("y"), None, False),
        ("", "", None, False),
        ("org/one", "", None, False),
        ("", "org/one", "org/one", True),
    ],
)
def test_bases_agree_by_hash_or_by_name(
    first: Any, second: Any, base: str | None, agrees: bool, site: Write, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("fedloom.results.aggregation.check_with_peft", lambda *_: (None, None))
    folders = [site("a", 1, base=first), site("b", 1, base=second)]
    if agrees:
        aggregate_adapters(folders, tmp_path / "out", base=base)
        config = json.loads((tmp_path / "out/adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == (base or getattr(first, "name", first))
        return
    with pytest.raises(AdapterError, match=r"expected (adapters of one base|an adapter that names its base)"):
        aggregate_adapters(folders, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_weights_that_do_not_fit_are_refused(weights: list[float], site: Write, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="weights: expected one for each"):
        aggregate_adapters([site("a", 1), site("b", 1)], tmp_path / "out", weights=weights)


def test_mistakes_are_one_line_and_write_nothing(
    site: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = str(site("a", 1)), str(site("b", 1))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    broken = site("broken", 1)
    (broken / "adapter_model.safetensors").write_bytes(b"no tensors")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").touch()
    out = ["--to", str(tmp_path / "out")]
    for arguments, said in (
        ([one, *out], "expected two adapters or more"),
        ([one, one, *out], "once, got it twice"),
        ([one, two, "--weights", "1,x", *out], "--weights: expected numbers"),
        ([one, str(broken), *out], "corrupt or truncated"),
        ([one, two, "--rank", "9", *out], "--rank: expected 1 to 2"),
        ([one, two, "--to", str(full)], "expected a new or an empty folder"),
        ([one, str(tmp_path / "absent"), *out], "expected the folder of a run or of a PEFT adapter"),
        ([one, "org/absent", *out], "adapter: expected a folder or a name on the hub, got 'org/absent'"),
    ):
        assert exit_code(["aggregate", *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_four_folders_of_stock_peft_of_different_ranks_come_to_what_it_adds_itself(tmp_path: Path) -> None:
    """The weights are moved by what peft says that each folder adds; its loader reads the aggregate to the same."""
    kinds = [(1, 4, ["q_proj", "v_proj"]), (2, 3, ["q_proj"]), (4, 8, ["q_proj", "k_proj"]), (3, 3, ["v_proj"])]
    ids, weights, folders = torch.arange(24).view(1, 24) % 50, [1.0, 2.0, 3.0, 4.0], []
    plain = tiny_model("llama")
    for number, (rank, alpha, modules) in enumerate(kinds):
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules, use_rslora=number == 1)
        model = get_peft_model(tiny_model("llama"), config)
        draw = torch_stream(7, number)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=draw)
        for name, module in model.base_model.model.named_modules():
            if hasattr(module, "get_delta_weight"):
                plain.get_submodule(name).weight.data += weights[number] / 10 * module.get_delta_weight("default")
        folders.append(tmp_path / str(number))
        model.save_pretrained(folders[-1])
    aggregate_adapters(folders, tmp_path / "out", weights=weights, base="tiny")
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_source_of_another_shape_is_named_with_the_one_it_differs_from(site: Write, tmp_path: Path) -> None:
    one, other = site("a", 1), tmp_path / "other"
    pairs = {"m.0.q_proj": Pair(torch.ones(7, 1), torch.ones(1, 5))}
    save_peft(Adapter(pairs), other, base_name="org/base")
    with pytest.raises(
        AdapterError, match=r"other: expected m\.0\.q_proj with 6 outputs and 5 inputs, as in .*/a, got 7"
    ):
        aggregate_adapters([one, other], tmp_path / "out")


def test_the_same_weights_twice_and_an_adapter_that_adds_nothing_are_remarked(site: Write, tmp_path: Path) -> None:
    one, copied, untrained = site("a", 1), tmp_path / "copy", tmp_path / "untrained"
    shutil.copytree(one, copied)
    zeros = {name: Pair(torch.zeros(num_out, 1), torch.ones(1, num_in)) for name, (num_out, num_in) in SHAPES.items()}
    save_peft(Adapter(zeros), untrained, base_name="org/base")
    written = aggregate_adapters([one, copied, site("b", 2), untrained], tmp_path / "out")
    assert (
        written.remarks()
        == written.lines()[-2:]
        == [
            "copy holds the same weights as a: they count twice",
            "untrained adds nothing (all of its products are zero): was it trained?",
        ]
    )


def test_a_command_line_merges_and_says_what_the_rank_costs(
    site: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sites = [str(site("a", 2)), str(site("b", 2))]
    assert exit_code(["aggregate", *sites, "--weights", "1,2", "--rank", "2", "--to", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "the rank drops" in lines[1]
    assert lines[2].startswith("by module it drops")
    assert "a: weight 0.3333, 2 modules of rank 2, sha256" in "\n".join(lines)
