"""A function of the user's own as a subject.

    def aggregate(adapters, weights, scales):
        return {module: (B, A)}               # or {module: matrix of (out, in)}

``adapters`` is a list with one dict a client that takes part: module → (B, A), float32, as trained, so that client k
adds ``scales[k] · B A`` to a module; ``weights`` are its rows, ``scales`` alpha / rank. What is returned is what is
added to the base in their place. A function that names a parameter ``population`` is given the rows of all registered
clients as well, of those too that stayed away.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedloom.audit.subject import SHAPES, Contribution, Products, Scene, asked
from fedloom.errors import AdapterError, MethodError
from fedloom.lora.algebra import pad
from fedloom.lora.pair import BOTH, Adapter, Pair
from fedloom.methods.traits import Law
from fedloom.wording import one_line

ALPHA = 16.0
POPULATION = "population"
Function = Callable[..., Any]
Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class FunctionSubject:
    """A function, by the name that the user gave it."""

    name: str
    function: Function
    claims: frozenset[Law] = frozenset(Law)
    needs_one_rank: bool = False

    def exempt(self, law: Law) -> str:
        """Return why a law does not apply: a function has no messages."""
        return "a function sends nothing" if law is Law.CATCH_UP else ""

    def trial(self, scene: Scene, registered: Mapping[int, int]) -> FunctionTrial:
        """Return a fresh trial; what the function itself remembers is its own."""
        return FunctionTrial(self, scene, registered)


@contextlib.contextmanager
def importing_from(folder: Path) -> Iterator[None]:
    """Let modules of a folder be imported, before installed ones."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code may have taken it out
            sys.path.remove(str(folder))


def function_subject(name: str, unclaimed: Sequence[str] = (), *, needs_one_rank: bool = False) -> FunctionSubject:
    """Import ``module:function`` and return it as a subject; everything in its module is run.

    Raises:
        MethodError: it cannot be imported, cannot be called as documented, or a law is unknown.
    """
    if unknown := [law for law in unclaimed if law not in list(Law)]:
        raise MethodError(f"--unclaimed: expected a law of {', '.join(Law)}, got {unknown[0]!r}; name one of them")
    module, _, attribute = name.partition(":")
    if not module or not attribute or module.endswith(".py") or "/" in module or os.sep in module:
        raise MethodError(f"expected module:function, as in mine:aggregate for mine.py, got {name!r}; correct the name")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:
        reason = one_line(next(iter(str(error).splitlines()), "no reason"))
        raise MethodError(
            f"{name}: expected a function in a module of this folder or an installed one, got "
            f"{type(error).__name__}: {reason[:200]}; correct the name or the module"
        ) from error
    _check_signature(name, found)
    claims = frozenset(law for law in Law if law not in unclaimed)
    return FunctionSubject(name, found, claims, needs_one_rank)


def _check_signature(name: str, found: object) -> None:
    wanted = "expected a function (adapters, weights, scales)"
    if not callable(found):
        raise MethodError(f"{name}: {wanted}, got {type(found).__name__}; name the function")
    try:
        signature = inspect.signature(found)
    except ValueError:  # written in C: what it takes shows when it is called
        return
    known = {POPULATION: None} if POPULATION in signature.parameters else {}
    try:
        signature.bind(None, None, None, **known)
    except TypeError as error:
        raise MethodError(f"{name}: {wanted}, got one of {signature}; give it these parameters") from error


