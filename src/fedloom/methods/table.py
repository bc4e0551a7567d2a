"""The table of methods: the shipped ones, those of installed packages, and those registered in this process.

A method is its traits and how its strategy is made. The traits are read everywhere; what makes a strategy is loaded
when one is run. Three ways into the table:

* shipped: a line below;
* installed: an entry point of the group ``fedloom.methods`` whose name is the method's and whose object is a
  :class:`Method`;
* registered: a call of :func:`register_method`, e.g. in a notebook, for this process alone.

Imports no torch. The packages' entry points are looked up when a name is not a shipped one, or when all are listed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module, metadata
from typing import Any

from fedloom.errors import MethodError
from fedloom.methods.method import Make
from fedloom.methods.method import Method as Method
from fedloom.methods.options import MethodOptions as MethodOptions
from fedloom.methods.shipped import SHIPPED
from fedloom.methods.traits import Kind, Traits
from fedloom.wording import nearest

GROUP = "fedloom.methods"
BASELINE = "fedit"
"""The default of ``method.name``, and the method that tables set the others against."""
EXACT = "flora"
"""The default of ``fedloom.aggregate``, and the method whose answers the demo shows: its product is the exact mean."""

OTHER_NAMES = {
    "fedavg": "fedit",
    "fedavglora": "fedit",
    "hetlora": "zero-padding",
    "padding": "zero-padding",
    "local": "standalone",
}
"""What others call a method, in small letters without signs; meant for messages."""

_LOCAL: dict[str, Method] = {}


def register_method(method: Method) -> None:
    """Add a method for this process, e.g. from a notebook.

    It works in everything that runs in this process. Engines that start others need it installed: give its package
    an entry point in the group ``fedloom.methods``.

    Raises:
        MethodError: it is not a method, or the table has one of that name.
    """
    if not isinstance(method, Method):
        raise MethodError(f"expected a Method(traits, make) to register, got {type(method).__name__}; make one")
    name = method.traits.name
    if name in _LOCAL:
        raise MethodError(f"method {name} is registered already: call unregister_method({name!r}) first, or rename it")
    if name in SHIPPED or name in _installed().methods:
        raise MethodError(f"method {name}: expected a new name, fedloom or a package has a method of that name; rename")
    _LOCAL[name] = replace(method, is_local=True)


def unregister_method(name: str) -> None:
    """Take a registered method out again.

    Raises:
        MethodError: no method of that name was registered in this process.
    """
    if _LOCAL.pop(name, None) is None:
        known = ", ".join(_LOCAL) or "none"
        raise MethodError(f"method {name}: expected one registered in this process ({known}); name one of them")


def get(name: str) -> Method:
    """Return a method.

    Raises:
        MethodError: there is none of that name that can be used.
    """
    if (found := _found(name)) is not None:
        return found
    raise MethodError(f"expected a method of {', '.join(names())}, got {name!r}; {remedy(name, names())}")


def remedy(name: str, among: Iterable[str]) -> str:
    """Say what to do about a name that is not ``among`` the methods asked for: why an installed one cannot be used."""
    if name in _installed().faults:
        return _installed().faults[name]
    among = list(among)
    known = OTHER_NAMES.get(re.sub(r"[^a-z]", "", name.lower()))
    close = known if known in among else nearest(name, among)
    advice = f"did you mean {close}?" if close else "name one of them"
    return advice if has(name) else f"{advice} (a method of your own must be registered or installed first)"


def traits_of(name: str) -> Traits:
    """Return a method's traits.

    Raises:
        MethodError: there is no method of that name.
    """
    return get(name).traits


def has(name: str, trait: str | None = None) -> bool:
    """Tell whether there is a method of that name, and with that trait where one is asked for."""
    found = _found(name)
    return found is not None and (trait is None or bool(getattr(found.traits, trait)))


def names(trait: str | None = None) -> tuple[str, ...]:
    """Return the methods that have a trait, or all, in the order of tables: by kind, then shipped before others."""
    return _ordered((*SHIPPED.values(), *_installed().methods.values(), *_LOCAL.values()), trait)


def shipped(trait: str | None = None) -> tuple[str, ...]:
    """Return the shipped methods that have a trait, or all, in the order of tables: what help and pages list."""
    return _ordered(tuple(SHIPPED.values()), trait)


def place(name: str) -> int:
    """Return a method's place in tables; one that is not here (a run of another machine) comes last."""
    known = names()
    return known.index(name) if name in known else len(known)


def make(name: str, cohort: Any, options: MethodOptions | None = None) -> Any:
    """Return the ``Strategy`` of a method for a ``Cohort``.

    Raises:
        MethodError: there is no such method, it has no strategy, or what makes it cannot be imported.
    """
    method = get(name)
    if method.make is None:
        wanted = ", ".join(names("runs_rounds"))
        raise MethodError(f"expected a method that runs in rounds of adapters ({wanted}), got {name!r}; name one")
    maker, options = _resolved(name, method.make), options or MethodOptions()
    around = _resolved(name, "fedloom.methods.optional_parts:with_options")
    return around(maker(cohort, options), options, starts_fresh=method.traits.starts_fresh)


def faults() -> tuple[str, ...]:
    """Return a line for every installed method that cannot be used."""
    return tuple(_installed().faults.values())


def _found(name: str) -> Method | None:
    return SHIPPED.get(name) or _LOCAL.get(name) or _installed().methods.get(name)


def _ordered(methods: tuple[Method, ...], trait: str | None) -> tuple[str, ...]:
    kinds = list(Kind)
    chosen = [one.traits for one in methods if trait is None or getattr(one.traits, trait)]
    return tuple(traits.name for traits in sorted(chosen, key=lambda traits: kinds.index(traits.kind)))


def _resolved(name: str, text: str | Make) -> Callable[..., Any]:
    if not isinstance(text, str):
        return text
    module, _, attribute = text.partition(":")
    try:
        found: Callable[..., Any] = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise MethodError(f"method {name}: expected {text} to make its strategy: {error}; correct make=") from error
    return found


@dataclass(frozen=True)
class _Installed:
    """The methods of installed packages, and by name a line for each that cannot be used."""

    methods: dict[str, Method]
    faults: dict[str, str]


@cache
def _installed() -> _Installed:
    found, broken = dict[str, Method](), dict[str, str]()
    for entry in sorted(metadata.entry_points(group=GROUP), key=lambda entry: (_package(entry), entry.name)):
        method = _loaded(entry, found)
        if isinstance(method, Method):
            found[entry.name] = method
        else:
            broken[entry.name] = f"method {entry.name} of the package {_package(entry)} cannot be used: {method}"
    return _Installed(found, broken)


def _loaded(entry: metadata.EntryPoint, found: dict[str, Method]) -> Method | str:
    """Load an entry point; return its method, or in one line what is wrong with it."""
    try:
        loaded = entry.load()
    except Exception as error:  # whatever a package raises while it is imported: it must not take the others along
        first = (str(error).splitlines() or ["no reason"])[0]
        return f"{type(error).__name__}: {first}; reinstall or remove the package"
    if not isinstance(loaded, Method):
        return f"expected {entry.value} to be a Method, got {type(loaded).__name__}; correct its entry point"
    if loaded.traits.name != entry.name:
        return f"expected the entry point's name to be the method's, got {loaded.traits.name}; correct its entry point"
    if entry.name in SHIPPED or entry.name in found:
        return "another method has that name; rename it"
    return loaded


def _package(entry: metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value
