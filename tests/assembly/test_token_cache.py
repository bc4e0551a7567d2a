"""Tokens on disk: found by all that they are made from, checked before use, bounded, and never needed."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fedloom.assembly.inputs as inputs_module
from fedloom.assembly.inputs import Workshop
from fedloom.assembly.token_cache import TokenCache
from fedloom.config import Settings
from fedloom.data.encoding import encode
from fedloom.data.records import read_records
from fedloom.data.sources import load_rows
from fedloom.data.tokenizer import byte_tokenizer
from fedloom.models.load import Base

Make = Callable[..., Settings]
HOW = {
    "template": "plain",
    "date": None,
    "max_length": None,
    "at_most": None,
    "loss_on": "answer",
    "overlong": "error",
    "unanswered": "error",
}


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of records of every encoding."""
    found: list[int] = []

    def counted(records: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(len(records))
        return encode(records, *args, **kwargs)

    monkeypatch.setattr(inputs_module, "encode", counted)
    return found


def hash_of(settings: Settings, cache: TokenCache) -> str:
    workshop = Workshop(cache=cache)
    base: Base = workshop.base(settings)[0]
    return workshop.inputs(settings, base).data_sha256


def entries(cache: TokenCache) -> list[Path]:
    assert cache.folder is not None
    return sorted(cache.folder.iterdir())


def test_a_second_command_finds_the_tokens_of_the_first(
    settings_for: Make, tmp_path: Path, encodings: list[int]
) -> None:
    cache = TokenCache(tmp_path / "tokens", fewest_rows=1)
    first, second = hash_of(settings_for(), cache), hash_of(settings_for(run__seed=2), cache)
    assert encodings == [48]
    assert first == hash_of(settings_for(), TokenCache(None)) != second
    (entry,) = entries(cache)
    assert stat.S_IMODE(entry.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "change", [{"template": "alpaca"}, {"loss_on": "all"}, {"max_length": 90}, {"overlong": "drop"}]
)
def test_another_setting_is_another_entry(
    change: dict[str, Any], settings_for: Make, tmp_path: Path, encodings: list[int]
) -> None:
    cache = TokenCache(tmp_path / "tokens", fewest_rows=1)
    hash_of(settings_for(), cache)
    hash_of(settings_for(**{f"data__{name}": value for name, value in change.items()}), cache)
    assert len(encodings) == len(entries(cache)) == 2


def test_other_rows_are_another_entry(rows_file: Path, tmp_path: Path) -> None:
    cache, tokenizer = TokenCache(tmp_path, fewest_rows=1), byte_tokenizer()
    records = read_records(load_rows(rows_file), "dolly")
    other = replace(records, items=[*records.items[:-1], replace(records.items[-1], answer="x")])  # type: ignore[type-var]
    shorter = replace(records, items=records.items[:-1])
    assert len({cache.key(one, tokenizer, HOW) for one in (records, other, shorter)}) == 3
    tokenizer.num_base_ids = 200
    assert cache.key(records, tokenizer, HOW) != cache.key(records, byte_tokenizer(), HOW)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def of_another_count(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        told = file.metadata()
    counts = json.loads(told["counts"])
    save_file(load_file(path), path, {**told, "counts": json.dumps({**counts, "num_kept": 3})})


@pytest.mark.parametrize(
    "damage",
    [
        flipped,
        of_another_count,
        lambda path: path.write_bytes(path.read_bytes()[:-40]),
        lambda path: path.write_bytes(b"notes"),
        lambda path: save_file({"x": np.zeros(3)}, path),
    ],
)
def test_a_damaged_entry_is_ignored_and_written_anew(
    damage: Callable[[Path], object], settings_for: Make, tmp_path: Path, encodings: list[int]
) -> None:
    cache = TokenCache(tmp_path / "tokens", fewest_rows=1)
    before = hash_of(settings_for(), cache)
    (entry,) = entries(cache)
    damage(entry)
    assert hash_of(settings_for(), cache) == before
    assert encodings == [48, 48]
    assert hash_of(settings_for(), cache) == before
    assert encodings == [48, 48]


def test_an_entry_of_other_rows_is_not_taken_for_these(rows_file: Path, tmp_path: Path) -> None:
    cache, tokenizer = TokenCache(tmp_path, fewest_rows=1), byte_tokenizer()
    records = read_records(load_rows(rows_file), "dolly")
    key = cache.key(records, tokenizer, HOW)
    cache.write(key, encode(records, tokenizer, template="plain"))
    assert cache.read(key, records, tokenizer) is not None
    other = "0" * 64
    (tmp_path / f"{key}.safetensors").rename(tmp_path / f"{other}.safetensors")
    assert cache.read(other, records, tokenizer) is None


def test_the_oldest_entry_goes_first_and_nothing_of_somebody_else(rows_file: Path, tmp_path: Path) -> None:
    tokenizer, records = byte_tokenizer(), read_records(load_rows(rows_file), "dolly")
    encoded = encode(records, tokenizer, template="plain")
    TokenCache(tmp_path).write("a" * 64, encoded)
    size = (tmp_path / f"{'a' * 64}.safetensors").stat().st_size
    (tmp_path / "notes.txt").write_text("mine")
    cache = TokenCache(tmp_path, most_bytes=int(2.5 * size))
    for age, name in ((300, "a"), (200, "b"), (100, "c")):
        path = tmp_path / f"{name * 64}.safetensors"
        cache.write(name * 64, encoded)
        os.utime(path, (path.stat().st_mtime - age, path.stat().st_mtime - age))
    cache.write("d" * 64, encoded)
    assert sorted(path.name[0] for path in tmp_path.iterdir()) == ["c", "d", "n"]
    TokenCache(tmp_path, most_bytes=size).write("e" * 64, encoded)  # larger than half of all: not kept
    assert not (tmp_path / f"{'e' * 64}.safetensors").exists()


def test_what_cannot_be_written_is_no_error(settings_for: Make, tmp_path: Path, encodings: list[int]) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = TokenCache(tmp_path / "file", fewest_rows=1)
    assert hash_of(settings_for(), cache) == hash_of(settings_for(), cache)
    assert encodings == [48, 48]


def test_the_environment_says_where_and_few_rows_leave_no_copy(settings_for: Make, tmp_path: Path) -> None:
    assert TokenCache.of_environment({"FEDLOOM_CACHE": "off"}).folder is None
    assert TokenCache.of_environment({"FEDLOOM_CACHE": "/x"}).folder == Path("/x")
    assert TokenCache.of_environment({"XDG_CACHE_HOME": "/y"}).folder == Path("/y/fedloom")
    hash_of(settings_for(), TokenCache(tmp_path / "tokens"))
    assert not (tmp_path / "tokens").exists()
