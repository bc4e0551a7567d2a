"""Functions of one's own: a correct one keeps every law, five planted defects are found, and mistakes are one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedloom.audit.battery import BROKEN, EXEMPT, HOLDS, UNCLAIMED, Audit, audit
from fedloom.audit.function import FunctionSubject
from fedloom.methods.traits import Law

Adapters = Sequence[dict[str, tuple[Tensor, Tensor]]]
EVERY = frozenset(Law)
Pairs = dict[str, tuple[Tensor, Tensor]]


def stacked(adapters: Adapters, shares: Sequence[float], scales: Sequence[float]) -> Pairs:
    """Return FLoRA's stack, whose product is ``Σ p_k s_k B_k A_k``."""
    return {
        module: (
            torch.cat([p * s * one[module][0] for one, p, s in zip(adapters, shares, scales, strict=True)], dim=1),
            torch.cat([one[module][1] for one in adapters]),
        )
        for module in adapters[0]
    }


def correct(adapters: Adapters, weights: Sequence[float], scales: Sequence[float]) -> Pairs:
    return stacked(adapters, [weight / sum(weights) for weight in weights], scales)


def dense(adapters: Adapters, weights: Sequence[float], scales: Sequence[float]) -> dict[str, Tensor]:
    return {module: b @ a for module, (b, a) in correct(adapters, weights, scales).items()}


def means(adapters: Adapters, weights: Sequence[float], scales: Sequence[float]) -> Pairs:
    """Return FedIT: the means of the factors, for equal ranks."""
    found = {}
    for module in adapters[0]:
        b = sum(w * s * one[module][0] for one, w, s in zip(adapters, weights, scales, strict=True))
        a = sum(w * one[module][1] for one, w in zip(adapters, weights, strict=True))
        found[module] = (b / sum(weights), a / sum(weights))
    return found  # type: ignore[return-value]


# ---- the planted defects -------------------------------------------------------------------------------------------


def counted_twice(adapters: Adapters, weights: Sequence[float], scales: Sequence[float]) -> Pairs:
    shares = [weight / sum(weights) for weight in weights]
    return stacked([*adapters, adapters[0]], [*shares, shares[0]], [*scales, scales[0]])


def counted_twice_and_normalised(adapters: Adapters, weights: Sequence[float], scales: Sequence[float]) -> Pairs:
    return correct([*adapters, adapters[-1]], [*weights, weights[-1]], [*scales, scales[-1]])


def without_scale(adapters: Adapters, weights: Sequence[float], scales: Sequence[float]) -> Pairs:
    return correct(adapters, weights, [1.0 for _ in scales])


def with_one_scale(adapters: Adapters, weights: Sequence[float], scales: Sequence[float]) -> Pairs:
    """The first client's scale for all: right at equal ranks."""
    return correct(adapters, weights, [scales[0] for _ in scales])


def transposed_residual(adapters: Adapters, weights: Sequence[float], scales: Sequence[float]) -> dict[str, Tensor]:
    """FedEx-LoRA whose residual is transposed wherever that fits."""
    exact, found = dense(adapters, weights, scales), {}
    for module, (b, a) in means(adapters, weights, scales).items():
        residual = exact[module] - b @ a
        found[module] = b @ a + (residual.T if residual.shape[0] == residual.shape[1] else residual)
    return found


def over_all_registered(
    adapters: Adapters, weights: Sequence[float], scales: Sequence[float], population: Sequence[float]
) -> Pairs:
    return stacked(adapters, [weight / sum(population) for weight in weights], scales)


def remembering() -> Callable[..., Pairs]:
    """Return a function that normalises by the rows of the largest round that it has seen."""
    largest = 0.0

    def remember(adapters: Adapters, weights: Sequence[float], scales: Sequence[float]) -> Pairs:
        nonlocal largest
        largest = max(largest, sum(weights))
        return stacked(adapters, [weight / largest for weight in weights], scales)

    return remember


def audited(function: Callable[..., Any], claims: frozenset[Law] = EVERY, *, needs_one_rank: bool = False) -> Audit:
    return audit(FunctionSubject("mine:it", function, claims, needs_one_rank))