class FunctionTrial:
    """A function in one scene: every client starts from a fresh adapter, whose B is zero."""

    def __init__(self, subject: FunctionSubject, scene: Scene, registered: Mapping[int, int]) -> None:
        self._name, self._function, self._scene = subject.name, subject.function, scene
        self._population = [float(rows) for rows in registered.values()]
        self._changed = ""

    @property
    def trains(self) -> frozenset[str]:
        """Both factors."""
        return BOTH

    def before(self) -> Products:
        """Return nothing: what a function returns is all that is added."""
        return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}

    def given(self, client: int) -> Adapter:
        """Return a fresh adapter."""
        drawn = self._scene.draw(self._scene.rank_of(client), "fresh", client)
        return Adapter({name: Pair(torch.zeros_like(pair.b_OR), pair.a_RI) for name, pair in drawn.items()})

    def ended(self, client: int, factors: Adapter) -> Adapter:
        """Return the factors, with zeros for slots that they lack: all of them are trained."""
        return pad(factors, self._scene.rank_of(client))

    def combined(self, round: Sequence[Contribution]) -> Products:
        """Return the product of what the function returns."""
        scales = [ALPHA / self._scene.rank_of(one.client) for one in round]
        returned = self._returned([one.adapter for one in round], [float(one.rows) for one in round], scales)
        return {name: self._product(name, returned[name]) for name in SHAPES}

    def grouped(self, groups: Sequence[Sequence[Contribution]]) -> Products | str:
        """Return the aggregate of the groups' aggregates, each of which weighs what its clients weigh."""
        parts, weights = [], []
        for group in groups:
            scales = [ALPHA / self._scene.rank_of(one.client) for one in group]
            part = self._returned([one.adapter for one in group], [float(one.rows) for one in group], scales)
            pairs = {name: _pair(part[name]) for name in SHAPES}
            if any(pair is None for pair in pairs.values()):
                return "it returns matrices, not factors that could be combined again"
            parts.append(Adapter({name: Pair(*pair) for name, pair in pairs.items() if pair is not None}))
            weights.append(float(sum(one.rows for one in group)))
        whole = self._returned(parts, weights, [1.0] * len(parts))
        return {name: self._product(name, whole[name]) for name in SHAPES}

    def caught_up(self) -> float | str:
        """Return why the law does not apply."""
        return "a function sends nothing"

    def changed(self) -> str:
        """Return which of its arguments the function has changed."""
        return self._changed

    def _returned(self, effective: Sequence[Adapter], weights: list[float], scales: list[float]) -> dict[str, Any]:
        """Call the function on copies, see whether it changes them, and return what it returned by module."""
        adapters, untouched = ([_plain(a, s) for a, s in zip(effective, scales, strict=True)] for _ in range(2))
        given: dict[str, Any] = {"adapters": adapters, "weights": weights[:], "scales": scales[:]}
        known = {}
        if _names_population(self._function):
            known[POPULATION] = self._population[:]
        with contextlib.redirect_stdout(sys.stderr):
            returned = asked(self._name, lambda: self._function(*given.values(), **known))
        same = {
            "adapters": _alike(adapters, untouched),
            "weights": given["weights"] == weights,
            "scales": given["scales"] == scales,
        }
        self._changed = next((name for name, is_same in same.items() if not is_same), self._changed)
        modules = ", ".join(SHAPES)
        if not isinstance(returned, Mapping) or set(returned) != set(SHAPES):
            got = sorted(map(str, returned)) if isinstance(returned, Mapping) else type(returned).__name__
            raise AdapterError(
                f"{self._name}: expected a dict of the modules {modules}, got {one_line(str(got))[:200]}; return one"
            )
        return dict(returned)

    def _product(self, name: str, value: object) -> Tensor:
        """Return the matrix that a module's value stands for.

        Raises:
            AdapterError: it is none of that shape, or not finite.
        """
        (num_out, num_in), pair = SHAPES[name], _pair(value)
        if pair is not None and pair[0].ndim == pair[1].ndim == 2 and pair[0].shape[1] == pair[1].shape[0]:
            product = _exact(pair[0]) @ _exact(pair[1])
        else:
            product = _exact(value) if isinstance(value, Tensor) else torch.empty(0)
        if product.shape != (num_out, num_in):
            raise AdapterError(
                f"{self._name}: expected (B, A) or a matrix of {num_out} × {num_in} for {name}, got {_shown(value)}; "
                "return that"
            )
        if not torch.isfinite(product).all():
            raise AdapterError(f"{self._name}: expected finite numbers for {name}, got NaN or infinity; correct it")
        return product


def _names_population(function: Function) -> bool:
    try:
        return POPULATION in inspect.signature(function).parameters
    except ValueError:
        return False


def _plain(adapter: Adapter, scale: float) -> dict[str, Factors]:
    """Return factors as training leaves them, without the scale, in memory of their own."""
    return {name: ((pair.b_OR / scale).float().clone(), pair.a_RI.float().clone()) for name, pair in adapter.items()}


def _alike(left: Sequence[object], right: Sequence[Mapping[str, Factors]]) -> bool:
    """Tell whether the adapters that a function was given are, bit for bit, what it was given."""
    if len(left) != len(right):
        return False
    for one, other in zip(left, right, strict=True):
        if not isinstance(one, Mapping) or list(one) != list(other):
            return False
        for name, factors in other.items():
            pair = _pair(one[name])
            if pair is None or not all(torch.equal(_exact(a), _exact(b)) for a, b in zip(pair, factors, strict=True)):
                return False
    return True


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _pair(value: object) -> Factors | None:
    """Return (B, A) where a value is two tensors."""
    if isinstance(value, Pair):
        return value.b_OR, value.a_RI
    match value:
        case [Tensor() as b, Tensor() as a]:
            return b, a
    return None


def _shown(value: object) -> str:
    """Return what a value is, for a message."""
    if (pair := _pair(value)) is not None:
        return f"({tuple(pair[0].shape)}, {tuple(pair[1].shape)})"
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
