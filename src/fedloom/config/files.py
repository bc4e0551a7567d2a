"""What the files say about the settings: paths exist, ranks and cuts fit the base's ``config.json``.

Reads small JSON files at most and imports no torch. A name that looks like a hub name is taken at its word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fedloom import embedded
from fedloom.config.problems import Problem
from fedloom.config.schema import Settings
from fedloom.config.setting import shown, values_of
from fedloom.models.stored_quantization import lack_of, stored_method
from fedloom.names import looks_like_hub_name

CLIENT_FILE = re.compile(r"local_training_\d+\.(json|jsonl|csv|tsv|parquet)")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
GROUPED = ("k_proj", "v_proj")


@dataclass(frozen=True)
class Shape:
    """What a base's ``config.json`` gives: blocks, context, and the smallest side of an adapted layer."""

    num_blocks: int | None
    context: int | None
    max_rank: int | None
    narrowest: str


def problems(settings: Settings) -> list[Problem]:
    """Return every path that leads nowhere and every size the base does not have."""
    found = [*base(settings), *stored(settings), *tokenizer(settings), *adapter(settings)]
    found += [*rows(settings), *clients(settings)]
    config = base_config(settings.model.base)
    return found + (list(sizes(settings, read_shape(config, settings.model.target_modules))) if config else [])


def absent(name: str, path: str, wanted: str) -> Problem:
    """Report a path that does not exist."""
    action = f"check the path (relative ones start at {Path.cwd()})"
    return Problem(name, wanted, f"{shown(path)}, which does not exist", action)


def base_config(base: str) -> dict[str, Any] | None:
    """Read a local base's ``config.json``; ``None`` when the base is not a local folder with a readable one."""
    path = Path(embedded.base_path(base)) / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return config if isinstance(config, dict) else None


def base(settings: Settings) -> Iterator[Problem]:
    """The base is embedded, a folder with a readable ``config.json``, or a hub name."""
    name = settings.model.base
    wanted = "a folder with config.json, a hub name such as org/name, or embedded"
    folder = Path(name)
    if name == "embedded":
        return
    if not folder.exists():
        if not looks_like_hub_name(name):
            yield absent("model.base", name, wanted)
    elif not (folder / "config.json").is_file():
        yield Problem("model.base", wanted, f"{shown(name)}, which has no config.json", "name the model's own folder")
    elif base_config(name) is None:
        yield Problem("model.base", wanted, f"{shown(name)}, whose config.json is not JSON", "fetch the model again")


def stored(settings: Settings) -> Iterator[Problem]:
    """A base that is stored quantised can be read here, and is not quantised once more."""
    config = base_config(settings.model.base) or {}
    if (lack := lack_of(config)) is not None:
        got = f"{shown(settings.model.base)}, which is {lack.got}"
        yield Problem("model.base", "a base whose weights can be read here", got, lack.action)
    if (method := stored_method(config)) is not None and settings.model.quantization != "none":
        wanted = f"none with a base that is stored quantised (by {method})"
        yield Problem(
            "model.quantization",
            wanted,
            settings.model.quantization,
            "drop it, or choose the unquantised base",
            ("model.base",),
        )


def tokenizer(settings: Settings) -> Iterator[Problem]:
    """The tokenizer exists: its own, the base's, or bytes."""
    name, wanted = settings.model.tokenizer, "a tokenizer folder or file, a hub name, or bytes"
    if name is not None:
        if name != "bytes" and not Path(name).exists() and not looks_like_hub_name(name):
            yield absent("model.tokenizer", name, wanted)
        return
    folder = Path(embedded.base_path(settings.model.base))
    if base_config(settings.model.base) and not any((folder / file).is_file() for file in TOKENIZER_FILES):
        got = f"none, and {shown(settings.model.base)} has no tokenizer files"
        yield Problem("model.tokenizer", wanted, got, 'set model.tokenizer, e.g. "bytes"', ("model.base",))


def adapter(settings: Settings) -> Iterator[Problem]:
    """The adapter to start from is a PEFT folder."""
    name = settings.model.adapter
    if name is None:
        return
    wanted = "the folder of a PEFT adapter"
    if not Path(name).expanduser().is_dir():
        yield absent("model.adapter", name, wanted)
    elif not (Path(name).expanduser() / "adapter_config.json").is_file():
        got = f"{shown(name)}, which has no adapter_config.json"
        yield Problem("model.adapter", wanted, got, "name the adapter's own folder, of a run its adapter/")


