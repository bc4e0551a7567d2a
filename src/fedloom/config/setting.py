"""What one line of the schema says: a type with its bound, a default, when the setting acts, and its sentence.

Every table derives from :class:`Table`. The same line feeds four readers: pydantic (type and bound), the error messages
(:func:`expected`), the applicability check (:func:`conditions`) and the page ``docs/settings.md``. Where a setting
names a method, or depends on one, the line says which trait the method must have (:func:`having`).
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_core import core_schema

from fedloom.methods import table
from fedloom.methods.traits import Traits
from fedloom.wording import either


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


def _day_as_text(given: object) -> object:
    """TOML has dates; every other file of settings writes them as text."""
    return given.isoformat() if isinstance(given, datetime.date) and not isinstance(given, datetime.datetime) else given


def _check_day(text: str) -> str:
    if datetime.date.fromisoformat(text).isoformat() != text:
        raise ValueError("a day is written as 2026-01-31")
    return text


Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Gt(0), Le(1)]
OpenFraction = Annotated[float, Gt(0), Lt(1)]
OpenHalf = Annotated[float, Gt(0), Lt(0.5)]
Decay = Annotated[float, Ge(0), Lt(1)]
Name = Annotated[str, MinLen(1)]
Day = Annotated[str, BeforeValidator(_day_as_text), AfterValidator(_check_day)]
PathOrName = Annotated[str, MinLen(1), AfterValidator(_expand_home)]

CountPerClient = Count | tuple[Count, ...] | dict[str, Count]
PositivePerClient = Positive | tuple[Positive, ...] | dict[str, Positive]
NonNegativePerClient = NonNegative | tuple[NonNegative, ...] | dict[str, NonNegative]


@dataclass(frozen=True)
class MethodsHaving:
    """The methods of the table that have a trait, looked up when asked: all of them where ``trait`` is None.

    In a setting's type it rejects other names; in its ``when=`` it is the set of values under which the setting acts.
    """

    trait: str | None = None

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and table.has(name, self.trait)

    def __iter__(self) -> Iterator[str]:
        return iter(table.names(self.trait))

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        return core_schema.no_info_after_validator_function(self._accepted, handler(source))

    def _accepted(self, name: str) -> str:
        if name not in self:
            raise ValueError(f"{name} is not a method that can be named here")
        return name


def having(trait: str | None = None) -> MethodsHaving:
    """Return the methods with a trait of :class:`fedloom.methods.traits.Traits`, or all of them."""
    assert trait is None or trait in Traits.__dataclass_fields__ or hasattr(Traits, trait), trait
    return MethodsHaving(trait)


Values = tuple[str, ...] | MethodsHaving
Condition = Mapping[str, Values]


class Table(BaseModel):
    """A table of settings: frozen, strict about types, closed to unknown names, its numbers finite."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


def setting(default: Any, description: str, *, when: Condition | None = None) -> Any:
    """Declare a setting by its default, its sentence, and the values of other settings under which it acts."""
    extra: Any = {"when": dict(when or {})}
    return Field(default, description=description, json_schema_extra=extra)


def conditions(field: FieldInfo) -> dict[str, Values]:
    """Return the settings, with the values, under which ``field`` acts; empty when it always does."""
    extra = field.json_schema_extra
    return dict(extra["when"]) if isinstance(extra, dict) else {}  # type: ignore[arg-type]


def expected(field: FieldInfo) -> str:
    """Say in words what ``field`` accepts, e.g. ``an integer ≥ 1, or a list (each an integer ≥ 1)``."""
    return _words(field.annotation, field.metadata)


def in_words(values: Values) -> str:
    """Say which values would do: ``a, b or c``, or ``any but a`` where those that would not are fewer."""
    would = list(values)
    if isinstance(values, MethodsHaving):
        others = [name for name in table.names() if name not in would]
        if len(others) < len(would):
            return "any but " + either(others) if others else "any"
    return either(would)


def choices(field: FieldInfo) -> list[str]:
    """Return the closed set of values ``field`` allows; empty when it is open."""
    methods = [name for part in field.metadata if isinstance(part, MethodsHaving) for name in part]
    return methods or _literals(field.annotation)


def _literals(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return list(map(str, get_args(annotation)))
    return [choice for argument in get_args(annotation) for choice in _literals(argument)]


def values_of(value: Any) -> tuple[Any, ...]:
    """Return the values of a setting that is one value, a list, or a table of name = value; none for None."""
    if isinstance(value, dict):
        return tuple(value.values())
    return value if isinstance(value, tuple) else () if value is None else (value,)


def described(name: str, field: FieldInfo) -> str:
    """Return a setting in one line: its name, what it takes, its default, its sentence, and when it acts."""
    default = field.get_default()
    acts = "; ".join(f"`{other}` = {in_words(values)}" for other, values in conditions(field).items())
    says = f"{field.description} Only with {acts}." if acts else f"{field.description}"
    given = "optional" if default is None else f"default `{shown(default)}`"
    given = "required" if field.is_required() else given
    return f"`{name}` ({expected(field)}; {given}): {says}"


def shown(value: object) -> str:
    """Write ``value`` as a user would in TOML."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _words(annotation: Any, bounds: Iterable[object] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0], [*arguments[1:], *bounds])
    if origin is Literal:
        return _one_of(arguments)
    if origin in (Union, UnionType):
        return ", or ".join(_words(one) for one in arguments if one is not NoneType)
    if origin is tuple:
        return f"a list (each {_words(arguments[0])})"
    if origin is dict:
        return f"a table of name = {_words(arguments[1])}"
    return _scalar_words(annotation, list(bounds))


def _one_of(values: Iterable[object]) -> str:
    written = list(map(shown, values))
    return "one of " + ", ".join(written) if len(written) > 1 else written[0]


def _scalar_words(kind: Any, bounds: list[object]) -> str:
    methods = [bound for bound in bounds if isinstance(bound, MethodsHaving)]
    if methods:
        return _one_of(methods[0])
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
