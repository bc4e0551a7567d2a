"""What is wrong with a setting, in one line: expected, received, where, what to do."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from fedloom.config.schema import tables
from fedloom.config.setting import MethodsHaving, Table, choices, expected, shown
from fedloom.errors import SettingsError
from fedloom.methods import table as methods
from fedloom.wording import nearest

NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?")
KNOWN_ELSEWHERE = {
    "lora_r": "method.ranks",
    "lora_rank": "method.ranks",
    "r": "method.ranks",
    "rank": "method.ranks",
    "lora_alpha": "method.alpha",
    "use_rslora": "method.scaling",
    "aggregation": "method.name",
    "lr": "training.learning_rate",
    "epochs": "training.local_epochs",
    "num_train_epochs": "training.local_epochs",
    "max_steps": "training.local_steps",
    "per_device_train_batch_size": "training.batch_size",
    "rounds": "federation.num_rounds",
    "clients": "federation.num_clients",
    "client_fraction": "federation.clients_per_round",
    "fraction_fit": "federation.clients_per_round",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "learning_rate": "training.learning_rate",
    "dataset": "data.path",
    "model_name_or_path": "model.base",
    "dirichlet_alpha": "partition.concentration",
}


@dataclass(frozen=True)
class Problem:
    """One thing wrong with ``setting``; ``about`` names the other settings it was judged by."""

    setting: str
    expected: str
    got: str
    action: str
    about: tuple[str, ...] = ()

    def line(self, origins: Mapping[str, str]) -> str:
        """Say it in one line, with where each value came from."""
        place = origins.get(self.setting) or origins.get(self.setting.partition(".")[0])
        if place is None and self.got != "none":  # what is given nowhere stands nowhere
            place = "the defaults"
        got = self.got if place is None else f"{self.got}, in {place}"
        return f"{self.setting}: expected {self.expected}, got {got}; {self.action}"


def refuse(problems: Sequence[Problem], origins: Mapping[str, str]) -> None:
    """Raise all ``problems``, a line each.

    Raises:
        SettingsError: when there is any.
    """
    if problems:
        raise SettingsError("\n".join(problem.line(origins) for problem in problems))


def schema_problems(
    error: ValidationError, document: Mapping[str, Any], kinds: Mapping[str, type[Table]] | None = None
) -> list[Problem]:
    """Turn pydantic's findings into one problem per setting; ``kinds`` are other tables than a recipe's."""
    found: dict[str, Problem] = {}
    for detail in error.errors(include_url=False, include_context=False):
        table, key = (*map(str, detail["loc"][:2]), "")[:2]
        name = f"{table}.{key}" if key else table
        if name not in found:
            found[name] = _schema_problem(table, key, document, tables() if kinds is None else kinds)
    return list(found.values())


def _schema_problem(table: str, key: str, document: Mapping[str, Any], kinds: Mapping[str, type[Table]]) -> Problem:
    if table not in kinds:
        return _unknown_table(table, document[table], kinds)
    if not key:
        got = shown(document[table]) if table in document else "none"
        return Problem(table, f"a table [{table}]", got, f"write its settings under [{table}]")
    field = kinds[table].model_fields.get(key)
    if field is None:
        action = suggestion(f"{table}.{key}", kinds)
        return Problem(f"{table}.{key}", f"a setting of [{table}]", shown(key), action)
    if key not in document[table]:
        return Problem(f"{table}.{key}", expected(field), "none", "set it")
    value = document[table][key]
    wanted = expected(field)
    if any(
        isinstance(one, float) and not math.isfinite(one) for one in (value if isinstance(value, list) else [value])
    ):
        wanted = wanted.replace("a number", "a finite number")
    return Problem(f"{table}.{key}", wanted, shown(value), _remedy(field, value))


def _unknown_table(table: str, value: object, kinds: Mapping[str, type[Table]]) -> Problem:
    close = nearest(table, kinds)
    action = f"did you mean [{close}]?" if close else suggestion(table, kinds)
    if not isinstance(value, Mapping):
        action = suggestion(table, kinds)
    return Problem(table, "one of the tables " + ", ".join(kinds), shown(table), action)


def _remedy(field: FieldInfo, value: object) -> str:
    accepts = expected(field)
    if isinstance(value, str):
        if any(isinstance(part, MethodsHaving) for part in field.metadata):
            return methods.remedy(value, choices(field))
        if "a list" in accepts and "," in value:
            items = [item.strip(" []'\"") for item in value.split(",")]
            return (
                "write a list: [" + ", ".join(item if NUMBER.fullmatch(item) else shown(item) for item in items) + "]"
            )
        close = nearest(value, choices(field))
        if close:
            return f"did you mean {shown([close] if accepts.startswith('a list') else close)}?"
    return "give such a value, or drop the setting for its default"


def suggestion(name: str, kinds: Mapping[str, type[Table]] | None = None) -> str:
    """Say which setting was probably meant by the unknown ``name``: one spelt like it, here or in another table."""
    names = [f"{table}.{key}" for table, kind in (kinds or tables()).items() for key in kind.model_fields]
    table, _, key = name.rpartition(".")
    here = {known.rpartition(".")[2]: known for known in names if known.startswith(f"{table}.")}
    elsewhere = [KNOWN_ELSEWHERE[key]] if KNOWN_ELSEWHERE.get(key) in names else []
    elsewhere += [known for known in names if known.rpartition(".")[2] == key]
    close = here.get(nearest(key, here) or "")
    meant = next(iter(elsewhere), None) or close or nearest(name, names)
    return f"did you mean {meant}?" if meant else "remove it; docs/settings.md lists every setting"