def test_a_correct_function_keeps_every_law() -> None:
    found = audited(correct)
    assert {one.law: one.verdict for one in found.findings} == {
        law: EXEMPT if law is Law.CATCH_UP else HOLDS for law in Law
    }


def test_a_function_may_return_matrices() -> None:
    found = audited(dense)
    assert not found.broken
    verdicts = {one.law: one.verdict for one in found.findings}
    assert verdicts[Law.STREAMING] == EXEMPT


ALONE = {Law.EXACTNESS, Law.ONE_CLIENT, Law.NORMALISATION}
"""The laws that break where shares do not sum to one, or a scale is wrong, for every client."""
FOUND: dict[str, tuple[Callable[..., Any], bool, set[Law]]] = {
    "one client counted twice": (
        counted_twice,
        False,
        ALONE | {Law.PERMUTATION, Law.EQUAL_CLIENTS, Law.SPLITTING, Law.STREAMING},
    ),
    "one client counted twice, normalised": (
        counted_twice_and_normalised,
        False,
        {Law.EXACTNESS, Law.PERMUTATION, Law.SPLITTING, Law.STREAMING},
    ),
    "alpha over rank dropped": (without_scale, False, ALONE | {Law.EQUAL_CLIENTS}),
    "alpha over the first client's rank": (
        with_one_scale,
        False,
        {Law.EXACTNESS, Law.PERMUTATION, Law.EQUAL_CLIENTS, Law.NORMALISATION, Law.STREAMING},
    ),
    "factor means called exact": (means, True, {Law.EXACTNESS, Law.RESCALING}),
    "a transposed residual": (transposed_residual, True, {Law.EXACTNESS, Law.RESCALING, Law.ORIENTATION}),
    "weights over all registered clients": (over_all_registered, False, ALONE | {Law.PARTIAL, Law.STREAMING}),
    "weights over the largest round": (remembering(), False, ALONE | {Law.PROPORTIONS, Law.STREAMING}),
}


@pytest.mark.parametrize("defect", FOUND)
def test_a_planted_defect_is_found_by_exactly_the_laws_that_it_breaks(defect: str) -> None:
    function, needs_one_rank, laws = FOUND[defect]
    found = audited(function, needs_one_rank=needs_one_rank)
    assert set(found.broken) == laws
    assert not [one.note for one in found.findings if one.note and one.verdict == BROKEN], "it ran"


ON_THE_PAGE = {
    "one client counted twice": "one client counted twice, normalised",
    "alpha / rank dropped": "alpha over rank dropped",
    "factor means called exact": "factor means called exact",
    "a transposed residual": "a transposed residual",
    "shares of all registered clients": "weights over all registered clients",
}


def test_the_page_says_which_laws_find_which_defect() -> None:
    page = (Path(__file__).parents[2] / "docs" / "audit.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+) \| (.+) \|$", page.partition("| defect |")[2], re.MULTILINE)
    found = {defect: set(laws.split(", ")) for defect, laws in rows if defect in ON_THE_PAGE}
    assert found == {defect: set(FOUND[planted][2]) for defect, planted in ON_THE_PAGE.items()}


def test_a_law_that_is_not_claimed_says_by_how_much_it_is_missed() -> None:
    found = audited(means, EVERY - {Law.EXACTNESS, Law.RESCALING}, needs_one_rank=True)
    assert not found.broken
    missed = {one.law: one.off_by["equal ranks"] for one in found.findings if one.verdict == UNCLAIMED}
    assert missed.keys() == {Law.EXACTNESS, Law.RESCALING}
    assert all(value is not None and 0.1 < value < 10 for value in missed.values())


# ---- functions that fail -------------------------------------------------------------------------------------------


def raising(*_: object) -> Pairs:
    raise RuntimeError("no\nluck")


def leaving(*_: object) -> Pairs:
    raise SystemExit(3)


def transposed(adapters: Adapters, weights: Sequence[float], scales: Sequence[float]) -> dict[str, Tensor]:
    return {module: product.T for module, product in dense(adapters, weights, scales).items()}


