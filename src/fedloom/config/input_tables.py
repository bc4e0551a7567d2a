"""The tables that say what to learn from: base model, rows, and who owns which.

One line declares a setting: type with its bound, default, sentence, when it acts. Units are in the names. ``None``
(a setting that is not given) means what its sentence says.
"""

from __future__ import annotations

import datetime
from typing import Any, Literal

from pydantic import model_validator

from fedloom.config.setting import (
    Count,
    Day,
    Name,
    Natural,
    NonNegative,
    OpenFraction,
    PathOrName,
    Positive,
    Table,
    having,
    setting,
)


class Model(Table):
    """The frozen base model and where the adapters sit."""

    base: PathOrName = setting(
        "embedded", "Base model: a Hugging Face folder, a hub name, or `embedded` for the small model in the package."
    )
    tokenizer: PathOrName | None = setting(
        None, "Tokenizer folder or hub name, or `bytes` (one id per byte); default: the base's own."
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = setting(
        "auto", "Type the base computes in; `auto`: the one its weights are stored in."
    )
    device: Name = setting("auto", "`auto`, `cpu`, `cuda`, `cuda:N` or `mps`.")
    quantization: Literal["none", "4bit", "8bit"] = setting(
        "none", "Load the base quantized (extra `quantized`); the adapters stay in full precision."
    )
    revision: Name | None = setting(None, "Commit, tag or branch of a base from the hub; default: its main branch.")
    trust_remote_code: bool = setting(
        False, "Run the Python code that comes with a base or tokenizer; otherwise one that needs its own is refused."
    )
    attention: Literal["packed", "padded"] = setting(
        "packed",
        "How rows share a pass: `packed`, without padding; `padded` to the longest, by the model's own attention: "
        "slower, for families that cannot be packed.",
        when={"method.name": having("is_uncut")},
    )
    adapter: PathOrName | None = setting(
        None,
        "Start from this PEFT adapter: it stays frozen beside the base, and the result contains it.",
        when={"method.name": having("is_uncut")},
    )
    train_adapter: bool = setting(
        False,
        "Continue the adapter instead: its factors are where training begins.",
        when={"method.name": having("takes_start")},
    )
    target_modules: tuple[Name, ...] | None = setting(
        None,
        "Names or patterns of the adapted layers; default: those of `adapter`, or usual for the model's family.",
    )


class Data(Table):
    """The rows, their shape, and what of each row is learned."""

    @model_validator(mode="before")
    @classmethod
    def _word_embedded_rows(cls, given: Any) -> Any:
        """The embedded base was pretrained on the plain wording, so its rows use that."""
        if isinstance(given, dict) and given.get("path", "embedded") == "embedded" and given.get("template") is None:
            return {**given, "template": "plain"}
        return given

    path: PathOrName = setting(
        "embedded", "Rows: a file (JSON, JSONL, CSV, Parquet), a folder of them, a hub name, or `embedded`."
    )
    split: Literal["train", "eval", "test"] = setting("train", "Part of a folder or of a hub data set.")
    subset: Name | None = setting(None, "Configuration of a hub data set that has several.")
    revision: Name | None = setting(None, "Commit, tag or branch of a hub data set; default: its main branch.")
    shape: Literal["auto", "alpaca", "dolly", "prompt-completion", "messages", "sharegpt", "e2e", "question-answer"] = (
        setting("auto", "How a row becomes prompt and answer; `auto`: from its columns.")
    )
    columns: dict[str, str] = setting(
        {}, "Columns under other names: the shape's name = the file's, e.g. `{instruction = \"question\"}`."
    )
    template: PathOrName | None = setting(
        None, "Prompt template: a shipped name or a file; default: the shape's own (`plain` for embedded rows)."
    )
    date: Day | None = setting(
        None,
        "The day that a chat template is told, as `2026-01-31`; default: the day on which the run starts, which its "
        "manifest keeps.",
    )
    max_length: Count | None = setting(None, "Tokens per row at most; default: the base's context.")
    overlong: Literal["error", "drop", "truncate"] = setting("error", "What to do with a row longer than `max_length`.")
    unanswered: Literal["error", "drop"] = setting("error", "What to do with a row without an answer.")
    loss_on: Literal["answer", "all"] = setting("answer", "Tokens that are learned: the answer's, or the prompt's too.")
    eval_path: PathOrName | None = setting(
        None,
        "Held-out rows from a file, folder or hub name. Give at most one of the three ways to hold rows out; without "
        "one, no loss is measured on rows that were not trained on.",
    )
    eval_rows: Count | None = setting(
        None, "Held-out rows as a number, drawn from the rows before they are partitioned."
    )
    eval_fraction: OpenFraction | None = setting(None, "Held-out rows as a fraction of the rows.")
    validation_fraction: OpenFraction | None = setting(
        None,
        "Measure on that fraction of the training rows, which are not trained on, instead of on the held-out rows, "
        "which are not looked at: to choose settings. `fedloom compare --grid` sets it.",
    )
    scored_seeds: tuple[Natural, ...] = setting(
        (),
        "With `validation_fraction`: seeds of runs that will be scored; rows that any of them holds out are not used.",
    )
    max_rows: Count | None = setting(None, "Use only that many rows, drawn at random; default: all.")
    unit_column: Name | None = setting(
        None,
        "Column that says whose a row is, such as a patient or a person: all rows of a value are hidden together, and "
        "ε is counted in values; default: each row is hidden by itself.",
        when={"privacy.unit": ("row",)},
    )
    canaries: Natural = setting(
        0,
        "Sequences of random tokens planted among the rows of each client that gets any; `fedloom leakage` says if "
        "the model gives them away.",
        when={"method.name": having("runs_rounds")},
    )
    canary_clients: tuple[Name, ...] = setting(
        (), "Names of the clients that get canaries; default: each.", when={"method.name": having("runs_rounds")}
    )
    canary_repetitions: Count = setting(
        1, "How often each canary is among its client's rows.", when={"method.name": having("runs_rounds")}
    )

    @property
    def day(self) -> datetime.date | None:
        """``date`` as one."""
        return None if self.date is None else datetime.date.fromisoformat(self.date)


class Partition(Table):
    """Who owns which row."""

    scheme: Literal["iid", "dirichlet", "shards", "category", "size", "power-law", "length", "natural"] = setting(
        "iid", "How rows are dealt to clients; `natural`: by the values of `column`, or one file per client."
    )
    column: Name | None = setting(
        None,
        "Column whose values distinguish the rows.",
        when={"partition.scheme": ("dirichlet", "shards", "category", "natural")},
    )
    exponent: NonNegative = setting(
        1.0, "How fast sizes fall: client k has a share ∝ (k+1)^-exponent.", when={"partition.scheme": ("power-law",)}
    )
    concentration: Positive = setting(
        0.5, "Dirichlet's alpha: small is skewed, large is even.", when={"partition.scheme": ("dirichlet", "size")}
    )
    shards_per_client: Count = setting(
        2, "Shards a client gets of the rows sorted by `column`.", when={"partition.scheme": ("shards",)}
    )
    categories_per_client: Count = setting(
        2, "Values of `column` a client holds.", when={"partition.scheme": ("category",)}
    )
    min_rows: Count = setting(1, "Rows every client must have.")
    empty: Literal["error", "drop"] = setting(
        "error",
        "A client none of whose rows is usable is an error, or left out by name.",
        when={"partition.scheme": ("natural",)},
    )
    path: PathOrName | None = setting(None, "Reuse this saved `partition.json` instead of drawing one.")
