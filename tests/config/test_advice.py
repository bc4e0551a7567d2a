"""Whoever does what an error says gets past it, and is not told the opposite by the next one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedloom import config
from fedloom.assembly.preparation import Preparation
from fedloom.data.tokenizer import byte_tokenizer
from fedloom.errors import FedloomError
from fedloom.preview.rehearsal import SketchWorkshop

Document = dict[str, dict[str, Any]]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write rows of two columns, three natural clients, and work beside them."""
    rows = [{"instruction": f"ask {k}", "response": "yes", "kind": "ab"[k % 2]} for k in range(12)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for name, repeated in (("long", 50), ("endless", 100)):
        some = [{"instruction": "ask", "response": "yes " * (repeated if k == 3 else 1)} for k in range(12)]
        (tmp_path / f"{name}.json").write_text(json.dumps(some))
    (tmp_path / "fed").mkdir()
    for client in range(3):
        (tmp_path / "fed" / f"local_training_{client}.json").write_text(json.dumps(rows[: 2 + client]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def document(base: Path, changes: Mapping[str, object]) -> Document:
    made: Document = {
        "model": {"base": str(base), "tokenizer": "bytes"},
        "data": {"path": "rows.json", "template": "plain"},
        "method": {"name": "fedit", "ranks": 2},
        "federation": {"num_clients": 3, "num_rounds": 1},
        "training": {"local_steps": 1, "batch_size": 2},
    }
    for name, value in changes.items():
        table, _, key = name.partition(".")
        made.setdefault(table, {})[key] = value
    return {table: {key: value for key, value in keys.items() if value is not None} for table, keys in made.items()}


def refusals(base: Path, changes: Mapping[str, object], tmp_path: Path) -> list[str]:
    """Return the lines with which a run of the changed recipe would end."""
    try:
        settings = config.resolve(document(base, changes), "a test")
        Preparation(settings, tmp_path / "run", SketchWorkshop()).complete()
    except FedloomError as error:
        return str(error).splitlines()
    return []


FED = {"data.path": "fed", "partition.scheme": "natural"}
FLORA, CUT = {"method.name": "flora"}, {"method.name": "splitlora", "split.cut_layer": 1}
FOLLOWED: dict[str, tuple[dict[str, object], str, list[dict[str, object]]]] = {
    "more drawn than there are": (
        {"federation.clients_per_round": 5},
        "lower it, or raise federation.num_clients",
        [{"federation.clients_per_round": 3}, {"federation.num_clients": 5}],
    ),
    "more drawn than the data name": (
        FED | {"federation.clients_per_round": 5},
        "lower it$",
        [{"federation.clients_per_round": 3}],
    ),
    "a minimum above what is drawn": (
        {"federation.clients_per_round": 2, "federation.min_clients": 3},
        "lower it, or raise federation.clients_per_round",
        [{"federation.min_clients": 2}, {"federation.clients_per_round": 3}],
    ),
    "a minimum above the population": (
        {"federation.min_clients": 5},
        "lower it, or raise federation.num_clients",
        [{"federation.min_clients": 3}, {"federation.num_clients": 5}],
    ),
    "a minimum above the clients of the data": (
        FED | {"federation.min_clients": 5},
        "lower it$",
        [{"federation.min_clients": 3}],
    ),
    "fewer rows than the clients need": (
        {"data.max_rows": 2},
        "raise it, or lower federation.num_clients",
        [{"data.max_rows": 3}, {"federation.num_clients": 2}],
    ),
    "fewer rows than the data's clients need": (
        FED | {"data.max_rows": 8, "partition.min_rows": 3},
        "raise it, or lower partition.min_rows",
        [{"data.max_rows": None, "partition.min_rows": 2}],
    ),
    "a natural client with too few rows": (
        FED | {"partition.min_rows": 3},
        "lower it, or use more rows",
        [{"partition.min_rows": 2}],
    ),
    "a dealt client with too few rows": (
        {"partition.min_rows": 5},
        "lower federation.num_clients, or use more rows",
        [{"federation.num_clients": 2}],
    ),
    "values for other clients": (
        {"method.name": "flora", "method.ranks": [1, 2]},
        "give 3, or set federation.num_clients = 2",
        [{"method.ranks": [1, 2, 2]}, {"federation.num_clients": 2}],
    ),
    "values for other clients than the data name": (
        FED | {"method.name": "flora", "method.ranks": [1, 2]},
        "give one per client of the data",
        [{"method.ranks": [1, 2, 2]}],
    ),
    "another number of clients than the data name": (
        FED | {"federation.num_clients": 2},
        "set federation.num_clients = 3",
        [{"federation.num_clients": 3}],
    ),
    "another number than a column has": (
        {"partition.scheme": "natural", "partition.column": "kind"},
        "set it to 2$",
        [{"federation.num_clients": 2}],
    ),
    "Krum of too few that draw apart": (
        FLORA | {"server.robust": "krum"},
        "choose clip or median, or draw more clients",
        [{"server.robust": "clip"}, {"server.robust": "median"}, {"federation.num_clients": 5}],
    ),
    "Krum of too few of one space": (
        FED | {"server.robust": "krum"},
        "choose clip, median or cosine$",
        [{"server.robust": one} for one in ("clip", "median", "cosine")],
    ),
    "a cosine of clients that draw apart": (
        FLORA | {"server.robust": "cosine"},
        "expected clip or median where .*choose one of those, or method.initialisation = shared",
        [{"server.robust": "clip"}, {"server.robust": "median"}, {"method.initialisation": "shared"}],
    ),
    "ranks that are not one": (
        {"method.ranks": [1, 2, 2]},
        "set method.name to .*flora.*, which take different ranks",
        [{"method.name": "flora"}, {"method.name": "zero-padding"}],
    ),
    "a rank wider than a layer": (
        {"method.ranks": 12, "model.target_modules": ["k_proj"]},
        "lower the rank",
        [{"method.ranks": 8}],
    ),
    "a micro-batch above the batch": (
        {"training.micro_batch_size": 4},
        "lower it, or drop it",
        [{"training.micro_batch_size": 2}, {"training.micro_batch_size": None}],
    ),
    "rows longer than they may be": (
        {"data.path": "long.json", "data.max_length": 40},
        "raise data.max_length, or set data.overlong to 'drop' or 'truncate'",
        [{"data.max_length": 256}, {"data.overlong": "drop"}, {"data.overlong": "truncate"}],
    ),
    "rows longer than the base reads": (
        {"data.path": "endless.json"},
        "the base's context is 256 .*longer, up to 4[0-9]+\\); set data.overlong to 'drop' or 'truncate'",
        [{"data.overlong": "drop"}, {"data.overlong": "truncate"}],
    ),
    "a length beyond the context": (
        {"data.max_length": 1000},
        "lower it, or drop it",
        [{"data.max_length": 256}, {"data.max_length": None}],
    ),
    "a cut beyond the blocks": (CUT | {"split.cut_layer": 9}, "lower it", [{"split.cut_layer": 1}]),
    "tails that leave no block": (
        CUT | {"split.labels": "client", "split.tail_blocks": 1},
        "expected a base with a block on either side of the cut, .*set split.labels = server",
        [{"split.labels": "server", "split.tail_blocks": None}],
    ),
    "no column to deal by": (
        {"partition.scheme": "dirichlet"},
        'e.g. partition.column = "category"',
        [{"partition.column": "kind"}],
    ),
    "a suite without rows": (
        {"evaluation.suites": ["exact-match"]},
        "hold some out with data.eval_rows or data.eval_path",
        [{"data.eval_rows": 2}, {"data.eval_path": "rows.json"}],
    ),
    "two durations": (
        {"training.local_epochs": 1.0},
        "remove training.local_epochs or training.local_steps",
        [{"training.local_steps": None}, {"training.local_epochs": None}],
    ),
    "no duration": (
        {"training.local_steps": None},
        "set one, e.g. training.local_steps = 10",
        [{"training.local_steps": 10}],
    ),
}


@pytest.mark.parametrize("case", FOLLOWED)
def test_advice_that_is_followed_is_the_end_of_it(case: str, files: Path, base_folder: Path) -> None:
    changes, advice, ways_out = FOLLOWED[case]
    assert any(re.search(advice, line) for line in refusals(base_folder, changes, files)), refusals(
        base_folder, changes, files
    )
    for way in ways_out:
        assert refusals(base_folder, changes | way, files) == [], way


def test_a_dialogue_that_only_a_chat_template_has_words_for_is_not_sent_to_another(
    files: Path, base_folder: Path
) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    tokenizer.save_pretrained(files / "raising")
    told = {"data.path": "chat.json", "model.tokenizer": str(files / "raising"), "data.template": "chat"}
    (files / "chat.json").write_text(json.dumps([{"messages": turns}] * 6))
    (plain,) = refusals(base_folder, told, files)
    assert plain.endswith("correct the row, or set data.template to 'plain'")
    assert refusals(base_folder, told | {"data.template": "plain"}, files) == []
    (files / "chat.json").write_text(json.dumps([{"messages": turns, "tools": [tool]}] * 6))
    (with_tools,) = refusals(base_folder, told, files)
    assert with_tools.endswith("correct the row")
    (words,) = refusals(base_folder, told | {"data.template": "plain"}, files)
    assert "set data.template to 'chat' with a tokenizer whose chat template writes them, or remove them" in words


def test_rows_of_which_none_fits_the_context_are_not_told_to_raise_it(files: Path, base_folder: Path) -> None:
    (files / "rows.json").write_text(json.dumps([{"instruction": "a", "response": "b" * 900}] * 6))
    for length, advice in (
        (None, "shorten the rows, or use a base with a longer context"),
        (100, "raise data.max_length"),
    ):
        (line,) = refusals(base_folder, {"data.overlong": "drop", "data.max_length": length}, files)
        assert line.endswith(advice)


def test_a_base_of_one_block_is_told_that_it_cannot_be_cut(files: Path, base_folder: Path) -> None:
    base = files / "one"
    base.mkdir()
    known = json.loads((base_folder / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(known | {"num_hidden_layers": 1}))
    (line,) = refusals(base, CUT, files)
    assert line.endswith("use a method that does not cut the model")


def test_memory_is_not_said_to_be_won_by_what_is_refused(base_folder: Path, files: Path) -> None:
    from fedloom.preview.diagnosis import findings, this_machine

    small = {**this_machine().__dict__, "free_memory_bytes": 1}
    for changes, offered in (({}, True), ({"model.quantization": "4bit"}, False)):
        settings = config.resolve(document(base_folder, changes), "a test")
        prepared = Preparation(settings, files / "run", SketchWorkshop())
        (memory,) = [one for one in findings(prepared, type(this_machine())(**small)) if one.need == "memory"]
        assert ("model.quantization" in memory.why) is offered