def broken(adapters: Adapters, weights: Sequence[float], scales: Sequence[float]) -> dict[str, Tensor]:
    return {module: product / 0.0 for module, product in dense(adapters, weights, scales).items()}


def listing(adapters: Adapters, weights: Sequence[float], scales: Sequence[float]) -> list[Tensor]:
    return list(dense(adapters, weights, scales).values())


def forgetting(adapters: Adapters, weights: Sequence[float], scales: Sequence[float]) -> dict[str, Tensor]:
    return dict(list(dense(adapters, weights, scales).items())[:1])


def mismatched(adapters: Adapters, weights: Sequence[float], scales: Sequence[float]) -> Pairs:
    return {module: (b[:, :1], a) for module, (b, a) in correct(adapters, weights, scales).items()}


@pytest.mark.parametrize(
    ("function", "line"),
    [
        (raising, "mine:it raised RuntimeError: no; correct it"),
        (leaving, "mine:it raised SystemExit: 3; correct it"),
        (transposed, r"expected (B, A) or a matrix of 8 × 12 for layers.1.v, got (12, 8); return that"),
        (broken, "expected finite numbers for layers.0.q, got NaN or infinity; correct it"),
        (listing, "expected a dict of the modules layers.0.q, layers.1.v, got list; return one"),
        (forgetting, "expected a dict of the modules layers.0.q, layers.1.v, got ['layers.0.q']; return one"),
        (mismatched, "expected (B, A) or a matrix of 12 × 12 for layers.0.q, got ((12, 1), ("),
        (lambda *_: None, "got NoneType; return one"),
    ],
    ids=["raises", "exits", "transposed", "not finite", "a list", "one module", "two ranks", "nothing"],
)
def test_a_function_that_fails_breaks_every_law_in_one_line_each(function: Callable[..., Any], line: str) -> None:
    found = audited(function)
    assert set(found.broken) == set(Law) - {Law.CATCH_UP}
    for one in found.findings:
        if one.law is not Law.CATCH_UP:
            assert line in one.note
            assert "\n" not in one.note
    assert len(found.lines()) < 40


def scaled_in_place(adapters: Adapters, weights: Sequence[float], scales: Sequence[float]) -> Pairs:
    for one, scale in zip(adapters, scales, strict=True):
        for b, _ in one.values():
            b *= scale
    return correct(adapters, weights, [1.0 for _ in scales])


def popping(adapters: Any, weights: Any, scales: Any) -> Pairs:
    kept = correct(adapters, weights, scales)
    adapters.pop()
    return kept


def normalising_in_place(adapters: Adapters, weights: Any, scales: Sequence[float]) -> Pairs:
    whole = sum(weights)
    weights[:] = [weight / whole for weight in weights]
    return stacked(adapters, weights, scales)


@pytest.mark.parametrize(
    ("function", "changed"),
    [(scaled_in_place, "adapters"), (popping, "adapters"), (normalising_in_place, "weights")],
)
def test_a_function_that_changes_its_inputs_breaks_that_law_alone(function: Callable[..., Any], changed: str) -> None:
    found = audited(function)
    assert found.broken == (Law.INPUTS,)
    assert f"mine:it: expected its inputs unchanged, it changed {changed}; change a copy" in found.lines()[-2]


def test_a_function_whose_result_changes_from_call_to_call_breaks_the_law_of_inputs() -> None:
    calls = 0

    def drifting(adapters: Adapters, weights: Sequence[float], scales: Sequence[float]) -> Pairs:
        nonlocal calls
        calls += 1
        return correct(adapters, weights, [scale * (1 + calls / 1000) for scale in scales])

    assert Law.INPUTS in audited(drifting).broken


def test_the_rows_of_all_clients_are_given_to_a_function_that_names_them() -> None:
    seen = set()

    def looking(
        adapters: Adapters, weights: Sequence[float], scales: Sequence[float], *, population: Sequence[float]
    ) -> Pairs:
        seen.add((len(adapters), len(population)))
        return correct(adapters, weights, scales)

    assert not audited(looking).broken
    assert {(2, 4), (2, 2), (1, 4), (5, 5)} <= seen
