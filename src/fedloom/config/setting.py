"""What one line of the schema says: a type with its bound, a default, when the setting acts, and its sentence.

Every table derives from :class:`Table`. The same line feeds four readers: pydantic (type and bound), the error messages
(:func:`expected`), the applicability check (:func:`conditions`) and the page ``docs/settings.md``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo


def _expand_home(text: str) -> str:
    """Return a path with its ``~`` replaced.

    Raises:
        ValueError: there is no such home, or the name can be no file's.
    """
    if "\0" in text:
        raise ValueError("a name holds no NUL character")
    try:
        return str(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError as error:
        raise ValueError(str(error)) from error


Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Gt(0), Le(1)]
OpenFraction = Annotated[float, Gt(0), Lt(1)]
Decay = Annotated[float, Ge(0), Lt(1)]
Name = Annotated[str, MinLen(1)]
PathOrName = Annotated[str, MinLen(1), AfterValidator(_expand_home)]

Condition = Mapping[str, tuple[str, ...]]


class Table(BaseModel):
    """A table of settings: frozen, strict about types, closed to unknown names, its numbers finite."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


def setting(default: Any, description: str, *, when: Condition | None = None) -> Any:
    """Declare a setting by its default, its sentence, and the values of other settings under which it acts."""
    return Field(
        default, description=description, json_schema_extra={"when": {k: list(v) for k, v in (when or {}).items()}}
    )


def conditions(field: FieldInfo) -> dict[str, list[str]]:
    """Return the settings, with the values, under which ``field`` acts; empty when it always does."""
    extra = field.json_schema_extra
    return dict(extra["when"]) if isinstance(extra, dict) else {}  # type: ignore[arg-type]


def expected(field: FieldInfo) -> str:
    """Say in words what ``field`` accepts, e.g. ``an integer ≥ 1, or a list (each an integer ≥ 1)``."""
    return _words(field.annotation, field.metadata)


def choices(annotation: Any) -> list[str]:
    """Return the closed set of values ``annotation`` allows; empty when it is open."""
    if get_origin(annotation) is Literal:
        return list(map(str, get_args(annotation)))
    return [choice for argument in get_args(annotation) for choice in choices(argument)]


def shown(value: object) -> str:
    """Write ``value`` as a user would in TOML."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _words(annotation: Any, bounds: Iterable[object] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0], [*arguments[1:], *bounds])
    if origin is Literal:
        return "one of " + ", ".join(map(shown, arguments)) if len(arguments) > 1 else shown(arguments[0])
    if origin in (Union, UnionType):
        return ", or ".join(_words(one) for one in arguments if one is not NoneType)
    if origin is tuple:
        return f"a list (each {_words(arguments[0])})"
    if origin is dict:
        return "a table of name = text"
    return _scalar_words(annotation, list(bounds))


def _scalar_words(kind: Any, bounds: list[object]) -> str:
    noun = {int: "an integer", float: "a number", bool: "true or false", str: "text"}[kind]
    return " ".join([noun, " and ".join(filter(None, map(_bound_words, bounds)))]).strip()


def _bound_words(bound: object) -> str:
    match bound:
        case Ge(ge=low):
            return f"≥ {low}"
        case Gt(gt=low):
            return f"> {low}"
        case Le(le=high):
            return f"≤ {high}"
        case Lt(lt=high):
            return f"< {high}"
        case _:
            return ""
