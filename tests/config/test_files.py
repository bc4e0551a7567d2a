"""What the files say about the settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedloom.config import Settings
from fedloom.config.files import looks_like_hub_name, problems

LLAMA = {
    "hidden_size": 192,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 6,
    "max_position_embeddings": 512,
}
GPT2 = {"n_embd": 152, "n_head": 4, "n_layer": 3, "n_positions": 256}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", LLAMA)


def write_base(folder: Path, config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder


def found(model: dict[str, object], **tables: object) -> list[str]:
    return [problem.setting for problem in problems(Settings.model_validate({"model": model, **tables}))]


@pytest.mark.parametrize("name", ["org/name", "gpt2", "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", "a/b_c.d"])
def test_hub_names_are_taken_at_their_word(name: str) -> None:
    assert looks_like_hub_name(name)


@pytest.mark.parametrize("path", ["./x", "/x", "a/b/c", "rows.json", "a/rows.csv", "../x", "", "a b"])
def test_paths_are_not_taken_for_hub_names(path: str) -> None:
    assert not looks_like_hub_name(path)


def test_a_folder_with_config_and_tokenizer_is_accepted(base: Path) -> None:
    assert found({"base": str(base)}) == []


def test_a_base_that_is_absent_or_has_no_config_is_refused(tmp_path: Path) -> None:
    assert found({"base": str(tmp_path / "none")}) == ["model.base"]
    assert found({"base": str(tmp_path)}) == ["model.base"]


def test_a_base_whose_config_is_cut_short_is_refused(base: Path) -> None:
    (base / "config.json").write_text('{"hidden_size": 1', encoding="utf-8")
    assert found({"base": str(base)}) == ["model.base"]


def test_a_base_without_a_tokenizer_needs_one_named(base: Path) -> None:
    (base / "tokenizer.json").unlink()
    assert found({"base": str(base)}) == ["model.tokenizer"]
    assert found({"base": str(base), "tokenizer": "bytes"}) == []


@pytest.mark.parametrize(
    ("targets", "largest"),
    [(None, 64), (("q_proj",), 192), (("v_proj",), 64), (("*_proj",), 64)],
)
def test_ranks_stay_within_the_narrowest_adapted_layer(base: Path, targets: object, largest: int) -> None:
    model = {"base": str(base), "target_modules": targets}
    assert found(model, method={"ranks": largest}) == []
    assert found(model, method={"ranks": largest + 1}) == ["method.ranks"]


def test_under_all_linear_a_narrow_layer_takes_the_rank_it_can(base: Path) -> None:
    model = {"base": str(base), "target_modules": ("all-linear",)}
    assert found(model, method={"ranks": 65}) == []


def test_gpt2_names_its_sizes_differently(tmp_path: Path) -> None:
    model: dict[str, object] = {"base": str(write_base(tmp_path / "gpt2", GPT2))}
    assert found(model, method={"ranks": 152}, data={"max_length": 256}) == []
    assert found(model, method={"ranks": 153}, data={"max_length": 257}) == ["method.ranks", "data.max_length"]


@pytest.mark.parametrize(("labels", "largest"), [("server", 5), ("client", 4)])
def test_cuts_leave_a_block_to_the_server(base: Path, labels: str, largest: int) -> None:
    for cut, expected in ((largest, []), (largest + 1, ["split.cut_layer"])):
        split = {"cut_layer": cut, "labels": labels}
        assert found({"base": str(base)}, method={"name": "splitlora"}, split=split) == expected


def test_files_of_rows_templates_and_partitions_exist(tmp_path: Path) -> None:
    none = str(tmp_path / "none.json")
    data = {"path": none, "eval_path": none, "template": none}
    assert found({}, data=data, partition={"path": none}) == [
        "data.path",
        "data.eval_path",
        "data.template",
        "partition.path",
    ]


def test_one_file_per_client_means_as_many_files_as_clients(tmp_path: Path) -> None:
    for client in range(3):
        (tmp_path / f"local_training_{client}.json").write_text("[]", encoding="utf-8")
    (tmp_path / "local_eval_0.json").write_text("[]", encoding="utf-8")
    tables = {"data": {"path": str(tmp_path)}, "partition": {"scheme": "natural"}}
    assert found({}, **tables, federation={"num_clients": 2}) == ["federation.num_clients"]
    assert found({}, **tables, federation={"num_clients": 3}) == []


def test_the_home_folder_may_be_written_as_a_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_base(tmp_path / "base", LLAMA)
    assert found({"base": "~/base"}) == []


def test_rows_longer_than_the_embedded_bases_context_are_refused_before_a_run() -> None:
    found = problems(Settings.model_validate({"model": {"base": "embedded"}, "data": {"max_length": 512}}))
    assert [(one.setting, one.expected) for one in found] == [
        ("data.max_length", "at most the base's context of 128 tokens")
    ]