def rows(settings: Settings) -> Iterator[Problem]:
    """Files of rows, templates and partitions exist."""
    for name in ("data.path", "data.eval_path"):
        path = settings.value(name)
        if path not in (None, "embedded") and not Path(path).exists() and not looks_like_hub_name(path):
            yield absent(name, path, "a file, a folder, or a hub name such as org/name")
    template = settings.data.template
    if template is not None and ("/" in template or Path(template).suffix) and not Path(template).is_file():
        yield absent("data.template", template, "a shipped template's name or a file")
    saved = settings.partition.path
    if saved is not None and not Path(saved).exists():
        yield absent("partition.path", saved, "a saved partition.json")
    replayed = settings.federation.participation
    if replayed is not None and not Path(replayed).is_dir():
        yield absent("federation.participation", replayed, "the folder of a run")
    for suite, path in settings.evaluation.paths.items():
        if not Path(path).expanduser().exists():
            yield absent("evaluation.paths", path, f"a file or folder for {suite}")


def clients_may_be_lost(settings: Settings) -> bool:
    """Tell whether a client can lose all its rows; how many do, only the rows say."""
    data = settings.data
    return bool(data.overlong != "error" or data.unanswered == "drop" or data.eval_rows or data.max_rows)


def clients(settings: Settings) -> Iterator[Problem]:
    """One file per client means as many files as clients."""
    folder = Path(settings.data.path)
    if settings.partition.scheme != "natural" or settings.partition.column is not None or not folder.is_dir():
        return
    files = sum(CLIENT_FILE.fullmatch(file.name) is not None for file in folder.iterdir())
    wanted = settings.federation.num_clients
    if files and files != wanted and not (clients_may_be_lost(settings) and wanted < files):
        yield Problem(
            "federation.num_clients",
            f"{files}, one per local_training_<i> file in {shown(settings.data.path)}",
            str(wanted),
            f"set federation.num_clients = {files}",
            ("data.path", "partition.scheme"),
        )


def read_shape(config: dict[str, Any], targets: tuple[str, ...] | None) -> Shape:
    """Read blocks, context and the smallest side of an adapted layer under the names the families use."""
    width = _first(config, "hidden_size", "n_embd", "d_model")
    heads = _first(config, "num_attention_heads", "n_head")
    groups = config.get("num_key_value_heads")
    adapted = targets is None or any(_reaches(target, layer) for target in targets for layer in GROUPED)
    # Under all-linear a layer that is narrower than a rank takes what it can.
    max_rank, narrowest = (None if targets is not None and "all-linear" in targets else width), "hidden size"
    if adapted and width and heads and groups and max_rank is not None:
        head_dim = config.get("head_dim") or width // heads
        max_rank, narrowest = min(width, groups * head_dim), "v_proj's outputs"
    context = _first(config, "max_position_embeddings", "n_positions", "n_ctx")
    return Shape(_first(config, "num_hidden_layers", "n_layer"), context, max_rank, narrowest)


def _reaches(target: str, layer: str) -> bool:
    return target == "all-linear" or layer in target or fnmatchcase(layer, target.rpartition(".")[2])


def _first(config: dict[str, Any], *names: str) -> int | None:
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)


def sizes(settings: Settings, shape: Shape) -> Iterator[Problem]:
    """Ranks fit the layers, rows fit the context, cuts fall between blocks."""
    for name in ("method.ranks", "split.client_rank", "split.server_rank"):
        largest = _largest(settings.value(name))
        if shape.max_rank is not None and largest > shape.max_rank:
            wanted = f"ranks of at most {shape.max_rank} ({shape.narrowest} of the base)"
            yield Problem(name, wanted, str(largest), "lower the rank", ("model.base", "model.target_modules"))
    length = settings.data.max_length
    if shape.context is not None and length is not None and length > shape.context:
        wanted = f"at most the base's context of {shape.context} tokens"
        yield Problem("data.max_length", wanted, str(length), "lower it, or drop it", ("model.base",))
    if settings.traits.is_cut and shape.num_blocks is not None:
        yield from _cut(settings, shape.num_blocks)


def _cut(settings: Settings, num_blocks: int) -> Iterator[Problem]:
    tail = settings.split.tail_blocks if settings.split.labels == "client" else 0
    last = num_blocks - 1 - tail
    cut = _largest(settings.split.cut_layer)
    if last < 1:
        got = f"{num_blocks}, of which the client keeps the last {tail}" if tail else str(num_blocks)
        action = "lower split.tail_blocks" if num_blocks > 2 else "set split.labels = server"
        action = action if num_blocks > 1 else "use a method that does not cut the model"
        yield Problem("split.cut_layer", "a base with a block on either side of the cut", got, action, ("model.base",))
    elif cut > last:
        keeps = f", the client keeps the last {tail}" if tail else ""
        wanted = f"cuts from 1 to {last} (the base has {num_blocks} blocks{keeps})"
        yield Problem(
            "split.cut_layer", wanted, str(cut), "lower it", ("model.base", "split.tail_blocks", "split.labels")
        )


def _largest(value: int | tuple[int, ...] | dict[str, int] | None) -> int:
    return max(values_of(value), default=0)
